"""Containers, read record by record: JSON Lines, JSON, CSV, Parquet, ChatML text, each also as .gz or .zst; SQLite."""

import codecs
import csv
import gzip
import io
import json
import math
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import NoneType
from typing import Any, BinaryIO

import zstandard

from fine_tuning.common.errors import UserError
from fine_tuning.common.records import STRICT_JSON
from fine_tuning.data_collection.importing.databases import records_in_database
from fine_tuning.data_collection.importing.pieces import ROLE_NAMES, Problem
from fine_tuning.data_collection.importing.record_formats import PAIRS, CsvRows, from_chatml

CHUNK = 1 << 20
LONGEST_LINE = 64 << 20
LARGEST = 256 << 20  # bytes or characters of one record, or of a document that is read whole
MOST_EXPANSION = 100  # times its size that a compressed file beyond LARGEST may have; conversations have 5 to 20
MOST_TURNS = 10_000  # of one conversation that stands alone in a file
csv.field_size_limit(1 << 28)
# of a message as OpenAI's API takes and gives it
_API_KEYS = frozenset(
    ("role", "content", "name", "tool_calls", "tool_call_id", "function_call", "refusal", "annotations", "audio")
)
_SEPARATORS = re.compile(r"[ \t\r\n,]*")


def records_in(path: Path, since: float = 0.0) -> Iterator[tuple[int, Any] | Problem]:
    """The records of a file, each with its line, counted from 1 (or its number where the file has no lines). UserError:
    the file is of no known kind."""
    kind = _kind(path)
    if kind in ("parquet", "sqlite"):
        yield from _parquet_records(path) if kind == "parquet" else records_in_database(path, since)
        return
    with _opened(path) as file:
        if kind == "csv":
            yield from _csv_records(file)
        elif kind == "chatml":
            try:
                text = _at_most(file.read).decode("utf-8-sig")
            except UnicodeDecodeError:
                yield Problem(1, "not UTF-8: convert the file, such as with `iconv -f latin1 -t utf-8`")
                return
            yield from enumerate(({"chatml": turns} for turns in from_chatml(text)), start=1)
        elif kind == "json":
            yield from _json_records(file)
        else:
            yield from _json_lines(file)


def _kind(path: Path) -> str:
    """parquet, sqlite, csv, chatml, json (one document) or jsonl, by name where it says so and by the first bytes."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    lines = any(suffix in (".jsonl", ".ndjson") for suffix in suffixes)
    with _opened(path) as file:
        head = file.peek(4)[:4]
        first, second = _first_lines(file)
    if head.startswith(b"PAR1"):
        return "parquet"
    if is_database(path):
        return "sqlite"
    if any(suffix in (".csv", ".tsv") for suffix in suffixes):
        return "csv"
    if not first:
        raise UserError(f"{path} is empty: check that it was exported completely")
    if first.startswith(b"<|im_start|>"):
        return "chatml"
    if first.startswith(b"["):
        return "jsonl" if lines and first.endswith(b"]") else "json"
    if first.startswith(b"{"):
        return "jsonl" if lines or _is_json(second) or (second and _is_json(first)) else "json"
    if head.startswith(b"PK\x03\x04"):
        raise UserError(f"{path} is a zip archive: unpack it with `unzip {path}` and import the files in it")
    if _COLUMNS & {cell.strip(' "').lower() for cell in re.split("[,;\t|]", first.decode("utf-8", "replace"))}:
        return "csv"
    raise UserError(
        f"{path} is of no known kind: give JSON, JSON Lines, CSV with a header, Parquet or ChatML text "
        "(see `python -m fine_tuning import --help`)"
    )


def is_database(path: Path) -> bool:
    with open(path, "rb") as file:
        return file.read(16) == b"SQLite format 3\0"


_COLUMNS = {"role", "content", "messages", "conversations", "instruction", "output", *sum(PAIRS, ())}


def _first_lines(file: BinaryIO) -> tuple[bytes, bytes]:
    """The first two lines that are not empty, without the byte order mark; of very long ones the start."""
    found: list[bytes] = []
    while len(found) < 2 and (line := file.readline(LONGEST_LINE)):
        if line := line.removeprefix(b"\xef\xbb\xbf").strip():
            found.append(line)
    return (*found, b"", b"")[:2]


def _is_json(text: bytes) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        return False


@contextmanager
def _opened(path: Path) -> Iterator[io.BufferedReader]:
    """The bytes of a file, decompressed; text in UTF-16, as Windows programs write it, as UTF-8."""
    with open(path, "rb") as raw:
        magic = raw.peek(4)[:4]
        if magic.startswith(b"\x1f\x8b"):
            unpacked = iter(partial(gzip.GzipFile(fileobj=raw).read, CHUNK), b"")
            file = io.BufferedReader(_Pieces(_no_bomb(unpacked, raw)))
        elif magic == b"\x28\xb5\x2f\xfd":
            file = io.BufferedReader(_Pieces(_no_bomb(_zstd_pieces(raw), raw)))
        else:
            file = raw
        if file.peek(2)[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
            text = io.TextIOWrapper(file, encoding="utf-16", errors="replace", newline="")
            file = io.BufferedReader(_Pieces(piece.encode() for piece in iter(partial(text.read, CHUNK), "")))
        yield file


def _zstd_pieces(file: BinaryIO) -> Iterator[bytes]:
    """The content of a file of zstd frames. Unlike zstandard's own reader it notices that the last one is cut off."""
    frame, packed = zstandard.ZstdDecompressor().decompressobj(), b""
    while packed := packed or file.read(1024):  # at most 32 MiB: 4 bytes are a block, and a block is up to 128 KiB
        if frame.eof:
            frame = zstandard.ZstdDecompressor().decompressobj()
        yield frame.decompress(packed)
        packed = frame.unused_data if frame.eof else b""
    if not frame.eof:
        raise EOFError("the last frame is cut off")


def _no_bomb(unpacked: Iterator[bytes], packed: BinaryIO) -> Iterator[bytes]:
    """The same pieces, unless a file becomes far larger than an export of conversations can."""
    size = 0
    for piece in unpacked:
        size += len(piece)
        if size > max(LARGEST, MOST_EXPANSION * packed.tell()):
            raise UserError(
                f"{packed.name} unpacks to over {MOST_EXPANSION} times its size: unpack it, import the result"
            )
        yield piece


def _at_most(read: Callable[[int], Any]) -> Any:
    """What `read` returns for a line or for all the rest, refused where it would fill the memory."""
    if len(found := read(LARGEST + 1)) > LARGEST:
        raise UserError(f"the file holds over {LARGEST >> 20} MiB in one piece: write one conversation a line")
    return found


class _Pieces(io.RawIOBase):
    """A file of the bytes that come piece by piece."""

    def __init__(self, pieces: Iterator[bytes]) -> None:
        self._pieces, self._rest = pieces, b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._rest:
            piece = next(self._pieces, None)
            if piece is None:
                return 0
            self._rest = memoryview(piece)
        count = min(len(buffer), len(self._rest))
        buffer[:count], self._rest = self._rest[:count], self._rest[count:]
        return count


def parse_json(text: bytes | str) -> Any:
    """Strict JSON: NaN, 5,000-digit integers, wrong UTF-8 and too deep nesting are a ValueError."""
    try:
        # json.loads would read bytes as UTF-16 if they look like it
        text = text.decode("utf-8") if isinstance(text, bytes) else text
        return STRICT_JSON.decode(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _json_lines(file: BinaryIO) -> Iterator[tuple[int, Any] | Problem]:
    for number, line in enumerate(iter(partial(_at_most, file.readline), b""), start=1):
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
            yield from _document(buffer + _at_most(reader.read))
            return
        yield from _one_conversation(_array_elements(buffer[1:], reader))
    except UnicodeDecodeError:
        yield Problem(1, "not UTF-8")


def _one_conversation(elements: Iterator[tuple[int, Any] | Problem]) -> Iterator[tuple[int, Any] | Problem]:
    """The elements of an array; where they are nothing but turns, as an API takes them, one record of them all.

    Turns that say more, such as whose they are, stay apart, and so do those of several chats, each with its system
    message: nobody knows which belong together.
    """
    held: list[Any] = []
    kinds: set[str | None] = set()
    for item in elements:
        held.append(item)
        kinds.add(None if isinstance(item, Problem) else _kind_of_turn(item[1], first=len(held) == 1))
        if None in kinds or len(kinds) > 1 or len(held) > MOST_TURNS:
            yield from held
            yield from elements
            return
    for kind in kinds:
        yield 1, {kind: [turn for _, turn in held]}


def _kind_of_turn(value: Any, first: bool) -> str | None:
    """Under which key a record holds such turns; None for what is none. A system message is one where it is first."""
    keys = value.keys() if isinstance(value, dict) else set()
    if keys == {"from", "value"}:
        kind, role = "conversations", value["from"]
    elif {"role", "content"} <= keys <= _API_KEYS:
        kind, role = "messages", value["role"]
    else:
        return None
    name = ROLE_NAMES.get(role.strip().lower()) if isinstance(role, str) else None
    return kind if name is not None and (first or name != "system") else None


def _document(text: str) -> Iterator[tuple[int, Any] | Problem]:
    try:
        document = parse_json(text)
    except ValueError:
        yield Problem(1, "not JSON")
        return
    records = [document]
    for key in ("chats", "items", "conversations", "data") if isinstance(document, dict) else ():
        rows = document.get(key)
        first = rows[0] if isinstance(rows, list) and rows else None
        # A list of turns is part of a record; the document only wraps one of records.
        if isinstance(first, dict) and not {"from", "role", "value"} & first.keys():
            records = rows
    yield from enumerate(records, start=1)


def _array_elements(buffer: str, reader: io.TextIOWrapper) -> Iterator[tuple[int, Any] | Problem]:
    number, position, ended = 0, 0, False
    while True:
        start = _SEPARATORS.match(buffer, position).end()
        if buffer.startswith("]", start):
            if (buffer[start + 1 :] + reader.read(CHUNK)).strip():
                yield Problem(number + 1, "text after the end of the array, which was not read")
            return
        try:
            value, position = STRICT_JSON.raw_decode(buffer, start)
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
            try:
                more = reader.read(max(len(buffer) - start, CHUNK)) if len(buffer) <= LARGEST else _at_most(reader.read)
            except UnicodeDecodeError:
                yield Problem(number + 1, "not UTF-8 here or further on; the records after it were not read")
                return
            buffer, position, ended = buffer[start:] + more, 0, not more


def _csv_records(file: BinaryIO) -> Iterator[tuple[int, Any] | Problem]:
    """Rows by their header; consecutive rows of one conversation are one record of several turns."""
    group: list[dict] = []
    start, gap = 1, False
    known: set[str] = set()
    for item in _csv_rows(file):
        if isinstance(item, Problem):
            yield item
            gap = True
            continue
        (line, row), lost, gap = item, gap, False
        if group and _goes_on(row, group[0]):
            group.append(row | ({"gap": True} if lost else {}))
            continue
        if group:
            yield start, CsvRows(group)
            group = []
        if (name := row.get("conversation_id")) and {"role", "content"} <= row.keys():
            if name in known:
                yield Problem(line, "its conversation began in rows further up: sort the rows by conversation_id")
                continue
            known.add(name)
        group, start = [row], line
    if group:
        yield start, CsvRows(group)


def _goes_on(row: dict, first: dict) -> bool:
    """Whether a row belongs to the conversation before it. Messages without a conversation_id are all one."""
    name = row.get("conversation_id")
    if not name and {"role", "content"} <= row.keys():
        return not first.get("conversation_id") and row["role"].strip().lower() != "system"
    return bool(name) and name == first.get("conversation_id")


def _csv_rows(file: BinaryIO) -> Iterator[tuple[int, dict] | Problem]:
    """(line on which it begins, {column in lower case: cell}) of every row."""
    text = io.TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape", newline="")
    header = text.readline(CHUNK)
    delimiter = max(",;\t|", key=re.sub('"[^"]*"', "", header).count)
    rows = csv.reader(iter(partial(_at_most, text.readline), ""), delimiter=delimiter, strict=True)
    names = (cell.strip().lower() for cell in next(csv.reader([header], delimiter=delimiter), []))
    columns = [_CONVERSATION.get(name, name) for name in names]
    while True:
        line = rows.line_num + 2
        try:
            cells = next(rows, None)
        except csv.Error as error:
            yield Problem(line, f"not CSV ({error})")
            continue
        if cells is None:
            return
        if any("\udc80" <= c <= "\udcff" for cell in cells for c in cell):
            yield Problem(line, "not UTF-8")
        elif any(cells[len(columns) :]):  # a text with a delimiter in it that nobody quoted
            yield Problem(line, f"{len(cells)} cells under {len(columns)} columns")
        elif any(cells):
            yield line, {name: _restore_cell(cell) for name, cell in zip(columns, cells, strict=False) if name}


_CONVERSATION = dict.fromkeys(("session_id", "thread_id", "chat_id"), "conversation_id")


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
                for place in range(len(batch)):
                    number += 1
                    try:
                        (row,) = batch.slice(place, 1).to_pylist()
                    except (ValueError, OverflowError):
                        yield Problem(number, "a value is not UTF-8, or a time is out of range")
                        continue
                    yield number, {key: _as_json(value) for key, value in row.items() if value is not None}
    except (pyarrow.ArrowException, OSError):
        raise UserError(f"{path} is no readable Parquet file: export it again") from None


def _as_json(value: Any) -> Any:
    """A cell in the types of JSON: times and decimals as text; None for bytes that are no text and for NaN."""
    if isinstance(value, dict):
        return {str(key): _as_json(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_as_json(inner) for inner in value]
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError:
            return None
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if isinstance(value, (str, int, float, NoneType)) else str(value)
