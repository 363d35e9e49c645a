"""Clusters of conversations that say nearly the same: MinHash signatures, banded LSH, union by the oldest.

Signatures: 60 permutations over word pairs. Bands: 12 of 5 rows, so that a pair at Jaccard similarity 0.8 shares a
band with probability 0.99, one at 0.5 with 0.32 and one at 0.3 with 0.03; the signatures then decide (Leskovec,
Rajaraman, Ullman, "Mining of Massive Datasets", section 3.4).
"""

import os
import re
import sqlite3
from array import array
from collections.abc import Iterable
from io import FileIO
from itertools import pairwise

PERMUTATIONS = 60
BANDS = 12
ROWS = PERMUTATIONS // BANDS
SEED = 1
SIGNATURE_BYTES = 4 * PERMUTATIONS
_WIDTH = 4 * ROWS
_BAND_STARTS = range(0, SIGNATURE_BYTES, _WIDTH)
_TOP_BITS = int.from_bytes(b"\x00\x00\x00\x80" * PERMUTATIONS, "little")
_LOW_BITS = int.from_bytes(b"\xff\xff\xff\x7f" * PERMUTATIONS, "little")
_WORD = re.compile(r"\w+")


_ASCII_WORDS = "".join(chr(code).lower() if chr(code).isalnum() or code == 95 else " " for code in range(128))


def words_of(text: str) -> list[str]:
    """The words of a text in lower case."""
    # the same words as the pattern's, in a fifth of the time
    return text.translate(_ASCII_WORDS).split() if text.isascii() else _WORD.findall(text.lower())


def shingles(texts: Iterable[str]) -> list[str]:
    """Word pairs of the texts, lower case; single words where there is no pair."""
    words = words_of(" ".join(texts))
    if len(words) < 2:
        return words or [""]
    return list(map(" ".join, pairwise(words)))


def signatures(documents: list[list[str]]) -> list[bytes]:
    """MinHash signature of each list of shingles: 60 unsigned 32-bit numbers, 240 bytes."""
    from rensa import RMinHash

    return [array("I", digest).tobytes() for digest in RMinHash.digests_from_token_sets(documents, PERMUTATIONS, SEED)]


def similarity(first: bytes, second: bytes) -> float:
    """Estimated Jaccard similarity of two signatures."""
    return 1 - _differing(int.from_bytes(first, "little") ^ int.from_bytes(second, "little")) / PERMUTATIONS


def _differing(bits: int) -> int:
    """How many 32-bit lanes are not zero, all at once: a tenth of the time of a loop."""
    return ((((bits & _LOW_BITS) + _LOW_BITS) | bits) & _TOP_BITS).bit_count()


class Clusters:
    """Joins rows 0, 1, 2, … that are near-duplicates or share a key. Its index lives in an SQLite database.

    Args:
        database: where bands and keys are kept; a file bounds the memory.
        signatures: an empty file, unbuffered, for the signatures: a third of the time that a table of them takes.
        threshold: estimated Jaccard similarity from which two conversations are near-duplicates; above 1: never.
    """

    def __init__(self, database: sqlite3.Connection, signatures: FileIO, threshold: float) -> None:
        self._database, self._threshold = database, threshold
        self._parents = array("I")
        database.execute("CREATE TABLE band (key INTEGER PRIMARY KEY, row INTEGER)")
        self._signatures = signatures.fileno()

    def add(self, signature: bytes | None, keys: Iterable[str] = ()) -> int | None:
        """Add the next row; returns an earlier row that it nearly duplicates, or None. No signature: keys only."""
        row, twin = len(self._parents), None
        self._parents.append(row)
        shared = [hash(key) for key in keys]
        bands = []
        if signature is not None and self._threshold <= 1:
            bands = [hash((band, signature[band : band + _WIDTH])) for band in _BAND_STARTS]
        wanted = shared + bands
        # The keys of a row are looked up and added in one statement each: a statement a key costs ten times as much.
        marks = ",".join("?" * len(wanted))
        found = dict(self._database.execute(f"SELECT key, row FROM band WHERE key IN ({marks})", wanted))
        for key in shared:
            if key in found:
                self._join(found[key], row)
        if bands:
            own, file = int.from_bytes(signature, "little"), self._signatures
            for first in sorted({found[key] for key in bands if key in found}):
                other = os.pread(file, SIGNATURE_BYTES, first * SIGNATURE_BYTES)
                if 1 - _differing(own ^ int.from_bytes(other, "little")) / PERMUTATIONS >= self._threshold:
                    self._join(first, row)
                    twin = first if twin is None else twin
            os.pwrite(file, signature, row * SIGNATURE_BYTES)
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
