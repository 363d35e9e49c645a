"""Chats that LM Studio and Jan keep in files.

LM Studio's `~/.lmstudio/conversations/*.conversation.json` has no published format; it is what its readers agree on
(versions up to 0.4): `versions` of each message, of which `currentlySelected` is shown, and of a reply its `steps`.
Jan's `threads/*/messages.jsonl` has a message a line: janhq/jan, `core/src/types/message/messageEntity.ts`.
"""

from typing import Any

from fine_tuning.data_collection.importing.pieces import Found, as_list, as_object, messages_of, role_of


def is_lm_studio(record: dict) -> bool:
    rows = record.get("messages")
    return isinstance(rows, list) and bool(rows) and isinstance(as_object(rows[0]).get("versions"), list)


def read_lm_studio(record: dict) -> Found:
    """A conversation as it is shown; other versions of a reply are alternatives."""
    system = record.get("systemPrompt")
    messages = [{"role": "system", "content": system}] if isinstance(system, str) and system.strip() else []
    usual = as_object(record.get("lastUsedModel")).get("identifier")
    for row in map(as_object, record["messages"]):
        versions = [_version(as_object(version), usual) for version in as_list(row.get("versions"))]
        shown = row.get("currentlySelected")
        known = isinstance(shown, int) and 0 <= shown < len(versions)
        chosen = versions.pop(shown if known else -1) if versions else []
        if len(chosen) == 1 and chosen[0]["role"] == "assistant":
            others = [other[0] for other in versions if len(other) == 1 and "lost" not in other[0]]
            chosen[0] |= {"alternatives": others} if others else {}
        messages += chosen
    started = record.get("createdAt")
    name = f"lm-studio-{started}" if isinstance(started, int) else None
    return Found("lm-studio", messages, name, "lm-studio", started)


def _version(version: dict, usual: Any) -> list[dict]:
    parts = [_lm_part(part, {}) for part in as_list(version.get("content"))]
    for step in map(as_object, as_list(version.get("steps"))):
        if step.get("type") == "contentBlock":
            parts += [_lm_part(part, as_object(step.get("style"))) for part in as_list(step.get("content"))]
        elif "tool" in str(step.get("type")).lower():
            parts.append({"type": "tool"})
    model = as_object(version.get("senderInfo")).get("senderName") or usual
    return messages_of({"model": model}, role_of(version.get("role")), parts)


def _lm_part(part: Any, style: dict) -> dict:
    part = as_object(part)
    if style.get("type") == "thinking":
        return {"type": "thinking", "thinking": part.get("text")}
    return part if part.get("type") != "file" else {"type": str(part.get("fileType") or "file")}


def is_jan(record: Any) -> bool:
    return isinstance(record, dict) and record.get("object") == "thread.message" and bool(record.get("thread_id"))


def read_jan(rows: list[dict]) -> Found:
    messages: list[dict] = []
    for row in rows:
        parts = [inner for part in as_list(row.get("content")) for inner in _jan_parts(as_object(part))]
        cut = {"stopped": "stopped", "error": "failed", "pending": "failed"}.get(str(row.get("status")))
        said = messages_of({}, role_of(row.get("role")), parts)
        said[-1] |= {"id": str(row["id"])} if row.get("id") else {}
        messages += [m | {"at": row.get("created_at")} | ({"incomplete": cut} if cut else {}) for m in said]
    name = f"jan-{rows[0]['thread_id']}"
    return Found("jan", messages, name, "jan", rows[0].get("created_at"))


def _jan_parts(part: dict) -> list[dict]:
    kind, text = part.get("type"), part.get("text")
    value = text.get("value") if isinstance(text, dict) else text
    if kind == "tool_call":
        named = {"id": "tool_call_id", "name": "tool_name", "input": "input"}
        call = {"type": "tool_use"} | {key: part.get(name) for key, name in named.items()}
        return [call, {"type": "tool_result", "content": part.get("output")}]
    return [{"type": "thinking", "thinking": value} if kind == "reasoning" else {"type": kind, "text": value}]
