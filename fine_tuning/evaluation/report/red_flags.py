"""Red flags: what a reader would notice in the replies at once, and averages hide."""

import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from fine_tuning.common.errors import count_of

LENGTHS = (0.5, 2.0)  # times the reference: replies half or twice as long are another kind of reply
SHOWN = 3  # examples of a flag
CHARACTERS = 120  # of an example
# What a language model cannot be or have.
PERSON = re.compile(
    r"\b(?:I am|I'm) (?:(?:a|an|just|only|also) )*(?:human|person|man|woman|boy|girl|mother|father|student|teacher"
    r"|doctor|nurse|lawyer)\b|\bmy (?:wife|husband|girlfriend|boyfriend|kids|children|son|daughter)\b",
    re.IGNORECASE,
)


class Flag(NamedTuple):
    """A sentence, and where it can be seen."""

    what: str
    examples: list[str]


def red_flags(
    comparison: dict[str, Any], evaluation: dict[str, Any], records: Sequence[dict], answers: Sequence[dict]
) -> Iterator[Flag]:
    """What speaks against the candidate whatever its numbers are."""
    candidate, base = evaluation["candidate"], evaluation["base"]
    length = _value(candidate, "length_ratio")
    if length is not None and not LENGTHS[0] <= length <= LENGTHS[1]:
        was = _value(base, "length_ratio")
        than = f", the base's {was:.2g} times" if was is not None else ""
        yield Flag(f"Replies are {length:.2g} times as long as the references{than}.", [])
    slips = {name: list(_slips(name, records, answers)) for name in ("base", "candidate")}
    if found := slips["candidate"]:
        was = len(slips["base"])
        yield Flag(f"Replies that speak as a person: {len(found)} of the candidate, {was} of the base.", found[:SHOWN])
    for baseline, row in comparison["forgetting"].items():
        if lost := row["lost"]:
            yield Flag(
                f"{count_of(len(lost), 'factual answer')} of {row['n']}, right from the {baseline}, went wrong; of "
                f"{row['goldens']} golden ones {len(row['goldens_lost'])}.",
                [", ".join(lost)],
            )
    for metric, what in (
        ("loops", "repeat themselves"),
        ("empty", "are empty"),
        ("control_tokens", "show control tokens"),
    ):
        if share := _value(candidate, metric):
            yield Flag(f"{share:.0%} of the replies {what}, {_value(base, metric) or 0:.0%} of the base's.", [])


def _value(row: dict[str, Any], metric: str) -> float | None:
    return (row.get(metric) or {}).get("value")


def _slips(contender: str, records: Sequence[dict], answers: Sequence[dict]) -> Iterator[str]:
    said = [
        (line["prompt"], line["predictions"]) for line in records if line["contender"] == contender and "prompt" in line
    ]
    said += [(a["prompt"], a["replies"][contender]["text"]) for a in answers if contender in a["replies"]]
    for prompt, reply in said:
        if match := PERSON.search(reply or ""):
            start = max(0, match.start() - CHARACTERS // 3)
            yield f"{prompt[-CHARACTERS:]} → …{reply[start : start + CHARACTERS]}…"
