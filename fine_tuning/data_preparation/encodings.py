"""Encoded conversations as columns, and which of their windows a split has."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fine_tuning.common.parallel import Map
from fine_tuning.data_preparation.catalogue import REASONS, Catalogue, Span
from fine_tuning.schema.prepared import PreparedRow

Encode = Callable[[list[Span]], list[list[PreparedRow] | str]]  # the windows of each, or why there are none
# Of a conversation: where its first row is (-1: nowhere), how many it has, why there are none (of REASONS), tokens.
FOUND = np.dtype([("place", np.int64), ("windows", np.int32), ("reason", np.int8), ("tokens", np.int32)])


@dataclass
class Chosen:
    """The windows of a split, in the order of the catalogue."""

    places: np.ndarray
    rows: np.ndarray  # of the catalogue: the conversation of each
    windows: np.ndarray  # which of the conversation's
    numbers: np.ndarray  # of the window among those that the split has
    counts: dict[int, Mapping[str, int]]  # of some windows what stands in place of their own

    def ordered(self, catalogue: Catalogue, some: np.ndarray | None = None) -> "Ordered":
        """All windows, or some in ascending order, in the order of the split."""
        some = np.arange(len(self.rows)) if some is None else some
        orders = catalogue.orders(self.rows[some])
        some, orders = some[order := np.argsort(orders, kind="stable")], orders[order]
        changed = np.flatnonzero(np.isin(some, list(self.counts)))
        counts = {at: self.counts[place] for at, place in zip(changed.tolist(), some[changed].tolist(), strict=True)}
        return Ordered(self.places[some], orders, self.numbers[some], catalogue.cluster_names(self.rows[some]), counts)


@dataclass
class Ordered:
    """The rows of a split, or some of them, in its order."""

    places: np.ndarray
    orders: np.ndarray
    numbers: np.ndarray
    clusters: np.ndarray  # of the conversation of each; None: its own id
    counts: dict[int, Mapping[str, int]]


class HeldRows:
    """Rows of a build that are in memory and nowhere else."""

    def __init__(self) -> None:
        self._rows: list[PreparedRow] = []

    def find(self, lines: np.ndarray) -> np.ndarray:
        """Nothing is known: FOUND of nothing."""
        return np.full(len(lines), -1).astype(FOUND)

    def encode(self, encode: Encode, pieces: Iterable[tuple[np.ndarray, list[Span]]], run: Map) -> Iterator[np.ndarray]:
        """FOUND of the conversations of each piece, (hashes of their lines, where they are)."""
        return map(self._add, run(encode, (spans for _, spans in pieces)))

    def _add(self, encoded: Sequence[list[PreparedRow] | str]) -> np.ndarray:
        found: list[tuple[Any, ...]] = []
        for rows in encoded:
            if isinstance(rows, str):
                found.append((0, 1, REASONS.index(rows), 0))
            else:
                found.append((len(self._rows), len(rows), 0, sum(len(row.input_ids) for row in rows)))
                self._rows += rows
        return np.array(found, FOUND)

    def lengths(self, place: int, windows: int) -> tuple[np.ndarray, tuple[int, int]]:
        """Tokens of each window of a conversation, and what of its turns and reply tokens is in none."""
        rows = self._rows[place : place + windows]
        lost = tuple(rows[0].counts.get(name, 0) for name in ("lost_turns", "lost_reply_tokens"))
        return np.array([len(row.input_ids) for row in rows]), lost

    def take(self, chosen: Ordered) -> Iterator[PreparedRow]:
        """The chosen rows in their order."""
        columns = zip(
            chosen.places.tolist(), chosen.numbers.tolist(), chosen.orders.tolist(), chosen.clusters, strict=True
        )
        for at, (place, number, order, cluster) in enumerate(columns):
            row = self._rows[place]
            row.window, row.order, row.cluster = number, order, cluster or row.id
            row.counts = {**row.counts, **chosen.counts.get(at, {})}
            yield row
