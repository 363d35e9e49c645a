"""The frozen suite: held-out conversations as the models see them, and who wrote their replies."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from fine_tuning.common.errors import UserError
from fine_tuning.evaluation.records.record_types import EDITED, PERSON, UNKNOWN, Item, item_id, labelled_replies
from fine_tuning.schema.chat_format import NOT_TRAINED, RenderError, encode_conversation
from fine_tuning.schema.prepared import read_rows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

COLUMNS = ["id", "window", "source", "cluster", "messages", "input_ids", "labels"]


def read_items(
    path: Path, tokenizer: "PreTrainedTokenizerFast", endorsed: Sequence[str] = (PERSON,), needed: bool = True
) -> list[Item]:
    """Windows of a prepared split that hold a reply, in order of id; whose replies count, `endorsed` says. Raises
    UserError if the file is missing, or no conversation in it holds a reply and one is `needed`."""
    items = []
    for row in read_rows(path, COLUMNS):
        runs = label_runs(row.labels)
        if not runs:
            continue
        authors, texts = reply_authors(row.messages, len(runs)), reply_texts(tokenizer, row.input_ids, runs)
        stored = (row.source, row.cluster, row.messages, row.input_ids, row.labels)
        items.append(Item(item_id(row.id, row.window), *stored, runs, authors, texts, tuple(endorsed)))
    if needed and not items:
        raise UserError("the test split holds no reply: collect more conversations, or raise prepare.test_fraction")
    return sorted(items, key=lambda item: item.id)


def encoded_after(
    item: Item, before: Sequence[dict], tokenizer: "PreTrainedTokenizerFast", max_length: int
) -> Item | None:
    """The item with the messages `before` in front, the same replies labelled, as a tokenizer and its chat template see
    it. A system message among `before` takes the place of the conversation's.

    None where the template cannot carry it, or `max_length` tokens do not hold all its replies whole.
    """
    scored = labelled_replies(item.messages, len(item.runs))
    messages = after(before, item.messages)
    trained = [any(message is reply for reply in scored) for message in messages]
    try:
        # A system prompt that was configured is among the messages already.
        encoded = encode_conversation(tokenizer, messages, None, max_length, trained)
    except RenderError:
        return None
    runs = label_runs(encoded.labels)
    if reply_texts(tokenizer, encoded.input_ids, runs) != item.texts:
        return None
    return replace(item, messages=messages, input_ids=encoded.input_ids, labels=encoded.labels, runs=runs)


def after(before: Sequence[dict], messages: Sequence[dict]) -> list[dict]:
    """Messages with others before them, whose system message takes the place of their own."""
    head = 1 if messages and messages[0]["role"] == "system" else 0
    replaced = any(message["role"] == "system" for message in before)
    return [*([] if replaced else messages[:head]), *before, *messages[head:]]


def reply_texts(tokenizer: "PreTrainedTokenizerFast", ids: Sequence[int], runs: Sequence[tuple[int, int]]) -> list[str]:
    """The replies as text, without control tokens and the white space that templates put around contents."""
    decode = partial(tokenizer.decode, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return [decode(ids[start:end]).strip() for start, end in runs]


def reply_authors(messages: Sequence[dict], count: int) -> list[str]:
    """Authors of the last `count` replies that preparation labelled."""
    authors = []
    for message in labelled_replies(messages, count):
        model = EDITED if message.get("edited") else message.get("model") or UNKNOWN
        authors.append(PERSON if message.get("person") else UNKNOWN if model == PERSON else model)
    return [*[UNKNOWN] * (count - len(authors)), *authors]


def label_runs(labels: Sequence[int]) -> list[tuple[int, int]]:
    """Ranges [start, end) of labels that are trained; the first position has nothing before it to be predicted from."""
    runs: list[tuple[int, int]] = []
    for position, label in enumerate(labels):
        if label == NOT_TRAINED or position == 0:
            continue
        if runs and runs[-1][1] == position:
            runs[-1] = (runs[-1][0], position + 1)
        else:
            runs.append((position, position + 1))
    return runs


def content_only(item: Item, reply: int, closing: Sequence[int]) -> Item:
    """The item up to the end of one reply, of which only the content is scored and not the tokens that end the turn,
    `closing` (see `end_of_turn_ids`).

    How a model ends its turn is not what it says: without this, whoever writes short answers is rewarded for them.
    """
    start, end = item.runs[reply]
    while end > start + 1 and item.input_ids[end - 1] in closing:
        end -= 1
    ids = item.input_ids[:end]
    return replace(
        item, input_ids=ids, labels=[NOT_TRAINED] * start + ids[start:], runs=[(start, end)],
        authors=[item.authors[reply]], texts=[item.texts[reply]],
    )  # fmt: skip


def suite_sha256(items: Sequence[Item], tokenizer: "PreTrainedTokenizerFast") -> str:
    """Identity of what is asked: items, tokens, tokenizer, chat template. Scores compare only if it is equal."""
    digest = hashlib.sha256()
    for item in items:
        asked = [item.id, item.cluster, item.authors, item.references, item.input_ids, item.labels]
        digest.update(json.dumps(asked).encode())
    for part in chat_format(tokenizer):
        digest.update(part.encode())
    return digest.hexdigest()


def chat_format(tokenizer: "PreTrainedTokenizerFast") -> tuple[str, str]:
    """Tokenizer and chat template as text: models with the same see the same tokens."""
    return tokenizer.backend_tokenizer.to_str(), str(tokenizer.chat_template)


def sample(items: Sequence[Item], count: int) -> list[Item]:
    """`count` items, the same whatever else is in the suite: those with the smallest hash of their id."""
    chosen = sorted(items, key=lambda item: hashlib.sha256(item.id.encode("utf-8", "surrogatepass")).digest())[:count]
    return sorted(chosen, key=lambda item: item.id)
