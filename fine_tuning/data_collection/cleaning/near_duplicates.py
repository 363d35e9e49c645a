"""Clusters of conversations that say nearly the same: MinHash signatures, banded LSH, union by the oldest.

Signatures: 60 permutations over word pairs. Bands: 12 of 5 rows, so that a pair at Jaccard similarity 0.8 shares a
band with probability 0.99, one at 0.5 with 0.32 and one at 0.3 with 0.03; the signatures then decide (Leskovec,
Rajaraman, Ullman, "Mining of Massive Datasets", section 3.4).
"""

import os
import re
import sqlite3
from array import array
from collections.abc import Iterable, Iterator
from functools import lru_cache
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


def _differing(bits: int) -> int:
    """How many 32-bit lanes are not zero, all at once: a tenth of the time of a loop."""
    return ((((bits & _LOW_BITS) + _LOW_BITS) | bits) & _TOP_BITS).bit_count()


class Clusters:
    """Joins rows 0, 1, 2, … that are near-duplicates or share a key. Its index lives in an SQLite database.

    Args:
        database: where bands and keys are kept; a file bounds the memory, and one that is kept can be continued.
        signatures: a file, unbuffered, for the signatures: a third of the time that a table of them takes.
        threshold: estimated Jaccard similarity from which two conversations are near-duplicates; above 1: never.
        parents: what the `parents` of earlier rows were, to go on from them.
    """

    def __init__(
        self, database: sqlite3.Connection, signatures: FileIO, threshold: float, parents: Iterable[int] = ()
    ) -> None:
        self._database, self._threshold = database, threshold
        self.parents = array("I", parents)
        database.execute("CREATE TABLE IF NOT EXISTS band (key INTEGER PRIMARY KEY, row INTEGER)")
        self._signatures = signatures.fileno()
        # Those that begin a band are asked for again and again.
        self._signature_of = lru_cache(1024)(self._read_signature)

    def _read_signature(self, row: int) -> int:
        return int.from_bytes(os.pread(self._signatures, SIGNATURE_BYTES, row * SIGNATURE_BYTES), "little")

    def add(self, rows: Iterable[tuple[bytes | None, list[str]]], duplicates: bool = True) -> list[int | None]:
        """Add the next rows, each a signature and keys in hexadecimal digits; without a signature, the keys only.

        Returns for each the first earlier row that it nearly duplicates, or None. Where no `duplicates` are wanted,
        rows of one cluster are not compared again.
        """
        wanted = [([index_key(key) for key in keys], self._bands(signature), signature) for signature, keys in rows]
        # Sorted, and many in a statement: a key at a time costs ten times as much.
        asked = sorted({key for shared, bands, _ in wanted for key in (*shared, *bands)})
        found: dict[int, int] = {}
        for keys in _portions(asked):
            marks = ",".join("?" * len(keys))
            found.update(self._database.execute(f"SELECT key, row FROM band WHERE key IN ({marks})", keys))
        new: dict[int, int] = {}
        nearest = []
        for shared, bands, signature in wanted:
            row = len(self.parents)
            self.parents.append(row)
            for key in shared:
                if key in found:
                    self._join(found[key], row)
            nearest.append(self._join_similar(row, signature, bands, found, duplicates) if bands else None)
            for key in (*shared, *bands):
                if key not in found:
                    found[key] = new[key] = row
        for keys in _portions(sorted(new)):
            marks = ",".join(["(?,?)"] * len(keys))
            values = [value for key in keys for value in (key, new[key])]
            self._database.execute(f"INSERT INTO band VALUES {marks}", values)
        return nearest

    def _bands(self, signature: bytes | None) -> list[int]:
        if signature is None or self._threshold > 1:
            return []
        return [(int.from_bytes(signature[at : at + _WIDTH], "little") + at) % _PRIME for at in _BAND_STARTS]

    def _join_similar(
        self, row: int, signature: bytes, bands: list[int], found: dict[int, int], duplicates: bool
    ) -> int | None:
        first_alike, own, root = None, int.from_bytes(signature, "little"), self.cluster(row)
        for first in sorted({found[key] for key in bands if key in found}):
            if not duplicates and self.cluster(first) == root:
                continue
            if 1 - _differing(own ^ self._signature_of(first)) / PERMUTATIONS >= self._threshold:
                self._join(first, row)
                root = self.cluster(row)
                first_alike = first if first_alike is None else first_alike
        os.pwrite(self._signatures, signature, row * SIGNATURE_BYTES)
        return first_alike

    def cluster(self, row: int) -> int:
        """The first row of the cluster that a row is in."""
        parents = self.parents
        while parents[row] != row:
            parents[row] = parents[parents[row]]
            row = parents[row]
        return row

    def _join(self, first: int, second: int) -> None:
        first, second = self.cluster(first), self.cluster(second)
        if first != second:
            self.parents[max(first, second)] = min(first, second)


_PRIME = (1 << 61) - 1
_PORTION = 400  # keys in a statement


def index_key(digest: str) -> int:
    """A hex digest's first 60 bits: as a key of an index an integer is quickest, and the same in every process."""
    return int(digest[:15], 16)


def _portions(keys: list[int]) -> Iterator[list[int]]:
    for start in range(0, len(keys), _PORTION):
        yield keys[start : start + _PORTION]
