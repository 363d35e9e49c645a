"""Blind votes between two models: kept in the log as preferences, counted here as a win rate with its interval."""

import json
import os
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fine_tuning.common.records import dump_line, read_lines
from fine_tuning.data_collection.conversation_logger import ConversationLogger
from fine_tuning.integration.chat_models import ChatModel, Sampling
from fine_tuning.integration.chat_session import new_conversation_id
from fine_tuning.schema.conversation import now

VOTES = Path(".whetstone/votes.jsonl")
SOURCE = "compare"  # of the conversations that a vote makes
Vote = Literal["first", "second", "tie", "both bad"]


@dataclass(frozen=True)
class Standing:
    """How often `first` won against `second`; the rate is over the votes that decided."""

    first: str
    second: str
    wins: int
    losses: int
    ties: int
    both_bad: int

    @property
    def rate(self) -> float | None:
        """Share of the deciding votes that `first` won, None before the first."""
        decided = self.wins + self.losses
        return self.wins / decided if decided else None

    @property
    def interval(self) -> tuple[float, float] | None:
        """The 95 % score interval of the rate (Wilson 1927, J. Am. Stat. Assoc. 22:209), None before the first."""
        if self.rate is None:
            return None
        from scipy.stats import binomtest  # takes a second

        found = binomtest(self.wins, self.wins + self.losses).proportion_ci(method="wilson")
        return float(found.low), float(found.high)


def record(
    checkout: Path,
    logger: ConversationLogger,
    prompt: str,
    replies: tuple[str, str],
    models: tuple[ChatModel, ChatModel],
    vote: Vote,
    sampling: Sampling,
    by: str | None = None,
) -> None:
    """Count a vote. Where it decides, the exchange is logged with the better reply preferred to the other.

    Raises:
        UserError: the log cannot be written; then nothing is counted.
    """
    if vote in ("first", "second"):
        better = 0 if vote == "first" else 1
        worse = 1 - better
        session = {"session_id": new_conversation_id(), "source": SOURCE, "settings": sampling.model_dump()}
        if by is not None:
            session["user_id"] = by

        def log(index: int, more: dict) -> str:
            about = {"model": models[index].tag, "version": models[index].version, "engine": models[index].engine}
            return logger.log_conversation(prompt, replies[index], session | about | more)

        other = log(worse, {})
        chosen = log(better, {"replaces": other})
        logger.log_preference(chosen, [other], by, conversation_id=session["session_id"])
    path = checkout / VOTES
    path.parent.mkdir(parents=True, exist_ok=True)
    line = dump_line({"at": now(), "first": models[0].label, "second": models[1].label, "vote": vote})
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    try:
        os.write(descriptor, line)
    finally:
        os.close(descriptor)


def read(checkout: Path) -> list[dict]:
    """All votes, the oldest first; a line that a full disk or a kill cut short is passed over."""
    path, found = checkout / VOTES, []
    for _, line in read_lines(path) if path.is_file() else ():
        with suppress(ValueError, AttributeError):
            if {"first", "second", "vote"} <= (vote := json.loads(line)).keys():
                found.append(vote)
    return found


def standing(votes: Iterable[dict], first: str, second: str) -> Standing:
    """The votes between two models, in whichever order they stood."""
    counts = {"first": 0, "second": 0, "tie": 0, "both bad": 0}
    turned = {"first": "second", "second": "first"}
    for vote in votes:
        if (vote["first"], vote["second"]) == (first, second):
            counts[vote["vote"]] += 1
        elif (vote["first"], vote["second"]) == (second, first):
            counts[turned.get(vote["vote"], vote["vote"])] += 1
    return Standing(first, second, counts["first"], counts["second"], counts["tie"], counts["both bad"])


def standings(votes: list[dict]) -> list[Standing]:
    """One standing for each pair that was ever voted on."""
    pairs = dict.fromkeys(tuple(sorted((vote["first"], vote["second"]))) for vote in votes)
    return [standing(votes, first, second) for first, second in pairs]
