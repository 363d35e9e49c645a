"""Is the candidate better? Paired differences on the same items, and a verdict with its reasons.

PROMOTE        the primary metric beats base and champion, the whole interval beyond the minimum effect, no secondary
               metric is shown to be lost, and quantising costs little; against a champion with another tokenizer
               the likelihood a byte decides instead of metrics that count tokens
INCONCLUSIVE   too few conversations to tell
HOLD           anything else, a number that is none included
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from pydantic import Field

from fine_tuning.errors import UserError
from fine_tuning.evaluation.evaluator import IntervalSettings, Metrics, likelihood_columns
from fine_tuning.evaluation.forgetting import forgotten
from fine_tuning.evaluation.metrics import REPLY_COLUMNS, TOKEN_COLUMNS, columns_of, direction
from fine_tuning.evaluation.privacy import leaks
from fine_tuning.evaluation.scoring import finite
from fine_tuning.evaluation.statistics import Resampling, bootstrap, holm, interval, share_at_most
from fine_tuning.settings import Settings

CANDIDATE, QUANTISED = "candidate", "candidate_quantised"
RIVALS = ("base", "champion")
ANY_TOKENIZER = "nll_per_byte"  # decides where the primary metric counts tokens and a rival counts others
Records = Sequence[dict[str, Any]]


class CompareSettings(Settings):
    """Section `compare` of params.yaml."""

    primary: str
    minimum_effect: float = Field(ge=0)
    minimum_conversations: int = Field(ge=2)
    secondary: dict[str, float]
    quantisation_tolerance: float = Field(ge=0)
    goldens: list[str]


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
                direction(metric, name), len(ids), resampling.clusters,
            )  # fmt: skip
    return found


def compare(
    records: Records,
    metrics: Metrics,
    settings: CompareSettings,
    intervals: IntervalSettings,
    general: Sequence[dict[str, Any]] = (),
    answers: Sequence[dict[str, Any]] = (),
) -> dict[str, Any]:
    """The content of metrics/comparison.json but for the identities of candidate and suite.

    Args:
        records: lines of items.jsonl, all contenders.
        general: lines of general.jsonl, the suite against forgetting.
        answers: lines of prompts.jsonl, the answers to the test prompts.

    Raises:
        UserError: the suites of the contenders differ, or a metric that is to decide was not measured.
    """
    check_same_suite(records)
    if not any("nll" in line for line in records):
        return no_references(settings, len({line["id"] for line in records}))
    present = {line["contender"] for line in records}
    pairs = {rival: differences(records, metrics, rival, intervals) for rival in RIVALS if rival in present}
    deciding = {
        rival: settings.primary if settings.primary in found else ANY_TOKENIZER for rival, found in pairs.items()
    }
    # The base shares the candidate's tokenizer: what it lacks was not measured at all.
    for name in (settings.primary, *settings.secondary, *deciding.values()):
        if name not in pairs["base"]:
            raise UserError(f"compare decides by {name}, which was not measured: add its module to evaluate.metrics")
    primary = [pairs[rival][name] for rival, name in deciding.items() if name in pairs[rival]]
    if not all(difference.better for difference in primary):
        raise UserError(f"compare.primary = {settings.primary} has no better and worse: choose another metric")
    notes = other_tokenizers(pairs, deciding, settings)

    against = [
        f"nothing is comparable with the {rival}: promote with --force if the {rival} has to go"
        for rival, name in deciding.items()
        if name not in pairs[rival]
    ]  # reasons not to promote
    for difference in primary:
        against += [reason] if (reason := shortfall(difference, settings.minimum_effect)) else []
    secondary, lost = non_inferiority(pairs, settings.secondary, 1 - intervals.confidence)
    against += lost
    quantisation = quantising_loss(records, metrics, intervals, settings)
    against += quantisation.pop("reasons")
    forgetting, lost = forgotten(general, settings.goldens)
    privacy, leaked = leaks(records, answers)
    against += lost + leaked

    clusters = min(difference.clusters for difference in primary)
    undefined = any(not np.isfinite(difference.value) for difference in primary)
    if undefined:
        verdict, reasons = "HOLD", against
    elif clusters < settings.minimum_conversations:
        verdict = "INCONCLUSIVE"
        reasons = [
            f"only {clusters} different conversations in the test split, {settings.minimum_conversations} are needed "
            "to tell: collect more"
        ]
    elif against:
        verdict, reasons = "HOLD", against
    else:
        verdict, reasons = "PROMOTE", [told(difference) for difference in primary]
        if settings.secondary:
            reasons.append(f"not worse in {', '.join(settings.secondary)}")
    return {
        "verdict": verdict,
        "reasons": reasons + notes,
        "primary": {"metric": settings.primary, "minimum_effect": settings.minimum_effect}
        | {difference.rival: {"metric": difference.metric} | difference.as_json() for difference in primary},
        "secondary": secondary,
        "differences": {
            rival: {name: difference.as_json() for name, difference in found.items()} for rival, found in pairs.items()
        },
        "quantisation": quantisation,
        "forgetting": forgetting,
        "privacy": privacy,
        "provenance": provenance(records, metrics, settings.primary, intervals),
        "n": min(difference.n for difference in primary),
        "clusters": clusters,
    }


def no_references(settings: CompareSettings, count: int) -> dict[str, Any]:
    """The verdict on a test split that holds nothing but models' own words."""
    return {
        "verdict": "INCONCLUSIVE",
        "reasons": [
            "every reply in the test split is a model's own word and proves nothing: rate or edit replies in the app, "
            "or import conversations"
        ],
        "primary": {"metric": settings.primary, "minimum_effect": settings.minimum_effect},
        "secondary": {},
        "differences": {},
        "quantisation": {},
        "forgetting": {},
        "privacy": {},
        "provenance": {"references": 0, "left_out": count},
        "n": 0,
        "clusters": 0,
    }


def provenance(records: Records, metrics: Metrics, primary: str, intervals: IntervalSettings) -> dict[str, Any]:
    """How many replies are references, how many are own words of models, and what counting those would show."""
    turns = [turn for line in records if line["contender"] == CANDIDATE for turn in line["turns"]]
    left_out = [turn for turn in turns if not turn["reference"]]
    found: dict[str, Any] = {"references": len(turns) - len(left_out), "left_out": len(left_out)}
    if left_out:
        everything = [
            {key: value for key, value in line.items() if key not in REPLY_COLUMNS} | likelihood_columns(line["turns"])
            for line in records
        ]
        biased = differences(everything, metrics, "base", intervals)
        if primary in biased:
            found["with_own_words"] = biased[primary].as_json()
    return found


def check_same_suite(records: Records) -> None:
    """Refuse contenders that were not asked the same.

    Raises:
        UserError: they were not, or one that is needed is missing.
    """
    ids: dict[str, set[str]] = {}
    for line in records:
        ids.setdefault(line["contender"], set()).add(line["id"])
    missing = [name for name in (CANDIDATE, "base") if name not in ids]
    if missing:
        raise UserError(f"{' and '.join(missing)} were not evaluated: run `dvc repro -f evaluate`")
    if any(ids[name] != ids[CANDIDATE] for name in RIVALS if name in ids):
        raise UserError("the contenders were not asked the same items: run `dvc repro -f evaluate`")


def other_tokenizers(
    pairs: Mapping[str, Mapping[str, Difference]], deciding: Mapping[str, str], settings: CompareSettings
) -> list[str]:
    """What is compared otherwise with rivals whose tokens are others, in words."""
    notes = []
    for rival, found in pairs.items():
        if deciding[rival] != settings.primary and deciding[rival] in found:
            notes.append(
                f"the {rival} has another tokenizer: {deciding[rival]} decides against it instead of {settings.primary}"
            )
        if skipped := [name for name in settings.secondary if name not in found]:
            notes.append(f"not compared with the {rival}: {', '.join(skipped)}")
    return notes


def told(difference: Difference) -> str:
    """The difference in words."""
    return (
        f"{difference.metric} {difference.candidate_value:.4g} against {difference.rival_value:.4g} of the "
        f"{difference.rival}: {difference.value:+.3g} [{difference.low:+.3g}, {difference.high:+.3g}]"
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


def quantising_loss(
    records: Records, metrics: Metrics, intervals: IntervalSettings, settings: CompareSettings
) -> dict[str, Any]:
    """What the GGUF loses against the merged weights, in perplexity, and the reason to hold if that is too much."""
    if not any(line["contender"] == QUANTISED for line in records):
        return {"reasons": []}
    found = differences(records, metrics, CANDIDATE, intervals, candidate=QUANTISED)
    if "perplexity" not in found:
        return {"reasons": []}
    loss = found["perplexity"]
    share = loss.value / loss.rival_value
    reasons = []
    if not share <= settings.quantisation_tolerance:  # NaN is too much as well
        reasons.append(
            f"quantising costs {share:.1%} of perplexity, more than {settings.quantisation_tolerance:.1%}: choose a "
            "finer package.quantisation"
        )
    return {name: difference.as_json() for name, difference in found.items()} | {
        "perplexity_lost": finite(share),
        "reasons": reasons,
    }
