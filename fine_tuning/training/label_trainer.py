"""A transformers.Trainer for any `Objective`: whole batches as items, losses that are sums over counted units."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from transformers import Trainer

from fine_tuning.schema.prepared import PreparedRow
from fine_tuning.training.acceleration.micro_batches import add_gradients, split
from fine_tuning.training.objectives.objective import Batch, Objective
from fine_tuning.training.processes import of_main_process


class LabelTrainer(Trainer):
    """A Trainer that gets its batches and losses from an objective.

    The datasets' items are whole batches of rows, so that any sampler shuffles them and any launcher shards them.

    Args:
        micro_batches: parts of a batch that are computed at the same time; see `count_micro_batches`.
    """

    def __init__(self, objective: Objective, micro_batches: int = 1, **arguments: Any) -> None:
        super().__init__(data_collator=lambda batch: objective.collate(*batch), **arguments)
        self.loss_is_scaled_for_ga = True
        self.objective = objective
        self.micro_batches = micro_batches
        self._pool = ThreadPoolExecutor(micro_batches, thread_name_prefix="micro-batch")
        self._trained = [p for p in self.model.parameters() if p.requires_grad]

    def training_step(
        self, model: torch.nn.Module, inputs: Batch, num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        """Summed loss of a batch over the units of the whole step and all devices; the gradient is added to `grad`."""
        if not model.training:  # walking through all modules takes as long as a tenth of a step on a GPU
            model.train()
        inputs = self._prepare_inputs(inputs)
        if num_items_in_batch is None:
            num_items_in_batch = self.objective.count(inputs)

        def loss_of(part: Batch) -> torch.Tensor:
            with self.compute_loss_context_manager():
                # Each process has its share of the sum and gradients are averaged over processes: undo that.
                return self.objective.loss(model, part) * self.accelerator.num_processes / num_items_in_batch

        if self.micro_batches > 1:
            return add_gradients(loss_of, split(inputs, self.micro_batches), self._trained, self._pool)
        loss = loss_of(inputs)
        self.accelerator.backward(loss)
        return loss.detach()

    def _get_num_items_in_batch(self, batch_samples: list[Batch], device: torch.device) -> torch.Tensor:
        """Units of a step's batches, of all processes; transformers would count labels, which not all batches have."""
        count = torch.as_tensor(sum(map(self.objective.count, batch_samples)), device=device)
        return self.accelerator.gather(count).sum() if self.args.world_size > 1 else count

    def floating_point_ops(self, inputs: Batch) -> int:
        """Not counted: it is not used, and counting parameters takes as long as `model.train()`."""
        return 0

    def _clip_grad_norm(self, model: torch.nn.Module) -> torch.Tensor:
        if self.accelerator.num_processes > 1:
            return super()._clip_grad_norm(model)
        return self.accelerator.clip_grad_norm_(self._trained, self.args.max_grad_norm)

    def mean_loss(self) -> float:
        """Mean loss a unit, such as a trained token, over the validation rows."""
        was_training = self.model.training
        self.model.eval()
        measured = list(self._pool.map(self._measure, self.eval_dataset))
        self.model.train(was_training)
        return sum(total for total, _ in measured) / sum(count for _, count in measured)

    @torch.no_grad()
    def _measure(self, batch: Sequence[PreparedRow]) -> tuple[float, int]:
        inputs = self._prepare_inputs(self.data_collator([batch]))
        dtype, mixed = torch.float16 if self.args.fp16 else torch.bfloat16, self.args.bf16 or self.args.fp16
        with torch.autocast(self.args.device.type, dtype, enabled=mixed):  # as training itself computes
            return self.objective.loss(self.model, inputs).item(), int(self.objective.count(inputs))

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Log the validation loss the way `Trainer.evaluate` does."""
        metrics = {"eval_loss": of_main_process(self.mean_loss())}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics
