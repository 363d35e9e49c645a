"""General knowledge that training should not cost: a frozen suite of questions, and general text that is not chat.

A question has a right and a wrong answer. Models are compared by the nats of both answers' content tokens, and by the
nats a byte of the texts. Neither needs generation or a judge; guards.py decides on the records.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fine_tuning.common.records import read_jsonl
from fine_tuning.evaluation.records.record_types import PERSON, Item, Likelihood
from fine_tuning.evaluation.suite.items import content_only, label_runs
from fine_tuning.schema.chat_format import NOT_TRAINED, encode_conversation, end_of_turn_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

SUITE = Path(__file__).with_name("general_items.jsonl")
TEXTS = Path(__file__).with_name("general_texts.jsonl")
ANSWERS = ("right", "wrong")


def general_items(
    tokenizer: "PreTrainedTokenizerFast",
    system_prompt: str | None,
    max_length: int,
    before: Callable[[Sequence[dict]], list[dict]] = lambda _: [],
) -> list[Item]:
    """Two items for each question, one for each answer without its end of turn: `<id>/right` and `<id>/wrong`;
    `before` gives the messages that stand before a question."""
    items, closing = [], end_of_turn_ids(tokenizer)
    for question in read_jsonl(SUITE):
        for answer in ANSWERS:
            messages = [
                {"role": "user", "content": question["prompt"]},
                {"role": "assistant", "content": question[answer]},
            ]
            shown = before(messages)
            trained = [False] * (len(shown) + 1) + [True]
            encoded = encode_conversation(tokenizer, [*shown, *messages], system_prompt, max_length, trained)
            runs = label_runs(encoded.labels)
            name = f"{question['id']}/{answer}"
            item = Item(
                name, question["category"], question["id"], messages, encoded.input_ids, encoded.labels, runs,
                [PERSON], [question[answer]],
            )  # fmt: skip
            items.append(content_only(item, 0, closing))
    return items


def knowledge(contender: str, items: Sequence[Item], scores: Sequence[Likelihood]) -> list[dict[str, Any]]:
    """Lines of general.jsonl: nats of the right and of the wrong answer of each question, null where undefined."""
    nats = {item.id: score[0][0] for item, score in zip(items, scores, strict=True)}
    return [
        {"contender": contender, "id": question, "category": category}
        | {answer: nats[f"{question}/{answer}"] for answer in ANSWERS}
        for question, category in {item.cluster: item.source for item in items}.items()
    ]


def text_items(tokenizer: "PreTrainedTokenizerFast") -> list[Item]:
    """One item for each text, without a chat template: all tokens but the first are scored."""
    items = []
    for text in read_jsonl(TEXTS):
        ids = tokenizer(text["text"])["input_ids"]
        scored = tokenizer.decode(ids[1:], skip_special_tokens=True, clean_up_tokenization_spaces=False)
        labels = [NOT_TRAINED, *ids[1:]]
        items.append(Item(text["id"], text["domain"], text["id"], [], ids, labels, [(1, len(ids))], [PERSON], [scored]))
    return items


def reading(contender: str, items: Sequence[Item], scores: Sequence[Likelihood]) -> list[dict[str, Any]]:
    """Lines of general_text.jsonl: nats and bytes of each text."""
    return [
        {"contender": contender, "id": item.id, "domain": item.source}
        | {"nats": score[0][0], "bytes": len(item.texts[0].encode())}
        for item, score in zip(items, scores, strict=True)
    ]
