"""Few-shot examples: question-answer pairs of training conversations, found by BM25.

The prompting baseline is scored with them, and the chat app and the gateway serve them.
"""

import itertools
import math
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from fine_tuning.common.writing_systems import words_of
from fine_tuning.schema.prepared import read_rows

K1, B = 1.2, 0.75  # of BM25: the middle of the usual ranges (Robertson & Zaragoza 2009, section 3.5)


class Exchange(NamedTuple):
    """A question and its answer in a training conversation, whose id is `source`."""

    question: str
    answer: str
    source: str = ""

    @property
    def messages(self) -> list[dict]:
        """As a chat template takes them."""
        return [{"role": "user", "content": self.question}, {"role": "assistant", "content": self.answer}]


class Exchanges:
    """Question-answer pairs of training conversations, found by BM25 over the words of their questions."""

    def __init__(self, exchanges: Sequence[Exchange]) -> None:
        first: dict[tuple, Exchange] = {}
        for exchange in exchanges:
            first.setdefault(exchange[:2], exchange)
        self.exchanges = list(first.values())
        self._counts: dict[str, list[tuple[int, int]]] = defaultdict(list)  # word -> (exchange, times)
        self._lengths = []
        for index, exchange in enumerate(self.exchanges):
            found = Counter(words_of(exchange.question))
            self._lengths.append(found.total())
            for word, times in found.items():
                self._counts[word].append((index, times))
        self._mean_length = sum(self._lengths) / max(1, len(self._lengths)) or 1.0

    @classmethod
    def read(cls, path: Path) -> "Exchanges":
        """Of a prepared split: every reply that is not disliked or broken off, with the message it answers."""
        found = []
        for row in read_rows(path, ["id", "messages"]):
            for asked, answer in itertools.pairwise(row.messages):
                good = answer.get("edited") or (answer.get("rating", 0) >= 0 and not answer.get("incomplete"))
                if (asked["role"], answer["role"]) == ("user", "assistant") and good:
                    found.append(Exchange(asked["content"], answer["content"], row.id))
        return cls(found)

    def most_similar(self, question: str, count: int) -> list[Exchange]:
        """The `count` exchanges with the most similar questions, nearest first; fewer where fewer share a word."""
        return list(itertools.islice(self.ranked(question), count))

    def ranked(self, question: str) -> Iterator[Exchange]:
        """All exchanges whose questions share a word with one, the most similar first."""
        scores: dict[int, float] = defaultdict(float)
        for word in set(words_of(question)):
            holders = self._counts.get(word, ())
            rarity = math.log(1 + (len(self.exchanges) - len(holders) + 0.5) / (len(holders) + 0.5))
            for index, times in holders:
                length = 1 - B + B * self._lengths[index] / self._mean_length
                scores[index] += rarity * times * (K1 + 1) / (times + K1 * length)
        yield from (self.exchanges[index] for index in sorted(scores, key=lambda index: (-scores[index], index)))
