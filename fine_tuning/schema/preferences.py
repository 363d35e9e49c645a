"""What people preferred: pairs of replies, and single judged replies, as training and evaluation read them."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from fine_tuning.common.errors import UserError
from fine_tuning.common.records import replacing
from fine_tuning.schema.chat_format import NOT_TRAINED
from fine_tuning.schema.prepared import PreparedRow


@dataclass(frozen=True)
class PreferredPair:
    """A stored pair: what was said, who said and preferred it, and ids and labels by the base's own template.

    `cluster` is that of the first conversation, `messages` the prompt. Authors are a model with its version, `person`,
    or "" for unknown.
    """

    id: str
    cluster: str
    kind: str
    person: str
    conversations: list[str]
    messages: list[dict[str, Any]]
    chosen: str
    rejected: str
    chosen_author: str
    rejected_author: str
    chosen_ids: list[int]
    chosen_labels: list[int]
    rejected_ids: list[int]
    rejected_labels: list[int]


@dataclass(frozen=True)
class Thumb:
    """A stored reply with its thumb; see `PreferredPair`."""

    id: str
    cluster: str
    liked: bool
    person: str
    conversations: list[str]
    messages: list[dict[str, Any]]
    reply: str
    author: str
    input_ids: list[int]
    labels: list[int]


@dataclass(frozen=True)
class Pair:
    """Two replies to one prompt, of which a person preferred the first."""

    id: str
    chosen: PreparedRow
    rejected: PreparedRow

    @property
    def input_ids(self) -> Sequence[int]:
        """Of the longer row."""
        return max(self.chosen.input_ids, self.rejected.input_ids, key=len)


@dataclass(frozen=True)
class JudgedReply:
    """One reply with a person's thumb. `mismatched` is the reply of another one after this one's prompt: KTO's point of
    comparison."""

    id: str
    reply: PreparedRow
    mismatched: PreparedRow
    liked: bool

    @property
    def input_ids(self) -> Sequence[int]:
        """Of the longer row."""
        return max(self.reply.input_ids, self.mismatched.input_ids, key=len)


Item = PreparedRow | Pair | JudgedReply


def rows_of(items: Iterable[Item]) -> list[PreparedRow]:
    rows: list[PreparedRow] = []
    for item in items:
        if isinstance(item, Pair):
            rows += item.chosen, item.rejected
        elif isinstance(item, JudgedReply):
            rows += item.reply, item.mismatched
        else:
            rows.append(item)
    return rows


def write_preferences(path: Path, kind: type[PreferredPair] | type[Thumb], records: Sequence[Any]) -> None:
    """Write pairs or thumbs as Parquet, in order of id; `messages` as JSON. The same records give the same bytes."""
    import pyarrow
    from pyarrow import parquet

    types: dict[Any, Any] = {
        bool: pyarrow.bool_(),
        list[str]: pyarrow.list_(pyarrow.string()),
        list[int]: pyarrow.list_(pyarrow.int32()),
    }
    schema = pyarrow.schema([(field.name, types.get(field.type, pyarrow.string())) for field in fields(kind)])
    rows = [asdict(record) for record in sorted(records, key=lambda record: record.id)]
    for row in rows:
        row["messages"] = json.dumps(row["messages"], ensure_ascii=False)
    with replacing(path) as file:
        # `from_pylist` imports pandas, which takes a second.
        empty = [pyarrow.nulls(0, column.type) for column in schema]
        table = pyarrow.Table.from_pylist(rows, schema) if rows else pyarrow.Table.from_arrays(empty, schema=schema)
        parquet.write_table(table, file)


def read_pairs(path: Path) -> list[Pair]:
    """The pairs of a split, as training reads them. Raises UserError if the file is missing."""
    pairs = []
    for row in read_preferences(path):
        chosen = PreparedRow(f"{row['id']}/chosen", row["chosen_ids"], row["chosen_labels"])
        rejected = PreparedRow(f"{row['id']}/rejected", row["rejected_ids"], row["rejected_labels"])
        pairs.append(Pair(row["id"], chosen, rejected))
    return pairs


def read_thumbs(path: Path) -> list[JudgedReply]:
    """The judged replies of a split. Each gets the reply of the next longer prompt as its mismatched one. UserError:
    the file is missing."""
    rows = sorted(read_preferences(path), key=lambda row: (len(row["input_ids"]), row["id"]))
    replies = []
    for row, other in zip(rows, rows[1:] + rows[:1], strict=True):
        begin = next(at for at, label in enumerate(row["labels"]) if label != NOT_TRAINED)
        said = [label for label in other["labels"] if label != NOT_TRAINED]
        mixed = row["input_ids"][:begin] + said
        reply = PreparedRow(row["id"], row["input_ids"], row["labels"])
        mismatched = PreparedRow(f"{row['id']}/mismatched", mixed, [NOT_TRAINED] * begin + said)
        replies.append(JudgedReply(row["id"], reply, mismatched, row["liked"]))
    return replies


def read_preferences(path: Path) -> list[dict[str, Any]]:
    """The records of a file that `write_preferences` wrote. Raises UserError if the file is missing."""
    from pyarrow import parquet

    if not path.is_file():
        raise UserError(f"{path} is missing: run `dvc repro prepare`")
    return [row | {"messages": json.loads(row["messages"])} for row in parquet.read_table(path).to_pylist()]
