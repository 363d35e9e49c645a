"""Where a model is better or worse: by source, author of the reference, turn and length."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

LENGTHS = ((32, "up to 32 tokens"), (128, "33 to 128 tokens"), (512, "129 to 512 tokens"))
LATER_TURNS = 4  # turns from here on are one slice


def slices(records: Sequence[dict[str, Any]]) -> dict[str, dict[str, dict[str, dict[str, float]]]]:
    """{dimension: {slice: {contender: {perplexity, token_accuracy, replies, tokens}}}}; dimensions of one slice go."""
    sums: dict[str, dict[str, dict[str, list[float]]]] = {}
    for line in records:
        for dimension, name, turn in _turns(line):
            own = sums.setdefault(dimension, {}).setdefault(name, {}).setdefault(line["contender"], [0.0, 0, 0, 0])
            nll = math.nan if turn["nll"] is None else turn["nll"]
            for index, number in enumerate((nll, turn["tokens"], turn["correct"], 1)):
                own[index] += number
    return {
        dimension: {
            name: {
                contender: {
                    "perplexity": math.exp(min(nll / tokens, 700.0)),
                    "token_accuracy": correct / tokens,
                    "replies": replies,
                    "tokens": tokens,
                }
                for contender, (nll, tokens, correct, replies) in contenders.items()
            }
            for name, contenders in sorted(found.items())
        }
        for dimension, found in sums.items()
        if len(found) > 1
    }


def _turns(line: dict[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    for index, turn in enumerate(line["turns"], start=1):
        yield "author of the reply", turn["author"] if turn["reference"] else f"{turn['author']} (no reference)", turn
        if not turn["reference"]:
            continue
        yield "source", line["source"], turn
        yield "turn", str(index) if index < LATER_TURNS else f"{LATER_TURNS} and later", turn
        yield "length of the reply", _length(turn["tokens"]), turn


def _length(tokens: int) -> str:
    for most, name in LENGTHS:
        if tokens <= most:
            return name
    return f"over {LENGTHS[-1][0]} tokens"
