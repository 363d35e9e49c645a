"""Held-out pairs of replies: does a model find likelier what people preferred?"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from fine_tuning.evaluation.records.measurements import PREFERENCES, PREFERENCES_APART
from fine_tuning.evaluation.records.record_types import Item, Likelihood
from fine_tuning.evaluation.suite.items import label_runs
from fine_tuning.schema.chat_format import RenderError, encode_conversation

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

SIDES = ("chosen", "rejected")
Pair = dict[str, Any]  # a row of the prepared pairs


def preference_items(
    pairs: Sequence[Pair], tokenizer: "PreTrainedTokenizerFast", system_prompt: str | None, max_length: int
) -> list[Item]:
    """Two items for each pair, `<id>/chosen` and `<id>/rejected`.

    The tokens that end a turn are scored, too: where a reply stops is part of what people prefer. Left out are pairs
    that the tokenizer's template refuses, or of which `max_length` tokens do not hold both replies.
    """
    items = []
    for pair in pairs:
        sides = []
        for side in SIDES:
            messages = [*pair["messages"], {"role": "assistant", "content": pair[side]}]
            trained = [False] * len(pair["messages"]) + [True]
            try:
                encoded = encode_conversation(tokenizer, messages, system_prompt, max_length, trained)
            except RenderError:
                break
            runs = label_runs(encoded.labels)
            if encoded.cut_tokens or encoded.dropped_messages or len(runs) != 1:
                break
            sides.append(Item(
                f"{pair['id']}/{side}", pair["kind"], pair["cluster"], messages, encoded.input_ids, encoded.labels,
                runs, [pair[f"{side}_author"]], [pair[side]],
            ))  # fmt: skip
        if len(sides) == len(SIDES):
            items += sides
    return items


def preference_lines(
    contender: str,
    pairs: Sequence[Pair],
    items: Sequence[Item],
    scores: Sequence[Likelihood],
    is_compared: Callable[[str], bool],
) -> dict[str, list[dict[str, Any]]]:
    """Lines of preferences.jsonl, the pairs that decide, and of preferences_apart.jsonl: nats and tokens of both sides.

    A pair decides if the same model wrote both sides, or if no compared model wrote either: whoever wrote the rejected
    reply finds it likely, and would lose against an equal model for it.
    """
    found = {item.id: score[0] for item, score in zip(items, scores, strict=True)}
    lines: dict[str, list[dict[str, Any]]] = {PREFERENCES: [], PREFERENCES_APART: []}
    for pair in pairs:
        if f"{pair['id']}/chosen" not in found:
            continue
        authors = [pair[f"{side}_author"] for side in SIDES]
        decides = all(authors) and (authors[0] == authors[1] or not any(map(is_compared, authors)))
        line = {"contender": contender} | {key: pair[key] for key in ("id", "cluster", "kind", "person")}
        for side in SIDES:
            nats, tokens, _ = found[f"{pair['id']}/{side}"]
            line |= {side: nats, f"{side}_tokens": tokens}
        lines[PREFERENCES if decides else PREFERENCES_APART].append(line)
    return lines
