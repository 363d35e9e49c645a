"""Paired differences between two contenders on the same items, with intervals."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fine_tuning.evaluation.evaluate_settings import IntervalSettings
from fine_tuning.evaluation.measurements import Metrics
from fine_tuning.evaluation.metrics import TOKEN_COLUMNS, columns_of, direction
from fine_tuning.evaluation.scoring import finite
from fine_tuning.evaluation.statistics import Interval, Resampling, bootstrap, holm, interval, share_at_most

CANDIDATE = "candidate"
Records = Sequence[dict[str, Any]]


@dataclass(frozen=True)
class Difference:
    """Candidate minus rival in one metric, on the items that both have. `better` is 1 where more is better, else -1."""

    metric: str
    rival: str
    candidate_value: float
    rival_value: float
    low: float
    high: float
    draws: np.ndarray
    rival_draws: np.ndarray
    better: int
    n: int
    clusters: int

    @property
    def value(self) -> float:
        """The difference on all items."""
        return self.candidate_value - self.rival_value

    @property
    def gains(self) -> np.ndarray:
        """The draws with their sign turned so that more is better."""
        return self.better * self.draws

    def as_json(self) -> dict[str, Any]:
        """For metrics/comparison.json."""
        numbers = {
            "difference": self.value,
            "low": self.low,
            "high": self.high,
            "candidate": self.candidate_value,
            "rival": self.rival_value,
        }
        return {name: finite(number) for name, number in numbers.items()} | {
            "better": self.better,
            "n": self.n,
            "clusters": self.clusters,
        }


def differences(
    records: Records, metrics: Metrics, rival: str, settings: IntervalSettings, candidate: str = CANDIDATE
) -> dict[str, Difference]:
    """Paired differences in every metric that both contenders have items for.

    Metrics that count tokens are left out where the two count the same replies differently.
    """
    by_id = {name: {line["id"]: line for line in records if line["contender"] == name} for name in (candidate, rival)}
    shared = sorted(by_id[candidate].keys() & by_id[rival].keys())
    counts = [[by_id[name][id].get("tokens") for name in by_id] for id in shared]
    other_tokens = any(None not in pair and pair[0] != pair[1] for pair in counts)
    found: dict[str, Difference] = {}
    for metric in metrics:
        columns = columns_of(metric)
        if other_tokens and not set(columns).isdisjoint(TOKEN_COLUMNS):
            continue
        ids = [id for id in shared if all(column in by_id[name][id] for name in by_id for column in columns)]
        if not ids:
            continue
        clusters = [by_id[candidate][id]["cluster"] for id in ids]
        resampling = Resampling.over(clusters, settings.draws, settings.seed)
        ours, theirs = (
            bootstrap(
                metric.values,
                metric.statistics(**{column: [by_id[name][id][column] for id in ids] for column in columns}),
                resampling,
            )
            for name in (candidate, rival)
        )
        for name, (value, drawn) in ours.items():
            their_value, their_draws = theirs[name]
            bounds = interval(value - their_value, drawn - their_draws, settings.confidence, resampling.clusters)
            found[name] = Difference(
                name, rival, value, their_value, bounds.low, bounds.high, drawn - their_draws,
                their_draws, direction(metric, name), len(ids), resampling.clusters,
            )  # fmt: skip
    return found


def relative(difference: Difference, confidence: float) -> Interval:
    """The difference as a share of the rival's value, which varies from draw to draw as well."""
    with np.errstate(divide="ignore", invalid="ignore"):
        share, drawn = np.divide(difference.value, difference.rival_value), difference.draws / difference.rival_draws
    return interval(float(share), drawn, confidence, difference.clusters)


def told(difference: Difference, rival: str | None = None) -> str:
    """The difference in words."""
    return (
        f"{difference.metric} {difference.candidate_value:.4g} against {difference.rival_value:.4g} of "
        f"{rival or f'the {difference.rival}'}: {difference.value:+.3g} [{difference.low:+.3g}, {difference.high:+.3g}]"
    )


def shortfall(difference: Difference, minimum_effect: float) -> str | None:
    """Why this difference does not suffice; None if the whole interval lies beyond the minimum effect."""
    if not np.isfinite(difference.value):
        return f"{difference.metric} is not a number for candidate or {difference.rival}"
    needed = minimum_effect * abs(difference.rival_value)
    gain, (low, high) = difference.better * difference.value, gain_bounds(difference)
    if low > needed:
        return None
    words = told(difference)
    if high < 0:
        return f"worse: {words}"
    if gain <= needed:
        return f"no gain of {minimum_effect:.1%}: {words}"
    return f"a gain of {minimum_effect:.1%} is not certain: {words}"


def gain_bounds(difference: Difference) -> tuple[float, float]:
    """The interval with its sign turned so that more is better."""
    low, high = sorted((difference.better * difference.low, difference.better * difference.high))
    return low, high


def non_inferiority(
    pairs: Mapping[str, Mapping[str, Difference]], margins: Mapping[str, float], level: float
) -> tuple[dict[str, dict], list[str]]:
    """Whether every secondary metric is shown to lose less than its margin against every rival.

    One-sided tests at `level` / 2, the level of one end of the intervals, corrected together (Holm 1979).
    """
    tests = [(name, rival, margin) for name, margin in margins.items() for rival in pairs if name in pairs[rival]]
    p_values = []
    for name, rival, margin in tests:
        difference = pairs[rival][name]
        known = np.isfinite(difference.value)
        p_values.append(share_at_most(difference.gains, -margin, difference.clusters) if known else 1.0)
    table: dict[str, dict] = {}
    reasons = []
    for (name, rival, margin), p_value in zip(tests, holm(p_values), strict=True):
        kept = p_value <= level / 2
        table.setdefault(name, {})[rival] = pairs[rival][name].as_json() | {
            "margin": margin,
            "p_holm": p_value,
            "non_inferior": kept,
        }
        if not kept:
            reasons.append(f"a loss of more than {margin:g} is not ruled out: {told(pairs[rival][name])}")
    return table, reasons
