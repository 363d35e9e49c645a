"""Open WebUI: exported chats, exported feedback, and its database.

Formats of version 0.12.4: open-webui/open-webui, `models/chats.py`, `models/chat_messages.py`, `models/feedbacks.py`.
"""

import re
import sqlite3
from collections.abc import Iterator
from typing import Any

from fine_tuning.data_collection.importing.pieces import (
    MEDIA,
    ROLE_NAMES,
    Found,
    NotRecognised,
    as_list,
    as_object,
    messages_of,
    nodes_of,
    parsed,
    path_to,
)

_SHOWN_THOUGHTS = re.compile(
    r'<details\s[^<>]*type="reasoning"[^<>]*>(?:\s*<summary>[^<]*</summary>)?(.*?)(?:</details>|\Z)\s*', re.DOTALL
)
_SHOWN_CALLS = re.compile(r'<details\s[^<>]*type="(?:tool_calls|code_interpreter)".*?(?:</details>|\Z)\s*', re.DOTALL)


def read_chat(record: dict) -> Found:
    """Open WebUI's export: {"id", "chat": {"history": {"messages": {id: …}, "currentId"}}} with ratings.

    The path to `currentId` is the conversation; other replies to its questions are alternatives. Ratings elsewhere in
    the tree are left out.
    """
    chat = record["chat"]
    history = as_object(chat.get("history"))
    nodes = {name: node | {"id": name} for name, node in nodes_of(history.get("messages")).items()}
    path = list(path_to(nodes, history.get("currentId"), "parentId"))
    if not path and isinstance(chat.get("messages"), list):
        path = [node for node in chat["messages"] if isinstance(node, dict)]
    siblings: dict[str, list[dict]] = {}
    for node in nodes.values():
        siblings.setdefault(f"{node.get('parentId')} {node.get('role')}", []).append(node)
    messages, feedback = [], []
    for node in path:
        turns = _messages(node)
        if not turns:
            if node.get("role") == "assistant" and messages and messages[-1]["role"] == "user":
                messages.append({"role": "assistant", "content": ""})  # it failed: cleaning drops it with its question
            continue
        messages += turns
        judged = {len(messages) - 1: node}
        for other in siblings.get(f"{node.get('parentId')} assistant", ()) if turns[0]["role"] == "assistant" else ():
            said = _messages(other)
            if other is not node and len(said) == len(turns) == 1 and "lost" not in said[0]:
                turns[0].setdefault("alternatives", []).extend(said)
                judged[other["id"]] = other
        for place, version in judged.items():
            if entry := _rating(as_object(version.get("annotation")), record.get("user_id")):
                feedback.append({"index" if isinstance(place, int) else "message_id": place} | entry)
    identity = record.get("id") or chat.get("id")
    started = record.get("created_at") or chat.get("timestamp")
    name = f"open-webui-{identity}" if identity else None
    rated = sum(_rating(as_object(node.get("annotation")), None) is not None for node in nodes.values())
    left_out = ["a rating is left out: its reply is on another branch of the chat"] * (rated - len(feedback))
    owner = {"user_id": record["user_id"]} if isinstance(record.get("user_id"), str) else {}
    return Found("open-webui", messages, name, "open-webui", started, owner, feedback, left_out=left_out)


def _messages(node: dict) -> list[dict]:
    """The messages of one node, the last under its id; none where it says nothing.

    A finished streamed reply is in `output`, as items of OpenAI's Responses; older versions write thoughts and calls of
    tools as HTML into `content`.
    """
    role = ROLE_NAMES.get(node["role"]) if isinstance(node.get("role"), str) else None
    if role is None:
        return []
    row = {"model": node.get("selectedModelId") or node.get("model")}  # an arena's own model is none
    turns = messages_of(row, role, node["output"]) if isinstance(node.get("output"), list) else []
    if not any(turn["content"].strip() for turn in turns):
        content, calls = node.get("content"), 0
        if role == "assistant" and isinstance(content, str):
            row["reasoning_content"] = "\n".join(map(str.strip, _SHOWN_THOUGHTS.findall(content)))
            content = _SHOWN_THOUGHTS.sub("", content)
            content, calls = _SHOWN_CALLS.subn("", content)
        turns = messages_of(row, role, content)
        if calls:
            turns[-1]["lost"] = "what a tool returned"
    files = [file for key in ("files", "sources", "citations") for file in as_list(node.get(key))]
    if files and role in ("user", "assistant"):
        turns[-1]["lost"] = MEDIA.get(str(as_object(files[0]).get("type")), "a file")
    if not any(turn["content"].strip() or "lost" in turn for turn in turns):
        return []
    for number, turn in enumerate(turns, start=1 - len(turns)):
        turn |= {"at": node.get("timestamp")}
        if isinstance(node.get("id"), str):
            turn["id"] = f"{node['id']}{number or ''}"
    return turns


def _rating(judged: dict, user: Any) -> dict | None:
    if str(judged.get("rating")) not in ("1", "-1"):
        return None
    words = [judged[key] for key in ("reason", "comment") if isinstance(judged.get(key), str) and judged[key].strip()]
    said = {"comment": ": ".join(words), "by": user}
    return {"rating": int(judged["rating"])} | {k: v for k, v in said.items() if v and isinstance(v, str)}


def read_feedback(record: dict) -> Found:
    """A row of Open WebUI's feedback export: a rating, and the chat as it was then, which is taken up to that reply. In
    its arena the reply is preferred to the others to the same question, or they to it."""
    data, meta, chat = record["data"], record["meta"], as_object(record["snapshot"].get("chat"))
    inner, judged = chat["chat"] if isinstance(chat.get("chat"), dict) else chat, meta.get("message_id")
    history = as_object(inner.get("history")) | {"currentId": judged}
    owner = chat.get("user_id") or record.get("user_id")
    known = {"id": meta.get("chat_id"), "created_at": chat.get("created_at"), "user_id": owner}
    found = read_chat(known | {"chat": {"history": history}})
    entry = _rating(data, record.get("user_id"))
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


# columns of chat_message that a chat's own tree names otherwise
_COLUMNS = {"parent_id": "parentId", "model_id": "model", "created_at": "timestamp"}


def read_database(db: sqlite3.Connection, tables: set[str], since: float) -> Iterator[dict]:
    """The rows of webui.db that changed at `since` or later: chats in the form of the export, then feedback. A chat's
    tree stands in its row; `chat_message` has the same messages, and those that the tree lacks."""
    for row in _rows(db, "chat WHERE updated_at >= ?", since):
        if as_object(parsed(row.get("meta"))).get("internal") is not True:
            yield _chat(db, row, tables)
    for row in _rows(db, "feedback WHERE updated_at >= ?", since) if "feedback" in tables else ():
        record = {name: parsed(row[name]) for name in ("data", "meta", "snapshot")} | {"user_id": row["user_id"]}
        if not as_object(record["snapshot"]).get("chat"):
            known = list(_rows(db, "chat WHERE id = ?", str(as_object(record["meta"]).get("chat_id"))))
            record["snapshot"] = {"chat": _chat(db, known[0], tables)} if known else {}
        yield record


def _rows(db: sqlite3.Connection, source: str, *values: Any) -> Iterator[dict]:
    return map(dict, db.execute(f"SELECT * FROM {source}", values))


def _chat(db: sqlite3.Connection, row: dict, tables: set[str]) -> dict:
    chat = as_object(parsed(row["chat"]))
    history = as_object(chat.get("history"))
    nodes = {}
    for each in _rows(db, "chat_message WHERE chat_id = ?", row["id"]) if "chat_message" in tables else ():
        each |= {name: parsed(each.get(name)) for name in ("content", "output", "files", "sources")}
        nodes[each["id"].removeprefix(f"{row['id']}-")] = {_COLUMNS.get(key, key): each[key] for key in each}
    nodes |= nodes_of(history.get("messages"))
    chat["history"] = {"messages": nodes, "currentId": history.get("currentId") or row.get("current_message_id")}
    return {"id": row["id"], "user_id": row["user_id"], "created_at": row["created_at"], "chat": chat}
