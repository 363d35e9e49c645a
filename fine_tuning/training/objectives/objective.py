"""The interface of training objectives. A new one is a file in this folder and a line in `objective_for`."""

from collections.abc import Sequence
from typing import Any, Protocol

import torch

Batch = dict[str, Any]  # tensors, by name


class Objective(Protocol):
    """What a batch is and what its loss is.

    A loss is a sum over units, such as trained tokens or pairs of replies, and `count` is their number: gradients of
    micro-batches, accumulated batches and processes then add up to that of the mean over all units of a step.
    """

    def batches(self, items: Sequence[Any], budget: int, multiple: int = 1) -> list[list[Any]]:
        """Group items into batches of at most `budget` padded tokens and of a multiple of `multiple` items."""

    def collate(self, items: Sequence[Any]) -> Batch:
        """The tensors of one batch, each with one row an item."""

    def count(self, inputs: Batch) -> torch.Tensor:
        """How many units a collated batch has: one number, on the device of the batch."""

    def loss(self, model: Any, inputs: Batch) -> torch.Tensor:
        """Sum of the loss over the units of a collated batch: a tensor of one element, to be differentiated."""

    def measure(self, model: Any, inputs: Batch) -> dict[str, torch.Tensor]:
        """`loss`, and sums over the batch's items of what describes it beside the loss."""
