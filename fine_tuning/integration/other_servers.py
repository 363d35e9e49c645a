"""Versions on other servers than Ollama: an adapter on vLLM, a GGUF on llama-server's router. Both speak OpenAI's API.

A version is `name:3` there and has to answer before it becomes `name:live`. The requests are those of vLLM's
documentation and source at commit 05863f1 and 00153c8, and of llama-server's README at commit 00dc805.
"""

import os
import time
from collections.abc import Callable, Mapping
from configparser import RawConfigParser
from contextlib import AbstractContextManager
from io import StringIO
from pathlib import Path
from types import TracebackType
from typing import Any

import httpx

from fine_tuning.common.errors import UserError
from fine_tuning.common.records import replacing
from fine_tuning.integration.ollama_client import MOST_BYTES, is_local, normalise_host

KEY = "WHETSTONE_SERVER_KEY"  # environment variable: what the server was given as --api-key
START_VLLM = "`VLLM_ALLOW_RUNTIME_LORA_UPDATING=True vllm serve models/base --enable-lora`"
QUESTION = {"messages": [{"role": "user", "content": "Hello!"}], "max_tokens": 24, "temperature": 0}
HEADER = "version = 1\n"
# Ollama's name of an option, llama-server's.
OPTIONS = {
    "num_ctx": "ctx-size", "temperature": "temp", "top_k": "top-k", "top_p": "top-p", "min_p": "min-p",
    "repeat_penalty": "repeat-penalty", "repeat_last_n": "repeat-last-n", "presence_penalty": "presence-penalty",
    "frequency_penalty": "frequency-penalty",
}  # fmt: skip


class Refused(UserError):
    """A request that the server answered with an error; `status` is HTTP's, `known` whether it knows the route."""

    def __init__(self, url: str, what: str, response: httpx.Response) -> None:
        try:
            error = response.json()["error"]
            reason = str(error["message"] if isinstance(error, dict) else error)
        except (ValueError, KeyError, TypeError):
            reason = ""
        self.status, self.known = response.status_code, bool(reason)
        said = " ".join(reason.split())[:300] or "no reason given"
        super().__init__(f"{url} refused {what} (HTTP {response.status_code}: {said}): correct that, then deploy again")


class OpenAIServer(AbstractContextManager["OpenAIServer"]):
    """A server with OpenAI's API.

    Args:
        url: its address, with or without /v1.
        port: the one that it listens at by itself.
        start: the command that starts it as it is needed, for error messages.
        connect_seconds, answer_seconds: time-outs of connecting, and of loading and answering.

    Raises:
        UserError: the address is none, or holds a password.
    """

    def __init__(self, url: str, port: int, start: str, connect_seconds: float, answer_seconds: float) -> None:
        self.url = normalise_host(url, port, "--host").removesuffix("/v1")
        self.start, self._seconds = start, answer_seconds
        key, timeout = os.environ.get(KEY), httpx.Timeout(answer_seconds, connect=connect_seconds)
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._client = httpx.Client(headers=headers, timeout=timeout, trust_env=not is_local(self.url))

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._client.close()

    def request(self, method: str, path: str, what: str, body: Mapping[str, Any] | None = None) -> httpx.Response:
        """Send a request; `what` names it in errors. Raises Refused if the answer is an error, UserError if there is no
        answer, or it does not end."""
        end, content = time.monotonic() + self._seconds, bytearray()
        try:
            with self._client.stream(method, self.url + path, json=body) as answer:
                for chunk in answer.iter_bytes():
                    content += chunk
                    if len(content) > MOST_BYTES or time.monotonic() > end:
                        raise UserError(f"{self.url} does not end its answer: give the server's address with --host")
        except httpx.DecodingError:
            raise UserError(
                f"{self.url} answers in no form that can be read: give the server's address with --host"
            ) from None
        except httpx.HTTPError as error:
            raise UserError(
                f"{self.url} does not answer ({type(error).__name__}): start {self.start}, then deploy again"
            ) from None
        response = httpx.Response(answer.status_code, content=bytes(content))
        if response.is_error:
            raise Refused(self.url, what, response)
        return response

    def models(self, path: str = "/v1/models") -> dict[str, dict[str, Any]]:
        """What the server says of each of its models, by id."""
        try:
            return {entry["id"]: entry for entry in self.request("GET", path, "the list of models").json()["data"]}
        except (ValueError, KeyError, TypeError):
            raise UserError(
                f"{self.url} has not OpenAI's list of models: give the address of the server with --host"
            ) from None

    def prove(self, model: str) -> str:
        """The model's reply to one question. Raises UserError if it has none."""
        answer = self.request("POST", "/v1/chat/completions", f"a question to {model}", QUESTION | {"model": model})
        try:
            reply = str(answer.json()["choices"][0]["message"]["content"] or "")
        except (ValueError, KeyError, IndexError, TypeError):
            reply = ""
        if not reply.strip():
            raise UserError(f"{model} on {self.url} answers nothing: look at the server's log, then deploy again")
        return reply


def deploy_adapter(server: OpenAIServer, name: str, number: int, adapter: Path, say: Callable[[str], None]) -> None:
    """Load a version's adapter into vLLM, ask it, and make it `name:live`, which answers without a gap.

    Args:
        adapter: peft's folder; vLLM reads it under the same path.

    Raises:
        UserError: vLLM is not there, loads no adapters, or refuses this one; `name:live` is what it was.
    """
    model, live, folder = f"{name}:{number}", f"{name}:live", str(adapter.resolve())

    def load(named: str, known: Mapping[str, Any]) -> None:
        body = {"lora_name": named, "lora_path": folder} | ({"load_inplace": True} if named in known else {})
        try:
            server.request("POST", "/v1/load_lora_adapter", f"the adapter {named}", body)
        except Refused as error:
            if error.status in (404, 405) and not error.known:
                raise UserError(f"{server.url} loads no adapters: start {server.start}, then deploy again") from None
            raise

    loaded = server.models()
    say(f"1/4 {server.url} answers")
    if loaded.get(model, {}).get("root") == folder:
        say(f"2/4 {model} is loaded")
    else:
        load(model, loaded)
        say(f"2/4 {model} was loaded from {folder}")
    server.prove(model)
    say(f"3/4 {model} answers")
    load(live, loaded)
    if server.models().get(live, {}).get("root") != folder:
        raise UserError(f"{server.url} does not list {live} with {folder}: look at its log, then deploy again")
    say(f"4/4 {live} is version {number}")


def deploy_gguf(
    server: OpenAIServer, name: str, number: int, gguf: Path, options: Mapping[str, Any], presets: Path,
    say: Callable[[str], None],
) -> None:  # fmt: skip
    """Write a version into the presets of llama-server's router, ask it, and make it `name:live`.

    Args:
        options: Ollama's, of which llama-server gets those that it has.
        presets: the file that llama-server was started with.

    Raises:
        UserError: llama-server is not there, does not read this file, or the version does not answer; `name:live` is
            what it was where `name:number` does not answer.
    """
    model, live = f"{name}:{number}", f"{name}:live"
    values = {"model": str(gguf.resolve()), "jinja": "true"}
    values |= {known: f"{options[own]:g}" for own, known in OPTIONS.items() if own in options}

    for step, named in enumerate((model, live), 1):
        _write_preset(presets, named, values)
        if named not in server.models("/models?reload=1"):
            raise UserError(f"{server.url} does not read {presets}: start {server.start} without -m, then deploy again")
        server.prove(named)
        say(f"{step}/2 {named} is version {number} in {presets}, and answers at {server.url}")


def _write_preset(path: Path, name: str, values: Mapping[str, str]) -> None:
    """Put a section into a file of presets; the others stay."""
    parser = RawConfigParser(delimiters=("=",))
    parser.optionxform = str  # type: ignore[assignment,method-assign]
    if path.is_file():
        parser.read_string(path.read_text().removeprefix(HEADER), str(path))
    parser[name] = dict(values)
    text = StringIO()
    parser.write(text)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        file.write((HEADER + "\n" + text.getvalue()).encode())
