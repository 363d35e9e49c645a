"""An index of logs: where the events of each conversation are, on disk instead of in memory.

The index is a temporary SQLite database: SQLite removes it when the process ends, and spills to disk what does not fit
its cache of two megabytes. It holds positions and ids, no texts.
"""

import os
import sqlite3
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from fine_tuning.data_collection.conversation import message_ids
from fine_tuning.data_collection.conversation_logger import read_event
from fine_tuning.data_collection.shards import located_versions
from fine_tuning.records import read_line

_TABLES = """
    CREATE TABLE file (number INTEGER PRIMARY KEY, path TEXT UNIQUE);
    CREATE TABLE event (file INT, start INT, length INT, conversation BLOB, exchange BLOB, message BLOB);
    CREATE INDEX of_conversation ON event (conversation);
    CREATE INDEX of_exchange ON event (exchange) WHERE exchange NOT NULL;
    CREATE TABLE sealed (number INTEGER PRIMARY KEY, conversation BLOB UNIQUE, file INT, start INT, length INT);
"""


class LogIndex:
    """Events of logs and newest versions in shards, by conversation.

    An event that names only a message belongs to the conversation of the exchange with that id, or to the sealed one
    that has the message.
    """

    def __init__(self) -> None:
        self._db = sqlite3.connect("", isolation_level=None, check_same_thread=False)
        self._open: BinaryIO | None = None  # the file that was read last
        self._db.executescript(f"PRAGMA journal_mode = OFF; PRAGMA synchronous = OFF; {_TABLES}")

    def add_log(self, log: Path, start: int = 0, closed: bool = True) -> tuple[int, list[tuple[int, int]]]:
        """Index the events of a log from the byte `start` on.

        Args:
            closed: whether nobody writes to it any more. Of a live log, a line without its newline is not there yet.

        Returns:
            The byte behind the last line, and (start, length) of the lines that are no events.
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
        conversation, message = event.get("conversation_id") or exchange, event.get("message_id")
        owner = _key(conversation)
        if owner is None and message is not None:
            row = self._row("SELECT conversation FROM event WHERE exchange = ?", _key(message.removesuffix("-user")))
            owner = row and row[0]
        row = (number, start, length, owner, _key(exchange), _key(message))
        self._db.execute("INSERT INTO event VALUES (?, ?, ?, ?, ?, ?)", row)

    def add_shards(self, paths: Iterable[Path]) -> None:
        """Index the newest versions in `paths`, in shard order, of the conversations that have events."""
        loose = {key for (key,) in self._db.execute("SELECT message FROM event WHERE conversation IS NULL")} - {None}

        def wanted(identity: str) -> bool:
            return bool(loose) or self._row("SELECT 1 FROM event WHERE conversation = ?", _key(identity)) is not None

        self._db.execute("BEGIN")
        for path, start, length, version in located_versions(paths, wanted):
            key = _key(version["id"])
            held = loose.intersection(map(_key, message_ids(version))) if loose else ()
            for message in held:
                self._db.execute(
                    "UPDATE event SET conversation = ? WHERE conversation IS NULL AND message = ?", (key, message)
                )
            if self._row("SELECT 1 FROM event WHERE conversation = ?", key):
                self._db.execute(
                    "INSERT INTO sealed (conversation, file, start, length) VALUES (?, ?, ?, ?) ON CONFLICT DO UPDATE "
                    "SET file = excluded.file, start = excluded.start, length = excluded.length",
                    (key, self._number(path), start, length),
                )
        self._db.execute("COMMIT")

    def conversations(self) -> Iterator[tuple[dict | None, list[dict]]]:
        """(newest sealed version, events in their order) of every conversation that has events.

        Sealed ones come first, in the order in which they were sealed, then new ones in the order of their first event;
        at the end (None, events) with the events that belong to none.
        """
        keys = self._db.execute(
            "SELECT event.conversation FROM event LEFT JOIN sealed USING (conversation) WHERE event.conversation NOT "
            "NULL GROUP BY event.conversation ORDER BY sealed.number IS NULL, sealed.number, min(event.rowid)"
        )
        for (key,) in keys:
            yield self._version(key), self._events("conversation = ?", key)
        if loose := self._events("conversation IS NULL"):
            yield None, loose

    def _version(self, key: bytes) -> dict | None:
        place = self._row(
            "SELECT path, start, length FROM sealed JOIN file ON file = file.number WHERE conversation = ?", key
        )
        return read_line(self._read(*place)) if place else None

    def _events(self, condition: str, *values: Any) -> list[dict]:
        places = self._db.execute(
            f"SELECT path, start, length FROM event JOIN file ON file = number WHERE {condition} ORDER BY event.rowid",
            values,
        )
        return [event for place in places if (event := read_event(self._read(*place).rstrip(b"\n"))) is not None]

    def _number(self, path: Path) -> int:
        self._db.execute("INSERT OR IGNORE INTO file (path) VALUES (?)", (str(path),))
        return self._row("SELECT number FROM file WHERE path = ?", str(path))[0]

    def _read(self, path: str, start: int, length: int) -> bytes:
        if self._open is None or self._open.name != path:
            if self._open is not None:
                self._open.close()
            self._open = open(path, "rb")  # noqa: SIM115 (kept for the next read)
        return os.pread(self._open.fileno(), length, start)

    def _row(self, query: str, *values: Any) -> tuple | None:
        return self._db.execute(query, values).fetchone()


def _key(identity: str | None) -> bytes | None:
    """An id as SQLite keeps it, lone surrogates too."""
    return None if identity is None else identity.encode("utf-8", "surrogatepass")
