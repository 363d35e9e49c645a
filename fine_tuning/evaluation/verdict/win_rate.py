"""The win rate by betting: how often people prefer the candidate, with evidence that stays valid while they vote.

A bet on one prompt is won (1), lost (0) or neither (1/2). Against "the mean of all prompts is at most m" stands the
equal mixture over constant stakes s in (0, 1) of the product of 1 + s (value - m) / 2m, read as it is after the last
vote. Each product has a mean of at most 1 while the mean of the values is at most m (Waudby-Smith & Ramdas 2024,
"Estimating means of bounded random variables by betting", JRSS B 86:1). In random order, constant stakes keep that
where prompts differ in how often they are won; stakes that adapt to past votes do not (`python -m benchmarks.votes`).
"""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fine_tuning.common.errors import count_of
from fine_tuning.evaluation.verdict.settings import DECIDES

STAKES = np.linspace(0.005, 0.995, 100)  # as shares of half of what may be staked, so that few losses ruin none
EVEN = 0.5
MOST = 300.0  # of the logarithm: JSON has no infinity


def evidence(values: Sequence[float] | np.ndarray, at_most: float) -> float:
    """E-value of values between 0 and 1, one a prompt, against "the mean is at most `at_most`"; 1 of none."""
    found, counts = np.unique(np.asarray(values, dtype=float), return_counts=True)
    at_most = max(at_most, 1e-9)
    products = np.log1p(STAKES[:, None] * (found - at_most) / (2 * at_most)) @ counts
    most = products.max()
    return float(np.exp(min(most + np.log(np.exp(products - most).mean()), MOST)))


@dataclass(frozen=True)
class WinRate:
    """Mean of bets and the interval of every mean that is not rejected; None before the first vote. Either end alone is
    wrong in at most one case of twenty, so the interval is one of 90 %."""

    n: int
    value: float | None
    low: float | None
    high: float | None
    better: float
    """E-value against a rate of one half or less"""
    worse: float
    """E-value against a rate of one half or more"""

    @classmethod
    def of(cls, values: Sequence[float] | np.ndarray) -> "WinRate":
        bets = np.asarray(values, dtype=float)
        better, worse = evidence(bets, EVEN), evidence(1 - bets, EVEN)
        if not len(bets):
            return cls(0, None, None, None, better, worse)
        low, high = lowest_not_rejected(bets), 1 - lowest_not_rejected(1 - bets)
        return cls(len(bets), float(bets.mean()), low, high, better, worse)

    def __str__(self) -> str:
        if self.value is None or self.low is None or self.high is None:
            return "no vote yet"
        return f"win rate {self.value:.0%} [{self.low:.0%}, {self.high:.0%}] in {count_of(self.n, 'vote')}"


def lowest_not_rejected(bets: np.ndarray) -> float:
    """The lowest mean, in thousandths, against which the evidence does not decide."""
    # The evidence falls as the mean rises.
    return bisect_left(range(1000), True, key=lambda mean: evidence(bets, mean / 1000) < DECIDES) / 1000
