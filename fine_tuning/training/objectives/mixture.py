"""Several objectives in one run: each batch is of one kind, and the trainer draws batches of all kinds."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from fine_tuning.schema.preferences import JudgedReply, Pair
from fine_tuning.schema.prepared import PreparedRow, count_labels
from fine_tuning.training.objectives.objective import Batch, Objective
from fine_tuning.training.objectives.preference import PairPreference, ThumbPreference
from fine_tuning.training.objectives.sft import SupervisedFineTuning
from fine_tuning.training.objectives.token_losses import TokenLosses
from fine_tuning.training.settings import PreferenceSettings

NAMES = {PreparedRow: "sft", Pair: "pairs", JudgedReply: "thumbs"}
_NUMBERS = {kind: number for number, kind in enumerate(NAMES)}


class Mixture:
    """One objective for each kind of item; see `Objective`. A batch says by `kind` (items) whose it is."""

    def __init__(self, parts: Mapping[type, Objective]) -> None:
        self.parts = dict(parts)
        self._by_number = {_NUMBERS[kind]: part for kind, part in self.parts.items()}

    def batches(self, items: Sequence[Any], budget: int, multiple: int = 1) -> list[list[Any]]:
        """The batches of each kind, one kind after the other."""
        return [
            batch
            for kind, part in self.parts.items()
            if (own := [item for item in items if type(item) is kind])
            for batch in part.batches(own, budget, multiple)
        ]

    def collate(self, items: Sequence[Any]) -> Batch:
        """What the objective of the items' kind makes of them, and `kind`."""
        inputs = self.parts[type(items[0])].collate(items)
        return inputs | {"kind": torch.full((len(next(iter(inputs.values()))),), _NUMBERS[type(items[0])])}

    def count(self, inputs: Batch) -> torch.Tensor:
        """How many units the batch has."""
        return self._of(inputs).count(_without_kind(inputs))

    def loss(self, model: Any, inputs: Batch) -> torch.Tensor:
        """Summed loss of the batch's units."""
        return self._of(inputs).loss(model, _without_kind(inputs))

    def measure(self, model: Any, inputs: Batch) -> dict[str, torch.Tensor]:
        """What the objective of the batch's kind measures."""
        return self._of(inputs).measure(model, _without_kind(inputs))

    def name_of(self, items: Sequence[Any]) -> str:
        """Of the objective that a batch of items is for."""
        return NAMES[type(items[0])]

    def _of(self, inputs: Batch) -> Objective:
        return self._by_number[int(inputs["kind"][0])]


def _without_kind(inputs: Batch) -> Batch:
    return {name: values for name, values in inputs.items() if name != "kind"}


def objective_for(items: Sequence[Any], token_losses: TokenLosses, settings: PreferenceSettings) -> Mixture:
    """The objectives that training items ask for. A pair or a thumb counts as many units as it has trained tokens on
    average, so that steps which accumulate several batches weigh them as if each stood alone."""
    rows, pairs, thumbs = ([item for item in items if type(item) is kind] for kind in NAMES)
    parts: dict[type, Objective] = {}
    if rows:
        parts[PreparedRow] = SupervisedFineTuning(token_losses)
    if pairs:
        weight = count_labels([row for pair in pairs for row in (pair.chosen, pair.rejected)]) / len(pairs)
        parts[Pair] = PairPreference(token_losses, settings, weight)
    if thumbs:
        weight = count_labels([thumb.reply for thumb in thumbs]) / len(thumbs)
        parts[JudgedReply] = ThumbPreference(token_losses, settings, weight, thumbs)
    return Mixture(parts)
