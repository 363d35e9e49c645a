"""Traces of calls to models: spans and events of OpenTelemetry's GenAI conventions, and Langfuse's observations.

OpenTelemetry: open-telemetry/semantic-conventions, `docs/gen-ai` (`gen_ai.input.messages`, `gen_ai.output.messages`,
`gen_ai.system_instructions`, as JSON or as structured attributes), a span a record, or many in one of OTLP's. Langfuse:
rows of its blob storage export (`input`, `output`, `provided_model_name`, …), of its API, and downloaded traces.

Each call holds the history that it was sent with: a call that continues another one is the same conversation.
"""

import json
from collections import Counter
from collections.abc import Callable
from itertools import accumulate
from typing import Any

from fine_tuning.data_collection.importing.pieces import (
    Found,
    NotRecognised,
    as_list,
    as_object,
    messages_of,
    parsed,
    role_of,
)
from fine_tuning.schema.conversation import short_hash

_OTLP = (("resourceSpans", "scopeSpans", "spans"), ("resourceLogs", "scopeLogs", "logRecords"))


def calls_in(record: Any) -> list[Found | NotRecognised] | None:
    """The calls of models that a record of a trace holds, or why one cannot be read; None where it is no trace.
    NotRecognised: it holds no call with its words."""
    if not isinstance(record, dict):
        return None
    for resources, scopes, spans in _OTLP:
        if resources in record:
            inner = [scope for each in as_list(record[resources]) for scope in as_list(as_object(each).get(scopes))]
            return _read(_otel, "opentelemetry", [s for scope in inner for s in as_list(as_object(scope).get(spans))])
    if any(name.startswith("gen_ai.") for name in _attributes(record.get("attributes"))):
        return _read(_otel, "opentelemetry", [record])
    rows = record["observations"] if isinstance(record.get("observations"), list) else [record]
    if any({"type", "output"} <= row.keys() and {"trace_id", "traceId"} & row.keys() for row in map(as_object, rows)):
        shared = {key: record[key] for key in ("sessionId", "userId") if record.get(key)}
        return _read(_langfuse, "langfuse", [shared | as_object(row) for row in rows])
    return None


def _read(read: Callable[[dict], Found | None], name: str, rows: list) -> list[Found | NotRecognised]:
    found: list[Found | NotRecognised | None] = []
    for row in rows:
        try:
            found.append(read(as_object(row)))
        except NotRecognised as problem:
            found.append(problem)
    if not (calls := [call for call in found if call is not None]):
        raise NotRecognised(f"{name}: no call of a model with its words: have their content captured")
    return calls


class Calls:
    """Joins calls to conversations: `found` has each with the line of its first call."""

    def __init__(self) -> None:
        self.found: list[tuple[int, Found]] = []
        self._ends: dict[str, Found] = {}  # hash of all that was said → the conversation
        self._names: Counter[str] = Counter()

    def add(self, line: int, call: Found) -> None:
        """Take in a call: it continues a conversation that its history begins with, repeats one, or begins one. Its
        `id` is what the client calls the conversation."""
        places = [i for i, message in enumerate(call.messages) if message["role"] != "system"]
        said = ([call.messages[i]["role"], call.messages[i]["content"].strip()] for i in places)
        hashes = list(accumulate(said, lambda before, each: short_hash([before, *each]), initial=call.id or ""))[1:]
        for place, known in zip(reversed(places), reversed(hashes), strict=True):
            if known in self._ends:
                conversation = self._ends.pop(known)
                conversation.messages += call.messages[place + 1 :]
                break
        else:
            conversation = call
            first = next((m["content"] for m in call.messages if m["role"] == "user"), "")
            name = short_hash([call.id or call.started_at, first])
            self._names[name] += 1
            conversation.id = f"{call.format}-{name}" + (f"-{self._names[name]}" if self._names[name] > 1 else "")
            self.found.append((line, conversation))
        self._ends[hashes[-1]] = conversation


def _otel(span: dict) -> Found | None:
    said = _attributes(span.get("attributes"))
    for event in as_list(span.get("events")):
        said |= _attributes(as_object(event).get("attributes"))
    system, asked, replies = (
        as_list(parsed(said.get(f"gen_ai.{name}")))
        for name in ("system_instructions", "input.messages", "output.messages")
    )
    rows = [{"role": "system", "parts": system}] * bool(system) + asked
    at = span.get("startTimeUnixNano") or span.get("timeUnixNano") or span.get("start_time")
    return _call(
        "opentelemetry",
        [_row(as_object(row)) for row in rows],
        [_row(as_object(row)) for row in replies],
        said.get("gen_ai.response.model") or said.get("gen_ai.request.model"),
        said.get("gen_ai.conversation.id") or said.get("session.id"),
        said.get("enduser.id") or said.get("user.id"),
        int(at) if isinstance(at, str) and at.isdigit() and len(at) < 20 else at,  # OTLP's JSON has integers as text
    )


def _langfuse(row: dict) -> Found | None:
    if row.get("type") != "GENERATION":
        return None
    asked, said = parsed(row.get("input")), parsed(row.get("output"))
    if isinstance(asked, dict):
        asked = asked.get("messages", asked.get("prompt", asked.get("input")))
    if isinstance(said, dict) and isinstance(said.get("choices"), list):
        said = [as_object(choice).get("message") for choice in said["choices"]]
    elif isinstance(said, str) or (isinstance(said, list) and "content" not in as_object((said or [0])[0])):
        said = {"content": said}
    said = said if isinstance(said, list) else [said]
    replies = [{"role": "assistant"} | each for each in map(as_object, said) if each]
    return _call(
        "langfuse",
        [{"role": "user", "content": asked}] if isinstance(asked, str) else list(map(as_object, as_list(asked))),
        [reply for reply in replies if reply["role"] != "user"],
        row.get("provided_model_name") or row.get("model"),
        row.get("session_id") or row.get("sessionId"),
        row.get("user_id") or row.get("userId"),
        row.get("start_time") or row.get("startTime"),
    )


def _call(
    name: str, asked: list[dict], replies: list[dict], model: Any, conversation: Any, person: Any, at: Any
) -> Found | None:
    """A call as a conversation; None where it says nothing."""
    if not asked or not replies:
        return None
    first, *others = (_said(row | {"model": model}) for row in replies)
    if first[-1]["role"] != "assistant":
        raise NotRecognised(f"{name}: a call ends with no reply")
    if alternatives := [other[0] for other in others if len(first) == len(other) == 1 and "lost" not in other[0]]:
        first[0]["alternatives"] = alternatives
    messages = [message for row in asked for message in _said(row)] + [message | {"at": at} for message in first]
    who = {"user_id": person} if isinstance(person, str) and person else {}
    return Found(name, messages, str(conversation) if conversation else None, name, at, who)


def _said(row: dict) -> list[dict]:
    said = messages_of(row, role_of(row.get("role")), row.get("content"))
    if row.get("finish_reason") == "length":
        said[-1]["incomplete"] = "length"
    return said


def _row(row: dict) -> dict:
    """A message of the conventions in the form of an API's."""
    parts = row.get("parts")
    return row if not isinstance(parts, list) else row | {"content": [_part(as_object(part)) for part in parts]}


def _part(part: dict) -> dict:
    kind, text = str(part.get("type")), part.get("content")
    if kind.endswith("tool_call_response"):
        result = part.get("response", part.get(kind))
        text = result if isinstance(result, str) else json.dumps(result, default=str)
        return {"type": "tool_result", "content": text}
    if kind.endswith("tool_call"):
        return {"input": part.get(kind)} | part | {"type": "tool_use"}
    known = {"text": {"type": "text", "text": text}, "reasoning": {"type": "thinking", "thinking": text}}
    return known.get(kind, {"type": str(part.get("modality") or "file")})


def _attributes(given: Any) -> dict[str, Any]:
    """{name: value} of attributes as an object, or as OTLP's list of keys and typed values."""
    if isinstance(given, list):
        return {str(each.get("key")): _value(each.get("value")) for each in given if isinstance(each, dict)}
    return {str(name): value for name, value in as_object(given).items()}


def _value(value: Any) -> Any:
    for kind, inner in as_object(value).items():
        if kind == "kvlistValue":
            return _attributes(as_object(inner).get("values"))
        return [_value(each) for each in as_list(as_object(inner).get("values"))] if kind == "arrayValue" else inner
    return None
