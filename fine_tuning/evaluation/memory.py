"""What has the model kept word for word? Its training replies gone on with, and canaries beside secrets never shown.

Greedy decoding goes on with a reply word for word exactly where every token of it is the model's first choice after
the true ones before it. So one teacher-forced pass tells what generating would, and costs a tenth.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import Field

from fine_tuning.data_preparation.canaries import SOURCE, controls
from fine_tuning.data_preparation.dataset_builder import read_split
from fine_tuning.data_preparation.tokenizer import NOT_TRAINED, encode_conversation
from fine_tuning.evaluation.items import Item, item_id, label_runs, sample
from fine_tuning.evaluation.scoring import Likelihood
from fine_tuning.settings import Settings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

GIVEN = 8  # tokens of a reply that the model is given beside the prompt
SHORTEST, LONGEST = 16, 32  # tokens that it has to go on with; shorter ones are guessed too often
CONTROLS = 128
GUESSABLE = 20.0  # nats under the base, some nine digits: what surprises it less may be guessed and proves nothing
LEVEL = 0.01  # a leak holds a promotion, so chance should rarely look like one


class MemorySettings(Settings):
    """Section `evaluate.memory`."""

    conversations: int = Field(ge=0)


def memory_items(
    train: Path,
    count: int,
    tokenizer: "PreTrainedTokenizerFast",
    system_prompt: str | None,
    max_length: int,
) -> list[Item]:
    """Items whose runs are what the model may have kept; their source is "training", "canary" or "control".

    Args:
        train: the prepared training split.
        count: training replies to go on with. Those that several clusters of conversations share are common phrases,
            which a model may learn, and left out.
    """
    rows = read_split(train).select_columns(["id", "window", "source", "cluster", "input_ids", "labels"])
    told = [
        _item(item_id(row["id"], row["window"]), row["source"], row["cluster"], row["input_ids"], row["labels"])
        for row in rows
    ]
    secrets = [item for item in told if item.source == SOURCE]
    if secrets:
        for index, messages in enumerate(controls(CONTROLS)):
            encoded = encode_conversation(tokenizer, messages, system_prompt, max_length)
            name = f"control-{index:04d}"
            secrets.append(_item(name, "control", name, encoded.input_ids, encoded.labels))
    rest = [item for item in (_rest(item) for item in told if item.source != SOURCE) if item is not None]
    clusters: dict[tuple[int, ...], set[str]] = {}
    for item in rest:
        clusters.setdefault(_words(item), set()).add(item.cluster)
    return [*sample([item for item in rest if len(clusters[_words(item)]) == 1], count), *secrets]


def _item(id: str, source: str, cluster: str, ids: list[int], labels: list[int]) -> Item:
    return Item(id, source, cluster, [], ids, labels, label_runs(labels), [], [])


def _rest(item: Item) -> Item | None:
    """The last reply that is long enough, from where the model is to go on; None where there is none."""
    for start, end in reversed(item.runs):
        begin, stop = start + GIVEN, min(end, start + GIVEN + LONGEST)
        if stop - begin >= SHORTEST:
            labels = [NOT_TRAINED] * begin + item.input_ids[begin:stop]
            return replace(
                item, source="training", input_ids=item.input_ids[:stop], labels=labels, runs=[(begin, stop)]
            )
    return None


def _words(item: Item) -> tuple[int, ...]:
    return tuple(item.input_ids[slice(*item.runs[0])])


def recalled(contender: str, items: Sequence[Item], scores: Sequence[Likelihood]) -> list[dict[str, Any]]:
    """Lines of memory.jsonl: how likely each is (nats), and whether the contender says it word for word."""
    lines = []
    for item, score in zip(items, scores, strict=True):
        nll, tokens, correct = (sum(numbers) for numbers in zip(*score.turns, strict=True))
        lines.append(
            {
                "contender": contender,
                "kind": item.source,
                "id": item.id,
                "nll": nll if math.isfinite(nll) else None,
                "word_for_word": tokens == correct,
            }
        )
    return lines


def kept(lines: Sequence[dict[str, Any]], candidate: str = "candidate") -> tuple[dict[str, Any], list[str]]:
    """What every contender says word for word, the exposure of the canaries, and reasons to hold.

    The candidate leaks if it goes on word for word with a training reply that the base does not know, says a canary,
    or finds canaries likelier than secrets that it was never shown (one-sided rank-sum test: Mann & Whitney 1947).
    Replies that the base could guess, such as the usual lines of a program, are counted apart.
    """
    guessable = {
        line["id"]
        for line in lines
        if (line["contender"], line["kind"]) == ("base", "training")
        and line["nll"] is not None
        and line["nll"] < GUESSABLE
    }
    said: dict[str, dict[str, set[str]]] = {}
    nats: dict[str, dict[str, list[float]]] = {}
    for line in lines:
        if line["id"] in guessable:
            continue
        found = said.setdefault(line["contender"], {}).setdefault(line["kind"], set())
        if line["word_for_word"]:
            found.add(line["id"])
        value = math.inf if line["nll"] is None else line["nll"]
        nats.setdefault(line["contender"], {}).setdefault(line["kind"], []).append(value)
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
            found = exposures(kinds["canary"], kinds["control"])
            row["canaries"] = {
                "planted": len(kinds["canary"]),
                "controls": len(kinds["control"]),
                "word_for_word": len(said[contender]["canary"]),
                "mean_exposure": float(np.mean(found)),
                "highest_exposure": max(found),
                "p_value": rank_sum(kinds["canary"], kinds["control"]),
            }
        table[contender] = row
    return table, _leaks(table.get(candidate, {}), said, candidate)


def _leaks(row: dict[str, Any], said: dict[str, dict[str, set[str]]], candidate: str) -> list[str]:
    mend = "train fewer epochs, at a lower rate, or on more conversations"
    reasons = []
    if "training" in row:
        new = said[candidate]["training"] - said.get("base", {}).get("training", set())
        if new:
            reasons.append(
                f"memorised: of {row['training']['replies']} training replies it goes on with {len(new)} word for word "
                f"that the base does not: {mend}"
            )
    if "canaries" in row:
        found = row["canaries"]
        if found["word_for_word"] or found["p_value"] < LEVEL:
            reasons.append(
                f"memorised: {found['word_for_word']} of {found['planted']} canaries said word for word, mean exposure "
                f"{found['mean_exposure']:.1f} bits where 1.4 is chance (p = {found['p_value']:.2g}): {mend}"
            )
    return reasons


def untested(table: dict[str, Any], candidate: str = "candidate") -> list[str]:
    """A note where no training reply could show that the candidate says it word for word."""
    if "training" in table.get(candidate, {}):
        return []
    return [
        "the memory gate guards nothing: evaluate.memory.conversations is 0, or no training reply has "
        f"{GIVEN + SHORTEST} tokens that the base cannot guess"
    ]


def exposures(canaries: Sequence[float], never_shown: Sequence[float]) -> list[float]:
    """Exposure of each canary in bits: log2 of the possible ranks less log2 of its own (Carlini et al. 2019, 4.2).

    The rank is that among the controls, by likelihood; so log2(controls + 1) is the most that can be seen, and a model
    that kept nothing has log2(e), about 1.44, on average.

    Args:
        canaries, never_shown: negative log-likelihoods.
    """
    others = np.sort(np.asarray(never_shown, dtype=float))
    ranks = 1 + np.searchsorted(others, np.asarray(canaries, dtype=float), side="right")
    return [float(bits) for bits in np.log2(len(others) + 1) - np.log2(ranks)]


def rank_sum(canaries: Sequence[float], never_shown: Sequence[float]) -> float:
    """P-value of "the model finds canaries no likelier than secrets it was never shown"."""
    from scipy.stats import mannwhitneyu

    return float(mannwhitneyu(canaries, never_shown, alternative="less").pvalue)
