"""Clusters of conversations that say nearly the same: MinHash signatures, banded LSH, union by the oldest.

Signatures: 60 permutations over word pairs. Bands: 12 of 5 rows, so that a pair at Jaccard similarity 0.8 shares a
band with probability 0.99, one at 0.5 with 0.32 and one at 0.3 with 0.03; the signatures then decide (Leskovec,
Rajaraman, Ullman, "Mining of Massive Datasets", section 3.4).
"""

import re
from array import array
from collections.abc import Callable, Iterable
from functools import lru_cache
from itertools import chain

import numpy as np

from fine_tuning.common.columns import equal_pairs

PERMUTATIONS = 60
BANDS = 12
ROWS = PERMUTATIONS // BANDS
SEED = 1
_WORD = re.compile(r"\w+")
_ASCII_WORDS = "".join(chr(code).lower() if chr(code).isalnum() or code == 95 else " " for code in range(128))


def words_of(text: str) -> list[str]:
    """The words of a text in lower case."""
    return _words_line(text).split()


def _words_line(text: str) -> str:
    """The words of a text in lower case, between spaces."""
    # the same words as the pattern's, in a fifth of the time
    return text.translate(_ASCII_WORDS) if text.isascii() else " ".join(_WORD.findall(text.lower()))


def signatures(texts: Iterable[str]) -> bytes:
    """MinHash signature of each text over its word pairs (a single word where there is no pair): 60 unsigned 32-bit
    numbers, 240 bytes."""
    from rensa import RMinHash

    hashes, offsets = _hashed_pairs(texts)
    matrix = RMinHash.digest_matrix_from_flat_token_hashes(hashes, offsets, PERMUTATIONS, SEED)
    return array("I", chain.from_iterable(matrix.to_rows())).tobytes()


def _hashed_pairs(texts: Iterable[str]) -> tuple[np.ndarray, np.ndarray]:
    """(hashes of the word pairs of all texts, where those of each text begin, and the last end)."""
    codes = np.frombuffer("\n".join([" ", *map(_words_line, texts), ""]).encode(), np.uint8)
    inside = codes > ord(" ")
    edges = np.flatnonzero(inside[1:] != inside[:-1]) + 1
    starts, ends = edges[::2], edges[1::2]
    # The hash of a word: its bytes as coefficients of a polynomial over the powers of a number modulo 2**64.
    up, down = _powers(_BASE, len(codes)), _powers(pow(_BASE, -1, 1 << 64), len(codes))
    sums = np.cumsum(codes * up, dtype=np.uint64)
    words = np.append((sums[ends - 1] - sums[starts - 1]) * down[starts], np.uint64(0))
    after = np.searchsorted(starts, np.flatnonzero(codes == ord("\n")))  # words before the first text and after each
    counts = np.diff(after)
    offsets = np.concatenate([[0], np.cumsum(np.maximum(counts - 1, 1))])
    first = np.arange(offsets[-1]) + np.repeat(after[:-1] - offsets[:-1], np.diff(offsets))
    second = np.where(np.repeat(counts > 1, np.diff(offsets)), first + 1, len(starts))
    first = np.where(np.repeat(counts > 0, np.diff(offsets)), first, len(starts))
    hashes = words[first] * _MIXER + words[second]
    for shift in (30, 27, 31):
        hashes = (hashes ^ hashes >> np.uint64(shift)) * _MIXER
    return hashes, offsets


@lru_cache(maxsize=2)
def _powers_of(base: int, count: int) -> np.ndarray:
    return np.multiply.accumulate(np.full(count, base, np.uint64)) * np.uint64(pow(base, -1, 1 << 64))


def _powers(base: int, count: int) -> np.ndarray:
    """The powers of a number modulo 2**64, from the one of 0."""
    return _powers_of(base, 1 << (count - 1).bit_length())[:count]


def band_keys(signed: bytes) -> np.ndarray:
    """(signatures, bands): a key of each band of signatures; those whose numbers in it are the same have the same."""
    bands = np.frombuffer(signed, np.uint32).reshape(-1, BANDS, ROWS).astype(np.uint64)
    keys = np.zeros(bands.shape[:2], np.uint64)
    for number in range(ROWS):
        keys = (keys ^ bands[:, :, number]) * _MIXER
        keys ^= keys >> np.uint64(29)
    return keys


def similar_pairs(
    bands: Iterable[np.ndarray], signatures_of: Callable[[np.ndarray], np.ndarray], threshold: float
) -> np.ndarray:
    """(2, pairs): rows and earlier ones that they nearly duplicate, the earlier ones first.

    A row is compared with the first that has the same key in a band.

    Args:
        bands: of each band the keys of all rows.
        signatures_of: (rows, 60), the signatures of some rows.
        threshold: estimated Jaccard similarity from which two rows are near-duplicates.
    """
    found = [
        first.astype(np.uint64) << np.uint64(32) | later.astype(np.uint64) for first, later in map(equal_pairs, bands)
    ]
    pairs = np.sort(np.concatenate(found))
    pairs = pairs[np.concatenate([[True], pairs[1:] != pairs[:-1]])[: len(pairs)]]
    first, later = (pairs >> np.uint64(32)).astype(int), (pairs & np.uint64(0xFFFFFFFF)).astype(int)
    similar = np.zeros(len(pairs), bool)
    for start in range(0, len(pairs), _PORTION):
        portion = slice(start, start + _PORTION)
        differing = (signatures_of(first[portion]) != signatures_of(later[portion])).sum(axis=1)
        similar[portion] = 1 - differing / PERMUTATIONS >= threshold
    return np.stack([first[similar], later[similar]])


def clusters(count: int, pairs: np.ndarray) -> np.ndarray:
    """Of each of `count` rows the first row that it is joined with by a chain of pairs, (2, pairs)."""
    found, rows = np.arange(count, dtype=np.int32), np.unique(pairs)
    while True:
        ends = found[pairs]
        if not (apart := ends[0] != ends[1]).any():
            return found
        pairs, ends = pairs[:, apart], ends[:, apart]
        np.minimum.at(found, ends.max(axis=0), ends.min(axis=0))
        while ((further := found[found[rows]]) != found[rows]).any():
            found[rows] = further


_BASE = 0x9E3779B97F4A7C15
_MIXER = np.uint64(_BASE)
_PORTION = 1 << 14  # pairs whose signatures are in memory at a time
