"""Sticky splits: conversations with their clusters and the ledger of earlier deals in; a split for each, out.

Near-duplicates share a cluster and a cluster shares a split, so no test item was trained on. The ledger remembers
every deal by conversation id: what was train stays train when other conversations come and go.
"""

import hashlib
from bisect import insort
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

SPLITS = ("train", "validation", "test")
LEFT_OUT = "none"  # in the ledger: near-duplicates on both sides, so part of no split
_NO_SPLIT = {LEFT_OUT, None}


class Member(NamedTuple):
    """A conversation as the deal sees it. `started_at` is ISO 8601 or None."""

    id: str
    cluster: str
    started_at: str | None = None

    @property
    def date(self) -> str:
        """The day it started, "" if that is unknown."""
        return (self.started_at or "")[:10]


@dataclass(frozen=True)
class Fractions:
    """How newcomers are dealt. Fractions are of clusters; what is left is train.

    With `latest_from` (an ISO date), test is what started on or after it instead of a random fraction.
    """

    validation: float
    test: float
    latest_from: str | None = None


class Deal:
    """Deals clusters one by one, in any order and each once; `moved` then says which have to move after all.

    A conversation that was dealt keeps its split, whatever happened to its cluster. The newcomers of a cluster join
    the split of its earlier members; if those are in different splits, the newcomer links what must stay apart, and is
    left out. A cluster of newcomers goes where the salted hash of its id says. So that little data works too, an empty
    split takes a cluster of newcomers from one that has others: train first, then test, then validation.
    """

    def __init__(self, fractions: Fractions, salt: str) -> None:
        self._fractions, self._salt, self._draw = fractions, salt, salted_fractions(salt)
        self._filled: Counter[str] = Counter()
        # Of each split the clusters of newcomers that would leave it first: no more than one a split ever does.
        self._donors: dict[str, list[tuple[float, str]]] = {split: [] for split in SPLITS}

    def newcomers(self, cluster: str, oldest: str, dealt: Collection[str | None]) -> str:
        """The split of a cluster's newcomers: one of SPLITS or LEFT_OUT.

        Args:
            oldest: date of its oldest member, of all the first 10 characters of `started_at`; "" for unknown.
            dealt: the splits that its members were dealt to; with None if there are newcomers.
        """
        if known := set(dealt) - _NO_SPLIT:
            self._filled.update(known)
            return known.pop() if len(known) == 1 else LEFT_OUT
        # Members that were left out earlier stay so; only a cluster with newcomers is dealt.
        if None not in dealt:
            return LEFT_OUT
        draw = self._draw(cluster)
        split = _deal(draw, oldest, self._fractions)
        self._filled[split] += 1
        donors = self._donors[split]
        if len(donors) < len(SPLITS) or (draw, cluster) < donors[-1]:
            insort(donors, (draw, cluster))
            del donors[len(SPLITS) :]
        return split

    def moved(self) -> dict[str, str]:
        """The clusters of newcomers that have to move, and where to, so that no wanted split is empty."""
        fresh = {cluster: split for split, donors in self._donors.items() for _, cluster in donors}
        return _fill_empty(fresh, self._filled.copy(), self._fractions, self._salt)


def assign_splits(
    members: Iterable[Member], dealt: Mapping[str, str], fractions: Fractions, salt: str
) -> dict[str, str]:
    """Split of every member by id: one of SPLITS, or LEFT_OUT. A member that stands in `dealt` keeps its split."""
    clusters: dict[str, list[Member]] = {}
    for member in members:
        clusters.setdefault(member.cluster, []).append(member)
    deal = Deal(fractions, salt)
    joined = {
        cluster: deal.newcomers(cluster, min(m.date for m in of_cluster), {dealt.get(m.id) for m in of_cluster})
        for cluster, of_cluster in clusters.items()
    }
    joined |= deal.moved()
    return {m.id: dealt.get(m.id, joined[cluster]) for cluster, of_cluster in clusters.items() for m in of_cluster}


def salted_fraction(salt: str, key: str) -> float:
    """A number in [0, 1) that is the same for the same salt and key, everywhere and always."""
    return salted_fractions(salt)(key)


def salted_fractions(salt: str) -> Callable[[str], float]:
    """`salted_fraction` of many keys with the same salt."""
    fresh = hashlib.blake2b(digest_size=8, key=salt.encode("utf-8")[:64]).copy

    def fraction(key: str) -> float:
        digest = fresh()
        digest.update(key.encode())
        return (int.from_bytes(digest.digest(), "big") >> 8) * 2**-56

    return fraction


def _deal(draw: float, oldest: str, fractions: Fractions) -> str:
    if fractions.latest_from is not None:
        if oldest >= fractions.latest_from:
            return "test"
    elif draw < fractions.test:
        return "test"
    # The same stretch of draws whichever way test is chosen: validation does not change with it.
    if fractions.test <= draw < fractions.test + fractions.validation:
        return "validation"
    return "train"


def _fill_empty(fresh: dict[str, str], filled: Counter[str], fractions: Fractions, salt: str) -> dict[str, str]:
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
            donor = min(donors, key=lambda cluster: (salted_fraction(salt, cluster), cluster))
            filled[(fresh | moved)[donor]] -= 1
            filled[split] += 1
            moved[donor] = split
    return moved
