"""From the live log to a shard: close the log by renaming it, fold its events onto the newest versions."""

from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

from fine_tuning.common.records import dump_line, replacing
from fine_tuning.data_collection.conversation_logger import rename_log
from fine_tuning.data_collection.storage.log_index import LogIndex
from fine_tuning.data_collection.storage.shard_index import ShardIndex
from fine_tuning.data_collection.storage.shards import next_stamp, shard_paths, write_shard
from fine_tuning.data_collection.storage.tombstones import Tombstones
from fine_tuning.schema.conversation import fold, version_hash


def close_log(log: Path, folder: Path) -> list[Path]:
    """Rename the live log into `closed/` beside it, and return all closed logs, the oldest first.

    Its new name is a stamp behind those of the shards in `folder`: the shard that it becomes is newer than they are.
    """
    closed = log.parent / "closed"
    rename_log(log, closed / f"{next_stamp(folder, closed)}.jsonl")
    return sorted(closed.glob("*.jsonl"))


def seal_log(
    closed: Path, folder: Path, manifest: Path, tombstones: Tombstones | None = None, memo: Path | None = None
) -> dict[str, Any]:
    """Fold a closed log onto the newest versions of the conversations that it touches, and write them as a shard.

    One conversation at a time is in memory. Doing it again, after a crash or not, gives the same conversations. What
    was forgotten is left out. What cannot be used is kept beside the log: `<name>.torn` for lines that are no events,
    `<name>.unmatched` for events on conversations nobody knows. `memo` is the folder of the index of shards.
    """
    index = LogIndex()
    _, torn = index.add_log(closed)
    index.add_indexed(ShardIndex.read(shard_paths(folder, manifest), memo, tombstones))
    counts: Counter[str] = Counter(torn=len(torn))
    unmatched: list[dict] = []

    def changed() -> Iterator[dict]:
        for version, events in index.conversations():
            counts["events"] += len(events)
            conversations = {} if version is None else {version["id"]: version}
            before = {identity: _state(conversation) for identity, conversation in conversations.items()}
            unmatched.extend(fold(events, conversations))
            for identity, conversation in conversations.items():
                if before.get(identity) == _state(conversation):
                    continue
                if tombstones is not None and tombstones.cover(conversation):
                    counts["forgotten"] += 1
                else:
                    yield conversation

    path, count = write_shard(folder, f"{closed.stem}-chat", changed())
    if tombstones is not None:
        unmatched = [event for event in unmatched if not tombstones.concern(event)]
    _set_aside(closed, ".torn", (index.read(str(closed), *place).rstrip(b"\n") + b"\n" for place in torn))
    _set_aside(closed, ".unmatched", map(dump_line, unmatched))
    counted = {name: counts[name] for name in ("events", "torn", "forgotten")}
    return {"shard": path, "conversations": count, "unmatched": len(unmatched)} | counted


def _set_aside(closed: Path, suffix: str, lines: Iterable[bytes]) -> None:
    """Keep lines beside the live log; no file where there are none."""
    first = next(lines := iter(lines), None)
    if first is not None:
        with replacing(closed.parent.parent / f"{closed.name}{suffix}") as file:
            file.writelines(chain([first], lines))


def _state(conversation: dict) -> tuple[str, bool, list[str]]:
    """What makes a version another one. That it was restored, or what was deleted from it, is no part of the hash:
    imports compare what was said.
    """
    return version_hash(conversation), bool(conversation.get("restored")), conversation.get("deleted_messages") or []
