"""An index of logs: where the events of each conversation are, on disk instead of in memory.

The index is a temporary SQLite database: SQLite removes it when the process ends, and spills to disk what does not fit
its cache of two megabytes. It holds positions and ids, no texts.
"""

import os
import sqlite3
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from fine_tuning.common.records import read_line
from fine_tuning.data_collection.conversation_logger import read_event
from fine_tuning.data_collection.storage.shard_index import ShardIndex, key_of
from fine_tuning.data_collection.storage.shards import located_versions
from fine_tuning.schema.conversation import message_ids

_TABLES = """
    CREATE TABLE file (number INTEGER PRIMARY KEY, path TEXT UNIQUE);
    CREATE TABLE event (file INT, start INT, length INT, conversation BLOB, exchange BLOB, message BLOB);
    CREATE INDEX of_conversation ON event (conversation);
    CREATE INDEX of_exchange ON event (exchange) WHERE exchange NOT NULL;
    CREATE TABLE known (number INTEGER PRIMARY KEY, conversation BLOB UNIQUE, file INT, start INT, length INT);
"""
_PUT = (
    "INSERT INTO known (conversation, file, start, length) VALUES (?, ?, ?, ?) ON CONFLICT DO UPDATE "
    "SET file = excluded.file, start = excluded.start, length = excluded.length RETURNING number"
)
_HAS_EVENTS = "SELECT 1 FROM event WHERE conversation = ? LIMIT 1"
_PLACE, _FILE = "SELECT path, start, length FROM", "JOIN file ON file = file.number"


class LogIndex:
    """Events of logs and newest versions in shards, by conversation.

    An event that names only a message belongs to the conversation of the exchange with that id, or to the sealed one
    that has the message.
    """

    def __init__(self, more_tables: str = "") -> None:
        self._db = sqlite3.connect("", isolation_level=None, check_same_thread=False)
        self._open: BinaryIO | None = None  # the file that was read last
        self._db.executescript(f"PRAGMA journal_mode = OFF; PRAGMA synchronous = OFF; {_TABLES} {more_tables}")

    def add_log(self, log: Path, start: int = 0, closed: bool = True) -> tuple[int, list[tuple[int, int]]]:
        """Index the events of a log from the byte `start` on. Of one that is not `closed`, but written to, a line
        without its newline is not there yet.

        Returns the byte behind the last line, and (start, length) of the lines that are no events.
        """
        number, torn = self._number(log), []
        with open(log, "rb") as file:
            file.seek(start)
            self._db.execute("BEGIN")
            for line in file:
                if not closed and not line.endswith(b"\n"):
                    break
                event = read_event(line.rstrip(b"\n"))
                if event is None:
                    torn += [(start, len(line))] if line.strip() else []
                else:
                    self._insert(event, number, start, len(line))
                start += len(line)
            self._db.execute("COMMIT")
        return start, torn

    def _insert(self, event: dict, number: int, start: int, length: int) -> None:
        exchange = event["id"] if event["event"] == "exchange" else None
        names = (event.get("conversation_id") or exchange, exchange, event.get("message_id"))
        owner, exchange_key, message = (None if name is None else key_of(name) for name in names)
        if owner is None and message is not None:
            asked = message.removesuffix(b"-user")
            found = self.rows("SELECT conversation FROM event WHERE exchange = ?", asked)
            owner = found[-1][0] if found else None
        row = (number, start, length, owner, exchange_key, message)
        self._db.execute("INSERT INTO event VALUES (?, ?, ?, ?, ?, ?)", row)

    def add_shards(self, paths: Iterable[Path], see: Callable[[int, dict, Path], None] | None = None) -> set[bytes]:
        """Index the newest versions in `paths`, in shard order, of the conversations that have events; or of all, where
        `see` gets (number, version, shard) of each version.

        Returns the keys of the conversations that events were found to belong to.
        """
        return self._add_versions(located_versions(paths), see)

    def add_indexed(self, shards: ShardIndex) -> None:
        """`add_shards` that reads of the shards only the conversations that have events, unless an event names only a
        message that no log has."""
        if self._loose():
            self.add_shards(shards.shards)
        else:
            keys = self._db.execute("SELECT DISTINCT conversation FROM event WHERE conversation NOT NULL")
            self._add_versions(shards.located(key for (key,) in keys))

    def _loose(self) -> set[bytes]:
        """Messages that events name, and that belong to no conversation that is known."""
        return {key for (key,) in self.rows("SELECT message FROM event WHERE conversation IS NULL")} - {None}

    def _add_versions(
        self, located: Iterable[tuple[Path, int, int, dict]], see: Callable[[int, dict, Path], None] | None = None
    ) -> set[bytes]:
        loose, indexed, shard, file = self._loose(), set(), None, 0
        self.rows("BEGIN")
        for path, start, length, version in located:
            key = key_of(version["id"])
            for message in loose.intersection(map(key_of, message_ids(version))) if loose else ():
                self.rows("UPDATE event SET conversation = ? WHERE conversation IS NULL AND message = ?", key, message)
                indexed.add(key)
            if path is not shard:
                shard, file = path, self._number(path)
            if see or self.rows(_HAS_EVENTS, key):
                ((number,),) = self.rows(_PUT, key, file, start, length)
                if see:
                    see(number, version, path)
        self.rows("COMMIT")
        return indexed

    def remove_log(self, log: Path) -> set[bytes]:
        """Forget the events of a log; returns the keys of their conversations."""
        number = self._number(log)
        touched = {key for (key,) in self.rows("SELECT conversation FROM event WHERE file = ?", number)} - {None}
        self.rows("DELETE FROM event WHERE file = ?", number)
        self.rows("DELETE FROM file WHERE number = ?", number)
        return touched

    def rename_log(self, log: Path, target: Path) -> None:
        """A log that is indexed has another path now."""
        self.rows("UPDATE file SET path = ? WHERE path = ?", str(target), str(log))

    def loose_events(self) -> int:
        """How many events belong to no conversation that is known."""
        return self.rows("SELECT count(*) FROM event WHERE conversation IS NULL")[0][0]

    def last_event(self) -> int:
        """Number of the event that was indexed last."""
        return self.rows("SELECT coalesce(max(rowid), 0) FROM event")[0][0]

    def touched_after(self, event: int) -> set[bytes]:
        """Keys of the conversations that the events behind a numbered one are about."""
        return {key for (key,) in self.rows("SELECT conversation FROM event WHERE rowid > ?", event)} - {None}

    def conversations(self) -> Iterator[tuple[dict | None, list[dict]]]:
        """(newest sealed version, events in their order) of every conversation that has events.

        Sealed ones come first, in the order in which they were sealed, then new ones in the order of their first event;
        at the end (None, events) with the events that belong to none.
        """
        keys = self._db.execute(
            "SELECT event.conversation FROM event LEFT JOIN known USING (conversation) WHERE event.conversation NOT "
            "NULL GROUP BY event.conversation ORDER BY known.file IS NULL, known.number, min(event.rowid)"
        )
        for (key,) in keys:
            yield self.version(key), self.events(key)
        if loose := self._events_where("conversation IS NULL"):
            yield None, loose

    def version(self, key: bytes) -> dict | None:
        place = self.rows(f"{_PLACE} known {_FILE} WHERE conversation = ?", key)
        return read_line(self.read(*place[0])) if place else None

    def shard(self, key: bytes) -> str | None:
        """Name of the shard that has the newest sealed version of a conversation."""
        place = self.rows(f"{_PLACE} known {_FILE} WHERE conversation = ?", key)
        return Path(place[0][0]).name if place else None

    def events(self, key: bytes) -> list[dict]:
        """The events of a conversation in their order."""
        return self._events_where("conversation = ?", key)

    def _events_where(self, condition: str, *values: Any) -> list[dict]:
        places = self.rows(f"{_PLACE} event {_FILE} WHERE {condition} ORDER BY event.rowid", *values)
        return [event for place in places if (event := read_event(self.read(*place).rstrip(b"\n"))) is not None]

    def number(self, key: bytes) -> int:
        """The number of a conversation, a new one if it has none yet."""
        found = self.rows("SELECT number FROM known WHERE conversation = ?", key)
        return (found or self.rows("INSERT INTO known (conversation) VALUES (?) RETURNING number", key))[0][0]

    def _number(self, path: Path) -> int:
        self.rows("INSERT OR IGNORE INTO file (path) VALUES (?)", str(path))
        return self.rows("SELECT number FROM file WHERE path = ?", str(path))[0][0]

    def read(self, path: str, start: int, length: int) -> bytes:
        """Bytes of a log or shard."""
        if self._open is None or self._open.name != path:
            self.close_file()
            self._open = open(path, "rb")  # noqa: SIM115 (kept for the next read)
        return os.pread(self._open.fileno(), length, start)

    def close_file(self) -> None:
        """Open the next file that is read anew: another one may be at its path."""
        if self._open is not None:
            self._open.close()
        self._open = None

    def rows(self, query: str, *values: Any) -> list[tuple]:
        return self._db.execute(query, values).fetchall()
