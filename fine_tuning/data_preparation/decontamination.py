"""What a training conversation must not share with the test split: many words in a row.

Runs of words as in Brown et al. 2020, appendix C; theirs have 13. Most conversations share none, and that is seen at
few places of them: each run that two texts share has a piece that begins at a multiple of some number of words.
"""

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import cached_property
from hashlib import blake2b

import numpy as np

from fine_tuning.common.writing_systems import WORDLIKE

_WORD = re.compile(rf"[{WORDLIKE}]|[^\W{WORDLIKE}]+")
_FOREIGN = re.compile(r"[^\x00-\x7f\W]")
_LETTERS = bytes(ord(chr(code).lower()) if chr(code).isalnum() or code == 95 else 32 for code in range(128)) * 2

Run = tuple[bytes, ...]


class HeldOut:
    """The runs of `length` words of held-out conversations."""

    def __init__(self, length: int) -> None:
        self.length = length
        # Wherever a run begins in a text, it holds a piece that begins at a multiple of `step`.
        self.piece = (length + 1) // 2  # shorter ones are common
        self.step = length - self.piece + 1
        self._pieces: set[int] = set()
        self._texts: list[list[bytes]] = []

    def add(self, messages: Iterable[dict]) -> None:
        """Take up the runs of a held-out conversation."""
        for words in _long_texts(messages, self.length):
            self._pieces.update(map(_hash, _runs(words, self.piece)))
            self._texts.append(words)

    @property
    def pieces(self) -> np.ndarray:
        """Hashes of the pieces of all runs, sorted."""
        return np.sort(np.fromiter(self._pieces, np.uint64, len(self._pieces)))

    @cached_property
    def runs(self) -> set[Run]:
        """Every run; computed when first needed."""
        return {run for words in self._texts for run in _runs(words, self.length)}

    def pieces_of(self, texts: Iterable[str]) -> list[int]:
        """Hashes of those places of a conversation of these texts that tell whether it could share a run."""
        return list(map(_hash, self._places(_words(" ".join(texts)))))

    def shared_with(self, messages: list[dict]) -> set[Run]:
        """The runs that a conversation shares."""
        texts = filter(self._holds_piece, _long_texts(messages, self.length))
        return self.runs.intersection(run for words in texts for run in _runs(words, self.length))

    def _holds_piece(self, words: list[bytes]) -> bool:
        return not self._pieces.isdisjoint(map(_hash, self._places(words)))

    def _places(self, words: list[bytes]) -> Iterable[Run]:
        return zip(*[words[start :: self.step] for start in range(self.piece)], strict=False)


def _hash(run: Run) -> int:
    """64 bits. Two pieces with the same only make a conversation be looked at that shares nothing."""
    return int.from_bytes(blake2b(b" ".join(run), digest_size=8).digest(), "little")


def repeating(shared: dict[str, set[Run]], conversations: int) -> set[str]:
    """The ids of training conversations that repeat the held-out ones, of `conversations` that were looked through.

    What more than ten of them say, or a tenth of few, is a common phrase and no sign of a copy (NeMo Curator's
    TaskDecontamination has the same ten).
    """
    counts = Counter(run for runs in shared.values() for run in runs)
    common = min(10, max(1, conversations // 10))
    return {identity for identity, runs in shared.items() if any(counts[run] <= common for run in runs)}


def _long_texts(messages: Iterable[dict], least: int) -> Iterator[list[bytes]]:
    """The words of every message of at least `least` words, system messages apart."""
    for message in messages:
        # A text of fewer characters cannot have as many words.
        if message["role"] != "system" and len(message["content"]) >= least:
            words = _words(message["content"])
            if len(words) >= least:
                yield words


def _runs(words: list[bytes], length: int) -> Iterable[Run]:
    """`length` neighbouring words from every position."""
    return zip(*(words[start:] for start in range(length)), strict=False)


def _words(text: str) -> list[bytes]:
    """Lower case, in UTF-8: where all letters are ASCII, as mostly, that is one pass of a table."""
    if not text.isascii():
        text = text.casefold()
        if _FOREIGN.search(text):
            return [word.encode() for word in _WORD.findall(text)]
    return text.encode("ascii", "replace").translate(_LETTERS).split()
