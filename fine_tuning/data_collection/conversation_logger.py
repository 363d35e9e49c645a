"""The inbox: an append-only log of what happens in a chat, one JSON event a line.

One `write` of one whole line on an O_APPEND descriptor under `flock`: many threads and processes may log at once.
The file is opened for each event, so that a log that `seal` has renamed away is never written to again.
"""

import errno
import json
import os
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import NoneType
from typing import Any

from filelock import lock_descriptor

from fine_tuning.common.errors import UserError
from fine_tuning.common.names import session_name
from fine_tuning.common.records import dump_line, read_line, read_lines, replacing, sync
from fine_tuning.schema.conversation import fold, now, problem_of

EVENTS = ("exchange", "feedback", "edit", "delete", "restore", "vote")
CHARACTERS_PER_TOKEN = 4  # of English text in byte-pair vocabularies, for replies whose token count nobody logged


class ConversationLogger:
    """Writes and reads one log file.

    Args:
        path: the log; it is made, readable by its owner only, with the first event.
        durable: wait until the disk has each event before returning (`fdatasync`).
        on_event: called with each event that was written.
    """

    def __init__(
        self, path: str | Path, durable: bool = True, on_event: Callable[[dict], object] | None = None
    ) -> None:
        self.path = Path(path)
        self.durable, self._on_event = durable, on_event

    # -------------------------------------------------------------------------
    # writing

    def log_conversation(
        self,
        user_message: str,
        assistant_response: str,
        metadata: dict[str, Any] | None = None,
        *,
        id: str | None = None,
        timestamp: str | None = None,
    ) -> str:
        """Log one exchange and return its id, which is also the id of the assistant's message.

        `metadata["session_id"]` ties exchanges into one conversation and is its id, or its hash is (`session_name`);
        `metadata["model"]` names the author of the reply, `metadata["tokens"]` how many it has. The same `id` again is
        the same exchange and counts once. Raises UserError if the log cannot be written, or an argument is of another
        type; nothing of the event is left in it.
        """
        if not (isinstance(user_message, str) and isinstance(assistant_response, str)):
            raise UserError("the conversation could not be logged: both messages must be texts: send it again as text")
        if not isinstance(metadata or {}, Mapping):
            raise UserError("the conversation could not be logged: its metadata is no dict: give names and values")
        metadata = dict(metadata or {})
        identity = id or uuid.uuid4().hex
        session = metadata.get("session_id")
        named = {"id": identity, "conversation_id": session_name(str(session)) if session else identity}
        said = {"user_message": user_message, "assistant_response": assistant_response}
        self._append({"event": "exchange"} | named | said | {"timestamp": timestamp or now(), "metadata": metadata})
        return identity

    def log_feedback(
        self,
        message_id: str,
        rating: int | None,
        comment: str | None = None,
        by: str | None = None,
        conversation_id: str | None = None,
    ) -> str:
        """Log a judgement of a reply: rating 1 (up), -1 (down) or None (taken back). Returns the event's id."""
        if rating not in (1, -1, None):
            raise ValueError("a rating is 1, -1 or None")
        return self._log("feedback", message_id, conversation_id, rating=rating, comment=comment, by=by)

    def log_preference(
        self, message_id: str, over: list[str], by: str | None = None, conversation_id: str | None = None
    ) -> str:
        """Log that a reply is better than others to the same question. Returns the event's id.

        Replies to one question are exchanges whose `metadata["replaces"]` names the exchange before.
        """
        return self._log("feedback", message_id, conversation_id, over=over, by=by)

    def log_edit(self, message_id: str, content: str, by: str | None = None, conversation_id: str | None = None) -> str:
        """Log a person's edit of a reply. Returns the event's id."""
        return self._log("edit", message_id, conversation_id, content=content, by=by)

    def log_delete(self, conversation_id: str | None = None, message_id: str | None = None) -> str:
        """Log the deletion of a conversation, or of one exchange of it. Returns the event's id."""
        if conversation_id is None and message_id is None:
            raise ValueError("name a conversation or a message to delete")
        return self._log("delete", message_id, conversation_id)

    def undo_delete(self, conversation_id: str) -> bool:
        """Take the deletion of a conversation back, as long as it was not sealed; whether there was one."""

        def keeps(_: bytes, event: dict | None) -> bool:
            return event is None or not (deletes(event) and event["conversation_id"] == conversation_id)

        return rewrite_log(self.path, keeps) > 0

    def log_restore(self, conversation_id: str) -> str:
        """Log that a conversation is to be trained on whatever the filters say of it. Returns the event's id."""
        return self._log("restore", None, conversation_id)

    def _log(self, kind: str, message_id: str | None, conversation_id: str | None, **fields: Any) -> str:
        identity = uuid.uuid4().hex
        event = {"event": kind, "id": identity, "conversation_id": conversation_id, "message_id": message_id, **fields}
        event = {key: value for key, value in event.items() if value is not None or key == "rating"}
        self._append(event | {"timestamp": now()})
        return identity

    def _append(self, event: dict) -> None:
        try:
            event = read_line(json.dumps(event, default=str))  # NaN, which is no JSON, becomes null
            line = dump_line(event)
        except (ValueError, TypeError, RecursionError) as error:
            raise UserError(
                f"the conversation could not be logged: it is no JSON ({type(error).__name__}): give metadata of "
                "texts, numbers and shallow lists, then send it again"
            ) from None
        if not _is_event(event):
            raise UserError(
                f"the {event['event']} could not be logged: ids, times, comments, names and edits are texts: "
                "send them as texts"
            )
        try:
            append_line(self.path, line, self.durable)
        except OSError as error:
            raise UserError(
                f"the conversation could not be logged to {self.path} ({error.strerror}): free some space or change "
                f"its permissions with `chmod u+rw {self.path}`, then send it again"
            ) from None
        if self._on_event is not None:
            self._on_event(event)

    # -------------------------------------------------------------------------
    # reading

    def read_events(self) -> Iterator[dict]:
        """The events of the log in their order; a torn or foreign line is passed over."""
        if self.path.exists():
            yield from (event for _, event in read_log(self.path) if event is not None)

    def read_conversations(self) -> list[dict]:
        """The conversations of the log, deleted ones left out."""
        conversations: dict[str, dict] = {}
        fold(self.read_events(), conversations)
        return [c for c in conversations.values() if c["messages"]]

    def get_conversation_stats(self) -> dict[str, Any]:
        """Counts over the conversations in the log: see `conversation_stats`."""
        return conversation_stats(self.read_conversations())


def conversation_stats(conversations: Iterator[dict] | list[dict]) -> dict[str, Any]:
    """Conversations, exchanges, tokens, per day, per model, mean lengths in characters, share of replies judged.

    Tokens of a reply are those that were logged with it (`metadata["tokens"]`), otherwise a quarter of the characters.
    """
    totals: Counter[str] = Counter()
    days: Counter[str] = Counter()
    models: Counter[str] = Counter()
    for conversation in conversations:
        totals["conversations"] += 1
        days[str(conversation.get("started_at") or "unknown")[:10]] += 1
        if problem_of(conversation):  # of a shard by hand: cleaning drops it
            continue
        feedback = conversation.get("feedback") or []
        totals["judged"] += len({e.get("message_id") for e in feedback})
        for entry in feedback:
            totals[{1: "liked", -1: "disliked"}.get(entry.get("rating"), "unrated")] += 1
            totals["edited"] += bool(entry.get("edited"))
        for message in conversation["messages"]:
            role, length = message["role"], len(message["content"])
            totals[f"{role}_messages"] += 1
            totals[f"{role}_characters"] += length
            tokens = message.get("tokens")
            known = isinstance(tokens, int) and tokens > 0
            totals["tokens"] += tokens if known else -(-length // CHARACTERS_PER_TOKEN)
            if role == "assistant":
                models[str(message.get("model") or "unknown")] += 1
    replies = totals["assistant_messages"]
    return {
        "total_conversations": totals["conversations"],
        "total_exchanges": replies,
        "total_tokens": totals["tokens"],
        "conversations_per_day": dict(sorted(days.items())),
        "exchanges_per_model": dict(sorted(models.items())),
        "average_user_length": _mean(totals["user_characters"], totals["user_messages"]),
        "average_assistant_length": _mean(totals["assistant_characters"], replies),
        **{name: totals[name] for name in ("liked", "disliked", "edited")},
        "feedback_share": _mean(totals["judged"], replies),
    }


def append_line(path: Path, line: bytes, durable: bool = True) -> None:
    """Append a line with its newline to a log, under its lock; what a crash tore off before is set aside. Raises
    OSError if it cannot be written; nothing of it is."""
    with _locked(path) as descriptor:
        _set_torn_tail_aside(descriptor, path)
        _write_whole(descriptor, line, durable)


def read_log(path: str | Path) -> Iterator[tuple[bytes, dict | None]]:
    """(raw line, event) of a log; the event is None where the line is torn or is no event."""
    yield from ((line, read_event(line)) for _, line in read_lines(path))


def deletes(event: dict) -> bool:
    """Whether an event deletes a whole conversation."""
    return event["event"] == "delete" and bool(event.get("conversation_id")) and event.get("message_id") is None


def read_event(line: bytes) -> dict | None:
    """The event of a log's line without its newline; None where it is torn or is no event."""
    try:
        event = read_line(line)
    except (ValueError, RecursionError):
        return None
    return event if _is_event(event) else None


def _is_event(event: Any) -> bool:
    if not isinstance(event, dict) or event.get("event") not in EVENTS or not isinstance(event.get("id"), str):
        return False
    needed = {"exchange": ("user_message", "assistant_response"), "edit": ("content",)}.get(event["event"], ())
    optional = ("conversation_id", "message_id", "timestamp", "comment", "by")
    over = event.get("over") or []
    return (
        all(isinstance(event.get(name), str) for name in needed)
        and all(isinstance(event.get(name), (str, NoneType)) for name in optional)
        and isinstance(event.get("metadata") or {}, dict)
        and event.get("rating") in (1, -1, None)
        and isinstance(over, list)
        and all(isinstance(name, str) for name in over)
    )


def rename_log(path: Path, target: Path) -> bool:
    """Close the log: rename it under its lock, so that no writer is in the middle of it. False if it is empty."""
    if not path.exists():
        return False
    with _locked(path) as descriptor:
        if os.fstat(descriptor).st_size == 0:
            return False
        os.fsync(descriptor)
        target.parent.mkdir(parents=True, exist_ok=True)
        os.rename(path, target)
        sync(path.parent)
        sync(target.parent)
    return True


def rewrite_log(path: Path, keeps: Callable[[bytes, dict | None], bool]) -> int:
    """Replace a log by its lines that `keeps(line, event)`, under its lock. Returns how many lines went."""
    if not path.exists():
        return 0
    with _locked(path) as descriptor:
        lines = list(read_log(path))
        kept = [line for line, event in lines if keeps(line, event)]
        if len(kept) < len(lines):
            with replacing(path) as file:
                os.fchmod(file.fileno(), os.fstat(descriptor).st_mode & 0o777)
                file.writelines(line + b"\n" for line in kept)
            sync(path.parent)
    return len(lines) - len(kept)


@contextmanager
def _locked(path: Path) -> Iterator[int]:
    """Descriptor of the file that is at `path` while its lock is held; opened again if it was renamed meanwhile."""
    while True:
        descriptor = _open(path)
        try:
            lock_descriptor(descriptor, poll_interval=0.001)
            if _is_at(descriptor, path):
                yield descriptor
                return
        finally:
            os.close(descriptor)


def _open(path: Path) -> int:
    flags = os.O_RDWR | os.O_APPEND | os.O_CLOEXEC
    try:
        return os.open(path, flags)
    except FileNotFoundError:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(path, flags | os.O_CREAT, 0o600)
        sync(path.parent)
        return descriptor


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _write_whole(descriptor: int, line: bytes, durable: bool) -> None:
    """Write a line with its newline, and nothing of it where that fails: some disks notice only with the sync."""
    size = os.fstat(descriptor).st_size
    try:
        written = os.write(descriptor, line)
        if written != len(line):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if durable:
            os.fdatasync(descriptor)
    except OSError:
        os.ftruncate(descriptor, size)
        raise


def _set_torn_tail_aside(descriptor: int, path: Path) -> None:
    """Move what a crash left after the last newline to `<path>.torn`, so that it never merges with the next event."""
    size = os.fstat(descriptor).st_size
    if size == 0 or os.pread(descriptor, 1, size - 1) == b"\n":
        return
    start, tail = size, b""
    while start > 0 and b"\n" not in tail:
        step = min(start, 65536)
        start -= step
        tail = os.pread(descriptor, step, start) + tail
    torn = tail[tail.rfind(b"\n") + 1 :]
    aside = os.open(f"{path}.torn", os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        _write_whole(aside, torn + b"\n", durable=True)
    finally:
        os.close(aside)
    os.ftruncate(descriptor, size - len(torn))


def _mean(total: float, count: int) -> float:
    return round(total / count, 4) if count else 0.0
