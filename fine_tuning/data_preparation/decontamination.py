"""What a training conversation must not share with the test split: many words in a row.

Runs of words as in Brown et al. 2020, appendix C; theirs have 13. Most conversations share none, and that is seen at
few places of them: each run that two texts share has a piece that begins at a multiple of some number of words.
"""

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import cached_property
from typing import TYPE_CHECKING

from fine_tuning.common.writing_systems import WORDLIKE

_WORD = re.compile(rf"[{WORDLIKE}]|[^\W{WORDLIKE}]+")
_FOREIGN = re.compile(r"[^\x00-\x7f\W]")
_LETTERS = bytes(ord(chr(code).lower()) if chr(code).isalnum() or code == 95 else 32 for code in range(128)) * 2

if TYPE_CHECKING:
    from fine_tuning.schema.prepared import PreparedRow

Run = tuple[bytes, ...]


class HeldOut:
    """The runs of `length` words of held-out conversations."""

    def __init__(self, length: int) -> None:
        self.length = length
        # Wherever a run begins in a text, it holds a piece that begins at a multiple of `step`.
        self.piece = (length + 1) // 2  # shorter ones are common
        self.step = length - self.piece + 1
        self.pieces: set[Run] = set()
        self._texts: list[list[bytes]] = []

    def watch(self, rows: "Iterable[PreparedRow]") -> "Iterator[PreparedRow]":
        """Pass held-out rows on and take up the runs of their conversations, each once."""
        for row in rows:
            for words in _long_texts(row.conversation, self.length) if row.window == 0 else ():
                self.pieces.update(_runs(words, self.piece))
                self._texts.append(words)
            yield row

    @cached_property
    def runs(self) -> set[Run]:
        """Every run; computed when first needed."""
        return {run for words in self._texts for run in _runs(words, self.length)}

    def may_share(self, texts: Iterable[str]) -> bool:
        """Whether a conversation of these texts could share a run: a quick test that most fail."""
        return self._holds_piece(_words(" ".join(texts)))

    def shared_with(self, messages: list[dict]) -> set[Run]:
        """The runs that a conversation shares."""
        texts = filter(self._holds_piece, _long_texts(messages, self.length))
        return self.runs.intersection(run for words in texts for run in _runs(words, self.length))

    def _holds_piece(self, words: list[bytes]) -> bool:
        pieces = zip(*[words[start :: self.step] for start in range(self.piece)], strict=False)
        return not self.pieces.isdisjoint(pieces)


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
