"""Prompting baselines: the base model with another system prompt, or with retrieved few-shot examples.

Both are scored on the same replies as the trained model. Where it does not beat them, nobody needs an adapter yet.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from fine_tuning.evaluation.records.record_types import Item
from fine_tuning.evaluation.suite.examples import Exchanges
from fine_tuning.evaluation.suite.items import encoded_after

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def with_system_prompt(
    items: Sequence[Item], system_prompt: str, tokenizer: "PreTrainedTokenizerFast", max_length: int
) -> list[Item]:
    """The items under another system prompt; without those whose template or length does not allow it."""
    system = [{"role": "system", "content": system_prompt}]
    found = (encoded_after(item, system, tokenizer, max_length) for item in items)
    return [item for item in found if item is not None]


def with_examples(
    items: Sequence[Item],
    exchanges: Exchanges,
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
