"""What concerns all shards together: newest versions, the best of exact duplicates, near-duplicates, shares.

Everything is decided anew in each run, over columns of numbers that cleaning wrote beside each piece: a second for a
million conversations. A shard's lines are written again where a decision about one of them is another than before.
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import groupby, islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import orjson

from fine_tuning.common.records import replacing
from fine_tuning.common.results import Memo, link
from fine_tuning.data_collection.cleaning import near_duplicates
from fine_tuning.data_collection.data_cleaner import CleanSettings, add_judgements
from fine_tuning.schema.conversation import from_line, to_line

LARGEST = 5  # clusters whose sizes are reported
KEPT = "kept.jsonl"
PORTION = 1024  # rows of which is read at a time what was told
FILE_ROWS = 2048  # at most: what a deletion or a newer version makes be written again
# `index`: a row for each line of the piece. Keys are hashes; `end` and `told` are where its lines in cleaned.jsonl and
# told.jsonl end. A line there is [id, started_at, details]: reason and value of a drop, or feedback and judgements.
ROW = np.dtype(
    [(name, np.uint64) for name in ("id_key", "own", "shared", "question", "reply", "person")]
    + [("end", np.int64), ("told", np.int64), ("gone", np.int32)]
    + [(name, np.int8) for name in ("passed", "standing", "restored", "judged")]
)
VERDICTS = ("kept", "superseded", "rejected", "duplicate", "near_duplicate", "same_reply", "user_share")
_KEPT, _SUPERSEDED, _REJECTED, _DUPLICATE, _NEAR_DUPLICATE, _SAME_REPLY, _USER_SHARE = range(len(VERDICTS))


class CleanPiece(NamedTuple):
    """Output of the first pass for a piece of a shard; the folder's name is a hash of all that it depends on."""

    shard: str
    folder: Path
    found: dict[str, dict[str, int]]  # values that were masked and flagged, by type


def merge(pieces: list[CleanPiece], memo: Memo, output: Path, settings: CleanSettings) -> dict[str, Any]:
    """Write into `output` files of each shard, rejected.jsonl and clusters.jsonl; returns what `clean_shards` does."""
    index = _Index(pieces)
    decided = _decide(index, settings)
    output.mkdir(parents=True, exist_ok=True)
    _write_shards(index, decided, memo, output)
    with replacing(output / "rejected.jsonl") as file:
        reasons = Counter(_write_rejected(index, decided, file.write))
    with replacing(output / "clusters.jsonl") as file:
        sizes = _write_clusters(index, decided, file.write)
    found: dict[str, Counter[str]] = {"masked": Counter(), "flagged": Counter()}
    for piece in pieces:
        for name, values in piece.found.items():
            found[name].update(values)
    kept = decided.verdict == _KEPT
    return {
        "seen": len(kept),
        "kept": int(kept.sum()),
        "dropped": int((~kept).sum()),
        "reasons": dict(sorted(reasons.items())),
        "exchanges_dropped": int(index.column("gone")[kept].sum()),
        **{name: dict(sorted(values.items())) for name, values in found.items() if values or name == "masked"},
        "clusters": int((sizes > 0).sum()),
        "largest_clusters": [int(size) for size in np.sort(sizes)[: -LARGEST - 1 : -1] if size > 1],
    }


class _Index:
    """What the first pass noted of all pieces; it stays on disk until it is asked for."""

    def __init__(self, pieces: list[CleanPiece]) -> None:
        self.pieces = pieces
        self.tables = [_mapped(piece.folder / "index", ROW) for piece in pieces]
        self.starts = np.cumsum([0, *map(len, self.tables)])  # the first row of each piece, and how many there are
        self.passed = self.column("passed") > 0
        self._signed = np.cumsum(self.passed) - 1  # the place of its signature

    def column(self, name: str, rows: np.ndarray | None = None) -> np.ndarray:
        numbers = np.concatenate([np.empty(0, ROW[name]), *(table[name] for table in self.tables)])
        return numbers if rows is None else numbers[rows]

    def told(self, rows: np.ndarray) -> Iterator[tuple[str | None, str, Any]]:
        """(id, started_at, details) of rows in any order."""
        ends, starts = self.column("told"), self.starts[:-1][np.diff(self.starts) > 0]
        begins = np.concatenate([[0], ends])[: len(ends)]
        begins[starts] = 0
        files = [_mapped(piece.folder / "told.jsonl", np.uint8).data for piece in self.pieces]
        numbers = np.searchsorted(self.starts, rows, "right") - 1
        places = zip(numbers.tolist(), begins[rows].tolist(), ends[rows].tolist(), strict=True)
        lines = (files[number][begin:end] for number, begin, end in places)
        while portion := b",".join(islice(lines, PORTION)):
            yield from orjson.loads(b"[%b]" % portion)

    def bands(self, rows: np.ndarray) -> Iterator[np.ndarray]:
        """The keys of each band of signatures."""
        tables = [_mapped(piece.folder / "bands", np.uint64, near_duplicates.BANDS) for piece in self.pieces]
        return (
            np.concatenate([table[:, band] for table in tables])[self._signed[rows]]
            for band in range(near_duplicates.BANDS)
        )

    def signatures(self, rows: np.ndarray) -> np.ndarray:
        """Signatures of conversations that passed."""
        found = np.empty((len(rows), near_duplicates.PERMUTATIONS), np.uint32)
        numbers = np.searchsorted(self.starts, rows, "right") - 1
        for number in set(numbers.tolist()):
            table = _mapped(self.pieces[number].folder / "signatures", np.uint32, near_duplicates.PERMUTATIONS)
            before = int(self.passed[: self.starts[number]].sum())
            found[numbers == number] = table[self._signed[rows[numbers == number]] - before]
        return found


def _mapped(path: Path, kind: Any, *width: int) -> np.ndarray:
    """Rows of a file as an array; an empty file cannot be mapped."""
    found = np.memmap(path, kind, "r") if path.stat().st_size else np.empty(0, kind)
    return found.reshape(-1, *width)


# -----------------------------------------------------------------------------
# the decisions


@dataclass
class _Decided:
    verdict: np.ndarray  # of each row, a number of VERDICTS
    value: np.ndarray  # the row of the better or earlier duplicate, or the count that was too many
    candidates: np.ndarray  # rows that only another conversation can drop
    cluster: np.ndarray  # of each candidate the first of its cluster
    added: dict[int, dict[int, dict]]  # row → judgements of exact duplicates of it by their row, in ascending order
    judged: np.ndarray = field(init=False)  # the rows of `added`

    def __post_init__(self) -> None:
        self.judged = np.fromiter(self.added, np.int64)


def _decide(index: _Index, settings: CleanSettings) -> _Decided:
    passed, id_keys, every = index.passed, index.column("id_key"), np.arange(len(index.passed))
    superseded = (-near_duplicates.least_of_equal(id_keys, -every) != every) & (id_keys > 0)
    verdict = np.select([superseded, ~passed], [_SUPERSEDED, _REJECTED], _KEPT).astype(np.int8)
    value = np.zeros(len(passed), np.int64)
    rows = np.flatnonzero(verdict == _KEPT)
    standing, shared = index.column("standing", rows), index.column("shared", rows)
    best = _best_of_duplicates(index, rows, standing, shared)
    alone = best == np.arange(len(rows))
    keys, members = np.concatenate([shared, index.column("question", rows)]), np.tile(np.arange(len(rows)), 2)
    edges = np.stack([near_duplicates.least_of_equal(keys, members), members])
    edges = [edges[:, edges[0] < edges[1]]]
    nearest = np.full(len(rows), len(rows))
    if settings.near_duplicate_threshold <= 1:
        signed = np.flatnonzero(alone)
        signatures_of = lambda places: index.signatures(rows[signed[places]])  # noqa: E731
        similar = near_duplicates.similar_pairs(
            index.bands(rows[signed]), signatures_of, settings.near_duplicate_threshold
        )
        edges.append(signed[similar])
        np.minimum.at(nearest, edges[1][1], edges[1][0])
    near = alone & (nearest < len(rows)) & (standing <= 0) & settings.drop_near_duplicates
    reached = alone & ~near
    own = np.select([~alone, near], [_DUPLICATE, _NEAR_DUPLICATE], _KEPT)
    other = np.where(alone, np.where(near, nearest, 0), best)
    values = rows[other] if len(rows) else other
    for column, limit, reason in (
        ("reply", settings.max_same_reply or len(rows), _SAME_REPLY),
        ("person", max(1, int(settings.max_user_share * len(rows))), _USER_SHARE),
    ):
        found = index.column(column, rows)
        asked = np.flatnonzero(reached & (found > 0))
        counts = near_duplicates.counts_within(found[asked])
        late = asked[counts > limit]
        own[late], values[late], reached[late] = reason, counts[counts > limit], False
    own[alone & (index.column("restored", rows) > 0)] = _KEPT  # of a duplicate the other one is kept
    verdict[rows], value[rows] = own, values
    cluster = near_duplicates.clusters(len(rows), np.concatenate(edges, axis=1))
    return _Decided(verdict, value, rows, cluster, _judgements(index, rows, own == _KEPT, shared))


def _best_of_duplicates(index: _Index, rows: np.ndarray, standing: np.ndarray, shared: np.ndarray) -> np.ndarray:
    """Of each candidate the one that stays of its exact duplicates: by feedback, then age, then order."""
    own = index.column("own", rows)
    edited = np.flatnonzero(own != shared)
    keys, members = np.concatenate([own, shared[edited]]), np.concatenate([np.arange(len(rows)), edited])
    _, group, sizes = np.unique(keys, return_inverse=True, return_counts=True)
    several = sizes[group] > 1
    involved = np.flatnonzero(np.bincount(members[several], minlength=len(rows)))
    dates = (started_at for _, started_at, _ in index.told(rows[involved]))
    order = zip((-standing[involved].astype(int)).tolist(), dates, involved.tolist(), strict=True)
    ranked = np.array([place for *_, place in sorted(order)], int)
    rank = np.zeros(len(rows), int)
    rank[ranked] = np.arange(len(ranked))
    best = np.arange(len(rows))
    mine = several[: len(rows)]
    best[mine] = ranked[near_duplicates.least_of_equal(keys, rank[members])[: len(rows)][mine]]
    return best


def _judgements(index: _Index, rows: np.ndarray, kept: np.ndarray, shared: np.ndarray) -> dict[int, dict[int, dict]]:
    """Row → what was said of exact duplicates of it, for candidates that are kept."""
    judged = np.flatnonzero(index.column("judged", rows))
    said: dict[int, list[tuple[int, dict]]] = {}
    for place, (*_, details) in zip(judged, index.told(rows[judged]), strict=True):
        said.setdefault(int(shared[place]), []).append((int(rows[place]), details["judgements"]))
    added = {}
    for place in np.flatnonzero(kept & np.isin(shared, shared[judged])):
        if others := {row: one for row, one in said[int(shared[place])] if row != rows[place]}:
            added[int(rows[place])] = others
    return added


# -----------------------------------------------------------------------------
# writing


def _write_shards(index: _Index, decided: _Decided, memo: Memo, output: Path) -> None:
    """Write the lines that are kept of each shard, FILE_ROWS a file; a file that keeps the same as before is linked."""
    written = {"rejected.jsonl", "clusters.jsonl"}
    for shard, group in groupby(enumerate(index.pieces), key=lambda numbered: numbered[1].shard):
        numbers = [number for number, _ in group]
        start, end = index.starts[numbers[0]], index.starts[numbers[-1] + 1]
        firsts = range(start, max(end, start + 1), FILE_ROWS)
        for part, first in enumerate(firsts):
            name = shard if len(firsts) == 1 else f"{Path(shard).stem}.{part:04}.jsonl"
            link(_part(index, decided, memo, numbers, first, min(first + FILE_ROWS, end)), output / name)
            written.add(name)
    for path in output.glob("*.jsonl"):
        if path.name not in written:
            path.unlink()
    memo.remove_unused()


def _part(index: _Index, decided: _Decided, memo: Memo, numbers: list[int], first: int, last: int) -> Path:
    """The file of the lines that are kept of the rows first:last, which are in some of the pieces `numbers`."""
    pieces = [
        (number, max(first, index.starts[number]), min(last, index.starts[number + 1]))
        for number in numbers
        if index.starts[number] < last and first < index.starts[number + 1]
    ]
    kept = np.packbits(decided.verdict[first:last] == _KEPT).tobytes()
    judged = decided.judged[slice(*np.searchsorted(decided.judged, (first, last)))].tolist()
    added = {str(row - first): [*decided.added[row].values()] for row in judged}
    places = [[index.pieces[number].folder.name, int(begin - index.starts[number])] for number, begin, _ in pieces]
    others = [other for row in judged for other in decided.added[row]]
    numbers = {*(number for number, *_ in pieces), *(np.searchsorted(index.starts, others, "right") - 1).tolist()}

    def write(place: Path, _: object) -> int:
        with open(place / KEPT, "wb") as file:
            for number, begin, end in pieces:
                _write_rows(index, decided, number, begin, end, file.write)
        return len(pieces)

    key = [places, hashlib.sha256(kept).hexdigest(), int(last - first), added]
    return memo.files(key, write, of={index.pieces[number].folder.name for number in numbers})[0] / KEPT


def _write_rows(
    index: _Index, decided: _Decided, number: int, first: int, last: int, write: Callable[[Any], Any]
) -> None:
    """Write the lines that are kept of some rows of a piece."""
    start, ends = index.starts[number], np.array(index.tables[number]["end"])
    begins = np.concatenate([[0], ends[:-1]])
    kept = first - start + np.flatnonzero(decided.verdict[first:last] == _KEPT)
    if not len(kept):
        return
    changed = np.isin(start + kept, decided.judged)
    broken = (begins[kept][1:] != ends[kept][:-1]) | changed[1:] | changed[:-1]
    stretches = np.split(kept, np.flatnonzero(broken) + 1)
    cleaned = _mapped(index.pieces[number].folder / "cleaned.jsonl", np.uint8).data
    for stretch in stretches:
        lines = cleaned[begins[stretch[0]] : ends[stretch[-1]]]
        others = decided.added.get(int(start + stretch[0]))
        write(to_line(add_judgements(from_line(bytes(lines)), others.values())) if others else lines)


def _write_rejected(index: _Index, decided: _Decided, write: Callable[[Any], Any]) -> Iterator[str]:
    """Write where each dropped conversation was and why it went; yields the reasons."""
    rows = np.flatnonzero(decided.verdict)
    verdicts, values = decided.verdict[rows], decided.value[rows]
    shards = [piece.shard for piece in index.pieces]
    places = np.searchsorted(index.starts, rows, "right") - 1
    firsts = index.starts[[shards.index(shard) for shard in shards]][places]
    others = index.told(values[np.isin(verdicts, (_DUPLICATE, _NEAR_DUPLICATE))])
    numbers = zip(*(column.tolist() for column in (rows - firsts + 1, places, verdicts, values)), strict=True)
    for (line, place, verdict, value), (identity, _, details) in zip(numbers, index.told(rows), strict=True):
        reason, because = VERDICTS[verdict], None
        if verdict == _REJECTED:
            reason, because = details["reason"], details["value"]
        elif verdict != _SUPERSEDED:
            because = next(others)[0] if verdict in (_DUPLICATE, _NEAR_DUPLICATE) else value
        record = {"id": identity, "shard": shards[place], "line": line, "reason": reason, "value": because}
        if verdict != _SUPERSEDED and details.get("feedback"):
            record["feedback"] = details["feedback"]
        write(to_line(record))
        yield reason


def _write_clusters(index: _Index, decided: _Decided, write: Callable[[Any], Any]) -> np.ndarray:
    """Write {"id", "cluster"} of kept conversations that another one, the oldest of their cluster, gives its name.

    Returns the kept conversations of each cluster, at the place of its first candidate; 0 elsewhere.
    """
    rows, cluster = decided.candidates, decided.cluster
    oldest = np.arange(len(rows))
    several = np.flatnonzero(np.bincount(cluster, minlength=len(rows))[cluster] > 1)
    dated = ((started_at, identity) for identity, started_at, _ in index.told(rows[several]))
    for *_, place in sorted(zip(dated, several.tolist(), strict=True), reverse=True):
        oldest[cluster[place]] = place
    kept = np.flatnonzero(decided.verdict[rows] == _KEPT)
    named = oldest[cluster[kept]]
    members = named != kept
    for (identity, *_), (other, *_) in zip(
        index.told(rows[kept[members]]), index.told(rows[named[members]]), strict=True
    ):
        write(to_line({"id": identity, "cluster": other}))
    return np.bincount(cluster[kept], minlength=len(rows))
