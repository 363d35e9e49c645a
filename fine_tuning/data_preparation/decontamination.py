"""What a training conversation must not share with the test split: many words in a row.

Runs of words as in Brown et al. 2020, appendix C; theirs have 13. A run that two texts share holds half a run that
starts at a multiple of its length in either of them, so those few are looked up first.
"""

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import cached_property
from typing import TYPE_CHECKING

# Letters of scripts that write no spaces count as words of their own.
_WORD = re.compile(r"[぀-ヿ㐀-鿿가-힣]|[^\W぀-ヿ㐀-鿿가-힣]+")
_LETTERS = bytes(ord(chr(code).lower()) if chr(code).isalnum() or code == 95 else 32 for code in range(128)) * 2

if TYPE_CHECKING:
    from fine_tuning.data_preparation.dataset_builder import Example

Run = tuple[bytes, ...]


class HeldOut:
    """The runs of `length` words of held-out conversations."""

    def __init__(self, length: int) -> None:
        self.length, self.half = length, (length + 1) // 2
        self.halves: set[Run] = set()
        self._texts: list[list[bytes]] = []

    def watch(self, examples: "Iterable[Example]") -> "Iterator[Example]":
        """Pass held-out examples on and take up their runs."""
        for example in examples:
            for words in _long_texts(example.messages, self.length):
                self.halves.update(_runs(words, self.half))
                self._texts.append(words)
            yield example

    @cached_property
    def runs(self) -> set[Run]:
        """Every run; most often nobody asks for them."""
        return {run for words in self._texts for run in _runs(words, self.length)}

    def shared_with(self, messages: list[dict]) -> set[Run]:
        """The runs that a conversation has too."""
        texts = list(_long_texts(messages, self.length))
        if all(self.halves.isdisjoint(_apart(words, self.half)) for words in texts):
            return set()
        return self.runs.intersection(run for words in texts for run in _runs(words, self.length))


def repeating(shared: dict[str, set[Run]], conversations: int) -> set[str]:
    """The ids of training conversations that repeat the held-out ones, of `conversations` that were looked through.

    What more than ten of them say, or a tenth of few, is a common phrase and no sign of a copy (NeMo Curator's
    TaskDecontamination has the same ten).
    """
    counts = Counter(run for runs in shared.values() for run in runs)
    common = min(10, max(1, conversations // 10))
    return {identity for identity, runs in shared.items() if any(counts[run] <= common for run in runs)}


def _long_texts(messages: list[dict], least: int) -> Iterator[list[bytes]]:
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


def _apart(words: list[bytes], length: int) -> Iterable[Run]:
    """`length` neighbouring words, and the next, and the next."""
    return zip(*[iter(words)] * length, strict=False)


def _words(text: str) -> list[bytes]:
    """Lower case, in UTF-8: for ASCII, most of what there is, that is one pass of a table."""
    if text.isascii():
        return text.encode().translate(_LETTERS).split()
    return [word.encode() for word in _WORD.findall(text.casefold())]
