"""An Ollama in a thread: real HTTP on loopback, the answers and refusals of several versions, and failures on demand.

It keeps blobs and manifests in memory or in a folder and renders templates with gotpl. Its models answer through
llama.cpp, or with one fixed sentence.
"""

import atexit
import gzip
import hashlib
import json
import math
import os
import re
import shutil
import socket
import struct
import tempfile
import threading
from collections.abc import Callable, Iterator, MutableMapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import lru_cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gotpl

if TYPE_CHECKING:
    from fine_tuning.runtime.llama_engine import LlamaEngine

NAME = re.compile(r"(?:[\w.-]+/){0,2}[A-Za-z0-9_][\w.-]*(?::[A-Za-z0-9_][\w.-]{0,79})?")
BEFORE_AN_ANSWER = ("hang", "500", "507", "reset")
ERROR_LINES = {
    "error line": "llama runner process no longer running: 2",
    "full disk": "write /usr/share/ollama/.ollama/models/blobs/sha256-1: no space left on device",
}
GUESSED_TEMPLATE = "{{ range .Messages }}<|im_start|>{{ .Role }}\n{{ .Content }}<|im_end|>\n{{ end }}"


@dataclass(frozen=True)
class Profile:
    """What a version does otherwise than others.

    Args:
        offers_render: whether `_debug_render_only` is understood; old servers ignore it and chat.
        rewrites_gguf: it stores another file than the one that was uploaded, and keeps that one.
        room: times the file that must fit on its disk.
        converts: it takes `adapters` and `quantize`.
    """

    version: str
    offers_render: bool = True
    rewrites_gguf: bool = False
    room: int = 1
    converts: bool = True


# The first three as they were seen, the last as its source reads.
PROFILES = {
    profile.version: profile
    for profile in (
        Profile("0.5.5", offers_render=False),
        Profile("0.24.0"),
        Profile("0.32.15", rewrites_gguf=True, room=3),
        Profile("0.34.1", converts=False),
    )
}


@dataclass
class Manifest:
    """What a name stands for. Two names of one manifest have one digest."""

    layers: list[dict]
    template: str
    system: str
    parameters: dict[str, Any]
    licenses: list[str] = field(default_factory=list)
    modified_at: str = field(default_factory=lambda: datetime.now(UTC).isoformat())

    @property
    def content(self) -> bytes:
        """The file that Ollama keeps of it."""
        return json.dumps({"schemaVersion": 2, "layers": self.layers}, sort_keys=True).encode()

    @property
    def digest(self) -> str:
        return hashlib.sha256(self.content).hexdigest()


class FakeOllama:
    """Use as a context manager; used again, it listens at the same address with what it has.

    `faults["POST /api/create"] = "cut"` makes that call fail, once: hang, 500, 507, reset; and where the answer is a
    stream, after its first line: cut, error line, full disk, reset in stream, hang in stream, short, broken chunk, or
    from its beginning: not json, compressed, another type.

    Args:
        profile: the version that it is.
        count_tokens: tokens of a prompt, for `prompt_eval_count`.
        extra_tokens: a doubled BOS, as a server with the wrong idea of the tokenizer adds.
        own_template: the GGUF's chat template and what it renders, for a server that takes it instead of TEMPLATE, as
            those from 0.30 on do where it can do more (calling tools).
        reply: what its models say; None for what llama.cpp says with their weights.
        store: folder for blobs and manifests, as Ollama lays them out; in memory if None.
        disk: bytes that its disk holds.
    """

    def __init__(
        self,
        *,
        profile: Profile = PROFILES["0.34.1"],
        count_tokens: Callable[[str], int] = len,
        extra_tokens: int = 0,
        own_template: tuple[str, Callable[[list[dict]], str]] | None = None,
        reply: str | None = None,
        store: Path | None = None,
        disk: int | None = None,
    ) -> None:
        self.version = profile.version
        self.offers_render = profile.offers_render
        self.rewrites_gguf = profile.rewrites_gguf
        self.room = profile.room
        self.converts = profile.converts
        self.disk = disk
        self.count_tokens = count_tokens
        self.extra_tokens = extra_tokens
        self.own_template = own_template
        self.reply = reply
        self.ignores_template = False
        self.pace = 0.0  # seconds between the lines of a stream
        self.broken_off = 0  # streams whose reader left
        self.store = store
        self.blobs: MutableMapping[str, bytes] = {} if store is None else _Blobs(store / "blobs")
        self.manifests: dict[str, Manifest] = {}
        self.on_gpu: dict[str, int] = {}  # bytes of its memory that a loaded model takes
        self.faults: dict[str, str] = {}
        self.requests: list[str] = []
        self.headers: list[dict[str, str]] = []
        self.prompts: list[str] = []
        self.received_bytes = 0
        self.released = threading.Event()
        self.lock = threading.Lock()
        self.port = 0

    def __enter__(self) -> "FakeOllama":
        fake = self

        class Handler(_Handler):
            ollama = fake

        self.released.clear()
        self.server = ThreadingHTTPServer(("127.0.0.1", self.port), Handler)
        self.server.daemon_threads = True
        self.port = self.server.server_port
        self.host = f"http://127.0.0.1:{self.port}"
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.released.set()
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()

    def keep_manifests(self) -> None:
        """Write the manifests into the store, if there is one."""
        if self.store is None:
            return
        folder = self.store / "manifests/registry.ollama.ai/library"
        shutil.rmtree(folder, ignore_errors=True)
        for name, manifest in self.manifests.items():
            path = folder / name.replace(":", "/")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(manifest.content)

    def digest(self, name: str) -> str | None:
        """Manifest digest of a name."""
        manifest = self.manifests.get(name)
        return manifest.digest if manifest else None

    def answer(self, manifest: Manifest, prompt: str, limit: int) -> tuple[list[str], bool]:
        """Pieces of the reply, at most `limit` of them if that is not negative, and whether it is whole."""
        if self.reply is not None:
            words = re.findall(r"\S+\s*", self.reply)
            shown = words if limit < 0 else words[:limit]
            return shown, len(shown) == len(words)
        weights = next(layer["digest"] for layer in manifest.layers if layer["mediaType"].endswith("model"))
        stops = manifest.parameters.get("stop") or []
        said = _engine(self.blobs[weights]).complete(prompt, 64 if limit < 0 else limit)
        cuts = [place for stop in stops if (place := said.text.find(stop)) >= 0]
        return [said.text[: min(cuts, default=None)]], said.finished or bool(cuts)

    def taken(self) -> int:
        """Bytes that its blobs take."""
        return sum(len(data) for data in self.blobs.values())

    def render(self, manifest: Manifest, messages: list[dict]) -> str:
        """The prompt: the model's system prompt in front if there is none, runs of one role joined, the template."""
        turns = list(messages)
        if manifest.system and turns[0]["role"] != "system":
            turns.insert(0, {"role": "system", "content": manifest.system})
        if self.own_template:
            return self.own_template[1](turns)
        joined: list[dict] = []
        for turn in turns:
            if joined and joined[-1]["Role"] == turn["role"] != "tool":
                joined[-1]["Content"] += "\n\n" + turn["content"]
            else:
                joined.append({"Role": turn["role"], "Content": turn["content"]})
        system = "\n\n".join(turn["Content"] for turn in joined if turn["Role"] == "system")
        template = GUESSED_TEMPLATE if self.ignores_template else manifest.template
        return _render(template, {"Messages": joined, "System": system})


@lru_cache(maxsize=4)
def _engine(gguf: bytes) -> "LlamaEngine":
    """llama.cpp with these weights, until the tests end."""
    from fine_tuning.common.errors import UserError
    from fine_tuning.runtime.llama_engine import LlamaEngine

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model.gguf")
        path.write_bytes(gguf)
        try:
            engine = LlamaEngine(path, context=1024, threads=1).start()
        except UserError:
            raise _Refusal(500, "llama runner process has terminated: error loading model") from None
    atexit.register(engine.close)
    return engine


class _Blobs(MutableMapping):
    """Blobs by digest in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True)

    def _path(self, digest: str) -> Path:
        return self.folder / digest.replace(":", "-")

    def __getitem__(self, digest: str) -> bytes:
        try:
            return self._path(digest).read_bytes()
        except FileNotFoundError:
            raise KeyError(digest) from None

    def __setitem__(self, digest: str, data: bytes) -> None:
        self._path(digest).write_bytes(data)

    def __delitem__(self, digest: str) -> None:
        self._path(digest).unlink()

    def __iter__(self) -> Iterator[str]:
        return (path.name.replace("-", ":", 1) for path in self.folder.iterdir())

    def __len__(self) -> int:
        return len(list(self.folder.iterdir()))


def _render(template: str, data: dict) -> str:
    return gotpl.render(template, data)


class _Refusal(Exception):
    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status


class _Handler(BaseHTTPRequestHandler):
    ollama: FakeOllama
    protocol_version = "HTTP/1.1"

    # ------------------------------------------------------------------------------------------------------- dispatch

    def _serve(self) -> None:
        if self.ollama.released.is_set():  # a connection from before it ended
            self._reset()
            return
        call = re.sub(r"/sha256:.*", "", f"{self.command} {self.path}")
        with self.ollama.lock:
            self.ollama.requests.append(call)
            self.ollama.headers.append(dict(self.headers))
            fault = self.ollama.faults.get(call)
            if fault in BEFORE_AN_ANSWER:
                del self.ollama.faults[call]
        try:
            if fault == "hang":
                self.close_connection = True
                self.ollama.released.wait(30)
                return
            if fault == "reset":
                self._reset()
                return
            if fault == "500":
                raise _Refusal(500, "llama runner process has terminated: signal: killed")
            if fault == "507":
                raise _Refusal(507, "write blob: no space left on device")
            self._route(call)
        except _Refusal as refusal:
            self.close_connection = True
            self._answer({"error": str(refusal)}, refusal.status)
        except (BrokenPipeError, ConnectionResetError):
            self.ollama.broken_off += 1
            self.close_connection = True

    do_GET = do_HEAD = do_POST = do_DELETE = _serve

    def _route(self, call: str) -> None:
        match call:
            case "GET /" | "HEAD /":
                self._send(200, b"Ollama is running", "text/plain; charset=utf-8")
            case "GET /api/version":
                self._answer({"version": self.ollama.version})
            case "GET /api/tags":
                self._tags()
            case "HEAD /api/blobs":
                self._send(200 if self._digest() in self.ollama.blobs else 404)
            case "POST /api/blobs":
                self._receive_blob()
            case "POST /api/create":
                self._stream(self._create(self._body()))
            case "POST /api/show":
                self._show(self._body())
            case "POST /api/copy":
                self._copy(self._body())
            case "DELETE /api/delete":
                self._delete(self._body())
            case "POST /api/chat":
                self._chat(self._body())
            case "POST /api/generate":
                self._chat(self._body(), generate=True)
            case "POST /v1/chat/completions":
                self._chat_completion(self._body())
            case "POST /v1/responses":
                self._response(self._body())
            case "POST /v1/messages":
                self._anthropic_message(self._body())
            case "GET /api/ps":
                self._answer({"models": [{"name": n, "size_vram": b} for n, b in self.ollama.on_gpu.items()]})
            case "GET /v1/models":
                self._answer({"object": "list", "data": [{"id": n, "object": "model"} for n in self.ollama.manifests]})
            case "POST /api/embed":
                self._answer({"model": self._body()["model"], "embeddings": [[0.5, 0.25]]})
            case _ if self.path in (
                "/",
                "/api/version",
                "/api/tags",
                "/api/create",
                "/api/show",
                "/api/copy",
                "/api/chat",
                "/api/generate",
            ):
                self.close_connection = True  # the body was not read
                self._send(405, b"405 method not allowed")
            case _:
                self.close_connection = True
                self._send(404, b"404 page not found")

    # ---------------------------------------------------------------------------------------------------------- calls

    def _tags(self) -> None:
        models = [
            {
                "name": name,
                "model": name,
                "modified_at": manifest.modified_at,
                "size": sum(layer["size"] for layer in manifest.layers),
                "digest": manifest.digest,
                "details": {"format": "gguf", "family": "llama", "quantization_level": "Q8_0"},
            }
            for name, manifest in self.ollama.manifests.items()
        ]
        self._answer({"models": models})

    def _digest(self) -> str:
        digest = self.path.rsplit("/", 1)[-1]
        if not re.fullmatch(r"sha256[:-][0-9a-f]{64}", digest):
            raise _Refusal(400, "invalid digest format")
        return digest.replace("-", ":")

    def _receive_blob(self) -> None:
        digest = self._digest()
        data = self.rfile.read(int(self.headers["Content-Length"]))
        self.ollama.received_bytes += len(data)
        if digest in self.ollama.blobs:
            self._send(200)
            return
        got = "sha256:" + hashlib.sha256(data).hexdigest()
        if got != digest:
            self.ollama.blobs[got] = data
            raise _Refusal(400, f'digest mismatch, expected "{digest}", got "{got}"')
        if self.ollama.disk is not None and self.ollama.taken() + len(data) > self.ollama.disk:
            raise _Refusal(500, "write /usr/share/ollama/.ollama/models/blobs/sha256-1: no space left on device")
        self.ollama.blobs[digest] = data
        self._send(201)

    def _create(self, body: dict) -> Iterator[dict]:
        if "typical_p" in (body.get("parameters") or {}):
            raise _Refusal(400, "typical_p is deprecated and cannot be set as a model parameter")
        if body.get("adapters") and not self.ollama.converts:
            raise _Refusal(400, "LoRA adapters are no longer supported")
        if (body.get("quantize") or body.get("quantization")) and not self.ollama.converts:
            raise _Refusal(400, "quantizing GGUF models is no longer supported")
        if not (body.get("model") or body.get("name")):
            raise _Refusal(400, "model is required")
        name = _name(body.get("model") or body.get("name"))
        files = body.get("files") or {}
        if not files:
            raise _Refusal(400, "neither 'from' or 'files' was specified")
        if any(path.startswith("/") or ".." in path.split("/") for path in files):
            raise _Refusal(400, "file path must be relative")
        return self._create_steps(name, body, next(iter(files.values())))

    def _create_steps(self, name: str, body: dict, digest: str) -> Iterator[dict]:
        """The lines of the answer; from here on an error is one of them, and the status was 200."""
        if digest not in self.ollama.blobs:
            path = f"/usr/share/ollama/.ollama/models/blobs/{digest}"
            yield {"error": f"open {path}: no such file or directory"}
            return
        weights = self.ollama.blobs[digest]
        if not weights.startswith(b"GGUF"):
            yield {"error": "supplied file was not in GGUF format"}
            return
        yield {"status": "parsing GGUF"}
        if self.ollama.rewrites_gguf:
            yield {"status": "validating GGUF model"}
            room = (self.ollama.room - 1) * len(weights)
            if self.ollama.disk is not None and self.ollama.taken() + room > self.ollama.disk:
                yield {"error": "llama-quantize: exit status 1"}
                return
            yield {"status": "verifying conversion"}
            weights += b"\0" * 32
        template = body.get("template") or GUESSED_TEMPLATE
        try:
            _render(template, {"Messages": [], "System": ""})
        except gotpl.TemplateError as error:
            yield {"error": f"template error: {error}"}
            return
        layers = [_layer("model", weights), _layer("template", template.encode())]
        for kind in ("system", "license"):
            if body.get(kind):
                layers.append(_layer(kind, json.dumps(body[kind]).encode()))
        parameters = body.get("parameters") or {}
        if parameters:
            layers.append(_layer("params", json.dumps(parameters, sort_keys=True).encode()))
        for layer in layers:
            self.ollama.blobs.setdefault(layer["digest"], layer.pop("data"))
            yield {"status": f"creating new layer {layer['digest']}"}
        yield {"status": "writing manifest"}
        given = body.get("license") or []
        licenses = [given] if isinstance(given, str) else given
        self.ollama.manifests[name] = Manifest(layers, template, body.get("system") or "", parameters, licenses)
        self.ollama.keep_manifests()
        yield {"status": "success"}

    def _show(self, body: dict) -> None:
        manifest = self._manifest(body.get("model"))
        lines = [
            f"{key:30} {_as_go_prints(value)}"
            for key, values in manifest.parameters.items()
            for value in (values if isinstance(values, list) else [values])
        ]
        self._answer(
            {
                "modelfile": "# Modelfile\n",
                "parameters": "\n".join(lines),
                "template": self.ollama.own_template[0] if self.ollama.own_template else manifest.template,
                "system": manifest.system,
                "license": "\n".join(manifest.licenses),
                "details": {"format": "gguf", "family": "llama", "quantization_level": "Q8_0"},
                "model_info": {"general.architecture": "llama"},
                "capabilities": ["completion"],
                "modified_at": manifest.modified_at,
            }
        )

    def _copy(self, body: dict) -> None:
        source, destination = _name(body.get("source")), _name(body.get("destination"))
        self.ollama.manifests[destination] = self._manifest(source)
        self.ollama.keep_manifests()
        self._send(200)

    def _delete(self, body: dict) -> None:
        self._manifest(body.get("model"))
        del self.ollama.manifests[_name(body["model"])]
        self.ollama.keep_manifests()
        self._send(200)

    def _chat(self, body: dict, generate: bool = False) -> None:
        manifest = self._manifest(body.get("model"))
        if generate and "prompt" not in body and body.get("keep_alive") == 0:
            self.ollama.on_gpu.pop(body["model"], None)
            self._answer({"model": body["model"], "response": "", "done": True, "done_reason": "unload"})
            return
        asked = [{"role": "user", "content": body["prompt"]}] if generate else body.get("messages") or []
        prompt = self.ollama.render(manifest, asked)
        self.ollama.prompts.append(prompt)
        stamp = {"model": body["model"], "created_at": datetime.now(UTC).isoformat()}
        if body.get("_debug_render_only") and self.ollama.offers_render:
            self._answer({**stamp, "_debug_info": {"rendered_template": prompt}})
            return
        shown, whole = self.ollama.answer(manifest, prompt, (body.get("options") or {}).get("num_predict", -1))

        def said(text: str, **more: object) -> dict:
            return {"response": text} if generate else {"message": {"role": "assistant", "content": text, **more}}

        if calls := self._tool_calls(body):
            shown = []
        last = {
            **stamp,
            **said("", **({"tool_calls": [{"function": call} for call in calls]} if calls else {})),
            "done": True,
            "done_reason": "stop" if whole else "length",
            "total_duration": 2_000_000_000,
            "load_duration": 1_000_000_000,
            "prompt_eval_count": self.ollama.count_tokens(prompt) + self.ollama.extra_tokens,
            "prompt_eval_duration": 400_000_000,
            "eval_count": len(shown) + 1,
            "eval_duration": 600_000_000,
        }
        if body.get("stream") is False:
            self._answer({**last, **(said("".join(shown)) if shown else {})})
            return
        pieces = ({**stamp, **said(word), "done": False} for word in shown)
        self._stream(line for part in (pieces, [last]) for line in part)

    def _tool_calls(self, body: dict) -> list[dict]:
        """The first tool that is offered, until its result is there."""
        offered = [tool.get("function", tool) for tool in body.get("tools") or []]
        last = (body.get("messages") or [{}])[-1]
        return [{"name": offered[0]["name"], "arguments": {}}] if offered and last.get("role") == "user" else []

    def _said(self, body: dict, messages: list[dict]) -> tuple[list[str], bool]:
        """Pieces of the reply and whether it is whole, for the APIs of others."""
        manifest = self._manifest(body.get("model"))
        texts = [
            m | {"content": "".join(p.get("text", "") for p in m["content"])}
            if isinstance(m.get("content"), list)
            else m
            for m in messages
        ]
        prompt = self.ollama.render(manifest, texts)
        self.ollama.prompts.append(prompt)
        limit = body.get("max_tokens") or body.get("max_completion_tokens") or body.get("max_output_tokens") or -1
        return self.ollama.answer(manifest, prompt, limit)

    def _chat_completion(self, body: dict) -> None:
        shown, whole = self._said(body, body["messages"])
        calls = [
            {"id": "call_1", "type": "function", "function": {"name": call["name"], "arguments": "{}"}, "index": 0}
            for call in self._tool_calls(body)
        ]
        reason = "tool_calls" if calls else "stop" if whole else "length"
        stamp = {"id": "chatcmpl-7", "created": 1, "model": body["model"]}
        usage = {"prompt_tokens": 3, "completion_tokens": len(shown), "total_tokens": 3 + len(shown)}
        if not body.get("stream"):
            message = {"role": "assistant", "content": "".join(shown)} | (
                {"content": "", "tool_calls": calls} if calls else {}
            )
            choice = {"index": 0, "message": message, "finish_reason": reason}
            self._answer({**stamp, "object": "chat.completion", "choices": [choice], "usage": usage})
            return
        deltas = [{"tool_calls": calls}] if calls else [{"role": "assistant", "content": word} for word in shown]
        chunks = [{"index": 0, "delta": delta, "finish_reason": None} for delta in deltas]
        chunks.append({"index": 0, "delta": {}, "finish_reason": reason})
        lines = [{**stamp, "object": "chat.completion.chunk", "choices": [chunk]} for chunk in chunks]
        if (body.get("stream_options") or {}).get("include_usage"):
            lines.append({**stamp, "object": "chat.completion.chunk", "choices": [], "usage": usage})
        self._events(iter([*lines, "[DONE]"]))

    def _response(self, body: dict) -> None:
        given = body["input"]
        shown, whole = self._said(body, [{"role": "user", "content": given}] if isinstance(given, str) else given)
        part = {"type": "output_text", "text": "".join(shown), "annotations": []}
        item = {"id": "msg_1", "type": "message", "role": "assistant", "status": "completed", "content": [part]}
        response = {"id": "resp_1", "object": "response", "created_at": 1, "model": body["model"], "output": []}
        response |= {"parallel_tool_calls": False, "tool_choice": "auto", "tools": [], "status": "in_progress"}
        done = response | {"status": "completed" if whole else "incomplete", "output": [item]}
        if not body.get("stream"):
            self._answer(done)
            return
        place = {"item_id": "msg_1", "output_index": 0, "content_index": 0}
        events = [
            {"type": "response.created", "response": response},
            {"type": "response.output_item.added", "output_index": 0, "item": item | {"content": []}},
            {"type": "response.content_part.added", **place, "part": part | {"text": ""}},
            *({"type": "response.output_text.delta", **place, "delta": word, "logprobs": []} for word in shown),
            {"type": "response.output_text.done", **place, "text": part["text"], "logprobs": []},
            {"type": "response.output_item.done", "output_index": 0, "item": item},
            {"type": "response.completed" if whole else "response.incomplete", "response": done},
        ]
        self._events(event | {"sequence_number": number} for number, event in enumerate(events))

    def _anthropic_message(self, body: dict) -> None:
        shown, whole = self._said(body, body["messages"])
        message = {"id": "msg_1", "type": "message", "role": "assistant", "model": body["model"], "content": []}
        usage, reason = {"input_tokens": 3, "output_tokens": len(shown)}, "end_turn" if whole else "max_tokens"
        if not body.get("stream"):
            text = [{"type": "text", "text": "".join(shown)}]
            self._answer(message | {"content": text, "stop_reason": reason, "usage": usage})
            return
        deltas = ({"type": "text_delta", "text": word} for word in shown)
        events = [
            {
                "type": "message_start",
                "message": message | {"stop_reason": None, "usage": usage | {"output_tokens": 0}},
            },
            {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}},
            *({"type": "content_block_delta", "index": 0, "delta": delta} for delta in deltas),
            {"type": "content_block_stop", "index": 0},
            {"type": "message_delta", "delta": {"stop_reason": reason}, "usage": usage},
            {"type": "message_stop"},
        ]
        self._events(iter(events))

    def _manifest(self, name: object) -> Manifest:
        manifest = self.ollama.manifests.get(_name(name))
        if manifest is None:
            raise _Refusal(404, f"model '{name}' not found")
        return manifest

    # ----------------------------------------------------------------------------------------------------------- wire

    def _body(self) -> dict:
        raw = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if not raw:
            raise _Refusal(400, "missing request body")
        try:
            return json.loads(raw)
        except ValueError as error:
            raise _Refusal(400, str(error)) from None

    def _answer(self, value: dict, status: int = 200) -> None:
        self._send(status, json.dumps(value).encode(), "application/json; charset=utf-8")

    def _send(self, status: int, data: bytes = b"", kind: str = "text/plain") -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _events(self, events: Iterator[dict | str]) -> None:
        """Server-sent events, named as the data says, which may be a text."""
        lines = []
        for event in events:
            kind = event.get("type") if isinstance(event, dict) else None
            data = json.dumps(event) if isinstance(event, dict) else event
            lines.append((f"event: {kind}\n" if kind else "") + f"data: {data}\n\n")
        self._stream(iter(lines), "text/event-stream")

    def _stream(self, lines: Iterator[dict | str], kind: str = "application/x-ndjson") -> None:
        """Lines in chunks; a fault strikes after the first line, when the status 200 is long sent."""
        fault = self.ollama.faults.pop(f"{self.command} {self.path}", None)
        self.send_response(200)
        self.send_header("Content-Type", "text/plain" if fault == "another type" else kind)
        if fault == "compressed":
            self.send_header("Content-Encoding", "gzip")
            packed = gzip.compress(b"".join(json.dumps(line).encode() + b"\n" for line in lines))
            self.send_header("Content-Length", str(len(packed)))
            self.end_headers()
            self.wfile.write(packed)
            return
        if fault == "short":  # it says that more comes than does
            self.send_header("Content-Length", "9999999")
            self.close_connection = True
        else:
            self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for line in lines:
            data = line.encode() if isinstance(line, str) else json.dumps(line).encode() + b"\n"
            if fault == "not json":
                data = b"{" + data
            if fault == "short":
                self.wfile.write(data)
                return
            self._chunk(data)
            if self.ollama.pace:
                self.ollama.released.wait(self.ollama.pace)
            if fault in ERROR_LINES:
                self._chunk(json.dumps({"error": ERROR_LINES[fault]}).encode() + b"\n")
            if fault == "reset in stream":
                self._reset()
                return
            if fault == "broken chunk":
                self.wfile.write(b"nonsense")
                self.close_connection = True
                return
            if fault == "cut" or fault in ERROR_LINES:
                break
            if fault == "hang in stream":
                self.close_connection = True
                self.ollama.released.wait(30)
                return
        self._chunk(b"")

    def _chunk(self, data: bytes) -> None:
        self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
        self.wfile.flush()

    def _reset(self) -> None:
        self.close_connection = True
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()

    def log_message(self, *_: object) -> None:
        """Say nothing."""


def _as_go_prints(value: object) -> str:
    """A parameter as /api/show writes it, by Go's %#v: JSON's numbers are floats there, 1.0 is `1`, 1048576 `1e+06`."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return json.dumps(value, ensure_ascii=False)
    exponent = math.floor(math.log10(abs(value))) if value else 0
    if not -4 <= exponent < 6:
        mantissa, _, power = f"{value:.15e}".partition("e")
        return f"{mantissa.rstrip('0').rstrip('.')}e{power}"
    return str(int(value)) if float(value).is_integer() else repr(value)


def _name(name: object) -> str:
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise _Refusal(400, "invalid model name")
    return name if ":" in name.rsplit("/", 1)[-1] else f"{name}:latest"


def _layer(kind: str, data: bytes) -> dict:
    return {
        "mediaType": f"application/vnd.ollama.image.{kind}",
        "digest": f"sha256:{hashlib.sha256(data).hexdigest()}",
        "size": len(data),
        "data": data,
    }


def real_host() -> str | None:
    """The address in OLLAMA_HOST, if an Ollama answers there: the tests that can then run against it as well."""
    from fine_tuning.integration.ollama_client import OllamaClient, OllamaError, ollama_host

    if not os.environ.get("OLLAMA_HOST"):
        return None
    with suppress(OllamaError), OllamaClient(ollama_host(""), timeout=2.0) as client:
        client.version()
        return client.host
    return None


@contextmanager
def silent_host() -> Iterator[str]:
    """An address where nothing listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{probe.getsockname()[1]}"
