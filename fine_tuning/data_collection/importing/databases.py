"""SQLite databases in which other programs keep their chats: Open WebUI's webui.db, and logs.db of simonw/llm.

They are opened read-only, live or as a copy, and read as they were at one moment.
"""

import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from fine_tuning.common.errors import UserError
from fine_tuning.data_collection.importing import llm_logs, open_webui

OVERLAP = 3600.0  # seconds: a change may be stored that much later than its time says
_AT = "strftime('%s', datetime_utc) + 0"
# {table: the time of a row's last change in seconds since 1970}; the first one is in every version.
PROGRAMS = (
    ({"chat": "updated_at", "feedback": "updated_at"}, open_webui.read_database),
    ({"responses": _AT, "turns": _AT}, llm_logs.read_database),
)


def records_in_database(path: Path, since: float = 0.0) -> Iterator[tuple[int, Any]]:
    """The numbered records of what changed at `since` or later. Raises UserError if it is of another program or
    unreadable."""
    with _opened(path) as (db, tables, _, read):
        yield from enumerate(read(db, tables, since), start=1)


def last_change(path: Path) -> float:
    """The `since` for the next time: what is stored from now on is at or behind it."""
    with _opened(path) as (db, tables, times, _):
        newest = (db.execute(f"SELECT max({times[t]}) FROM {t}").fetchone()[0] for t in times.keys() & tables)
        return max((float(time) for time in newest if time is not None), default=OVERLAP) - OVERLAP


@contextmanager
def _opened(path: Path) -> Iterator[tuple]:
    with closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True, isolation_level=None)) as db:
        db.row_factory, db.text_factory = sqlite3.Row, lambda text: text.decode("utf-8", "replace")
        try:
            db.execute("BEGIN")
            tables = {name for (name,) in db.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
            found = [program for program in PROGRAMS if next(iter(program[0])) in tables]
            if not found:
                raise UserError(f"{path} is a database of no known program: give a webui.db or the logs.db of llm")
            yield (db, tables, *found[0])
        except (sqlite3.Error, KeyError, ValueError, TypeError, AttributeError) as error:
            why = f"{path} cannot be read as a database ({type(error).__name__})"
            raise UserError(f"{why}: copy it with `sqlite3 {path} '.backup copy.db'`, import the copy") from None
