"""Clusters of conversations that say nearly the same: MinHash signatures, banded LSH, union by the oldest.

Signatures: 64 permutations over word pairs. Bands: 16 of 4 rows, so that a pair at Jaccard similarity 0.8 shares a
band with probability 0.9998 and one at 0.4 with 0.34; the signatures then decide (Leskovec, Rajaraman, Ullman,
"Mining of Massive Datasets", section 3.4).
"""

import re
import sqlite3
from array import array
from collections.abc import Iterable
from itertools import pairwise

PERMUTATIONS = 64
BANDS = 16
ROWS = PERMUTATIONS // BANDS
SEED = 1
_WORD = re.compile(r"\w+")


def shingles(texts: Iterable[str]) -> list[str]:
    """Word pairs of the texts, lower case; single words where there is no pair."""
    words = _WORD.findall(" ".join(texts).lower())
    if len(words) < 2:
        return words or [""]
    return [f"{first} {second}" for first, second in pairwise(words)]


def signatures(documents: list[list[str]]) -> list[bytes]:
    """MinHash signature of each list of shingles: 64 unsigned 32-bit numbers, 256 bytes."""
    from rensa import RMinHash

    return [array("I", digest).tobytes() for digest in RMinHash.digests_from_token_sets(documents, PERMUTATIONS, SEED)]


def similarity(first: bytes, second: bytes) -> float:
    """Estimated Jaccard similarity of two signatures."""
    pairs = zip(memoryview(first).cast("I"), memoryview(second).cast("I"), strict=True)
    return sum(a == b for a, b in pairs) / PERMUTATIONS


class Clusters:
    """Joins rows 0, 1, 2, … that are near-duplicates or share a key. Its index lives in an SQLite database.

    Args:
        database: where bands, keys and signatures are kept; a file bounds the memory.
        threshold: estimated Jaccard similarity from which two conversations are near-duplicates; above 1: never.
    """

    def __init__(self, database: sqlite3.Connection, threshold: float) -> None:
        self._database, self._threshold = database, threshold
        self._parents = array("Q")
        database.execute("CREATE TEMP TABLE band (key BLOB PRIMARY KEY, row INTEGER) WITHOUT ROWID")
        database.execute("CREATE TEMP TABLE signature (row INTEGER PRIMARY KEY, signature BLOB)")

    def add(self, signature: bytes, keys: Iterable[bytes] = ()) -> int | None:
        """Add the next row; returns an earlier row that it nearly duplicates, or None."""
        row, twin = len(self._parents), None
        self._parents.append(row)
        for key in keys:
            if (first := self._first(b"k" + key, row)) != row:
                self._join(first, row)
        if self._threshold <= 1:
            compared: set[int] = set()
            width = 4 * ROWS
            for band in range(BANDS):
                key = bytes((band,)) + signature[band * width : (band + 1) * width]
                first = self._first(key, row)
                if first == row or first in compared:
                    continue
                compared.add(first)
                (other,) = self._database.execute("SELECT signature FROM signature WHERE row = ?", (first,)).fetchone()
                if other == signature or similarity(other, signature) >= self._threshold:
                    self._join(first, row)
                    twin = first if twin is None else min(twin, first)
            self._database.execute("INSERT INTO signature VALUES (?, ?)", (row, signature))
        return twin

    def cluster(self, row: int) -> int:
        """The first row of the cluster that a row is in."""
        while self._parents[row] != row:
            self._parents[row] = self._parents[self._parents[row]]
            row = self._parents[row]
        return row

    def _first(self, key: bytes, row: int) -> int:
        """The row that had this key first; `row` itself if nobody had."""
        found = self._database.execute("SELECT row FROM band WHERE key = ?", (key,)).fetchone()
        if found:
            return found[0]
        self._database.execute("INSERT INTO band VALUES (?, ?)", (key, row))
        return row

    def _join(self, first: int, second: int) -> None:
        first, second = self.cluster(first), self.cluster(second)
        if first != second:
            self._parents[max(first, second)] = min(first, second)
