"""Is the candidate better? Paired differences on the same items, and a verdict with its reasons.

PROMOTE        the primary metric beats base and champion, the whole interval beyond the minimum effect, no secondary
               metric is shown to be lost, quantising costs little, and no cheaper road does as well; against a champion
               with another tokenizer the likelihood a byte decides instead of metrics that count tokens
INCONCLUSIVE   too few conversations to tell
HOLD           anything else: a leak and a number that is none however few the conversations
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field

from fine_tuning.errors import UserError
from fine_tuning.evaluation.differences import (
    CANDIDATE,
    Difference,
    Records,
    differences,
    gain_bounds,
    non_inferiority,
    relative,
    shortfall,
    told,
)
from fine_tuning.evaluation.evaluate_settings import EvaluateSettings, IntervalSettings
from fine_tuning.evaluation.forgetting import forgotten, unguarded
from fine_tuning.evaluation.measurements import Metrics, likelihood_columns
from fine_tuning.evaluation.memory import kept
from fine_tuning.evaluation.metrics import REPLY_COLUMNS, load_metric
from fine_tuning.evaluation.privacy import leaks
from fine_tuning.evaluation.rivals import PROMPTED, SHOWN
from fine_tuning.evaluation.scoring import finite
from fine_tuning.records import read_jsonl
from fine_tuning.settings import Settings

QUANTISED = "candidate_quantised"
RIVALS = ("base", "champion")
ROADS = {
    PROMPTED: ("the base with another system prompt", "set chat.system_prompt to that of evaluate.rivals"),
    SHOWN: ("the base with examples from training conversations", "put the likest conversations into the prompt"),
}
ANY_TOKENIZER = "nll_per_byte"  # decides where the primary metric counts tokens and a rival counts others


class CompareSettings(Settings):
    """Section `compare` of params.yaml."""

    primary: str
    minimum_effect: float = Field(ge=0)
    minimum_conversations: int = Field(ge=2)
    secondary: dict[str, float]
    quantisation_tolerance: float = Field(ge=0)
    goldens: list[str]


METRIC_MODULES = Path(__file__).with_name("metric_modules")


@dataclass(frozen=True)
class Evidence:
    """What the stage evaluate left in its folder, and the metrics to judge it by."""

    records: Records
    general: Sequence[dict[str, Any]]
    answers: Sequence[dict[str, Any]]
    memory: Sequence[dict[str, Any]]
    metrics: Metrics
    intervals: IntervalSettings

    @classmethod
    def read(cls, folder: Path, evaluate: EvaluateSettings) -> "Evidence":
        """From the folder that evaluate wrote."""
        names = ("items", "general", "prompts", "memory")
        files = (list(read_jsonl(folder / f"{name}.jsonl")) for name in names)
        metrics = [load_metric(name, METRIC_MODULES) for name in evaluate.metrics]
        return cls(*files, metrics=metrics, intervals=evaluate.interval)

    def verdict(self, settings: CompareSettings) -> dict[str, Any]:
        """What `compare` makes of it."""
        return compare(self.records, self.metrics, settings, self.intervals, self.general, self.answers, self.memory)


def compare(
    records: Records,
    metrics: Metrics,
    settings: CompareSettings,
    intervals: IntervalSettings,
    general: Sequence[dict[str, Any]] = (),
    answers: Sequence[dict[str, Any]] = (),
    memory: Sequence[dict[str, Any]] = (),
) -> dict[str, Any]:
    """The content of metrics/comparison.json but for the identities of candidate and suite.

    Args:
        records: lines of items.jsonl, all contenders.
        general: lines of general.jsonl, the suite against forgetting.
        answers: lines of prompts.jsonl, the answers to the test prompts.
        memory: lines of memory.jsonl, what was kept of the training data.

    Raises:
        UserError: the suites of the contenders differ, or a metric that is to decide was not measured.
    """
    check_same_suite(records)
    forgetting, lost = forgotten(general, settings.goldens)
    privacy, leaked = leaks(records, answers)
    remembered, memorised = kept(memory)
    common = {"forgetting": forgetting, "privacy": privacy, "memory": remembered}
    if not any("nll" in line for line in records):
        return no_references(settings, records, leaked + memorised) | common
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

    against = [
        f"nothing is comparable with the {rival}: promote with --force if the {rival} has to go"
        for rival, name in deciding.items()
        if name not in pairs[rival]
    ]  # reasons not to promote
    for difference in primary:
        against += [reason] if (reason := shortfall(difference, settings.minimum_effect)) else []
    secondary, inferior = non_inferiority(pairs, settings.secondary, 1 - intervals.confidence)
    quantisation, coarse = quantising_loss(records, metrics, intervals, settings)
    roads, cheaper, notes = cheaper_roads(records, metrics, intervals, settings.primary)
    notes += other_tokenizers(pairs, deciding, settings)
    notes += [note] if (note := unguarded(forgetting, settings.goldens)) else []

    clusters = min(difference.clusters for difference in primary)
    standing = leaked + memorised + lost + coarse  # they hold whatever the number of conversations
    undefined = any(not np.isfinite(difference.value) for difference in primary)
    if undefined or leaked or memorised:
        verdict, reasons = "HOLD", against + inferior + standing + cheaper
    elif clusters < settings.minimum_conversations:
        verdict = "INCONCLUSIVE"
        reasons = [
            f"only {clusters} different conversations in the test split, {settings.minimum_conversations} are needed "
            "to tell: collect more",
            *standing,
        ]
    elif reasons := against + inferior + standing + cheaper:
        verdict = "HOLD"
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
        "other_tokens": [rival for rival, found in pairs.items() if pairs["base"].keys() - found.keys()],
        "quantisation": quantisation,
        "cheaper_roads": roads,
        **common,
        "provenance": provenance(records, metrics, settings.primary, intervals),
        "n": min(difference.n for difference in primary),
        "clusters": clusters,
    }


def no_references(settings: CompareSettings, records: Records, leaked: list[str]) -> dict[str, Any]:
    """The verdict on a test split that holds nothing but models' own words."""
    reason = (
        "every reply in the test split is a model's own word and proves nothing: rate or edit replies in the app, "
        "import conversations, or name models that are worth learning from in evaluate.references"
    )
    return {
        "verdict": "HOLD" if leaked else "INCONCLUSIVE",
        "reasons": [*leaked, reason],
        "primary": {"metric": settings.primary, "minimum_effect": settings.minimum_effect},
        "secondary": {},
        "differences": {},
        "other_tokens": [],
        "quantisation": {},
        "cheaper_roads": {},
        "provenance": {"references": 0, "left_out": len({line["id"] for line in records})},
        "n": 0,
        "clusters": 0,
    }


def cheaper_roads(
    records: Records, metrics: Metrics, intervals: IntervalSettings, primary: str
) -> tuple[dict[str, Any], list[str], list[str]]:
    """What the base does without training: numbers, reasons to hold, and notes.

    A road that does as well as the candidate holds it: nobody should keep an adapter for what a prompt does. One that
    is behind, but not surely, is noted.
    """
    present = {line["contender"] for line in records}
    table, reasons, notes = {}, [], []
    for rival, (name, how) in ROADS.items():
        found = differences(records, metrics, rival, intervals) if rival in present else {}
        if primary not in found:
            continue
        difference = found[primary]
        table[rival] = {"what": name} | difference.as_json()
        if not difference.better * difference.value > 0:  # no number is no gain either
            reasons.append(f"do not train yet, {name} does as well: {told(difference, name)}; {how}")
        elif gain_bounds(difference)[0] <= 0:
            notes.append(f"{name} may do as well: {told(difference, name)}; try the cheaper road, {how}")
    return table, reasons, notes


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
    tokens: dict[str, dict[str, int]] = {}
    suites: dict[str, set[str]] = {}
    sizes: dict[str, dict[str, int]] = {}
    for line in records:
        name = line["contender"]
        ids.setdefault(name, set()).add(line["id"])
        if "bytes" in line:
            sizes.setdefault(name, {})[line["id"]] = line["bytes"]
        if "tokens" in line:
            tokens.setdefault(name, {})[line["id"]] = line["tokens"]
            suites.setdefault(name, set()).add(line.get("suite"))
    missing = [name for name in (CANDIDATE, "base") if name not in ids]
    if missing:
        raise UserError(f"{' and '.join(missing)} were not evaluated: run `dvc repro -f evaluate`")
    for rival in (name for name in RIVALS if name in ids):
        # In tokens of its own a champion's suite is another, though the replies are the same.
        same_tokens = rival == "base" or tokens.get(rival) == tokens.get(CANDIDATE)
        other_suite = same_tokens and suites.get(rival) != suites.get(CANDIDATE)
        ours, theirs = sizes.get(CANDIDATE, {}), sizes.get(rival, {})
        other_replies = any(ours[id] != theirs[id] for id in ours.keys() & theirs.keys())
        if ids[rival] != ids[CANDIDATE] or other_suite or other_replies:
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


def quantising_loss(
    records: Records, metrics: Metrics, intervals: IntervalSettings, settings: CompareSettings
) -> tuple[dict[str, Any], list[str]]:
    """What the GGUF loses against the merged weights, in perplexity, and the reason to hold unless it is surely little.

    Paired on the same items the loss is far surer than either perplexity: a few dozen conversations suffice.
    """
    if not any(line["contender"] == QUANTISED for line in records):
        return {}, []
    found = differences(records, metrics, CANDIDATE, intervals, candidate=QUANTISED)
    if "perplexity" not in found:
        return {}, []
    share = relative(found["perplexity"], intervals.confidence)
    tolerance, reasons = settings.quantisation_tolerance, []
    if not share.value <= tolerance:  # NaN is too much as well
        reasons = [
            f"quantising costs {share.value:.1%} of perplexity, more than {tolerance:.1%}: choose a finer "
            "package.quantisation"
        ]
    elif not share.high <= tolerance:
        reasons = [
            f"quantising may cost more than {tolerance:.1%} of perplexity ({share.low:+.1%} to {share.high:+.1%}): "
            "raise evaluate.quantised_items, or choose a finer package.quantisation"
        ]
    return {name: difference.as_json() for name, difference in found.items()} | {
        "perplexity_lost": finite(share.value),
        "low": finite(share.low),
        "high": finite(share.high),
    }, reasons
