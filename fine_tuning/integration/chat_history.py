"""The conversations of the app: what the live log says, on top of what was sealed before."""

import json
import subprocess
from datetime import date, datetime
from pathlib import Path

from fine_tuning.common.errors import UserError
from fine_tuning.common.records import read_object, updating
from fine_tuning.integration.jobs import jobs, own_command
from fine_tuning.schema.conversation import edits

TITLES = Path(".whetstone/titles.json")
JOURNALS = ".whetstone/forget*.json"
ERASE = "Erase"
CHAT = "chat"  # the source of conversations that were held here, not imported
TITLE_CHARACTERS = 32


def title(conversation: dict, titles: dict[str, str]) -> str:
    """The name somebody gave it, or how its first message begins."""
    first = next((m["content"] for m in conversation["messages"] if m["role"] == "user"), "")
    return titles.get(conversation["id"]) or shortened(first)


def shortened(message: str) -> str:
    words = " ".join(message.split())
    return words if len(words) <= TITLE_CHARACTERS else words[: TITLE_CHARACTERS - 1].rstrip() + "…"


def day_in_words(at: str) -> str:
    """Today, Yesterday or the day of a time, on this machine's calendar; "" for what has none."""
    try:
        day = datetime.fromisoformat(at).astimezone().date()
    except ValueError:
        return ""
    return {0: "Today", 1: "Yesterday"}.get((date.today() - day).days) or f"{day.day} {day:%B %Y}"


def read_titles(checkout: Path) -> dict[str, str]:
    return {key: name for key, name in read_object(checkout / TITLES).items() if isinstance(name, str)}


def rename(checkout: Path, identity: str, name: str) -> None:
    """Give a conversation a name; an empty one takes it back."""
    with updating(checkout / TITLES) as titles:
        titles.pop(identity, None)
        if name.strip():
            titles[identity] = " ".join(name.split())


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


# -------------------------------------------------------------------------------------------------------------- erase


def locations(checkout: Path) -> list[str]:
    """Every place where deleted conversations still are, what erasing them does there, and which stages then run. It is
    what `forget --deleted` finds, and takes seconds. Raises UserError if the search failed; the line says why."""
    command = own_command("forget", "--deleted")
    decoded = {"encoding": "utf-8", "errors": "replace"}
    done = subprocess.run(command, cwd=checkout, stdin=subprocess.DEVNULL, capture_output=True, **decoded)
    places = [line.strip() for line in done.stdout.splitlines()]
    if not places:
        errors = done.stderr.strip().splitlines()
        raise UserError(errors[-1].removeprefix("error: ") if errors else "the search failed: try again")
    return places


def interrupted(checkout: Path) -> bool:
    return any(checkout.glob(JOURNALS)) and jobs.running is None
