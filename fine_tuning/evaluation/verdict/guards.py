"""Guards of the verdict: does the candidate still know what base and champion know, and do its replies fit prompts?

Records of the evaluation in; numbers, reasons to hold and notes out. No model is loaded here.
"""

from collections.abc import Iterable
from typing import Any

import numpy as np

from fine_tuning.evaluation.records.measurements import Files, by_contender, clusters_of, golden_lead, measures_of
from fine_tuning.evaluation.records.record_types import CANDIDATE
from fine_tuning.evaluation.records.statistics import clustered_mean
from fine_tuning.evaluation.verdict.differences import Difference, format_difference

Verdict = tuple[dict[str, Any], list[str], list[str]]  # part of comparison.json, reasons to hold, notes
LEVEL = 0.05  # one-sided, of the tests for loss of general knowledge
KNOWLEDGE_LOSS = 0.05  # probability; on 84 questions a harmless candidate's difference has a standard error of 0.013
ENOUGH = 50  # clusters; with fewer not even a help of the prompt that did not change can be shown to be kept


def paired(files: Files, metric: str, baseline: str, confidence: float, share: float = 1.0) -> Difference | None:
    """Mean of candidate - `share` * baseline on the items of both, with Student's interval; None without such items."""
    every, value, better = measures_of(files)[metric]
    lines = by_contender(every)
    ours, theirs = lines.get(CANDIDATE, {}), lines.get(baseline, {})
    if not (ids := sorted(ours.keys() & theirs.keys())):
        return None
    own, other = (np.array([value(found[id]) for id in ids]) for found in (ours, theirs))
    clusters = clusters_of(ours[id] for id in ids)
    mean = clustered_mean(own - share * other, clusters)
    values, bounds = (float(own.mean()), float(share * other.mean())), mean.interval(confidence)
    return Difference(metric, baseline, *values, bounds.low, bounds.high, mean, False, better, len(ids), mean.clusters)


def guard(
    files: Files, golden: float, text_tolerance: float, help_share: float, confidence: float
) -> tuple[dict[str, Any], list[str], list[str]]:
    """{"forgetting", "general_text", "prompt_help"} for comparison.json, reasons to hold and notes of all guards: see
    `forgotten`, `text_lost` and `prompts_ignored`, which is left out where `help_share` is 0."""
    found = {
        "forgetting": forgotten(files, golden),
        "general_text": text_lost(files, text_tolerance),
        "prompt_help": prompts_ignored(files, help_share, confidence),
    }
    reasons, notes = ([line for row in found.values() for line in row[part]] for part in (1, 2))
    return {name: row[0] for name, row in found.items()}, reasons, notes


def guard_differences(files: Files, baselines: Iterable[str], confidence: float) -> dict[str, dict[str, Difference]]:
    """{baseline: {metric: paired difference}} of MEASURES and public benchmarks."""
    return {
        name: {metric: row for metric in measures_of(files) if (row := paired(files, metric, name, confidence))}
        for name in baselines
    }


def forgotten(files: Files, golden: float) -> Verdict:
    """General questions: what the candidate lost against each baseline.

    A loss of more than KNOWLEDGE_LOSS of the mean probability of the right answer has to be ruled out, and of golden
    questions, where the base's right answer leads by more than `golden` nats, none may be lost. How many answers
    changed sides is shown and decides nothing: those near the middle do by chance.
    """
    lines = by_contender(files["general"])
    ours = lines.pop(CANDIDATE, {})
    goldens = [id for id, line in lines.get("base", {}).items() if id in ours and golden_lead(line) > golden]
    lost = [id for id in goldens if golden_lead(ours[id]) <= 0]
    table: dict[str, Any] = {}
    reasons = []
    for baseline, theirs in lines.items():
        if (found := paired(files, "general_knowledge", baseline, 1 - 2 * LEVEL)) is None:
            continue
        known, knew = ({id for id, line in group.items() if golden_lead(line) > 0} for group in (ours, theirs))
        counts = {"baseline_knows": len(knew), "candidate_knows": len(known)}
        table[baseline] = found.as_json() | counts | {"lost": sorted(knew - known), "gained": sorted(known - knew)}
        table[baseline] |= {"goldens": len(goldens), "goldens_lost": lost}
        if not found.low > -KNOWLEDGE_LOSS:
            words = format_difference(found)
            reasons.append(f"forgets: a loss of more than {KNOWLEDGE_LOSS:g} is not ruled out: {words}")
    if lost:
        reasons.append(f"prefers wrong answers where the base leads by more than {golden:g} nats: {', '.join(lost)}")
    note = f"compare.golden_lead guards nothing: the base leads by more than {golden:g} nats on no general question"
    return table, reasons, [note] if table and not goldens else []


def text_lost(files: Files, tolerance: float) -> Verdict:
    """General text that is no chat, in nats a byte against each baseline. A rise of more than the share `tolerance` of
    the baseline's value has to be ruled out, one-sided at LEVEL."""
    table, reasons = {}, []
    for baseline in by_contender(files["general_text"]):
        found = paired(files, "general_text", baseline, 1 - 2 * LEVEL)
        beyond = paired(files, "general_text", baseline, 1 - 2 * LEVEL, 1 + tolerance)
        if found is None or beyond is None or baseline == CANDIDATE:
            continue
        table[baseline] = found.as_json()
        if not beyond.high < 0:
            reasons.append(f"forgets: a rise of more than {tolerance:.1%} is not ruled out: {format_difference(found)}")
    return table, reasons, []


def prompts_ignored(files: Files, share: float, confidence: float) -> Verdict:
    """The help of the prompt, candidate - `share` * base.

    With ENOUGH clusters it has to be shown to be kept (one end of the interval); with fewer only what surely falls
    short holds. A candidate trained on replies that do not belong to their prompts gains perplexity by their style
    alone, and loses this.
    """
    found = paired(files, "prompt_help", "base", confidence, share) if share else None
    if found is None:
        return {}, [], []
    reasons, notes, words = [], [], format_difference(found, f"{share:g} times the base")
    if found.high < 0:
        reasons.append(f"its replies fit their prompts less than the base's: {words}")
    elif found.clusters < ENOUGH:
        notes.append(f"{found.clusters} conversations, {ENOUGH} are needed to show that replies fit prompts: {words}")
    elif not found.low > 0:
        reasons.append(f"its replies are not shown to fit their prompts: {words}; if they are all alike, lower "
                       "compare.prompt_help")  # fmt: skip
    return found.as_json() | {"share": share}, reasons, notes
