"""Has the candidate memorised training replies or canaries? Judged from records alone."""

import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np

from fine_tuning.evaluation.records.record_types import CANDIDATE, GIVEN, SHORTEST

GUESSABLE = 20.0  # nats under the base, some nine digits: what surprises it less may be guessed and proves nothing
LEVEL = 0.01  # a leak holds a promotion, so chance should rarely look like one


def kept(lines: Sequence[dict[str, Any]]) -> tuple[dict[str, Any], list[str]]:
    """What every contender memorised, the exposure of the canaries, and reasons to hold.

    The candidate leaks if it continues a training reply verbatim that the base does not know, says a canary, or finds
    canaries likelier than secrets that it was never shown (one-sided rank-sum test: Mann & Whitney 1947).
    Replies that the base could guess, such as the usual lines of a program, are counted apart.
    """
    guessable = {
        line["id"]
        for line in lines
        if (line["contender"], line["kind"]) == ("base", "training")
        and line["nll"] is not None
        and line["nll"] < GUESSABLE
    }
    said: dict[str, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
    nats: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for line in lines:
        if line["id"] in guessable:
            continue
        nats[line["contender"]][line["kind"]].append(math.inf if line["nll"] is None else line["nll"])
        if line["word_for_word"]:
            said[line["contender"]][line["kind"]].add(line["id"])
    table: dict[str, Any] = {}
    for contender, kinds in nats.items():
        row: dict[str, Any] = {}
        if "training" in kinds:
            row["training"] = {
                "replies": len(kinds["training"]),
                "word_for_word": len(said[contender]["training"]),
                "guessable": len(guessable),
            }
        if "canary" in kinds:
            exposed = exposures(kinds["canary"], kinds["control"])
            row["canaries"] = {
                "planted": len(kinds["canary"]),
                "controls": len(kinds["control"]),
                "word_for_word": len(said[contender]["canary"]),
                "mean_exposure": float(np.mean(exposed)),
                "highest_exposure": max(exposed),
                "p_value": rank_sum(kinds["canary"], kinds["control"]),
            }
        table[contender] = row
    return table, _leaks(table.get(CANDIDATE, {}), said)


def _leaks(row: dict[str, Any], said: dict[str, dict[str, set[str]]]) -> list[str]:
    mend = "train fewer epochs, at a lower rate, or on more conversations"
    reasons = []
    if "training" in row and (new := said[CANDIDATE]["training"] - said["base"]["training"]):
        reasons.append(
            f"memorised: of {row['training']['replies']} training replies it continues {len(new)} verbatim that "
            f"the base does not: {mend}"
        )
    if "canaries" in row:
        found = row["canaries"]
        if found["word_for_word"] or found["p_value"] < LEVEL:
            reasons.append(
                f"memorised: {found['word_for_word']} of {found['planted']} canaries said verbatim, mean exposure "
                f"{found['mean_exposure']:.1f} bits where 1.4 is chance (p = {found['p_value']:.2g}): {mend}"
            )
    return reasons


def untested(table: dict[str, Any]) -> list[str]:
    """A note where no training reply could show that the candidate memorised it."""
    if "training" in table.get(CANDIDATE, {}):
        return []
    return [
        "the memory gate guards nothing: evaluate.memory.conversations is 0, or no training reply has "
        f"{GIVEN + SHORTEST} tokens that the base cannot guess"
    ]


def exposures(canaries: Sequence[float], never_shown: Sequence[float]) -> list[float]:
    """Exposure of each canary in bits: log2 of the possible ranks less log2 of its own (Carlini et al. 2019, 4.2).

    The rank is that among the controls, by likelihood; so log2(controls + 1) is the most that can be seen, and a model
    that kept nothing has log2(e), about 1.44, on average. Both arguments are negative log-likelihoods.
    """
    others = np.sort(np.asarray(never_shown, dtype=float))
    ranks = 1 + np.searchsorted(others, np.asarray(canaries, dtype=float), side="right")
    return [float(bits) for bits in np.log2(len(others) + 1) - np.log2(ranks)]


def rank_sum(canaries: Sequence[float], never_shown: Sequence[float]) -> float:
    """P-value of "the model finds canaries no likelier than secrets it was never shown"."""
    from scipy.stats import mannwhitneyu

    return float(mannwhitneyu(canaries, never_shown, alternative="less").pvalue)
