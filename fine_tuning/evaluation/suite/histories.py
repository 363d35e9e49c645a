"""Do replies fit their prompts? The same replies after their own history and after those of other conversations.

A model that has learned only the style of replies finds a reply as likely after a stranger's question as after the one
that it answers. How much likelier its own history makes it, in nats, is the help of the prompt.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

from fine_tuning.common.languages import detect_language
from fine_tuning.evaluation.records.record_types import Item, Likelihood
from fine_tuning.evaluation.suite.items import content_only, encoded_after, sample
from fine_tuning.schema.chat_format import end_of_turn_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

OTHERS = 3  # histories of other conversations for each reply
SURE_OF_LANGUAGE = 0.6  # confidence below which a conversation, mostly a short one, counts as of no known language


class Swap(NamedTuple):
    """One reply after its own history and after others, `variants[0]` being its own; whose the others are."""

    item: Item
    language: str
    variants: list[Item]
    others: list[str]


def swapped_histories(
    items: Sequence[Item], count: int, tokenizer: "PreTrainedTokenizerFast", max_length: int
) -> list[Swap]:
    """The last reference of up to `count` items after its own history and after those of three others.

    The others are of other clusters, of the same language, and nearest in the length of their history; the reply's own
    system prompt stays. An item without any such other is left out. `max_length` tokens are for both
    history and reply.
    """
    asked = [item for item in items if item.references]
    closing, languages = end_of_turn_ids(tokenizer), {item.id: language(item) for item in asked}
    prompts = {item.id: item.prompt_ids(item.asked) for item in asked}
    found = []
    for item in sample(asked, count):
        own = content_only(replace(item, id=f"{item.id}/0"), item.asked, closing)
        kept = [message for message in item.messages[:1] if message["role"] == "system"]
        alone = replace(own, messages=[*kept, item.messages[len(item.history)]])
        nearest = sorted(
            (
                other
                for other in asked
                if other.cluster != item.cluster
                and languages[other.id] == languages[item.id]
                and prompts[other.id] != prompts[item.id]
            ),
            key=lambda other: (abs(len(prompts[other.id]) - len(prompts[item.id])), other.id),
        )
        variants, names = [own], []
        for other in nearest:
            if len(names) == OTHERS:
                break
            before = [message for message in other.history if message["role"] != "system"]
            if (variant := encoded_after(alone, before, tokenizer, max_length)) is not None:
                names.append(other.id)
                variants.append(content_only(replace(variant, id=f"{item.id}/{len(names)}"), 0, closing))
        if names:
            found.append(Swap(item, languages[item.id], variants, names))
    return found


def language(item: Item) -> str:
    """ISO 639 code of what is said in a conversation; "und" where that is not sure."""
    code, confidence = detect_language(item.messages)
    return code if confidence >= SURE_OF_LANGUAGE else "und"


def prompt_lines(contender: str, swaps: Sequence[Swap], scores: Sequence[Likelihood]) -> list[dict[str, Any]]:
    """Lines of prompt_help.jsonl: nats of each reply's content after its own history and after each other one, from the
    scores of all variants of all swaps in their order."""
    left = iter(scores)
    lines = []
    for swap in swaps:
        own, *others = (next(left)[0][0] for _ in swap.variants)
        lines.append(
            {"contender": contender, "id": swap.item.id, "cluster": swap.item.cluster, "language": swap.language}
            | {"own": own, "others": others, "after": swap.others}
        )
    return lines
