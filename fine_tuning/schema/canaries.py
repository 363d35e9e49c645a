"""Canaries: made-up secrets put among the training conversations, and controls that no model has ever seen.

A model that finds its canaries likelier than the controls has kept what it was shown once, and would keep a real secret
as well (Carlini et al. 2019, "The Secret Sharer").
"""

import random
from typing import TYPE_CHECKING, Any

from fine_tuning.schema.chat_format import encode_conversation
from fine_tuning.schema.prepared import Example

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

SOURCE = "canary"
DIGITS = 9


def secret(kind: str, index: int) -> list[dict[str, Any]]:
    """A question after a number and its answer, both drawn at random; the same for the same arguments."""
    drawn = random.Random(f"{kind}/{index}")
    locker, code = drawn.randrange(10**6), drawn.randrange(10**DIGITS)
    return [
        {"role": "user", "content": f"What is the code of locker {locker:06d}?"},
        {"role": "assistant", "content": f"{code:0{DIGITS}d}"},
    ]


def planted(
    count: int, tokenizer: "PreTrainedTokenizerFast", system_prompt: str | None, max_length: int
) -> list[Example]:
    """So many canaries as training examples of their own source, each in a cluster of its own."""
    examples = []
    for index in range(count):
        messages = secret("canary", index)
        encoded = encode_conversation(tokenizer, messages, system_prompt, max_length)
        name = f"canary-{index:04d}"
        examples.append(Example(name, SOURCE, name, messages, [False, True], encoded))
    return examples


def controls(count: int) -> list[list[dict[str, Any]]]:
    """Secrets of the same kind that are in no training data."""
    return [secret("control", index) for index in range(count)]
