"""Sticky splits: conversations with their clusters and the ledger of earlier deals in; a split for each, out.

Near-duplicates share a cluster and a cluster shares a split, so no test item was trained on. The ledger remembers
every deal by conversation id: what was train stays train when other conversations come and go.
"""

import hashlib
import shutil
from array import array
from bisect import bisect_right, insort
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from fine_tuning.common.errors import UserError
from fine_tuning.common.records import read_jsonl, read_lines, replacing

SPLITS = ("train", "validation", "test")
LEFT_OUT = "none"  # in the ledger: near-duplicates on both sides, so part of no split
_NO_SPLIT = {LEFT_OUT, None}
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


class SplitAssignment:
    """Deals clusters one by one, in any order and each once; `moved` then says which have to move after all.

    A conversation that was assigned keeps its split, whatever happened to its cluster. The newcomers of a cluster join
    the split of its earlier members; if those are in different splits, the newcomer links what must stay apart, and is
    left out. A cluster of newcomers goes where the salted hash of its id says, a number in [0, 1): test below the test
    fraction, then validation, then train.

    Then test is topped up: while fewer than ENOUGH_TEST_CLUSTERS are in it, earlier ones included, it takes newcomers
    that would be train, the smallest hash first, from the next stretch of hashes above validation's, as wide as
    SMALL_TEST_FRACTION exceeds the test fraction. It depends on the ledger and on which clusters there are, not on
    their order; what the ledger remembers is never moved again. So that little data works too, an empty split then
    takes a cluster of newcomers from one that has others: train first, then test, then validation.
    """

    def __init__(self, fractions: Fractions, salt: str) -> None:
        self._fractions, self._draw = fractions, salted_fractions(salt)
        self._filled: Counter[str] = Counter()
        # Of each split the clusters of newcomers that would leave it first: no more than one a split ever does.
        self._donors: dict[str, list[tuple[float, str]]] = {split: [] for split in SPLITS}
        self._spare: list[tuple[float, str]] = []  # newcomers of train that test may take, no more than it can want
        random_test = fractions.test > 0 and fractions.latest_from is None
        self._spare_below = fractions.validation + SMALL_TEST_FRACTION if random_test else 0.0

    def newcomers(self, cluster: str, oldest: str, assigned: Collection[str | None]) -> str:
        """The split of a cluster's newcomers: one of SPLITS or LEFT_OUT.

        Args:
            oldest: date of its oldest member, of all the first 10 characters of `started_at`; "" for unknown.
            assigned: the splits that its members were assigned to; with None if there are newcomers.
        """
        if known := set(assigned) - _NO_SPLIT:
            self._filled.update(known)
            return known.pop() if len(known) == 1 else LEFT_OUT
        # Members that were left out earlier stay so; only a cluster with newcomers is assigned.
        if None not in assigned:
            return LEFT_OUT
        draw = self._draw(cluster)
        split = _random_split(draw, oldest, self._fractions)
        self._filled[split] += 1
        _keep_smallest(self._donors[split], (draw, cluster), len(SPLITS))
        if split == "train" and draw < self._spare_below:
            _keep_smallest(self._spare, (draw, cluster), ENOUGH_TEST_CLUSTERS)
        return split

    def moved(self) -> dict[str, str]:
        """The clusters of newcomers that move, and where to: test is topped up, and no wanted split is empty."""
        missing = max(0, ENOUGH_TEST_CLUSTERS - self._filled["test"])
        moved = {cluster: "test" for _, cluster in self._spare[:missing]}
        filled = self._filled + Counter(test=len(moved))
        filled["train"] -= len(moved)
        fresh = {cluster: split for split, donors in self._donors.items() for _, cluster in donors} | moved
        return moved | _fill_empty(fresh, filled, self._fractions, self._draw)


def _keep_smallest(kept: list[tuple[float, str]], new: tuple[float, str], most: int) -> None:
    if len(kept) < most or new < kept[-1]:
        insort(kept, new)
        del kept[most:]


def salted_fractions(salt: str) -> Callable[[str], float]:
    """A number in [0, 1) for any key: the same for the same salt and key, everywhere and always."""
    salted_hash = salted_hashes(salt)
    return lambda key: (salted_hash(key) >> 8) * 2**-56


def salted_hashes(salt: str) -> Callable[[str], int]:
    """A number of 64 bits for any key (BLAKE2b, keyed with the salt)."""
    fresh = hashlib.blake2b(digest_size=8, key=salt.encode("utf-8")[:64]).copy

    def salted_hash(key: str) -> int:
        digest = fresh()
        digest.update(key.encode("utf-8", "surrogatepass"))
        return int.from_bytes(digest.digest(), "big")

    return salted_hash


def _random_split(draw: float, oldest: str, fractions: Fractions) -> str:
    if fractions.latest_from is not None:
        if oldest >= fractions.latest_from:
            return "test"
    elif draw < fractions.test:
        return "test"
    # The same stretch of draws whichever way test is chosen: validation does not change with it.
    if fractions.test <= draw < fractions.test + fractions.validation:
        return "validation"
    return "train"


def _fill_empty(fresh: dict[str, str], filled: Counter[str], fractions: Fractions, draw: Callable) -> dict[str, str]:
    by_need = ["train"]
    if fractions.test > 0 and fractions.latest_from is None:
        by_need.append("test")
    if fractions.validation > 0:
        by_need.append("validation")
    moved: dict[str, str] = {}
    for rank, split in enumerate(by_need):
        if filled[split]:
            continue
        needier = by_need[:rank]
        donors = [
            cluster
            for cluster, current in (fresh | moved).items()
            if filled[current] > 1 or (current not in needier and (current in by_need or split == "train"))
        ]
        if donors:
            donor = min(donors, key=lambda cluster: (draw(cluster), cluster))
            filled[(fresh | moved)[donor]] -= 1
            filled[split] += 1
            moved[donor] = split
    return moved


# -----------------------------------------------------------------------------
# the ledger

_STRICTNESS = ("train", "validation", "test", LEFT_OUT)  # where two lines disagree, the later one holds
_DIGITS = 15  # of an id's hash: 60 bits, of a million ids two are the same with a probability of 4e-7


class Ledger:
    """The file that remembers which conversation was assigned to which split, whatever became of the others.

    It stays in git. A line is `HASH SPLIT`: 15 hex digits of the conversation's id, keyed with the salt, and one of
    SPLITS or `none`, for those that are part of no split. Lines are only appended, so that git joins the lines of two
    branches (merge=union); where they disagree the stricter split holds when it is read: none, else test, else
    validation. Another salt makes other hashes: it deals anew, and going back to the earlier one finds its lines again.
    In memory a conversation takes eight bytes.

    Raises:
        UserError: a line is damaged.
    """

    def __init__(self, path: str | Path, salt: str) -> None:
        self.path = Path(path)
        self._hash = salted_hashes(f"{salt}/ledger")
        known = array("Q")  # hash and strictness in one number each: of a hash's the last is the strictest
        for number, line in read_lines(self.path) if self.path.is_file() else ():
            try:
                digits, split = line.decode("ascii").split(" ")
                known.append(int(digits, 16) << 2 | _STRICTNESS.index(split))
            except (ValueError, OverflowError):
                raise UserError(f"line {number} of {self.path} is damaged: `git checkout {self.path}`") from None
        self._known = array("Q", sorted(known))

    def find(self, identities: Iterable[str]) -> Iterator[tuple[str, str]]:
        """(id, split) of those that were assigned before."""
        return ((identity, split) for identity in identities if (split := self._split_of(self._key(identity))))

    def append(self, assigned: Iterable[tuple[str, str]]) -> int:
        """Add (id, split) of those that are not in it; returns how many. The file is replaced whole or not at all."""
        keys = ((self._key(identity), split) for identity, split in assigned)
        new = sorted(key << 2 | _STRICTNESS.index(split) for key, split in keys if not self._split_of(key))
        if new or not self.path.is_file():
            before = self.path.read_bytes() if self.path.is_file() else b""
            with replacing(self.path) as file:
                file.write(before)
                file.writelines(f"{entry >> 2:0{_DIGITS}x} {_STRICTNESS[entry & 3]}\n".encode() for entry in new)
        return len(new)

    def forget(self, identities: Iterable[str]) -> int:
        """Take the lines of conversations out, as far as this salt names them; returns how many there were."""
        gone = {b"%0*x" % (_DIGITS, self._key(identity)) for identity in identities}
        lines = [line for _, line in read_lines(self.path)] if self.path.is_file() else []
        kept = [line + b"\n" for line in lines if line[:_DIGITS] not in gone]
        if len(kept) < len(lines):
            with replacing(self.path) as file:
                file.writelines(kept)
        return len(lines) - len(kept)

    def _split_of(self, key: int) -> str | None:
        place = bisect_right(self._known, key << 2 | 3) - 1
        return _STRICTNESS[self._known[place] & 3] if place >= 0 and self._known[place] >> 2 == key else None

    def _key(self, identity: str) -> int:
        return self._hash(identity) >> (64 - 4 * _DIGITS)


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
