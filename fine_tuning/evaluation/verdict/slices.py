"""Where a model is better or worse: every metric by source, author of the reference, turn and length."""

from collections.abc import Iterator, Sequence
from typing import Any

from fine_tuning.evaluation.metric_modules.loading import REPLY_COLUMNS
from fine_tuning.evaluation.records.measurements import Metrics, likelihood_columns, summarise
from fine_tuning.evaluation.records.settings import IntervalSettings

LENGTHS = ((32, "up to 32 tokens"), (128, "33 to 128 tokens"), (512, "129 to 512 tokens"))
LATER_TURNS = 4  # turns from here on are one slice
DRAWS = 500  # of the bootstrap; enough for intervals that decide nothing


def slices(
    records: Sequence[dict[str, Any]], metrics: Metrics, settings: IntervalSettings
) -> dict[str, dict[str, dict[str, dict[str, dict[str, Any]]]]]:
    """{dimension: {slice: {contender: {metric: {value, low, high, n}}}}}; dimensions of one slice are left out. A
    generated reply counts in the slices of the turn that it stands for."""
    found: dict[str, dict[str, dict[str, list[dict[str, Any]]]]] = {}
    for line in records:
        turns: dict[tuple[str, str], list[tuple[int, dict[str, Any]]]] = {}
        for index, turn in enumerate(line["turns"]):
            for place in _slices_of(line, index, turn):
                turns.setdefault(place, []).append((index, turn))
        for (dimension, name), members in turns.items():
            part = {key: line[key] for key in ("id", "cluster")} | likelihood_columns([turn for _, turn in members])
            if any(index == line.get("asked") for index, _ in members):
                part |= {column: line[column] for column in REPLY_COLUMNS}
            contenders = found.setdefault(dimension, {}).setdefault(name, {})
            contenders.setdefault(line["contender"], []).append(part)
    quick = settings.model_copy(update={"draws": min(DRAWS, settings.draws)})
    return {
        dimension: {
            name: {contender: summarise(parts, metrics, quick) for contender, parts in contenders.items()}
            for name, contenders in sorted(names.items())
        }
        for dimension, names in found.items()
        if len(names) > 1
    }


def _slices_of(line: dict[str, Any], index: int, turn: dict[str, Any]) -> Iterator[tuple[str, str]]:
    author = f"{turn['author']}, liked" if turn.get("liked") else turn["author"]
    yield "author of the reply", author if turn["reference"] else f"{author} (no reference)"
    if not turn["reference"]:
        return
    yield "source", line["source"]
    yield "turn", str(index + 1) if index + 1 < LATER_TURNS else f"{LATER_TURNS} and later"
    length = next((name for most, name in LENGTHS if turn["tokens"] <= most), f"over {LENGTHS[-1][0]} tokens")
    yield "length of the reply", length
