"""What concerns all shards together: newest versions, the best of exact duplicates, near-duplicates, shares.

It decides over the index of what was cleaned piece by piece, in order. Tables, signatures and what was written live in
a folder that stays. When more pieces come behind those that it covers, and nothing in them supersedes or outranks what
was decided, the next run goes on from there; otherwise it begins anew. The result is the same. Memory does not grow
with the number of conversations, but for eight bytes each.
"""

import os
import shutil
import sqlite3
import tempfile
from array import array
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from functools import partial
from heapq import nlargest
from io import FileIO
from itertools import groupby, islice
from operator import attrgetter
from pathlib import Path
from typing import Any, NamedTuple

import orjson
from filelock import lock_descriptor

from fine_tuning.common.records import read_json, read_object, replacing, sync, write_json
from fine_tuning.common.results import link, state_of
from fine_tuning.data_collection.cleaning.near_duplicates import SIGNATURE_BYTES, Clusters, index_key
from fine_tuning.data_collection.data_cleaner import CleanSettings, add_judgements
from fine_tuning.schema.conversation import Problem, from_line, to_line

BATCH = 256  # conversations that are decided at a time
LARGEST = 5  # clusters whose sizes are reported


class CleanPiece(NamedTuple):
    """Output of the first pass for a piece of a shard; the folder's name is a hash of all that it depends on."""

    shard: str
    folder: Path


def merge(pieces: list[CleanPiece], folder: Path, output: Path, settings: CleanSettings) -> dict[str, Any]:
    """Write into `output` one file a shard, rejected.jsonl and clusters.jsonl.

    Args:
        folder: of earlier results with the same code and settings; whoever finds it in use works without it.

    Returns:
        Counts: conversations seen and kept, drops by reason, exchanges that went alone, masked values by type,
        clusters and the sizes of the largest.
    """
    with _alone(folder) as folder:
        merge = _Merge(folder, settings)
        if not merge.resume(pieces):
            merge.close()
            _empty(folder)
            merge = _Merge(folder, settings)
            merge.note(pieces)
        merge.decide(pieces[merge.covered :])
        output.mkdir(parents=True, exist_ok=True)
        sizes = merge.write(output)
        merge.close()
        if settings.max_user_share >= 1:
            merge.save(pieces)
        else:  # a share of all has to be decided anew with every newcomer
            _empty(folder)
    largest = [size for size in nlargest(LARGEST, sizes) if size > 1]
    return merge.counts() | {"clusters": len(sizes) - sizes.count(0), "largest_clusters": largest}


# -----------------------------------------------------------------------------
# the folder


@contextmanager
def _alone(folder: Path) -> Iterator[Path]:
    """The folder while no other run uses it, or a temporary one in its stead."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "wb") as lock, tempfile.TemporaryDirectory(prefix="clean-") as temporary:
        yield folder if lock_descriptor(lock.fileno(), blocking=False) else Path(temporary)


def remove_unused(folder: Path) -> None:
    """Remove the folder of earlier results, unless a run uses it."""
    with _alone(folder) as own:
        if own == folder:
            shutil.rmtree(folder, ignore_errors=True)


def _empty(folder: Path) -> None:
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != "lock":
            path.unlink()


def _read_index(folder: Path) -> Iterator[list[dict]]:
    with open(folder / "index.jsonl", "rb") as file:
        while entries := [orjson.loads(line) for line in islice(file, BATCH)]:
            yield entries


# -----------------------------------------------------------------------------
# the decisions


class _Merge:
    """Decides what depends on more than one conversation, in their order.

    It resumes from the state in the folder, which is valid again only after `save`: a killed run costs time only.
    """

    def __init__(self, folder: Path, settings: CleanSettings) -> None:
        self._folder, self._settings = folder, settings
        known = _take(folder / "state.json")
        kept = known.get("kept_files", {})
        if kept != {name: state_of(folder / "kept" / name) for name in kept}:  # somebody wrote into data/clean
            known = {}
        if not known:
            _empty(folder)
            (folder / "kept").mkdir()
        self._covered: list[list[str]] = known.get("pieces", [])
        self.covered = len(self._covered)  # pieces that are decided
        self.seen, self.kept, self.gone, self._candidates = (
            known.get(name, 0) for name in ("seen", "kept", "exchanges_dropped", "candidates")
        )
        self.reasons, self.masked, self.flagged = (
            Counter(known.get(name, {})) for name in ("reasons", "masked", "flagged")
        )
        self._start = self.seen  # the first row that is not decided
        self._newest = bytearray()  # of each row from there, whether it is the newest version of its conversation
        self._persons: Counter[str] = Counter()
        self._passed = 0
        self._database = _open_database(folder / "index.sqlite")
        self._signatures = FileIO(folder / "signatures", "r+b" if known else "w+b")
        parents = array("I", (folder / "parents").read_bytes() if known else b"")
        self._clusters = Clusters(self._database, self._signatures, settings.near_duplicate_threshold, parents)

    def close(self) -> None:
        """Close the files."""
        self._database.execute("COMMIT")
        self._database.close()
        self._signatures.close()

    def save(self, pieces: list[CleanPiece]) -> None:
        """Write the state, so that a later run resumes after these pieces."""
        folder = self._folder
        (folder / "parents").write_bytes(self._clusters.parents.tobytes())
        for path in (*folder.rglob("*"), folder):
            sync(path)
        kept = {path.name: state_of(path) for path in (folder / "kept").iterdir()}
        state = self.counts() | {"pieces": _names(pieces), "candidates": self._candidates, "kept_files": kept}
        write_json(folder / "state.json", state)

    def resume(self, pieces: list[CleanPiece]) -> bool:
        """Add the pieces after those that are decided; False if all has to be decided anew."""
        return _names(pieces[: self.covered]) == self._covered and self.note(pieces[self.covered :])

    def counts(self) -> dict[str, Any]:
        """What was seen, kept, dropped and masked, and flagged if anything was.

        `exchanges_dropped` are those that kept conversations lost.
        """
        counts = {
            "seen": self.seen,
            "kept": self.kept,
            "dropped": self.seen - self.kept,
            "reasons": dict(sorted(self.reasons.items())),
            "exchanges_dropped": self.gone,
            "masked": dict(sorted(self.masked.items())),
        }
        return counts | ({"flagged": dict(sorted(self.flagged.items()))} if self.flagged else {})

    # what comes with the pieces, before any is decided

    def note(self, pieces: list[CleanPiece]) -> bool:
        """Add pieces; False if one of them changes an earlier decision."""
        return self._note_newest(pieces) and self._note_best(pieces)

    def _note_newest(self, pieces: list[CleanPiece]) -> bool:
        row = self._start
        for entries in (entries for piece in pieces for entries in _read_index(piece.folder)):
            newest = {entry["id"]: number for number, entry in enumerate(entries, row) if entry.get("id")}
            self._newest.extend(newest.get(e.get("id"), number) == number for number, e in enumerate(entries, row))
            for (earlier,) in self._select("row FROM newest WHERE id", newest):
                if earlier < self._start:
                    return False
                self._newest[earlier - self._start] = False
            self._database.executemany("INSERT OR REPLACE INTO newest VALUES (?, ?)", newest.items())
            row += len(entries)
        return True

    def _note_best(self, pieces: list[CleanPiece]) -> bool:
        """Of exact duplicates note the one that stays (by feedback, then age, then order), and the others' feedback."""
        row = self._start
        for entries in (entries for piece in pieces for entries in _read_index(piece.folder)):
            best: dict[int, tuple] = {}
            judged: dict[int, list[tuple[int, bytes]]] = {}
            for number, entry in enumerate(entries, row):
                if "reason" not in entry and self._newest[number - self._start]:
                    self._passed += 1
                    rank = (-entry.get("standing", 0), entry["started_at"], number, entry["id"])
                    for key in map(index_key, entry["content"]):
                        best[key] = min(rank, best.get(key, rank))
                    if "judgements" in entry:
                        said = judged.setdefault(index_key(entry["content"][-1]), [])
                        said.append((number, to_line(entry["judgements"])))
            for key, *rank in self._select("* FROM best WHERE content", best):
                if key in judged and rank[2] < self._start:
                    return False
                if tuple(rank) < best[key]:
                    del best[key]
                elif rank[2] < self._start:
                    return False
            rows = ((key, *rank) for key, rank in best.items())
            self._database.executemany("INSERT OR REPLACE INTO best VALUES (?, ?, ?, ?, ?)", rows)
            rows = ((key, *said) for key, several in judged.items() for said in several)
            self._database.executemany("INSERT OR REPLACE INTO judged VALUES (?, ?, ?)", rows)
            row += len(entries)
        return True

    def _select(self, what: str, keys: Collection[Any]) -> list[tuple]:
        marks = ",".join("?" * len(keys))
        return self._database.execute(f"SELECT {what} IN ({marks})", list(keys)).fetchall()

    # deciding

    def decide(self, pieces: list[CleanPiece]) -> None:
        """Write the lines of noted pieces that stay, and why others go."""
        with open(self._folder / "rejected.jsonl", "ab") as rejected:
            for shard, group in groupby(pieces, key=attrgetter("shard")):
                with open(self._folder / "kept" / shard, "wb") as kept:
                    lines = 0
                    for piece in group:
                        lines += self._piece(piece, lines, kept.write, rejected.write)
                        for name, found in read_json(piece.folder / "masked.json").items():
                            getattr(self, name).update(found)
                    os.fchmod(kept.fileno(), 0o444)  # it becomes a file of the output

    def _piece(
        self, piece: CleanPiece, lines_before: int, keep: Callable[[bytes], Any], reject: Callable[[bytes], Any]
    ) -> int:
        """Decide a piece; returns how many lines of the shard it had."""
        line = 0
        with open(piece.folder / "cleaned.jsonl", "rb") as cleaned, open(piece.folder / "signatures", "rb") as signed:
            signatures = iter(partial(signed.read, SIGNATURE_BYTES), b"")
            for entries in _read_index(piece.folder):
                judged = self._judged(entries)
                for entry, verdict in zip(entries, self._verdicts(entries, signatures), strict=True):
                    line = entry["line"]
                    text = b"" if "reason" in entry else cleaned.readline()
                    self.seen += 1
                    if verdict is None:
                        self.kept += 1
                        self.gone += entry.get("gone", 0)
                        said = judged.get(entry["content"][-1], {}) if judged else {}
                        others = [said[row] for row in said if row != self.seen - 1]
                        keep(to_line(add_judgements(from_line(text), others)) if others else text)
                        continue
                    reason, value = verdict
                    self.reasons[reason] += 1
                    rejected = {"id": entry.get("id"), "shard": piece.shard, "line": lines_before + line}
                    rejected |= {"reason": reason, "value": value}
                    if reason != "superseded" and entry.get("feedback"):
                        rejected["feedback"] = entry["feedback"]
                    reject(to_line(rejected))
        return line

    def _verdicts(self, entries: list[dict], signatures: Iterator[bytes]) -> list[Problem | None]:
        """Why each of the next conversations is dropped, None where it stays.

        `signatures` has the next of those that passed the first pass.
        """
        first = self.seen
        signed = [next(signatures) if "reason" not in entry else None for entry in entries]
        newest = self._newest[first - self._start : first - self._start + len(entries)]
        passed = {place: entry for place, entry in enumerate(entries) if newest[place] and "reason" not in entry}
        contents = {place: index_key(entry["content"][0]) for place, entry in passed.items()}
        best = {key: rest for key, *rest in self._select("content, row, id FROM best WHERE content", contents.values())}
        rows = []
        for place, entry in passed.items():
            stays = best[contents[place]][0] == first + place
            keys = [key for key in (entry["content"][-1], entry["question"]) if key]
            rows.append((signed[place] if stays else None, keys))
        near_duplicates = iter(self._clusters.add(rows, self._settings.drop_near_duplicates))
        verdicts = []
        for place, entry in enumerate(entries):
            if not newest[place]:
                verdicts.append(Problem("superseded", None))
            elif "reason" in entry:
                verdicts.append(Problem(entry["reason"], entry["value"]))
            else:
                row, identity = best[contents[place]]
                verdicts.append(self._verdict(entry, None if row == first + place else identity, next(near_duplicates)))
        return verdicts

    def _judged(self, entries: list[dict]) -> dict[str, dict[int, dict]]:
        """Content → row → what was said of it there, for entries that may stay."""
        contents = {index_key(entry["content"][-1]): entry["content"][-1] for entry in entries if "content" in entry}
        judged: dict[str, dict[int, dict]] = {}
        for key, row, said in self._select("* FROM judged WHERE content", contents):
            judged.setdefault(contents[key], {})[row] = orjson.loads(said)
        return judged

    def _verdict(self, entry: dict, better: str | None, near_duplicate: int | None) -> Problem | None:
        """Why the next candidate is dropped, given the id of a better duplicate and the row of a near-duplicate."""
        candidate = self._candidates
        self._candidates += 1
        verdict = Problem("duplicate", better) if better is not None else self._judge(entry, near_duplicate)
        if better is None and entry.get("restored"):  # of a duplicate the other one is kept
            verdict = None
        self._database.execute(
            "INSERT INTO member VALUES (?, ?, ?, ?)",
            (candidate, entry["id"], entry["started_at"], verdict is None),
        )
        return verdict

    def _judge(self, entry: dict, near_duplicate: int | None) -> Problem | None:
        # What somebody liked or edited stays, whichever came first.
        if near_duplicate is not None and self._settings.drop_near_duplicates and entry.get("standing", 0) <= 0:
            return Problem("near_duplicate", self._id_of(near_duplicate))
        if self._settings.max_same_reply:
            (count,) = self._database.execute(
                "INSERT INTO reply VALUES (?, 1) ON CONFLICT (reply) DO UPDATE SET count = count + 1 RETURNING count",
                (entry["reply"],),
            ).fetchone()
            if count > self._settings.max_same_reply:
                return Problem("same_reply", count)
        if self._settings.max_user_share < 1 and "person" in entry:
            self._persons[entry["person"]] += 1
            count = self._persons[entry["person"]]
            if count > max(1, int(self._settings.max_user_share * self._passed)):
                return Problem("user_share", count)
        return None

    def _id_of(self, candidate: int) -> str:
        return self._database.execute("SELECT id FROM member WHERE row = ?", (candidate,)).fetchone()[0]

    # writing

    def write(self, output: Path) -> array:
        """Write what stays of each shard, what was rejected and the clusters; returns as `_write_clusters`."""
        kept = {path.name: path for path in (self._folder / "kept").iterdir()}
        for name, path in kept.items():
            link(path, output / name)
        with open(self._folder / "rejected.jsonl", "rb") as source, replacing(output / "rejected.jsonl") as file:
            shutil.copyfileobj(source, file, 1 << 20)
        with replacing(output / "clusters.jsonl") as file:
            sizes = self._write_clusters(file.write)
        for path in output.glob("*.jsonl"):
            if path.name not in (*kept, "rejected.jsonl", "clusters.jsonl"):
                path.unlink()
        return sizes

    def _write_clusters(self, write: Callable[[bytes], Any]) -> array:
        """Write {"id", "cluster"} of every kept conversation; a cluster is named after its oldest conversation.

        Returns:
            Kept conversations of each cluster, at the place of its first row; 0 elsewhere.
        """
        database = self._database
        database.execute("CREATE TEMP TABLE oldest (root INTEGER PRIMARY KEY, started_at TEXT, id TEXT)")
        database.create_function("root", 1, self._clusters.cluster)
        database.execute(
            "INSERT INTO oldest SELECT root(row), started_at, id FROM member WHERE true ON CONFLICT (root) DO UPDATE "
            "SET started_at = excluded.started_at, id = excluded.id "
            "WHERE (excluded.started_at, excluded.id) < (oldest.started_at, oldest.id)"
        )
        sizes = array("I", bytes(4 * self._candidates))
        for identity, oldest, root in database.execute(
            "SELECT member.id, oldest.id, root FROM member JOIN oldest ON root = root(row) WHERE kept ORDER BY row"
        ):
            sizes[root] += 1
            write(to_line({"id": identity, "cluster": oldest}))
        return sizes


def _open_database(path: Path) -> sqlite3.Connection:
    database = sqlite3.connect(path, isolation_level=None, cached_statements=8)
    for pragma in ("journal_mode=OFF", "synchronous=OFF", "cache_size=-4096", "temp_store=FILE"):
        database.execute(f"PRAGMA {pragma}")
    database.execute("BEGIN")
    for table in (
        "newest (id TEXT PRIMARY KEY, row INTEGER) WITHOUT ROWID",
        # standing is the less, the better
        "best (content INTEGER PRIMARY KEY, standing INTEGER, started_at TEXT, row INTEGER, id TEXT)",
        "judged (content INTEGER, row INTEGER, said BLOB, PRIMARY KEY (content, row)) WITHOUT ROWID",
        "reply (reply TEXT PRIMARY KEY, count INTEGER) WITHOUT ROWID",
        "member (row INTEGER PRIMARY KEY, id TEXT, started_at TEXT, kept INTEGER)",
    ):
        database.execute(f"CREATE TABLE IF NOT EXISTS {table}")
    return database


def _take(path: Path) -> dict[str, Any]:
    """The state that the last run saved, removed before anything in the folder changes; {} where there is none."""
    known = read_object(path)
    path.unlink(missing_ok=True)
    sync(path.parent)
    return known


def _names(pieces: list[CleanPiece]) -> list[list[str]]:
    return [[piece.shard, piece.folder.name] for piece in pieces]
