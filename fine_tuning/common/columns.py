"""Columns of numbers, millions of them: which hashes are equal, and where hashes are found again."""

import ctypes
from contextlib import suppress
from typing import Literal

import numpy as np

_RANGE = 17  # as a power of two: keys that are looked through at a time, about
_BLOCK = 1 << 16  # keys that are sorted at a time


def equal_pairs(keys: np.ndarray) -> np.ndarray:
    """(2, pairs): the first row of each key that several have, and each of the others."""
    rows, starts, sizes = equal_groups(keys)
    first = np.repeat(rows[starts], sizes)
    return np.stack([first, rows])[:, first != rows]


def equal_groups(keys: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(rows whose key others have too, by key and in order; where those of each key begin, how many there are)."""
    rows = _perhaps_several(keys)
    rows = rows[np.argsort(keys[rows], kind="stable")]
    starts = np.flatnonzero(np.diff(keys[rows], prepend=~keys[rows[:1]]))
    sizes = np.diff(starts, append=len(rows))
    rows, sizes = rows[np.repeat(sizes > 1, sizes)], sizes[sizes > 1]
    return rows, np.cumsum(sizes) - sizes, sizes


def _perhaps_several(keys: np.ndarray) -> np.ndarray:
    """The rows whose key others may have too, by the first bits of keys that are hashes: sorting all takes longer.
    Range by range, as the table of one fits into the processor's cache."""
    spare, found = (len(keys) >> _RANGE).bit_length(), np.zeros(len(keys), np.bool_)
    places = (keys >> np.uint64(61 - _RANGE - spare)).astype(np.uint32)
    ranges, last = (places >> (_RANGE + 3)).astype(np.uint16), np.empty(8 << _RANGE, np.int32)
    for number in range(1 << spare):
        rows = np.flatnonzero(ranges == number).astype(np.int32)
        here, several = places[rows] & ((8 << _RANGE) - 1), np.zeros(8 << _RANGE, np.bool_)
        last[here] = rows
        several[here[last[here] != rows]] = True
        found[rows] = several[here]
    return np.flatnonzero(found).astype(np.int32)


def search(ranked: np.ndarray, keys: np.ndarray, side: Literal["left", "right"] = "left") -> np.ndarray:
    """`np.searchsorted`, for many keys in any order: of sorted ones neighbours are in the processor's cache."""
    places = np.empty(len(keys), np.int32)
    for start in range(0, len(keys), _BLOCK):
        block = keys[start : start + _BLOCK]
        order = np.argsort(block)
        places[start + order] = np.searchsorted(ranked, block[order], side)
    return places


def find(ranked: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """The place of each key among sorted ones; -1 where it is none of them."""
    if not len(ranked):
        return np.full(len(keys), -1, np.int32)
    places: np.ndarray = np.minimum(search(ranked, keys), len(ranked) - 1)
    places[ranked[places] != keys] = -1
    return places


def stretches(values: np.ndarray) -> tuple[list[int], list[int]]:
    """Where stretches of equal values begin and end."""
    starts = np.flatnonzero(np.concatenate([[True], values[1:] != values[:-1]])) if len(values) else values
    return starts.tolist(), [*starts[1:].tolist(), len(values)][: len(starts)]


def release_memory() -> None:
    """Give freed memory back to the system: glibc keeps up to 64 MB of columns that are gone. Elsewhere nothing."""
    with suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)
