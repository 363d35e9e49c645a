"""Would more conversations help? Adapters trained on growing shares of the data, scored on the validation split.

The shares are the first conversations of the training split, whose order is a fair sample; each contains the smaller
ones. Every point is one training run: two points differ surely only where their paired interval says so.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fine_tuning.common.errors import UserError
from fine_tuning.evaluation.records.measurements import Metrics, describe, summarise
from fine_tuning.evaluation.records.record_types import Item, Likelihood
from fine_tuning.evaluation.records.settings import IntervalSettings
from fine_tuning.evaluation.scoring.scorer import likelihoods, loaded, scoring_hardware
from fine_tuning.evaluation.verdict.differences import differences
from fine_tuning.schema.prepared import PreparedRow


def share(rows: Sequence[PreparedRow], fraction: float) -> list[PreparedRow]:
    """The first conversations, with that share of all tokens; at least one."""
    budget, kept = fraction * sum(len(row.input_ids) for row in rows), []
    for row in rows:
        budget -= len(row.input_ids)
        if kept and budget < 0:
            break
        kept.append(row)
    return kept


def parse_fractions(text: str) -> list[float]:
    """`0.25,0.5,1` as numbers, ascending. Raises UserError if one is no number above 0 and up to 1, or there are fewer
    than two."""
    try:
        fractions = sorted({float(part) for part in text.split(",")})
    except ValueError:
        fractions = []
    if len(fractions) < 2 or not all(0 < fraction <= 1 for fraction in fractions):
        raise UserError(f"--fractions {text}: give two or more shares of the data, such as 0.25,0.5,1")
    return fractions


def score_adapter(
    base: Path, adapter: Path, items: Sequence[Item], batch_tokens: int, threads: int | None
) -> list[Likelihood]:
    """Likelihood of the items' replies by a base with an adapter merged into it."""
    with loaded(base, scoring_hardware(threads), adapter) as model:
        return likelihoods(model, items, batch_tokens)


def measure(
    rows: Sequence[PreparedRow],
    fractions: Sequence[float],
    items: Sequence[Item],
    scores_of: Callable[[list[PreparedRow]], Sequence[Likelihood]],
    metrics: Metrics,
    intervals: IntervalSettings,
) -> list[dict[str, Any]]:
    """One point a fraction: conversations, tokens, perplexity with its interval, and the gain on the point before.

    `scores_of` trains on rows and scores `items`, the validation split; perplexity is among the `metrics`. Raises
    UserError if the validation split holds no reference to compare with.
    """
    if not any(item.references for item in items):
        raise UserError("every reply in the validation split is a model's own word: import what people wrote")
    points: list[dict[str, Any]] = []
    before: list[dict[str, Any]] = []
    for fraction in fractions:
        chosen = share(rows, fraction)
        now = [
            describe("candidate", item, score, None)
            for item, score in zip(items, scores_of(chosen), strict=True)
            if item.references
        ]
        cell = summarise(now, metrics, intervals)["perplexity"]
        point = {
            "fraction": fraction,
            "conversations": len({row.id for row in chosen}),
            "tokens": sum(len(row.input_ids) for row in chosen),
            "perplexity": cell["value"],
            # One cluster has no interval.
            **{end: cell["value"] if cell[end] is None else cell[end] for end in ("low", "high")},
            "n": cell["n"],
        }
        if before:
            baseline = [line | {"contender": "before"} for line in before]
            point["change"] = differences([*now, *baseline], metrics, "before", intervals)["perplexity"].as_json()
        points.append(point)
        before = now
    return points


def advice(points: Sequence[dict[str, Any]]) -> str:
    """What the last step says in words."""
    change = points[-1]["change"]
    if change["low"] is None:
        return "whether the last share of the data changes anything cannot be said: one conversation has no interval"
    numbers = f"{change['difference']:+.3g} [{change['low']:+.3g}, {change['high']:+.3g}]"
    if change["high"] < 0:
        return f"the last share of the data still lowers perplexity ({numbers}): more conversations are likely to help"
    if change["low"] > 0:
        return f"the last share of the data raises perplexity ({numbers}): look at what it holds, or train less"
    return f"the last share of the data changes nothing for certain ({numbers}): more of the same may not help"
