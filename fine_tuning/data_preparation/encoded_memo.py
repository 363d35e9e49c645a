"""Windows of conversations that were encoded before, so that a newcomer does not make all others be encoded again."""

import fcntl
import json
import mmap
import os
import time
import uuid
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from fine_tuning.common.columns import stretches
from fine_tuning.common.errors import UserError
from fine_tuning.common.parallel import Map
from fine_tuning.common.project import code_sha256, versions
from fine_tuning.common.records import sync
from fine_tuning.common.results import ABANDONED, make_own_folder, remove, remove_oldest, state_of
from fine_tuning.data_preparation.catalogue import REASONS, LineIndex, Span
from fine_tuning.data_preparation.encodings import FOUND, Encode, Ordered
from fine_tuning.schema.prepared import COLUMNS, PreparedRow, number_array, numbers, row_batch, string_array

if TYPE_CHECKING:
    from pyarrow import RecordBatch

ENCODED, LOCK = "encoded", ".lock"  # the folder in the stage's memo, a file there
SEGMENT_BYTES = 16 << 20
BATCH = 64  # conversations that a process encodes at a time
BLOCK_BYTES = 16 << 20  # of rows that are in memory at a time
_SHIFT, _ROW = 32, (1 << 32) - 1  # a place is the number of a segment, and a row of it


class EncodedMemo:
    """Rows in Arrow files of some megabytes, found by the hashes of the lines that they were made of.

    A context manager: at its end new rows are written, together with what is left of small files and of those that are
    mostly unused: they hold conversations. A file's name has its size and time: one that was changed counts as absent.
    Files are opened when their rows are wanted, and none is removed while another run may want them.

    Args:
        settings: what all results depend on, besides the code and the versions of the packages.
    """

    def __init__(self, folder: Path, settings: Sequence[Any]) -> None:
        made_by = json.dumps([code_sha256("prepare"), versions(), settings])
        self._folder = make_own_folder(folder / sha256(made_by.encode()).hexdigest())
        if (lock := folder / LOCK).is_dir():
            remove(lock)
        self._lock = open(lock, "ab")  # noqa: SIM115
        fcntl.flock(self._lock, fcntl.LOCK_SH)
        files = {path: _opened(path) for path in sorted(self._folder.glob("*.arrow"))}
        self._segments = [segment for segment in files.values() if segment]
        self._old = [path for path, segment in files.items() if not segment]
        self._kept = len(self._segments)  # the others are of this run
        read = [segment.found(number) for number, segment in enumerate(self._segments)]
        self._known = np.concatenate([np.empty(0, FOUND), *(found for found, _ in read)])
        self._index = LineIndex(np.concatenate([np.empty((0, 2), np.uint64), *(lines for _, lines in read)]))
        self._used = np.zeros(len(self._known), bool)
        self._unwritten: list[_Segment] = []

    def find(self, lines: np.ndarray) -> np.ndarray:
        """What there is of lines, (n, 2) hashes: FOUND."""
        found, places = np.full(len(lines), -1).astype(FOUND), self._index.find(lines)
        hit = places >= 0
        found[hit] = self._known[places[hit]]
        self._used[places[hit]] = True
        return found

    def encode(self, encode: Encode, pieces: Iterable[tuple[np.ndarray, list[Span]]], run: Map) -> Iterator[np.ndarray]:
        """FOUND of the conversations of each piece, (hashes of their lines, where they are).

        Whoever encodes a large piece writes its file too. Rows of small ones are collected here.
        """
        for made in run(partial(_encoded, encode=encode, folder=self._folder, large=SEGMENT_BYTES // 2), pieces):
            if isinstance(made, Path):
                if not (segment := _opened(made)):
                    raise UserError(f"{made} was written by another machine and is not here: see docs/scale.md")
                self._segments.append(segment)
            else:
                self._segments.append(segment := _Segment(made))
                self._collect(segment)
            yield segment.found(len(self._segments) - 1)[0]

    def lengths(self, place: int, windows: int) -> tuple[np.ndarray, tuple[int, int]]:
        """Tokens of each window of a conversation, and what of its turns and reply tokens is in none."""
        batch = self._segments[place >> _SHIFT].batch().slice(place & _ROW, windows)
        lost = tuple(int(numbers(batch, name)[0]) for name in ("lost_turns", "lost_reply_tokens"))
        return np.diff(numbers(batch, "input_ids")), lost

    def take(self, chosen: Ordered) -> "TakenRows":
        """The chosen rows in their order. After `flush` another process may read them."""
        used, files = np.unique(chosen.places >> _SHIFT, return_inverse=True)
        rows, sizes = chosen.places & _ROW, np.zeros(len(files), int)
        segments = [self._segments[number] for number in used.tolist()]
        for number, segment in enumerate(segments):
            sizes[files == number] = segment.sizes()[rows[files == number]]
        return TakenRows(chosen, segments, files, rows, np.cumsum(sizes) // BLOCK_BYTES)

    def __enter__(self) -> "EncodedMemo":
        return self

    def __exit__(self, failed: object, *_: object) -> None:
        with self._lock:
            if not failed:
                self._collect_used()
            self.flush()
            if not failed:
                self._remove_unused()

    def _collect_used(self) -> None:
        """Take what is used of small files and of those that are mostly unused."""
        start, changed = 0, len(self._segments) > self._kept
        for segment in self._segments[: self._kept]:
            used = self._used[start : start + segment.conversations]
            start += len(used)
            whole = used.all() and not changed if segment.bytes < SEGMENT_BYTES // 2 else used.mean() >= 0.5
            if not whole:
                self._collect(_Segment(segment.only(used)))
                self._old.append(segment.path)

    def _collect(self, segment: "_Segment") -> None:
        self._unwritten.append(segment)
        if sum(one.bytes for one in self._unwritten) >= SEGMENT_BYTES:
            self.flush()

    def flush(self) -> None:
        """Write the rows that are in memory only."""
        if not sum(segment.rows for segment in self._unwritten):
            return
        path, start = _write(self._folder, [segment.batch() for segment in self._unwritten]), 0
        for segment in self._unwritten:
            segment.move(path, start)
            start += segment.rows
        self._unwritten = []

    def _remove_unused(self) -> None:
        """Remove files that were collected or are damaged, results of other settings but the newest, and what killed
        runs left; where another run works, the next one does."""
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return
        for path in self._old:
            remove(path)
        remove_oldest([path for path in self._folder.parent.iterdir() if path.is_dir() and path != self._folder], 1)
        for path in self._folder.glob(".*"):
            if time.time() - path.stat().st_mtime > ABANDONED:
                remove(path)


def keep_rows_of(folder: Path, lines: np.ndarray) -> None:
    """Remove from the folder of such memos all but the rows of these lines, (n, 2) hashes, once no run reads it."""
    index = LineIndex(lines)
    with open(make_own_folder(folder) / LOCK, "ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for path in (*folder.glob("*/*"), *(path for path in folder.glob("*") if path.suffix)):
            segment = _opened(path)
            stay = index.find(segment.found(0)[1]) >= 0 if segment else np.zeros(1, bool)
            if segment and stay.any() and not stay.all():
                _write(path.parent, [segment.only(stay)])
            if not stay.all():
                remove(path)


@dataclass
class TakenRows:
    """Chosen rows of a memo and where they are: batches in their order, few in memory at a time."""

    chosen: Ordered
    segments: "list[_Segment]"
    files: np.ndarray  # of each row the number of its segment
    rows: np.ndarray  # and where it is there
    blocks: np.ndarray  # of each row the number of its batch

    def __iter__(self) -> "Iterator[RecordBatch]":
        return (self._block(slice(*ends)) for ends in zip(*stretches(self.blocks), strict=True))

    def _block(self, block: slice) -> "RecordBatch":
        import pyarrow

        chosen, files, rows = self.chosen, self.files[block], self.rows[block]
        order = np.argsort(files, kind="stable")
        parts = [
            _take(self.segments[files[order[start]]].batch().select(COLUMNS), rows[order[start:end]])
            for start, end in zip(*stretches(files[order]), strict=True)
        ]
        back = np.empty_like(order)
        back[order] = np.arange(len(order))
        batch = _take(pyarrow.concat_batches(parts), back)
        clusters = zip(batch.column("id").to_pylist(), chosen.clusters[block], strict=True)
        columns = {"window": number_array(chosen.numbers[block]), "order": number_array(chosen.orders[block], 64)}
        columns["cluster"] = string_array([cluster or identity for identity, cluster in clusters])
        for name in ("lost_turns", "lost_reply_tokens", "windows_left_out"):
            changed = {at: counts[name] for at, counts in chosen.counts.items() if block.start <= at < block.stop}
            if changed:
                values = numbers(batch, name).copy()
                values[np.array(list(changed)) - block.start] = list(changed.values())
                columns[name] = number_array(values)
        return _with(batch, columns)


# -----------------------------------------------------------------------------
# segments

_LINE = ("line0", "line1", "line2", "line3")


class _Segment:
    """Rows in memory or in a file, of which nothing is in memory."""

    def __init__(self, batch: "RecordBatch", path: Path | None = None) -> None:
        self._batch, self._start, self.path = None if path else batch, 0, path or Path()
        self.bytes, self.rows = batch.nbytes, batch.num_rows
        self.conversations = int(np.count_nonzero(numbers(batch, "window") == 0))

    def found(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """FOUND of each conversation, where this is the segment of that number, and the hashes of their lines."""
        batch = self.batch()
        first = np.flatnonzero(numbers(batch, "window") == 0)
        found, lines = np.empty(len(first), FOUND), [numbers(batch, name)[first] for name in _LINE]
        found["place"], found["reason"] = first | number << _SHIFT, numbers(batch, "reason")[first]
        found["windows"] = np.diff(first, append=self.rows)
        found["tokens"] = np.diff(numbers(batch, "input_ids")[np.append(first, self.rows)])
        return found, np.stack(lines, axis=1).view(np.uint64)

    def sizes(self) -> np.ndarray:
        """About how many bytes each row takes."""
        batch = self.batch()
        return 8 * np.diff(numbers(batch, "input_ids")) + np.diff(numbers(batch, "messages"))

    def batch(self) -> "RecordBatch":
        """The rows; those of a file are mapped for as long as the batch lives."""
        if self._batch is not None:
            return self._batch
        with open(self.path, "rb") as file:
            return _read(file).slice(self._start, self.rows)

    def only(self, some: np.ndarray) -> "RecordBatch":
        """The rows of some conversations."""
        batch = self.batch()
        windows = np.diff(np.flatnonzero(numbers(batch, "window") == 0), append=self.rows)
        return _take(batch, np.flatnonzero(np.repeat(some, windows)))

    def move(self, path: Path, start: int) -> None:
        """The rows are in a file now."""
        self._batch, self._start, self.path = None, start, path

    def __getstate__(self) -> dict[str, Any]:
        """For another process, which reads the rows of a file."""
        return {"path": self.path, "_start": self._start, "rows": self.rows, "_batch": None}


def _encoded(piece: tuple[np.ndarray, list[Span]], encode: Encode, folder: Path, large: int) -> "RecordBatch | Path":
    """The rows of a piece; of `large` bytes, the file in the folder that they were written into."""
    import pyarrow

    lines, spans = piece
    batches = []
    for start in range(0, len(spans), BATCH):
        encoded = encode(spans[start : start + BATCH])
        rows = [row for one in encoded for row in ([PreparedRow("")] if isinstance(one, str) else one)]
        reasons = [REASONS.index(one) if isinstance(one, str) else 0 for one in encoded]
        sizes = [1 if isinstance(one, str) else len(one) for one in encoded]
        keys = np.repeat(lines[start : start + BATCH], sizes, axis=0).view(np.int32)
        own = dict(zip(_LINE, (number_array(keys[:, column].tobytes()) for column in range(4)), strict=True))
        batches.append(_with(row_batch(rows), own | {"reason": number_array(np.repeat(reasons, sizes))}))
    if sum(batch.nbytes for batch in batches) >= large:
        return _write(folder, batches)
    return pyarrow.concat_batches(batches)


def _write(folder: Path, batches: "list[RecordBatch]") -> Path:
    import pyarrow

    batch, temporary = pyarrow.concat_batches(batches), folder / f".{os.getpid()}.{uuid.uuid4().hex}"
    with pyarrow.OSFile(str(temporary), "wb") as file, pyarrow.ipc.new_file(file, batch.schema) as writer:
        writer.write_batch(batch)
    sync(temporary)
    # Pieces of other machines may have the same size and time.
    path = folder / f"{_state(temporary)}-{uuid.uuid4().hex[:8]}.arrow"
    os.rename(temporary, path)
    return path


def _opened(path: Path) -> _Segment | None:
    """None for one that is damaged, or not there."""
    with suppress(FileNotFoundError, IsADirectoryError, ValueError, LookupError, TypeError), open(path, "rb") as file:
        if path.stem.rpartition("-")[0] == _state(path):
            return _Segment(_read(file), path)  # Arrow's errors are those above
    return None


def _state(path: Path) -> str:
    return "-".join(map(str, state_of(path) or ()))


def _read(file: BinaryIO) -> "RecordBatch":
    import pyarrow

    mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    return pyarrow.ipc.open_file(pyarrow.py_buffer(mapped)).get_batch(0)


def _with(batch: "RecordBatch", columns: dict[str, Any]) -> "RecordBatch":
    import pyarrow

    every = dict(zip(batch.schema.names, batch.columns, strict=True)) | columns
    return pyarrow.RecordBatch.from_arrays(list(every.values()), names=list(every))


def _take(batch: "RecordBatch", rows: np.ndarray) -> "RecordBatch":
    import pyarrow

    rows = np.ascontiguousarray(rows, np.int64)
    return batch.take(pyarrow.Array.from_buffers(pyarrow.int64(), len(rows), [None, pyarrow.py_buffer(rows)]))
