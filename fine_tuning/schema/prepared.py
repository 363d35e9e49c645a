"""Prepared rows: how they are stored, read and made into batches."""

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fine_tuning.common.errors import UserError
from fine_tuning.common.records import replacing
from fine_tuning.schema.chat_format import NOT_TRAINED, Encoded

if TYPE_CHECKING:
    from datasets import Dataset
ROW_GROUP = 1000  # rows that are held until they are written


@dataclass
class Example:
    """A conversation that may be trained on. `trained[i]` says whether `messages[i]` enters the loss.

    One that is too long for the model is several examples, which differ in `window` and `encoded`; the first also
    counts the turns, and the tokens of replies, that no window has room for, and the windows that were not drawn.
    """

    id: str
    source: str
    cluster: str
    messages: list[dict[str, Any]]
    trained: list[bool]
    encoded: Encoded | None = None
    window: int = 0
    lost_turns: int = 0
    lost_tokens: int = 0
    lost_windows: int = 0

    def row(self) -> dict[str, Any]:
        """The example as a plain record, with ids and labels where it was encoded."""
        row: dict[str, Any] = {"id": self.id, "source": self.source, "cluster": self.cluster, "messages": self.messages}
        if self.encoded is not None:
            row |= {
                "window": self.window,
                "messages": self.encoded.messages,
                "input_ids": self.encoded.input_ids,
                "labels": self.encoded.labels,
            }
        return row


def write_split(path: str | Path, examples: Iterable[Example]) -> None:
    """Write encoded examples as Parquet: id, source, cluster, window, messages (JSON), input_ids, labels (int32).

    The windows of a conversation follow each other and share all but window, messages, input_ids and labels.
    The same examples give the same bytes. Few of them are in memory at a time.
    """
    import pyarrow
    from datasets import Features, List, Value, config
    from datasets.arrow_writer import get_parquet_column_options
    from pyarrow.parquet import ParquetWriter

    features = Features(
        {name: Value("string") for name in ("id", "source", "cluster", "messages")}
        | {"window": Value("int32")}
        | {name: List(Value("int32")) for name in ("input_ids", "labels")}
    )
    # As `Dataset.to_parquet` writes it, which has to hold the whole of it.
    schema, chunking = features.arrow_schema, config.DEFAULT_CDC_OPTIONS
    options = get_parquet_column_options(features, schema)
    examples = iter(examples)
    with (
        replacing(path) as file,
        ParquetWriter(file, schema, use_content_defined_chunking=chunking, write_page_index=True, **options) as writer,
    ):
        while rows := [example.row() for example in islice(examples, ROW_GROUP)]:
            columns = {name: [row[name] for row in rows] for name in features}
            # JSON, because the optional keys of messages would become nulls in every Arrow struct.
            columns["messages"] = [json.dumps(messages, ensure_ascii=False) for messages in columns["messages"]]
            writer.write_table(pyarrow.table(columns, schema))
        writer.add_key_value_metadata({"content_defined_chunking": json.dumps(chunking)})


def read_split(path: str | Path) -> "Dataset":
    """Read a split that `write_split` wrote, in memory: no copy of private conversations in a cache elsewhere.

    Raises:
        UserError: the file is missing.
    """
    from datasets import Dataset
    from pyarrow import parquet

    if not Path(path).is_file():
        raise UserError(f"{path} is missing: run `dvc repro prepare`")
    return Dataset(parquet.read_table(path))


@dataclass(frozen=True)
class Row:
    """One conversation as the model sees it: ids and labels of equal length, labels -100 where nothing is trained."""

    id: str
    input_ids: list[int]
    labels: list[int]


def read_rows(path: Path) -> list[Row]:
    """Read a parquet file that data preparation wrote.

    Raises:
        UserError: the file is missing.
    """
    from datasets import Dataset, disable_progress_bars

    disable_progress_bars()
    if not path.is_file():
        raise UserError(f"{path} is missing: run `dvc repro prepare`")
    table = Dataset.from_parquet(str(path), keep_in_memory=True).select_columns(["id", "input_ids", "labels"])
    return [Row(row["id"], row["input_ids"], row["labels"]) for row in table]


def count_labels(rows: Sequence[Row]) -> int:
    """Number of trained tokens."""
    return sum(label != NOT_TRAINED for row in rows for label in row.labels[1:])


def batch_by_tokens(
    rows: Sequence[Row], budget: int, multiple: int = 1, padded: Callable[[int], int] = int
) -> list[list[Row]]:
    """Group rows of like length so that no padded batch has more than `budget` tokens.

    A batch has a multiple of `multiple` rows, whatever the budget, but for the last. `padded` says how long the
    rows of a batch are whose longest has so many tokens. Sorting leaves half a per cent of padding and keeps memory
    bounded; a fixed number of rows a batch does neither.
    """
    ordered = sorted(rows, key=lambda row: (len(row.input_ids), row.id))
    batches: list[list[Row]] = []
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


def collate(batch: Sequence[Row], pad_token_id: int, shape: tuple[int, int] | None = None) -> dict[str, Any]:
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
