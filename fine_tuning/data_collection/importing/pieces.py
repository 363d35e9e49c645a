"""Pieces that the readers of foreign formats share: what a record was found to be, and the messages of turns."""

import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

ROLE_NAMES = {
    name: role
    for role, names in (
        ("system", "system developer"),
        ("user", "user human prompter customer"),
        ("assistant", "assistant gpt chatgpt bot model ai chatbot function_call"),
        ("tool", "tool function observation function_response"),
    )
    for name in names.split()
}
# Kinds of content parts: of chat completions and Responses (OpenAI), of Messages (Anthropic), and of ChatGPT
_CALLS = ("tool_use", "function_call")
_RESULTS = ("tool_result", "function_call_output")
_THOUGHTS = ("thinking", "redacted_thinking", "reasoning")
MEDIA = {"image": "an image", "video": "a video", "audio": "a sound", "file": "a file", "document": "a file"}
_PLAIN = frozenset(("role", "content", "from", "value", "id"))
_LABELS = {
    label: rating
    for rating, labels in (
        (1, "true 1 1.0 yes good desirable chosen liked positive thumbs_up up"),
        (-1, "false 0 0.0 -1 -1.0 no bad undesirable rejected disliked negative thumbs_down down"),
    )
    for label in labels.split()
}
_WEIGHTS = {"1": 1, "1.0": 1, "true": 1, "0": 0, "0.0": 0, "false": 0}
_UNIQUE_ID = re.compile(r"(?:[a-z0-9-]+-)?[0-9a-fA-F]{8}-?(?:[0-9a-fA-F]{4}-?){3,}")


@dataclass(frozen=True)
class Problem:
    """A record that was not taken: `line` counts from 1 (lines, or records where the container has no lines)."""

    line: int
    reason: str


class NotRecognised(ValueError):
    """The record is none of the known forms, or is one without a usable message. Says which."""


@dataclass
class Found:
    """A recognised record.

    A feedback entry points at its message by `index` where the message has no id yet; `"over": True` beside it prefers
    the message to all its alternatives. `judges` is the id of the message that a record which is a judgement is about.
    """

    format: str
    messages: list[dict]
    id: str | None = None
    source: str | None = None
    started_at: Any = None
    metadata: dict = field(default_factory=dict)
    feedback: list[dict] = field(default_factory=list)
    restored: bool = False
    left_out: list[str] = field(default_factory=list)
    judges: str | None = None


def messages_in(rows: Any) -> list[dict]:
    """The messages of turns with `role` and `content`, or ShareGPT's with `from` and `value`."""
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise NotRecognised("the turns are no list of objects")
    role_key, text_key = ("from", "value") if rows and "from" in rows[0] else ("role", "content")
    return [message for row in rows for message in messages_of(row, role_of(row.get(role_key)), row.get(text_key))]


def role_of(name: Any) -> str:
    role = ROLE_NAMES.get(name.strip().lower()) if isinstance(name, str) else None
    if role is None:
        raise NotRecognised("a turn has an unknown role")
    return role


def rating_of(row: dict) -> int | None:
    """1 or -1 by the `label` of TRL's unpaired preferences or LLaMA-Factory's `kto_tag`; None without a label.
    NotRecognised: it says neither good nor bad: as unrated, a disliked reply would be trained on."""
    for key in ("label", "kto_tag"):
        if row.get(key) not in (None, ""):
            rating = _LABELS.get(str(row[key]).strip().lower())
            if rating is None:
                raise NotRecognised(f"its `{key}` says neither good nor bad: write true or false, or take it out")
            return rating
    return None


def messages_of(row: dict, role: str, content: Any) -> list[dict]:
    """The messages of one turn: a list of parts may hold what tools returned, which are messages of their own."""
    if not isinstance(content, list):
        return [message_of(row, role, content)]
    turns: list[dict] = []
    items = [inner for p in content for inner in (as_list(p.get("content")) if kind_of(p) == "message" else [p])]
    for part in items:
        kind = kind_of(part)
        if kind in _RESULTS:
            result = part["output"] if kind == "function_call_output" and "output" in part else part.get("content")
            turns.append({"role": "tool", "content": result, "row": {}})
            continue
        if not turns or turns[-1]["role"] != role:
            turns.append({"role": role, "content": [], "row": row})
        if kind in _CALLS:
            turns[-1]["row"] = row | {"tool_calls": [*turns[-1]["row"].get("tool_calls", ()), _call(part)]}
        else:
            turns[-1]["content"].append(part)
    return [message_of(turn["row"], turn["role"], turn["content"]) for turn in turns] or [message_of(row, role, "")]


def kind_of(part: Any) -> Any:
    return part.get("type", part.get("content_type")) if isinstance(part, dict) else None


def _call(part: dict) -> dict:
    """A call of a tool in the form of chat completions, whoever wrote it."""
    arguments = part.get("arguments", part.get("input"))
    if not isinstance(arguments, str):
        arguments = json.dumps(arguments, ensure_ascii=False, sort_keys=True, default=str)
    function = {"name": part.get("name"), "arguments": arguments}
    return {"id": part.get("call_id") or part.get("id"), "type": "function", "function": function}


def message_of(row: dict, role: str | None, content: Any) -> dict:
    """One message. Tools and calls are JSON below its text; `lost` says what it has that is no text."""
    text = text_of(content)
    if text is content and role in ("system", "user", "assistant", "tool") and row.keys() <= _PLAIN:
        return {"role": role, "content": text}  # nearly all of them
    if not text and isinstance(row.get("refusal"), str):
        text = row["refusal"]
    calls = {key: parsed(row[key]) for key in ("tools", "functions", "tool_calls", "function_call") if row.get(key)}
    if calls := {key: value for key, value in calls.items() if value}:
        called = json.dumps(calls, ensure_ascii=False, sort_keys=True, default=str)
        text = f"{text}\n{called}" if text else called
    if role not in ("system", "user", "assistant", "tool"):
        raise NotRecognised("a turn has an unknown role")
    message = {"role": role, "content": text}
    if lost := what_is_lost(content):
        message["lost"] = lost
    if role == "assistant":
        message |= {"model": row["model"]} if isinstance(row.get("model"), str) else {}
        message |= {"rating": rating} if (rating := rating_of(row)) else {}
        apart = row.get("reasoning_content")
        if thoughts := apart if isinstance(apart, str) and apart else _thoughts(content):
            message["reasoning"] = thoughts
        if row.get("weight") not in (None, ""):
            weight = _WEIGHTS.get(str(row["weight"]).strip().lower())
            if weight is None:
                raise NotRecognised("the `weight` of a message is neither 0 nor 1")
            message |= {} if weight else {"weight": 0}
    return message


def what_is_lost(content: Any) -> str | None:
    """What the parts of a content hold that is no text."""
    for part in as_list(content):
        if isinstance(part, dict) and kind_of(part) not in _THOUGHTS:
            medium = next((name for key, name in MEDIA.items() if key in str(kind_of(part))), None)
            if medium or not isinstance(part.get("text", part.get("refusal")), str):
                return medium or "a part that is no text"
    return None


def _thoughts(content: Any) -> str:
    parts = [part for part in as_list(content) if kind_of(part) in _THOUGHTS]
    return "\n".join(text_of(part.get("thinking") or part.get("content") or part.get("summary")) for part in parts)


def text_of(content: Any) -> str:
    """A string, or the text parts of a list of content parts; see `what_is_lost` for the others."""
    if content is None or (isinstance(content, float) and math.isnan(content)):  # as pandas writes what is missing
        return ""
    if isinstance(content, str):
        return content
    if isinstance(content, list):
        said = [part for part in content if kind_of(part) not in _THOUGHTS]
        parts = [part.get("text", part.get("refusal")) if isinstance(part, dict) else part for part in said]
        return "\n".join(part for part in parts if isinstance(part, str))
    if isinstance(content, (int, float)):
        return str(content)
    raise NotRecognised("a message is no text")


def parsed(value: Any) -> Any:
    """What a column holds as JSON text; numbers, and all that is not JSON, as they are."""
    try:
        found = json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError):
        return value
    return value if isinstance(found, (int, float)) else found


def as_object(value: Any) -> dict:
    return value if isinstance(value, dict) else {}


def as_list(value: Any) -> list:
    return value if isinstance(value, list) else []


def nodes_of(value: Any) -> dict[str, dict]:
    return {name: node for name, node in as_object(value).items() if isinstance(node, dict)}


def path_to(nodes: dict, leaf: Any, parent_key: str) -> Iterator[dict]:
    path, seen = [], set()
    while isinstance(leaf, str) and leaf in nodes and leaf not in seen:
        seen.add(leaf)
        path.append(nodes[leaf])
        leaf = nodes[leaf].get(parent_key)
    return reversed(path)


def unique_id(record: dict) -> str | None:
    """The record's id if it can be trusted to be unique among all files: a hash or a UUID, not "17"."""
    value = record.get("id") or record.get("conversation_id")
    return value if isinstance(value, str) and _UNIQUE_ID.fullmatch(value) else None
