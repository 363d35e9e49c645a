"""Several objectives in one run: each batch is of one kind, and the trainer draws batches of all kinds."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from fine_tuning.schema.preferences import JudgedReply, Pair
from fine_tuning.schema.prepared import PreparedRow, count_labels
from fine_tuning.training.objectives.objective import Batch, Objective
from fine_tuning.training.objectives.preference import PairPreference, ThumbPreference
from fine_tuning.training.objectives.retention import GeneralText, Retention
from fine_tuning.training.objectives.sft import SupervisedFineTuning
from fine_tuning.training.objectives.token_losses import TokenLosses
from fine_tuning.training.settings import TrainSettings

NAMES = {PreparedRow: "sft", Pair: "pairs", JudgedReply: "thumbs"}
_NUMBERS = {kind: number for number, kind in enumerate(NAMES)}


class Mixture:
    """One objective for each kind of item; see `Objective`. A batch says by `kind` (items) whose it is.

    With `retention`, each training batch ends with general texts; collated, they are a batch of their own in `general`.
    """

    def __init__(self, parts: Mapping[type, Objective], retention: Retention | None = None) -> None:
        self.parts = dict(parts)
        self.retention = retention
        self._by_number = {_NUMBERS[kind]: part for kind, part in self.parts.items()}

    def batches(self, items: Sequence[Any], budget: int, multiple: int = 1) -> list[list[Any]]:
        """The batches of each kind, one kind after the other."""
        return [
            batch
            for kind, part in self.parts.items()
            if (own := [item for item in items if type(item) is kind])
            for batch in part.batches(own, budget, multiple)
        ]

    def training_batches(self, items: Sequence[Any], budget: int, multiple: int = 1) -> list[list[Any]]:
        """The batches, with general texts where there is `retention`."""
        found = self.batches(items, budget, multiple)
        return self.retention.beside(found, budget) if self.retention else found

    def collate(self, items: Sequence[Any]) -> Batch:
        """What the objective of the items' kind makes of them, and `kind`."""
        own, kind = own_items(items), type(items[0])
        inputs, texts = self.parts[kind].collate(own), items[len(own) :]
        inputs |= {"kind": torch.full((len(next(iter(inputs.values()))),), _NUMBERS[kind])}
        if not (texts and self.retention):
            return inputs
        general = self.retention.collate(texts)
        # The mean divergence counts as much as the mean loss of the batch, whatever the batch is divided into.
        scale = self.retention.weight * self.count(inputs) / general["attention_mask"][:, 1:].sum()
        return inputs | {"general": general | {"scale": scale.expand(len(texts))}}

    def count(self, inputs: Batch) -> torch.Tensor:
        """How many units the batch has."""
        return self._of(inputs).count(_own(inputs))

    def loss(self, model: Any, inputs: Batch) -> torch.Tensor:
        """Summed loss of the batch's units, and that of its general texts."""
        loss, general = self._of(inputs).loss(model, _own(inputs)), inputs.get("general")
        if self.retention and general and len(general["scale"]):  # a part of a batch may have got none
            loss = loss + general["scale"][0] * self.retention.loss(model, general)
        return loss

    def measure(self, model: Any, inputs: Batch) -> dict[str, torch.Tensor]:
        """What the objective of the batch's kind measures."""
        return self._of(inputs).measure(model, _own(inputs))

    def name_of(self, items: Sequence[Any]) -> str:
        """Of the objective that a batch of items is for."""
        return NAMES[type(items[0])]

    def _of(self, inputs: Batch) -> Objective:
        return self._by_number[int(inputs["kind"][0])]


def own_items(batch: Sequence[Any]) -> list[Any]:
    """Those of a training batch that are learned from: its general texts are left out."""
    return [item for item in batch if not isinstance(item, GeneralText)]


def _own(inputs: Batch) -> Batch:
    return {name: values for name, values in inputs.items() if name not in ("kind", "general")}


def objective_for(
    items: Sequence[Any],
    held_out: Sequence[Any],
    token_losses: TokenLosses,
    settings: TrainSettings,
    texts: Sequence[GeneralText] = (),
) -> Mixture:
    """The objectives that training items ask for, and held-out ones where no training item is of their kind.

    A pair or a thumb counts as many units as it has trained tokens on average, so that steps which accumulate several
    batches weigh them as if each stood alone.
    """

    def of(kind: type) -> list[Any]:
        return [item for item in items if type(item) is kind] or [item for item in held_out if type(item) is kind]

    rows, pairs, thumbs = map(of, NAMES)
    parts: dict[type, Objective] = {}
    if rows:
        parts[PreparedRow] = SupervisedFineTuning(token_losses)
    if pairs:
        weight = count_labels([row for pair in pairs for row in (pair.chosen, pair.rejected)]) / len(pairs)
        parts[Pair] = PairPreference(token_losses, settings.preference, weight)
    if thumbs:
        weight = count_labels([thumb.reply for thumb in thumbs]) / len(thumbs)
        parts[JudgedReply] = ThumbPreference(token_losses, settings.preference, weight, thumbs)
    return Mixture(parts, Retention(texts, settings.retention, token_losses.pad_token_id) if texts else None)
