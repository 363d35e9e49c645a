"""Paired differences between two contenders on the same items, with intervals."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from fine_tuning.evaluation.metric_modules.loading import TOKEN_COLUMNS, columns_of, direction
from fine_tuning.evaluation.records.measurements import Metrics, estimates
from fine_tuning.evaluation.records.record_types import CANDIDATE, finite
from fine_tuning.evaluation.records.settings import IntervalSettings
from fine_tuning.evaluation.records.statistics import Estimate, Resampling, holm

Records = Sequence[dict[str, Any]]
POWER = 3.0  # standard errors that a margin of non-inferiority has to have
ALONE = "chrf"
LOOK_LEVEL = 0.0025  # one-sided, of every test of the primary metric: twenty on one test split cost 5 % together


@dataclass(frozen=True)
class Difference:
    """Candidate minus baseline in one metric, on the items that both have. `better` is 1 where more is better, else -1.

    With `exponential` the estimate is of the logarithm of the quotient: perplexities are compared as nats a token, so
    that the error of the baseline's own value drops out. `low` and `high` are then the bounds of the quotient, minus
    one, times the baseline's value.
    """

    metric: str
    baseline: str
    candidate_value: float
    baseline_value: float
    low: float
    high: float
    estimate: Estimate
    exponential: bool
    better: int
    n: int
    clusters: int

    @property
    def value(self) -> float:
        return self.candidate_value - self.baseline_value

    def at(self, confidence: float) -> "Difference":
        """The same with an interval of another confidence."""
        bounds = self.estimate.interval(confidence)
        low, high = (
            self.baseline_value * np.expm1(bound) if self.exponential else bound for bound in (bounds.low, bounds.high)
        )
        return replace(self, low=float(low), high=float(high))

    @property
    def error(self) -> float:
        """Its standard error, in the metric's units."""
        return self.estimate.error * (self.candidate_value if self.exponential else 1.0)

    def as_json(self) -> dict[str, Any]:
        """For metrics/comparison.json."""
        numbers = {"difference": self.value, "low": self.low, "high": self.high}
        numbers |= {"candidate": self.candidate_value, "baseline": self.baseline_value}
        counts = {"better": self.better, "n": self.n, "clusters": self.clusters}
        return {name: finite(number) for name, number in numbers.items()} | counts


def differences(
    records: Records, metrics: Metrics, baseline: str, settings: IntervalSettings, candidate: str = CANDIDATE
) -> dict[str, Difference]:
    """Paired differences in every metric that both contenders have items for. Metrics that count tokens are left out
    where the two count the same replies differently."""
    pair = candidate, baseline
    by_id = {name: {line["id"]: line for line in records if line["contender"] == name} for name in pair}
    shared = sorted(by_id[candidate].keys() & by_id[baseline].keys())
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
        statistics = [
            metric.statistics(**{column: [by_id[name][id][column] for id in ids] for column in columns}).astype(float)
            for name in pair
        ]
        ours, theirs = (metric.values(part.sum(axis=0)) for part in statistics)
        for name, estimate in estimates(metric, statistics, resampling).items():
            our_value, their_value = float(ours[name]), float(theirs[name])
            shape = metric.exponential, direction(metric, name), len(ids), resampling.clusters
            unbounded = Difference(name, baseline, our_value, their_value, np.nan, np.nan, estimate, *shape)
            found[name] = unbounded.at(settings.confidence)
    return found


def format_difference(difference: Difference, baseline: str | None = None) -> str:
    """The difference in words; `baseline` is what to call it."""
    name, bounds = baseline or f"the {difference.baseline}", f"[{difference.low:+.3g}, {difference.high:+.3g}]"
    if difference.clusters == 1:
        bounds = "(no interval: one conversation)"
    values = f"{difference.candidate_value:.4g} against {difference.baseline_value:.4g} of {name}"
    return f"{difference.metric} {values}: {difference.value:+.3g} {bounds}"


def shortfall(difference: Difference, minimum_effect: float) -> str | None:
    """Why this difference does not suffice; None if the whole interval lies beyond the minimum effect."""
    if not np.isfinite(difference.value):
        return f"{difference.metric} is not a number for candidate or {difference.baseline}"
    needed = minimum_effect * abs(difference.baseline_value)
    gain, (low, high) = difference.better * difference.value, gain_bounds(difference)
    if low > needed:
        return None
    words = format_difference(difference)
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
    pairs: Mapping[str, Mapping[str, Difference]], margins: Mapping[str, float]
) -> tuple[dict[str, dict[str, Any]], list[str], list[str]]:
    """Whether secondary metrics lose less than their margins against every baseline: numbers, reasons and notes.

    Each is tested at the level of one end of its interval: where all requirements have to pass, no correction is
    needed (intersection-union test; Berger 1982, "Multiparameter hypothesis testing and acceptance sampling",
    Technometrics 24:295). A metric is a requirement only while its standard error is at most a third of the margin:
    then an unchanged model passes in 84 % of cases or more. With a larger error, only a loss that surely exceeds the
    margin holds.
    """
    table: dict[str, dict[str, Any]] = {}
    reasons, notes = [], []
    for (name, margin), baseline in ((test, baseline) for test in margins.items() for baseline in pairs):
        if (difference := pairs[baseline].get(name)) is None:
            continue
        low, high = gain_bounds(difference)
        # Errors shrink with the root of the number of items.
        needed = difference.n * (POWER * difference.error / margin) ** 2 if margin else math.inf
        missing = math.ceil(needed) - difference.n if math.isfinite(needed) else None
        required = missing is not None and missing <= 0
        kept = bool(low > -margin)
        table.setdefault(name, {})[baseline] = difference.as_json() | {
            "margin": margin,
            "standard_error": finite(difference.error),
            "requirement": required,
            "items_missing": 0 if required else missing,
            "non_inferior": kept,
        }
        if not math.isfinite(difference.value) or (required and not kept):
            reasons.append(f"a loss of more than {margin:g} is not ruled out: {format_difference(difference)}")
        elif high < -margin:
            reasons.append(f"a loss of more than {margin:g} is sure: {format_difference(difference)}")
        elif not (required or kept):
            more = "more items" if missing is None else f"some {missing} more items"
            notes.append(
                f"{name} is no requirement against the {baseline} yet: {more} would show whether it loses more than "
                f"{margin:g} ({format_difference(difference)})"
            )
    return table, reasons, notes


def surely_lost(pairs: Mapping[str, Mapping[str, Difference]], apart: Sequence[str], level: float) -> list[str]:
    """Notes on what surely fell, whatever the verdict. chrF is looked at by itself, at `level`; all other values but
    those `apart`, which decide, are corrected together (Holm 1979)."""
    alone: list[Difference] = []
    others: list[Difference] = []
    for found in pairs.values():
        for name, difference in found.items():
            if difference.better and name not in apart and math.isfinite(difference.value):
                (alone if name == ALONE else others).append(difference)
    p_values = holm([difference.estimate.p_not_below_zero(difference.better) for difference in others])
    lost = [difference for difference, p in zip(others, p_values, strict=True) if p <= level]
    return [f"surely worse: {format_difference(d)}" for d in (*(d for d in alone if gain_bounds(d)[1] < 0), *lost)]
