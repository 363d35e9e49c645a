"""The index that the pages read: every conversation in one row, kept up to date by reading only what is new.

It lives in a temporary database as long as the process does, so that no copy of what was said outlasts it; a log that
`forget` rewrites, or a shard that changes, is read again.
"""

import hashlib
import threading
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from fine_tuning.common.project import CONVERSATIONS, LOG, MANIFEST
from fine_tuning.common.records import read_object
from fine_tuning.data_collection.conversation_logger import deletes
from fine_tuning.data_collection.storage.log_index import LogIndex, key_of
from fine_tuning.data_collection.storage.shards import shard_paths
from fine_tuning.schema.conversation import fold

REJECTED = Path("data/clean/rejected.jsonl")
ATTEMPTS = 3  # to read files that others move meanwhile
BEGINNING = 60  # characters of the first message that a row keeps

_SUMMARY = """
    CREATE TABLE summary (conversation BLOB PRIMARY KEY, id TEXT, source TEXT, started_at TEXT, last_spoken TEXT,
        messages INT, characters INT, begins TEXT, shard TEXT, rating INT,
        text TEXT, gone INT);
    CREATE INDEX by_time ON summary (source, last_spoken);
"""
_COLUMNS = "id, source, started_at, last_spoken, messages, characters, begins, shard, rating"


class Summary(NamedTuple):
    """One conversation. `shard` names where its newest version is sealed; None if there is news of it since. `rating`
    is 1 where its replies are liked rather than disliked, -1 where the other way round, else 0."""

    id: str
    source: str
    started_at: str
    last_spoken: str
    messages: int
    characters: int
    begins: str
    shard: str | None
    rating: int


class ConversationIndex:
    """The conversations of a checkout: what the logs say, on top of what was sealed before. Threads may share it."""

    def __init__(self, checkout: Path) -> None:
        self.checkout = checkout
        self._lock = threading.Lock()
        self._changes = 0
        self._clear()

    def _clear(self) -> None:
        self._changes += 1
        self._index = LogIndex(_SUMMARY)
        self._shards: dict[Path, tuple[int, int]] = {}
        self._unmatched = 0
        self._logs: dict[str, tuple[Path, int]] = {}  # what tells a log from others → its path, bytes read

    def listed(
        self, source: str, words: str = "", titles: Mapping[str, str] | None = None, limit: int = 60
    ) -> tuple[list[Summary], int]:
        """The conversations of a source in whose title or messages all words occur, whatever their case: those spoken
        in last, at most `limit`, and how many there are."""
        condition, values = _condition(words, titles or {})
        condition, values = f"{condition} AND source = ?", [*values, source]
        with self._up_to_date() as index:
            ((count,),) = index.rows(f"SELECT count(*) FROM summary WHERE {condition}", *values)
            query = f"SELECT {_COLUMNS} FROM summary WHERE {condition} ORDER BY last_spoken DESC LIMIT {limit}"
            return [Summary(*row) for row in index.rows(query, *values)], count

    def changes(self) -> int:
        """A number that grows whenever a conversation comes, changes or goes."""
        with self._up_to_date():
            return self._changes

    def all(self) -> list[Summary]:
        """Every conversation, those with news since the last seal first."""
        with self._up_to_date() as index:
            query = f"SELECT {_COLUMNS} FROM summary WHERE NOT gone ORDER BY shard NOT NULL, rowid"
            return list(map(Summary._make, index.rows(query)))

    def with_words(self, words: str) -> list[str]:
        """The ids of the conversations in whose id or messages all words occur, whatever their case."""
        condition, values = _condition(words, {})
        with self._up_to_date() as index:
            return [identity for (identity,) in index.rows(f"SELECT id FROM summary WHERE {condition}", *values)]

    def count(self, shards: Collection[str]) -> tuple[int, int, int]:
        """(all, those with news since the last seal, those whose newest version is in none of `shards`)."""
        with self._up_to_date() as index:
            rows = index.rows("SELECT shard, count(*) FROM summary WHERE NOT gone GROUP BY shard")
        numbers = dict(rows)
        logged, cleaned = numbers.get(None, 0), sum(numbers.get(shard, 0) for shard in shards)
        return (total := sum(numbers.values())), logged, total - logged - cleaned

    def ratings(self, since: str, until: str) -> tuple[int, int]:
        """(liked, liked or disliked) of the conversations that were last spoken in between two ISO 8601 times."""
        query = "SELECT count(*) FILTER (WHERE rating > 0), count(*) FROM summary WHERE NOT gone AND rating != 0"
        with self._up_to_date() as index:
            ((liked, rated),) = index.rows(f"{query} AND last_spoken >= ? AND last_spoken < ?", since, until)
        return liked, rated

    def deleted(self) -> list[Summary]:
        """The deleted conversations as they were, the newest first; one without messages was sealed as deleted."""
        with self._up_to_date() as index:
            query = f"SELECT {_COLUMNS} FROM summary WHERE gone ORDER BY last_spoken DESC"
            return [Summary(*row) for row in index.rows(query)]

    def conversation(self, identity: str, source: str | None = None) -> dict | None:
        """A conversation as it is now; None if nobody knows it, it was deleted, or it is of another source."""
        key = key_of(identity)
        with self._up_to_date():
            found, _ = self._folded(key)
        if found is None or not found["messages"] or source not in (None, found.get("source")):
            return None
        return found

    @contextmanager
    def _up_to_date(self) -> Iterator[LogIndex]:
        with self._lock:
            for attempt in range(ATTEMPTS):
                try:
                    self._refresh()
                    break
                except FileNotFoundError:  # a seal has moved on since the files were listed
                    self._clear()
                    if attempt == ATTEMPTS - 1:
                        raise
            yield self._index

    def _refresh(self) -> None:
        self._index.close_file()
        found = shard_paths(self.checkout / CONVERSATIONS, self.checkout / MANIFEST)
        shards = {path: (stat.st_mtime_ns, stat.st_size) for path in found if (stat := path.stat())}
        if dict(list(shards.items())[: len(self._shards)]) != self._shards:
            self._clear()  # a shard is gone or was changed, or came in before others
        new = [path for path in shards if path not in self._shards]
        changed = self._index.add_shards(new, self._summarise_version)
        self._shards = shards
        if new:
            changed |= self._index.touched_after(0)
        changed |= self._read_logs()
        if self._index.loose_events() > self._unmatched or (new and self._unmatched):
            changed |= self._index.add_shards(shards)  # a judgement that names a sealed message, and no conversation
        self._unmatched = self._index.loose_events()
        self._summarise(changed)
        self._changes += bool(changed or new)

    def _read_logs(self) -> set[bytes]:
        """Read what was added to the logs; returns the conversations that it, or a log that is gone, is about."""
        live = self.checkout / LOG
        closed = sorted((live.parent / "closed").glob("*.jsonl"))  # a seal that is not done yet
        present = {name: path for path in (*closed, live) if (name := _name_of(path)) is not None}
        changed = set()
        for name in self._logs.keys() - present.keys():
            changed |= self._index.remove_log(self._logs.pop(name)[0])
        for name, path in present.items():
            before, start = self._logs.get(name, (path, 0))
            if before != path:
                self._index.rename_log(before, path)
            last = self._index.last_event()
            start, _ = self._index.add_log(path, start, closed=path != live)
            self._logs[name] = (path, start)
            changed |= self._index.touched_after(last)
        return changed

    def _summarise_version(self, key: bytes, version: dict, shard: Path) -> None:
        self._put(key, version, shard.name, gone=bool(version.get("deleted")))

    def _summarise(self, changed: Iterable[bytes]) -> None:
        for key in changed:
            conversation, shard = self._folded(key)
            if gone := conversation is not None and bool(conversation.get("deleted")):
                conversation, shard = self._folded(key, undeleted=True)
            self._put(key, conversation, shard, gone)

    def _put(self, key: bytes, conversation: dict | None, shard: str | None, gone: bool) -> None:
        if conversation is not None and (conversation["messages"] or gone):
            row = (key, *_summary(conversation, shard), gone)
            self._index.rows(f"INSERT OR REPLACE INTO summary VALUES ({', '.join('?' * len(row))})", *row)
        else:
            self._index.rows("DELETE FROM summary WHERE conversation = ?", key)

    def _folded(self, key: bytes, undeleted: bool = False) -> tuple[dict | None, str | None]:
        """(conversation as it is now, or without its deletion, the shard that has it so)."""
        version, events = self._index.version(key), self._index.events(key)
        events = [event for event in events if not (undeleted and deletes(event))]
        known = {} if version is None else {version["id"]: version}
        fold(events, known)
        return next(iter(known.values()), None), None if events else self._index.shard(key)


@lru_cache(maxsize=4)
def conversation_index(checkout: Path) -> ConversationIndex:
    """The index of a checkout, one a process."""
    return ConversationIndex(checkout)


def counts(checkout: Path) -> tuple[int, int, int]:
    """Conversations: all, those with news that is not sealed, and those that are sealed and not cleaned yet."""
    return conversation_index(checkout).count(cleaned_shards(checkout))


def cleaned_shards(checkout: Path) -> set[str]:
    """Names of the shards that the last run cleaned."""
    taken_in = read_object(checkout / MANIFEST).get("shards", [])
    return {shard["name"] for shard in taken_in} if (checkout / REJECTED).exists() else set()


def _condition(words: str, titles: Mapping[str, str]) -> tuple[str, list[str | bytes]]:
    """What a query asks of a row, and its values: all words in its id, its messages or its title."""
    condition, values = "NOT gone", []
    for word in words.lower().split():
        named = [key_of(identity) for identity, title in titles.items() if word in title.lower()]
        condition += f" AND (instr(text, ?) OR instr(id, ?) OR conversation IN ({', '.join('?' * len(named))}))"
        values += [word, word, *named]
    return condition, values


def last_spoken(conversation: dict) -> str:
    return max((message.get("at") or "" for message in conversation["messages"]), default="")


def _summary(conversation: dict, shard: str | None) -> tuple:
    messages = conversation["messages"]
    first = next((message["content"] for message in messages if message.get("role") == "user"), "") or ""
    liked = sum(entry.get("rating") or 0 for entry in conversation.get("feedback") or [])
    values = (
        conversation["id"],
        conversation.get("source") or "unknown",
        str(conversation.get("started_at") or ""),
        last_spoken(conversation),
        len(messages),
        sum(len(message.get("content") or "") for message in messages),
        " ".join(str(first).split())[:BEGINNING],
        shard,
        (liked > 0) - (liked < 0),
        "\n".join(message.get("content") or "" for message in messages).lower(),
    )
    # A lone surrogate, which JSON can hold, has no UTF-8.
    return tuple(v.encode("utf-8", "replace").decode() if isinstance(v, str) else v for v in values)


def _name_of(log: Path) -> str | None:
    """What tells a log from others, whatever its path: its inode, which may be used again, and its first event."""
    try:
        with open(log, "rb") as file:
            first = file.readline()
            inode = log.stat().st_ino
    except FileNotFoundError:
        return None
    return f"{inode} {hashlib.sha256(first).hexdigest()}" if first.endswith(b"\n") else None
