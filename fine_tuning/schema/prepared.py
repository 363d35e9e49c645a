"""Prepared rows: how they are stored, read and made into batches."""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from fine_tuning.common.errors import UserError
from fine_tuning.common.records import replacing
from fine_tuning.schema.chat_format import NOT_TRAINED, Encoded

ROW_GROUP = 1000  # rows that are held until they are written


@dataclass(slots=True)
class PreparedRow:
    """One window of a conversation, as preparation writes it and training and evaluation read it.

    `labels[i]` is `input_ids[i]` where it is trained, else -100. A conversation that fits is one window; the windows of
    a longer one share `id`, `source` and `cluster`. Not stored are `conversation` (all of its messages), `trained`
    (which of them enter the loss) and `counts` (see `Tally`).
    """

    id: str
    input_ids: list[int] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    source: str = ""
    cluster: str = ""
    window: int = 0
    messages: list[dict[str, Any]] = field(default_factory=list)
    conversation: Sequence[dict[str, Any]] = ()
    trained: Sequence[bool] = ()
    counts: Mapping[str, int] = field(default_factory=dict)

    def stored(self) -> dict[str, Any]:
        """What a file holds of it; of a row that was not encoded, neither ids nor labels."""
        names = ("id", "source", "cluster", "messages", *(("window", "input_ids", "labels") if self.input_ids else ()))
        return {name: getattr(self, name) for name in names}


def encoded_row(encoded: Encoded, **fields: Any) -> PreparedRow:
    """The row of a window."""
    return PreparedRow(**encoded_fields(encoded), **fields)


def encoded_fields(encoded: Encoded) -> dict[str, Any]:
    """The fields of a row that its window decides; its `counts` are those of the window's tokens."""
    counts = {
        "trained_tokens": encoded.trained_tokens,
        "control_tokens": encoded.control_ids,
        "lost_end_of_reply": int(encoded.cut_tokens > 0),
    }
    ids, labels = encoded.input_ids, encoded.labels
    return {"input_ids": ids, "labels": labels, "messages": encoded.messages, "counts": counts}


def write_rows(path: str | Path, rows: Iterable[PreparedRow]) -> None:
    """Write encoded rows as Parquet: id, source, cluster, window, messages (JSON), input_ids, labels (int32).

    The windows of a conversation follow each other. The same rows give the same bytes. Few are in memory at a time.
    """
    import pyarrow
    from datasets import Features, List, Value, config
    from datasets.arrow_writer import get_parquet_column_options
    from pyarrow.parquet import ParquetWriter

    texts = dict.fromkeys(("id", "source", "cluster", "messages"), Value("string"))
    numbers = dict.fromkeys(("input_ids", "labels"), List(Value("int32")))
    features = Features(texts | {"window": Value("int32")} | numbers)
    # As `Dataset.to_parquet` writes it, which has to hold the whole of it.
    schema, chunking = features.arrow_schema, config.DEFAULT_CDC_OPTIONS
    options = get_parquet_column_options(features, schema)
    rows = iter(rows)
    with (
        replacing(path) as file,
        ParquetWriter(file, schema, use_content_defined_chunking=chunking, write_page_index=True, **options) as writer,
    ):
        while group := list(islice(rows, ROW_GROUP)):
            columns = {name: [getattr(row, name) for row in group] for name in features}
            # JSON, because the optional keys of messages would become nulls in every Arrow struct.
            columns["messages"] = [json.dumps(messages, ensure_ascii=False) for messages in columns["messages"]]
            writer.write_table(pyarrow.table(columns, schema))
        writer.add_key_value_metadata({"content_defined_chunking": json.dumps(chunking)})


def read_rows(path: str | Path, columns: Sequence[str] = ("id", "input_ids", "labels")) -> list[PreparedRow]:
    """Read some columns of a file that `write_rows` wrote, `id` among them.

    Raises:
        UserError: the file is missing.
    """
    from pyarrow import parquet

    if not Path(path).is_file():
        raise UserError(f"{path} is missing: run `dvc repro prepare`")
    rows = [PreparedRow(**row) for row in parquet.read_table(path, columns=list(columns)).to_pylist()]
    for row in rows if "messages" in columns else ():
        row.messages = json.loads(row.messages)  # type: ignore[arg-type]
    return rows


def count_labels(rows: Sequence[PreparedRow]) -> int:
    """Number of trained tokens."""
    return sum(label != NOT_TRAINED for row in rows for label in row.labels[1:])


def batch_by_tokens(
    rows: Sequence[PreparedRow], budget: int, multiple: int = 1, padded: Callable[[int], int] = int
) -> list[list[PreparedRow]]:
    """Group rows of like length so that no padded batch has more than `budget` tokens.

    A batch has a multiple of `multiple` rows, whatever the budget, but for the last. `padded` says how long the
    rows of a batch are whose longest has so many tokens. Sorting leaves half a per cent of padding and keeps memory
    bounded; a fixed number of rows a batch does neither.
    """
    ordered = sorted(rows, key=lambda row: (len(row.input_ids), row.id))
    batches: list[list[PreparedRow]] = []
    for start in range(0, len(ordered), multiple):
        group = ordered[start : start + multiple]
        # Rows come in order of length, so the newest is the longest: the batch is padded to it.
        if batches and (len(batches[-1]) + len(group)) * padded(len(group[-1].input_ids)) <= budget:
            batches[-1] += group
        else:
            batches.append(group)
    return batches


def round_up(count: int, step: int) -> int:
    """The next multiple of `step`."""
    return -(-count // step) * step


def collate(batch: Sequence[PreparedRow], pad_token_id: int, shape: tuple[int, int] | None = None) -> dict[str, Any]:
    """Pad a batch on the right: input_ids, attention_mask and labels, each an int64 tensor of `shape`.

    Without one it is (rows, longest row). Further rows are padding only.
    """
    import torch

    lengths = [len(row.input_ids) for row in batch]
    rows, longest = shape or (len(batch), max(lengths))
    # One tensor of all: one for each row takes longer than a step on a GPU has to spare.
    spare = rows - len(batch)

    def padded(values: list[list[int]], filler: int) -> torch.Tensor:
        return torch.tensor([row + [filler] * (longest - len(row)) for row in (*values, *([[]] * spare))])

    return {
        "input_ids": padded([row.input_ids for row in batch], pad_token_id),
        "attention_mask": padded([[1] * length for length in lengths], 0),
        "labels": padded([row.labels for row in batch], NOT_TRAINED),
    }
