"""What one record of a foreign file is: each known form is recognised by its keys and turned into messages.

A record that holds more than its messages can say is never taken as if it were whole. Definitions of tools, their calls
and what they returned are text. Before a message with an image, a sound or a file the conversation ends; a reply that
rests on something that the file does not hold has `weight` 0 and is context only. `Found.left_out` says so.
"""

import json
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from itertools import repeat
from typing import Any

from fine_tuning.schema.conversation import from_exchange

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
# (question, answer) columns of flat records, and what the format is called
PAIRS = {
    ("instruction", "output"): "alpaca",
    ("user_message", "assistant_response"): "exchange",
    ("prompt", "completion"): "prompt-completion",
    ("prompt", "response"): "prompt-response",
    ("instruction", "response"): "instruction-response",
    ("question", "answer"): "question-answer",
    ("query", "response"): "query-response",
    ("input", "output"): "input-output",
    ("user", "assistant"): "user-assistant",
}
# Kinds of content parts: of chat completions and Responses (OpenAI), of Messages (Anthropic), and of ChatGPT
_CALLS = ("tool_use", "function_call")
_RESULTS = ("tool_result", "function_call_output")
_THOUGHTS = ("thinking", "redacted_thinking", "reasoning")
_MEDIA = {"image": "an image", "video": "a video", "audio": "a sound", "file": "a file", "document": "a file"}
_MEDIA_COLUMNS = frozenset(("image", "images", "video", "videos", "audio", "audios"))
_PLACEHOLDER = re.compile(r"\A\s*<(image|video|audio)>|<(image|video|audio)>\s*\Z")  # of LLaVA and LLaMA-Factory
_SHOWN_THOUGHTS = re.compile(
    r'<details\s[^<>]*type="reasoning"[^<>]*>(?:\s*<summary>[^<]*</summary>)?(.*?)(?:</details>|\Z)\s*', re.DOTALL
)
_SHOWN_CALLS = re.compile(r'<details\s[^<>]*type="(?:tool_calls|code_interpreter)".*?(?:</details>|\Z)\s*', re.DOTALL)
_PLAIN = frozenset(("role", "content", "from", "value", "id"))
_NOTHING = (None, "", "[]", [])
_LABELS = {
    label: rating
    for rating, labels in (
        (1, "true 1 1.0 yes good desirable chosen liked positive thumbs_up up"),
        (-1, "false 0 0.0 -1 -1.0 no bad undesirable rejected disliked negative thumbs_down down"),
    )
    for label in labels.split()
}
_WEIGHTS = {"1": 1, "1.0": 1, "true": 1, "0": 0, "0.0": 0, "false": 0}
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
    """The rows of one conversation in a CSV file, each {column: cell}; "gap": True in one where rows before it are
    missing."""

    rows: list[dict]


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
            return _whole(read(record))
    raise NotRecognised("none of the known forms")


def _whole(found: Found) -> Found:
    """Leave out what cannot be kept whole: see the module's docstring."""
    messages = found.messages
    for place, message in enumerate(messages):
        if message.get("weight") == 0:
            found.left_out.append("a reply is context only: the file gives it the weight 0")
            continue
        if (lost := message.get("lost")) and message["role"] == "assistant":
            message["weight"] = 0
            found.left_out.append(f"a reply is context only: it rests on {lost}, which is not in the record")
        elif lost:
            start = max((i for i in range(place + 1) if messages[i]["role"] == "user"), default=0)
            del messages[start:]
            found.feedback = [entry for entry in found.feedback if entry.get("index", -1) < start]
            if found.judges or not any(kept["role"] == "assistant" for kept in messages):
                raise NotRecognised(f"{found.format}: a question has {lost}, which is not text")
            found.left_out.append(f"the conversation ends before {lost}, which is not text")
            break
    if not any(message["content"].strip() for message in messages):
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
    kept = ("id", "at", "version", "incomplete", "reasoning", "gap")
    message |= {key: original[key] for key in kept if original.get(key)}
    others = original.get("alternatives")
    if isinstance(others, list) and others:
        message["alternatives"] = [_own_message(other) for other in others if isinstance(other, dict)]
    return message


def _messages(record: dict) -> Found:
    """Turns with `role` and `content`, or ShareGPT's with `from` and `value`."""
    rows = next(record[key] for key in _NESTED if _has_turns(record.get(key)))
    return _found("sharegpt" if rows and "from" in rows[0] else "messages", record, _turns(rows))


def _pair(record: dict) -> Found:
    (asked, answered), name = _pair_of(record)
    question, answer = record[asked], record[answered]
    if name == "exchange" and isinstance(question, str) and isinstance(answer, str):
        return _exchange(record, name)
    if name != "alpaca" and (isinstance(question, list) or isinstance(answer, list)):
        return _found(name, record, _turns([*_as_turns(question, "user"), *_as_turns(answer, "assistant")]))
    return _flat(name, record, _question(record, asked), _text(answer))


def _pair_of(record: dict) -> tuple[tuple[str, str], str] | None:
    return next((pair for pair in PAIRS.items() if pair[0][0] in record and pair[0][1] in record), None)


def _exchange(record: dict, name: str) -> Found:
    """A logged exchange, or a row of the CSV export, which has the rating beside it."""
    metadata = _metadata(record)
    known = from_exchange(record | {"metadata": metadata})
    found = _flat(name, record, record["user_message"], record["assistant_response"])
    reply = {key: value for key, value in known["messages"][1].items() if key not in ("id", "at")}
    found.messages[-1] = reply | {key: value for key, value in found.messages[-1].items() if key == "model"}
    found.metadata, found.source = known["metadata"], known["source"]
    if str(record.get("rating")) in ("1", "-1"):
        found.feedback = [{"index": len(found.messages) - 1, "rating": int(record["rating"])}]
    return found


def _preference(record: dict) -> Found:
    """Two replies to one question (TRL, LLaMA-Factory): the chosen one, and the rejected one as its alternative."""
    chosen, rejected = (_turns(_as_turns(record[key], "assistant")) for key in ("chosen", "rejected"))
    before = chosen[:-1]
    if not any(message["role"] == "user" for message in before):
        names = ("instruction", "prompt", "question", "conversations", "messages")
        asked = next((key for key in names if key in record), "")
        whole = isinstance(record.get(asked), list)
        before = (_turns(record[asked]) if whole else _asked(record, _question(record, asked))) + before
    if not chosen or not rejected or chosen[-1]["role"] != "assistant" or rejected[-1]["role"] != "assistant":
        raise NotRecognised("preference: `chosen` and `rejected` do not end with a reply")
    if not any(message["role"] == "user" and message["content"].strip() for message in before):
        raise NotRecognised("preference: there is no question")
    if lost := rejected[-1].get("lost"):
        raise NotRecognised(f"preference: a reply has {lost}, which is not text")
    found = _found("preference", record, [*before, chosen[-1]])
    if rejected[-1]["content"] not in ("", chosen[-1]["content"]):
        chosen[-1]["alternatives"] = [rejected[-1]]
        found.feedback = [{"index": len(found.messages) - 1, "over": True}]
    return found


def _asked(record: dict, question: str) -> list[dict]:
    """A question, after the turns under `history`."""
    earlier = [_text(text) for pair in _history(record.get("history")) for text in pair]
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate([*earlier, question])]


def _question(record: dict, asked: str) -> str:
    """A question with what it is about below it: Alpaca's `input`, Dolly's `context`."""
    extra = (record.get(key) or "" for key in ("input", "context") if key != asked)
    return "\n\n".join(filter(None, map(_text, (record.get(asked), *extra))))


def _found(name: str, record: dict, messages: list[dict]) -> Found:
    """A record's messages, with the system prompt, tools, images, models and judgement that stand beside them.

    A record's label judges its completion (TRL's `completion`, in LLaMA-Factory the last reply): all replies after the
    last question. Earlier replies are part of the prompt, and the label says nothing of them.
    """
    first = messages[0]["content"] if messages and messages[0]["role"] == "system" else None
    system = record.get("system", record.get("system_prompt")) if first is None else first
    tools = {key: record[key] for key in ("tools", "functions") if key in record and record[key] not in _NOTHING}
    if tools or (first is None and isinstance(system, (str, list))):
        messages[: first is not None] = [_message(tools, "system", system)]
    _mark_media(record, messages)
    models = record.get("models", record.get("model"))  # one a reply, or one for all
    replies = [message for message in messages if message["role"] == "assistant"]
    for message, model in zip(replies, models if isinstance(models, list) else repeat(models), strict=False):
        if isinstance(model, str) and not message.get("model"):
            message["model"] = model
    feedback = [{"index": i, "rating": m["rating"]} for i, m in enumerate(messages) if m.get("rating")]
    if not feedback and (rating := _rating(record)):
        judged = [i for i, m in enumerate(messages) if m["role"] == "assistant" and m.get("weight") != 0]
        asked = max((i for i in range(max(judged, default=0)) if messages[i]["role"] == "user"), default=0)
        feedback = [{"index": index, "rating": rating} for index in judged if index >= asked]
    identity, started = _unique(record), _started(record)
    return Found(name, messages, identity, started_at=started, metadata=_metadata(record), feedback=feedback)


def _mark_media(record: dict, messages: list[dict]) -> None:
    """Mark user messages with a placeholder for an image, video or sound; the first one if only a column has it."""
    users = [message for message in messages if message["role"] == "user"]
    for message in users:
        if ">" in message["content"] and (place := _PLACEHOLDER.search(message["content"])):
            message["lost"] = _MEDIA[place[1] or place[2]]
    column = next((key for key in _MEDIA_COLUMNS.intersection(record) if record[key]), None)
    if column and users and not any("lost" in message for message in users):
        users[0]["lost"] = _MEDIA[column.removesuffix("s")]


def _rating(row: dict) -> int | None:
    """1 or -1 by the `label` of TRL's unpaired preferences or LLaMA-Factory's `kto_tag`; None without a label.

    Raises:
        NotRecognised: it says neither good nor bad: as unrated, a disliked reply would be trained on.
    """
    for key in ("label", "kto_tag"):
        if row.get(key) not in (None, ""):
            rating = _LABELS.get(str(row[key]).strip().lower())
            if rating is None:
                raise NotRecognised(f"its `{key}` says neither good nor bad: write true or false, or take it out")
            return rating
    return None


def _flat(name: str, record: dict, question: str, answer: str) -> Found:
    """One question and answer, with the turns before them under `history`."""
    return _found(name, record, [*_asked(record, question), {"role": "assistant", "content": answer}])


def _chatml(record: dict) -> Found:
    conversations = list(from_chatml(record["text"]))
    if len(conversations) != 1:
        raise NotRecognised("chatml: the record holds several conversations")
    return _found("chatml", record, _chatml_turns(conversations[0]))


def _chatml_turns(turns: list[dict]) -> list[dict]:
    if any(turn["role"] is None for turn in turns):
        raise NotRecognised("chatml: a turn has no end, or text stands outside of the turns")
    return _turns(turns)


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
    consulted = False  # a tool, whose call and answer the export has only in part
    for node in _path_to(nodes, leaf, "parent"):
        said = _object(node.get("message"))
        metadata, content = _object(said.get("metadata")), _object(said.get("content"))
        role = _object(said.get("author")).get("role")
        consulted = role != "user" and (consulted or role == "tool" or said.get("recipient", "all") != "all")
        if metadata.get("is_visually_hidden_from_conversation") or said.get("recipient", "all") != "all":
            continue
        if role not in ("user", "assistant") or content.get("content_type") not in ("text", "multimodal_text"):
            continue
        text = _text(content.get("parts")).strip()  # of what was spoken, its transcript
        shown = [part for part in _list(content.get("parts")) if "audio" not in str(_kind(part))]
        lost = "what a tool returned" if consulted else _lost(shown)
        if text and messages and messages[-1]["role"] == role:
            messages[-1]["content"] += f"\n\n{text}"  # one reply that calls of tools had cut into pieces
        elif text or lost:
            model = metadata.get("model_slug") if role == "assistant" else None
            messages.append({"role": role, "content": text, "model": model, "at": said.get("create_time")})
        if lost:
            messages[-1]["lost"] = lost
    identity = record.get("conversation_id") or record.get("id")
    name = f"chatgpt-{identity}" if identity else None
    return Found("chatgpt", messages, name, "chatgpt", record.get("create_time"))


def _open_webui(record: dict) -> Found:
    """Open WebUI's export: {"id", "chat": {"history": {"messages": {id: …}, "currentId"}}} with ratings.

    The path to `currentId` is the conversation; other replies to its questions are alternatives. Ratings elsewhere in
    the tree are left out.
    """
    chat = record["chat"]
    history = _object(chat.get("history"))
    nodes = {name: node | {"id": name} for name, node in _nodes(history.get("messages")).items()}
    path = list(_path_to(nodes, history.get("currentId"), "parentId"))
    if not path and isinstance(chat.get("messages"), list):
        path = [node for node in chat["messages"] if isinstance(node, dict)]
    siblings: dict[str, list[dict]] = {}
    for node in nodes.values():
        siblings.setdefault(f"{node.get('parentId')} {node.get('role')}", []).append(node)
    messages, feedback = [], []
    for node in path:
        turns = _open_webui_turns(node)
        if not turns:
            if node.get("role") == "assistant" and messages and messages[-1]["role"] == "user":
                messages.append({"role": "assistant", "content": ""})  # it failed: cleaning drops it with its question
            continue
        messages += turns
        judged = {len(messages) - 1: node}
        for other in siblings.get(f"{node.get('parentId')} assistant", ()) if turns[0]["role"] == "assistant" else ():
            said = _open_webui_turns(other)
            if other is not node and len(said) == len(turns) == 1 and "lost" not in said[0]:
                turns[0].setdefault("alternatives", []).extend(said)
                judged[other["id"]] = other
        for place, version in judged.items():
            if entry := _open_webui_rating(_object(version.get("annotation")), record.get("user_id")):
                feedback.append({"index" if isinstance(place, int) else "message_id": place} | entry)
    identity = record.get("id") or chat.get("id")
    started = record.get("created_at") or chat.get("timestamp")
    name = f"open-webui-{identity}" if identity else None
    rated = sum(_open_webui_rating(_object(node.get("annotation")), None) is not None for node in nodes.values())
    left_out = ["a rating is left out: its reply is on another branch of the chat"] * (rated - len(feedback))
    owner = {"user_id": record["user_id"]} if isinstance(record.get("user_id"), str) else {}
    return Found("open-webui", messages, name, "open-webui", started, owner, feedback, left_out=left_out)


def _open_webui_turns(node: dict) -> list[dict]:
    """The messages of one node, the last under its id; none where it says nothing.

    A finished streamed reply is in `output`, as items of OpenAI's Responses; older versions write thoughts and calls of
    tools as HTML into `content`.
    """
    role = ROLE_NAMES.get(node["role"]) if isinstance(node.get("role"), str) else None
    if role is None:
        return []
    row = {"model": node.get("selectedModelId") or node.get("model")}  # an arena's own model is none
    turns = _turn(row, role, node["output"]) if isinstance(node.get("output"), list) else []
    if not any(turn["content"].strip() for turn in turns):
        content, calls = node.get("content"), 0
        if role == "assistant" and isinstance(content, str):
            row["reasoning_content"] = "\n".join(map(str.strip, _SHOWN_THOUGHTS.findall(content)))
            content = _SHOWN_THOUGHTS.sub("", content)
            content, calls = _SHOWN_CALLS.subn("", content)
        turns = _turn(row, role, content)
        if calls:
            turns[-1]["lost"] = "what a tool returned"
    files = [file for key in ("files", "sources", "citations") for file in _list(node.get(key))]
    if files and role in ("user", "assistant"):
        turns[-1]["lost"] = _MEDIA.get(str(_object(files[0]).get("type")), "a file")
    if not any(turn["content"].strip() or "lost" in turn for turn in turns):
        return []
    for number, turn in enumerate(turns, start=1 - len(turns)):
        turn |= {"at": node.get("timestamp")}
        if isinstance(node.get("id"), str):
            turn["id"] = f"{node['id']}{number or ''}"
    return turns


def _open_webui_rating(judged: dict, user: Any) -> dict | None:
    if str(judged.get("rating")) not in ("1", "-1"):
        return None
    words = [judged[key] for key in ("reason", "comment") if isinstance(judged.get(key), str) and judged[key].strip()]
    said = {"comment": ": ".join(words), "by": user}
    return {"rating": int(judged["rating"])} | {k: v for k, v in said.items() if v and isinstance(v, str)}


def _open_webui_feedback(record: dict) -> Found:
    """A row of Open WebUI's feedback export: a rating, and the chat as it was then, which is taken up to that reply.

    In its arena the reply is preferred to the others to the same question, or they to it.
    """
    data, meta, chat = record["data"], record["meta"], _object(record["snapshot"].get("chat"))
    inner, judged = chat["chat"] if isinstance(chat.get("chat"), dict) else chat, meta.get("message_id")
    history = _object(inner.get("history")) | {"currentId": judged}
    known = {
        "id": meta.get("chat_id"),
        "created_at": chat.get("created_at"),
        "user_id": chat.get("user_id") or record.get("user_id"),
    }
    found = _open_webui(known | {"chat": {"history": history}})
    entry = _open_webui_rating(data, record.get("user_id"))
    if entry is None or not found.messages or found.messages[-1].get("id") != judged:
        raise NotRecognised("open-webui-feedback: it has no rating of 1 or -1, or no snapshot with the message")
    found.feedback = [{"message_id": judged} | entry]
    others = [other["id"] for other in found.messages[-1].get("alternatives", ())]
    if others and meta.get("arena") and data.get("sibling_model_ids"):
        if entry["rating"] == 1:
            found.feedback[0]["over"] = others
        else:
            said = {key: value for key, value in entry.items() if key == "by"} | {"rating": None, "over": [judged]}
            found.feedback += [{"message_id": other} | said for other in others]
    found.format, found.judges, found.left_out = "open-webui-feedback", judged, []
    return found


def _of_csv(rows: list[dict]) -> Found:
    """Rows of one conversation in a CSV file: a message a row (role, content) or an exchange a row."""
    first, identity = rows[0], _unique({"id": rows[0].get("conversation_id")})
    if {"role", "content"} <= first.keys():
        return _whole(replace(_found("csv", {}, _rows(rows)), id=identity, started_at=_started(first)))
    whole = None
    for row in rows:
        part = _recognise_row(row)
        if whole is None:
            whole = replace(part, format=f"csv of {part.format}", id=identity or part.id)
            continue
        said = [message for message in part.messages if message["role"] != "system"]
        if row.get("gap") is True:
            said[0]["gap"] = True
        shift = len(whole.messages) + len(said) - len(part.messages)
        whole.messages += said
        whole.feedback += [entry | {"index": entry["index"] + shift} for entry in part.feedback]
        whole.left_out += part.left_out
    return whole


def _rows(rows: list[dict]) -> list[dict]:
    """The messages of rows with a role and a content. Where rows are missing, cleaning drops what is left of exchanges:
    a question or reply that may be the missing one is there, and empty.
    """
    messages: list[dict] = []
    for row in rows:
        (message,) = _turn(row, _role(row.get("role")), row.get("content"))
        if row.get("gap") is True:
            if messages[-1]["role"] == "user":
                messages.append({"role": "assistant", "content": ""})
            if message["role"] != "user":
                messages.append({"role": "user", "content": ""})
            message["gap"] = True
        messages.append(message)
    return messages


def _recognise_row(row: dict) -> Found:
    """Empty cells are columns that are not used, unless nothing is recognised without them.

    The CSV export writes an empty system prompt as an apostrophe.
    """
    used = {key: value for key, value in row.items() if value}
    if not used.get("system", "x").strip("'"):
        used["system"] = used["system"][1:]
    try:
        return recognise(used)
    except NotRecognised:
        return recognise({key: value for key, value in row.items() if key != "system"} | used)


# -----------------------------------------------------------------------------
# pieces


def _turns(rows: Any) -> list[dict]:
    """The messages of turns with `role` and `content`, or ShareGPT's with `from` and `value`."""
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise NotRecognised("the turns are no list of objects")
    role_key, text_key = ("from", "value") if rows and "from" in rows[0] else ("role", "content")
    return [message for row in rows for message in _turn(row, _role(row.get(role_key)), row.get(text_key))]


def _role(name: Any) -> str:
    role = ROLE_NAMES.get(name.strip().lower()) if isinstance(name, str) else None
    if role is None:
        raise NotRecognised("a turn has an unknown role")
    return role


def _turn(row: dict, role: str, content: Any) -> list[dict]:
    """The messages of one turn: a list of parts may hold what tools returned, which are messages of their own."""
    if not isinstance(content, list):
        return [_message(row, role, content)]
    turns: list[dict] = []
    items = [inner for p in content for inner in (_list(p.get("content")) if _kind(p) == "message" else [p])]
    for part in items:
        kind = _kind(part)
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
    return [_message(turn["row"], turn["role"], turn["content"]) for turn in turns] or [_message(row, role, "")]


def _kind(part: Any) -> Any:
    return part.get("type", part.get("content_type")) if isinstance(part, dict) else None


def _call(part: dict) -> dict:
    """A call of a tool in the form of chat completions, whoever wrote it."""
    arguments = part.get("arguments", part.get("input"))
    if not isinstance(arguments, str):
        arguments = json.dumps(arguments, ensure_ascii=False, sort_keys=True, default=str)
    function = {"name": part.get("name"), "arguments": arguments}
    return {"id": part.get("call_id") or part.get("id"), "type": "function", "function": function}


def _message(row: dict, role: str | None, content: Any) -> dict:
    """One message. Tools and calls are JSON below its text; `lost` says what it has that is no text."""
    text = _text(content)
    if text is content and role in ("system", "user", "assistant", "tool") and row.keys() <= _PLAIN:
        return {"role": role, "content": text}  # nearly all of them
    if not text and isinstance(row.get("refusal"), str):
        text = row["refusal"]
    calls = {key: _parsed(row[key]) for key in ("tools", "functions", "tool_calls", "function_call") if row.get(key)}
    if calls := {key: value for key, value in calls.items() if value}:
        called = json.dumps(calls, ensure_ascii=False, sort_keys=True, default=str)
        text = f"{text}\n{called}" if text else called
    if role not in ("system", "user", "assistant", "tool"):
        raise NotRecognised("a turn has an unknown role")
    message = {"role": role, "content": text}
    if lost := _lost(content):
        message["lost"] = lost
    if role == "assistant":
        message |= {"model": row["model"]} if isinstance(row.get("model"), str) else {}
        message |= {"rating": rating} if (rating := _rating(row)) else {}
        apart = row.get("reasoning_content")
        if thoughts := apart if isinstance(apart, str) and apart else _thoughts(content):
            message["reasoning"] = thoughts
        if row.get("weight") not in (None, ""):
            weight = _WEIGHTS.get(str(row["weight"]).strip().lower())
            if weight is None:
                raise NotRecognised("the `weight` of a message is neither 0 nor 1")
            message |= {} if weight else {"weight": 0}
    return message


def _lost(content: Any) -> str | None:
    """What the parts of a content hold that is no text."""
    for part in _list(content):
        if isinstance(part, dict) and _kind(part) not in _THOUGHTS:
            medium = next((name for key, name in _MEDIA.items() if key in str(_kind(part))), None)
            if medium or not isinstance(part.get("text", part.get("refusal")), str):
                return medium or "a part that is no text"
    return None


def _thoughts(content: Any) -> str:
    parts = [part for part in _list(content) if _kind(part) in _THOUGHTS]
    return "\n".join(_text(part.get("thinking") or part.get("content") or part.get("summary")) for part in parts)


def _text(content: Any) -> str:
    """A string, or the text parts of a list of content parts; see `_lost` for the others."""
    if content is None or (isinstance(content, float) and math.isnan(content)):  # as pandas writes what is missing
        return ""
    if isinstance(content, str):
        return content
    if isinstance(content, list):
        said = [part for part in content if _kind(part) not in _THOUGHTS]
        parts = [part.get("text", part.get("refusal")) if isinstance(part, dict) else part for part in said]
        return "\n".join(part for part in parts if isinstance(part, str))
    if isinstance(content, (int, float)):
        return str(content)
    raise NotRecognised("a message is no text")


def _parsed(value: Any) -> Any:
    """What a column holds as JSON text; other values as they are."""
    try:
        return json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError):
        return value


def _as_turns(value: Any, role: str) -> list[Any]:
    if isinstance(value, dict):
        return [value]
    return value if isinstance(value, list) else [{"role": role, "content": value}]


def _unpacked(key: str, text: str) -> Any:
    """Turns that a CSV or Parquet file holds as JSON text; other text as it is."""
    return _loads(key, text) if text.lstrip().startswith("[{") else text


def _loads(key: str, text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise NotRecognised(f"`{key}` is not JSON") from None


def _object(value: Any) -> dict:
    return value if isinstance(value, dict) else {}


def _list(value: Any) -> list:
    return value if isinstance(value, list) else []


def _nodes(value: Any) -> dict[str, dict]:
    return {name: node for name, node in _object(value).items() if isinstance(node, dict)}


def _created(node: dict) -> float:
    moment = _object(node.get("message")).get("create_time")
    return moment if isinstance(moment, (int, float)) else 0


def _history(value: Any) -> list[Any]:
    """Pairs of earlier turns; CSV has them as JSON text."""
    if isinstance(value, str) and value.strip():
        value = _loads("history", value)
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
    """The metadata of a record, and who spoke where the record says so beside its messages."""
    named = {
        key: record[key] for key in ("user_id", "user") if "messages" in record and isinstance(record.get(key), str)
    }
    return named | (record["metadata"] if isinstance(record.get("metadata"), dict) else {})


def _has(*keys: str) -> Callable[[dict], bool]:
    return lambda record: all(key in record for key in keys)


def _has_turns(rows: Any) -> bool:
    return isinstance(rows, list) and (not rows or bool({"role", "from"} & _object(rows[0]).keys()))


_FORMS: list[tuple[Callable[[dict], bool], Callable[[dict], Found]]] = [
    (lambda record: isinstance(record.get("mapping"), dict), _chatgpt),
    (
        lambda r: "snapshot" in r and all(isinstance(r.get(key), dict) for key in ("data", "meta", "snapshot")),
        _open_webui_feedback,
    ),
    (lambda record: bool({"history", "messages"} & _object(record.get("chat")).keys()), _open_webui),
    (_has("chosen", "rejected"), _preference),
    (lambda r: _has("id", "source", "started_at", "feedback")(r) and _has_turns(r.get("messages")), _own),
    (lambda record: any(_has_turns(record.get(key)) for key in _NESTED), _messages),
    (_pair_of, _pair),
    (
        lambda record: _has_turns(record.get("chatml")),
        lambda record: _found("chatml", {}, _chatml_turns(record["chatml"])),
    ),
    (lambda record: isinstance(record.get("text"), str) and "<|im_start|>" in record["text"], _chatml),
]
