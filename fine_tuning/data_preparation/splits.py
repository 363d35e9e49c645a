"""Sticky splits: conversations with their clusters and the ledger of earlier deals in; a split for each, out.

Near-duplicates share a cluster and a cluster shares a split, so no test item was trained on. The ledger remembers
every deal by conversation id: what was train stays train when other conversations come and go.
"""

import hashlib
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import numpy as np

from fine_tuning.common.columns import search
from fine_tuning.common.errors import UserError
from fine_tuning.common.records import read_jsonl, read_lines, replacing

SPLITS = ("train", "validation", "test")
LEFT_OUT = "none"  # in the ledger: near-duplicates on both sides, so part of no split
NAMES = (*SPLITS, LEFT_OUT)
_TRAIN, _VALIDATION, _TEST, _NONE = range(4)
# A verdict needs some hundred independent conversations: until so many clusters are held out, more newcomers are.
ENOUGH_TEST_CLUSTERS = 100
SMALL_TEST_FRACTION = 0.2


@dataclass(frozen=True)
class Fractions:
    """How newcomers are assigned. Fractions are of clusters; what is left is train.

    With `latest_from` (an ISO date), test is what started on or after it instead of a random fraction. Otherwise test
    gets a fraction of SMALL_TEST_FRACTION, if that is more, while fewer than ENOUGH_TEST_CLUSTERS are held out; a test
    fraction of 0 stays 0.
    """

    validation: float
    test: float
    latest_from: str | None = None


def deal(draws: np.ndarray, late: np.ndarray, known: np.ndarray, fresh: np.ndarray, fractions: Fractions) -> np.ndarray:
    """The split of each cluster's newcomers, as a number of NAMES.

    A conversation that was assigned keeps its split, whatever happened to its cluster. The newcomers of a cluster join
    the split of its earlier members; if those are in different splits, the newcomer links what must stay apart, and is
    left out. A cluster of newcomers goes where the salted hash of its id says, a number in [0, 1): test below the test
    fraction, then validation, then train.

    Then test is topped up: while fewer than ENOUGH_TEST_CLUSTERS are in it, earlier ones included, it takes newcomers
    that would be train, the smallest hash first, from the next stretch of hashes above validation's, as wide as
    SMALL_TEST_FRACTION exceeds the test fraction. It depends on the ledger and on which clusters there are, not on
    their order; what the ledger remembers is never moved again. So that little data works too, an empty split then
    takes a cluster of newcomers from one that has others: train first, then test, then validation.

    Args:
        draws: salted hash of each cluster, in [0, 1).
        late: whether all members of it started on or after `fractions.latest_from`.
        known: (clusters, SPLITS), whether members of it were assigned to that split before.
        fresh: whether members of it were assigned to none, not even LEFT_OUT.
    """
    random_test = fractions.test > 0 and fractions.latest_from is None
    in_test = draws < fractions.test if fractions.latest_from is None else late
    # The same stretch of draws whichever way test is chosen: validation does not change with it.
    in_validation = (fractions.test <= draws) & (draws < fractions.test + fractions.validation)
    new = fresh & ~known.any(axis=1)
    # Members that were left out earlier stay so; only a cluster with newcomers is assigned.
    dealt = np.where(known.sum(axis=1, dtype=np.int8) == 1, known.argmax(axis=1).astype(np.int8), np.int8(_NONE))
    dealt[new] = _TRAIN
    dealt[new & in_validation], dealt[new & in_test] = _VALIDATION, _TEST
    filled = known.sum(axis=0) + np.bincount(dealt[new], minlength=len(SPLITS))
    if random_test:
        spare = np.flatnonzero(new & (dealt == _TRAIN) & (draws < fractions.validation + SMALL_TEST_FRACTION))
        moved = spare[np.argsort(draws[spare], kind="stable")][: max(0, ENOUGH_TEST_CLUSTERS - filled[_TEST])]
        dealt[moved] = _TEST
        filled += (-len(moved), 0, len(moved))
    by_need = [_TRAIN] + [_TEST] * random_test + [_VALIDATION] * (fractions.validation > 0)
    for rank, wanted in enumerate(by_need):
        giving = [
            filled[split] > 1 or (split not in by_need[:rank] and (split in by_need or wanted == _TRAIN))
            for split in range(len(SPLITS))
        ]
        donors = np.flatnonzero(new & np.array([*giving, False])[dealt])
        if not filled[wanted] and len(donors):
            donor = donors[draws[donors].argmin()]
            filled[dealt[donor]] -= 1
            filled[wanted] += 1
            dealt[donor] = wanted
    return dealt


def fractions_of(hashes: np.ndarray) -> np.ndarray:
    """Hashes of 64 bits as numbers in [0, 1)."""
    return (hashes >> np.uint64(8)) * 2.0**-56


def salted_hashes(salt: str) -> Callable[[str], int]:
    """A number of 64 bits for any key (BLAKE2b, keyed with the salt)."""
    fresh = hashlib.blake2b(digest_size=8, key=salt.encode("utf-8")[:64]).copy

    def salted_hash(key: str) -> int:
        digest = fresh()
        digest.update(key.encode("utf-8", "surrogatepass"))
        return int.from_bytes(digest.digest(), "big")

    return salted_hash


# -----------------------------------------------------------------------------
# the ledger

_DIGITS = 15  # of an id's hash: 60 bits, of a million ids two are the same with a probability of 4e-7
_SPARE = np.uint64(64 - 4 * _DIGITS)
_LEDGER = re.compile(rb"(?:[0-9a-f]{%d} (?:%b)(?:\n|\Z))*+" % (_DIGITS, "|".join(NAMES).encode()))
# By the code of a character: the value of a digit, the number of the split whose name has it as second letter.
_HEX, _SECOND_LETTERS = np.zeros((2, 256), np.uint64)
_HEX[list(b"0123456789abcdef")] = range(16)
_SECOND_LETTERS[[ord(name[1]) for name in NAMES]] = range(len(NAMES))


class Ledger:
    """The file that remembers which conversation was assigned to which split, whatever became of the others.

    It stays in git. A line is `HASH SPLIT`: 15 hex digits of the conversation's id, keyed with the salt, and one of
    SPLITS or `none`, for those that are part of no split. Lines are only appended, so that git joins the lines of two
    branches (merge=union); where they disagree the stricter split holds when it is read: none, else test, else
    validation. Another salt makes other hashes: it deals anew, and going back to the earlier one finds its lines again.
    In memory a conversation takes eight bytes. Where two lines of a hash disagree, the later one of NAMES holds.

    Args:
        path: None for one in memory.
        assigned: conversation id → split, beside what the file knows.

    Raises:
        UserError: a line is damaged.
    """

    def __init__(self, path: str | Path | None, salt: str, assigned: Mapping[str, str] = MappingProxyType({})) -> None:
        self.path = Path(path or os.devnull)
        self._hash = salted_hashes(f"{salt}/ledger")
        text = self.path.read_bytes() if self.path.is_file() else b""
        if not _LEDGER.fullmatch(text):
            number = next(number for number, line in read_lines(self.path) if not _LEDGER.fullmatch(line))
            raise UserError(f"line {number} of {self.path} is damaged: `git checkout {self.path}`")
        raw = np.frombuffer(text, np.uint8)
        starts = np.concatenate([[0], np.flatnonzero(raw == ord("\n")) + 1])
        starts = starts[starts < len(raw)]
        lines = np.zeros(len(starts), np.uint64)
        for place in range(_DIGITS):
            lines = lines << np.uint64(4) | _HEX[raw[starts + place]]
        lines = lines << np.uint64(2) | _SECOND_LETTERS[raw[starts + _DIGITS + 2]]
        given = (self._hash(identity) >> 4 << 2 | NAMES.index(split) for identity, split in assigned.items())
        # Hash and split in one number each: of a hash's the last is the strictest.
        self._known = np.sort(np.concatenate([lines, np.fromiter(given, np.uint64)]))

    def find(self, identities: Iterable[str]) -> Iterator[tuple[str, str]]:
        """(id, split) of those that were assigned before."""
        identities = list(identities)
        splits = self.splits_of(self.keys(identities)).tolist()
        return ((identity, NAMES[split]) for identity, split in zip(identities, splits, strict=True) if split >= 0)

    def keys(self, identities: Iterable[str]) -> np.ndarray:
        """The hash of each id: 64 bits, of which lines have the first 60."""
        return np.fromiter(map(self._hash, identities), np.uint64)

    def splits_of(self, keys: np.ndarray) -> np.ndarray:
        """Numbers of NAMES by the hashes of ids; -1 for who was not assigned before."""
        last = keys >> _SPARE << np.uint64(2) | np.uint64(3)
        places = search(self._known, last, "right") - 1
        found = self._known[places] if len(self._known) else ~last
        same = (places >= 0) & (found | np.uint64(3) == last)
        return np.where(same, (found & np.uint64(3)).astype(np.int8), np.int8(-1))

    def append(self, assigned: Iterable[tuple[str, str]]) -> int:
        """Add (id, split) of those that are not in it; returns how many. The file is replaced whole or not at all."""
        pairs = list(assigned)
        splits = np.array([NAMES.index(split) for _, split in pairs], np.int8)
        return self.append_keys(self.keys(identity for identity, _ in pairs), splits)

    def append_keys(self, keys: np.ndarray, splits: np.ndarray) -> int:
        """The same of hashes and numbers of NAMES."""
        entries = (keys >> _SPARE) << np.uint64(2) | splits.astype(np.uint64)
        new = np.unique(entries[self.splits_of(keys) < 0]).tolist()
        if new or not self.path.is_file():
            before = self.path.read_bytes() if self.path.is_file() else b""
            with replacing(self.path) as file:
                file.write(before)
                file.writelines(f"{entry >> 2:0{_DIGITS}x} {NAMES[entry & 3]}\n".encode() for entry in new)
        return len(new)

    def forget(self, identities: Iterable[str]) -> int:
        """Take the lines of conversations out, as far as this salt names them; returns how many there were."""
        gone = {b"%0*x" % (_DIGITS, self._hash(identity) >> 4) for identity in identities}
        lines = [line for _, line in read_lines(self.path)] if self.path.is_file() else []
        kept = [line + b"\n" for line in lines if line[:_DIGITS] not in gone]
        if len(kept) < len(lines):
            with replacing(self.path) as file:
                file.writelines(kept)
        return len(lines) - len(kept)


def open_ledger(path: Path, salt: str) -> Ledger:
    """The ledger at `path`; that of an earlier version, a folder outside git, is taken over, which a line says."""
    before = path.with_suffix("")
    if before.is_dir():
        assigned: dict[str, list[tuple[str, str]]] = {}
        for line in (line for file in before.glob("ledger.jsonl") for line in read_jsonl(file)):
            assigned.setdefault(line["salt"], []).append((line["id"], line["split"]))
        for other, lines in assigned.items():
            print(f"prepare: {Ledger(path, other).append(lines)} splits taken over from {before} into {path}")
        shutil.rmtree(before)
    return Ledger(path, salt)
