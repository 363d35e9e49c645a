"""What one record of a foreign file is: each known form is recognised by its keys and turned into messages."""

import json
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from fine_tuning.data_collection.conversation import from_exchange

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
# columns that CSV and Parquet files hold as JSON text
_NESTED = ("messages", "conversations", "conversation")
_UNIQUE_ID = re.compile(r"(?:[a-z0-9-]+-)?[0-9a-fA-F]{8}-?(?:[0-9a-fA-F]{4}-?){3,}")
_CHATML_TURN = re.compile(r"<\|im_start\|>([^\n<]{1,64})\n(.*?)<\|im_end\|>|<\|endoftext\|>", re.DOTALL)
# Between and after the turns of a ChatML text: tokens that begin or end a document, and the prompt for a reply.
_CHATML_SPACE = re.compile(r"(?:\s|<[|/\w]{1,32}>)*(?:<\|im_start\|>assistant\s*)?")


class NotRecognised(ValueError):
    """The record is none of the known forms, or is one without a usable message. Says which."""


@dataclass(frozen=True)
class CsvRows:
    """The rows of one conversation in a CSV file, each {column: cell}."""

    rows: list[dict]


@dataclass
class Found:
    """A recognised record.

    A feedback entry points at its message by `index` where the message has no id yet; `"over": True` beside it prefers
    the message to all its alternatives.
    """

    format: str
    messages: list[dict]
    id: str | None = None
    source: str | None = None
    started_at: Any = None
    metadata: dict = field(default_factory=dict)
    feedback: list[dict] = field(default_factory=list)
    restored: bool = False


def recognise(record: Any) -> Found:
    """Read one record.

    Raises:
        NotRecognised: the reason why it was not taken, without its content.
    """
    if isinstance(record, CsvRows):
        return _of_csv(record.rows)
    if isinstance(record, list):
        record = {"messages": record}
    if not isinstance(record, dict):
        raise NotRecognised("the record is no object")
    record = record | {key: _unpacked(key, record[key]) for key in _NESTED if isinstance(record.get(key), str)}
    for applies, read in _FORMS:
        if applies(record):
            return _with_text(read(record))
    raise NotRecognised("none of the known forms")


def _with_text(found: Found) -> Found:
    if not any(m["content"].strip() for m in found.messages):
        raise NotRecognised(f"{found.format}: no message has text")
    return found


# -----------------------------------------------------------------------------
# one reader a form


def _own(record: dict) -> Found:
    feedback = record.get("feedback") or []
    if not isinstance(feedback, list) or not all(isinstance(entry, dict) for entry in feedback):
        raise NotRecognised("whetstone: `feedback` is no list of objects")
    if not all(isinstance(message, dict) for message in record["messages"]):
        raise NotRecognised("the turns are no list of objects")
    return Found(
        "whetstone",
        [_own_message(message) for message in record["messages"]],
        str(record["id"]),
        record["source"] if isinstance(record["source"], str) else None,
        record["started_at"],
        _metadata(record),
        [{key: value for key, value in entry.items() if key != "index"} for entry in feedback],
        bool(record.get("restored")),
    )


def _own_message(original: dict) -> dict:
    message = _message(original, original.get("role"), original.get("content"))
    message |= {key: original[key] for key in ("id", "at", "version", "incomplete", "gap") if original.get(key)}
    others = original.get("alternatives")
    if isinstance(others, list) and others:
        message["alternatives"] = [_own_message(other) for other in others if isinstance(other, dict)]
    return message


def _messages(record: dict) -> Found:
    rows = record["messages"] if "messages" in record else record.get("conversation") or record["conversations"]
    return _found("messages", record, _turns(rows, "role", "content"))


def _sharegpt(record: dict) -> Found:
    rows = record["conversations"] if "conversations" in record else record["conversation"]
    messages = _turns(rows, "from", "value")
    if isinstance(record.get("system"), str) and (not messages or messages[0]["role"] != "system"):
        messages.insert(0, {"role": "system", "content": record["system"]})
    return _found("sharegpt", record, messages)


def _alpaca(record: dict) -> Found:
    return _flat("alpaca", record, _question(record), _text(record["output"]))


def _pair(record: dict) -> Found:
    asked, answered = next(pair for pair in PAIRS if pair[0] in record and pair[1] in record)
    name = {"completion": "prompt-completion", "assistant_response": "exchange"}.get(answered, f"{asked}-{answered}")
    question, answer = record[asked], record[answered]
    if answered == "assistant_response" and isinstance(question, str) and isinstance(answer, str):
        return _exchange(record, name)
    if isinstance(question, list) or isinstance(answer, list):
        rows = [*_as_turns(question, "user"), *_as_turns(answer, "assistant")]
        return _labelled(record, _found(name, record, _any_turns(rows)))
    return _labelled(record, _flat(name, record, _text(question), _text(answer)))


def _labelled(record: dict, found: Found) -> Found:
    """TRL's unpaired preferences say with `label` whether the completion is a good one."""
    if isinstance(record.get("label"), bool) and found.messages:
        found.feedback = [{"index": len(found.messages) - 1, "rating": 1 if record["label"] else -1}]
    return found


def _exchange(record: dict, name: str) -> Found:
    """A logged exchange, or a row of the CSV export, which has the rating beside it."""
    metadata = _metadata(record)
    known = from_exchange(record | {"metadata": metadata})
    found = _flat(name, record, record["user_message"], record["assistant_response"])
    reply = {key: value for key, value in known["messages"][1].items() if key not in ("id", "at")}
    found.messages[-1] = reply | {key: value for key, value in found.messages[-1].items() if key == "model"}
    found.metadata = known["metadata"]
    if str(record.get("rating")) in ("1", "-1"):
        found.feedback = [{"index": len(found.messages) - 1, "rating": int(record["rating"])}]
    return found


def _preference(record: dict) -> Found:
    """Two replies to one question (TRL, LLaMA-Factory): the chosen one, and the rejected one as its alternative."""
    chosen, rejected = (_any_turns(_as_turns(record[key], "assistant")) for key in ("chosen", "rejected"))
    before = chosen[:-1]
    if not any(message["role"] == "user" for message in before):
        asked = next((record[key] for key in ("prompt", "question", "conversations", "messages") if key in record), "")
        if "instruction" in record:
            before = _flat("", record, _question(record), "").messages[:-1] + before
        elif isinstance(asked, list):
            before = _any_turns(asked) + before
        else:
            before = _flat("", record, _text(asked), "").messages[:-1] + before
    if not chosen or not rejected or chosen[-1]["role"] != "assistant" or rejected[-1]["role"] != "assistant":
        raise NotRecognised("preference: `chosen` and `rejected` do not end with a reply")
    if not any(message["role"] == "user" and message["content"].strip() for message in before):
        raise NotRecognised("preference: there is no question")
    found = _found("preference", record, [*before, chosen[-1]])
    if rejected[-1]["content"] not in ("", chosen[-1]["content"]):
        chosen[-1]["alternatives"] = [rejected[-1]]
        found.feedback = [{"index": len(before), "over": True}]
    return found


def _question(record: dict) -> str:
    """Alpaca's instruction with its input, where there is one, below."""
    question = _text(record["instruction"])
    if extra := _text(record.get("input") or ""):
        return f"{question}\n\n{extra}" if question else extra
    return question


def _found(name: str, record: dict, messages: list[dict]) -> Found:
    return Found(name, messages, _unique(record), started_at=_started(record), metadata=_metadata(record))


def _flat(name: str, record: dict, question: str, answer: str) -> Found:
    """One question and answer, with the turns before them under `history` and the system prompt under `system`."""
    messages = []
    if isinstance(record.get("system"), str):
        messages.append({"role": "system", "content": record["system"]})
    for pair in _history(record.get("history")):
        messages += [{"role": "user", "content": _text(pair[0])}, {"role": "assistant", "content": _text(pair[1])}]
    reply = {"role": "assistant", "content": answer}
    if isinstance(record.get("model"), str):
        reply["model"] = record["model"]
    return _found(name, record, [*messages, {"role": "user", "content": question}, reply])


def _chatml(record: dict) -> Found:
    conversations = list(from_chatml(record["text"]))
    if len(conversations) != 1:
        raise NotRecognised("chatml: the record holds several conversations")
    return _found("chatml", record, _chatml_turns(conversations[0]))


def _chatml_turns(turns: list[dict]) -> list[dict]:
    if any(turn["role"] is None for turn in turns):
        raise NotRecognised("chatml: a turn has no end, or text stands outside of the turns")
    return _turns(turns, "role", "content")


def from_chatml(text: str) -> Iterator[list[dict]]:
    """The turns of each conversation of a ChatML text: a new one begins at a system turn, an empty line or
    <|endoftext|>. Text that is in no turn is one without a role, so that it is not lost without a word.
    """
    turns: list[dict] = []
    end = 0
    for turn in _CHATML_TURN.finditer(text):
        between, role = text[end : turn.start()], turn.group(1)
        turns += _outside(between)
        apart = role is None or "\n\n" in between.replace("\r", "")
        if turns and (apart or role.strip() == "system"):
            yield turns
            turns = []
        if role is not None:
            whole = "<|im_start|>" not in turn.group(2)
            turns.append({"role": role.strip() if whole else None, "content": turn.group(2)})
        end = turn.end()
    turns += _outside(text[end:])
    if turns:
        yield turns


def _outside(text: str) -> list[dict]:
    return [] if _CHATML_SPACE.fullmatch(text) else [{"role": None, "content": text}]


def _chatgpt(record: dict) -> Found:
    """ChatGPT's conversations.json is a tree of nodes: what the person saw is the path from `current_node` up."""
    nodes = _nodes(record["mapping"])
    leaf = record.get("current_node")
    if not isinstance(leaf, str) or leaf not in nodes:
        leaf = max(nodes, key=lambda name: (_created(nodes[name]), name), default=None)
    messages: list[dict] = []
    for node in _path_to(nodes, leaf, "parent"):
        said = _object(node.get("message"))
        metadata, content = _object(said.get("metadata")), _object(said.get("content"))
        role = _object(said.get("author")).get("role")
        if metadata.get("is_visually_hidden_from_conversation") or said.get("recipient", "all") != "all":
            continue
        if role not in ("user", "assistant") or content.get("content_type") not in ("text", "multimodal_text"):
            continue
        text = _text(content.get("parts")).strip()  # of what was spoken, its transcript
        if text and messages and messages[-1]["role"] == role:
            messages[-1]["content"] += f"\n\n{text}"  # one reply that calls of tools had cut into pieces
        elif text:
            model = metadata.get("model_slug") if role == "assistant" else None
            messages.append({"role": role, "content": text, "model": model, "at": said.get("create_time")})
    identity = record.get("conversation_id") or record.get("id")
    return Found("chatgpt", messages, f"chatgpt-{identity}" if identity else None, None, record.get("create_time"))


def _open_webui(record: dict) -> Found:
    """Open WebUI's export: {"id", "chat": {"history": {"messages": {id: …}, "currentId"}}} with ratings."""
    chat = record["chat"]
    history = _object(chat.get("history"))
    path = list(_path_to(_nodes(history.get("messages")), history.get("currentId"), "parentId"))
    if not path and isinstance(chat.get("messages"), list):
        path = [node for node in chat["messages"] if isinstance(node, dict)]
    messages, feedback = [], []
    for node in path:
        role = ROLE_NAMES.get(node["role"]) if isinstance(node.get("role"), str) else None
        if role is None:
            continue
        message = _message(node, role, node.get("content"))
        if not message["content"].strip():
            continue
        judged = _object(node.get("annotation"))
        if judged.get("rating") in (1, -1):
            comment = judged.get("comment")
            entry = {"index": len(messages), "rating": judged["rating"]}
            feedback.append(entry | ({"comment": comment} if comment and isinstance(comment, str) else {}))
        messages.append(message | {"at": node.get("timestamp")})
    identity = record.get("id") or chat.get("id")
    started = record.get("created_at") or chat.get("timestamp")
    name = f"open-webui-{identity}" if identity else None
    return Found("open-webui", messages, name, None, started, feedback=feedback)


def _of_csv(rows: list[dict]) -> Found:
    """Rows of one conversation in a CSV file: a message a row (role, content) or an exchange a row."""
    first, identity = rows[0], _unique({"id": rows[0].get("conversation_id")})
    if {"role", "content"} <= first.keys():
        return _with_text(Found("csv", _turns(rows, "role", "content"), identity, started_at=_started(first)))
    whole = None
    for row in rows:
        part = _recognise_row(row)
        if whole is None:
            whole = replace(part, format=f"csv of {part.format}", id=identity or part.id)
            continue
        said = [message for message in part.messages if message["role"] != "system"]
        shift = len(whole.messages) + len(said) - len(part.messages)
        whole.messages += said
        whole.feedback += [entry | {"index": entry["index"] + shift} for entry in part.feedback]
    return whole


def _recognise_row(row: dict) -> Found:
    """Empty cells are columns that are not used, unless nothing is recognised without them."""
    try:
        return recognise({key: value for key, value in row.items() if value})
    except NotRecognised:
        return recognise({key: value for key, value in row.items() if value or key != "system"})


# -----------------------------------------------------------------------------
# pieces


def _any_turns(rows: Any) -> list[dict]:
    """Turns with `role` and `content`, or ShareGPT's with `from` and `value`."""
    shares = isinstance(rows, list) and bool(rows) and isinstance(rows[0], dict) and "from" in rows[0]
    return _turns(rows, *(("from", "value") if shares else ("role", "content")))


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
    if not text and isinstance(row.get("refusal"), str):
        text = row["refusal"]
    if calls := {key: row[key] for key in ("tool_calls", "function_call") if row.get(key)}:
        called = json.dumps(calls, ensure_ascii=False, sort_keys=True, default=str)
        text = f"{text}\n{called}" if text else called
    if role not in ("system", "user", "assistant", "tool"):
        raise NotRecognised("a turn has an unknown role")
    model = row.get("model")
    return {"role": role, "content": text} | (
        {"model": model} if isinstance(model, str) and role == "assistant" else {}
    )


def _text(content: Any) -> str:
    """A string, or the text parts of a list of content parts; other parts (images, audio) have no text."""
    if content is None or (isinstance(content, float) and math.isnan(content)):  # as pandas writes what is missing
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
    if isinstance(value, dict):
        return [value]
    return value if isinstance(value, list) else [{"role": role, "content": value}]


def _unpacked(key: str, text: str) -> Any:
    """Turns that a CSV or Parquet file holds as JSON text; other text as it is."""
    if not text.lstrip().startswith("[{"):
        return text
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise NotRecognised(f"`{key}` is not JSON") from None


def _object(value: Any) -> dict:
    return value if isinstance(value, dict) else {}


def _nodes(value: Any) -> dict[str, dict]:
    return {name: node for name, node in _object(value).items() if isinstance(node, dict)}


def _created(node: dict) -> float:
    moment = _object(node.get("message")).get("create_time")
    return moment if isinstance(moment, (int, float)) else 0


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
    (lambda record: isinstance(record.get("mapping"), dict), _chatgpt),
    (lambda record: bool({"history", "messages"} & _object(record.get("chat")).keys()), _open_webui),
    (_has("chosen", "rejected"), _preference),
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
    (_has_turns("chatml", "role"), lambda record: _found("chatml", {}, _chatml_turns(record["chatml"]))),
    (lambda record: isinstance(record.get("text"), str) and "<|im_start|>" in record["text"], _chatml),
]
