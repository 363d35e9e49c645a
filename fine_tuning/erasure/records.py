"""Taking conversations out of the files that hold them: which they are, what they say, shards and logs without them."""

import json
import re
from collections.abc import Callable, Iterator, Set
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

from fine_tuning.common.names import session_name
from fine_tuning.common.records import dump_line, read_line, read_lines, replacing, sync, write_json, write_jsonl
from fine_tuning.data_collection.conversation_logger import deletes, read_log, rewrite_log
from fine_tuning.data_collection.storage.shards import describe_shard, plain_id, read_manifest, write_lines
from fine_tuning.data_collection.storage.tombstones import Tombstones
from fine_tuning.erasure.traces import ID, TEXT, Traces, decoded
from fine_tuning.schema.conversation import as_conversation, from_exchange, speakers

USER_NAMES = ("username", "email", "name")  # metadata of imported conversations that may say who spoke
MOST_IDS = 100  # that lines are searched for one by one
_PLAIN = re.compile(r"[A-Za-z0-9._-]+")  # what JSON escapes as \u00.. or not at all
_HASH_ENDING = re.compile(r"-[0-9a-f]{12}$")


@dataclass(frozen=True)
class Selection:
    """Which conversations to forget: one, those of a session or of a user, what tombstones already name, or those that
    were deleted, by their ids."""

    conversation: str | None = None
    session: str | None = None
    user: str | None = None
    tombstones: Tombstones | None = None
    deleted: Set[str] | None = None

    def takes(self, conversation: dict) -> bool:
        identity, metadata = conversation["id"], conversation.get("metadata") or {}
        if self.tombstones is not None:
            return self.tombstones.names(identity)
        if self.deleted is not None:
            return identity in self.deleted
        if self.conversation is not None:
            return self.conversation in (identity, metadata.get("branch_of"))
        if self.session is not None:
            named = (metadata.get("session_id"), metadata.get("session"))
            return self.session in named or identity in (self.session, session_name(self.session))
        named = {str(metadata[key]) for key in USER_NAMES if metadata.get(key)}
        return self.user is not None and self.user in speakers(metadata) | named


@dataclass
class Found:
    ids: set[str] = field(default_factory=set)
    messages: set[str] = field(default_factory=set)  # their ids
    versions: list[dict] = field(default_factory=list)  # every one, for tombstones; never written anywhere
    by: str | None = None  # the user whose judgements of other people's conversations go as well
    people: Traces = field(default_factory=lambda: Traces({}))  # of what people wrote: messages, edits, comments
    models: Traces = field(default_factory=lambda: Traces({}))  # of what models wrote, which a model may write again
    names: Traces = field(default_factory=lambda: Traces({}))  # of ids of conversations and messages
    # The traces of each message, by which it can be said which messages cannot be searched for.
    texts: list[dict[str, int]] = field(default_factory=list)

    def leave_out(self, said: set[str]) -> None:
        """Search no more for what others say as well."""
        self.people, self.models = self.people.without(said), self.models.without(said)

    def not_searched(self) -> tuple[int, int]:
        """(messages that leave no trace of their own, those that are found as whole values of records only)."""
        left = [{key: self.people.known.get(key, self.models.known.get(key)) for key in text} for text in self.texts]
        kinds = [{kind for kind in text.values() if kind is not None} for text in left]
        return kinds.count(set()), kinds.count({TEXT})


def collect(
    selection: Selection, shards: list[Path], logs: list[Path], tombstones: Tombstones | None = None, key: bytes = b""
) -> Found:
    """Find the selected conversations in shards and logs, and what they say that no other conversation says: traces by
    `key`. What people log about a conversation after it was forgotten is found by the tombstones."""
    found = Found()
    asked_for = None if selection.conversation is None else {selection.conversation}
    for conversation in _everything(shards, logs, _may_name(asked_for)):
        if selection.takes(conversation):
            found.ids.add(conversation["id"])
    asked = {name for name in (selection.conversation, selection.session) if name is not None}
    if tombstones is not None:  # forgotten before, and maybe not everywhere
        found.ids |= {name for name in {*asked, *map(session_name, asked)} if tombstones.names(name)}
    said_by_people, said_by_models, said_about = [], [], []
    for conversation in _everything(shards, logs, _may_name(None if selection.user is not None else found.ids)):
        if selection.user is not None and (judged := _judgements(conversation, selection.user)):
            found.by = selection.user
            said_by_people += [text for entry in judged for text in _texts_of(entry)]
        if conversation["id"] in found.ids:
            found.versions.append(conversation)
            found.messages.update(str(m["id"]) for m in _messages(conversation) if m.get("id"))
            people, models = _words(conversation)
            said_by_people += people
            said_by_models += models
            said_about += [text for text in (conversation.get("metadata") or {}).values() if isinstance(text, str)]
    for log in logs:
        for event in _events(log):
            if selection.user is not None and event.get("by") == selection.user:
                found.by = selection.user
            if tombstones is not None and event["event"] != "exchange" and tombstones.concern(event):
                found.messages.update(event[name] for name in ("message_id", "conversation_id") if event.get(name))
            if _concerns(event, found):
                said_by_people += [event[key] for key in ("content", "comment") if isinstance(event.get(key), str)]
    people = Traces.of(said_by_people, key) | Traces.of(said_about, key, kind=None)
    models, names = Traces.of(said_by_models, key), Traces.of(found.ids | found.messages, key, ID)
    lines = (line for shard in shards for line in _lines_that_stay(shard, found))
    events = (line for log in logs for line, event in read_log(log) if event and not _concerns(event, found))
    every = people | models | names
    others = every.all_in(decoded(every.lines_that_may_hold(chain(lines, events))))
    own = {trace for trace, kind in Traces.of(found.ids, key, ID).known.items() if kind == ID}
    found.people, found.models, found.names = people, models.without(people.known), names.without(others - own)
    found.leave_out(others)
    found.texts = [Traces.of([text], key).known for text in {*said_by_people, *said_by_models} if text.strip()]
    return found


def ids_in(shards: list[Path]) -> set[str]:
    """The ids of all conversations in shards."""
    return {str(version["id"]) for version in _everything(shards, [])}


def deleted_ids(shards: list[Path], logs: list[Path]) -> set[str]:
    """Ids of the conversations that were deleted in the app, and that shards or logs still hold or name."""
    newest = {str(version["id"]): bool(version.get("deleted")) for version in _everything(shards, [])}
    events = (event for log in logs for event in _events(log))
    return {i for i, gone in newest.items() if gone} | {e["conversation_id"] for e in events if deletes(e)}


def expired_ids(shards: list[Path], logs: list[Path], before: str) -> set[str]:
    """Ids of the conversations that the gateway recorded and in which nothing was said since `before` (ISO 8601)."""
    latest: dict[str, str] = {}
    for version in _everything(shards, logs):
        if version.get("source") == "gateway":
            times = [message["at"] for message in version["messages"] if message.get("at")]
            latest[version["id"]] = max(latest.get(version["id"], ""), *times, version.get("started_at") or "")
    return {identity for identity, at in latest.items() if at < before}


def _everything(
    shards: list[Path], logs: list[Path], wanted: Callable[[bytes], bool] = lambda line: True
) -> Iterator[dict]:
    """Every version in the wanted lines of shards and every exchange in the logs as a conversation."""
    for shard in shards:
        for _, line in read_lines(shard):
            if wanted(line) and (conversation := _parsed(line)) is not None:
                yield conversation
    for log in logs:
        yield from (from_exchange(event) for event in _events(log) if event["event"] == "exchange")


def _events(log: Path) -> Iterator[dict]:
    return (event for _, event in read_log(log) if event is not None)


def _may_name(ids: Set[str] | None) -> Callable[[bytes], bool]:
    """A test of a shard's line that costs a hundredth of its parsing: whether the line may name one of these ids. True
    of every line without ids, where they are many, and where JSON may write one in another way."""
    if ids is None or len(ids) > MOST_IDS or not all(map(_PLAIN.fullmatch, ids)):
        return lambda line: True
    names = [identity.encode() for identity in ids]

    def test(line: bytes) -> bool:
        return plain_id(line) is None or b"\\u00" in line or any(name in line for name in names)

    return test


def _parsed(line: bytes) -> dict | None:
    with suppress(ValueError, RecursionError, AttributeError, TypeError):
        conversation = as_conversation(read_line(line))
        if isinstance(conversation["messages"], list) and all(isinstance(m, dict) for m in conversation["messages"]):
            return conversation
    return None


def _messages(conversation: dict) -> Iterator[dict]:
    for message in conversation["messages"]:
        yield message
        others = message.get("alternatives")
        yield from (other for other in others if isinstance(other, dict)) if isinstance(others, list) else ()


def _judgements(conversation: dict, user: str | None) -> list[dict]:
    """What a user said of a conversation's replies."""
    return [e for e in conversation.get("feedback") or [] if isinstance(e, dict) and e.get("by") == user]


def _texts_of(entry: dict) -> list[str]:
    return [entry[key] for key in ("comment", "edited") if isinstance(entry.get(key), str)]


def _words(conversation: dict) -> tuple[list[str], list[str]]:
    """(what people wrote, what models wrote)."""
    people: list[str] = []
    models: list[str] = []
    for message in _messages(conversation):
        if isinstance(message.get("content"), str):
            (models if message.get("role") == "assistant" else people).append(message["content"])
    for entry in conversation.get("feedback") or []:
        people += _texts_of(entry)
    return people, models


def _lines_that_stay(shard: Path, found: Found) -> Iterator[bytes]:
    may_go = _may_name(found.ids if found.by is None else None)
    kept = (_without(line, found) if may_go(line) else line for _, line in read_lines(shard))
    return (line + b"\n" for line in kept if line is not None)


def _without(line: bytes, found: Found) -> bytes | None:
    """A shard's line as it stays: not at all, without what a user said of it, or as it is."""
    conversation = _parsed(line)
    if conversation is None:
        return line
    if conversation["id"] in found.ids:
        return None
    if found.by is None or not _judgements(conversation, found.by):
        return line
    record = read_line(line)
    record["feedback"] = [entry for entry in record["feedback"] if entry.get("by") != found.by]
    return dump_line(record).rstrip(b"\n")


def _concerns(event: dict, found: Found) -> bool:
    if event["event"] == "exchange" and from_exchange(event)["id"] in found.ids:
        return True
    if found.by is not None and event.get("by") == found.by and event["event"] in ("feedback", "edit", "vote"):
        return True
    if event.get("conversation_id") in found.ids or event.get("message_id") in found.messages:
        return True
    # What was logged of a conversation after it was forgotten: of that, no id is selected.
    return event["event"] != "exchange" and event.get("conversation_id") in found.messages


# -----------------------------------------------------------------------------
# where


def count_in_shard(shard: Path, found: Found) -> int:
    """Lines of a shard that go or change."""
    may_go = _may_name(found.ids if found.by is None else None)
    return sum(may_go(line) and _without(line, found) != line for _, line in read_lines(shard))


def count_in_log(log: Path, found: Found) -> int:
    """Events in a log that concern the conversations, and torn lines that hold their words."""
    return sum(_goes(line, event, found) for line, event in read_log(log))


def _goes(line: bytes, event: dict | None, found: Found) -> bool:
    if event is not None:
        return _concerns(event, found)
    words = found.people | found.models | found.names
    return words.in_bytes(line) or any(json.dumps(name).encode() in line for name in found.ids | found.messages)


# -----------------------------------------------------------------------------
# removal


def clear_log(log: Path, found: Found) -> int:
    """Take the events out of a log while its writers wait; returns how many there were."""
    return rewrite_log(log, lambda line, event: not _goes(line, event, found))


def clear_votes(path: Path, found: Found) -> bool:
    """Rewrite a file of votes without those on the conversations, or by the user; whether there were any. The file goes
    with its last vote."""
    lines = list(read_log(path))
    kept = [line + b"\n" for line, event in lines if not _goes(line, event, found)]
    if len(kept) == len(lines):
        return False
    with replacing(path) as file:
        file.writelines(kept)
    if not kept:
        path.unlink()
        path.with_name(f"{path.name}.dvc").unlink(missing_ok=True)
    return True


def clear_shards(folder: Path, manifest: Path, found: Found) -> int:
    """Rewrite the shards that hold one of the conversations without it; returns how many there were.

    A shard's name keeps its beginning, so its place in the order, and gets the hash of what is left; its entry in the
    manifest changes with it. Killed and run again, it ends at the same place: an old shard goes after the manifest
    knows its successor, and the successor of a shard that is still there is written to the same bytes.
    """
    cleared = 0
    for shard in sorted(folder.glob("*.jsonl")):
        if not count_in_shard(shard, found):
            continue
        successor, _ = write_lines(folder, _HASH_ENDING.sub("", shard.stem), _lines_that_stay(shard, found))
        _rename_in_manifest(manifest, shard.name, successor)
        shard.unlink()
        sync(folder)
        cleared += 1
    return cleared


def _rename_in_manifest(path: Path, old: str, successor: Path | None) -> None:
    manifest = read_manifest(path)
    if all(entry["name"] != old for entry in manifest["shards"]):
        return
    kept: list[dict[str, Any]] = []
    for entry in manifest["shards"]:
        if entry["name"] != old:
            kept += [entry] if successor is None or entry["name"] != successor.name else []
        elif successor is not None:
            kept.append(describe_shard(successor))
    write_json(path, manifest | {"shards": kept})


def clear_lines(path: Path, found: Found) -> int:
    """Take the lines of a JSON Lines file with the id of one of the conversations, of a part of it or of a message;
    returns how many there were."""
    if not path.is_file():
        return 0
    records = [json.loads(line) for _, line in read_lines(path) if line]
    kept = [record for record in records if not any(found.names.ids_in(str(record.get("id"))))]
    if len(kept) < len(records):
        write_jsonl(path, kept)
    return len(records) - len(kept)
