"""Prompting baselines: the base model with another system prompt, or with retrieved few-shot examples.

Both are scored on the same replies as the trained model. Where it does not beat them, nobody needs an adapter yet.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from fine_tuning.evaluation.records.record_types import Item
from fine_tuning.evaluation.suite.examples import Exchanges
from fine_tuning.evaluation.suite.items import encoded_after

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Before = Callable[[Sequence[dict]], list[dict]]  # messages that stand before a conversation


def context(system_prompt: str | None, exchanges: Exchanges | None = None, count: int = 0) -> Before:
    """What stands before a conversation: the system prompt, and the `count` training exchanges most similar to its
    first question, the nearest one last."""
    system = [{"role": "system", "content": system_prompt}] if system_prompt else []

    def before(messages: Sequence[dict]) -> list[dict]:
        first = next((message["content"] for message in messages if message["role"] == "user"), "")
        nearest_last = reversed(exchanges.most_similar(first, count) if exchanges else [])
        return [*system, *(message for exchange in nearest_last for message in exchange.messages)]

    return before


NOTHING = context(None)


def with_messages(
    items: Sequence[Item], before: Before, tokenizer: "PreTrainedTokenizerFast", max_length: int
) -> list[Item]:
    """The items with messages before them, without those that `encoded_after` leaves out.

    Where `max_length` tokens do not hold all, whole turns are dropped, the least similar exchange's first.
    """
    found = (encoded_after(item, before(item.messages), tokenizer, max_length) for item in items)
    return [item for item in found if item is not None]
