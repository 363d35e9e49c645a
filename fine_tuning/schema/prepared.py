"""Prepared rows: how they are stored, read and made into batches."""

import json
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from fine_tuning.common.errors import UserError
from fine_tuning.common.project import files_sha256
from fine_tuning.schema.chat_format import NOT_TRAINED, Encoded

if TYPE_CHECKING:
    import numpy as np
    from pyarrow import RecordBatch

ROW_GROUP = 1000
TEXTS, TOKENS = ("id", "source", "cluster", "messages"), ("input_ids", "labels")
# Not in the file, see `Tally`.
COUNTS = (
    "trained_tokens", "control_tokens", "lost_end_of_reply", "lost_turns", "lost_reply_tokens", "windows_left_out",
)  # fmt: skip
COLUMNS = [*TEXTS, "window", "order", *TOKENS, *COUNTS]


@dataclass(slots=True)
class PreparedRow:
    """One window of a conversation, as preparation writes it and training and evaluation read it.

    `labels[i]` is `input_ids[i]` where it is trained, else -100. A conversation that fits is one window; the windows of
    a longer one share `id`, `source` and `cluster`. A split is read in ascending `order`: the first rows are a random
    sample. Not stored are `conversation` (all of its messages), `trained` (which of them enter the loss) and `counts`
    (see `Tally`).
    """

    id: str
    input_ids: Sequence[int] = field(default_factory=list)
    labels: Sequence[int] = field(default_factory=list)
    source: str = ""
    cluster: str = ""
    window: int = 0
    order: int = 0
    messages: list[dict[str, Any]] = field(default_factory=list)
    conversation: Sequence[dict[str, Any]] = ()
    trained: Sequence[bool] = ()
    counts: Mapping[str, int] = field(default_factory=dict)

    def stored(self) -> dict[str, Any]:
        """What a file holds of it; of a row that was not encoded, neither ids nor labels."""
        names = ("id", "source", "cluster", "messages", *(("window", "input_ids", "labels") if self.input_ids else ()))
        return {name: getattr(self, name) for name in names}


def encoded_row(encoded: Encoded, **fields: Any) -> PreparedRow:
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


def row_batch(rows: Sequence[PreparedRow]) -> "RecordBatch":
    """Encoded rows as an Arrow batch with the columns of their file, and COUNTS."""
    import pyarrow

    columns = [string_array([getattr(row, name) for row in rows]) for name in TEXTS[:3]]
    # JSON, because the optional keys of messages would become nulls in every Arrow struct.
    columns.append(string_array([as_json(row.messages) for row in rows]))
    columns.append(number_array([row.window for row in rows]))
    columns.append(number_array([row.order for row in rows], 64))
    columns += [_list_array([getattr(row, name) for row in rows]) for name in TOKENS]
    columns += [number_array([row.counts.get(name, 0) for row in rows]) for name in COUNTS]
    return pyarrow.RecordBatch.from_arrays(columns, names=COLUMNS)


def write_batches(file: BinaryIO, batches: "Iterable[RecordBatch]") -> None:
    """Write rows as Parquet: id, source, cluster, window, order, messages (JSON), input_ids, labels (int32).

    The windows of a conversation follow each other. The same rows give the same bytes.
    They are those of `Dataset.to_parquet`, which holds all rows, without three seconds of importing `datasets`.
    """
    import pyarrow
    from pyarrow.parquet import ParquetWriter

    types = dict.fromkeys(TEXTS, pyarrow.string()) | {"window": pyarrow.int32(), "order": pyarrow.int64()}
    types |= dict.fromkeys(TOKENS, pyarrow.list_(pyarrow.int32()))
    features: dict[str, Any] = {key: {"dtype": "string", "_type": "Value"} for key in TEXTS}
    features["window"] = number = {"dtype": "int32", "_type": "Value"}
    features["order"] = {"dtype": "int64", "_type": "Value"}
    features |= {key: {"feature": number, "_type": "List"} for key in TOKENS}
    schema = pyarrow.schema(types, {"huggingface": json.dumps({"info": {"features": features}})})
    chunking = {"min_chunk_size": 262144, "max_chunk_size": 1048576, "norm_level": 0}
    columns = [f"{name}.list.element" if name in TOKENS else name for name in types]
    with ParquetWriter(
        file, schema, use_content_defined_chunking=chunking, write_page_index=True, use_dictionary=columns,
        compression=dict.fromkeys(columns, "snappy"), column_encoding={},
    ) as writer:  # fmt: skip
        for group in _row_groups(batches):
            arrays = [group.column(name) for name in types]
            writer.write_table(pyarrow.Table.from_arrays(arrays, schema=schema))
        writer.add_key_value_metadata({"content_defined_chunking": json.dumps(chunking)})


def _row_groups(batches: "Iterable[RecordBatch]") -> "Iterator[RecordBatch]":
    """The same rows in batches of ROW_GROUP, but for the last."""
    import pyarrow

    rest: list[Any] = []
    for batch in batches:
        rows = pyarrow.concat_batches([*rest, batch]) if rest else batch
        whole = rows.num_rows - rows.num_rows % ROW_GROUP
        yield from (rows.slice(start, ROW_GROUP) for start in range(0, whole, ROW_GROUP))
        rest = [rows.slice(whole)] if whole < rows.num_rows else []
    yield from rest


def as_json(messages: Sequence[dict[str, Any]]) -> str:
    return json.dumps(messages, ensure_ascii=False)


# From buffers, because `pyarrow.array` imports pandas, which takes a second.


def number_array(numbers: Iterable[int], bits: int = 32) -> Any:
    """An Arrow array of numbers."""
    import pyarrow as pa

    held, kind = (array("i", numbers), pa.int32()) if bits == 32 else (array("q", numbers), pa.int64())
    return pa.Array.from_buffers(kind, len(held), [None, pa.py_buffer(held)])


def string_array(texts: list[str]) -> Any:
    """An Arrow array of texts."""
    import pyarrow as pa

    encoded = [text.encode() for text in texts]
    ends = array("i", accumulate(map(len, encoded), initial=0))
    return pa.StringArray.from_buffers(len(texts), pa.py_buffer(ends), pa.py_buffer(b"".join(encoded)))


def numbers(batch: "RecordBatch", name: str) -> "np.ndarray":
    """A column of 32-bit numbers; of texts or lists where each begins, and the end of the last."""
    import numpy as np

    column = batch.column(name)
    count = len(column) + (name in (*TEXTS, *TOKENS))
    return np.frombuffer(column.buffers()[1], np.int32)[column.offset : column.offset + count]


def _list_array(lists: list[Any]) -> Any:
    import pyarrow as pa

    held, ends = array("i"), array("i", accumulate(map(len, lists), initial=0))
    for one in lists:
        held.extend(one)
    buffers = [None, pa.py_buffer(ends)]
    return pa.ListArray.from_buffers(pa.list_(pa.int32()), len(lists), buffers, children=[number_array(held)])


def split_files(folder: str | Path) -> list[Path]:
    """The files of a split. Raises UserError if there are none."""
    files = sorted(Path(folder).glob("*.parquet"))
    if not files:
        raise UserError(f"{folder} is missing: run `dvc repro prepare`")
    return files


def split_sha256(folder: str | Path) -> str:
    """SHA-256 of the files of a split. Raises UserError if there are none."""
    return files_sha256(split_files(folder), Path(folder))


def read_rows(folder: str | Path, columns: Sequence[str] = ("id", "input_ids", "labels")) -> list[PreparedRow]:
    """Read some columns of a split, `id` among them, in its order. Raises UserError if the folder has no
    files."""
    from pyarrow import parquet

    tables = (parquet.read_table(file, columns=[*columns, "order"]) for file in split_files(folder))
    rows = [PreparedRow(**row) for table in tables for row in table.to_pylist()]
    rows.sort(key=attrgetter("order"))  # stable: the windows of a conversation have the same
    for row in rows if "messages" in columns else ():
        row.messages = json.loads(row.messages)  # type: ignore[arg-type]
    return rows


def count_labels(rows: Sequence[PreparedRow]) -> int:
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
    """Pad a batch on the right: input_ids, attention_mask and labels, each an int64 tensor of `shape`. Without one it
    is (rows, longest row). Further rows are padding only."""
    import torch

    lengths = [len(row.input_ids) for row in batch]
    rows, longest = shape or (len(batch), max(lengths))
    # One tensor of all: one for each row takes longer than a step on a GPU has to spare.
    spare = rows - len(batch)

    def padded(values: Sequence[Sequence[int]], filler: int) -> torch.Tensor:
        return torch.tensor([[*row, *([filler] * (longest - len(row)))] for row in (*values, *([[]] * spare))])

    return {
        "input_ids": padded([row.input_ids for row in batch], pad_token_id),
        "attention_mask": padded([[1] * length for length in lengths], 0),
        "labels": padded([row.labels for row in batch], NOT_TRAINED),
    }
