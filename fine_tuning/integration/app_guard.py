"""Refuses requests from other web pages before Streamlit sees them.

Streamlit compares the host of an origin and not its port, accepts `localhost` wherever it runs, and looks its
external address up on the Internet, on the event loop, before it refuses. This ASGI middleware stands in front of it.
"""

import streamlit as st
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fine_tuning.integration.request_guard import is_own

LOOPBACK = ("localhost", "127.0.0.1")
# Vega compiles its expressions, Graphviz is WebAssembly, a report is a data: frame; nothing else is from elsewhere.
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; worker-src 'self' blob:; connect-src 'self' data: blob:; "
    "frame-src 'self' data:; object-src 'none'; base-uri 'self'; form-action 'self'; frame-ancestors 'none'"
)
REFUSAL = (
    "Refused: the app answers its own pages only, at a name in server.allowedHosts (.streamlit/config.toml) and at "
    "browser.serverPort.\n"
)
HEADERS = [
    (b"content-security-policy", POLICY.encode()),
    (b"x-frame-options", b"DENY"),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"same-origin"),  # an address names a conversation
]


class AppGuard:
    """ASGI middleware: exact Host and Origin, port included, for HTTP and WebSocket; security headers on every answer.

    Hosts are the names in Streamlit's `server.allowedHosts` (this machine's where the list is empty) with the port
    `browser.serverPort`, which is `server.port` unless a proxy stands in front. An origin is the one of the request's
    own host. A WebSocket and a method that changes something need one: every browser sends it.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer 403 to what comes from elsewhere, pass on the rest."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return

        async def send_guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                own = {name for name, _ in HEADERS}
                kept = [(name, value) for name, value in message.get("headers", ()) if name.lower() not in own]
                message = {**message, "headers": kept + HEADERS}
            await send(message)

        if _is_own(scope):
            await self.app(scope, receive, send_guarded)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        else:
            await PlainTextResponse(REFUSAL, 403)(scope, receive, send_guarded)


def _is_own(scope: Scope) -> bool:
    """Whether the request was sent to a name of the app, from a page of the app or from no page."""
    names = st.get_option("server.allowedHosts") or LOOPBACK
    reads = scope["type"] == "http" and scope["method"] in ("GET", "HEAD")
    return is_own(scope, names, int(st.get_option("browser.serverPort")), needs_origin=not reads)
