"""What concerns all shards together: newest versions, the best of exact duplicates, near-duplicates, shares.

Everything is decided anew in each run, over columns of numbers that cleaning wrote beside each piece: a second for a
million conversations. A shard's lines are written again where a decision about one of them is another than before.
"""

import hashlib
import mmap
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import groupby, islice, pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import orjson

from fine_tuning.common.columns import equal_groups, equal_pairs
from fine_tuning.common.records import replacing
from fine_tuning.common.results import Memo, link
from fine_tuning.data_collection.cleaning import near_duplicates
from fine_tuning.data_collection.data_cleaner import CleanSettings, add_judgements
from fine_tuning.schema.conversation import from_line, to_line

LARGEST = 5  # clusters whose sizes are reported
KEPT = "kept.jsonl"
PORTION = 1024  # rows of which is read at a time what was told
FILE_ROWS = 2048  # at most: what a deletion or a newer version makes be written again
# `index`: a row for each line of the piece, one column after the other. Keys are hashes; `end` and `told` are where its
# lines in cleaned.jsonl and told.jsonl end. A line there is [id, started_at, details]: reason and value of a drop, or
# feedback and judgements.
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
        lines = [(piece.folder / "index").stat().st_size // ROW.itemsize for piece in pieces]
        self.starts = np.cumsum([0, *lines])  # the first row of each piece, and how many there are
        self.passed = self.column("passed") > 0
        self._signed = np.cumsum(self.passed, dtype=np.int32) - 1  # the place of its signature

    def column(self, name: str, rows: np.ndarray | None = None) -> np.ndarray:
        numbers = (self.of_piece(number, name) for number in range(len(self.pieces)))
        column = np.concatenate([np.empty(0, ROW[name]), *numbers])
        return column if rows is None else column[rows]

    def of_piece(self, number: int, name: str) -> np.ndarray:
        """A column of one piece."""
        count, (kind, before) = int(np.diff(self.starts)[number]), ROW.fields[name][:2]
        return np.fromfile(self.pieces[number].folder / "index", kind, count, offset=count * before)

    def told(self, rows: np.ndarray) -> Iterator[tuple[str | None, str, Any]]:
        """(id, started_at, details) of rows in ascending order."""
        for number, (first, last) in enumerate(pairwise(np.searchsorted(rows, self.starts).tolist())):
            if first < last:
                ends, some = self.of_piece(number, "told"), rows[first:last] - self.starts[number]
                told = (self.pieces[number].folder / "told.jsonl").read_bytes()
                places = zip(np.where(some, ends[some - 1], 0).tolist(), ends[some].tolist(), strict=True)
                lines = (told[begin:end] for begin, end in places)
                while portion := b",".join(islice(lines, PORTION)):
                    yield from orjson.loads(b"[%b]" % portion)

    def names(self, rows: np.ndarray) -> Iterator[str | None]:
        """The ids of rows in any order."""
        asked, places = np.unique(rows, return_inverse=True)
        return map([identity for identity, *_ in self.told(asked)].__getitem__, places.tolist())

    def bands(self, rows: np.ndarray) -> Iterator[np.ndarray]:
        """The keys of each band of signatures of rows that passed, in ascending order."""
        wanted, files = np.isin(np.flatnonzero(self.passed), rows), [piece.folder / "bands" for piece in self.pieces]
        counts = [file.stat().st_size // (8 * near_duplicates.BANDS) for file in files]
        for band in range(near_duplicates.BANDS):
            keys = [np.fromfile(f, np.uint64, n, offset=8 * n * band) for f, n in zip(files, counts, strict=True)]
            yield np.concatenate([np.empty(0, np.uint64), *keys])[wanted]

    def signatures(self, rows: np.ndarray) -> np.ndarray:
        """Signatures of conversations that passed."""
        found = np.empty((len(rows), near_duplicates.PERMUTATIONS), np.uint32)
        numbers = np.searchsorted(self.starts, rows, "right") - 1
        for number in np.unique(numbers).tolist():
            here, start = np.flatnonzero(numbers == number), self.starts[number]
            with open(self.pieces[number].folder / "signatures", "rb") as file:
                table = np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.uint32)
            before = self._signed[start] + (not self.passed[start])
            found[here] = table.reshape(-1, near_duplicates.PERMUTATIONS)[self._signed[rows[here]] - before]
        return found


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
    verdict = np.where(index.passed, np.int8(_KEPT), np.int8(_REJECTED))
    id_keys = index.column("id_key")
    versions, starts, sizes = equal_groups(id_keys)
    older = np.ones(len(versions), bool)
    older[starts + sizes - 1] = False
    verdict[versions[older & (id_keys[versions] > 0)]] = _SUPERSEDED
    rows = np.flatnonzero(verdict == _KEPT).astype(np.int32)
    standing, shared = index.column("standing", rows), index.column("shared", rows)
    best = _best_of_duplicates(index, rows, standing, shared)
    alone = best == np.arange(len(rows))
    edges = [equal_pairs(keys) for keys in (shared, index.column("question", rows))]
    nearest = np.full(len(rows), len(rows), np.int32)
    if settings.near_duplicate_threshold <= 1:
        signed = np.flatnonzero(alone).astype(np.int32)
        signatures_of = lambda places: index.signatures(rows[signed[places]])  # noqa: E731
        similar = near_duplicates.similar_pairs(
            index.bands(rows[signed]), signatures_of, settings.near_duplicate_threshold
        )
        edges.append(signed[similar])
        np.minimum.at(nearest, edges[-1][1], edges[-1][0])
    near = alone & (nearest < len(rows)) & (standing <= 0) & settings.drop_near_duplicates
    own, values = np.zeros(len(rows), np.int8), rows[np.where(near, nearest, best)]
    own[near], own[~alone] = _NEAR_DUPLICATE, _DUPLICATE
    for column, limit, reason in (
        ("reply", settings.max_same_reply or len(rows), _SAME_REPLY),
        ("person", max(1, int(settings.max_user_share * len(rows))), _USER_SHARE),
    ):
        if limit < len(rows):
            found = index.column(column, rows)
            asked = np.flatnonzero((own == _KEPT) & (found > 0))
            several, starts, sizes = equal_groups(found[asked])
            counts = np.arange(1, len(several) + 1) - np.repeat(starts, sizes)
            late = asked[several[counts > limit]]
            own[late], values[late] = reason, counts[counts > limit]
    own[alone & (index.column("restored", rows) > 0)] = _KEPT  # of a duplicate the other one is kept
    verdict[rows], value = own, np.zeros(len(verdict), np.int32)
    value[rows] = values
    cluster = near_duplicates.clusters(len(rows), np.concatenate(edges, axis=1))
    return _Decided(verdict, value, rows, cluster, _judgements(index, rows, own == _KEPT, shared))


def _best_of_duplicates(index: _Index, rows: np.ndarray, standing: np.ndarray, shared: np.ndarray) -> np.ndarray:
    """Of each candidate the one that stays of its exact duplicates: by feedback, then age, then order."""
    own = index.column("own", rows)
    edited = np.flatnonzero(own != shared)
    equal, starts, sizes = equal_groups(np.concatenate([own, shared[edited]]))
    mine = equal < len(rows)
    members = equal.copy()
    members[~mine] = edited[equal[~mine] - len(rows)]
    involved, places = np.unique(members, return_inverse=True)
    dates = (started_at for _, started_at, _ in index.told(rows[involved]))
    order = zip((-standing[involved].astype(int)).tolist(), dates, range(len(involved)), strict=True)
    ranked = np.array([place for *_, place in sorted(order)], int)
    rank = np.empty(len(ranked), int)
    rank[ranked] = np.arange(len(ranked))
    best = np.arange(len(rows), dtype=np.int32)
    best[members[mine]] = np.repeat(involved[ranked[np.minimum.reduceat(rank[places], starts)]], sizes)[mine]
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
    start, ends = index.starts[number], index.of_piece(number, "end")
    begins = np.concatenate([[0], ends[:-1]])
    kept = first - start + np.flatnonzero(decided.verdict[first:last] == _KEPT)
    if not len(kept):
        return
    changed = np.isin(start + kept, decided.judged)
    broken = (begins[kept][1:] != ends[kept][:-1]) | changed[1:] | changed[:-1]
    stretches = np.split(kept, np.flatnonzero(broken) + 1)
    with open(index.pieces[number].folder / "cleaned.jsonl", "rb") as cleaned:
        for stretch in stretches:
            cleaned.seek(begins[stretch[0]])
            lines = cleaned.read(ends[stretch[-1]] - begins[stretch[0]])
            others = decided.added.get(int(start + stretch[0]))
            write(to_line(add_judgements(from_line(lines), others.values())) if others else lines)


def _write_rejected(index: _Index, decided: _Decided, write: Callable[[Any], Any]) -> Iterator[str]:
    """Write where each dropped conversation was and why it went; yields the reasons."""
    rows = np.flatnonzero(decided.verdict)
    verdicts, values = decided.verdict[rows], decided.value[rows]
    shards = [piece.shard for piece in index.pieces]
    places = np.searchsorted(index.starts, rows, "right") - 1
    firsts = index.starts[[shards.index(shard) for shard in shards]][places]
    others = index.names(values[np.isin(verdicts, (_DUPLICATE, _NEAR_DUPLICATE))])
    numbers = zip(*(column.tolist() for column in (rows - firsts + 1, places, verdicts, values)), strict=True)
    for (line, place, verdict, value), (identity, _, details) in zip(numbers, index.told(rows), strict=True):
        reason, because = VERDICTS[verdict], None
        if verdict == _REJECTED:
            reason, because = details["reason"], details["value"]
        elif verdict != _SUPERSEDED:
            because = next(others) if verdict in (_DUPLICATE, _NEAR_DUPLICATE) else value
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
    several = np.flatnonzero(np.bincount(cluster, minlength=len(rows))[cluster] > 1)
    names, firsts = [], cluster[several].tolist()
    oldest: dict[int, tuple[str, str | None, int]] = {}
    for place, (first, (identity, started_at, _)) in enumerate(zip(firsts, index.told(rows[several]), strict=True)):
        names.append(identity)
        oldest[first] = min(oldest.get(first, found := (started_at, identity, place)), found)
    kept = decided.verdict[rows] == _KEPT
    for place in np.flatnonzero(kept[several]).tolist():
        _, named, at = oldest[firsts[place]]
        if at != place:
            write(to_line({"id": names[place], "cluster": named}))
    return np.bincount(cluster[kept], minlength=len(rows))
