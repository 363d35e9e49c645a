"""One record for each contender and held-out conversation, and what the metrics make of them."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from fine_tuning.evaluation.metric_modules.loading import LIKELIHOOD_COLUMNS, ItemwiseMetric, SummedMetric, columns_of
from fine_tuning.evaluation.records.record_types import Item, Likelihood, Reply, finite
from fine_tuning.evaluation.records.settings import IntervalSettings
from fine_tuning.evaluation.records.statistics import Estimate, Resampling, clustered_mean, ratio_estimate

Metrics = Sequence[SummedMetric | ItemwiseMetric]
Line = Mapping[str, Any]


def describe(contender: str, item: Item, likelihood: Likelihood, reply: Reply | None) -> dict[str, Any]:
    """One line of the records: all that metrics, slices and the report need about one contender and one item.

    The columns of the metrics cover references alone and are absent where an item has none; `turns` covers all.
    """
    turns = [
        {
            "author": author,
            "liked": item.liked[index],
            "reference": index in item.references,
            "nll": nll,
            "tokens": tokens,
            "correct": correct,
            "bytes": len(text.encode("utf-8", "surrogatepass")),
        }
        for index, (author, text, (nll, tokens, correct)) in enumerate(
            zip(item.authors, item.texts, likelihood, strict=True)
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
    if reply is not None and item.asked is not None:
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


def estimates(
    metric: SummedMetric | ItemwiseMetric, statistics: Sequence[np.ndarray], resampling: Resampling
) -> dict[str, Estimate]:
    """Each value of a metric for one contender, or the first of two less the second.

    An exponential metric's estimates are on the scale of its exponent. `statistics` are what each item adds, (items, k)
    a contender; the items of both are the same.
    """
    point, drawn = (
        [metric.values(sums) for sums in each]
        for each in ([part.sum(axis=0) for part in statistics], [resampling.sums(part) for part in statistics])
    )
    found = {}
    for name in point[0]:
        if name in metric.ratios:
            places = list(metric.ratios[name])
            found[name] = ratio_estimate([part[:, places] for part in statistics], resampling)
            continue
        value, draws = (values[0][name] - (values[1][name] if len(values) > 1 else 0.0) for values in (point, drawn))
        error = float(np.nanstd(draws)) if np.isfinite(draws).any() else float("nan")
        found[name] = Estimate(float(value), error, draws, resampling.clusters, studentised=False)
    return found


def summarise(
    records: Sequence[dict[str, Any]], metrics: Metrics, settings: IntervalSettings
) -> dict[str, dict[str, Any]]:
    """{metric: {value, low, high, n}} of one contender's records; n counts items, null where undefined.
    Items of a single cluster have no interval, since every draw is the same, and bear `"clusters": 1`."""
    table: dict[str, dict[str, Any]] = {}
    for metric in metrics:
        columns = columns_of(metric)
        usable = [line for line in records if all(column in line for column in columns)]
        if not usable:
            continue
        statistics = metric.statistics(**{column: [line[column] for line in usable] for column in columns})
        resampling = Resampling.over([line["cluster"] for line in usable], settings.draws, settings.seed)
        for name, estimate in estimates(metric, [statistics.astype(float)], resampling).items():
            found = asdict(estimate.interval(settings.confidence))
            if metric.exponential:
                found = {key: np.exp(number) for key, number in found.items()}
            if name in metric.shares:
                found = {key: np.clip(number, 0, 1) for key, number in found.items()}
            alone = {"clusters": 1} if resampling.clusters == 1 else {}
            table[name] = {key: finite(number) for key, number in found.items()} | alone | {"n": len(usable)}
    return table


# -----------------------------------------------------------------------------
# general knowledge and the help of the prompt


def golden_lead(line: Line) -> float:
    """Nats by which the right answer is likelier than the wrong one; -inf where either is undefined."""
    return -np.inf if None in (line["right"], line["wrong"]) else line["wrong"] - line["right"]


def right_probability(line: Line) -> float:
    """Probability of the right answer among both, from the nats of their content."""
    return float(1 / (1 + np.exp(-np.clip(golden_lead(line), -500, 500))))


def nats_per_byte(line: Line) -> float:
    """Of a text: the logarithm of perplexity, in a unit that every tokenizer shares."""
    return np.nan if line["nats"] is None else line["nats"] / line["bytes"]


def help_of_prompt(line: Line) -> float:
    """Nats by which its own history makes a reply likelier than the histories of others do on average."""
    return np.nan if None in (line["own"], *line["others"]) else float(np.mean(line["others"]) - line["own"])


def prefers_chosen(line: Line) -> float:
    """1 where the chosen reply of a pair has more likelihood a token than the rejected one, 0 less, 0.5 the same."""
    if None in (line["chosen"], line["rejected"]):
        return np.nan
    chosen, rejected = (line[side] / line[f"{side}_tokens"] for side in ("chosen", "rejected"))
    return 0.5 * (1 + float(np.sign(rejected - chosen)))


PREFERENCES, PREFERENCES_APART = "preferences", "preferences_apart"
# Metric → the stem of the file that holds its lines, its value on a line, and 1 where more is better, else -1 or 0.
MEASURES: dict[str, tuple[str, Callable[[Line], float], int]] = {
    "general_knowledge": ("general", right_probability, 1),
    "general_text": ("general_text", nats_per_byte, -1),
    "prompt_help": ("prompt_help", help_of_prompt, 1),
    "preference_accuracy": (PREFERENCES, prefers_chosen, 1),
    "preference_accuracy_apart": (PREFERENCES_APART, prefers_chosen, 0),  # one side is a compared model's own
}
BENCHMARKS = "benchmarks"  # a line is one metric of a public benchmark on one question
GUARDS = (*(file for file, _, _ in MEASURES.values()), BENCHMARKS)
Files = Mapping[str, Sequence[Line]]  # lines of the file of each of MEASURES, by its stem


def by_contender(lines: Iterable[Line]) -> dict[str, dict[str, Line]]:
    """{contender: {id: line}}"""
    found: dict[str, dict[str, Line]] = {}
    for line in lines:
        found.setdefault(line["contender"], {})[line["id"]] = line
    return found


def measures_of(files: Files) -> dict[str, tuple[Sequence[Line], Callable[[Line], float], int]]:
    """{metric: (lines, its value on a line, 1 where more is better, else -1 or 0)}: MEASURES and benchmarks."""
    found = {metric: (files.get(file, ()), value, better) for metric, (file, value, better) in MEASURES.items()}
    asked: dict[str, list[Line]] = {}
    for line in files.get(BENCHMARKS, ()):
        asked.setdefault(line["metric"], []).append(line)
    return found | {metric: (lines, benchmark_value, lines[0]["better"]) for metric, lines in asked.items()}


def benchmark_value(line: Line) -> float:
    return np.nan if line["value"] is None else float(line["value"])


def clusters_of(lines: Iterable[Line]) -> list[str]:
    """Clusters of lines; questions and texts are their own."""
    return [line.get("cluster", line["id"]) for line in lines]


def guard_metrics(files: Files, confidence: float) -> dict[str, dict[str, dict[str, Any]]]:
    """{contender: {metric: {value, low, high, n}}} for metrics/evaluation.json."""
    table: dict[str, dict[str, dict[str, Any]]] = {}
    for metric, (every, value, _) in measures_of(files).items():
        for contender, lines in by_contender(every).items():
            mean = clustered_mean([value(line) for line in lines.values()], clusters_of(lines.values()))
            numbers = {key: finite(number) for key, number in asdict(mean.interval(confidence)).items()}
            table.setdefault(contender, {})[metric] = numbers | {"n": len(lines)}
    return table
