"""Clusters of conversations that say nearly the same: MinHash signatures, banded LSH, union by the oldest.

Signatures: 60 permutations over word pairs. Bands: 12 of 5 rows, so that a pair at Jaccard similarity 0.8 shares a
band with probability 0.99, one at 0.5 with 0.32 and one at 0.3 with 0.03; the signatures then decide (Leskovec,
Rajaraman, Ullman, "Mining of Massive Datasets", section 3.4).
"""

import re
import sqlite3
from array import array
from collections.abc import Iterable
from itertools import pairwise

PERMUTATIONS = 60
BANDS = 12
ROWS = PERMUTATIONS // BANDS
SEED = 1
_WIDTH = 4 * ROWS
_TOP_BITS = int.from_bytes(b"\x00\x00\x00\x80" * PERMUTATIONS, "little")
_LOW_BITS = int.from_bytes(b"\xff\xff\xff\x7f" * PERMUTATIONS, "little")
_WORD = re.compile(r"\w+")


def shingles(texts: Iterable[str]) -> list[str]:
    """Word pairs of the texts, lower case; single words where there is no pair."""
    words = _WORD.findall(" ".join(texts).lower())
    if len(words) < 2:
        return words or [""]
    return list(map(" ".join, pairwise(words)))


def signatures(documents: list[list[str]]) -> list[bytes]:
    """MinHash signature of each list of shingles: 60 unsigned 32-bit numbers, 240 bytes."""
    from rensa import RMinHash

    return [array("I", digest).tobytes() for digest in RMinHash.digests_from_token_sets(documents, PERMUTATIONS, SEED)]


def similarity(first: bytes, second: bytes) -> float:
    """Estimated Jaccard similarity of two signatures."""
    different = int.from_bytes(first, "little") ^ int.from_bytes(second, "little")
    # The top bit of each 32-bit lane that is not zero, all lanes at once: a tenth of the time of a loop.
    marked = (((different & _LOW_BITS) + _LOW_BITS) | different) & _TOP_BITS
    return 1 - marked.bit_count() / PERMUTATIONS


class Clusters:
    """Joins rows 0, 1, 2, … that are near-duplicates or share a key. Its index lives in an SQLite database.

    Args:
        database: where bands, keys and signatures are kept; a file bounds the memory.
        threshold: estimated Jaccard similarity from which two conversations are near-duplicates; above 1: never.
    """

    def __init__(self, database: sqlite3.Connection, threshold: float) -> None:
        self._database, self._threshold = database, threshold
        self._parents = array("Q")
        database.execute("CREATE TABLE band (key INTEGER PRIMARY KEY, row INTEGER)")
        database.execute("CREATE TABLE signature (row INTEGER PRIMARY KEY, signature BLOB)")

    def add(self, signature: bytes, keys: Iterable[str] = ()) -> int | None:
        """Add the next row; returns an earlier row that it nearly duplicates, or None."""
        row, twin = len(self._parents), None
        self._parents.append(row)
        shared = [hash(key) for key in keys]
        bands = [hash((band, signature[band * _WIDTH : (band + 1) * _WIDTH])) for band in range(BANDS)]
        wanted = shared + (bands if self._threshold <= 1 else [])
        # The keys of a row are looked up and added in one statement each: a statement a key costs ten times as much.
        marks = ",".join("?" * len(wanted))
        found = dict(self._database.execute(f"SELECT key, row FROM band WHERE key IN ({marks})", wanted))
        for key in shared:
            if key in found:
                self._join(found[key], row)
        if self._threshold <= 1:
            candidates = sorted({found[key] for key in bands if key in found})
            marks = ",".join("?" * len(candidates))
            for first, other in self._database.execute(
                f"SELECT row, signature FROM signature WHERE row IN ({marks}) ORDER BY row", candidates
            ):
                if other == signature or similarity(other, signature) >= self._threshold:
                    self._join(first, row)
                    twin = first if twin is None else twin
            self._database.execute("INSERT INTO signature VALUES (?, ?)", (row, signature))
        new = {key: row for key in wanted if key not in found}
        self._database.executemany("INSERT INTO band VALUES (?, ?)", new.items())
        return twin

    def cluster(self, row: int) -> int:
        """The first row of the cluster that a row is in."""
        while self._parents[row] != row:
            self._parents[row] = self._parents[self._parents[row]]
            row = self._parents[row]
        return row

    def _join(self, first: int, second: int) -> None:
        first, second = self.cluster(first), self.cluster(second)
        if first != second:
            self._parents[max(first, second)] = min(first, second)
