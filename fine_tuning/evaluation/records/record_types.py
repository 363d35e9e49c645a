"""The records that an evaluation writes: items, likelihoods, replies."""

import itertools
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

CANDIDATE = "candidate"  # name of the contender that was trained last
PERSON = "person"  # author of what no model wrote
EDITED = "edited"  # author of a model's reply with a person's corrections: a preference, and nobody's reference
UNKNOWN = "unknown"  # author of what a model wrote that nobody named
COUNTING = ("perplexity", "token_accuracy")  # metrics that count tokens
_NUMBERED = re.compile(r"(.*)#[0-9]+", re.DOTALL)


@dataclass(frozen=True)
class Item:
    """A held-out conversation, or a window of a long one. `runs` are the ranges [start, end) of the replies in
    `input_ids` that it is scored on; `id` is what `item_id` made, `cluster` is that of the conversation.

    `authors` says who wrote each reply: PERSON, the name of a model, EDITED or UNKNOWN. Likelihood and overlap with a
    model's own words favour that model and its descendants, whether or not somebody liked them: a reply is a reference
    only where `endorsed` names its author.
    """

    id: str
    source: str
    cluster: str
    messages: list[dict[str, Any]]
    input_ids: list[int]
    labels: list[int]
    runs: list[tuple[int, int]]
    authors: list[str]
    texts: list[str]
    endorsed: tuple[str, ...] = (PERSON,)

    @property
    def references(self) -> list[int]:
        """Indices of the replies that a model may be compared with: those of endorsed authors."""
        return [index for index, author in enumerate(self.authors) if author in self.endorsed]

    @property
    def liked(self) -> list[bool]:
        """Whether somebody liked each reply as its author wrote it."""
        replies = labelled_replies(self.messages, len(self.runs))
        liked = [reply.get("rating", 0) > 0 and not reply.get("edited") for reply in replies]
        return [*[False] * (len(self.runs) - len(liked)), *liked]

    @property
    def history(self) -> list[dict[str, Any]]:
        """The messages before the reply that models are asked for, else before the first one."""
        replies = labelled_replies(self.messages, len(self.runs))
        answer = replies[self.asked or 0] if replies else None
        return list(itertools.takewhile(lambda message: message is not answer, self.messages))

    @property
    def question(self) -> str:
        """The last message of a user in the history."""
        return next((message["content"] for message in reversed(self.history) if message["role"] == "user"), "")

    @property
    def asked(self) -> int | None:
        """Index of the reply that models are asked to write themselves: the last reference."""
        return self.references[-1] if self.references else None

    def prompt_ids(self, reply: int) -> list[int]:
        """All before a reply."""
        return self.input_ids[: self.runs[reply][0]]


def item_id(conversation: str, window: int) -> str:
    """Id of a window as an item: that of the conversation for its first one, `ID#1`, `ID#2` and so on for the others.

    A conversation whose own id ends in # and digits is numbered from `ID#0`, so no two windows get the same id.
    """
    return f"{conversation}#{window}" if window or _NUMBERED.fullmatch(conversation) else conversation


def conversation_of(item: str) -> str:
    """Id of the conversation that `item_id` made an item's id of."""
    numbered = _NUMBERED.fullmatch(item)
    return numbered[1] if numbered else item


def labelled_replies(messages: Sequence[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    """The last `count` replies that preparation labelled: those edited by a person, or whole and not disliked."""
    replies = (message for message in messages if message["role"] == "assistant")
    return [
        reply
        for reply in replies
        if reply.get("edited") or (reply.get("rating", 0) >= 0 and not reply.get("incomplete"))
    ][-count:]


Likelihood = list[tuple[float | None, int, int]]
"""How one model finds the replies of one item: for each reply nats, null where they are not finite, its tokens, and how
many of these were its first choice."""


def finite(number: float) -> float | None:
    """The number, or None where it is not finite, which JSON cannot express."""
    return number if math.isfinite(number) else None


@dataclass(frozen=True)
class Reply:
    """What a model wrote. `finished`: it ended by itself, before the cap on tokens."""

    text: str
    tokens: int
    finished: bool


GIVEN = 8  # tokens of a reply that the model is given beside the prompt
SHORTEST, LONGEST = 16, 32  # tokens that it has to continue; shorter ones are guessed too often
PROMPTED, FEW_SHOT = "base_prompted", "base_few_shot"
