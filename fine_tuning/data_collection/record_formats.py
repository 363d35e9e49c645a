"""What one record of a foreign file is: each known form is recognised by its keys and turned into messages."""

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

ROLE_NAMES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "customer": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "ai": "assistant",
    "chatbot": "assistant",
    "function_call": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
    "function_response": "tool",
}
# (question, answer) columns of flat records
PAIRS = (
    ("user_message", "assistant_response"),
    ("prompt", "completion"),
    ("prompt", "response"),
    ("instruction", "response"),
    ("question", "answer"),
    ("query", "response"),
    ("input", "output"),
    ("user", "assistant"),
)
_UNIQUE_ID = re.compile(r"(?:[a-z0-9-]+-)?[0-9a-fA-F]{8}-?(?:[0-9a-fA-F]{4}-?){3,}")
_CHATML_TURN = re.compile(r"<\|im_start\|>([^\n<]{1,64})\n(.*?)<\|im_end\|>|<\|endoftext\|>", re.DOTALL)


class NotRecognised(ValueError):
    """The record is none of the known forms, or is one without a usable message. Says which."""


@dataclass
class Found:
    """A recognised record. A feedback entry points at its message by `index` where the message has no id yet."""

    format: str
    messages: list[dict]
    id: str | None = None
    source: str | None = None
    started_at: Any = None
    metadata: dict = field(default_factory=dict)
    feedback: list[dict] = field(default_factory=list)


def recognise(record: Any) -> Found:
    """Read one record.

    Raises:
        NotRecognised: the reason why it was not taken, without its content.
    """
    if isinstance(record, list):
        record = {"messages": record}
    if not isinstance(record, dict):
        raise NotRecognised("the record is no object")
    for applies, read in _FORMS:
        if applies(record):
            found = read(record)
            if not any(m["content"].strip() for m in found.messages):
                raise NotRecognised(f"{found.format}: no message has text")
            return found
    raise NotRecognised("none of the known forms")


# -----------------------------------------------------------------------------
# one reader a form


def _own(record: dict) -> Found:
    found = Found("whetstone", [_message(m, m.get("role"), m.get("content")) for m in record["messages"]])
    for message, original in zip(found.messages, record["messages"], strict=True):
        message |= {key: original[key] for key in ("id", "at") if original.get(key)}
    found.id, found.source, found.started_at = str(record["id"]), record["source"], record["started_at"]
    found.metadata, found.feedback = record.get("metadata") or {}, record.get("feedback") or []
    return found


def _messages(record: dict) -> Found:
    rows = record["messages"] if "messages" in record else record.get("conversation") or record["conversations"]
    found = Found("messages", _turns(rows, "role", "content"), _unique(record), started_at=_started(record))
    found.metadata = _metadata(record)
    return found


def _sharegpt(record: dict) -> Found:
    rows = record["conversations"] if "conversations" in record else record["conversation"]
    messages = _turns(rows, "from", "value")
    if isinstance(record.get("system"), str) and (not messages or messages[0]["role"] != "system"):
        messages.insert(0, {"role": "system", "content": record["system"]})
    return Found("sharegpt", messages, _unique(record), started_at=_started(record), metadata=_metadata(record))


def _alpaca(record: dict) -> Found:
    question = _text(record["instruction"])
    if extra := _text(record.get("input") or ""):
        question = f"{question}\n\n{extra}" if question else extra
    return _flat("alpaca", record, question, _text(record["output"]))


def _pair(record: dict) -> Found:
    asked, answered = next(pair for pair in PAIRS if pair[0] in record and pair[1] in record)
    name = {"completion": "prompt-completion", "assistant_response": "exchange"}.get(answered, f"{asked}-{answered}")
    question, answer = record[asked], record[answered]
    if isinstance(question, list) or isinstance(answer, list):
        rows = [*_as_turns(question, "user"), *_as_turns(answer, "assistant")]
        return Found(name, _turns(rows, "role", "content"), _unique(record), started_at=_started(record))
    return _flat(name, record, _text(question), _text(answer))


def _flat(name: str, record: dict, question: str, answer: str) -> Found:
    """One question and answer, with the turns before them under `history` and the system prompt under `system`."""
    messages = []
    if isinstance(record.get("system"), str):
        messages.append({"role": "system", "content": record["system"]})
    for pair in _history(record.get("history")):
        messages += [{"role": "user", "content": _text(pair[0])}, {"role": "assistant", "content": _text(pair[1])}]
    messages += [{"role": "user", "content": question}, _message(record, "assistant", answer)]
    metadata = record.get("metadata") if isinstance(record.get("metadata"), dict) else {}
    return Found(name, messages, _unique(record), started_at=_started(record), metadata=metadata)


def _chatml(record: dict) -> Found:
    conversations = list(from_chatml(record["text"]))
    if len(conversations) != 1:
        raise NotRecognised("chatml: the record holds several conversations")
    found = _messages(conversations[0])
    return Found("chatml", found.messages, _unique(record), started_at=_started(record), metadata=_metadata(record))


def from_chatml(text: str) -> Iterator[dict]:
    """Conversations of a ChatML text: a new one begins at a system turn, an empty line or <|endoftext|>."""
    turns: list[dict] = []
    end = 0
    for turn in _CHATML_TURN.finditer(text):
        apart = turn.group(1) is None or "\n\n" in text[end : turn.start()].replace("\r", "")
        if turns and (apart or turn.group(1).strip() == "system"):
            yield {"messages": turns}
            turns = []
        if turn.group(1) is not None:
            turns.append({"role": turn.group(1).strip(), "content": turn.group(2)})
        end = turn.end()
    if turns:
        yield {"messages": turns}


def _chatgpt(record: dict) -> Found:
    """ChatGPT's conversations.json is a tree of nodes: what the person saw is the path from `current_node` up."""
    nodes = record["mapping"]
    leaf = record.get("current_node")
    if leaf not in nodes:
        leaf = max(nodes, key=lambda n: ((nodes[n].get("message") or {}).get("create_time") or 0, n), default=None)
    messages: list[dict] = []
    for node in _path_to(nodes, leaf, "parent"):
        said = node.get("message")
        if not isinstance(said, dict) or (said.get("metadata") or {}).get("is_visually_hidden_from_conversation"):
            continue
        role, content = (said.get("author") or {}).get("role"), said.get("content") or {}
        if role not in ("user", "assistant") or said.get("recipient", "all") != "all":
            continue
        if content.get("content_type") not in ("text", "multimodal_text"):
            continue
        text = "\n".join(part for part in content.get("parts") or [] if isinstance(part, str)).strip()
        if text and messages and messages[-1]["role"] == role:
            messages[-1]["content"] += f"\n\n{text}"  # one reply that calls of tools had cut into pieces
        elif text:
            model = (said.get("metadata") or {}).get("model_slug") if role == "assistant" else None
            messages.append({"role": role, "content": text, "model": model, "at": said.get("create_time")})
    identity = record.get("conversation_id") or record.get("id")
    return Found("chatgpt", messages, f"chatgpt-{identity}" if identity else None, None, record.get("create_time"))


def _open_webui(record: dict) -> Found:
    """Open WebUI's export: {"id", "chat": {"history": {"messages": {id: …}, "currentId"}}} with ratings."""
    chat = record["chat"]
    history = chat.get("history") if isinstance(chat.get("history"), dict) else {}
    nodes = history.get("messages") if isinstance(history.get("messages"), dict) else {}
    path = list(_path_to(nodes, history.get("currentId"), "parentId")) or chat.get("messages") or []
    messages, feedback = [], []
    for node in path:
        if not isinstance(node, dict) or ROLE_NAMES.get(node.get("role")) is None:
            continue
        message = _message(node, ROLE_NAMES[node["role"]], node.get("content"))
        if not message["content"].strip():
            continue
        judged = node.get("annotation")
        if isinstance(judged, dict) and judged.get("rating") in (1, -1):
            entry = {"index": len(messages), "rating": judged["rating"]}
            feedback.append(entry | ({"comment": judged["comment"]} if judged.get("comment") else {}))
        messages.append(message | {"at": node.get("timestamp")})
    identity = record.get("id") or chat.get("id")
    started = record.get("created_at") or chat.get("timestamp")
    name = f"open-webui-{identity}" if identity else None
    return Found("open-webui", messages, name, None, started, feedback=feedback)


def _csv_rows(record: dict) -> Found:
    """Rows of one conversation in a CSV file: a message a row (role, content) or an exchange a row."""
    rows = record["rows"]
    first, name = rows[0], "csv"
    if {"role", "content"} <= first.keys():
        messages = _turns(rows, "role", "content")
    else:
        parts = [recognise({key: value for key, value in row.items() if value}) for row in rows]
        messages = [m for i, part in enumerate(parts) for m in part.messages if i == 0 or m["role"] != "system"]
        name = f"csv of {parts[0].format}"
    identity = first.get("conversation_id")
    return Found(name, messages, _unique({"id": identity}), started_at=_started(first))


# -----------------------------------------------------------------------------
# pieces


def _turns(rows: Any, role_key: str, text_key: str) -> list[dict]:
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise NotRecognised("the turns are no list of objects")
    messages = []
    for row in rows:
        name = row.get(role_key)
        role = ROLE_NAMES.get(name.strip().lower()) if isinstance(name, str) else None
        if role is None:
            raise NotRecognised("a turn has an unknown role")
        messages.append(_message(row, role, row.get(text_key)))
    return messages


def _message(row: dict, role: str | None, content: Any) -> dict:
    text = _text(content)
    if not text and row.get("tool_calls"):
        text = json.dumps({"tool_calls": row["tool_calls"]}, ensure_ascii=False, sort_keys=True, default=str)
    if role not in ROLE_NAMES.values():
        raise NotRecognised("a turn has an unknown role")
    model = row.get("model")
    return {"role": role, "content": text} | (
        {"model": model} if isinstance(model, str) and role == "assistant" else {}
    )


def _text(content: Any) -> str:
    """A string, or the text parts of a list of content parts; other parts (images, audio) have no text."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if isinstance(content, list):
        parts = (
            part if isinstance(part, str) else part.get("text") for part in content if isinstance(part, (str, dict))
        )
        return "\n".join(part for part in parts if isinstance(part, str))
    if isinstance(content, (int, float)):
        return str(content)
    raise NotRecognised("a message is no text")


def _as_turns(value: Any, role: str) -> list[Any]:
    return value if isinstance(value, list) else [{"role": role, "content": value}]


def _history(value: Any) -> list[Any]:
    """Pairs of earlier turns; CSV has them as JSON text."""
    if isinstance(value, str) and value.strip():
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise NotRecognised("`history` is not JSON") from None
    pairs = value or []
    if not isinstance(pairs, list) or not all(isinstance(pair, (list, tuple)) and len(pair) == 2 for pair in pairs):
        raise NotRecognised("`history` is no list of pairs")
    return pairs


def _path_to(nodes: dict, leaf: Any, parent_key: str) -> Iterator[dict]:
    path, seen = [], set()
    while isinstance(leaf, str) and leaf in nodes and leaf not in seen:
        seen.add(leaf)
        path.append(nodes[leaf])
        leaf = nodes[leaf].get(parent_key)
    return reversed(path)


def _unique(record: dict) -> str | None:
    """The record's id if it can be trusted to be unique among all files: a hash or a UUID, not "17"."""
    value = record.get("id") or record.get("conversation_id")
    return value if isinstance(value, str) and _UNIQUE_ID.fullmatch(value) else None


def _started(record: dict) -> Any:
    return next(
        (record[key] for key in ("started_at", "timestamp", "created_at", "create_time") if record.get(key)), None
    )


def _metadata(record: dict) -> dict:
    return record["metadata"] if isinstance(record.get("metadata"), dict) else {}


def _has(*keys: str) -> Callable[[dict], bool]:
    return lambda record: all(key in record for key in keys)


def _has_turns(key: str, inner: str) -> Callable[[dict], bool]:
    def applies(record: dict) -> bool:
        rows = record.get(key)
        return isinstance(rows, list) and (not rows or (isinstance(rows[0], dict) and inner in rows[0]))

    return applies


_FORMS: list[tuple[Callable[[dict], bool], Callable[[dict], Found]]] = [
    (_has("rows"), _csv_rows),
    (_has("mapping"), _chatgpt),
    (lambda record: isinstance(record.get("chat"), dict), _open_webui),
    (
        lambda record: (
            _has("id", "source", "started_at", "feedback")(record) and _has_turns("messages", "role")(record)
        ),
        _own,
    ),
    (_has_turns("messages", "role"), _messages),
    (_has_turns("conversations", "from"), _sharegpt),
    (_has_turns("conversation", "from"), _sharegpt),
    (_has_turns("messages", "from"), lambda record: _sharegpt({**record, "conversations": record["messages"]})),
    (_has_turns("conversations", "role"), _messages),
    (_has_turns("conversation", "role"), _messages),
    (_has("instruction", "output"), _alpaca),
    (lambda record: any(a in record and b in record for a, b in PAIRS), _pair),
    (_has_turns("chatml", "role"), lambda record: replace(_messages({"messages": record["chatml"]}), format="chatml")),
    (lambda record: isinstance(record.get("text"), str) and "<|im_start|>" in record["text"], _chatml),
]
