"""Rows in order, however many: memory does not grow with their number."""

import heapq
import marshal
from collections.abc import Callable, Iterator
from typing import IO, Any

HELD = 20_000  # rows that are held until they are sorted and written
BLOCK = 100  # rows of a sorted stretch that are read at a time


class SortedRows:
    """Tuples of plain values, which come out in order and as often as they are wanted; equal ones as they came in.

    Args:
        scratch: a file for those that are too many to hold; several can share it.
        key: what they are sorted by; None: the whole tuple.
    """

    def __init__(self, scratch: IO[bytes], key: Callable[[tuple], Any] | None = None) -> None:
        self._scratch, self._key = scratch, key
        self._held: list[tuple] = []
        self._stretches: list[list[tuple[int, int]]] = []  # of each its blocks: where they begin, and how long they are

    def add(self, row: tuple) -> None:
        """Take a row in; not while they come out."""
        self._held.append(row)
        if len(self._held) == HELD:
            self._write()

    def __iter__(self) -> Iterator[tuple]:
        self._held.sort(key=self._key)
        return heapq.merge(*map(self._read, self._stretches), self._held, key=self._key)

    def _write(self) -> None:
        self._held.sort(key=self._key)
        place, stretch = self._scratch.seek(0, 2), []
        for start in range(0, len(self._held), BLOCK):
            size = self._scratch.write(marshal.dumps(self._held[start : start + BLOCK]))
            stretch.append((place, size))
            place += size
        self._stretches.append(stretch)
        self._held = []

    def _read(self, stretch: list[tuple[int, int]]) -> Iterator[tuple]:
        for place, size in stretch:
            self._scratch.seek(place)
            yield from marshal.loads(self._scratch.read(size))
