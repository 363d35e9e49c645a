"""Prompting baselines: the base model with another system prompt, or with retrieved few-shot examples.

Both are scored on the same replies as the trained model. Where it does not beat them, nobody needs an adapter yet.
"""

import itertools
import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from fine_tuning.common.writing_systems import words_of
from fine_tuning.evaluation.records.record_types import Item
from fine_tuning.evaluation.suite.items import encoded_after
from fine_tuning.schema.prepared import read_rows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

K1, B = 1.2, 0.75  # of BM25: the middle of the usual ranges (Robertson & Zaragoza 2009, section 3.5)


class Exchange(NamedTuple):
    """A question and its answer in a training conversation."""

    question: str
    answer: str

    @property
    def messages(self) -> list[dict]:
        """As a chat template takes them."""
        return [{"role": "user", "content": self.question}, {"role": "assistant", "content": self.answer}]


def with_system_prompt(
    items: Sequence[Item], system_prompt: str, tokenizer: "PreTrainedTokenizerFast", max_length: int
) -> list[Item]:
    """The items under another system prompt; without those whose template or length does not allow it."""
    system = [{"role": "system", "content": system_prompt}]
    found = (encoded_after(item, system, tokenizer, max_length) for item in items)
    return [item for item in found if item is not None]


def with_examples(
    items: Sequence[Item],
    exchanges: "Exchanges",
    count: int,
    tokenizer: "PreTrainedTokenizerFast",
    max_length: int,
) -> list[Item]:
    """The items after the `count` training exchanges most similar to their first question, the nearest one last.

    Fewer where `max_length` tokens do not hold them: whole turns are dropped, the least similar exchange's first.
    """
    found = []
    for item in items:
        first = next((message["content"] for message in item.messages if message["role"] == "user"), "")
        nearest_last = reversed(exchanges.most_similar(first, count))
        before = [message for exchange in nearest_last for message in exchange.messages]
        found.append(encoded_after(item, before, tokenizer, max_length))
    return [item for item in found if item is not None]


class Exchanges:
    """Question-answer pairs of training conversations, found by BM25 over the words of their questions."""

    def __init__(self, exchanges: Sequence[Exchange]) -> None:
        self.exchanges = list(dict.fromkeys(exchanges))
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
                    found.append(Exchange(asked["content"], answer["content"]))
        return cls(found)

    def most_similar(self, question: str, count: int) -> list[Exchange]:
        """The `count` exchanges with the most similar questions, nearest first; fewer where fewer share a word."""
        scores: dict[int, float] = defaultdict(float)
        for word in set(words_of(question)):
            holders = self._counts.get(word, ())
            rarity = math.log(1 + (len(self.exchanges) - len(holders) + 0.5) / (len(holders) + 0.5))
            for index, times in holders:
                length = 1 - B + B * self._lengths[index] / self._mean_length
                scores[index] += rarity * times * (K1 + 1) / (times + K1 * length)
        ranked = sorted(scores, key=lambda index: (-scores[index], index))
        return [self.exchanges[index] for index in ranked[:count]]
