"""Micro-batches: on a CPU two halves of a batch are computed at once, each by a thread of its own.

Such threads meet once a step, where those that share a matrix product meet thousands of times: on two cores that is
half as fast again, and several times as fast beside other busy programs. Gradients are added in the order of the
parts, so the result does not depend on which thread ends first.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import Executor

import torch

from fine_tuning.runtime.hardware import Hardware, process_count
from fine_tuning.training.objectives.objective import Batch
from fine_tuning.training.settings import TrainSettings


def is_plain(settings: TrainSettings) -> bool:
    """Whether steps may be reordered or recorded.

    Not where they draw random numbers (dropout, NEFTune), where rows are laid end to end (packing), where activations
    are recomputed (checkpointing), where weights are dequantised for every product (QLoRA), and in several processes.
    """
    random, packed = settings.lora.dropout or settings.neftune_alpha, settings.packing
    other = settings.gradient_checkpointing or settings.method == "qlora" or process_count() > 1
    return not (random or packed or other)


def count_micro_batches(settings: TrainSettings, hardware: Hardware) -> int:
    """How many parts of a batch to compute at once: two on a CPU where steps are plain, one elsewhere."""
    wanted = settings.acceleration == "auto" and hardware.device == "cpu" and hardware.threads > 1
    return 2 if wanted and is_plain(settings) else 1


def split(inputs: Batch, count: int) -> list[Batch]:
    """Parts of a batch. Its rows are sorted by length: taken in turns, the parts are of one size."""

    count = min(count, len(next(iter(inputs.values()))))

    def part(batch: Batch, start: int) -> Batch:
        return {
            key: part(value, start) if isinstance(value, dict) else value[start::count] for key, value in batch.items()
        }

    return [part(inputs, start) for start in range(count)]


def add_gradients(
    loss_of: Callable[[Batch], torch.Tensor],
    parts: Sequence[Batch],
    parameters: Sequence[torch.nn.Parameter],
    pool: Executor,
) -> torch.Tensor:
    """Sum of the losses of the parts; its gradient is added to the `grad` of `parameters`."""

    def differentiate(part: Batch) -> tuple[torch.Tensor, Sequence[torch.Tensor]]:
        loss = loss_of(part)
        return loss.detach(), torch.autograd.grad(loss, parameters)

    losses, gradients = zip(*pool.map(differentiate, parts), strict=True)
    for parameter, *of_parts in zip(parameters, *gradients, strict=True):
        total = sum(of_parts[1:], start=of_parts[0])
        parameter.grad = total if parameter.grad is None else parameter.grad + total
    return torch.stack(losses).sum()
