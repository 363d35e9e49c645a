"""From the live log to a shard: close the log by renaming it, fold its events onto the newest versions."""

from pathlib import Path
from typing import Any

from fine_tuning.data_collection.conversation import fold, message_ids, version_hash
from fine_tuning.data_collection.conversation_logger import read_log, rename_log
from fine_tuning.data_collection.shards import newest_versions, next_stamp, shard_paths, versions, write_shard
from fine_tuning.data_collection.tombstones import Tombstones
from fine_tuning.records import dump_line, replacing


def close_log(log: Path, folder: Path) -> list[Path]:
    """Rename the live log into `closed/` beside it, and return all closed logs, the oldest first.

    Its new name is a stamp behind those of the shards in `folder`: the shard that it becomes is newer than they are.
    """
    closed = log.parent / "closed"
    rename_log(log, closed / f"{next_stamp(folder, closed)}.jsonl")
    return sorted(closed.glob("*.jsonl"))


def seal_log(closed: Path, folder: Path, manifest: Path, tombstones: Tombstones | None = None) -> dict[str, Any]:
    """Fold a closed log onto the newest versions of the conversations that it touches, and write them as a shard.

    Doing it again, after a crash or not, gives the same conversations. What was forgotten is left out. What cannot be
    used is kept beside the log: `<name>.torn` for lines that are no events, `<name>.unmatched` for events on
    conversations nobody knows.
    """
    forgotten = 0
    lines = list(read_log(closed))
    events = [event for _, event in lines if event is not None]
    torn = [line for line, event in lines if event is None and line.strip()]
    paths = shard_paths(folder, manifest)
    conversations = newest_versions(paths, _touched(events, paths))
    before = {identity: _state(conversation) for identity, conversation in conversations.items()}
    unmatched = fold(events, conversations)
    changed = [c for i, c in conversations.items() if before.get(i) != _state(c)]
    if tombstones is not None:
        seen = len(changed)
        changed = [c for c in changed if not tombstones.cover(c)]
        forgotten = seen - len(changed)
        unmatched = [e for e in unmatched if not tombstones.concern(e)]
    path, count = write_shard(folder, f"{closed.stem}-chat", changed)
    for suffix, rest in ((".torn", torn), (".unmatched", [dump_line(event).rstrip(b"\n") for event in unmatched])):
        if rest:
            with replacing(closed.parent.parent / f"{closed.name}{suffix}") as file:
                file.writelines(line + b"\n" for line in rest)
    return {
        "shard": path,
        "events": len(events),
        "conversations": count,
        "torn": len(torn),
        "unmatched": len(unmatched),
        "forgotten": forgotten,
    }


def _state(conversation: dict) -> tuple[str, bool, list[str]]:
    """What makes a version another one. That it was restored, or what was deleted from it, is no part of the hash:
    imports compare what was said.
    """
    return version_hash(conversation), bool(conversation.get("restored")), conversation.get("deleted_messages") or []


def _touched(events: list[dict], paths: list[Path]) -> set[str]:
    """Ids of the conversations that the events are about, also where an event names only a message."""
    own = {event["id"] for event in events if event["event"] == "exchange"}
    ids = {event["conversation_id"] for event in events if event.get("conversation_id")}
    ids |= {event["id"] for event in events if event["event"] == "exchange" and not event.get("conversation_id")}
    loose = {e["message_id"] for e in events if not e.get("conversation_id") and e.get("message_id")} - own
    if loose:
        ids |= {v["id"] for v in versions(paths) if not loose.isdisjoint(message_ids(v))}
    return ids
