"""An Ollama server over HTTP: every call has a time-out, every failure is one clear line.

The `ollama` package waits without end, raises other exceptions when it streams, and takes a stream that stops half
way for a complete answer; this client does none of that.
"""

import ipaddress
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

import httpx

from fine_tuning.errors import UserError

DEFAULT_PORT = 11434
CHUNK_BYTES = 1 << 20
REASON_CHARACTERS = 300

Progress = Callable[[int, int], None]


class OllamaError(UserError):
    """The server answered, and the answer was a refusal or a failure."""


class OllamaUnavailable(OllamaError):
    """Nothing answers at the address, or not in time."""


class OllamaNotFound(OllamaError):
    """The server has no model of that name."""


@dataclass(frozen=True)
class ChatStats:
    """What the last line of a reply says. Counts are tokens, durations seconds; None where the server is silent."""

    done_reason: str | None
    prompt_tokens: int | None
    reply_tokens: int | None
    total_seconds: float | None
    load_seconds: float | None

    @property
    def tokens_per_second(self) -> float | None:
        """Reply tokens a second, loading left out."""
        if not self.reply_tokens or not self.total_seconds:
            return None
        return self.reply_tokens / max(self.total_seconds - (self.load_seconds or 0.0), 1e-9)


class ChatStream:
    """The pieces of one reply as they arrive. After the last one `stats` is set and `text` is the whole reply."""

    def __init__(self, lines: Iterator[dict]) -> None:
        self._lines = lines
        self._pieces: list[str] = []
        self.stats: ChatStats | None = None

    def __iter__(self) -> Iterator[str]:
        for line in self._lines:
            piece = (line.get("message") or {}).get("content") or ""
            if piece:
                self._pieces.append(piece)
                yield piece
            if line.get("done"):
                self.stats = _stats(line)

    @property
    def text(self) -> str:
        """What has arrived so far."""
        return "".join(self._pieces)

    def close(self) -> None:
        """Stop listening; the server stops generating."""
        close = getattr(self._lines, "close", None)
        if close:
            close()


def ollama_host(host: str) -> str:
    """The address to talk to: OLLAMA_HOST if set, otherwise `host`, in the form http://name:port.

    Raises:
        UserError: it is not an address.
    """
    return normalise_host(os.environ.get("OLLAMA_HOST") or host)


def normalise_host(host: str) -> str:
    """Accept what Ollama accepts: `name`, `name:port`, `http://name:port`; 0.0.0.0 is where a server listens, not
    where one calls, and becomes the loopback address."""
    text = host.strip()
    if "://" not in text:
        text = f"http://{text}"
    try:
        parts = urlsplit(text)
        name, port = parts.hostname, parts.port
    except ValueError:
        name, port = None, None
    if not name or parts.scheme not in ("http", "https") or parts.username or parts.query or parts.fragment:
        raise UserError("the Ollama address is not of the form http://name:port: mend deploy.host or OLLAMA_HOST")
    if name in ("0.0.0.0", "::"):
        name = "127.0.0.1"
    if port is None:
        port = 443 if parts.scheme == "https" else DEFAULT_PORT
    shown = f"[{name}]" if ":" in name else name
    return f"{parts.scheme}://{shown}:{port}{parts.path.rstrip('/')}"


class OllamaClient:
    """One server.

    Args:
        host: address in any form that `normalise_host` takes.
        timeout: seconds for connecting and for a short answer.
        stream_timeout: longest silence, in seconds, in an upload, a creation or a reply (loading a model is silent).
    """

    def __init__(self, host: str, *, timeout: float = 10.0, stream_timeout: float = 300.0) -> None:
        self.host = normalise_host(host)
        self._short = httpx.Timeout(timeout)
        self._long = httpx.Timeout(timeout, read=stream_timeout, write=stream_timeout)
        # A proxy for the outside world must not be asked for a server on this machine.
        self._http = httpx.Client(
            base_url=self.host,
            trust_env=not _is_local(self.host),
            # Loading certificates takes a tenth of a second; plain HTTP needs none.
            verify=self.host.startswith("https:"),
            # A kept connection that the server has just closed looks like a server that went down.
            limits=httpx.Limits(max_keepalive_connections=0),
        )

    def __enter__(self) -> "OllamaClient":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    # ------------------------------------------------------------------------------------------------------ questions

    def version(self) -> str:
        """Version of the server, e.g. "0.34.1"."""
        return str(self._json("GET", "/api/version").get("version", "unknown"))

    def models(self) -> list[dict]:
        """Entries of /api/tags: name, digest, size, modified_at, details."""
        models = self._json("GET", "/api/tags").get("models")
        return [entry for entry in models or [] if isinstance(entry, dict)]

    def digests(self) -> dict[str, str]:
        """Manifest digest (64 hex characters) by full name: `whetstone:live`, never `whetstone`."""
        return {
            full_name(str(entry.get("name"))): str(entry.get("digest", "")).removeprefix("sha256:")
            for entry in self.models()
        }

    def show(self, model: str) -> dict:
        """Template, parameters, details and model_info of a model."""
        return self._json("POST", "/api/show", {"model": model})

    # ---------------------------------------------------------------------------------------------------------- blobs

    def has_blob(self, sha256: str) -> bool:
        """Whether the server holds the file with this hex SHA-256."""
        response = self._request("HEAD", f"/api/blobs/sha256:{sha256}")
        if response.status_code in (200, 404):
            return response.status_code == 200
        raise self._refusal(response, "HEAD /api/blobs")

    def upload_blob(self, path: Path, sha256: str, progress: Progress | None = None) -> bool:
        """Send a file unless the server has it. Returns whether it was sent; `progress` gets (bytes sent, all bytes).

        Raises:
            OllamaError: the server refused it, or the connection was lost.
        """
        if self.has_blob(sha256):
            return False
        size = path.stat().st_size
        response = self._request(
            "POST",
            f"/api/blobs/sha256:{sha256}",
            content=_read_chunks(path, progress),
            headers={"Content-Length": str(size), "Content-Type": "application/octet-stream"},
            timeout=self._long,
        )
        if response.status_code not in (200, 201):
            raise self._refusal(response, "POST /api/blobs")
        return True

    # --------------------------------------------------------------------------------------------------------- models

    def create(self, model: str, request: dict, progress: Callable[[str], None] | None = None) -> None:
        """Create `model` from the fields of /api/create; `progress` gets each status line.

        Raises:
            OllamaError: refused, failed after HTTP 200, or the stream ended without `success`.
        """
        status = None
        for line in self._stream("/api/create", {**request, "model": model, "stream": True}):
            status = line.get("status")
            if status and progress:
                progress(str(status))
        if status != "success":
            raise OllamaError(
                f"{self.host} stopped before {model} was made (its log says why, is its disk full?): deploy again"
            )

    def copy(self, source: str, destination: str) -> None:
        """Make `destination` another name of `source`'s manifest."""
        response = self._request("POST", "/api/copy", json={"source": source, "destination": destination})
        if response.status_code != 200:
            raise self._refusal(response, "POST /api/copy")

    def delete(self, model: str) -> bool:
        """Remove a name. Returns whether it was there."""
        response = self._request("DELETE", "/api/delete", json={"model": model})
        if response.status_code in (200, 404):
            return response.status_code == 200
        raise self._refusal(response, "DELETE /api/delete")

    # ----------------------------------------------------------------------------------------------------------- chat

    def render(self, model: str, messages: list[dict]) -> str | None:
        """The prompt that the server would give to the model; None where it does not offer to show it."""
        request = {
            "model": model,
            "messages": messages,
            "stream": False,
            "options": {"num_predict": 1},
            "_debug_render_only": True,
        }
        debug = self._json("POST", "/api/chat", request, timeout=self._long).get("_debug_info")
        rendered = debug.get("rendered_template") if isinstance(debug, dict) else None
        return rendered if isinstance(rendered, str) else None

    def chat_stream(self, model: str, messages: list[dict], options: dict[str, Any] | None = None) -> ChatStream:
        """Ask `model`; iterate over the result for the pieces of its reply.

        Args:
            messages: [{"role", "content"}]; other keys are left out.
            options: sampling options of Ollama (temperature, seed, num_predict, num_ctx); None: the model's own.

        Raises:
            OllamaError: from the iteration too: an error line, a lost connection, a reply that stops half way.
        """
        request = {
            "model": model,
            "messages": [{"role": message["role"], "content": message["content"]} for message in messages],
            "stream": True,
            **({"options": options} if options else {}),
        }
        return ChatStream(self._chat_lines(model, request))

    def chat(self, model: str, messages: list[dict], options: dict[str, Any] | None = None) -> tuple[str, ChatStats]:
        """The whole reply and its statistics."""
        stream = self.chat_stream(model, messages, options)
        for _ in stream:
            pass
        assert stream.stats is not None
        return stream.text, stream.stats

    def _chat_lines(self, model: str, request: dict) -> Iterator[dict]:
        for line in self._stream("/api/chat", request):
            yield line
            if line.get("done"):
                return
        raise OllamaError(f"{self.host} broke off its reply as {model}: ask again, its log says why")

    # ----------------------------------------------------------------------------------------------------------- wire

    def _json(self, method: str, path: str, body: dict | None = None, timeout: httpx.Timeout | None = None) -> dict:
        response = self._request(method, path, json=body, timeout=timeout)
        if response.status_code != 200:
            raise self._refusal(response, f"{method} {path}")
        try:
            value = response.json()
        except ValueError:
            value = None
        if not isinstance(value, dict):
            raise OllamaError(f"{self.host}{path} does not answer like an Ollama: check deploy.host and OLLAMA_HOST")
        return value

    def _request(self, method: str, path: str, timeout: httpx.Timeout | None = None, **content: Any) -> httpx.Response:
        try:
            return self._http.request(method, quote(path, safe="/:"), timeout=timeout or self._short, **content)
        except httpx.HTTPError as error:
            raise self._lost(error, path) from None

    def _stream(self, path: str, body: dict) -> Iterator[dict]:
        """Lines of an NDJSON answer. An `error` line is raised whatever the status was: it may be 200 by then."""
        try:
            with self._http.stream("POST", path, json=body, timeout=self._long) as response:
                if response.status_code != 200:
                    response.read()
                    raise self._refusal(response, f"POST {path}")
                for raw in _newline_separated(response.iter_bytes()):
                    line = _parse(raw)
                    if line is None:
                        raise OllamaError(f"{self.host}{path} sent a line that is not JSON: is it an Ollama?")
                    if line.get("error"):
                        raise self._failure(_one_line(line["error"]), f"POST {path}", f"{self.host} failed")
                    yield line
        except httpx.HTTPError as error:
            raise self._lost(error, path) from None

    def _lost(self, error: httpx.HTTPError, path: str) -> OllamaError:
        if isinstance(error, (httpx.ConnectError, httpx.ConnectTimeout)):
            return OllamaUnavailable(f"no Ollama answers at {self.host}: start it (`ollama serve`), or set deploy.host")
        if isinstance(error, httpx.TimeoutException):
            return OllamaUnavailable(
                f"{self.host} was silent for too long at {path}: look at its log, or raise deploy.stream_timeout"
            )
        return OllamaUnavailable(f"the connection to {self.host} was lost at {path}: look at its log, then run again")

    def _refusal(self, response: httpx.Response, what: str) -> OllamaError:
        body = _parse(response.content)
        reason = _one_line(body["error"]) if body and body.get("error") else response.reason_phrase
        if response.status_code == 404 and body and "model" in reason:
            return OllamaNotFound(f"{self.host}: {reason}: `python -m fine_tuning deploy`")
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


def _is_local(host: str) -> bool:
    name = urlsplit(host).hostname or ""
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
    rest = b""
    for chunk in chunks:
        *lines, rest = (rest + chunk).split(b"\n")
        yield from (line for line in lines if line.strip())
    if rest.strip():
        yield rest


def _parse(raw: bytes) -> dict | None:
    try:
        value = json.loads(raw)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def _one_line(reason: object) -> str:
    return " ".join(str(reason).split())[:REASON_CHARACTERS]


def _stats(line: dict) -> ChatStats:
    def count(key: str) -> int | None:
        return line[key] if isinstance(line.get(key), int) else None

    def seconds(key: str) -> float | None:
        return line[key] / 1e9 if isinstance(line.get(key), (int, float)) else None

    return ChatStats(
        done_reason=line.get("done_reason"),
        prompt_tokens=count("prompt_eval_count"),
        reply_tokens=count("eval_count"),
        total_seconds=seconds("total_duration"),
        load_seconds=seconds("load_duration"),
    )
