"""Finding a text again without keeping it: keyed fingerprints, sought in files of every kind that we write.

Three kinds of trace. A window: WINDOW bytes of a text without its ASCII signs and spaces, which JSON, CSV, Markdown
and HTML write alike; it is found within anything. A search computes the rolling hash of every window of a file (Karp
and Rabin 1987, "Efficient randomized pattern-matching algorithms", IBM J. Res. Dev. 31:2) and confirms a match by a
keyed hash. A whole text: of any length, found where a decoded record holds it as a value, and one of fewer than SHORT
bytes only where the value is named like a text. An id: found as a value, and a short one only where it is named so.
"""

import csv
import gzip
import hashlib
import io
import json
import re
import sqlite3
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, closing, nullcontext, suppress
from functools import cached_property, partial
from io import BufferedReader
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from fine_tuning.common.records import read_line

WINDOW = 24
WINDOWS_OF_A_TEXT = 16
NESTED = 8  # JSON texts in JSON texts in …, of which the quick test undoes the escapes
MOST_SHORT = 64  # texts and ids of fewer than LONG bytes in the quick test, each a search of its own
LONG = 15  # bytes: wherever they stand, one of the first eight of them begins an aligned word of eight
SHORT = 8  # bytes of a text or an id that other things may be called as well
FEWEST_BYTES = 5  # different ones in a window: `00000…` is in every binary file
CHUNK = 1 << 16
DOCUMENT = 64 << 20  # bytes of a JSON document of many lines that is decoded as a whole
QUICK = 32 << 20  # bytes of a file for the quick test, which holds it five times
SEEN = 1 << 16  # short values of a file that are remembered
HEADER = 256  # chunks of a file of weights: names, vocabulary and templates; numbers hold no text
TEXT, ID = -1, -2  # in place of a rolling hash
TEXT_NAMES = re.compile(
    "assistant_response|chosen|comment|completion|content|edited|history|input|instruction|output|prompt|question|"
    "reasoning|rejected|reply|response|system|text|title|user_message|value"
)
ID_NAMES = re.compile(r".*ids?|after|cluster|conversation|over|replaces|session|test|train|user|validation|value")
_SIGNS = bytes(byte for byte in range(128) if not chr(byte).isalnum())
_BREAKS = re.compile(r"""[\x00-\x1f"'&<>\\]+""")  # what some formats escape with letters
_ESCAPED = re.compile(rb"\\u[0-9a-fA-F]{4}(?:\\u[0-9a-fA-F]{4})*")  # not `(?:…)+`, of which re finds no prefix
_SLOTS = 20  # bits of the hash in the first, quick test

Value = tuple[str | None, str]
"""(name of the field or column, None for a name itself; what it holds)"""


class Traces:
    """A set of fingerprints: {keyed hash in hex: rolling hash, TEXT or ID}. Without the key it reveals nothing.

    `plain` has, in memory only, the first letters and digits of each: a content without any of them is not decoded.
    Where one is missing, as after a journal was read, every content is decoded.
    """

    def __init__(self, known: dict[str, int], key: bytes = b"", plain: dict[str, bytes] | None = None) -> None:
        self.known, self.key = known, key
        self.plain = {trace: plain[trace] for trace in known if trace in plain} if plain else {}
        self._base = int.from_bytes(hashlib.blake2b(b"base", key=key).digest()[:4]) | 1
        self._hashes = np.fromiter((rolling for rolling in known.values() if rolling >= 0), np.uint32)
        self._quick = np.zeros(1 << _SLOTS, bool)
        self._quick[self._hashes >> np.uint32(32 - _SLOTS)] = True

    @classmethod
    def of(cls, texts: Iterable[str], key: bytes = b"", kind: int | None = TEXT) -> "Traces":
        """The traces of texts or, of the kind ID, of ids: windows, and unless the kind is None each as a value."""
        empty, known, plain = cls({}, key), {}, {}
        for text in filter(str.strip, texts):
            for window in _windows(text):
                known[trace := empty._digest(window)] = int(_rolling(window, empty._base)[0])
                plain[trace] = window
            if kind is not None:
                trace = empty._digest(b"text" + _squeezed(text) if kind == TEXT else b"id" + _utf8(text))
                known[trace], plain[trace] = kind, _utf8(text).translate(None, _SIGNS)[:WINDOW]
        return cls(known, key, plain)

    def __len__(self) -> int:
        return len(self.known)

    def __or__(self, other: "Traces") -> "Traces":
        return Traces(self.known | other.known, self.key, self.plain | other.plain)

    def without(self, others: Collection[str]) -> "Traces":
        """All traces but those."""
        return Traces({key: value for key, value in self.known.items() if key not in others}, self.key, self.plain)

    # -----------------------------------------------------------------------------------------------------------------

    def all_in(self, pieces: Iterable[bytes | list[Value]]) -> set[str]:
        """The traces that occur in a stream of bytes and of decoded values."""
        return set(self._found(pieces))

    def in_bytes(self, data: bytes) -> bool:
        """Whether one of the traces is in the content of a file, as JSON or as it is."""
        return next(self._found(_json_pieces(data.split(b"\n")) if _is_json(data) else [data]), None) is not None

    def in_file(self, path: Path) -> bool:
        """Whether one of the traces is in a file; its compression or container is undone. Raises OSError if the file
        cannot be read, or it is damaged: what it holds cannot be searched."""
        with suppress(Exception):  # every container has its own; what stands before the damage is searched
            if not self._may_be_in(path):
                return False
        try:
            return any(next(self._found(each), None) is not None for each in streams(path))
        except OSError:
            raise
        except Exception as error:
            raise OSError(f"{path} is damaged: {type(error).__name__}") from None

    # -----------------------------------------------------------------------------------------------------------------

    def lines_that_may_hold(self, lines: Iterable[bytes]) -> Iterator[bytes]:
        """Lines of JSON without stretches of them in which none of the traces can be."""
        lines = iter(lines)
        while some := list(islice(lines, 64)):
            if self._may_hold(b"".join(some)):
                yield from some

    def _may_be_in(self, path: Path) -> bool:
        """False of a file in which the search would find nothing; raises if it is damaged."""
        if self._needles is None:
            return True
        with open(path, "rb") as file, ExitStack() as stack:
            start = file.peek(16)[:16]
            if start[:4] == b"PAR1":
                return any(text is None or self._may_hold(text) for text in _parquet_texts(path))
            if start == b"SQLite format 3\0" or is_weights(start):
                return True
            data = stack.enter_context(_unpacked(file)).read(QUICK + 1)
        table = ".csv" in path.suffixes or b"conversation_id," in data[:CHUNK]
        if table:
            data.decode()  # raises of what is not UTF-8: as it is read, other characters take its place
        return len(data) > QUICK or self._may_hold(data, table or _is_json(data))

    def _may_hold(self, data: bytes, decoded: bool = True) -> bool:
        """False where none of the traces is in some text, `decoded` as JSON and JSON within it or not."""
        if self._needles is None:
            return True
        short, long, places = self._needles
        for text in _unescaped_again_and_again(data, decoded):
            if text is None:
                return True
            squeezed = text.translate(None, _SIGNS)
            if any(needle in squeezed for needle in short):
                return True
            if not long:
                continue
            held = np.frombuffer(squeezed, np.uint64, len(squeezed) // 8)
            left = len(squeezed) // 16  # comparisons, beyond which decoding is as fast
            for word in np.flatnonzero(self._quick_words[_slots(held)]) * 8:
                starts = places.get(squeezed[word : word + 8], ())
                if any(squeezed[max(word - at, 0) : word - at + size] in long for at, size in starts):
                    return True
                if (left := left - len(starts)) < 0:
                    return True
        return False

    @cached_property
    def _needles(self) -> tuple[list[bytes], set[bytes], dict[bytes, set[tuple[int, int]]]] | None:
        """(short ones, long ones, {word of long ones: where it begins in one and the size of that}); None if some trace
        has none, or where there are too many short ones."""
        needles = {*self.plain.values()}
        short, long = [n for n in needles if len(n) < LONG], {n for n in needles if len(n) >= LONG}
        if len(self.plain) < len(self.known) or b"" in needles or len(short) > MOST_SHORT:
            return None
        places = defaultdict(set)
        for needle in long:
            for at in range(8):
                places[needle[at : at + 8]].add((at, len(needle)))
        self._quick_words = np.zeros(1 << _SLOTS, bool)
        self._quick_words[_slots(np.frombuffer(b"".join(places), np.uint64))] = True
        return short, long, dict(places)

    # -----------------------------------------------------------------------------------------------------------------

    def _found(self, pieces: Iterable[bytes | list[Value]]) -> Iterator[str]:
        rest, seen = b"", set()
        for piece in pieces if self.known else ():
            if isinstance(piece, list):
                yield from self._values(piece, seen)
                piece = _utf8("\n".join(text for _, text in piece))
            elif b"\\u" in piece:
                piece = _ESCAPED.sub(_of_escape, piece)
            data = rest + bytes(piece).translate(None, _SIGNS)
            yield from self._matches(data)
            rest = data[-(WINDOW - 1) :]

    def _values(self, values: list[Value], seen: set[Value]) -> Iterator[str]:
        """The traces that are values; short ones that were `seen` are passed over, and most are names and roles."""
        if len(seen) > SEEN:
            seen.clear()
        for value in values:
            if value in seen:
                continue
            name, text = value
            if len(text) < WINDOW:
                seen.add(value)
            squeezed = _squeezed(text)
            if len(squeezed) >= SHORT or TEXT_NAMES.fullmatch(name or ""):
                key = self._digest(b"text" + squeezed)
                if self.known.get(key) == TEXT:
                    yield key
            if len(text) <= 512 and (len(text) >= SHORT or ID_NAMES.fullmatch(name or "")):
                yield from self.ids_in(text)

    def ids_in(self, name: str) -> Iterator[str]:
        """The trace of an id, if it is one of these, or that of the conversation of which `ID#1` is a part."""
        for identity in {name, name.rpartition("#")[0] or name} if "#" in name else (name,):
            if self.known.get(key := self._digest(b"id" + _utf8(identity))) == ID:
                yield key

    def _matches(self, data: bytes) -> Iterator[str]:
        if len(data) < WINDOW or not len(self._hashes):
            return
        hashes = _rolling(data, self._base)
        likely = np.flatnonzero(self._quick[hashes >> np.uint32(32 - _SLOTS)])
        for position in likely[np.isin(hashes[likely], self._hashes)]:
            key = self._digest(data[position : position + WINDOW])
            if key in self.known:
                yield key

    def _digest(self, data: bytes) -> str:
        return hashlib.blake2b(data, key=self.key, digest_size=16).hexdigest()


def _slots(words: np.ndarray) -> np.ndarray:
    return (words * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(64 - _SLOTS)


def _unescaped_again_and_again(data: bytes, decoded: bool) -> Iterator[bytes | None]:
    """Data as they are, with what `_found` makes of them, and if they are `decoded` with JSON's escapes undone, until
    there are no more; None where that is not known."""
    yield data
    if b"\\u" in data:
        yield _ESCAPED.sub(_of_escape, data)
    for _ in range(NESTED):
        if not decoded or b"\\" not in data:
            return
        if b"\xff" in data:  # stands for a backslash below; no UTF-8 has it
            break
        before, data = data, data.replace(b"\\\\", b"\xff")
        for letter in (b"n", b"r", b"t", b"b", b"f", b'"', b"/"):
            data = data.replace(b"\\" + letter, b" ")
        if b"\\u" in data:
            data = _ESCAPED.sub(_of_escape, data)
        data = data.replace(b"\xff", b"\\")
        if data == before:
            return
        yield data
    yield None


def _of_escape(match: re.Match[bytes]) -> bytes:
    return _utf8(json.loads(b'"%s"' % match[0]))


def _utf8(text: str) -> bytes:
    return text.encode("utf-8", "replace")


def _squeezed(text: str) -> bytes:
    """Letters and digits of a text; all of a text that has none."""
    return (data := _utf8(text)).translate(None, _SIGNS) or data.strip()


def _windows(text: str) -> Iterator[bytes]:
    """Windows of a text: of the whole, and of stretches that no format escapes, each at both ends and the middle."""
    windows: dict[bytes, None] = {}
    for part in (text, *_BREAKS.split(text)):
        data = _utf8(part).translate(None, _SIGNS)
        for start in {0, (len(data) - WINDOW) // 2, len(data) - WINDOW} if len(data) >= WINDOW else ():
            if len(set(window := data[start : start + WINDOW])) >= FEWEST_BYTES:
                windows[window] = None
        if len(windows) >= WINDOWS_OF_A_TEXT:
            break
    yield from windows


def _rolling(data: bytes, base: int) -> np.ndarray:
    """(len(data) - WINDOW + 1,) uint32: the polynomial hash of each window, modulo 2**32."""
    of_1 = np.frombuffer(data, np.uint8).astype(np.uint32)
    of_2 = _joined(of_1, of_1, 1, base)
    of_4 = _joined(of_2, of_2, 2, base)
    of_8 = _joined(of_4, of_4, 4, base)
    return _joined(_joined(of_8, of_8, 8, base), of_8, 16, base, power=8)


def _joined(left: np.ndarray, right: np.ndarray, width: int, base: int, power: int | None = None) -> np.ndarray:
    """Hashes of windows of `width` bytes and of those that follow them, as hashes of the longer windows."""
    factor = np.uint32(pow(base, power or width, 1 << 32))
    count = len(right) - width
    return left[:count] * factor + right[width:]


# -----------------------------------------------------------------------------
# files


def streams(path: Path) -> Iterator[Iterable[bytes | list[Value]]]:
    """The contents of a file: gzip and zstd unpacked; JSON, CSV, Parquet and SQLite as values; others as bytes."""
    with open(path, "rb") as file:
        start = file.read(16)
    if start[:4] == b"PAR1":
        yield _parquet(path)
    elif start == b"SQLite format 3\0":
        yield _blocks(path)  # pages that are free still hold what was deleted
        yield _sqlite(path)
    elif is_weights(start):
        yield _blocks(path, HEADER)
    else:
        with open(path, "rb") as file, _unpacked(file) as unpacked:
            yield _text(unpacked, path)


def _unpacked(file: BufferedReader) -> AbstractContextManager[Any]:
    """A reader of what is in a file, gzip and zstd undone."""
    start = file.peek(16)
    if start[:2] == b"\x1f\x8b":
        return gzip.GzipFile(fileobj=file)
    if start[:4] == b"\x28\xb5\x2f\xfd":
        import zstandard

        return io.BufferedReader(zstandard.ZstdDecompressor().stream_reader(file, read_across_frames=True))
    return nullcontext(file)


def is_weights(start: bytes) -> bool:
    """Whether the first 16 bytes of a file are those of a GGUF or of safetensors."""
    return start[:4] == b"GGUF" or (start[8:10] == b'{"' and start[5:8] == b"\0\0\0")


def _blocks(path: Path, most: int | None = None) -> Iterator[bytes]:
    with open(path, "rb") as file:
        yield from islice(iter(partial(file.read, CHUNK), b""), most)


def _text(file: Any, path: Path) -> Iterator[bytes | list[Value]]:
    """A file as values if it is JSON, JSON Lines or a table; otherwise as bytes."""
    start = file.peek(CHUNK)
    if _is_json(start):
        yield from _json_pieces(file)
    elif ".csv" in path.suffixes or start.removeprefix(b"\xef\xbb\xbf").startswith(b"conversation_id,"):
        yield from _table(io.TextIOWrapper(file, "utf-8", "replace", newline=""))
    else:
        yield from iter(partial(file.read, CHUNK), b"")


def _is_json(start: bytes) -> bool:
    return start[:CHUNK].lstrip(b"\xef\xbb\xbf \r\n\t")[:1] in (b"{", b"[")


def _json_pieces(lines: Iterable[bytes]) -> Iterator[bytes | list[Value]]:
    """JSON as values, a record a line or one document; what is neither, as bytes."""
    torn: list[bytes] = []
    yield from decoded(lines, torn)
    rest = b"\n".join(torn)
    document = _loads(rest) if len(rest) <= DOCUMENT else None
    yield _walk(document, None) if document else rest


def decoded(lines: Iterable[bytes], torn: list[bytes] | None = None) -> Iterator[bytes | list[Value]]:
    """Lines of JSON as values; another line as bytes, or it goes into `torn`."""
    values: list[Value] = []
    size = 0
    for line in lines:
        record = _loads(line.strip().rstrip(b","))
        if isinstance(record, (dict, list)):
            _walk(record, None, values)
            size += len(line)
        elif torn is None:
            yield line
        else:
            torn.append(line)
        if size > CHUNK:
            yield values
            values, size = [], 0
    if values:
        yield values


def _loads(line: bytes | str) -> Any:
    with suppress(ValueError, RecursionError):
        return orjson.loads(line)
    with suppress(ValueError, RecursionError):
        return read_line(line)
    return None


def _walk(value: Any, name: str | None, values: list[Value] | None = None) -> list[Value]:
    """All texts in a decoded value, JSON within texts decoded as well, and numbers that are ids; added to `values`."""
    values = [] if values is None else values
    if isinstance(value, bytes):
        value = value.decode("utf-8", "replace")
    if isinstance(value, str):
        values.append((name, value))
        if value[:1] in ("{", "[") and isinstance(inner := _loads(value), (dict, list)):
            _walk(inner, name, values)
    elif isinstance(value, dict):
        for key, held in value.items():
            values.append((None, str(key)))
            _walk(held, str(key), values)
    elif isinstance(value, (list, tuple)):
        for held in value:
            _walk(held, name, values)
    elif isinstance(value, int) and name is not None and name.endswith("id"):
        values.append((name, str(value)))
    return values


def _table(file: Iterable[str]) -> Iterator[list[Value]]:
    csv.field_size_limit(1 << 28)
    for row in csv.DictReader(file):
        yield [value for name, cell in row.items() for value in _walk(cell, name)]


def _parquet(path: Path) -> Iterator[list[Value]]:
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(path) as file:
        words = [n for n in file.schema_arrow.names if not _is_numbers(file.schema_arrow.field(n).type)]
        for batch in file.iter_batches(batch_size=1024, columns=words):
            yield [value for name in words for value in _walk(batch[name].to_pylist(), name)]


def _parquet_texts(path: Path) -> Iterator[bytes | None]:
    """The texts of a column and some rows as they lie in memory; None of one that is decoded otherwise."""
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(path) as file:
        fields = [field for field in file.schema_arrow if not _is_numbers(field.type)]
        yield b"\n".join(field.name.encode() for field in fields)
        for batch in file.iter_batches(4096, columns=[field.name for field in fields]):
            for field in fields:
                values, kind = batch[field.name], field.type
                while pyarrow.types.is_list(kind):
                    values, kind = values.values, kind.value_type
                if pyarrow.types.is_string(kind):
                    buffer = values.buffers()[2]
                    yield buffer.to_pybytes() if buffer else b""
                elif not pyarrow.types.is_primitive(kind) or field.name.endswith("id"):
                    yield None


def _is_numbers(kind: Any) -> bool:
    import pyarrow

    return pyarrow.types.is_list(kind) and pyarrow.types.is_primitive(kind.value_type)


def _sqlite(path: Path) -> Iterator[list[Value]]:
    with closing(sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True)) as database:
        database.text_factory = lambda data: data.decode("utf-8", "replace")
        tables = [row[0] for row in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        for table in tables:
            with suppress(sqlite3.OperationalError):  # a virtual table whose module is not here
                rows = database.execute('SELECT * FROM "{}"'.format(table.replace('"', '""')))
                # The value of an MLflow parameter is not a person's text.
                names = [None if column[0] == "value" else column[0] for column in rows.description]
                for row in rows:
                    yield [value for name, cell in zip(names, row, strict=True) for value in _walk(cell, name)]
