"""Blind votes between two models: kept in the log as preferences, counted here as a win rate with its interval."""

import json
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Literal

from fine_tuning.common.records import dump_line, read_lines
from fine_tuning.data_collection.conversation_logger import ConversationLogger, append_line
from fine_tuning.evaluation.verdict.win_rate import WinRate
from fine_tuning.integration.chat_models import ChatModel, Sampling
from fine_tuning.integration.chat_session import new_conversation_id
from fine_tuning.schema.conversation import now

VOTES = Path(".whetstone/votes.jsonl")
SOURCE = "compare"  # of the conversations that a vote makes
Vote = Literal["first", "second", "tie", "both bad"]


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
    """Count a vote. Where it decides, the exchange is logged with the better reply preferred to the other. Raises
    UserError if the log cannot be written; then nothing is counted."""
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
    line = dump_line({"at": now(), "first": models[0].label, "second": models[1].label, "vote": vote})
    append_line(checkout / VOTES, line)


def read(checkout: Path) -> list[dict]:
    """All votes, the oldest first; a line that a full disk or a kill cut short is passed over."""
    path, found = checkout / VOTES, []
    for _, line in read_lines(path) if path.is_file() else ():
        with suppress(ValueError, AttributeError):
            if {"first", "second", "vote"} <= (vote := json.loads(line)).keys():
                found.append(vote)
    return found


def standings(votes: Iterable[dict]) -> list[tuple[str, str, WinRate]]:
    """(one, other, how often one was preferred, ties one half) for each pair, in whichever order they stood."""
    values: dict[tuple[str, str], list[float]] = {}
    for vote in votes:
        one, other = sorted((vote["first"], vote["second"]))
        value = {"first": 1.0, "second": 0.0}.get(vote["vote"], 0.5)
        values.setdefault((one, other), []).append(value if one == vote["first"] else 1 - value)
    return [(one, other, WinRate.of(found)) for (one, other), found in values.items()]
