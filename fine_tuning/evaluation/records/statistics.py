"""Uncertainty: a bootstrap over clusters of conversations, and corrections for multiple tests.

Conversations of one cluster (near-duplicates) rise and fall together. A bootstrap that draws them one by one takes them
for independent evidence and calls identical models different too often, so whole clusters are drawn
(Davison & Hinkley 1997, section 3.8).

Ratios of sums over clusters, such as nats a token, get bootstrap-t intervals: percentile intervals overstate skewed
gains. Other metrics, such as BLEU, keep percentile intervals. `python -m benchmarks.verdict intervals` measures both.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Interval:
    """A number with its confidence interval; NaN where it is undefined: nothing can be said of one cluster's spread."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Resampling:
    """Bootstrap draws over the clusters of some items: how often each draw takes each cluster."""

    taken: np.ndarray  # (draws, clusters)
    index: np.ndarray  # (items,): the cluster of each

    @classmethod
    def over(cls, clusters: Sequence[str], draws: int, seed: int) -> "Resampling":
        """Draw as many clusters as there are, with replacement, `draws` times."""
        names, index = np.unique(np.asarray(clusters, dtype=str), return_inverse=True)
        count = len(names)
        rng = np.random.default_rng(seed)
        taken = rng.multinomial(count, np.full(count, 1 / count), size=draws) if count else np.zeros((draws, 0))
        return cls(taken.astype(float), index)

    @property
    def clusters(self) -> int:
        return int(self.taken.shape[1])

    def totals(self, statistics: np.ndarray) -> np.ndarray:
        """Sums (clusters, k) of per-item statistics (items, k)."""
        totals = np.zeros((self.clusters, statistics.shape[1]))
        np.add.at(totals, self.index, statistics)
        return totals

    def sums(self, statistics: np.ndarray) -> np.ndarray:
        """Sums (draws, k) of per-item statistics (items, k)."""
        return np.asarray(self.taken @ self.totals(statistics))


@dataclass(frozen=True)
class Estimate:
    """A number with its standard error and its bootstrap draws.

    Studentised draws are (draw - value) / standard error of the draw, others the number's values on the draws. Where
    there are no studentised draws, Student's t with clusters - 1 degrees of freedom takes their place.
    """

    value: float
    error: float
    draws: np.ndarray
    clusters: int
    studentised: bool

    def interval(self, confidence: float) -> Interval:
        """Bootstrap-t interval where draws are studentised (Davison & Hinkley 1997, section 5.2.1), else percentile."""
        from scipy.stats import t

        if self.clusters < 2:
            return Interval(self.value, float("nan"), float("nan"))
        if not self.studentised:
            return interval(self.value, self.draws, confidence, self.clusters)
        ends = [(1 - confidence) / 2, (1 + confidence) / 2]
        found = np.quantile(self.draws, ends) if len(self.draws) else t.ppf(ends, max(1, self.clusters - 1))
        high, low = (float(self.value - end * self.error) for end in found)
        return Interval(self.value, low, high)

    def p_not_below_zero(self, sign: int) -> float:
        """P-value of "`sign` times the true value is not below zero": from studentised draws, else Student's t."""
        from scipy.stats import t

        if not self.error > 0:
            return 1.0
        seen = sign * self.value / self.error
        if not self.studentised or not len(self.draws):
            return float(t.cdf(seen, max(1, self.clusters - 1)))
        return (1 + np.count_nonzero(sign * self.draws <= seen)) / (1 + len(self.draws))


def ratio_estimate(ratios: Sequence[np.ndarray], resampling: Resampling) -> Estimate:
    """A ratio of sums, or the first of two ratios less the second, over the same clusters.

    The standard error is that of the linearised ratio with clusters as units: of e = (y - R x) / X for each cluster's
    sums y and x, R = Y / X the ratio of all sums, the root of n / (n - 1) times the sum of squares (Cochran 1977,
    section 6.4, without the correction for finite populations).

    Args:
        ratios: numerators and denominators, (items, 2) each.
    """
    signs = np.array([1.0, -1.0])[: len(ratios)]
    sums = resampling.totals(np.concatenate(ratios, axis=1))  # (clusters, 2 or 4)

    def linear(totals: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Value (...) and coefficients (..., k) of the linearised error, for totals (..., k)."""
        inverse = 1 / np.where(totals[..., 1::2] == 0, np.nan, totals[..., 1::2])
        found = totals[..., 0::2] * inverse
        return (signs * found).sum(-1), np.stack([signs * inverse, -signs * found * inverse], -1).reshape(totals.shape)

    clusters = len(sums)
    scale = clusters / max(1, clusters - 1)
    value, factors = linear(sums.sum(axis=0))
    error = float(np.sqrt(scale * ((sums @ factors) ** 2).sum()))
    drawn, factors = linear(resampling.taken @ sums)
    products = (sums[:, :, None] * sums[:, None, :]).reshape(clusters, -1)
    products = (resampling.taken @ products).reshape(len(drawn), sums.shape[1], sums.shape[1])
    errors = np.sqrt(scale * np.maximum(0, np.einsum("dk,dkl,dl->d", factors, products, factors)))
    with np.errstate(divide="ignore", invalid="ignore"):
        draws = (drawn - value) / np.where(errors > 1e-6 * error, errors, 0)  # rounding leaves some of what is zero
    known = draws[~np.isnan(drawn)]
    if len(known) < 0.95 * len(draws) or not np.isfinite(known).all():
        known = np.empty(0)  # a draw without spread makes the whole distribution useless
    return Estimate(float(value), error, known, clusters, studentised=True)


def interval(value: float, draws: np.ndarray, confidence: float, clusters: int) -> Interval:
    """Expanded percentile interval of bootstrap `draws` over so many clusters.

    Plain percentiles are too narrow for small samples, as a normal interval with the biased standard deviation is; the
    expanded ones are as wide as Student's (Hesterberg 2015, section 5.2). One undefined draw in twenty is forgiven.
    """
    from scipy.stats import norm, t

    defined = draws[np.isfinite(draws)]
    if clusters < 2 or not np.isfinite(value) or len(defined) < 0.95 * len(draws) or not len(defined):
        return Interval(value, float("nan"), float("nan"))
    tail = norm.cdf(np.sqrt(clusters / (clusters - 1)) * t.ppf((1 - confidence) / 2, clusters - 1))
    low, high = np.quantile(defined, [tail, 1 - tail])
    return Interval(float(value), float(low), float(high))


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted p-values that keep the chance of any false rejection at the level they are compared with (Holm 1979)."""
    order = sorted(range(len(p_values)), key=lambda index: p_values[index])
    adjusted, worst = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(order):
        worst = max(worst, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = worst
    return adjusted


def clustered_mean(values: Sequence[float] | np.ndarray, clusters: Sequence[str]) -> Estimate:
    """Mean of item values with the standard error from sums over clusters (Cochran 1977, section 9A.2).

    Its intervals are Student's. The error of one cluster is NaN.
    """
    found = np.asarray(values, dtype=float)
    names, index = np.unique(np.asarray(clusters, dtype=str), return_inverse=True)
    mean, count = found.mean(), len(names)
    sums = np.bincount(index, weights=found - mean)
    error = np.sqrt(count / (count - 1) * (sums @ sums)) / len(found) if count > 1 else np.nan
    return Estimate(float(mean), float(error), np.empty(0), count, studentised=True)
