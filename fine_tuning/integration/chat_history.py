"""The conversations of the app: what the live log says, on top of what was sealed before."""

from functools import lru_cache
from pathlib import Path

from fine_tuning.data_collection.conversation import as_conversation, fold
from fine_tuning.data_collection.conversation_logger import ConversationLogger
from fine_tuning.records import read_json, read_jsonl, write_json

SHARDS = Path("data/conversations")
TITLES = Path(".whetstone/titles.json")
CHAT = "chat"  # the source of conversations that were held here, not imported
TITLE_CHARACTERS = 48


def conversations(checkout: Path, logger: ConversationLogger) -> list[dict]:
    """The conversations held in this app, the one that was spoken in last first; deleted ones are left out."""
    known = {identity: _copy(conversation) for identity, conversation in _sealed(_stamps(checkout)).items()}
    fold(logger.read_events(), known)
    living = [c for c in known.values() if c["messages"] and c["source"] == CHAT]
    return sorted(living, key=last_spoken, reverse=True)


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


def _stamps(checkout: Path) -> tuple[tuple[str, int, int], ...]:
    shards = sorted((checkout / SHARDS).glob("*.jsonl"))
    return tuple((str(shard), shard.stat().st_mtime_ns, shard.stat().st_size) for shard in shards)


@lru_cache(maxsize=2)
def _sealed(stamps: tuple[tuple[str, int, int], ...]) -> dict[str, dict]:
    """The newest version of every conversation in the shards, by id."""
    newest: dict[str, dict] = {}
    for path, _, _ in stamps:
        for record in read_jsonl(path):
            conversation = as_conversation(record)
            newest[conversation["id"]] = conversation
    return {identity: c for identity, c in newest.items() if c["source"] == CHAT}


def _copy(conversation: dict) -> dict:
    """Deep enough for `fold`, which changes what it is given."""
    return conversation | {
        "messages": [dict(message) for message in conversation["messages"]],
        "feedback": [dict(entry) for entry in conversation["feedback"]],
        "metadata": dict(conversation["metadata"]),
    }
