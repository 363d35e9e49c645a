"""Conversations from elsewhere: files in, conversations out, and a Problem for every record that was not taken.

`importing.containers` reads a file record by record; `importing.record_formats` knows what a record is.
"""

import math
import os
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import zstandard

from fine_tuning.common.errors import UserError
from fine_tuning.data_collection.importing.containers import is_database, records_in
from fine_tuning.data_collection.importing.databases import last_change
from fine_tuning.data_collection.importing.pieces import Found, NotRecognised, Problem
from fine_tuning.data_collection.importing.record_formats import gathered, recognise
from fine_tuning.schema.conversation import short_hash, time_stamp, versions_of

# how the names of files end that may hold conversations, in a folder of other files
_ENDS = (".json", ".jsonl", ".ndjson", ".gz", ".zst", ".csv", ".tsv", ".parquet", ".db")


@dataclass(frozen=True)
class Imported:
    """A conversation that was taken, and the format that its record was recognised as.

    `left_out` says what of the record could not be kept. `judges` is the message that a judgement is about where the
    record is one: what it has of the chat may be older than what is known.
    """

    line: int
    format: str
    conversation: dict
    left_out: tuple[str, ...] = ()
    judges: str | None = None


def import_file(path: str | Path, model: str | None = None, since: float = 0.0) -> Iterator[Imported | Problem]:
    """Read any supported file. The same file gives the same conversations with the same ids.

    Args:
        model: who wrote the replies for which the file names no model.
        since: of a database, only what changed then or later; see `importing.databases`.

    Raises:
        UserError: the file cannot be opened or is of no known kind.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path} is not a file: check its path")
    started_at = _timestamp(os.stat(path).st_mtime)
    try:
        yield from import_records(records_in(path, since), "import", started_at, model)
    except (OSError, EOFError, zlib.error, zstandard.ZstdError):
        raise UserError(f"{path} cannot be read to its end, nothing was taken: copy or export it again") from None


def files_in(path: Path) -> list[Path]:
    """The files of a folder that may hold conversations, in their order; a path that is no folder itself."""
    found = sorted(p for p in path.rglob("*") if p.name.endswith(_ENDS) and p.is_file()) if path.is_dir() else [path]
    return [file for file in found if file.name != "thread.json" or not (file.parent / "messages.jsonl").exists()]


def state_of(path: Path) -> dict[str, float]:
    """What tells, when it is taken before a file is read, whether the file has changed since; of a database `since`."""
    if not path.is_file():
        return {}
    status = path.stat()
    if is_database(path):
        return {"since": last_change(path)}
    return {"bytes": status.st_size, "modified": status.st_mtime_ns}


def import_records(
    records: Iterable[tuple[int, Any] | Problem], source: str, started_at: str, model: str | None = None
) -> Iterator[Imported | Problem]:
    """Turn numbered records into conversations; `started_at` is for those that do not say when they began, `model` for
    replies that name none.

    A record without an id of its own gets one from its content and how often that content was there before.
    """
    seen: Counter[str] = Counter()
    for item in gathered(records):
        if isinstance(item, Problem):
            yield item
            continue
        line, record = item
        try:
            found = recognise(record)
        except NotRecognised as problem:
            yield Problem(line, str(problem))
            continue
        except RecursionError:
            yield Problem(line, "nested too deeply")
            continue
        content = short_hash([[m["role"], m["content"]] for m in found.messages])
        identity = found.id or short_hash([content, seen[content]])
        seen[content] += 1
        for reply in found.messages if model else ():
            for version in versions_of(reply) if reply["role"] == "assistant" else ():
                version["model"] = version.get("model") or model
        conversation = _conversation(found, identity, source, started_at)
        yield Imported(line, found.format, conversation, tuple(found.left_out), found.judges)


def _conversation(found: Found, identity: str, source: str, started_at: str) -> dict:
    messages = [_kept(message, f"{identity}-{index}") for index, message in enumerate(found.messages)]
    feedback = [_pointed(entry, messages) for entry in found.feedback]
    first = next((m["at"] for m in messages if "at" in m), None)
    return {
        "id": identity,
        "source": found.source or source,
        "started_at": _timestamp(found.started_at) or first or started_at,
        "messages": messages,
        "feedback": feedback,
        "metadata": found.metadata,
    } | ({"restored": True} if found.restored else {})


def _kept(message: dict, name: str) -> dict:
    """A message in the form of the record, with an id of its own or this one."""
    kept = {"id": message.get("id") or name, "role": message["role"], "content": message["content"]}
    kept |= {key: message[key] for key in ("model", "version", "incomplete", "reasoning", "gap") if message.get(key)}
    if message.get("weight") == 0:
        kept["weight"] = 0
    if others := message.get("alternatives"):
        kept["alternatives"] = [_kept(o, f"{kept['id']}-other-{n}") for n, o in enumerate(others, start=1)]
    return kept | ({"at": at} if (at := _timestamp(message.get("at"))) else {})


def _pointed(entry: dict, messages: list[dict]) -> dict:
    """A feedback entry that names its message, and those that it prefers it to, by their ids."""
    if "index" not in entry:
        return entry
    message = messages[entry["index"]]
    named = {key: value for key, value in entry.items() if key != "index"} | {"message_id": message["id"]}
    return named | ({"over": [other["id"] for other in message["alternatives"]]} if entry.get("over") else {})


def _timestamp(value: Any) -> str | None:
    """Seconds (or milliseconds, nanoseconds) since 1970, or ISO text, as ISO 8601 in UTC; None if it is neither."""
    try:
        if isinstance(value, str):
            moment = datetime.fromisoformat(value)
            moment = moment.replace(tzinfo=moment.tzinfo or UTC)
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            while 1e11 < abs(value) < math.inf:
                value /= 1000
            moment = datetime.fromtimestamp(value, UTC)
        elif isinstance(value, datetime):
            moment = value.replace(tzinfo=value.tzinfo or UTC)
        else:
            return None
        return time_stamp(moment)
    except (ValueError, OverflowError, OSError):
        return None
