"""The index that the pages read: every conversation in one row, kept up to date by reading only what is new.

It lives in temporary files as long as the process does, so that no copy of what was said outlasts it; a log that
`forget` rewrites, or a shard that changes, is read again.
"""

import hashlib
import json
import os
import tempfile
import threading
import weakref
from array import array
from bisect import bisect_right
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from fine_tuning.common.project import CONVERSATIONS, LOG, MANIFEST
from fine_tuning.common.records import read_object
from fine_tuning.data_collection.conversation_logger import deletes
from fine_tuning.data_collection.storage.log_index import LogIndex, key_of
from fine_tuning.data_collection.storage.shards import shard_paths
from fine_tuning.schema.conversation import fold

if TYPE_CHECKING:
    import numpy as np

REJECTED = Path("data/clean/rejected.jsonl")
ATTEMPTS = 3  # to read files that others move meanwhile
BEGINNING = 60  # characters of the first message that a row keeps
AT_ONCE = 1024  # texts that a search reads at once

_SUMMARY = """
    PRAGMA cache_size = -65536;
    CREATE TABLE summary (number INTEGER PRIMARY KEY, id TEXT, source TEXT, started_at TEXT, last_spoken TEXT,
        messages INT, characters INT, begins TEXT, rating INT, gone INT);
"""
_BY_TIME = (  # made when the rows are there, which is quicker
    "CREATE INDEX IF NOT EXISTS by_time ON summary (source, gone, last_spoken)",
    "CREATE INDEX IF NOT EXISTS rated ON summary (last_spoken, rating) WHERE rating != 0 AND NOT gone",
    "CREATE INDEX IF NOT EXISTS deleted ON summary (last_spoken, messages) WHERE gone",
)
_COLUMNS = "number, id, source, started_at, last_spoken, messages, characters, begins, rating"
_ROW = [("there", "?"), ("shard", "i4"), ("source", "i4"), ("day", "i4"), ("characters", "i8"), ("rating", "i1")]


class Summary(NamedTuple):
    """One conversation, and its number in the index. `rating` is 1 where its replies are liked rather than disliked, -1
    where the other way round, else 0. In texts a question mark stands for a lone surrogate."""

    number: int
    id: str
    source: str
    started_at: str
    last_spoken: str
    messages: int
    characters: int
    begins: str
    rating: int


class Columns:
    """What is counted of all conversations: a row of numbers each. In it a shard, a source and a day stand for an entry
    of `names`, the shard None for news since the last seal."""

    def __init__(self) -> None:
        import numpy as np  # here, as commands that read no conversation start without it

        self.rows = np.zeros(1024, _ROW)
        self.names: dict[str, dict[str | None, int]] = {"shard": {None: 0}, "source": {}, "day": {}}

    def put(self, one: Summary, shard: str | None) -> None:
        if one.number >= len(self.rows):
            before, self.rows = self.rows, self.rows.repeat(2 + one.number // len(self.rows))
            self.rows[:] = False
            self.rows[: len(before)] = before
        given = {"shard": shard, "source": one.source, "day": one.started_at[:10]}
        codes = (self.names[name].setdefault(value, len(self.names[name])) for name, value in given.items())
        self.rows[one.number] = (True, *codes, one.characters, one.rating)

    def remove(self, number: int) -> None:
        if number < len(self.rows):
            self.rows["there"][number] = False


class Texts:
    """What is searched for words, by number, in a temporary file: its bytes take a third of the time of table rows."""

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile()  # noqa: SIM115 (open as long as the index)
        weakref.finalize(self, self._file.close)
        self._starts, self._numbers = array("q", [0]), array("q")  # where each text begins; whose it is, 0 for nobody's
        self._places = array("q")  # of a number's text among them, or -1

    def put(self, number: int, text: str) -> None:
        self.remove(number)
        self._places.extend([-1] * (number + 1 - len(self._places)))
        self._places[number] = len(self._numbers)
        self._numbers.append(number)
        self._starts.append(self._starts[-1] + self._file.write(text.encode() + b"\n"))

    def remove(self, number: int) -> None:
        if number < len(self._places) and (place := self._places[number]) >= 0:
            self._places[number], self._numbers[place] = -1, 0
            self._file.seek(self._starts[place])
            self._file.write(bytes(self._starts[place + 1] - self._starts[place]))
            self._file.seek(0, os.SEEK_END)

    def get(self, number: int) -> str:
        """The text of a number, or ""."""
        place = self._places[number] if number < len(self._places) else -1
        return self._read(self._starts[place : place + 2]).decode() if place >= 0 else ""

    def having(self, words: Iterable[str]) -> list[int]:
        """The numbers whose texts have all words."""
        first, *others = sorted((word.encode() for word in words), key=len, reverse=True)
        found = []
        for step in range(0, len(self._numbers), AT_ONCE):
            starts = self._starts[step : step + AT_ONCE + 1].tolist()
            content, numbers, place = self._read(starts), self._numbers[step : step + AT_ONCE], -1
            position = content.find(first) + starts[0]
            while starts[0] <= position < starts[-1]:
                place += 1
                if position >= starts[place + 1]:  # not in the text behind the last one
                    place = bisect_right(starts, position, place + 2) - 1
                start, end = starts[place] - starts[0], starts[place + 1] - starts[0]
                if not others or all(content.find(word, start, end) >= 0 for word in others):
                    found.append(numbers[place])
                position = content.find(first, end) + starts[0]
        return [number for number in found if number]

    def _read(self, starts: Sequence[int]) -> bytes:
        self._file.flush()
        return os.pread(self._file.fileno(), starts[-1] - starts[0], starts[0])


class ConversationIndex:
    """The conversations of a checkout: what the logs say, on top of what was sealed before. Threads may share it."""

    def __init__(self, checkout: Path) -> None:
        self.checkout = checkout
        self._lock = threading.Lock()
        self._changes = self._numbered = 0
        self._clear()

    def _clear(self) -> None:
        self._changes += 1
        self._numbered += 1
        self._index, self._columns, self._texts = LogIndex(_SUMMARY), Columns(), Texts()
        self._shards: dict[Path, tuple[int, int]] = {}
        self._unmatched = 0
        self._logs: dict[str, tuple[Path, int]] = {}  # what tells a log from others → its path, bytes read

    def listed(
        self, source: str, words: str = "", titles: Mapping[str, str] | None = None, limit: int = 60
    ) -> tuple[list[Summary], int]:
        """The conversations of a source in whose title or messages all words occur, whatever their case: those spoken
        in last, at most `limit`, and how many there are."""
        condition, values = "source = ? AND gone = 0", [source]
        with self._up_to_date() as index:
            if words.strip():
                condition += " AND number IN (SELECT value FROM json_each(?))"
                values.append(json.dumps(self._found(words, titles or {})))
            ((count,),) = index.rows(f"SELECT count(*) FROM summary WHERE {condition}", *values)
            query = f"SELECT {_COLUMNS} FROM summary WHERE {condition} ORDER BY last_spoken DESC LIMIT {limit}"
            return [Summary(*row) for row in index.rows(query, *values)], count

    def state(self) -> tuple[int, int]:
        """A number that grows whenever a conversation comes, changes or goes; and one that grows when the conversations
        get other numbers."""
        with self._up_to_date():
            return self._changes, self._numbered

    def was_read(self) -> bool:
        """Whether what is sealed and logged was read; the first time takes half a minute for a million."""
        return bool(self._shards or self._logs)

    def columns(self) -> tuple["np.ndarray", dict[str, list[str | None]]]:
        """A copy of the `Columns`: the row of each number, and the names that its numbers stand for."""
        with self._up_to_date():
            return self._columns.rows.copy(), {name: list(codes) for name, codes in self._columns.names.items()}

    def summaries(self, numbers: Iterable[int]) -> list[Summary]:
        """Conversations by their numbers."""
        query = f"SELECT {_COLUMNS} FROM summary WHERE number = ?"
        with self._up_to_date() as index:
            return [Summary(*row) for number in numbers for row in index.rows(query, int(number))]

    def numbers(self, identities: Iterable[str]) -> list[int]:
        """The numbers of conversations, also of those that are not there."""
        with self._up_to_date() as index:
            return [index.number(key_of(identity)) for identity in identities]

    def identities(self, first: int, limit: int = 100_000) -> list[str]:
        """The ids with the numbers from `first` on, at most `limit`."""
        with self._up_to_date() as index:
            query = "SELECT conversation FROM known WHERE number >= ? ORDER BY number LIMIT ?"
            keys = index.rows(query, first, limit)
        return [key.decode("utf-8", "surrogatepass") for (key,) in keys]

    def with_words(self, words: str) -> list[int]:
        """The numbers of the conversations in whose id or messages all words occur, whatever their case."""
        with self._up_to_date():
            return self._found(words, {})

    def count(self, shards: Collection[str]) -> tuple[int, int, int]:
        """(all, those with news since the last seal, those whose newest version is in none of `shards`)."""
        import numpy as np

        with self._up_to_date():
            rows, names = self._columns.rows, self._columns.names["shard"]
            numbers = np.bincount(rows["shard"], rows["there"], len(names)).astype(int).tolist()
            cleaned = sum(number for number, shard in zip(numbers, names, strict=True) if shard in shards)
        return (total := sum(numbers)), numbers[0], total - numbers[0] - cleaned

    def ratings(self, since: str, until: str) -> tuple[int, int]:
        """(liked, liked or disliked) of the conversations that were last spoken in between two ISO 8601 times."""
        query = "SELECT count(*) FILTER (WHERE rating > 0), count(*) FROM summary WHERE NOT gone AND rating != 0"
        with self._up_to_date() as index:
            ((liked, rated),) = index.rows(f"{query} AND last_spoken >= ? AND last_spoken < ?", since, until)
        return liked, rated

    def deleted(self, limit: int = 60) -> tuple[list[Summary], int, int]:
        """The deleted conversations as they were, the newest first, at most `limit`; how many are deleted; and how many
        of those have no messages, because they were sealed so."""
        with self._up_to_date() as index:
            query = f"SELECT {_COLUMNS} FROM summary WHERE gone AND messages ORDER BY last_spoken DESC LIMIT {limit}"
            ((count, sealed),) = index.rows("SELECT count(*), sum(NOT messages) FROM summary WHERE gone")
            return [Summary(*row) for row in index.rows(query)], count, sealed or 0

    def conversation(self, identity: str, source: str | None = None) -> dict | None:
        """A conversation as it is now, by its id or what a `Summary` has for it; None if nobody knows it, it was
        deleted, or it is of another source."""
        query = "SELECT conversation FROM known JOIN summary USING (number) WHERE id = ?"
        with self._up_to_date() as index:
            found, _ = self._folded(key_of(identity))
            if found is None and "?" in identity:
                found = next((self._folded(key)[0] for (key,) in index.rows(query, _printable(identity))), None)
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
                except BaseException as error:
                    self._clear()  # half of a shard may be in it
                    moved = isinstance(error, FileNotFoundError)  # a seal has moved on since the files were listed
                    if not moved or attempt == ATTEMPTS - 1:
                        raise
            yield self._index

    def _refresh(self) -> None:
        self._index.close_file()
        found = shard_paths(self.checkout / CONVERSATIONS, self.checkout / MANIFEST)
        shards = {path: (stat.st_mtime_ns, stat.st_size) for path in found if (stat := path.stat())}
        if list(shards.items())[: len(self._shards)] != list(self._shards.items()):
            self._clear()  # a shard is gone or was changed, came in before others, or has another place
        new = [path for path in shards if path not in self._shards]
        changed = self._index.add_shards(new, self._summarise_version)
        for query in _BY_TIME:
            self._index.rows(query)
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

    def _summarise_version(self, number: int, version: dict, shard: Path) -> None:
        self._put(number, version, shard.name, gone=bool(version.get("deleted")))

    def _summarise(self, changed: Iterable[bytes]) -> None:
        for key in changed:
            conversation, shard = self._folded(key)
            if gone := conversation is not None and bool(conversation.get("deleted")):
                conversation, shard = self._folded(key, undeleted=True)
            self._put(self._index.number(key), conversation, shard, gone)

    def _put(self, number: int, conversation: dict | None, shard: str | None, gone: bool) -> None:
        there = conversation is not None and (conversation["messages"] or gone)
        if conversation is None or not there:
            self._index.rows("DELETE FROM summary WHERE number = ?", number)
        else:
            one, text = _summary(number, conversation)
            self._index.rows("INSERT OR REPLACE INTO summary VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", *one, gone)
        if there and not gone:
            self._texts.put(number, text)
            self._columns.put(one, shard)
        else:
            self._texts.remove(number)
            self._columns.remove(number)

    def _found(self, words: str, titles: Mapping[str, str]) -> list[int]:
        """Who has all words in its messages, its id or its title."""
        wanted = list(dict.fromkeys(_printable(words).lower().split())) or [""]
        found = self._texts.having(wanted)
        for identity, title in titles.items():
            if any(word in title.lower() for word in wanted):
                known = self._index.rows("SELECT number FROM known WHERE conversation = ?", key_of(identity))
                texts = ((number, f"{title.lower()}\n{self._texts.get(number)}") for (number,) in known)
                found += [number for number, text in texts if all(word in text for word in wanted)]
        return found

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


def last_spoken(conversation: dict) -> str:
    return max((str(message.get("at") or "") for message in conversation["messages"]), default="")


def _summary(number: int, conversation: dict) -> tuple[Summary, str]:
    """The summary, and what is searched for words."""
    messages = conversation["messages"]
    contents = [message.get("content") or "" for message in messages]
    first = next((text for message, text in zip(messages, contents, strict=True) if message.get("role") == "user"), "")
    ratings = [entry.get("rating") for entry in conversation.get("feedback") or ()]
    liked = sum(rating for rating in ratings if isinstance(rating, int | float))
    texts = (
        conversation["id"],
        str(conversation.get("source") or "unknown"),
        str(conversation.get("started_at") or ""),
        last_spoken(conversation),
        " ".join(first.split())[:BEGINNING],
        "\n".join([*contents, conversation["id"]]).lower(),
    )
    if not all(map(str.isascii, texts)):
        texts = tuple(map(_printable, texts))
    identity, source, started, spoken, begins, text = texts
    size, rating = sum(map(len, contents)), (liked > 0) - (liked < 0)
    return Summary(number, identity, source, started, spoken, len(messages), size, begins, rating), text


def _printable(text: str) -> str:
    """A lone surrogate, which JSON can hold, has no UTF-8: a question mark stands for it."""
    return text.encode("utf-8", "replace").decode()


def _name_of(log: Path) -> str | None:
    """What tells a log from others, whatever its path: its inode, which may be used again, and its first event."""
    try:
        with open(log, "rb") as file:
            first = file.readline()
            inode = log.stat().st_ino
    except FileNotFoundError:
        return None
    return f"{inode} {hashlib.sha256(first).hexdigest()}" if first.endswith(b"\n") else None
