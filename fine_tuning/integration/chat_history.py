"""The conversations of the app: what the live log says, on top of what was sealed before."""

import copy
import json
import subprocess
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

from fine_tuning.data_collection.conversation import edits, fold
from fine_tuning.data_collection.conversation_logger import ConversationLogger, read_log
from fine_tuning.data_collection.shards import shard_paths, versions
from fine_tuning.errors import UserError
from fine_tuning.integration.jobs import jobs, own_command
from fine_tuning.records import read_json, write_json

SHARDS = Path("data/conversations")
MANIFEST = Path("data/manifest.json")
TITLES = Path(".whetstone/titles.json")
JOURNALS = ".whetstone/forget*.json"
DELETE = "Delete"
CHAT = "chat"  # the source of conversations that were held here, not imported
TITLE_CHARACTERS = 32


def conversations(checkout: Path, logger: ConversationLogger) -> list[dict]:
    """The conversations held in this app, the one that was spoken in last first; deleted ones are left out."""
    sealed = _sealed(_stamps(checkout))
    known = sealed | news(logger, sealed.get)
    living = [c for c in known.values() if c["messages"] and c.get("source") == CHAT]
    return sorted(living, key=last_spoken, reverse=True)


def news(logger: ConversationLogger, sealed: Callable[[str], dict | None]) -> dict[str, dict]:
    """The conversations that were spoken in, judged, restored or deleted since the last seal, as they are now, by id.

    Args:
        sealed: the newest sealed version of a conversation, by id.
    """
    closed = sorted((logger.path.parent / "closed").glob("*.jsonl"))  # a seal that is not done yet
    events = [event for log in closed for _, event in read_log(log) if event is not None]
    events += logger.read_events()
    touched = {event["conversation_id"] for event in events if event.get("conversation_id")}
    known = {identity: copy.deepcopy(found) for identity in touched if (found := sealed(identity)) is not None}
    fold(events, known)
    return known


def last_spoken(conversation: dict) -> str:
    """Time of the newest message, ISO 8601."""
    return max((message.get("at") or "" for message in conversation["messages"]), default="")


def title(conversation: dict, titles: dict[str, str]) -> str:
    """The name somebody gave it, or how its first message begins."""
    if given := titles.get(conversation["id"]):
        return given
    first = next((m["content"] for m in conversation["messages"] if m["role"] == "user"), "")
    words = " ".join(first.split())
    return words if len(words) <= TITLE_CHARACTERS else words[: TITLE_CHARACTERS - 1].rstrip() + "…"


def matching(found: list[dict], words: str, titles: dict[str, str]) -> list[dict]:
    """The conversations in whose title or messages all `words` occur, whatever their case."""
    wanted = words.lower().split()

    def text(conversation: dict) -> str:
        return " ".join([title(conversation, titles), *(m["content"] for m in conversation["messages"])]).lower()

    return [c for c in found if not wanted or all(word in text(c) for word in wanted)]


def read_titles(checkout: Path) -> dict[str, str]:
    """Given names by conversation id."""
    path = checkout / TITLES
    return read_json(path) if path.is_file() else {}


def rename(checkout: Path, identity: str, name: str) -> None:
    """Give a conversation a name; an empty one takes it back."""
    titles = read_titles(checkout)
    titles.pop(identity, None)
    if name.strip():
        titles[identity] = " ".join(name.split())
    write_json(checkout / TITLES, titles)


def _stamps(checkout: Path) -> tuple[tuple[Path, int, int], ...]:
    shards = shard_paths(checkout / SHARDS, checkout / MANIFEST)
    return tuple((shard, shard.stat().st_mtime_ns, shard.stat().st_size) for shard in shards)


@lru_cache(maxsize=2)
def _sealed(stamps: tuple[tuple[Path, int, int], ...]) -> dict[str, dict]:
    """The newest version of every conversation in the shards that was held here, by id."""
    newest = {version["id"]: version for version in versions(path for path, _, _ in stamps)}
    return {identity: c for identity, c in newest.items() if c.get("source") == CHAT}


# ------------------------------------------------------------------------------------------------------------- export


def file_name(conversation: dict, titles: dict[str, str]) -> str:
    """A name for an exported file: letters, digits and dashes of the title."""
    words = "".join(c if c.isalnum() and c.isascii() else " " for c in title(conversation, titles).lower()).split()
    return "-".join(words)[:60] or "conversation"


def as_json(conversation: dict) -> str:
    """The whole record, which `import` takes back."""
    return json.dumps(conversation, ensure_ascii=False, indent=2) + "\n"


def as_markdown(conversation: dict, titles: dict[str, str]) -> str:
    """The conversation for reading, with edited replies as edited."""
    edited = edits(conversation)
    parts = [f"# {title(conversation, titles)}\n"]
    for message in conversation["messages"]:
        who = message["role"] if message["role"] != "assistant" else message.get("model") or "assistant"
        parts.append(f"**{who}**\n\n{edited.get(message['id']) or message['content']}\n")
    return "\n".join(parts)


# ------------------------------------------------------------------------------------------------------------- delete


def whereabouts(checkout: Path, identity: str) -> list[str]:
    """Every place where a conversation still is and what deleting it does there, as `forget` finds them. Takes seconds.

    Raises:
        UserError: it could not be looked for; the line says why.
    """
    done = subprocess.run(own_command("forget", identity), cwd=checkout, stdin=subprocess.DEVNULL, capture_output=True)
    lines = done.stdout.decode("utf-8", "replace").splitlines()
    places = [line.strip() for line in lines if line.startswith("  ")]
    if not places:
        told = done.stderr.decode("utf-8", "replace").strip().splitlines()
        raise UserError(told[-1].removeprefix("error: ") if told else "it could not be looked for: try again")
    return places


def delete(checkout: Path, logger: ConversationLogger, identity: str, withdraw: bool = False) -> None:
    """Hide a conversation at once, and start `forget`, which takes it out of every place and proves it.

    Raises:
        UserError: another command runs; nothing is changed.
    """
    words = ["forget", identity, "--yes", *(["--withdraw"] if withdraw else [])]
    jobs.start(DELETE, own_command(*words), checkout)
    logger.log_delete(conversation_id=identity)


def delete_further(checkout: Path) -> None:
    """Go on with a deletion that was interrupted.

    Raises:
        UserError: another command runs.
    """
    jobs.start(DELETE, own_command("forget", "--resume"), checkout)


def interrupted(checkout: Path) -> bool:
    """Whether a deletion was interrupted and has to be gone on with."""
    return any(checkout.glob(JOURNALS)) and jobs.running is None
