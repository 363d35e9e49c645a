"""Changes of the training data since the champion: conversations and tokens that were added or removed."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from fine_tuning.common.records import read_jsonl

MEMBERS = "training.jsonl"  # in the champion's folder


def training_members(train: Path | Sequence[Path]) -> list[dict[str, Any]]:
    """{"id", "source", "tokens"} of every conversation in a prepared split, a folder or its files; no content."""
    from pyarrow import compute, parquet

    table = parquet.read_table(train, columns=["id", "source", "input_ids"])
    tokens = compute.list_value_length(table["input_ids"]).to_pylist()
    members: dict[str, dict[str, Any]] = {}
    for id, source, count in zip(table["id"].to_pylist(), table["source"].to_pylist(), tokens, strict=True):
        members.setdefault(id, {"id": id, "source": source, "tokens": 0})["tokens"] += count  # of all its windows
    return list(members.values())


def data_changes(before: Iterable[dict[str, Any]], now: Iterable[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """{source: {"kept" | "added" | "removed": {"conversations", "tokens"}}}; tokens of those kept are today's."""
    old, new = ({member["id"]: member for member in members} for members in (before, now))
    table: dict[str, dict[str, Any]] = {}
    for id, member in sorted((old | new).items()):
        kind = "removed" if id not in new else "kept" if id in old else "added"
        none = {kind: {"conversations": 0, "tokens": 0} for kind in ("kept", "added", "removed")}
        row = table.setdefault(member["source"], none)
        row[kind]["conversations"] += 1
        row[kind]["tokens"] += member["tokens"]
    return dict(sorted(table.items()))


def changes_since(champion: Path, train: Path) -> dict[str, dict[str, Any]] | None:
    """Changes between the training data of the champion in a folder and the split `train`; None if unknown."""
    members = champion / MEMBERS
    return data_changes(read_jsonl(members), training_members(train)) if members.is_file() else None
