"""A transformers.Trainer for objectives: whole batches as items, losses that are sums over counted units."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import torch
from torch.utils.data import Sampler
from transformers import Trainer

from fine_tuning.schema.preferences import JudgedReply
from fine_tuning.schema.prepared import PreparedRow
from fine_tuning.training.acceleration.micro_batches import add_gradients, split
from fine_tuning.training.objectives.mixture import Mixture, own_items
from fine_tuning.training.objectives.objective import Batch
from fine_tuning.training.objectives.preference import Referenced
from fine_tuning.training.processes import of_main_process


class SupervisedFirst(Sampler[int]):
    """Numbers of batches: in each epoch those of prepared rows in a random order, then all others in another."""

    def __init__(self, batches: Sequence[Sequence[Any]], seed: int) -> None:
        self.later = [not isinstance(batch[0], PreparedRow) for batch in batches]
        self.seed = seed
        self.epoch = 0

    def __iter__(self) -> Iterator[int]:
        """The order of this epoch."""
        shuffled = torch.randperm(len(self), generator=torch.Generator().manual_seed(self.seed + self.epoch))
        return iter(sorted(shuffled.tolist(), key=self.later.__getitem__))

    def __len__(self) -> int:
        """How many batches there are."""
        return len(self.later)

    def set_epoch(self, epoch: int) -> None:
        """Called by the trainer before each epoch."""
        self.epoch = epoch


class LabelTrainer(Trainer):
    """A Trainer that gets its batches and losses from an objective.

    The datasets' items are whole batches of items, so that any sampler shuffles them and any launcher shards them.

    Args:
        micro_batches: parts of a batch that are computed at the same time; see `count_micro_batches`.
        supervised_first: of each epoch's batches, those of prepared rows; otherwise batches of all kinds are mixed.
    """

    def __init__(
        self, objective: Mixture, micro_batches: int = 1, supervised_first: bool = False, **arguments: Any
    ) -> None:
        super().__init__(data_collator=lambda batch: objective.collate(*batch), **arguments)
        self.loss_is_scaled_for_ga = True
        self.objective = objective
        self.micro_batches = micro_batches
        self.supervised_first = supervised_first
        self._pool = ThreadPoolExecutor(micro_batches, thread_name_prefix="micro-batch")
        self._trained = [p for p in self.model.parameters() if p.requires_grad]

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int] | None:
        if self.supervised_first:
            return SupervisedFirst(self.train_dataset, self.args.seed)
        return super()._get_train_sampler(train_dataset)

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

        parts = split(inputs, self.micro_batches)
        if "sign" in inputs:  # judged replies: each is compared with a mean over the batch
            compare = partial(self._without_gradients, self.objective.parts[JudgedReply].compare_with)
            kl = torch.cat(list(self._pool.map(compare, parts))).mean()
            parts = [part | {"kl": kl.expand(len(part["sign"]))} for part in parts]
        if self.micro_batches > 1:
            return add_gradients(loss_of, parts, self._trained, self._pool)
        loss = loss_of(parts[0])
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

    def note_references(self, known: dict[str, tuple[float, float]]) -> None:
        """Measure the log-likelihoods of preference items under the model as it is now, where `known` lacks them."""
        batches = [own_items(batch) for batch in (*self.train_dataset, *self.eval_dataset)]
        batches = [batch for batch in batches if isinstance(self.objective.parts[type(batch[0])], Referenced)]
        missing = [batch for batch in batches if any(item.id not in known for item in batch)]
        for batch, found in zip(missing, self._pool.map(self._reference, missing), strict=True):
            known |= {item.id: tuple(values) for item, values in zip(batch, found, strict=True)}
        for batch in batches:
            self.objective.parts[type(batch[0])].references |= {item.id: known[item.id] for item in batch}

    def _reference(self, batch: Sequence[Any]) -> list[list[float]]:
        part = self.objective.parts[type(batch[0])]
        return self._without_gradients(part.log_likelihoods, part.collate(batch)).tolist()

    def validate(self) -> dict[str, float]:
        """Means over the validation items: `eval_loss` over all units, and of each objective what it measures.

        `eval_sft_loss` is in nats a trained token; the names of others begin with `eval_pairs_` and `eval_thumbs_`.
        """
        was_training = self.model.training
        self.model.eval()
        measured = list(self._pool.map(self._measure, self.eval_dataset))
        self.model.train(was_training)
        total: Counter[str] = Counter()
        units: Counter[str] = Counter()
        for name, items, count, sums in measured:
            units[name] += count
            units["all"] += count
            total["all"] += sums["loss"]
            units[f"{name} items"] += items
            for what, value in sums.items():
                total[f"{name}_{what}"] += value
        means = {"eval_loss": total.pop("all") / units["all"]}
        for key, value in total.items():
            name, _, what = key.partition("_")
            means[f"eval_{key}"] = value / units[name if what == "loss" else f"{name} items"]
        return means

    def _measure(self, batch: Sequence[Any]) -> tuple[str, int, float, dict[str, float]]:
        inputs = self.data_collator([batch])
        sums = self._without_gradients(self.objective.measure, inputs)
        name = self.objective.name_of(batch)
        return name, len(batch), float(self.objective.count(inputs)), {key: value.item() for key, value in sums.items()}

    @torch.no_grad()
    def _without_gradients(self, function: Callable[[Any, Batch], Any], inputs: Batch) -> Any:
        dtype, mixed = torch.float16 if self.args.fp16 else torch.bfloat16, self.args.bf16 or self.args.fp16
        with torch.autocast(self.args.device.type, dtype, enabled=mixed):  # as training itself computes
            return function(self.model, self._prepare_inputs(inputs))

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Log the validation loss the way `Trainer.evaluate` does."""
        metrics = {name: of_main_process(value) for name, value in self.validate().items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics
