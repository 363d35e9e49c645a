"""Sticky splits: conversations with their clusters and the ledger of earlier deals in; a split for each, out.

Near-duplicates share a cluster and a cluster shares a split, so no test item was trained on. The ledger remembers
every deal by conversation id: what was train stays train when other conversations come and go.
"""

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

SPLITS = ("train", "validation", "test")
LEFT_OUT = "none"  # in the ledger: near-duplicates on both sides, so part of no split


class Member(NamedTuple):
    """A conversation as the deal sees it. `started_at` is ISO 8601 or None."""

    id: str
    cluster: str
    started_at: str | None = None


@dataclass(frozen=True)
class Fractions:
    """How newcomers are dealt. Fractions are of clusters; what is left is train.

    With `latest_from` (an ISO date), test is what started on or after it instead of a random fraction.
    """

    validation: float
    test: float
    latest_from: str | None = None


def assign_splits(
    members: Iterable[Member], dealt: Mapping[str, str], fractions: Fractions, salt: str
) -> dict[str, str]:
    """Split of every member by id: one of SPLITS, or LEFT_OUT.

    A member that stands in `dealt` keeps its split, whatever happened to its cluster. The newcomers of a cluster join
    the split of its earlier members; if those are in different splits, the newcomer links what must stay apart, and is
    left out. A cluster of newcomers goes where the salted hash of its id says. So that little data works too, an empty
    split takes a cluster of newcomers from one that has others: train first, then test, then validation.
    """
    clusters: dict[str, list[Member]] = {}
    for member in members:
        clusters.setdefault(member.cluster, []).append(member)

    splits: dict[str, str] = {}
    fresh: dict[str, str] = {}
    filled: Counter[str] = Counter()
    for cluster, of_cluster in clusters.items():
        known = {dealt[member.id] for member in of_cluster if member.id in dealt} - {LEFT_OUT}
        if not known:
            # Members that were left out earlier stay so; only a cluster with newcomers is dealt.
            if any(member.id not in dealt for member in of_cluster):
                fresh[cluster] = _deal(cluster, of_cluster, fractions, salt)
                filled[fresh[cluster]] += 1
            joined = fresh.get(cluster, LEFT_OUT)
        else:
            filled.update(known)
            joined = known.pop() if len(known) == 1 else LEFT_OUT
        for member in of_cluster:
            splits[member.id] = dealt.get(member.id, joined)

    for cluster, split in _fill_empty(fresh, filled, fractions, salt).items():
        for member in clusters[cluster]:
            splits[member.id] = dealt.get(member.id, split)
    return splits


def salted_fraction(salt: str, key: str) -> float:
    """A number in [0, 1) that is the same for the same salt and key, everywhere and always."""
    digest = hashlib.blake2b(key.encode("utf-8"), digest_size=8, key=salt.encode("utf-8")[:64]).digest()
    return int.from_bytes(digest[:7], "big") / 2**56


def _deal(cluster: str, members: list[Member], fractions: Fractions, salt: str) -> str:
    draw = salted_fraction(salt, cluster)
    if fractions.latest_from is not None:
        oldest = min((member.started_at or "")[:10] for member in members)
        if oldest >= fractions.latest_from:
            return "test"
    elif draw < fractions.test:
        return "test"
    # The same stretch of draws whichever way test is chosen: validation does not change with it.
    if fractions.test <= draw < fractions.test + fractions.validation:
        return "validation"
    return "train"


def _fill_empty(fresh: dict[str, str], filled: Counter[str], fractions: Fractions, salt: str) -> dict[str, str]:
    """The clusters of newcomers that have to move, and where to, so that no wanted split is empty."""
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
