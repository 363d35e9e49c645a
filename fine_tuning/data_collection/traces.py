"""Finding a text again without keeping it: one-way fingerprints of its words, sought in files of every kind we write.

A trace is a window of WINDOW bytes of letters and single spaces: JSON, CSV, Markdown and HTML write such bytes alike,
and cleaning masks none of them. A search computes the rolling hash of every window of a file (Karp and Rabin 1987,
"Efficient randomized pattern-matching algorithms", IBM J. Res. Dev. 31:2) and confirms a match by its SHA-256.
"""

import gzip
import hashlib
import json
import re
import sqlite3
from collections.abc import Iterable, Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import BinaryIO

import numpy as np

WINDOW = 24
WINDOWS_OF_A_TEXT = 16
CHUNK = 1 << 16
HEADER = 16 << 20  # of a file of weights: names, vocabulary and templates; numbers hold no text
_RUN = re.compile(r"[^\W\d_]+(?: [^\W\d_]+)*")
_BASE = 0x9E3779B1
_SLOTS = 20  # bits of the hash in the first, quick test


class Traces:
    """A set of fingerprints: {SHA-256 in hex: rolling hash}. It cannot be turned back into text."""

    def __init__(self, known: dict[str, int]) -> None:
        self.known = known
        self._hashes = np.fromiter(known.values(), np.uint32, len(known))
        self._quick = np.zeros(1 << _SLOTS, bool)
        self._quick[self._hashes >> np.uint32(32 - _SLOTS)] = True

    @classmethod
    def of(cls, texts: Iterable[str]) -> "Traces":
        """The traces of texts; those with fewer than WINDOW bytes of words in a row leave none."""
        return cls({_sha256(window): int(_rolling(window)[0]) for text in texts for window in _windows(text)})

    @classmethod
    def exactly(cls, strings: Iterable[str]) -> "Traces":
        """The traces of strings such as ids: how each begins."""
        windows = (text.encode("utf-8", "replace")[:WINDOW] for text in strings)
        return cls({_sha256(window): int(_rolling(window)[0]) for window in windows if len(window) == WINDOW})

    def __len__(self) -> int:
        return len(self.known)

    def __or__(self, other: "Traces") -> "Traces":
        return Traces(self.known | other.known)

    def without(self, others: set[str]) -> "Traces":
        """All traces but those."""
        return Traces({key: value for key, value in self.known.items() if key not in others})

    # -----------------------------------------------------------------------------------------------------------------

    def all_in(self, blocks: Iterable[bytes]) -> set[str]:
        """The traces that occur in a stream of bytes."""
        found: set[str] = set()
        rest = b""
        for block in blocks if self.known else ():
            data = rest + bytes(block)
            found.update(self._matches(data))
            rest = data[-(WINDOW - 1) :]
        return found

    def in_bytes(self, data: bytes) -> bool:
        """Whether one of the traces is in the bytes."""
        return next(self._matches(data), None) is not None

    def in_file(self, path: Path) -> bool:
        """Whether one of the traces is in a file; its compression or container is undone.

        Raises:
            OSError: the file cannot be read.
        """
        return any(self._in_stream(stream) for stream in streams(path))

    def _in_stream(self, blocks: Iterable[bytes]) -> bool:
        rest = b""
        for block in blocks if self.known else ():
            data = rest + bytes(block)
            if self.in_bytes(data):
                return True
            rest = data[-(WINDOW - 1) :]
        return False

    def _matches(self, data: bytes) -> Iterator[str]:
        if len(data) < WINDOW or not self.known:
            return
        hashes = _rolling(data)
        likely = np.flatnonzero(self._quick[hashes >> np.uint32(32 - _SLOTS)])
        for position in likely[np.isin(hashes[likely], self._hashes)]:
            key = _sha256(data[position : position + WINDOW])
            if key in self.known:
                yield key


def _windows(text: str) -> Iterator[bytes]:
    """Windows spread over a text: of its first runs of words, the beginning and the middle."""
    windows: dict[bytes, None] = {}
    for run in _RUN.finditer(text):
        letters = run.group().encode("utf-8", "replace")
        for start in (0, (len(letters) - WINDOW) // 2):
            if len(letters) >= WINDOW:
                windows[letters[start : start + WINDOW]] = None
        if not run.group().isascii():  # as JSON writes it in ASCII
            escaped = json.dumps(run.group())[1:-1].encode()
            if len(escaped) >= WINDOW:
                windows[escaped[:WINDOW]] = None
        if len(windows) >= WINDOWS_OF_A_TEXT:
            break
    yield from windows


def _rolling(data: bytes) -> np.ndarray:
    """(len(data) - WINDOW + 1,) uint32: the polynomial hash of each window, modulo 2**32."""
    of_1 = np.frombuffer(data, np.uint8).astype(np.uint32)
    of_2 = _joined(of_1, of_1, 1)
    of_4 = _joined(of_2, of_2, 2)
    of_8 = _joined(of_4, of_4, 4)
    return _joined(_joined(of_8, of_8, 8), of_8, 16, power=8)


def _joined(left: np.ndarray, right: np.ndarray, width: int, power: int | None = None) -> np.ndarray:
    """Hashes of windows of `width` bytes and of those that follow them, as hashes of the longer windows."""
    factor = np.uint32(pow(_BASE, power or width, 1 << 32))
    count = len(right) - width
    return left[:count] * factor + right[width:]


def _sha256(window: bytes) -> str:
    return hashlib.sha256(window).hexdigest()


# -----------------------------------------------------------------------------
# files


def streams(path: Path) -> Iterator[Iterable[bytes]]:
    """The contents of a file as streams of bytes: gzip and zstd unpacked, Parquet and SQLite by their values."""
    with open(path, "rb") as file:
        start = file.read(16)
    if start[:2] == b"\x1f\x8b":
        yield _unpacked(path, gzip.open)
    elif start[:4] == b"\x28\xb5\x2f\xfd":
        import zstandard

        yield _unpacked(path, zstandard.open)
    elif start[:4] == b"PAR1":
        yield _parquet(path)
    elif start == b"SQLite format 3\0":
        yield _blocks(path)  # pages that are free still hold what was deleted
        yield _sqlite(path)
    else:
        yield _blocks(path, HEADER if is_weights(start) else None)


def is_weights(start: bytes) -> bool:
    """Whether the first 16 bytes of a file are those of a GGUF or of safetensors."""
    return start[:4] == b"GGUF" or (start[8:10] == b'{"' and start[5:8] == b"\0\0\0")


def _blocks(path: Path, limit: int | None = None) -> Iterator[bytes]:
    with open(path, "rb") as file:
        yield from _read(file, limit)


def _read(file: BinaryIO, limit: int | None = None) -> Iterator[bytes]:
    size = 0
    while (limit is None or size < limit) and (block := file.read(CHUNK)):
        size += len(block)
        yield block


def _unpacked(path: Path, opened: "type[gzip.GzipFile]") -> Iterator[bytes]:
    with opened(path, "rb") as file:
        yield from _read(file)


def _parquet(path: Path) -> Iterator[bytes]:
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(path) as file:
        for batch in file.iter_batches(batch_size=4096):
            yield from (buffer for column in batch.columns for buffer in column.buffers() if buffer)


def _sqlite(path: Path) -> Iterator[bytes]:
    with closing(sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True)) as database:
        database.text_factory = bytes
        tables = [row[0].decode() for row in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        for table in tables:
            with suppress(sqlite3.DatabaseError):
                name = table.replace('"', '""')
                for row in database.execute(f'SELECT * FROM "{name}"'):
                    yield b"\n".join(value for value in row if isinstance(value, bytes)) + b"\n"
