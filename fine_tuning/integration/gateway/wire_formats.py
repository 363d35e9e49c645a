"""What a request asks and what a reply says, in Ollama's API, OpenAI's (three forms) and Anthropic's.

Only text is read. `/api/chat`, `/api/generate`, `/v1/chat/completions`, `/v1/completions`, `/v1/responses` and
`/v1/messages` are known, streamed (NDJSON or server-sent events) and whole.
"""

import hashlib
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import orjson

from fine_tuning.data_collection.importing.pieces import as_list, as_object
from fine_tuning.integration.served_examples import after_examples

ROLES = {"developer": "system", "function": "tool", "model": "assistant"}
CALLS = ("tool_use", "function_call", "custom_tool_call")
RESULTS = ("tool_result", "function_call_output", "custom_tool_call_output")
SAMPLING = ("temperature", "top_p", "top_k", "seed", "max_tokens", "max_completion_tokens", "max_output_tokens")
NAMES = ("user", "store", "conversation")
CUT = ("length", "max_tokens", "max_output_tokens")
THOUGHTS = re.compile(r"\A\s*<think>(.*?)</think>\s*", re.DOTALL)
MOST_BYTES = 32 << 20  # of a reply that is read; a longer one is passed on unread


class _Turn(NamedTuple):
    """A message of a request: its text, the tools that it calls, and its parts that are no text."""

    role: str
    content: str
    calls: Sequence[Any] = ()
    files: Sequence[Any] = ()


@dataclass
class Asked:
    """What a request asks.

    Args:
        history: what stands before the question, tool calls and their results left out.
        tool_calls: the calls since the question, where the reply rests on their results.
        sampling: the sampling options that the client set.
        names: what the client says of the conversation and the person: `metadata`, `user` and the like.
        problem: why this is no exchange of a question and a reply; None for one.
    """

    model: str
    question: str = ""
    history: list[dict[str, str]] = field(default_factory=list)
    attachments: list[dict[str, str]] = field(default_factory=list)
    tool_calls: list[Any] = field(default_factory=list)
    sampling: dict[str, Any] = field(default_factory=dict)
    names: dict[str, Any] = field(default_factory=dict)
    problem: str | None = None


def read_request(path: str, body: bytes) -> Asked | None:
    """What the body of a request to one of READERS asks; None where it is no JSON object."""
    try:
        request = orjson.loads(body)
    except ValueError:
        return None
    if not isinstance(request, dict):
        return None
    options = request | as_object(request.get("options"))
    asked = Asked(
        model=str(request.get("model") or ""),
        sampling={key: options[key] for key in SAMPLING if isinstance(options.get(key), (int, float))},
        names={**as_object(request.get("metadata")), **{key: request.get(key) for key in NAMES}},
    )
    turns = list(_turns(path, request))
    last = max((place for place, turn in enumerate(turns) if turn.role == "user"), default=None)
    if request.get("suffix") or request.get("raw"):
        asked.problem = "autocompletion"
    elif last is None or not turns[last].content.strip():
        asked.problem = "no question"
    elif turns[-1].role == "assistant" and not turns[-1].calls:
        asked.problem = "continued reply"
    else:
        asked.question, asked.attachments = turns[last].content, [_reference(part) for part in turns[last].files]
        asked.history = [
            {"role": turn.role, "content": turn.content}
            for turn in turns[:last]
            if turn.role in ("system", "user", "assistant") and not turn.calls and turn.content.strip()
        ]
        asked.tool_calls = [call for turn in turns[last:] for call in turn.calls]
    return asked


def with_context(path: str, body: bytes, system_prompt: str | None, examples: Sequence[Any]) -> bytes:
    """A request with examples before its messages, and the system prompt where it has none.

    It stays as it is where its form has no messages, and where it brings tools.
    """
    request = orjson.loads(body)
    key = "input" if path == "/v1/responses" else "messages"
    rows = [{"role": "user", "content": request[key]}] if isinstance(request.get(key), str) else request.get(key)
    if request.get("tools") or not rows or not isinstance(rows, list):
        return body
    apart = {"/v1/responses": "instructions", "/v1/messages": "system"}.get(path)
    if system_prompt and not (apart and request.get(apart)) and rows[0].get("role") not in ("system", "developer"):
        if apart:
            request[apart] = system_prompt
        else:
            rows = [{"role": "system", "content": system_prompt}, *rows]
    return orjson.dumps(request | {key: after_examples(rows, examples)})


def _turns(path: str, request: dict[str, Any]) -> Iterator[_Turn]:
    system = request.get("instructions" if path == "/v1/responses" else "system")
    if path in ("/api/generate", "/v1/responses", "/v1/messages") and (text := _text(system)):
        yield _Turn("system", text)
    if path in ("/api/generate", "/v1/completions"):
        yield _Turn("user", _text(request.get("prompt")), files=as_list(request.get("images")))
        return
    rows = request.get("input" if path == "/v1/responses" else "messages")
    for row in [{"role": "user", "content": rows}] if isinstance(rows, str) else as_list(rows):
        row, content = as_object(row), as_object(row).get("content")
        kinds = [_kind(row), *map(_kind, as_list(content))]
        calls = [*as_list(row.get("tool_calls")), *(part for part in [row, *as_list(content)] if _kind(part) in CALLS)]
        role = "assistant" if calls else str(row.get("role"))
        if _kind(row) in RESULTS or (set(kinds) & set(RESULTS) and not _text(content)):
            role = "tool"
        if _kind(row) != "reasoning":
            files = [*as_list(row.get("images")), *filter(_is_file, as_list(content))]
            yield _Turn(ROLES.get(role, role), _text(content), calls, files)


def _text(content: Any) -> str:
    """A string, or the text parts of a list of parts."""
    if isinstance(content, str):
        return content
    parts = [part.get("text") if isinstance(part, dict) else part for part in as_list(content)]
    return "\n".join(part for part in parts if isinstance(part, str))


def _reference(part: Any) -> dict[str, str]:
    """The type and a hash of what is no text, without its bytes."""
    digest = hashlib.sha256(orjson.dumps(part, option=orjson.OPT_SORT_KEYS)).hexdigest()
    return {"type": str(_kind(part) or "image"), "sha256": digest}


def _is_file(part: Any) -> bool:
    return isinstance(part, dict) and _kind(part) not in (*CALLS, *RESULTS) and not isinstance(part.get("text"), str)


def _kind(value: Any) -> Any:
    return value.get("type") if isinstance(value, dict) else None


# -----------------------------------------------------------------------------
# replies


class ReplyReader:
    """Reads a reply beside the stream: `feed` gets its bytes as they pass.

    Args:
        path: the route that was asked.
        content_type, encoding: of the answer. NDJSON and events are read line by line, JSON as a whole in `end`.

    Attributes:
        readable: whether all of it could be read so far.
        finished: whether the model ended the reply, `cut` whether a limit of tokens did.
        calls: whether it calls tools.
    """

    def __init__(self, path: str, content_type: str, encoding: str = "identity") -> None:
        self._read = READERS[path]
        self.streamed = content_type in ("application/x-ndjson", "text/event-stream")
        self.readable = encoding == "identity" and (self.streamed or content_type == "application/json")
        self._rest, self._size = bytearray(), 0
        self._pieces: list[str] = []
        self._thoughts: list[str] = []
        self.model: str | None = None
        self.tokens: int | None = None
        self.finished = self.cut = self.calls = False

    def feed(self, chunk: bytes) -> int | None:
        """Byte of the chunk where the line that ends the reply begins; None while it goes on."""
        self._size += len(chunk)
        self.readable &= self._size <= MOST_BYTES
        start = 0
        while self.streamed and self.readable and (end := chunk.find(b"\n", start)) >= 0:
            line = bytes(self._rest) + chunk[start:end]
            self._rest.clear()
            if self._line(line):
                return start
            start = end + 1
        if self.readable:
            self._rest += chunk[start:]
        return None

    def end(self) -> None:
        """The answer has ended: read what ends with no newline."""
        if self.readable and self._rest:
            self._line(bytes(self._rest))
            self._rest.clear()

    def _line(self, line: bytes) -> bool:
        """Read one line; whether it is the last one of the reply. What is in no known form ends the reading only."""
        data = line.strip()
        if data.startswith(b"data:"):
            data = data[5:].strip()
        if data == b"[DONE]":
            self.finished = True
            return True
        try:
            return data.startswith(b"{") and self._read(self, orjson.loads(data))
        except (ValueError, TypeError, AttributeError):
            self.readable = False
            return False

    @property
    def text(self) -> str:
        """What has arrived, without the model's thoughts."""
        return THOUGHTS.sub("", "".join(self._pieces))

    @property
    def reasoning(self) -> str:
        inline = THOUGHTS.match("".join(self._pieces))
        return "".join(self._thoughts) or (inline[1].strip() if inline else "")

    def add(self, text: Any = None, thoughts: Any = None, calls: Any = None) -> None:
        """Take in a piece; what is no text is passed over."""
        self._pieces += [text] if isinstance(text, str) else []
        self._thoughts += [thoughts] if isinstance(thoughts, str) else []
        self.calls |= bool(calls)

    def name(self, source: dict[str, Any], tokens: Any = None, reason: Any = None) -> None:
        """Take in what a message says of itself, and the reason why it ended."""
        self.model = source.get("model") or self.model
        self.tokens = tokens if isinstance(tokens, int) else self.tokens
        if reason:
            self.finished, self.cut = True, reason in CUT

    def replace(self, output: Any) -> None:
        """Take the text of finished output items, OpenAI's or Anthropic's, instead of the pieces."""
        self._pieces.clear()
        self._thoughts.clear()
        for item in as_list(output):
            kind = _kind(item)
            if kind == "reasoning":
                self.add(thoughts=_text(item.get("content")) or _text(item.get("summary")))
            elif kind == "message":
                self.add(_text(item.get("content")))
            else:
                self.add(item.get("text"), item.get("thinking"), kind in CALLS)


def _ollama(reply: ReplyReader, line: dict[str, Any]) -> bool:
    message = as_object(line.get("message"))
    reply.add(message.get("content", line.get("response")), message.get("thinking", line.get("thinking")))
    reply.add(calls=message.get("tool_calls"))
    done = line.get("done") is True
    reply.name(line, line.get("eval_count"), (line.get("done_reason") or "stop") if done else None)
    return done


def _chat_completion(reply: ReplyReader, line: dict[str, Any]) -> bool:
    reply.name(line, as_object(line.get("usage")).get("completion_tokens"))
    for choice in as_list(line.get("choices")):
        if choice.get("index", 0) == 0:
            said = as_object(choice.get("delta")) or as_object(choice.get("message")) or choice
            reply.add(said.get("content", said.get("text")), said.get("reasoning_content", said.get("reasoning")))
            reply.add(calls=said.get("tool_calls") or said.get("function_call"))
            reply.name({}, reason=choice.get("finish_reason"))
    return not reply.streamed


def _response(reply: ReplyReader, line: dict[str, Any]) -> bool:
    kind = line.get("type")
    if kind in ("response.output_text.delta", "response.reasoning_text.delta"):
        reply.add(**{"text" if "output" in kind else "thoughts": line.get("delta")})
    whole = as_object(line.get("response")) if kind else line
    if kind and kind not in ("response.completed", "response.incomplete", "response.failed"):
        reply.name(whole)
        return False
    if output := whole.get("output"):
        reply.replace(output)
    ended = {"completed": "stop", "incomplete": "length"}.get(str(whole.get("status")))
    reply.name(whole, as_object(whole.get("usage")).get("output_tokens"), ended)
    return True


def _anthropic(reply: ReplyReader, line: dict[str, Any]) -> bool:
    kind, delta = line.get("type"), as_object(line.get("delta"))
    if kind == "message":
        reply.replace(line.get("content"))
    whole = as_object(line.get("message")) or (line if kind == "message" else {})
    reply.add(delta.get("text"), delta.get("thinking"), _kind(line.get("content_block")) in CALLS)
    reason = delta.get("stop_reason") or whole.get("stop_reason")
    reply.name(whole, as_object(line.get("usage")).get("output_tokens"), reason)
    return kind in ("message", "message_stop")


READERS: dict[str, Callable[[ReplyReader, dict[str, Any]], bool]] = {
    "/api/chat": _ollama,
    "/api/generate": _ollama,
    "/v1/chat/completions": _chat_completion,
    "/v1/completions": _chat_completion,
    "/v1/responses": _response,
    "/v1/messages": _anthropic,
}
