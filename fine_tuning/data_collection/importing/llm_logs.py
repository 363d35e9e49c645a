"""The logs.db of simonw/llm, tables of version 0.36: `llm/migrations.py`, `llm/logs.py`.

A thread's messages are a chain from `tip_message_hash` along `parent_hash`, what they say is in `parts`, and the turn
whose tip is a reply names its model. What older versions logged stays in `responses`, a question and its reply a row; a
row whose id is in `turns` too is the same one.
"""

import json
import sqlite3
from collections.abc import Iterator
from itertools import groupby

from fine_tuning.data_collection.importing.pieces import Found, as_list, messages_of, role_of

_CHAIN = """
    WITH RECURSIVE chain (hash, parent, role, depth) AS (
        SELECT hash, parent_hash, role, 0 FROM messages WHERE hash = ?
        UNION ALL SELECT m.hash, m.parent_hash, m.role, depth + 1 FROM messages m JOIN chain ON m.hash = chain.parent
        WHERE depth < 10000
    )
    SELECT chain.hash, chain.role, turns.model, turns.datetime_utc AS at FROM chain
    LEFT JOIN turns ON turns.id = (
        SELECT id FROM turns WHERE tip_message_hash = chain.hash ORDER BY thread_id = ? DESC LIMIT 1
    ) ORDER BY depth DESC
"""
_CHANGED = "coalesce(strftime('%s', datetime_utc) + 0, 1e18) >= ?"
_THREADS = f"SELECT * FROM threads WHERE id IN (SELECT thread_id FROM turns WHERE {_CHANGED})"
_RESPONSES = f"""
    SELECT *, coalesce(conversation_id, id) AS thread FROM responses WHERE thread IN (
        SELECT coalesce(conversation_id, id) FROM responses WHERE {_CHANGED}
    ) ORDER BY thread, datetime_utc, rowid
"""
Parts = list[dict]


def read_database(db: sqlite3.Connection, tables: set[str], since: float) -> Iterator[Found]:
    """The threads with a turn at `since` (seconds since 1970) or later, each whole."""
    turns = set()
    if "turns" in tables:
        turns = {row["id"] for row in db.execute("SELECT id FROM turns")}
        for thread in db.execute(_THREADS, (since,)):
            messages = []
            for row in db.execute(_CHAIN, (thread["tip_message_hash"], thread["id"])):
                parts = db.execute("SELECT * FROM parts WHERE message_hash = ? ORDER BY position", (row["hash"],))
                messages += _said(row["role"], [_part(db, part) for part in parts], row["model"], row["at"])
            yield Found("llm", messages, f"llm-{thread['id']}", "llm", thread["datetime_utc"])
    rows = (row for row in db.execute(_RESPONSES, (since,)) if row["id"] not in turns)
    for name, responses in groupby(rows, key=lambda row: row["thread"]):
        messages = []
        for row in responses:
            system, prompt = (_text(db, tables, kind, row) for kind in ("system", "prompt"))
            messages += _said("system", [{"type": "text", "text": system}] if system and not messages else [])
            files = [{"type": "file"} for _ in _rows(db, tables, "prompt_attachments", row["id"])]
            asked = [{"type": "text", "text": prompt}] * bool(prompt) + files
            messages += _said("user", asked, None, row["datetime_utc"])
            results = [_result(each["output"]) for each in _rows(db, tables, "tool_results", row["id"])]
            calls = [_call(each["name"], each["arguments"]) for each in _rows(db, tables, "tool_calls", row["id"])]
            reply = [{"type": "text", "text": row["response"] or ""}, *calls]
            messages += _said("tool", results) + _said("assistant", reply, row["model"], row["datetime_utc"])
        yield Found("llm", messages, f"llm-{name}", "llm")


def _said(role: str, parts: Parts, model: str | None = None, at: str | None = None) -> list[dict]:
    said = messages_of({"model": model}, role_of(role), parts) if parts else []
    return [message | {"at": at} for message in said]


def _part(db: sqlite3.Connection, row: sqlite3.Row) -> dict:
    """A part as an API's content part; what is none of text, thought, call and result is a file."""
    payload = json.loads(row["payload"] or "{}")
    text = row["text"] if row["text"] is not None else _resolved(db, as_list(payload.get("text_ref")))
    return {
        "text": {"type": "text", "text": text},
        "reasoning": {"type": "thinking", "thinking": text},
        "tool_call": _call(row["tool_name"], payload.get("arguments")),
        "tool_result": _result(payload.get("output")),
    }.get(row["type"], {"type": "file"})


def _call(name: str, arguments: object) -> dict:
    return {"type": "tool_use", "name": name, "input": arguments}


def _result(output: object) -> dict:
    return {"type": "tool_result", "content": output}


def _resolved(db: sqlite3.Connection, pieces: Parts) -> str:
    """A text that borrows from fragments, each of which is stored once."""
    fragments = dict(tuple(row) for row in db.execute("SELECT id, content FROM fragments")) if pieces else {}
    return "".join(piece.get("literal") or fragments.get(piece.get("fragment"), "") for piece in pieces)


def _rows(db: sqlite3.Connection, tables: set[str], table: str, response: str) -> list[sqlite3.Row]:
    """What a table has of a response; older versions have fewer tables."""
    query = f"SELECT * FROM {table} WHERE response_id = ? ORDER BY rowid"
    return db.execute(query, (response,)).fetchall() if table in tables else []


def _text(db: sqlite3.Connection, tables: set[str], kind: str, row: sqlite3.Row) -> str:
    """The prompt or system prompt of a response, below the fragments that it was sent with."""
    names = [each["fragment_id"] for each in _rows(db, tables, f"{kind}_fragments", row["id"])]
    found = [_resolved(db, [{"fragment": name}]) for name in names]
    return "\n".join(filter(None, [*found, row[kind]]))
