"""How sure a number is: a bootstrap over clusters of conversations, and corrections for asking many questions.

Conversations of one cluster (near-duplicates) rise and fall together. A bootstrap that draws them one by one takes them
for independent evidence and calls identical models different too often, so whole clusters are drawn
(Davison & Hinkley 1997, section 3.8).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Interval:
    """A number with its percentile confidence interval; NaN where it is undefined."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Resampling:
    """Bootstrap draws over the clusters of some items: how often each draw takes each item."""

    weights: np.ndarray  # (draws, items)
    clusters: int

    @classmethod
    def over(cls, clusters: Sequence[str], draws: int, seed: int) -> "Resampling":
        """Draw as many clusters as there are, with replacement, `draws` times."""
        names, index = np.unique(np.asarray(clusters, dtype=str), return_inverse=True)
        count = len(names)
        rng = np.random.default_rng(seed)
        taken = rng.multinomial(count, np.full(count, 1 / count), size=draws) if count else np.zeros((draws, 0))
        return cls(taken[:, index].astype(float), count)

    def sums(self, statistics: np.ndarray) -> np.ndarray:
        """Sums (draws, k) of per-item statistics (items, k)."""
        return self.weights @ statistics


def interval(value: float, draws: np.ndarray, confidence: float, clusters: int) -> Interval:
    """Expanded percentile interval of bootstrap `draws` over so many clusters.

    Plain percentiles are too narrow for small samples, as a normal interval with the biased standard deviation is; the
    expanded ones are as wide as Student's (Hesterberg 2015, section 5.2). One undefined draw in twenty is forgiven.
    """
    defined = draws[np.isfinite(draws)]
    if not np.isfinite(value) or len(defined) < 0.95 * len(draws) or not len(defined):
        return Interval(value, float("nan"), float("nan"))
    tail = expanded_tail((1 - confidence) / 2, clusters)
    low, high = np.quantile(defined, [tail, 1 - tail])
    return Interval(float(value), float(low), float(high))


def expanded_tail(tail: float, clusters: int) -> float:
    """The share to cut off one end of a bootstrap distribution, so that `tail` of all samples miss the truth."""
    from scipy.stats import norm, t

    if clusters < 2:
        return 0.0
    return float(norm.cdf(np.sqrt(clusters / (clusters - 1)) * t.ppf(tail, clusters - 1)))


def share_at_most(draws: np.ndarray, threshold: float, clusters: int) -> float:
    """Bootstrap p-value of "the true value is at most `threshold`", expanded like the intervals.

    (1 + draws there) / (1 + all draws) before the expansion, so that it is never zero (Davison & Hinkley 1997, 4.2).
    """
    from scipy.stats import norm, t

    defined = draws[np.isfinite(draws)]
    if not len(defined) or clusters < 2:
        return 1.0
    share = (1 + np.count_nonzero(defined <= threshold)) / (1 + len(defined))
    return float(t.cdf(norm.ppf(share) / np.sqrt(clusters / (clusters - 1)), clusters - 1))


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted p-values that keep the chance of any false rejection at the level they are compared with (Holm 1979)."""
    order = sorted(range(len(p_values)), key=lambda index: p_values[index])
    adjusted, worst = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(order):
        worst = max(worst, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = worst
    return adjusted


def mcnemar(only_first: int, only_second: int) -> float:
    """Exact two-sided McNemar test: how surprising is this split of the items that only one of two models got right?"""
    from scipy.stats import binomtest

    disagreements = only_first + only_second
    return float(binomtest(only_first, disagreements, 0.5).pvalue) if disagreements else 1.0


def bootstrap(
    values: Callable[[np.ndarray], dict[str, np.ndarray]], statistics: np.ndarray, resampling: Resampling
) -> dict[str, tuple[float, np.ndarray]]:
    """Each value of a metric on all items, with its value on every draw."""
    point = values(statistics.sum(axis=0))
    drawn = values(resampling.sums(statistics))
    return {name: (float(point[name]), np.asarray(drawn[name], dtype=float)) for name in point}
