"""An Ollama server over HTTP: every call has a deadline and a size limit, every failure is one clear line.

The `ollama` package waits without end, raises other exceptions when it streams, and takes a stream that stops half
way for a complete answer; this client does none of that. A time-out of HTTP libraries is one of a single read: a server
that sends a byte now and then would block them for ever.
"""

import ipaddress
import json
import os
import re
import socket
import threading
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

import httpx

from fine_tuning.common.errors import UserError
from fine_tuning.common.names import host_key
from fine_tuning.model_management.model_deployer import DeploySettings

DEFAULT_PORT = 11434
CHUNK_BYTES = 1 << 20
REASON_CHARACTERS = 300
MOST_BYTES = 32 << 20  # of an answer: some 200,000 tokens of a streamed reply
STREAM_FACTOR = 24  # a whole stream may last so many times the longest wait for one of its lines
SLOWEST_UPLOAD = 64 << 10  # bytes a second
MODEL_NAME = re.compile(r"[\w.:/@-]{1,512}", re.ASCII)

Progress = Callable[[int, int], None]


class OllamaError(UserError):
    """The server refused or failed, did not answer in time, or was lost."""


class OllamaUnreachable(OllamaError):
    """Nothing listens at the address, or nothing that lets itself be connected with."""


@dataclass(frozen=True)
class ChatStats:
    """What the last line of a reply says; None where the server is silent."""

    done_reason: str | None
    prompt_tokens: int | None
    reply_tokens: int | None


def ollama_host(host: str) -> str:
    """The address to talk to: OLLAMA_HOST if set, otherwise `host`, in the form http://name:port. Raises UserError if
    it is not an address."""
    return normalise_host(os.environ.get("OLLAMA_HOST") or host)


def normalise_host(host: str, port: int = DEFAULT_PORT, given: str | None = None) -> str:
    """Accept what Ollama accepts: `name`, `name:port`, `http://name:port`; 0.0.0.0 is where a server listens, not
    where one calls, and becomes the loopback address.

    Args:
        port: the one that is meant where `host` names none and is not https.
        given: where the address was given, for the error; None: as Ollama's in params.yaml or the environment.

    Raises:
        UserError: it is no such address, or it holds a password. The message does not show it.
    """
    text = host.strip()
    if "://" not in text:
        text = f"http://{text}"
    try:
        parts = urlsplit(text)
        name, named, more = parts.hostname, parts.port, parts.username or parts.query or parts.fragment
    except ValueError:
        name = named = more = None
    if not name or more or " " in text or parts.scheme not in ("http", "https"):
        what, where = ("address", given) if given else ("Ollama address", "deploy.host or OLLAMA_HOST")
        raise UserError(f"the {what} is not of the form http://name:port: correct {where}")
    if name in ("0.0.0.0", "::"):
        name = "127.0.0.1"
    if named is None:
        named = 443 if parts.scheme == "https" else port
    shown = f"[{name}]" if ":" in name else name
    return f"{parts.scheme}://{shown}:{named}{parts.path.rstrip('/')}"


class _Deadline:
    """Shuts the connection of one request down when its time is over."""

    def __init__(self) -> None:
        self.over = False
        self._socket: socket.socket | None = None
        self._timer: threading.Timer | None = None

    def start(self, seconds: float) -> None:
        """Let it be over so many seconds from now."""
        self.stop()
        self._timer = threading.Timer(seconds, self._end)
        self._timer.daemon = True
        self._timer.start()

    def stop(self) -> None:
        """Let it never be over."""
        if self._timer is not None:
            self._timer.cancel()

    def trace(self, event: str, info: dict) -> None:
        """Called by httpcore (extension `trace`) at every step: learns the socket."""
        if event in ("connection.connect_tcp.complete", "connection.start_tls.complete"):
            self._socket = info["return_value"].get_extra_info("socket")

    def _end(self) -> None:
        self.over = True
        with suppress(OSError):
            if self._socket is not None:
                self._socket.shutdown(socket.SHUT_RDWR)


class OllamaClient(AbstractContextManager["OllamaClient"]):
    """One server.

    Args:
        host: address in any form that `normalise_host` takes.
        timeout: seconds for connecting, and for the whole of a short answer.
        stream_timeout: longest wait, in seconds, for a line of a creation or a reply (loading a model is silent); the
            whole may last STREAM_FACTOR times as long.
    """

    def __init__(self, host: str, *, timeout: float = 10.0, stream_timeout: float = 300.0) -> None:
        self.host = normalise_host(host)
        self._short, self._long = timeout, stream_timeout
        # A proxy for the outside world must not be asked for a server on this machine.
        self._http = httpx.Client(
            base_url=self.host,
            trust_env=not is_local(self.host),
            # What is compressed can be any size. Ollama compresses nothing; a proxy in front is asked not to.
            headers={"Accept-Encoding": "identity"},
            # Loading certificates takes a tenth of a second; plain HTTP needs none.
            verify=self.host.startswith("https:"),
            # A kept connection that the server has just closed looks like a server that went down.
            limits=httpx.Limits(max_keepalive_connections=0),
        )

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._http.close()

    # ------------------------------------------------------------------------------------------------------ questions

    def version(self) -> str:
        """Version of the server, e.g. "0.34.1"."""
        return _one_line(self._json("GET", "/api/version").get("version", "unknown"))

    def digests(self) -> dict[str, str]:
        """Manifest digest (64 hex characters) by full name: `whetstone:live`, never `whetstone`; without odd names."""
        models = self._json("GET", "/api/tags").get("models")
        entries = [entry for entry in models if isinstance(entry, dict)] if isinstance(models, list) else []
        return {
            full_name(str(entry.get("name"))): str(entry.get("digest", "")).removeprefix("sha256:")
            for entry in entries
            if MODEL_NAME.fullmatch(str(entry.get("name")))
        }

    def show(self, model: str) -> dict:
        return self._json("POST", "/api/show", {"model": model})

    # ---------------------------------------------------------------------------------------------------------- blobs

    def has_blob(self, sha256: str) -> bool:
        """Whether the server holds the file with this hex SHA-256."""
        return self._request("HEAD", f"/api/blobs/sha256:{sha256}", accepted=(200, 404)).status_code == 200

    def upload_blob(self, path: Path, sha256: str, progress: Progress | None = None) -> bool:
        """Send a file unless the server has it. Returns whether it was sent; `progress` gets (bytes sent, all bytes).
        Raises OllamaError if the server refused it, or the connection was lost."""
        if self.has_blob(sha256):
            return False
        size = path.stat().st_size
        self._request(
            "POST",
            f"/api/blobs/sha256:{sha256}",
            content=_read_chunks(path, progress),
            headers={"Content-Length": str(size), "Content-Type": "application/octet-stream"},
            wait=self._long,
            more=size / SLOWEST_UPLOAD,
            accepted=(200, 201),
        )
        return True

    # --------------------------------------------------------------------------------------------------------- models

    def create(self, model: str, request: dict) -> None:
        """Create `model` from the fields of /api/create. Raises OllamaError if it is refused, fails after HTTP 200, or
        the stream ends without `success`."""
        *_, last = [{}, *self._stream("/api/create", {**request, "model": model, "stream": True})]
        if last.get("status") != "success":
            raise OllamaError(
                f"{self.host} stopped before {model} was made (its log says why, is its disk full?): deploy again"
            )

    def copy(self, source: str, destination: str) -> None:
        self._request("POST", "/api/copy", json={"source": source, "destination": destination})

    def delete(self, model: str) -> bool:
        """Remove a name. Returns whether it was there."""
        return self._request("DELETE", "/api/delete", accepted=(200, 404), json={"model": model}).status_code == 200

    # ----------------------------------------------------------------------------------------------------------- chat

    def render(self, model: str, messages: list[dict]) -> str | None:
        """The prompt that the server would give to the model; None where it does not offer to show it."""
        request = {"model": model, "messages": messages, "stream": False, "options": {"num_predict": 1}}
        debug = self._json("POST", "/api/chat", request | {"_debug_render_only": True}, self._long).get("_debug_info")
        rendered = debug.get("rendered_template") if isinstance(debug, dict) else None
        return rendered if isinstance(rendered, str) else None

    def chat_stream(
        self, model: str, messages: list[dict], options: dict[str, Any] | None = None
    ) -> Generator[str, None, None]:
        """The pieces of a reply of `model` as they arrive. Closing the generator makes the server stop.

        Args:
            messages: [{"role", "content"}]; other keys are left out.
            options: sampling options of Ollama (temperature, seed, num_predict, num_ctx); None: the model's own.

        Raises:
            OllamaError: an error line, a lost connection, a reply that stops half way.
        """
        yield from (piece for piece, _ in self._chat_lines(model, messages, options) if piece)

    def chat(self, model: str, messages: list[dict], options: dict[str, Any] | None = None) -> tuple[str, ChatStats]:
        """The whole reply and its statistics."""
        pieces, lines = zip(*self._chat_lines(model, messages, options), strict=True)
        return "".join(pieces), _stats(lines[-1])

    def unload_from_gpu(self) -> list[str]:
        """Take every model that is loaded into a GPU's memory out of it; their names."""
        loaded = self._json("GET", "/api/ps").get("models") or []
        names = [model["name"] for model in loaded if model.get("size_vram")]
        for name in names:
            self._json("POST", "/api/generate", {"model": name, "keep_alive": 0, "stream": False})
        return names

    def _chat_lines(
        self, model: str, messages: list[dict], options: dict[str, Any] | None
    ) -> Iterator[tuple[str, dict]]:
        """(piece of the reply, line that brought it), the last line included."""
        request = {
            "model": model,
            "messages": [{"role": message["role"], "content": message["content"]} for message in messages],
            "stream": True,
            **({"options": options} if options else {}),
        }
        for line in self._stream("/api/chat", request):
            message, done = line.get("message", {}), line.get("done", False)
            if not isinstance(message, dict) or not isinstance(message.get("content", ""), str) or done not in (0, 1):
                raise OllamaError(f"{self.host}/api/chat sent a line that is not Ollama's: is it one?")
            yield message.get("content", ""), line
            if done:
                return
        raise OllamaError(f"{self.host} broke off its reply as {model}: ask again, its log says why")

    # ----------------------------------------------------------------------------------------------------------- wire

    def _json(self, method: str, path: str, body: dict | None = None, wait: float | None = None) -> dict:
        if (value := _parse(self._request(method, path, wait, json=body).content)) is None:
            raise OllamaError(f"{self.host}{path} does not answer like an Ollama: check deploy.host and OLLAMA_HOST")
        return value

    @contextmanager
    def _answer(
        self, method: str, path: str, wait: float, more: float = 0.0, **content: Any
    ) -> Iterator[tuple[httpx.Response, _Deadline]]:
        """An answer whose body is still to be read, and the deadline of the whole: `wait` and `more` seconds from now.
        Nothing may be silent for longer than `wait`."""
        deadline = _Deadline()
        deadline.start(wait + more)
        timeout, extensions = httpx.Timeout(wait, connect=self._short), {"trace": deadline.trace}
        stream = self._http.stream(method, quote(path, safe="/:"), timeout=timeout, extensions=extensions, **content)
        try:
            with stream as response:
                if response.headers.get("content-encoding", "identity") != "identity":
                    raise OllamaError(f"{self.host}{path} answers compressed, unasked: is it an Ollama?")
                yield response, deadline
        except httpx.HTTPError as error:
            raise self._lost(error, path, deadline) from None
        finally:
            deadline.stop()

    def _request(
        self, method: str, path: str, wait: float | None = None, accepted: tuple[int, ...] = (200,), **content: Any
    ) -> httpx.Response:
        """A whole answer with one of the `accepted` statuses."""
        with self._answer(method, path, wait or self._short, **content) as (response, deadline):
            answer = self._whole(response, path, deadline)
        if answer.status_code not in accepted:
            raise self._refusal(answer, f"{method} {path.partition('/sha256:')[0]}")
        return answer

    def _whole(self, response: httpx.Response, path: str, deadline: _Deadline) -> httpx.Response:
        return httpx.Response(response.status_code, content=b"".join(self._body(response, path, deadline)))

    def _body(self, response: httpx.Response, path: str, deadline: _Deadline) -> Iterator[bytes]:
        for chunk in response.iter_raw():
            if response.num_bytes_downloaded > MOST_BYTES:
                raise OllamaError(f"{self.host}{path} answers with more than {MOST_BYTES >> 20} MiB: is it an Ollama?")
            yield chunk
        if deadline.over:  # a body without a length ends where the connection does
            raise httpx.ReadTimeout("")

    def _stream(self, path: str, body: dict) -> Iterator[dict]:
        """Lines of an NDJSON answer. An `error` line is raised whatever the status was: it may be 200 by then."""
        end = time.monotonic() + STREAM_FACTOR * self._long
        with self._answer("POST", path, self._long, json=body) as (response, deadline):
            if response.status_code != 200:
                raise self._refusal(self._whole(response, path, deadline), f"POST {path}")
            for raw in _newline_separated(self._body(response, path, deadline)):
                line = _parse(raw)
                if line is None:
                    raise OllamaError(f"{self.host}{path} sent a line that is not JSON: is it an Ollama?")
                if line.get("error"):
                    raise self._failure(_one_line(line["error"]), f"POST {path}", f"{self.host} failed")
                deadline.start(min(self._long, end - time.monotonic()))
                yield line

    def _lost(self, error: httpx.HTTPError, path: str, deadline: _Deadline) -> OllamaError:
        if isinstance(error, (httpx.ConnectError, httpx.ConnectTimeout)):
            return OllamaUnreachable(f"no Ollama answers at {self.host}: start it (`ollama serve`), or set deploy.host")
        if deadline.over or isinstance(error, httpx.TimeoutException):
            return OllamaError(
                f"{self.host} took too long at {path}: look at its log, or raise deploy.timeout and "
                "deploy.stream_timeout in params.yaml"
            )
        return OllamaError(f"the connection to {self.host} was lost at {path}: look at its log, then run again")

    def _refusal(self, response: httpx.Response, what: str) -> OllamaError:
        body = _parse(response.content)
        reason = _one_line(body["error"]) if body and body.get("error") else response.reason_phrase
        if response.status_code == 404 and body and "model" in reason:
            return OllamaError(f"{self.host}: {reason}: `python -m fine_tuning deploy`")
        if response.status_code == 507:
            reason = f"no space left: {reason}"
        return self._failure(reason, what, f"{self.host} answered {response.status_code} to {what}")

    def _failure(self, reason: str, what: str, otherwise: str) -> OllamaError:
        if "no space left" in reason.lower():
            return OllamaError(f"the disk of {self.host} is full ({what}): make room there, then run again")
        return OllamaError(f"{otherwise}: {reason}")


def full_name(model: str) -> str:
    """A model name with its tag: `whetstone` is `whetstone:latest`."""
    return model if ":" in model.rsplit("/", 1)[-1] else f"{model}:latest"


def is_local(host: str) -> bool:
    return is_loopback(urlsplit(host).hostname or "")


def is_loopback(name: str) -> bool:
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return name == "localhost" or name.endswith(".localhost")


def _read_chunks(path: Path, progress: Progress | None) -> Iterator[bytes]:
    size, sent = path.stat().st_size, 0
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            yield chunk
            sent += len(chunk)
            if progress:
                progress(sent, size)


def _newline_separated(chunks: Iterator[bytes]) -> Iterator[bytes]:
    """Lines that end with a newline, and a last one that may not: U+2028 ends no line, so no text mode here."""
    rest = bytearray()
    for chunk in chunks:
        rest += chunk
        if b"\n" in chunk:
            *lines, rest = rest.split(b"\n")
            yield from (bytes(line) for line in lines if line.strip())
    if rest.strip():
        yield bytes(rest)


def _parse(raw: bytes) -> dict | None:
    """A JSON object in UTF-8 (RFC 8259): no NaN, no half of a surrogate pair, and no deeper than Python can read."""
    try:
        value = json.loads(raw.decode("utf-8"), parse_constant=int)
        if b"\\u" in raw:
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _one_line(reason: object) -> str:
    """What a server says, for a terminal: nothing that moves its cursor or changes its title."""
    text = "".join(character if character.isprintable() else " " for character in str(reason))
    return " ".join(text.split())[:REASON_CHARACTERS]


def _stats(line: dict) -> ChatStats:
    def count(key: str) -> int | None:
        value = line.get(key)
        return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 63 else None

    reason = line.get("done_reason")
    reason = reason if isinstance(reason, str) else None
    return ChatStats(reason, prompt_tokens=count("prompt_eval_count"), reply_tokens=count("eval_count"))


@contextmanager
def open_servers(settings: DeploySettings, given: list[str] | None) -> Iterator[list[OllamaClient]]:
    """The servers that a command acts on: those `given` with --host, else those of params.yaml; each once, even where
    it has two names."""
    hosts = [normalise_host(host) for host in given or [ollama_host(settings.host), *settings.more_hosts]]
    first = {host_key(host): host for host in reversed(hosts)}
    seconds = {"timeout": settings.timeout, "stream_timeout": settings.stream_timeout}
    with ExitStack() as stack:
        names = dict.fromkeys(first[host_key(host)] for host in hosts)
        yield [stack.enter_context(OllamaClient(host, **seconds)) for host in names]
