"""Metrics: one `evaluate` module a file, each a function of sums over items, so that any of them gets an interval.

A metric names the columns it wants as its features, a SummedMetric as arguments of `statistics`; every item has these:

    nll, tokens, correct, bytes   of the reference: summed negative log-likelihood in nats, tokens, tokens that were
                                  the model's first choice, UTF-8 bytes
    predictions, references       the generated reply and the reference
    finished, reply_tokens        whether the model ended its reply itself, and its length

A user's metric is a file `<name>.py` in metric_modules/, named in `evaluate.metrics`. Any
`evaluate.Metric` will do; one that is no SummedMetric is computed item by item and averaged.
"""

import importlib.util
import inspect
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import evaluate
import numpy as np
from datasets import Features, Value

from fine_tuning.common.errors import UserError
from fine_tuning.evaluation.records.settings import metric_names

LIKELIHOOD_COLUMNS = ("nll", "tokens", "correct", "bytes")
REPLY_COLUMNS = ("predictions", "references", "finished", "reply_tokens")
COLUMN_TYPES = {"nll": "float64", "finished": "bool", "predictions": "string", "references": "string"}  # others: int64
TOKEN_COLUMNS = ("tokens", "correct", "reply_tokens")  # mean something else with another tokenizer


class SummedMetric(evaluate.Metric, ABC):
    """A metric that depends on its items only through the sum of a vector that each of them has.

    So the corpus value of BLEU is that of summed n-gram counts, not the mean of sentence values, and a bootstrap
    draw costs one addition instead of one evaluation.
    """

    # True, False, or by the name of the value; None where neither more nor less is better.
    higher_is_better: bool | Mapping[str, bool | None] | None = True
    # Values that are a ratio of two of the sums, by the places of these. Their intervals are the better ones.
    ratios: Mapping[str, tuple[int, int]] = MappingProxyType({})
    # Ratios that are shares of something: an end of their interval beyond 0 or 1 is shown as 0 or 1.
    shares: Collection[str] = ()
    # Of ratios: the value is the exponential of the ratio, and compared on the scale of the ratio.
    exponential: bool = False
    citation = ""

    def _info(self) -> evaluate.MetricInfo:
        wanted = inspect.signature(self.statistics).parameters
        features = Features({name: Value(COLUMN_TYPES.get(name, "int64")) for name in wanted})
        return evaluate.MetricInfo(description=type(self).__doc__, citation=self.citation, features=features)

    @abstractmethod
    def statistics(self, **columns: Sequence[Any]) -> np.ndarray:
        """What each item adds: an array (items, k)."""

    def values(self, sums: np.ndarray) -> dict[str, np.ndarray]:
        """The metric's values by name, each of shape (...), for sums of shape (..., k). NaN where undefined."""
        found = {name: ratio(sums[..., over], sums[..., under]) for name, (over, under) in self.ratios.items()}
        return {name: np.exp(value) if self.exponential else value for name, value in found.items()}

    def _compute(self, **columns: Sequence[Any]) -> dict[str, float]:
        return {name: float(value) for name, value in self.values(self.statistics(**columns).sum(axis=0)).items()}


class ItemwiseMetric:
    """Any other `evaluate` metric: computed on each item alone, and averaged."""

    exponential = False
    shares = ()

    def __init__(self, metric: evaluate.Metric) -> None:
        self.metric = metric
        self.higher_is_better = getattr(metric, "higher_is_better", True)
        self._names: list[str] = []

    def statistics(self, **columns: Sequence[Any]) -> np.ndarray:
        """The values of each item and a count of 1: an array (items, values + 1)."""
        rows = []
        for index in range(len(next(iter(columns.values())))):
            result = self.metric.compute(**{name: [column[index]] for name, column in columns.items()})
            self._names = sorted(result)
            rows.append([*(float(result[name]) for name in self._names), 1.0])
        return np.array(rows)

    @property
    def ratios(self) -> dict[str, tuple[int, int]]:
        """Means over the items."""
        return {name: (place, len(self._names)) for place, name in enumerate(self._names)}

    def values(self, sums: np.ndarray) -> dict[str, np.ndarray]:
        """As those of a SummedMetric."""
        return {name: ratio(sums[..., over], sums[..., under]) for name, (over, under) in self.ratios.items()}


def ratio(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    """Quotient with NaN for x / 0."""
    numerator, denominator = np.broadcast_arrays(np.asarray(numerator, float), np.asarray(denominator, float))
    return np.divide(numerator, denominator, out=np.full(numerator.shape, np.nan), where=denominator != 0)


def load_metric(name: str, folder: Path) -> SummedMetric | ItemwiseMetric:
    """The metric in `folder/name.py`, ready to use without a hub, a cache or the network. Raises UserError if there is
    no such file, it does not load, or it holds no metric."""
    path, known = Path(folder) / f"{name}.py", metric_names(Path(folder))
    if name not in known:
        raise UserError(f"evaluate.metrics names {name!r}, but {path} does not exist: choose among {', '.join(known)}")
    spec = importlib.util.spec_from_file_location(f"metric_modules.{name}", path)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise UserError(f"the metric {path} does not load: {type(error).__name__}: {error}") from None
    found = [
        member
        for _, member in inspect.getmembers(module, inspect.isclass)
        if issubclass(member, evaluate.Metric) and member.__module__ == module.__name__
    ]
    if len(found) != 1:
        raise UserError(f"{path} defines {len(found)} evaluate.Metric classes: it should define one")
    # evaluate keeps inputs in files below the home folder unless told not to, and makes a folder even then: one of its
    # own, since any name in the system's temporary folder may be somebody else's file.
    with tempfile.TemporaryDirectory() as cache:
        metric = found[0](keep_in_memory=True, cache_dir=cache)
    unknown = set(metric.features) - {*LIKELIHOOD_COLUMNS, *REPLY_COLUMNS}
    if unknown:
        raise UserError(f"{path} wants columns that no item has: {', '.join(sorted(unknown))}")
    return metric if isinstance(metric, SummedMetric) else ItemwiseMetric(metric)


def columns_of(metric: SummedMetric | ItemwiseMetric) -> list[str]:
    return list((metric.metric if isinstance(metric, ItemwiseMetric) else metric).features)


def values_of(metric: SummedMetric | ItemwiseMetric) -> list[str]:
    """Names of a metric's values, found by computing it on one item."""
    item = {name: 1 for name in ("nll", "tokens", "correct", "bytes", "finished", "reply_tokens")}
    item |= {"predictions": "a", "references": "a"}
    return list(metric.values(metric.statistics(**{name: [item[name]] for name in columns_of(metric)})))


def signatures(metrics: Sequence[SummedMetric | ItemwiseMetric]) -> dict[str, str]:
    """{name: what a reader needs to repeat the score} of the metrics that have such a line."""
    return {type(m).__module__.rpartition(".")[2]: m.signature() for m in metrics if hasattr(m, "signature")}


def direction(metric: SummedMetric | ItemwiseMetric, name: str) -> int:
    """1 where more of the value `name` is better, -1 where less is, 0 where neither is."""
    better = metric.higher_is_better
    if isinstance(better, Mapping):
        better = better[name]
    return 0 if better is None else 1 if better else -1
