"""Is the candidate better? Paired differences on the same items, people's votes, and a verdict with its reasons.

PROMOTE        the primary metric beats base and champion, the whole interval beyond the minimum effect, a loss in
               secondary metrics is ruled out where there are items enough, quantising costs little, no prompting
               baseline surely does as well, general knowledge is kept and replies fit their prompts (guards.py);
               against a champion with another tokenizer the likelihood a byte decides instead of metrics that count
               tokens. Where compare.primary is the win rate, or there are too few references, votes decide instead
INCONCLUSIVE   too few conversations and votes to tell
HOLD           anything else; a leak, an undefined primary metric or people who surely prefer what the candidate is
               compared with hold however few the conversations
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fine_tuning.common.errors import UserError, count_of
from fine_tuning.common.records import read_jsonl
from fine_tuning.evaluation.metric_modules.loading import LIKELIHOOD_COLUMNS, REPLY_COLUMNS, load_metric
from fine_tuning.evaluation.records.champion_records import LEARNED
from fine_tuning.evaluation.records.measurements import (
    GUARDS,
    MEASURES,
    Files,
    Metrics,
    by_contender,
    likelihood_columns,
)
from fine_tuning.evaluation.records.record_types import CANDIDATE, FEW_SHOT, PROMPTED, finite
from fine_tuning.evaluation.records.settings import ADAPTER, METRIC_MODULES, EvaluateSettings, IntervalSettings
from fine_tuning.evaluation.verdict.differences import (
    LOOK_LEVEL,
    Difference,
    Records,
    differences,
    format_difference,
    gain_bounds,
    non_inferiority,
    shortfall,
    surely_lost,
)
from fine_tuning.evaluation.verdict.guards import guard, guard_differences
from fine_tuning.evaluation.verdict.judge import JudgeCount
from fine_tuning.evaluation.verdict.memorisation import kept, untested
from fine_tuning.evaluation.verdict.privacy import leaks
from fine_tuning.evaluation.verdict.settings import DECIDES, PREFERENCE, WIN_RATE, CompareSettings
from fine_tuning.evaluation.verdict.votes import MORE, VoteCount
from fine_tuning.schema.votes import JudgeVote, Vote, read_all_votes

QUANTISED = "candidate_quantised"
BASELINES = ("base", "champion")
PROMPTING_BASELINES = {
    PROMPTED: ("the base with another system prompt", "set chat.system_prompt to that of evaluate.prompting_baselines"),
    FEW_SHOT: (
        "the base with examples from training conversations",
        "set serve.examples to that of evaluate.prompting_baselines",
    ),
}
NO_REFERENCES = (
    "every reply in the test split is a model's own word and proves nothing: write replies of your own in place of the "
    f"model's in the app, import what people wrote, name models worth learning from in evaluate.references, or {MORE}"
)
LOOPING = 0.25  # share of replies that are said to loop
ANY_TOKENIZER = "nll_per_byte"  # decides where the primary metric counts tokens and a baseline counts others


@dataclass(frozen=True)
class Evidence:
    """What the stage evaluate left in its folder, and the metrics to judge it by."""

    records: Records
    guarded: Files
    answers: Sequence[dict[str, Any]]
    memory: Sequence[dict[str, Any]]
    votes: Sequence[Vote]
    judged: Sequence[JudgeVote]
    metrics: Metrics
    intervals: IntervalSettings

    @classmethod
    def read(cls, folder: Path, evaluate: EvaluateSettings, votes: Path) -> "Evidence":
        """From the folder that evaluate wrote, and the folder of votes."""
        names = ("items", "prompts", "memory", *GUARDS)
        files = {name: list(read_jsonl(folder / f"{name}.jsonl")) for name in names}
        metrics = [load_metric(name, METRIC_MODULES) for name in evaluate.metrics]
        guarded = {name: files[name] for name in GUARDS}
        voted = read_all_votes(votes, Vote), read_all_votes(votes, JudgeVote)
        return cls(files["items"], guarded, files["prompts"], files["memory"], *voted, metrics, evaluate.interval)

    def verdict(self, settings: CompareSettings, adapter_sha256: str, suite: Mapping[str, Any]) -> dict[str, Any]:
        """The content of metrics/comparison.json for a candidate that is not the champion; `suite` is the entry of
        metrics/evaluation.json."""
        people = VoteCount.of(self.votes, self.records, suite.get("ggufs", {}))
        files, kind = (self.guarded, self.answers, self.memory), suite.get("kind", {"name": ADAPTER})
        found = compare(self.records, self.metrics, settings, self.intervals, *files, people, kind["name"])
        # Judges come after the verdict: nothing that decides can read them.
        judges = JudgeCount.of(self.judged, self.votes, people, suite.get("ggufs", {}))
        found["reasons"] += [str(judge) for judge in judges]
        found["judges"] = [judge.as_json() for judge in judges]
        found["reasons"] += kind_in_words(kind)
        found["kind"] = kind
        if learned := suite.get("learned_by_champion"):
            found["reasons"].append(f"{count_of(learned, 'held-out conversation')} {LEARNED}")
        return found | {"adapter_sha256": adapter_sha256, "eval_set_sha256": suite["sha256"]}


def compare(
    records: Records,
    metrics: Metrics,
    settings: CompareSettings,
    intervals: IntervalSettings,
    guarded: Files | None = None,
    answers: Sequence[dict[str, Any]] = (),
    memory: Sequence[dict[str, Any]] | None = None,
    people: VoteCount | None = None,
    kind: str = ADAPTER,
) -> dict[str, Any]:
    """The content of metrics/comparison.json but for the identities of candidate and suite.

    Args:
        records: lines of items.jsonl, all contenders.
        guarded: lines of the file of each of MEASURES, by its stem.
        answers: lines of prompts.jsonl, the answers to the test prompts.
        memory: lines of memory.jsonl, what was kept of the training data; None: of no concern here.
        people: their votes; None: nobody voted.
        kind: of version that the candidate is.

    Raises:
        UserError: the suites of the contenders differ, or a metric that is to decide was not measured.
    """
    check_same_suite(records)
    files: Files = {**dict.fromkeys(GUARDS, ()), **(guarded or {})}
    tables, lost, doubts = guard(
        files, settings.golden_lead, settings.text_tolerance, settings.prompt_help or 0, intervals.confidence
    )
    privacy, leaked = leaks(records, answers)
    remembered, memorised = kept(memory or ())
    people = people or VoteCount.of((), records, {})
    common = tables | {"privacy": privacy, "memory": remembered, "votes": people.as_json()}
    no_references = settings.primary not in (*MEASURES, WIN_RATE) and not any("nll" in line for line in records)
    by_votes = no_references or settings.primary == WIN_RATE
    if no_references:
        settings = settings.model_copy(update={"secondary": {}})
    present = {line["contender"] for line in records}
    pairs = {name: differences(records, metrics, name, intervals) for name in BASELINES if name in present}
    others = guard_differences(files, pairs, intervals.confidence)
    asked = {name: {metric: row for metric, row in others[name].items() if metric not in MEASURES} for name in pairs}
    for baseline, rows in pairs.items():
        if preferred := others[baseline].get(PREFERENCE):
            rows[PREFERENCE] = preferred
    deciding = {
        baseline: settings.primary if settings.primary in found else ANY_TOKENIZER
        for baseline, found in pairs.items()
        if not by_votes
    }
    primary, against = primary_differences(pairs, deciding, settings, by_votes)

    secondary, inferior, notes = non_inferiority(pairs, settings.secondary)
    notes += surely_lost(pairs, (*settings.secondary, *deciding.values()), (1 - intervals.confidence) / 2)
    notes += surely_lost(asked, (), (1 - intervals.confidence) / 2)
    notes += looping(pairs)
    quantisation, coarse = quantising_loss(records, metrics, intervals, settings)
    prompted, as_good, close = prompting_baselines(records, metrics, intervals, settings)
    notes += close + other_tokenizers(pairs, deciding, settings) + people.notes()
    notes += untested(remembered) if memory is not None else []
    notes = [*switched_off(present, tables, kind), *notes, *doubts]

    few = [NO_REFERENCES] if no_references else too_few(primary, settings)
    standing = leaked + memorised + lost + coarse  # they hold whatever the number of conversations
    measured = against + inferior + standing + as_good
    verdict, reasons = decide(primary, people, settings, by_votes, few, standing, measured, bool(leaked or memorised))
    if verdict == "PROMOTE":
        kept_up = [name for name, row in secondary.items() if all(one["non_inferior"] for one in row.values())]
        reasons += [f"not worse in {', '.join(kept_up)}"] if kept_up else []
    return {
        "verdict": verdict,
        "reasons": reasons + notes,
        "primary": {"metric": settings.primary, "minimum_effect": settings.minimum_effect}
        | {difference.baseline: {"metric": difference.metric} | difference.as_json() for difference in primary},
        "secondary": secondary,
        "differences": {
            baseline: {name: difference.as_json() for name, difference in (found | others[baseline]).items()}
            for baseline, found in pairs.items()
        },
        "other_tokens": [baseline for baseline, found in pairs.items() if pairs["base"].keys() - found.keys()],
        "quantisation": quantisation,
        "prompting_baselines": prompted,
        **common,
        "provenance": provenance(records, metrics, settings.primary, intervals),
        "n": min((difference.n for difference in primary), default=len(people.bets)),
        "clusters": min((difference.clusters for difference in primary), default=len(people.bets)),
    }


def primary_differences(
    pairs: Mapping[str, Mapping[str, Difference]],
    deciding: Mapping[str, str],
    settings: CompareSettings,
    by_votes: bool,
) -> tuple[list[Difference], list[str]]:
    """The differences that decide, each at the level of one look, and the reasons not to promote that they give. Raises
    UserError if a metric that is to decide was not measured, or has no better and worse."""
    # The base shares the candidate's tokenizer: what it lacks was not measured at all.
    for name in (*([] if by_votes else [settings.primary]), *settings.secondary, *deciding.values()):
        if name not in pairs["base"] and not (name == PREFERENCE and name in settings.secondary):
            raise UserError(f"compare decides by {name}, which was not measured: add its module to evaluate.metrics")
    looked_at = 1 - 2 * LOOK_LEVEL
    primary = [pairs[baseline][name].at(looked_at) for baseline, name in deciding.items() if name in pairs[baseline]]
    if not all(difference.better for difference in primary):
        raise UserError(f"compare.primary = {settings.primary} has no better and worse: choose another metric")
    against = [
        f"nothing is comparable with the {baseline}: promote with --force if the {baseline} has to go"
        for baseline, name in deciding.items()
        if name not in pairs[baseline]
    ]
    found = (shortfall(difference, settings.minimum_effect) for difference in primary)
    return primary, against + [reason for reason in found if reason]


def too_few(primary: Sequence[Difference], settings: CompareSettings) -> list[str]:
    """Why the test split is too small to decide; nothing where it suffices."""
    return [
        f"only {count_of(difference.clusters, 'different conversation')} in the test split, {needed} are needed to "
        f"compare with the {difference.baseline}: collect more, or {MORE}"
        for difference in primary
        if difference.clusters < (needed := settings.needed(difference.baseline))
    ]


def decide(
    primary: Sequence[Difference],
    people: VoteCount,
    settings: CompareSettings,
    by_votes: bool,
    few: list[str],
    standing: list[str],
    measured: list[str],
    leaking: bool,
) -> tuple[str, list[str]]:
    """The verdict and its reasons.

    Args:
        by_votes: whether votes decide instead of the primary metric.
        few: why there are too few conversations to decide; then votes decide, too.
        standing: reasons to hold whatever the number of conversations; `measured`: all reasons to hold.
        leaking: whether it says personal data or what it memorised.
    """
    rejected, wanted = people.rejections(), people.win_rate.better >= DECIDES
    if rejected or leaking or any(not np.isfinite(difference.value) for difference in primary):
        return "HOLD", rejected + measured
    if few and not wanted:
        return "INCONCLUSIVE", few + standing
    if reasons := (standing if few else measured) + people.missing(settings):
        return "HOLD", reasons
    if by_votes and not wanted:
        return "INCONCLUSIVE", [f"not sure yet which people prefer: {people}; {MORE}"]
    reasons = [str(people)] if by_votes or few else []
    return "PROMOTE", reasons + ([] if few else [format_difference(difference) for difference in primary])


def prompting_baselines(
    records: Records, metrics: Metrics, intervals: IntervalSettings, settings: CompareSettings
) -> tuple[dict[str, Any], list[str], list[str]]:
    """What the base does without training: numbers, reasons to hold, and notes.

    A prompting baseline holds the candidate where it surely does as well, that is where a gain of the minimum effect is
    ruled out: nobody should keep an adapter for what a prompt does. One that may do as well is noted.
    """
    present = {line["contender"] for line in records}
    table, reasons, notes = {}, [], []
    for baseline, (name, how) in PROMPTING_BASELINES.items():
        found = differences(records, metrics, baseline, intervals) if baseline in present else {}
        if settings.primary not in found:
            continue
        difference = found[settings.primary]
        table[baseline] = {"what": name} | difference.as_json()
        (low, high), needed = gain_bounds(difference), settings.minimum_effect * abs(difference.baseline_value)
        if high < needed:
            reasons.append(f"do not train yet, {name} does as well: {format_difference(difference, name)}; {how}")
        elif not low > needed:
            notes.append(f"{name} may do as well: {format_difference(difference, name)}; try it: {how}")
    return table, reasons, notes


def looping(pairs: Mapping[str, Mapping[str, Difference]]) -> list[str]:
    """A note where a quarter of the candidate's replies or more repeat themselves without end."""
    found = pairs["base"].get("loops")
    if found is None or not found.candidate_value >= LOOPING:
        return []
    base = f"{found.baseline_value:.0%} of the base's"
    return [f"{found.candidate_value:.0%} of the candidate's {found.n} replies loop, {base}"]


def kind_in_words(kind: Mapping[str, Any]) -> list[str]:
    """Which kind the candidate is, how that was chosen, and what it costs; nothing of an adapter by default."""
    name, measured, tokens = kind["name"], kind.get("validation"), kind.get("prompt_tokens")
    if name == ADAPTER and not measured:
        return []
    found = f"the candidate is of kind {name}"
    if measured and measured["n"]:
        nats = ", ".join(f"{one} {value:.3f}" for one, value in measured["nats_per_token"].items())
        found += f", chosen by nats a token on {count_of(measured['n'], 'validation window')}: {nats}"
    elif measured:
        found += ": the validation split holds no reference to choose another by"
    if tokens:
        seconds = kind["first_token_seconds"]
        found += f"; its prompts have {tokens[1]:.0f} tokens instead of {tokens[0]:.0f}, and its first token comes "
        found += f"after {seconds[1]:.2f} s instead of {seconds[0]:.2f} s"
    return [found]


def switched_off(present: set[str], tables: Mapping[str, Any], kind: str) -> list[str]:
    """One note that names the guards without records, and the parameters that switch them on."""
    guards = {
        "forgetting (evaluate.forgetting)": tables["forgetting"] and tables["general_text"],
        "replies that ignore their prompts (evaluate.other_histories, compare.prompt_help)": tables["prompt_help"],
        "a system prompt that does as well (evaluate.prompting_baselines.system_prompt)": PROMPTED in present,
        "examples that do as well (evaluate.prompting_baselines.examples)": FEW_SHOT in present,
    }
    if kind != ADAPTER:  # it is a prompting baseline, or was chosen among them
        guards = {name: measured for name, measured in guards.items() if "prompting_baselines" not in name}
    off = [name for name, measured in guards.items() if not measured]
    return [f"switched off or without records, not guarded against: {', '.join(off)}"] if off else []


def provenance(records: Records, metrics: Metrics, primary: str, intervals: IntervalSettings) -> dict[str, Any]:
    """How many replies are references, how many are models' own words, and what counting all or the liked would show.
    Whoever likes the replies of one of two equal models would make it surely better: liked replies are shown apart."""
    turns = [turn for line in records if line["contender"] == CANDIDATE for turn in line["turns"]]
    left_out = [turn for turn in turns if not turn["reference"]]
    liked = sum(turn.get("liked", False) for turn in left_out)
    found: dict[str, Any] = {"references": len(turns) - len(left_out), "left_out": len(left_out), "liked": liked}
    for name, wanted in (("with_own_words", len(left_out)), ("with_liked", liked)):
        if not wanted:
            continue
        counted = [
            {key: value for key, value in line.items() if key not in (*REPLY_COLUMNS, *LIKELIHOOD_COLUMNS)}
            | likelihood_columns(
                [t for t in line["turns"] if t["reference"] or t.get("liked") or name == "with_own_words"]
            )
            for line in records
        ]
        biased = differences(counted, metrics, "base", intervals)
        if primary in biased:
            found[name] = biased[primary].as_json()
    return found


def check_same_suite(records: Records) -> None:
    """Refuse contenders that were not asked the same. Raises UserError if they were not, or one that is needed is
    missing."""
    lines = by_contender(records)
    if missing := [name for name in (CANDIDATE, "base") if name not in lines]:
        raise UserError(f"{' and '.join(missing)} were not evaluated: run `dvc repro -f -s evaluate && dvc repro`")

    def values(contender: str, name: str) -> dict[str, Any]:
        return {id: line[name] for id, line in lines[contender].items() if name in line}

    def suites(contender: str) -> set[str | None]:
        return {line.get("suite") for line in lines[contender].values() if "tokens" in line}

    for baseline in (name for name in BASELINES if name in lines):
        # In tokens of its own a champion's suite is another, though the replies are the same.
        same_tokens = baseline == "base" or values(baseline, "tokens") == values(CANDIDATE, "tokens")
        other_suite = same_tokens and suites(baseline) != suites(CANDIDATE)
        ours, theirs = values(CANDIDATE, "bytes"), values(baseline, "bytes")
        other_replies = any(ours[id] != theirs[id] for id in ours.keys() & theirs.keys())
        if lines[baseline].keys() != lines[CANDIDATE].keys() or other_suite or other_replies:
            raise UserError("the contenders were not asked the same items: run `dvc repro -f -s evaluate && dvc repro`")


def other_tokenizers(
    pairs: Mapping[str, Mapping[str, Difference]], deciding: Mapping[str, str], settings: CompareSettings
) -> list[str]:
    """What is compared otherwise with baselines whose tokens are others, in words."""
    notes = []
    for baseline, found in pairs.items():
        if (decider := deciding.get(baseline, settings.primary)) != settings.primary and decider in found:
            notes.append(f"the {baseline} has another tokenizer: {decider} decides instead of {settings.primary}")
        if skipped := [name for name in settings.secondary if name not in found and name != PREFERENCE]:
            notes.append(f"not compared with the {baseline}: {', '.join(skipped)}")
    return notes


def quantising_loss(
    records: Records, metrics: Metrics, intervals: IntervalSettings, settings: CompareSettings
) -> tuple[dict[str, Any], list[str]]:
    """What the GGUF loses against the merged weights, in perplexity, and the reason to hold unless it is surely little.
    Paired on the same items the loss is far surer than either perplexity: a few dozen conversations suffice."""
    if not any(line["contender"] == QUANTISED for line in records):
        return {}, []
    found = differences(records, metrics, CANDIDATE, intervals, candidate=QUANTISED)
    if "perplexity" not in found:
        return {}, []
    perplexity = found["perplexity"]
    value, low, high = (
        np.divide(x, perplexity.baseline_value) for x in (perplexity.value, perplexity.low, perplexity.high)
    )
    tolerance, reasons = settings.quantisation_tolerance, []
    if not value <= tolerance:  # NaN is too much as well
        reasons = [
            f"quantising costs {value:.1%} of perplexity, more than {tolerance:.1%}: choose a finer "
            "package.quantisation"
        ]
    elif not high <= tolerance:
        reasons = [
            f"quantising may cost more than {tolerance:.1%} of perplexity "
            f"({f'{low:+.1%} to {high:+.1%}' if np.isfinite(low) else 'one conversation has no interval'}): "
            "raise evaluate.quantised_items, or choose a finer package.quantisation"
        ]
    return {name: difference.as_json() for name, difference in found.items()} | {
        "perplexity_lost": finite(value),
        "low": finite(low),
        "high": finite(high),
    }, reasons
