"""What each trained token of a batch costs, by transformers' own forward pass: what objectives are made of."""

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn import functional

from fine_tuning.schema.chat_format import NOT_TRAINED
from fine_tuning.schema.prepared import PreparedRow, batch_by_tokens, collate
from fine_tuning.training.objectives.objective import Batch


class TokenLosses:
    """Negative log-likelihoods (nats) of the trained tokens; `AcceleratedTokenLosses` is the faster form."""

    def __init__(self, pad_token_id: int, packing: bool = False) -> None:
        self.pad_token_id = pad_token_id
        self.packing = packing

    def batches(self, rows: Sequence[PreparedRow], budget: int, multiple: int = 1) -> list[list[PreparedRow]]:
        """Rows of like length, as `batch_by_tokens` groups them."""
        return batch_by_tokens(rows, budget, multiple)

    def collate(self, rows: Sequence[PreparedRow]) -> Batch:
        """input_ids, attention_mask and labels, padded on the right; packed, as `collate_packed` lays them."""
        return collate_packed(rows) if self.packing else collate(rows, self.pad_token_id)

    def __call__(self, model: Any, inputs: Batch, together: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """The loss of each trained token, and the number of the row that it stands in: two tensors (trained tokens).

        Args:
            inputs: a collated batch.
            together: rows that are likely to begin alike, such as the 2 of a pair; None: any may.
        """
        logits = model(**{name: value for name, value in inputs.items() if name != "labels"}).logits
        rows, columns = (inputs["labels"][:, 1:] != NOT_TRAINED).nonzero(as_tuple=True)
        targets = inputs["labels"][rows, columns + 1]
        return functional.cross_entropy(logits[rows, columns].float(), targets, reduction="none"), rows

    def of_rows(self, model: Any, inputs: Batch, together: int | None = None) -> torch.Tensor:
        """Summed loss of each row (rows): the negative log-likelihood of what it trains."""
        losses, rows = self(model, inputs, together)
        return losses.new_zeros(len(inputs["labels"])).index_add(0, rows, losses)


def collate_packed(batch: Sequence[PreparedRow]) -> Batch:
    """Lay a batch's rows end to end in one: input_ids, position_ids and labels, each an int64 tensor (1, tokens).

    Positions start anew with each row and no attention mask is passed, from which transformers makes the mask that
    keeps a row from seeing its neighbours. A row's first token is no label: its neighbour would have to predict it.
    """
    return {
        "input_ids": torch.tensor([[token for row in batch for token in row.input_ids]]),
        "position_ids": torch.tensor([[position for row in batch for position in range(len(row.input_ids))]]),
        "labels": torch.tensor([[label for row in batch for label in (NOT_TRAINED, *row.labels[1:])]]),
    }
