"""When a round begins by itself, what it may do, and who hears of it: section `rounds` of params.yaml."""

import os
import re
import subprocess
import time
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal

from filelock import FileLock, Timeout
from pydantic import AfterValidator, Field

from fine_tuning.common.errors import UserError, count_of
from fine_tuning.common.project import CONVERSATIONS, FOLLOWED, LOG, MANIFEST, changes_by_hand
from fine_tuning.common.records import read_object, stamp, write_json
from fine_tuning.common.settings import Settings
from fine_tuning.common.stage_times import about
from fine_tuning.data_collection.conversation_logger import deletes, read_log
from fine_tuning.data_collection.storage.shards import shard_paths, versions
from fine_tuning.integration.canary import Canary
from fine_tuning.integration.conversation_index import cleaned_shards

# {"failures", "at", "why"} of the rounds that failed since the last good one, and "left": conversations that were
# still new after that.
ROUNDS = Path(".whetstone/rounds.json")
BEFORE = Path(".whetstone/round")  # the commit from before the round that runs or was killed
ROUND_LOCK, WATCH_LOCK = Path(".whetstone/round.lock"), Path(".whetstone/rounds.lock")
NOTIFY_SECONDS = 30.0
CHATS_WITHIN = 600.0  # seconds since the last event in the log, within which somebody is taken to chat
FOLLOW_SECONDS = 3600.0  # between two looks at what is followed, where no round begins
BUSY_LOAD = 0.5  # of the processors, on average of the last minute
FIRST_PAUSE, LONGEST_PAUSE = 900.0, 86_400.0  # seconds after a failure, twice as long after each further one


def _hours(text: str | None) -> str | None:
    if text is not None and not re.fullmatch(r"([01]?\d|2[0-3])-([01]?\d|2[0-3])", text):
        raise ValueError("two hours of the day such as 22-6")
    return text


class RoundsSettings(Settings):
    """Section `rounds` of params.yaml."""

    promote: Literal["ask", "canary", "auto"]
    min_conversations: int = Field(ge=1)
    min_pairs: int = Field(ge=1)
    hours: Annotated[str | None, AfterValidator(_hours)]
    max_minutes: int | None = Field(ge=1)
    follow: list[str]
    commit: bool
    notify: str | None


def waits_for(checkout: Path, settings: RoundsSettings) -> list[str]:
    """What has to happen before the next round begins by itself, in words; empty where it may begin."""
    now, waits = time.time(), []
    try:
        if changed := changes_by_hand(checkout):
            waits.append(f"{count_of(len(changed), 'file')} changed and not committed ({changed[0]})")
    except UserError as error:
        waits.append(str(error))
    state = Canary(checkout).state()
    if state is not None and state.outcome is None:
        waits.append(f"the canary of {state.tag} runs")
    kept = read_object(checkout / ROUNDS)
    new, pairs = max(0, _new(checkout) - kept.get("left", 0)), new_pairs(checkout)
    killed = (checkout / BEFORE).is_file()  # what was new for that round may be cleaned by now
    if new < settings.min_conversations and pairs < settings.min_pairs and not killed:
        waits.append(
            f"{new} of {settings.min_conversations} new conversations, {pairs} of {settings.min_pairs} edited or "
            "preferred replies"
        )
    gone = [name for name in settings.follow if not Path(name).expanduser().exists()]
    waits += [f"{name} of rounds.follow is missing: correct its path" for name in gone]
    if left := pause_left(checkout):
        waits.append(f"{last_failure(checkout)}: the next try is in {about(left)}")
    if is_locked(checkout / ROUND_LOCK):
        waits.append("another round is running")
    elif not _within(settings.hours, time.localtime(now).tm_hour):
        waits += _busy(checkout, now)
    return waits


def new_pairs(checkout: Path) -> int:
    """Replies that were edited or preferred since the last seal."""
    with suppress(FileNotFoundError):  # a seal moves one meanwhile
        events = (event for log in _logs(checkout) for _, event in read_log(log))
        return sum(bool(event and (event["event"] == "edit" or event.get("over"))) for event in events)
    return 0


def failures(checkout: Path) -> int:
    return int(read_object(checkout / ROUNDS).get("failures") or 0)


def last_failure(checkout: Path) -> str | None:
    """That the last round failed, and why; None where it did not."""
    return f"the last round failed ({read_object(checkout / ROUNDS).get('why')})" if failures(checkout) else None


def follow_is_due(checkout: Path, settings: RoundsSettings) -> bool:
    """Whether what is followed was not looked at within FOLLOW_SECONDS, and no failure is waited out."""
    followed = checkout / FOLLOWED
    last = followed.stat().st_mtime if followed.exists() else 0.0
    return bool(settings.follow) and not pause_left(checkout) and not 0 <= time.time() - last < FOLLOW_SECONDS


def note_failure(checkout: Path, why: str) -> None:
    """A round failed: the next one waits, twice as long as the last one did."""
    with suppress(OSError):  # on a full disk
        kept = read_object(checkout / ROUNDS)
        failed = {"failures": failures(checkout) + 1, "at": time.time(), "why": why}
        write_json(checkout / ROUNDS, kept | failed)


def note_success(checkout: Path) -> None:
    """What is still new after a round begins no other one."""
    write_json(checkout / ROUNDS, {"left": _new(checkout)})


def _new(checkout: Path) -> int:
    """Conversations that were said, changed or brought since the last cleaning."""
    cleaned = cleaned_shards(checkout)
    shards = [p for p in shard_paths(checkout / CONVERSATIONS, checkout / MANIFEST) if p.name not in cleaned]
    with suppress(FileNotFoundError):  # a seal moves one meanwhile
        return _count_new(*(tuple((path, stamp(path)) for path in paths) for paths in (shards, _logs(checkout))))
    return 0


@lru_cache(maxsize=1)
def _count_new(shards: tuple[tuple[Path, object], ...], logs: tuple[tuple[Path, object], ...]) -> int:
    there = {version["id"]: not version.get("deleted") for version in versions(path for path, _ in shards)}
    owners: dict[str, str] = {}
    for event in (event for log, _ in logs for _, event in read_log(log) if event):
        message = str(event.get("message_id")).removesuffix("-user")
        identity = event.get("conversation_id") or owners.get(message, message)
        if event["event"] == "exchange":
            owners[event["id"]] = identity
        there[identity] = there.get(identity, True) and not deletes(event)
    return sum(there.values())


def _logs(checkout: Path) -> list[Path]:
    live = checkout / LOG
    return [log for log in (*sorted((live.parent / "closed").glob("*.jsonl")), live) if log.exists()]


def pause_left(checkout: Path) -> float:
    """Seconds until the next try. Where the clock was set back, the failure lies ahead: nothing is left then."""
    failed: dict[str, Any] = read_object(checkout / ROUNDS)
    if not failures(checkout):
        return 0.0
    pause = min(FIRST_PAUSE * 2.0 ** min(failed["failures"] - 1, 20), LONGEST_PAUSE)
    left = failed["at"] + pause - time.time()
    return left if 0 < left <= pause else 0.0


def _within(hours: str | None, hour: int) -> bool:
    if hours is None:
        return False
    begin, end = map(int, hours.split("-"))
    return begin <= hour < end if begin < end else hour >= begin or hour < end


def _busy(checkout: Path, now: float) -> list[str]:
    log = checkout / LOG
    if log.exists() and 0 <= now - log.stat().st_mtime < CHATS_WITHIN:
        return [f"somebody chats: nothing may be said for {about(CHATS_WITHIN)}"]
    load, processors = os.getloadavg()[0], os.cpu_count() or 1
    return [f"the machine is busy (load {load:.1f})"] if load > BUSY_LOAD * processors else []


def is_locked(path: Path) -> bool:
    if not path.exists():
        return False
    try:
        with FileLock(path, timeout=0):
            return False
    except Timeout:
        return True


def notify(settings: RoundsSettings, text: str) -> None:
    """Run the command that was configured, with the text as its last argument. One that fails or hangs is left."""
    if settings.notify:
        with suppress(OSError, subprocess.TimeoutExpired):
            subprocess.run(
                ["/bin/sh", "-c", f'{settings.notify} "$@"', "notify", text],
                stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, timeout=NOTIFY_SECONDS,
            )  # fmt: skip
