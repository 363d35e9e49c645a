"""A transformers.Trainer that computes losses at trained positions only, and on a CPU two halves of a batch at once."""

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from typing import Any

import torch
from torch.nn import functional
from transformers import Trainer

from fine_tuning.schema.prepared import IGNORED_LABEL, Row
from fine_tuning.training.acceleration.fused import has_plain_head, summed_label_loss
from fine_tuning.training.acceleration.shared_prefix import lay_out
from fine_tuning.training.processes import of_main_process

Batch = dict[str, torch.Tensor]


class LabelTrainer(Trainer):
    """A Trainer whose output head sees only the positions that carry a label.

    The head of a small model with a large vocabulary costs a fifth of the work, most of it for prompts and padding.
    The dataset's items are whole batches, so that any sampler shuffles them and any launcher shards them.

    Args:
        lanes: parts of a batch that are computed at the same time, each by a thread of its own. Threads that share a
            batch meet only once, where those that share a matrix product meet thousands of times a step: on two cores
            that is half as fast again, and several times as fast beside other busy programs. Gradients are added in
            the order of the parts, so the result does not depend on who is first.
        shared_prefixes: whether what all rows of a batch begin with is computed once; see `share_prefixes`.
    """

    def __init__(self, lanes: int = 1, shared_prefixes: bool = False, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.loss_is_scaled_for_ga = True
        self.lanes = lanes
        self.shared_prefixes = shared_prefixes
        self._pool = ThreadPoolExecutor(lanes, thread_name_prefix="lane")
        self._at = _Positions()
        self._head = self.model.get_output_embeddings()
        self._head.register_forward_pre_hook(lambda module, inputs: self._select(inputs[0]))
        self._quick_head = not (self.args.bf16 or self.args.fp16) and has_plain_head(self.model)
        self._trained = [p for p in self.model.parameters() if p.requires_grad]
        # Asked for its parameters, a model looks through all its modules, which takes as long as much of a GPU's step.
        self.model.zero_grad = self._drop_gradients

    def _select(self, hidden: torch.Tensor) -> tuple[torch.Tensor]:
        # (rows, tokens, hidden) -> (1, trained positions, hidden); the quick head is given them aside.
        if self._at.trained is None:
            return (hidden,)
        self._at.hidden = hidden[self._at.trained]
        return (hidden[:1, :1] if self._quick_head else self._at.hidden.unsqueeze(0),)

    def training_step(
        self, model: torch.nn.Module, inputs: Batch, num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        """Loss of a batch and, in the parameters' `grad`, its gradient."""
        if not model.training:  # walking through all modules takes as long as a tenth of a step on a GPU
            model.train()
        inputs = self._prepare_inputs(inputs)
        if self.lanes == 1:
            with self.compute_loss_context_manager():
                loss = self.compute_loss(model, inputs, num_items_in_batch=num_items_in_batch)
            self.accelerator.backward(loss)
            return loss.detach()
        if num_items_in_batch is None:
            num_items_in_batch = int((inputs["labels"][:, 1:] != IGNORED_LABEL).sum())
        # Rows come sorted by length: taken in turns, the parts are of one size.
        parts = [{name: value[lane :: self.lanes] for name, value in inputs.items()} for lane in range(self.lanes)]
        parts = [part for part in parts if len(part["labels"])]

        def differentiate(part: Batch) -> tuple[torch.Tensor, Sequence[torch.Tensor]]:
            with self.compute_loss_context_manager():
                loss = self.summed_loss(model, part)[0] / num_items_in_batch
            return loss.detach(), torch.autograd.grad(loss, self._trained)

        losses, gradients = zip(*self._pool.map(differentiate, parts), strict=True)
        for parameter, *of_parts in zip(self._trained, *gradients, strict=True):
            total = sum(of_parts[1:], start=of_parts[0])
            parameter.grad = total if parameter.grad is None else parameter.grad + total
        return torch.stack(losses).sum()

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: Batch,
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """Summed cross-entropy of the trained tokens over their number in the whole step, on all devices."""
        total, count = self.summed_loss(model, inputs)
        if num_items_in_batch is None:
            num_items_in_batch = count
        # Each process has its share of the sum and gradients are averaged over processes: multiply to undo that.
        loss = total * self.accelerator.num_processes / num_items_in_batch
        return (loss, None) if return_outputs else loss

    def summed_loss(self, model: torch.nn.Module, inputs: Batch) -> tuple[torch.Tensor, int]:
        """(sum of the negative log-likelihoods of the trained tokens in nats, their number)."""
        if self.shared_prefixes:
            inputs = lay_out(inputs)
        labels = inputs["labels"]
        # Looked up before the layers: afterwards a GPU would have to be through with them first.
        rows, columns = (labels[:, 1:] != IGNORED_LABEL).nonzero(as_tuple=True)
        targets = labels[rows, columns + 1]
        self._at.trained = rows, columns
        try:
            logits = model(**{name: value for name, value in inputs.items() if name != "labels"}).logits[0]
        finally:
            self._at.trained = None
        # Kept until the next step, the hidden states would keep all that they were computed from.
        hidden, self._at.hidden = self._at.hidden, None
        if self._quick_head:
            return summed_label_loss(hidden, self._head.weight, targets), targets.numel()
        return functional.cross_entropy(logits.float(), targets, reduction="sum"), targets.numel()

    def floating_point_ops(self, inputs: Batch) -> int:
        """Not counted: nobody reads it, and counting the parameters anew takes as long as `model.train()`."""
        return 0

    def _drop_gradients(self, set_to_none: bool = True) -> None:
        for parameter in self._trained:
            parameter.grad = None

    def _clip_grad_norm(self, model: torch.nn.Module) -> torch.Tensor:
        if self.accelerator.num_processes > 1:
            return super()._clip_grad_norm(model)
        return self.accelerator.clip_grad_norm_(self._trained, self.args.max_grad_norm)

    def mean_loss(self) -> float:
        """Mean loss a trained token over the validation rows."""
        was_training = self.model.training
        self.model.eval()
        measured = list(self._pool.map(self._measure, self.eval_dataset))
        self.model.train(was_training)
        return sum(total for total, _ in measured) / sum(count for _, count in measured)

    @torch.no_grad()
    def _measure(self, batch: Sequence[Row]) -> tuple[float, int]:
        inputs = self._prepare_inputs(self.data_collator([batch]))
        with self.autocast_precision():
            loss, count = self.summed_loss(self.model, inputs)
        return loss.item(), count

    def autocast_precision(self) -> Any:
        """The number format that training itself computes in."""
        if not (self.args.bf16 or self.args.fp16):
            return nullcontext()
        return torch.autocast(self.args.device.type, torch.bfloat16 if self.args.bf16 else torch.float16)

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Log the validation loss the way `Trainer.evaluate` does."""
        metrics = {"eval_loss": of_main_process(self.mean_loss())}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics


class _Positions(threading.local):
    """The trained positions of the batch that a thread is at, and the hidden states there."""

    trained: tuple[torch.Tensor, torch.Tensor] | None = None
    hidden: torch.Tensor | None = None
