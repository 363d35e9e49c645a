"""Supervised fine-tuning: cross-entropy of the trained tokens."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fine_tuning.schema.chat_format import NOT_TRAINED
from fine_tuning.schema.prepared import PreparedRow
from fine_tuning.training.objectives.objective import Batch
from fine_tuning.training.objectives.token_losses import TokenLosses


@dataclass
class SupervisedFineTuning:
    """Negative log-likelihood (nats) of the trained tokens, summed over them; see `Objective`."""

    token_losses: TokenLosses

    def batches(self, rows: Sequence[PreparedRow], budget: int, multiple: int = 1) -> list[list[PreparedRow]]:
        """Rows of like length."""
        return self.token_losses.batches(rows, budget, multiple)

    def collate(self, rows: Sequence[PreparedRow]) -> Batch:
        """input_ids, labels and what the model needs beside them."""
        return self.token_losses.collate(rows)

    def count(self, inputs: Batch) -> torch.Tensor:
        """Number of trained tokens."""
        return (inputs["labels"][:, 1:] != NOT_TRAINED).sum()

    def loss(self, model: Any, inputs: Batch) -> torch.Tensor:
        """Summed negative log-likelihood of the trained tokens."""
        return self.token_losses(model, inputs)[0].sum()

    def measure(self, model: Any, inputs: Batch) -> dict[str, torch.Tensor]:
        """The loss alone."""
        return {"loss": self.loss(model, inputs)}
