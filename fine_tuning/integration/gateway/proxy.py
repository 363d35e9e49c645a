"""The ASGI application of the gateway: bytes go through as they come, and what clients and models say is recorded.

What can go wrong has one outcome each. Before the model's server has answered: 502 where it cannot be reached or breaks
off, 504 where it is silent. After that the connection to the client is cut, so that no client takes half a reply for a
whole one, and the exchange is logged as incomplete: `failed`, or `stopped` where the client left, for whom the model
stops.
"""

import asyncio
import hmac
import posixpath
import re
import time
from collections.abc import AsyncIterator, Collection, Mapping
from contextlib import aclosing, asynccontextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from typing import Any
from urllib.parse import urlsplit

import httpx
import orjson
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fine_tuning.integration.chat_models import ChatModel, served_models
from fine_tuning.integration.gateway.recorder import Headers, Outcome, Recorder, Ticket
from fine_tuning.integration.gateway.wire_formats import READERS, Asked, ReplyReader, with_context
from fine_tuning.integration.ollama_client import OllamaClient, full_name, is_local
from fine_tuning.integration.request_guard import is_own
from fine_tuning.integration.served_examples import ServedExamples, has_kinds, kind_served, served_examples, sources

MOST_BYTES = 64 << 20  # of a request, images included
MOST_WAITING = 1 << 18  # bytes of an answer that wait for a slow client
SENT_WITHIN = 0.001  # seconds that a request takes from here to the server
KEPT_ADDRESSES = 256  # of the server's routes
KEPT_CONNECTIONS = 64  # connecting is the largest part of what a request would wait for in here
VERSIONS_SECONDS = 10.0  # how long the version that a model's name stands for is believed
OF_ONE_CONNECTION = {
    *(b"connection", b"keep-alive", b"proxy-connection", b"te", b"trailer", b"transfer-encoding", b"upgrade", b"host")
}
OWN = ("/health", "/v1/feedback", "/v1/recording")
CHANGES = re.compile(r"/api/(create|delete|push|pull|copy|blobs)(/|$)")
TOKEN_HEADERS = (b"x-whetstone-token", b"authorization", b"x-api-key")


@dataclass(frozen=True)
class Upstream:
    """The model's server.

    Args:
        url: its address, without a path such as /v1.
        connect_seconds, silent_seconds: how long connecting may take, and a server be silent.
        key: sent as a bearer token instead of what the client sends.
        name: the deployed model's name; its replies are logged under the version that the name stands for.
        model: what is logged of the model whatever the server calls it: `model`, `version`, `engine`.
        choices: models that are one engine with another adapter each, by the name that a request gives; where there are
            any, other requests than chats are refused.
    """

    url: str
    connect_seconds: float
    silent_seconds: float
    key: str | None = None
    name: str | None = None
    model: dict[str, Any] = field(default_factory=dict)
    choices: Mapping[str, ChatModel] = field(default_factory=dict)


@dataclass(frozen=True)
class Serving:
    """What stands before a question that clients do not send: see `served_examples`.

    Args:
        context: tokens of prompt and reply together.
        reply_tokens: how long a reply may become where the client does not say.
    """

    examples: ServedExamples | None = None
    system_prompt: str | None = None
    reply_tokens: int = 512
    context: int = 2048


class Gateway:
    """The ASGI application: lets in what is sent to an allowed host, by no foreign page, with the token if one is set.

    Args:
        own: answers the routes in OWN; `proxy` the others.
        names: the hosts that it is asked for, see `request_guard.is_own`; `port`, where it listens.
    """

    def __init__(self, own: ASGIApp, proxy: ASGIApp, names: Collection[str], port: int, token: str | None) -> None:
        self.own, self.proxy, self.names, self.port, self.token = own, proxy, names, port, token

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Refuse, or pass on without the token."""
        if scope["type"] == "http":
            if not is_own(scope, self.names, self.port):
                why = "this host or web page is not allowed: add the name to gateway.allowed_hosts in params.yaml"
                await refusal(scope, 403, why)(scope, receive, send)
                return
            if self.token is not None:
                given = [(name, value) for name, value in scope["headers"] if name in TOKEN_HEADERS]
                valid = [name for name, value in given if self._is_token(value)]
                if not valid:
                    await refusal(scope, 401, "send the token as Authorization: Bearer")(scope, receive, send)
                    return
                scope = {**scope, "headers": [header for header in scope["headers"] if header[0] not in valid]}
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
            return
        app = self.own if scope["type"] == "lifespan" or scope["path"] in OWN else self.proxy
        await app(scope, receive, send)

    def _is_token(self, value: bytes) -> bool:
        given = value[7:] if value[:7].lower() == b"bearer " else value
        return hmac.compare_digest(given.strip(), (self.token or "").encode())


def refusal(scope: Scope, status: int, why: str) -> JSONResponse:
    """An error in the form of the API that was asked."""
    error: Any = {"message": why, "type": "gateway_error", "code": status}
    if scope["path"].startswith("/v1/messages"):
        return JSONResponse({"type": "error", "error": error}, status)
    return JSONResponse({"error": error if scope["path"].startswith("/v1/") else why}, status)


class Proxy:
    """Passes requests to the model's server."""

    def __init__(self, upstream: Upstream, recorder: Recorder, manage_models: bool, serving: Serving) -> None:
        self.upstream, self.recorder, self._manage, self.serving = upstream, recorder, manage_models, serving
        self._base = httpx.URL(upstream.url)
        self._url = lru_cache(KEPT_ADDRESSES)(lambda path: self._base.copy_with(raw_path=path))
        self._timeout = httpx.Timeout(upstream.silent_seconds, connect=upstream.connect_seconds, pool=None)
        self.client = httpx.AsyncClient(
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=KEPT_CONNECTIONS),
            trust_env=not is_local(upstream.url),  # the environment may name a proxy
            verify=upstream.url.startswith("https:"),
        )
        self.send = partial(self.client.send, stream=True)
        self._versions: tuple[float, dict[str, int | None]] = (-VERSIONS_SECONDS, {})
        self.streams = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        path = posixpath.normpath(scope["path"])
        writes = CHANGES.match(path.replace("//", "/").lower()) or scope["method"] not in ("GET", "HEAD", "POST")
        if writes and not self._manage:
            why = "the gateway changes no models: talk to the model's server itself, or set gateway.manage_models"
            await refusal(scope, 403, why)(scope, receive, send)
            return
        body = await _body(receive)
        if body is None:
            return
        if len(body) > MOST_BYTES:
            await refusal(scope, 413, f"the request has more than {MOST_BYTES >> 20} MiB")(scope, receive, send)
            return
        known = scope["method"] == "POST" and path in READERS
        if self.upstream.choices:
            chosen = self._chosen(path, body) if known else None
            if chosen is None:
                await self._listed(scope, path)(scope, receive, send)
                return
            body = chosen
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        asked = self.recorder.read(path, body, headers) if known else None
        relay = _Relay(self, path, asked, headers)
        if asked is not None and full_name(asked.model) == f"{self.upstream.name}:live" and (ticket := relay.begin()):
            body = await asyncio.to_thread(self._for_candidate, body, ticket)
        if asked is not None:
            serving = await self._serving(asked.model)
            if serving.examples or serving.system_prompt:
                ticket = relay.begin()
                body, relay.shown = await asyncio.to_thread(self._with_context, path, body, asked, ticket, serving)
        passing = asyncio.create_task(relay.run(self._request(scope, body, asked is not None), scope, receive, send))
        leaving = asyncio.create_task(_gone(receive))
        self.streams += 1
        try:
            await asyncio.wait({passing, leaving}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            self.streams -= 1
            leaving.cancel()
            passing.cancel()  # nothing where it is done
            await asyncio.wait({passing})
            await relay.end("stopped")
        if not passing.cancelled():
            passing.result()

    def _chosen(self, path: str, body: bytes) -> bytes | None:
        """The request with the adapter that its `model` names; None where it names none."""
        with suppress(ValueError, AttributeError, TypeError):  # no JSON, no object, a model that is no text
            request = orjson.loads(body)
            if (model := self.upstream.choices.get(request.get("model"))) is not None:
                return orjson.dumps(request | model.lora)
        return None

    def _listed(self, scope: Scope, path: str) -> JSONResponse:
        """The list of models where it is asked for, else what there is to ask for."""
        choices = list(self.upstream.choices)
        if scope["method"] == "GET" and path == "/v1/models":
            entries = [{"id": name, "object": "model", "created": 0, "owned_by": "whetstone"} for name in choices]
            return JSONResponse({"object": "list", "data": entries})
        return refusal(scope, 404, f"ask /v1/chat/completions with one of these as `model`: {', '.join(choices)}")

    def _for_candidate(self, body: bytes, ticket: Ticket) -> bytes:
        """The request as the canary's candidate gets it, where the conversation is one of its."""
        try:
            if tag := self.recorder.candidate_for(ticket):
                ticket.asked.model, ticket.served["canary"] = tag, True
                return orjson.dumps(orjson.loads(body) | {"model": tag})
        except Exception as error:  # a chat goes on without
            self.recorder.failed(error)
        return body

    async def _serving(self, model: str) -> Serving:
        """What stands before questions to a model: what a version was judged with, else what section `serve` says."""
        here, known = self.recorder.checkout, self.serving
        try:
            kind = kind_served(here, (await self.model_of(model)).get("model", "")) if has_kinds(here) else {}
            if not kind:
                return known
            examples = served_examples(here, kind["examples"], known.context) if kind["examples"] else None
            return replace(known, examples=examples, system_prompt=kind["system_prompt"] or known.system_prompt)
        except Exception as error:  # a chat goes on without
            self.recorder.failed(error)
            return known

    def _with_context(
        self, path: str, body: bytes, asked: Asked, ticket: Ticket | None, serving: Serving
    ) -> tuple[bytes, list[str]]:
        """The request as the model gets it, and the conversations that its examples come from."""
        try:
            said = [*asked.history, {"role": "user", "content": asked.question}]
            reply = next(
                (int(n) for name, n in asked.sampling.items() if name.startswith("max_")), serving.reply_tokens
            )
            examples = serving.examples.before(said, reply) if serving.examples else []
            new = with_context(path, body, serving.system_prompt, examples)
        except Exception as error:  # a chat goes on without
            self.recorder.failed(error)
            return body, []
        if new is body:
            return body, []
        shown = sources(examples)
        if ticket is not None and shown:
            ticket.served["examples"] = len(shown)
        return new, shown

    def _request(self, scope: Scope, body: bytes, read: bool) -> httpx.Request:
        path = self._base.raw_path.rstrip(b"/") + scope["raw_path"]
        query = b"?" + scope["query_string"] if scope["query_string"] else b""
        replaced = {b"content-length", *({b"accept-encoding"} if read else ()), *TOKEN_HEADERS[:1]}
        replaced |= {b"authorization"} if self.upstream.key else set()
        headers = [(name, value) for name, value in scope["headers"] if name not in OF_ONE_CONNECTION | replaced]
        headers += [(b"accept-encoding", b"identity")] if read else []
        headers += [(b"authorization", f"Bearer {self.upstream.key}".encode())] if self.upstream.key else []
        content = body if body or scope["method"] == "POST" else None
        timeout = {"timeout": self._timeout.as_dict()}
        return httpx.Request(
            scope["method"], self._url(path + query), headers=headers, content=content, extensions=timeout
        )

    async def model_of(self, said: str) -> dict[str, Any]:
        """What is logged of the model that a reply names: `whetstone:live` is a version, which moves on."""
        if (model := self.upstream.choices.get(said)) is not None:
            return {"model": model.tag, "version": model.version, "engine": model.engine}
        name = self.upstream.name
        if name is None or not full_name(said).startswith(f"{name}:"):
            return self.upstream.model
        if time.monotonic() - self._versions[0] > VERSIONS_SECONDS:
            self._versions = time.monotonic(), await asyncio.to_thread(_versions, self.upstream)
        version = self._versions[1].get(full_name(said))
        return {"model": f"{name}:{version}", "version": version} if version else {}


def _versions(upstream: Upstream) -> dict[str, int | None]:
    with OllamaClient(upstream.url, timeout=2.0) as client:
        return {model.tag: model.version for model in served_models(client, upstream.name or "")}


class _Relay:
    """One request on its way to the server, and its answer on the way back."""

    def __init__(self, proxy: Proxy, path: str, asked: Asked | None, headers: Headers) -> None:
        self._proxy, self._path, self._asked, self._headers = proxy, path, asked, headers
        self._ticket: Ticket | None = None
        self._reply: ReplyReader | None = None
        self.shown: list[str] = []

    def begin(self) -> Ticket | None:
        """Where the question belongs, once: while the model thinks, unless somebody has to know before."""
        asked, self._asked = self._asked, None
        if asked is not None:
            self._ticket = self._proxy.recorder.begin(asked, self._headers)
        return self._ticket

    async def run(self, request: httpx.Request, scope: Scope, receive: Receive, send: Send) -> None:
        response = None
        asyncio.get_running_loop().call_later(SENT_WITHIN, self.begin)
        try:
            try:
                response = await self._proxy.send(request)
            except (httpx.RemoteProtocolError, httpx.ReadError, httpx.WriteError):
                # A kept connection that the server has just closed looks like a server that hangs up.
                response = await self._proxy.send(request)
            await self._pass(response, send)
        except httpx.HTTPError as error:
            if response is None:
                late = isinstance(error, httpx.TimeoutException) and not isinstance(error, httpx.ConnectTimeout)
                server = f"the model's server at {self._proxy.upstream.url}"
                why = f"{server} is silent: look at its log" if late else f"{server} cannot be reached: is it running?"
                if not isinstance(error, httpx.ConnectError | httpx.ConnectTimeout):  # that is no version's fault
                    self._failed()
                await refusal(scope, 504 if late else 502, why)(scope, receive, send)
            else:
                await self.end("failed")
        finally:
            if response is not None:
                await response.aclose()

    async def _pass(self, response: httpx.Response, send: Send) -> None:
        headers = [(name.lower(), value) for name, value in response.headers.raw]
        headers = [h for h in headers if h[0] not in OF_ONE_CONNECTION and not h[0].startswith(b"access-control-")]
        if self.shown:
            headers.append((b"x-whetstone-examples", ",".join(self.shown).encode("latin-1", "replace")))
        if (ticket := self.begin()) is not None and response.status_code == 200:
            kind = response.headers.get("content-type", "").partition(";")[0].strip().lower()
            self._reply = ReplyReader(self._path, kind, response.headers.get("content-encoding", "identity"))
            ticket.request_id = response.headers.get("x-request-id")
            own = {"x-whetstone-message-id": ticket.id}
            own["x-whetstone-conversation-id"] = ticket.place.conversation
            own |= {} if ticket.request_id else {"x-request-id": ticket.id}
            headers += [(name.encode(), value.encode("latin-1", "replace")) for name, value in own.items()]
        if response.status_code >= 500 or response.status_code == 404:
            self._failed()
        await send({"type": "http.response.start", "status": response.status_code, "headers": headers})
        held = b""
        async with aclosing(_arrivals(response)) as arrivals:
            async for chunk in arrivals:
                place = self._reply.feed(chunk) if self._reply else None
                if self._reply and self._reply.readable and not self._reply.streamed:
                    chunk, held = held, chunk  # the last bytes wait for the disk
                elif held:
                    chunk, held = held + chunk, b""
                if place is not None:
                    if place:
                        await send(_body_part(chunk[:place]))
                    await self.end("complete")
                    chunk = chunk[place:]
                if chunk:
                    await send(_body_part(chunk))
        await self.end("complete")
        await send({"type": "http.response.body", "body": held})

    def _failed(self) -> None:
        if (ticket := self.begin()) is not None:
            self._proxy.recorder.canary.failed(ticket.place.conversation)

    async def end(self, outcome: Outcome) -> None:
        """Log the exchange, once; the rest is passed on when the disk has it."""
        reply, ticket, self._ticket = self._reply, self.begin(), None
        if reply is not None and ticket is not None:
            proxy, asked = self._proxy, ticket.asked.model
            # One engine calls itself by one name, whichever adapter answers.
            model_of = (lambda _: proxy.model_of(asked)) if proxy.upstream.choices else proxy.model_of
            await proxy.recorder.finish(ticket, reply, outcome, model_of)


async def _arrivals(response: httpx.Response) -> AsyncIterator[bytes]:
    """What the server sends, as it comes. What came while the client took the part before is one part: a machine with
    little time for this process sends fewer and larger parts, and falls no further behind."""
    arrived, news, room = bytearray(), asyncio.Event(), asyncio.Event()

    async def read() -> None:
        try:
            async for chunk in response.aiter_raw():
                arrived.extend(chunk)
                news.set()
                while len(arrived) > MOST_WAITING:
                    room.clear()
                    await room.wait()
        finally:
            news.set()

    reading = asyncio.create_task(read())
    try:
        while not reading.done() or arrived:
            await news.wait()
            news.clear()
            if part := bytes(arrived):
                arrived.clear()
                room.set()
                yield part
        await reading
    finally:
        reading.cancel()
        await asyncio.gather(reading, return_exceptions=True)


def _body_part(data: bytes) -> Message:
    return {"type": "http.response.body", "body": data, "more_body": True}


async def _body(receive: Receive) -> bytes | None:
    """The body of a request, MOST_BYTES and a little more of it at most; None where the client left before its end."""
    body = bytearray()
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        body += message.get("body", b"")
        if not message.get("more_body") or len(body) > MOST_BYTES:
            return bytes(body)


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def application(
    upstream: Upstream,
    recorder: Recorder,
    names: Collection[str],
    port: int,
    token: str | None,
    manage_models: bool,
    serving: Serving | None = None,
) -> Gateway:
    """The gateway with what it consists of."""
    proxy = Proxy(upstream, recorder, manage_models, serving or Serving())

    async def health(_: Request) -> JSONResponse:
        address, examples = urlsplit(upstream.url).netloc, proxy.serving.examples
        shown = {"examples": {"problem": examples.problem}} if examples else {}
        return JSONResponse({"upstream": address, "streams": proxy.streams, "recording": recorder.statistics()} | shown)

    async def feedback(request: Request) -> JSONResponse:
        status, answer = await recorder.judge(await request.body(), request.headers)
        return refusal(request.scope, status, answer["error"]) if "error" in answer else JSONResponse(answer, status)

    async def recording(request: Request) -> JSONResponse:
        with suppress(ValueError):
            said = await request.json()
            if isinstance(said, dict) and isinstance(said.get("user"), str) and isinstance(said.get("record"), bool):
                recorder.agree(said["user"], said["record"])
                return JSONResponse({"record": said["record"]})
        return refusal(request.scope, 400, 'send {"user": the name that the client sends, "record": true or false}')

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        retrying = asyncio.create_task(recorder.retry())
        try:
            yield
        finally:
            retrying.cancel()
            await proxy.client.aclose()
            recorder.close()

    answers = zip(OWN, (health, feedback, recording), (["GET"], ["POST"], ["POST"]), strict=True)
    routes = [Route(path, answer, methods=methods) for path, answer, methods in answers]
    return Gateway(Starlette(routes=routes, lifespan=lifespan), proxy, names, port, token)
