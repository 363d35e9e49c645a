"""What a run learns from, of the rows, pairs and thumbs that there are."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from fine_tuning.common.errors import UserError, count_of
from fine_tuning.schema.preferences import Item, JudgedReply, Pair
from fine_tuning.schema.prepared import PreparedRow
from fine_tuning.training.settings import TrainSettings


class Prepared(NamedTuple):
    """The prepared rows, pairs and judged replies of a split."""

    rows: Sequence[PreparedRow]
    pairs: Sequence[Pair]
    thumbs: Sequence[JudgedReply]


def choose_items(settings: TrainSettings, train: Prepared, validation: Prepared) -> tuple[list[Item], list[Item], str]:
    """(training items, validation items, a line that says what is learned from) for `train.objective`. Raises UserError
    if the objective asks for pairs or thumbs, and there are none, or thumbs of one kind only."""
    objective, minimum = settings.objective, settings.preference.minimum
    liked = sum(thumb.liked for thumb in train.thumbs)
    both = min(liked, len(train.thumbs) - liked)
    if objective == "dpo" and not train.pairs:
        raise UserError("train.objective = dpo, and the train split has no pair: prefer or edit replies, or set sft")
    if objective == "kto" and not both:
        raise UserError(
            f"train.objective = kto, and of {count_of(len(train.thumbs), 'single thumb')} in the train split {liked} "
            "are up: it needs both, so judge more replies, or set sft"
        )
    use = {
        "rows": objective in ("sft", "auto"),
        "pairs": objective == "dpo" or (objective == "auto" and len(train.pairs) >= minimum),
        "thumbs": objective == "kto" or (objective == "auto" and both >= minimum),
    }
    chosen, held_out, said = [], [], []
    for name, one in (("rows", "window"), ("pairs", "pair"), ("thumbs", "thumb")):
        found: Sequence[Any] = getattr(train, name)
        if use[name]:
            chosen += found
            held_out += getattr(validation, name)
            said.append(count_of(len(found), one))
    line = f"learning from {' and '.join(said)}"
    if settings.retention:
        line += f", staying near the base on general text (train.retention = {settings.retention:g})"
    few = [count_of(len(getattr(train, name)), one) for name, one in (("pairs", "pair"), ("thumbs", "thumb"))
           if objective == "auto" and getattr(train, name) and not use[name]]  # fmt: skip
    if few:
        line += (
            f"; not from {' and '.join(few)}: fewer than train.preference.minimum ({minimum}, of thumbs of each kind)"
        )
    return chosen, held_out or list(validation.rows), line
