"""The canary: a share of the conversations with the live model is answered by another version, until it does harm.

Which version answers a conversation follows from a secret salt and the conversation's id, or how it begins where the
client names none: equal beginnings are one unit. A unit keeps its version, and is one observation: it went badly where
a reply is disliked, regenerated, edited or fails within SIGNAL_SECONDS of the last turn. State is a SQLite file that
gateway, app and commands share; it holds keyed hashes instead of ids, and none of them once the canary has ended.
"""

import hashlib
import hmac
import math
import secrets
import sqlite3
import statistics
import subprocess
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fine_tuning.common.errors import UserError, count_of
from fine_tuning.evaluation.verdict.settings import DECIDES
from fine_tuning.integration.jobs import own_command

STATE = Path(".whetstone/canary.sqlite")
SIGNAL_SECONDS = 3600.0
ENOUGH = 100  # conversations of the candidate that are over, after which the canary ends without alarm
# Fixed bounds on what is no matter of taste: so many of the last replies failed, and more than the live version's did;
# the median time per character of the last replies is so many times that of the live version's.
ERRORS, ERRORS_OF = 3, 20
SLOWER, SLOWER_OF = 2.0, 50
SHORT = 100  # characters that a shorter reply counts as: most of its time passes before its first word
BUSY_SECONDS = 2.0  # for another process to finish its write; a chat waits no longer
ROLLED_BACK, FINISHED, STOPPED = "rolled back", "finished", "stopped"
_TABLES = """
    CREATE TABLE IF NOT EXISTS canary (number INTEGER PRIMARY KEY, name TEXT, candidate INT, live INT, share REAL,
        salt BLOB, ended REAL, outcome TEXT, why TEXT, settled INT DEFAULT 0);
    CREATE TABLE IF NOT EXISTS unit (key BLOB PRIMARY KEY, candidate INT, share REAL, last REAL, bad TEXT);
    CREATE TABLE IF NOT EXISTS conversation (key BLOB PRIMARY KEY, unit BLOB);
    CREATE TABLE IF NOT EXISTS reply (candidate INT, pace REAL);
"""
_COLUMNS = "number, name, candidate, live, share, salt, outcome, why, settled"


@dataclass(frozen=True)
class State:
    """A canary. `outcome` is None while it runs; `settled` whether what follows from the outcome was done."""

    number: int
    name: str
    candidate: int
    live: int
    share: float
    salt: bytes
    outcome: str | None
    why: str | None
    settled: bool

    @property
    def tag(self) -> str:
        """The candidate's name on the server."""
        return f"{self.name}:{self.candidate}"


@dataclass(frozen=True)
class Counts:
    """Conversations of both versions and how many of each went badly; `over` are the candidate's that no signal can
    reach any more; `evidence` is the e-value against "the candidate is no worse"."""

    candidate: int
    live: int
    candidate_bad: int
    live_bad: int
    over: int
    evidence: float

    def __str__(self) -> str:
        return (
            f"{self.candidate_bad} of {self.candidate} conversations with the candidate went badly, {self.live_bad} of "
            f"{self.live} with the live version; e-value {self.evidence:.3g} of {DECIDES:.0f}"
        )


class Canary:
    """The canary of a checkout. Threads and processes may share it; where its state cannot be read or written, chats
    go on with the live version."""

    def __init__(self, checkout: Path) -> None:
        self.checkout = checkout

    # ------------------------------------------------------------------------------------------------------- commands

    def begin(self, name: str, candidate: int, live: int, share: float) -> None:
        """Begin one, or give the one that runs with these versions another share of the conversations to come. Raises
        UserError if one of another version runs."""
        path = self.checkout / STATE
        path.parent.mkdir(exist_ok=True)
        path.touch(0o600)
        with self._writing() as db:
            if (state := _running(db)) is not None:
                if (state.name, state.candidate, state.live) != (name, candidate, live):
                    raise UserError(f"the canary of {state.tag} runs: `python -m fine_tuning canary --stop` ends it")
                db.execute("UPDATE canary SET share = ? WHERE number = ?", (share, state.number))
                return
            row = (name, candidate, live, share, secrets.token_bytes(32))
            db.execute("INSERT INTO canary (name, candidate, live, share, salt) VALUES (?, ?, ?, ?, ?)", row)

    def stop(self, why: str) -> bool:
        """End the one that runs; whether one did."""
        with self._writing() as db:
            state = _running(db)
            return state is not None and _end(db, state, STOPPED, why)

    def state(self) -> State | None:
        with self._writing() as db:
            return _newest(db)

    def counts(self) -> Counts:
        """What was observed by now; nothing once it has ended."""
        with self._writing() as db:
            return _counts(db)

    def settled(self, number: int) -> None:
        """What follows from a canary's outcome was done."""
        with self._writing() as db:
            db.execute("UPDATE canary SET settled = 1 WHERE number = ?", (number,))

    # ---------------------------------------------------------------------------------------------------------- chats

    def candidate_for(self, conversation: str, unit: str, new: bool) -> State | None:
        """The canary whose candidate answers a conversation; None where the live version does. Conversations of one
        `unit` are observed as one; those that are not `new` stay with the version that they began with."""
        with suppress(UserError, OSError), self._writing() as db:
            state = _running(db)
            if state is None:
                return None
            key, unit_key = _key(state, conversation), _key(state, unit)
            known = db.execute("SELECT unit FROM conversation WHERE key = ?", (key,)).fetchone()
            if known is None and not new:
                return None
            if known is None:
                arm = int.from_bytes(unit_key[:8]) < state.share * 2**64
                row = (unit_key, arm, state.share, time.time())
                db.execute("INSERT OR IGNORE INTO unit VALUES (?, ?, ?, ?, NULL)", row)
                db.execute("INSERT INTO conversation VALUES (?, ?)", (key, unit_key))
            of = (known[0] if known else unit_key,)
            (arm,) = db.execute("SELECT candidate FROM unit WHERE key = ?", of).fetchone()
            return state if arm else None
        return None

    def observe(self, event: dict[str, Any]) -> None:
        """Take in an event that was logged."""
        metadata, kind = event.get("metadata") or {}, event["event"]
        bad = {"feedback": "thumb down" if event.get("rating") == -1 else None, "edit": "edited"}.get(kind)
        bad = "regenerated" if kind == "exchange" and metadata.get("replaces") else bad
        pace = None
        if kind == "exchange" and isinstance(metadata.get("seconds"), (int, float)) and "incomplete" not in metadata:
            pace = metadata["seconds"] / max(len(event["assistant_response"]), SHORT)
        if event.get("conversation_id") and (bad or kind == "exchange"):
            self._note(event["conversation_id"], bad, kind == "exchange", pace)

    def failed(self, conversation: str) -> None:
        self._note(conversation, "failed", True, math.inf)

    def check(self) -> None:
        with suppress(UserError, OSError), self._writing() as db:
            if (state := _running(db)) is not None:
                self._end_if_over(db, state)

    def _note(self, conversation: str, bad: str | None, turn: bool, pace: float | None) -> None:
        with suppress(UserError, OSError), self._writing() as db:
            if (state := _running(db)) is None:
                return
            of = "key = (SELECT unit FROM conversation WHERE key = ?)"
            key, now = _key(state, conversation), time.time()
            found = db.execute(f"SELECT candidate FROM unit WHERE {of}", (key,)).fetchone()
            if found is None:
                return
            if bad:
                in_time = f"UPDATE unit SET bad = ? WHERE {of} AND bad IS NULL AND last >= ?"
                db.execute(in_time, (bad, key, now - SIGNAL_SECONDS))
            if turn:
                db.execute(f"UPDATE unit SET last = ? WHERE {of}", (now, key))
            if pace is not None:
                db.execute("INSERT INTO reply VALUES (?, ?)", (found[0], pace))
            self._end_if_over(db, state)

    def _end_if_over(self, db: sqlite3.Connection, state: State) -> None:
        counts = _counts(db)
        why = str(counts) if counts.evidence >= DECIDES else _out_of_bounds(db)
        if why:
            ended = _end(db, state, ROLLED_BACK, why)
        elif counts.over >= ENOUGH:
            ended = _end(db, state, FINISHED, f"{counts}; {would_be_found(counts)}")
        else:
            return
        if ended:
            # Registry and server take seconds and MLflow: a process of its own, and again with every `canary`.
            quiet = subprocess.DEVNULL
            subprocess.Popen(
                own_command("canary"), cwd=self.checkout, stdin=quiet, stdout=quiet, stderr=quiet,
                start_new_session=True,
            )  # fmt: skip

    @contextmanager
    def _writing(self) -> Iterator[sqlite3.Connection]:
        path = self.checkout / STATE
        where = ":memory:"
        if path.is_file():
            where = str(path)
            import fine_tuning.model_management.canary_statistics  # noqa: F401 (numpy, before the database is locked)
        try:
            with closing(sqlite3.connect(where, BUSY_SECONDS, isolation_level=None)) as db:
                db.executescript(_TABLES)
                db.execute("PRAGMA secure_delete = ON")
                db.execute("BEGIN IMMEDIATE")
                with db:
                    yield db
        except sqlite3.Error as error:
            raise UserError(f"{STATE} cannot be used ({error}): remove it, which ends the canary") from None


def would_be_found(counts: Counts) -> str:
    """Which harm would have been seen by now, in words."""
    from fine_tuning.model_management.canary_statistics import smallest_found

    total = counts.candidate + counts.live
    before = counts.live_bad / counts.live if counts.live else 0.0
    found = smallest_found(counts.candidate / total, before, total) if counts.candidate and counts.live else None
    if found is None:
        return f"no harm would have been found surely in {count_of(total, 'conversation')}"
    return f"a candidate with {found:.0%} bad ones, instead of {before:.0%}, would have been found in 4 cases of 5"


def _newest(db: sqlite3.Connection) -> State | None:
    row = db.execute(f"SELECT {_COLUMNS} FROM canary ORDER BY number DESC LIMIT 1").fetchone()
    return State(*row[:-1], bool(row[-1])) if row else None


def _running(db: sqlite3.Connection) -> State | None:
    state = _newest(db)
    return state if state is not None and state.outcome is None else None


def _counts(db: sqlite3.Connection) -> Counts:
    """Each share's bets multiply: a unit's factor is a fair bet whatever the share was before and after."""
    from fine_tuning.model_management.canary_statistics import harm  # imports numpy

    over = "coalesce(sum(bad NOT NULL OR last < ?), 0)"
    groups = f"SELECT candidate, share, count(*), count(bad), {over} FROM unit GROUP BY candidate, share"
    rows = db.execute(groups, (time.time() - SIGNAL_SECONDS,)).fetchall()
    evidence = 1.0
    for share in {row[1] for row in rows}:
        bad = {arm: count for arm, of, _, count, _ in rows if of == share}
        evidence *= float(harm(bad.get(1, 0), bad.get(0, 0), share))
    sums = [tuple(map(sum, zip(*[row[2:] for row in rows if row[0] == arm], strict=True))) for arm in (1, 0)]
    (candidate, candidate_bad, ended), (live, live_bad, _) = (found or (0, 0, 0) for found in sums)
    return Counts(candidate, live, candidate_bad, live_bad, ended, evidence)


def _out_of_bounds(db: sqlite3.Connection) -> str | None:
    """Why the candidate fails or is slow beyond bounds; None where it does not."""
    newest = "SELECT pace FROM reply WHERE candidate = ? ORDER BY rowid DESC LIMIT ?"
    failed = [sum(pace == math.inf for (pace,) in db.execute(newest, (arm, ERRORS_OF))) for arm in (1, 0)]
    if failed[0] >= max(ERRORS, failed[1] + 1):
        return f"{failed[0]} of its last {ERRORS_OF} replies failed, {failed[1]} of the live version's"
    paces = [[pace for (pace,) in db.execute(newest, (arm, SLOWER_OF)) if pace < math.inf] for arm in (1, 0)]
    if min(map(len, paces)) >= SLOWER_OF * 0.8:
        times = statistics.median(paces[0]) / max(statistics.median(paces[1]), 1e-9)
        if times > SLOWER:
            return f"its last {SLOWER_OF} replies took {times:.1f} times as long as the live version's"
    return None


def _end(db: sqlite3.Connection, state: State, outcome: str, why: str) -> bool:
    row = (time.time(), outcome, why, state.number)
    values = "ended = ?, outcome = ?, why = ?, salt = x''"
    ended = db.execute(f"UPDATE canary SET {values} WHERE number = ? AND outcome IS NULL", row)
    for table in ("unit", "conversation", "reply"):
        db.execute(f"DELETE FROM {table}")
    return ended.rowcount == 1


def _key(state: State, name: str) -> bytes:
    return hmac.digest(state.salt, name.encode("utf-8", "surrogatepass"), hashlib.sha256)[:16]
