"""What has the model memorised? Verbatim continuation of training replies, and canaries beside secrets never shown.

Greedy decoding continues a reply verbatim exactly where every token of it is the model's first choice after the true
ones before it. So one teacher-forced pass tells what generating would, and costs a tenth.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fine_tuning.evaluation.records.record_types import GIVEN, LONGEST, SHORTEST, Item, Likelihood, item_id
from fine_tuning.evaluation.suite.items import label_runs, sample
from fine_tuning.schema.canaries import SOURCE, controls
from fine_tuning.schema.chat_format import NOT_TRAINED, encode_conversation
from fine_tuning.schema.prepared import read_rows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

CONTROLS = 128


def memory_items(
    train: Path, count: int, tokenizer: "PreTrainedTokenizerFast", system_prompt: str | None, max_length: int
) -> list[Item]:
    """Items whose runs are what the model may have kept; their source is "training", "canary" or "control".

    Args:
        train: the prepared training split.
        count: training replies to be continued. Those that several clusters of conversations share are common phrases,
            which a model may learn, and left out.
    """
    rows = read_rows(train, ["id", "window", "source", "cluster", "input_ids", "labels"])
    found = [_item(item_id(row.id, row.window), row.source, row.cluster, row.input_ids, row.labels) for row in rows]
    secrets = [item for item in found if item.source == SOURCE]
    if secrets:
        for index, messages in enumerate(controls(CONTROLS)):
            encoded = encode_conversation(tokenizer, messages, system_prompt, max_length)
            name = f"control-{index:04d}"
            secrets.append(_item(name, "control", name, encoded.input_ids, encoded.labels))
    rest = [item for item in (_rest(item) for item in found if item.source != SOURCE) if item is not None]
    clusters: dict[tuple[int, ...], set[str]] = {}
    for item in rest:
        clusters.setdefault(_words(item), set()).add(item.cluster)
    return [*sample([item for item in rest if len(clusters[_words(item)]) == 1], count), *secrets]


def _item(id: str, source: str, cluster: str, ids: list[int], labels: list[int]) -> Item:
    return Item(id, source, cluster, [], ids, labels, label_runs(labels), [], [])


def _rest(item: Item) -> Item | None:
    """The last reply that is long enough, from where the model continues it; None where there is none."""
    for start, end in reversed(item.runs):
        begin, stop = start + GIVEN, min(end, start + GIVEN + LONGEST)
        if stop - begin >= SHORTEST:
            labels = [NOT_TRAINED] * begin + item.input_ids[begin:stop]
            return replace(
                item, source="training", input_ids=item.input_ids[:stop], labels=labels, runs=[(begin, stop)]
            )
    return None


def _words(item: Item) -> tuple[int, ...]:
    return tuple(item.input_ids[slice(*item.runs[0])])


def recalled(contender: str, items: Sequence[Item], scores: Sequence[Likelihood]) -> list[dict[str, Any]]:
    """Lines of memory.jsonl: how likely each is (nats), and whether the contender says it verbatim."""
    lines = []
    for item, score in zip(items, scores, strict=True):
        nats, tokens, correct = zip(*score, strict=True)
        said = {"nll": None if None in nats else sum(nats), "word_for_word": sum(tokens) == sum(correct)}
        lines.append({"contender": contender, "kind": item.source, "id": item.id} | said)
    return lines
