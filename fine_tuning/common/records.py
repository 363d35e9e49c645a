"""JSON and JSON Lines on disk: bytes split on newlines only, files replaced whole or not at all.

An existing output is never opened for writing: it may be a hard link to its object in DVC's cache.
"""

import csv
import io
import json
import math
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

_ENCODER = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":"))


@contextmanager
def replacing(path: str | Path) -> Iterator[BinaryIO]:
    """Open a temporary sibling of `path` for writing and rename it over `path` once it is whole and on disk. Its name
    is used once: threads, and processes of other machines on a shared disk, do not write into each other's."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{uuid.uuid4().hex}.tmp")
    try:
        with open(temporary, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def copy_file(source: Path, target: Path) -> None:
    """Copy content only: DVC's files may be read-only, the copy is not."""
    with open(source, "rb") as file, replacing(target) as copy:
        shutil.copyfileobj(file, copy, 1 << 20)


def write_text(path: str | Path, text: str) -> None:
    """Write UTF-8, with a question mark for a lone surrogate."""
    with replacing(path) as file:
        file.write(text.encode("utf-8", "replace"))


def unlinked(folder: Path) -> Path:
    """Make a folder into which libraries may write in place: what is there is a link to no other file."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.iterdir():
        if path.is_file() and (path.is_symlink() or path.stat().st_nlink > 1):
            copy_file(path, path)
    return folder


def sync(path: Path) -> None:
    """Wait until a file, or renames in a folder, are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def stamp(path: Path) -> tuple[int, int, int] | None:
    """What changes when a file is changed or replaced; None where there is none."""
    try:
        found = os.stat(path)
    except FileNotFoundError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino


def write_json(path: str | Path, value: Any) -> None:
    """Write `value` as indented JSON with sorted keys. NaN and infinities are refused (ValueError)."""
    text = json.dumps(value, ensure_ascii=False, indent=2, sort_keys=True, allow_nan=False)
    with replacing(path) as file:
        file.write(text.encode("utf-8", "backslashreplace") + b"\n")  # of a lone surrogate, JSON's own escape


def read_json(path: str | Path) -> Any:
    return json.loads(Path(path).read_bytes())


def read_object(path: str | Path) -> dict[str, Any]:
    """The JSON object in a file, empty where there is none or it is damaged: for pages, which show what there is."""
    try:
        found = read_json(path)
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


@contextmanager
def updating(path: str | Path) -> Iterator[dict[str, Any]]:
    """The JSON object in a file, written again when the block ends; meanwhile no other thread or process updates it."""
    from filelock import lock_descriptor  # brings asyncio, which takes long for those who only read

    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.with_name(f".{path.name}.lock"), "ab") as lock:
        lock_descriptor(lock.fileno(), poll_interval=0.001)
        value = read_object(path)
        yield value
        write_json(path, value)


def write_csv(path: str | Path, columns: Iterable[str], rows: Iterable[Iterable[Any]]) -> None:
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator="\n").writerows([columns, *rows])
    with replacing(path) as file:
        file.write(text.getvalue().encode())


def csv_pairs(text: str, x: str, y: str) -> list[tuple[float, float]]:
    return [(float(row[x]), float(row[y])) for row in csv.DictReader(io.StringIO(text))]


def write_jsonl(path: str | Path, records: Iterable[dict[str, Any]]) -> int:
    """Write one JSON object a line; returns the number of lines."""
    count = 0
    with replacing(path) as file:
        for record in records:
            file.write(dump_line(record))
            count += 1
    return count


def dump_line(record: dict[str, Any]) -> bytes:
    """One record as a UTF-8 JSON line, newline included. A lone surrogate has no UTF-8: its line is ASCII escapes."""
    try:
        return _ENCODER.encode(record).encode("utf-8") + b"\n"
    except UnicodeEncodeError:
        return json.dumps(record, allow_nan=False, separators=(",", ":")).encode("ascii") + b"\n"


def read_lines(path: str | Path) -> Iterator[tuple[int, bytes]]:
    """Yield (line number from 1, raw line without its newline). Only `\\n` ends a line: U+2028 does not."""
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            yield number, line.rstrip(b"\n")


def line_ranges(path: str | Path, size: int) -> Iterator[tuple[int, int]]:
    """Ranges [start, end) of a file's bytes: whole lines, `size` bytes and what is left of the last line."""
    start, total = 0, os.path.getsize(path)
    with open(path, "rb") as file:
        while start < total:
            file.seek(min(start + size, total) - 1)
            while (block := file.readline(1 << 20)) and not block.endswith(b"\n"):
                pass
            yield start, file.tell()
            start = file.tell()


def read_line(line: bytes | str) -> Any:
    """The JSON of a line as Python writes it too: NaN, infinities and what no float can hold, no JSON, become null; a
    byte order mark is passed over. ValueError, RecursionError: it is none."""
    return _LENIENT.decode(line.decode("utf-8-sig") if isinstance(line, bytes) else line)


def _finite_or_null(number: str) -> float | None:
    return value if math.isfinite(value := float(number)) else None


_LENIENT = json.JSONDecoder(parse_float=_finite_or_null, parse_constant=lambda _: None)


def _finite(number: str) -> float:
    if not math.isfinite(value := float(number)):
        raise ValueError("a number is not JSON")
    return value


STRICT_JSON = json.JSONDecoder(parse_float=_finite, parse_constant=_finite)  # no NaN, and nothing beyond a float


def read_jsonl(path: str | Path) -> Iterator[dict[str, Any]]:
    """Yield the records of a file that this project wrote itself; foreign files go through the importers."""
    for _, line in read_lines(path):
        if line:
            yield json.loads(line)
