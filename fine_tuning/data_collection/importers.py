"""Conversations from elsewhere: files in, conversations out, and a Problem for every record that was not taken.

Containers (JSON Lines, JSON, CSV, Parquet, ChatML text; each also as .gz or .zst) are read record by record; what a
record is stands in `record_formats`.
"""

import csv
import gzip
import io
import json
import math
import os
import re
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO

import zstandard

from fine_tuning.data_collection.conversation import short_hash
from fine_tuning.data_collection.record_formats import NotRecognised, from_chatml, recognise
from fine_tuning.errors import UserError

CHUNK = 1 << 20
csv.field_size_limit(1 << 28)
_SEPARATORS = re.compile(r"[ \t\r\n,]*")


@dataclass(frozen=True)
class Problem:
    """A record that was not taken: `line` counts from 1 (lines, or records where the container has no lines)."""

    line: int
    reason: str


@dataclass(frozen=True)
class Imported:
    """A conversation that was taken, and the format that its record was recognised as."""

    line: int
    format: str
    conversation: dict


def import_file(path: str | Path) -> Iterator[Imported | Problem]:
    """Read any supported file. The same file gives the same conversations with the same ids.

    Raises:
        UserError: the file cannot be opened or is of no known kind.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path} is not a file: check its path")
    started_at = _timestamp(os.stat(path).st_mtime)
    try:
        yield from import_records(_records(path), "import", started_at)
    except (OSError, EOFError, zlib.error, zstandard.ZstdError):
        raise UserError(f"{path} cannot be read to its end, nothing was taken: copy or export it again") from None


def import_records(
    records: Iterable[tuple[int, Any] | Problem], source: str, started_at: str
) -> Iterator[Imported | Problem]:
    """Turn numbered records into conversations; `started_at` is for those that do not say when they began.

    A record without an id of its own gets one from its content and how often that content was there before.
    """
    seen: Counter[str] = Counter()
    for item in records:
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
        yield Imported(line, found.format, _conversation(found, identity, source, started_at))


def _conversation(found: Any, identity: str, source: str, started_at: str) -> dict:
    messages = []
    for index, message in enumerate(found.messages):
        at = _timestamp(message.get("at"))
        kept = {
            "id": message.get("id") or f"{identity}-{index}",
            "role": message["role"],
            "content": message["content"],
        }
        if message.get("model"):
            kept["model"] = message["model"]
        messages.append(kept | ({"at": at} if at else {}))
    feedback = [
        {key: value for key, value in entry.items() if key != "index"}
        | ({"message_id": messages[entry["index"]]["id"]} if "index" in entry else {})
        for entry in found.feedback
    ]
    first = next((m["at"] for m in messages if "at" in m), None)
    return {
        "id": identity,
        "source": found.source or source,
        "started_at": _timestamp(found.started_at) or first or started_at,
        "messages": messages,
        "feedback": feedback,
        "metadata": found.metadata,
    }


def _timestamp(value: Any) -> str | None:
    """Seconds (or milliseconds, nanoseconds) since 1970, or ISO text, as ISO 8601 in UTC; None if it is neither."""
    try:
        if isinstance(value, str):
            moment = datetime.fromisoformat(value)
            moment = moment.replace(tzinfo=moment.tzinfo or UTC)
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            while abs(value) > 1e11:
                value /= 1000
            moment = datetime.fromtimestamp(value, UTC)
        elif isinstance(value, datetime):
            moment = value.replace(tzinfo=value.tzinfo or UTC)
        else:
            return None
        return moment.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    except (ValueError, OverflowError, OSError):
        return None


# -----------------------------------------------------------------------------
# containers


def _records(path: Path) -> Iterator[tuple[int, Any] | Problem]:
    kind = _kind(path)
    if kind == "parquet":
        yield from _parquet_records(path)
        return
    with _opened(path) as file:
        if kind == "csv":
            yield from _csv_records(file, "\t" if ".tsv" in path.suffixes else ",")
        elif kind == "chatml":
            text = file.read().decode("utf-8-sig", "replace")
            yield from enumerate(({"chatml": found["messages"]} for found in from_chatml(text)), start=1)
        elif kind == "json":
            yield from _json_records(file)
        else:
            yield from _json_lines(file)


def _kind(path: Path) -> str:
    """parquet, csv, chatml, json (one document) or jsonl, by name where it says so and by the first bytes."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    with _opened(path) as file:
        head = file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()
    if head.startswith(b"PAR1"):
        return "parquet"
    if any(suffix in (".csv", ".tsv") for suffix in suffixes):
        return "csv"
    if head.startswith(b"<|im_start|>"):
        return "chatml"
    if head.startswith(b"["):
        first_line = head.split(b"\n", 1)[0]
        return "jsonl" if ".jsonl" in suffixes and first_line.rstrip().endswith(b"]") else "json"
    if head.startswith(b"{"):
        return "json" if ".json" in suffixes and not _is_json(head.split(b"\n", 1)[0]) else "jsonl"
    if not head:
        raise UserError(f"{path} is empty: check that it was exported completely")
    if b"," in head.split(b"\n", 1)[0]:
        return "csv"
    raise UserError(
        f"{path} is of no known kind: give JSON, JSON Lines, CSV with a header, Parquet or ChatML text "
        "(see `python -m fine_tuning import --help`)"
    )


def _is_json(text: bytes) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


@contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    with open(path, "rb") as raw:
        magic = raw.read(4)
        raw.seek(0)
        if magic.startswith(b"\x1f\x8b"):
            with gzip.open(raw) as file:
                yield file
        elif magic == b"\x28\xb5\x2f\xfd":
            with zstandard.ZstdDecompressor().stream_reader(raw, read_across_frames=True) as stream:
                yield io.BufferedReader(stream)
        else:
            yield raw


def parse_json(text: bytes | str) -> Any:
    """Strict JSON: NaN, 5,000-digit integers, wrong UTF-8 and too deep nesting are a ValueError."""
    try:
        # json.loads would read bytes as UTF-16 if they look like it
        text = text.decode("utf-8") if isinstance(text, bytes) else text
        return _STRICT.decode(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _finite(number: str) -> float:
    if not math.isfinite(value := float(number)):
        raise ValueError("a number is not JSON")
    return value


_STRICT = json.JSONDecoder(parse_float=_finite, parse_constant=_finite)


def _json_lines(file: BinaryIO) -> Iterator[tuple[int, Any] | Problem]:
    for number, line in enumerate(file, start=1):
        line = line.strip(b" \t\r\n")
        if number == 1:
            line = line.removeprefix(b"\xef\xbb\xbf")
        if not line:
            continue
        try:
            yield number, parse_json(line)
        except UnicodeDecodeError:
            yield Problem(number, "not UTF-8")
        except ValueError:
            yield Problem(number, "not JSON")


def _json_records(file: BinaryIO) -> Iterator[tuple[int, Any] | Problem]:
    """The elements of a JSON array one by one, or the one document that the file is."""
    reader = io.TextIOWrapper(file, encoding="utf-8-sig", errors="strict")
    try:
        buffer = reader.read(CHUNK).lstrip()
        if not buffer.startswith("["):
            yield from _document(buffer + reader.read())
            return
        yield from _array_elements(buffer[1:], reader)
    except UnicodeDecodeError:
        yield Problem(1, "not UTF-8")


def _document(text: str) -> Iterator[tuple[int, Any] | Problem]:
    try:
        document = parse_json(text)
    except ValueError:
        yield Problem(1, "not JSON")
        return
    inner = next(
        (document[k] for k in ("data", "conversations", "items", "chats") if _is_record_list(document, k)), None
    )
    yield from enumerate(inner if inner is not None else [document], start=1)


def _is_record_list(document: Any, key: str) -> bool:
    """Whether the document only wraps a list of records, rather than being one with turns under that key."""
    rows = document.get(key) if isinstance(document, dict) else None
    turns = {"from", "role", "value"}
    return isinstance(rows, list) and bool(rows) and isinstance(rows[0], dict) and not turns & rows[0].keys()


def _array_elements(buffer: str, reader: io.TextIOWrapper) -> Iterator[tuple[int, Any] | Problem]:
    number, position, ended = 0, 0, False
    while True:
        start = _SEPARATORS.match(buffer, position).end()
        if buffer.startswith("]", start):
            return
        try:
            value, position = _STRICT.raw_decode(buffer, start)
            if position == len(buffer) and not ended:
                raise ValueError  # a number may go on in the next chunk
            number += 1
            yield number, value
        except RecursionError:
            yield Problem(number + 1, "nested too deeply; the records after it were not read")
            return
        except ValueError:
            if ended:
                yield Problem(number + 1, "not JSON, or the file ends early; the records after it were not read")
                return
            # As much again as is left over: an element of any length is scanned a few times, not once a chunk.
            more = reader.read(max(len(buffer) - start, CHUNK))
            buffer, position, ended = buffer[start:] + more, 0, not more


def _csv_records(file: BinaryIO, delimiter: str) -> Iterator[tuple[int, Any] | Problem]:
    """Rows by their header; consecutive rows with the same `conversation_id` are one record of several turns."""
    text = io.TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape", newline="")
    rows = csv.DictReader(text, delimiter=delimiter, restkey="", strict=True)
    group: list[dict] = []
    start = 1
    try:
        for row in rows:
            row = {key.strip().lower(): _restore_cell(value) for key, value in row.items() if key and value is not None}
            if any("\udc80" <= c <= "\udcff" for value in row.values() for c in value):
                yield Problem(rows.line_num, "not UTF-8")
                continue
            if group and row.get("conversation_id") and row["conversation_id"] == group[0].get("conversation_id"):
                group.append(row)
                continue
            if group:
                yield start, {"rows": group}
            group, start = [row], rows.line_num
        if group:
            yield start, {"rows": group}
    except csv.Error as error:
        yield Problem(rows.line_num, f"not CSV ({error})")


_NEUTRALISED = re.compile(r"'+[=+\-@\t\r]")


def _restore_cell(value: str) -> str:
    """Take back the apostrophe that the CSV export puts before what a spreadsheet would run as a formula."""
    return value[1:] if _NEUTRALISED.match(value) else value


def _parquet_records(path: Path) -> Iterator[tuple[int, Any] | Problem]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            number = 0
            for batch in file.iter_batches(batch_size=256):
                for row in batch.to_pylist():
                    number += 1
                    yield number, {key: value for key, value in row.items() if value is not None}
    except (pyarrow.ArrowException, OSError):
        raise UserError(f"{path} is no readable Parquet file: export it again") from None
