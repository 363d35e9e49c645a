"""One record for each contender and held-out conversation, and what the metrics make of them."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from fine_tuning.evaluation.evaluate_settings import IntervalSettings
from fine_tuning.evaluation.items import Item
from fine_tuning.evaluation.metrics import LIKELIHOOD_COLUMNS, ItemwiseMetric, SummedMetric, columns_of
from fine_tuning.evaluation.scoring import Likelihood, Reply, finite
from fine_tuning.evaluation.statistics import Resampling, bootstrap, interval

Metrics = Sequence[SummedMetric | ItemwiseMetric]


def describe(contender: str, item: Item, likelihood: Likelihood, reply: Reply | None) -> dict[str, Any]:
    """One line of the records: all that metrics, slices and the report need about one contender and one item.

    The columns of the metrics cover references alone and are absent where an item has none; `turns` covers all.
    """
    turns = [
        {
            "author": author,
            "liked": item.liked[index],
            "reference": index in item.references,
            "nll": finite(nll),
            "tokens": tokens,
            "correct": correct,
            "bytes": len(text.encode("utf-8", "surrogatepass")),
        }
        for index, (author, text, (nll, tokens, correct)) in enumerate(
            zip(item.authors, item.texts, likelihood.turns, strict=True)
        )
    ]
    line: dict[str, Any] = {
        "contender": contender,
        "id": item.id,
        "source": item.source,
        "cluster": item.cluster,
        "length": len(item.input_ids),
        "turns": turns,
        **likelihood_columns([turn for turn in turns if turn["reference"]]),
    }
    if reply is not None:
        line |= {"prompt": item.question, "predictions": reply.text, "references": item.texts[item.asked]}
        line |= {"asked": item.asked, "finished": reply.finished, "reply_tokens": reply.tokens}
    return line


def left_out(contender: str, item: Item) -> dict[str, Any]:
    """The line of an item that the contender cannot be asked: it has no columns, so no metric counts it."""
    return {"contender": contender, "id": item.id, "source": item.source, "cluster": item.cluster, "turns": []}


def likelihood_columns(turns: Sequence[dict[str, Any]]) -> dict[str, float | int | None]:
    """Sums over turns, {} over none; null where a term is."""
    if not turns:
        return {}
    return {
        name: None if any(turn[name] is None for turn in turns) else sum(turn[name] for turn in turns)
        for name in LIKELIHOOD_COLUMNS
    }


def summarise(records: Sequence[dict[str, Any]], metrics: Metrics, settings: IntervalSettings) -> dict[str, dict]:
    """{metric: {value, low, high, n}} of one contender's records; n counts conversations, null where undefined."""
    table: dict[str, dict] = {}
    for metric in metrics:
        columns = columns_of(metric)
        usable = [line for line in records if all(column in line for column in columns)]
        if not usable:
            continue
        statistics = metric.statistics(**{column: [line[column] for line in usable] for column in columns})
        resampling = Resampling.over([line["cluster"] for line in usable], settings.draws, settings.seed)
        for name, (value, draws) in bootstrap(metric.values, statistics, resampling).items():
            found = asdict(interval(value, draws, settings.confidence, resampling.clusters))
            table[name] = {key: finite(number) for key, number in found.items()} | {"n": len(usable)}
    return table
