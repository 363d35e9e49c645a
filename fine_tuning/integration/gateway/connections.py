"""Connections to the model's server: httpcore's, with fewer system calls for each request and each part of an answer.

A connection of anyio stops and resumes reading around every part, and sends head and body of a request apart. That
counts where an answer has a hundred parts and many are under way.
"""

import asyncio
from typing import Any

import httpcore
import httpx

MOST_UNREAD = 1 << 16  # bytes that have arrived and wait for a reader


class _Connection(asyncio.Protocol, httpcore.AsyncNetworkStream):
    """What is written goes out with the next read, which always follows."""

    def __init__(self) -> None:
        self._arrived, self._held = bytearray(), bytearray()
        self._news = asyncio.Event()
        self._ended, self._error = False, ""

    def connection_made(self, transport: Any) -> None:
        self._transport: asyncio.Transport = transport

    def data_received(self, data: bytes) -> None:
        self._arrived += data
        self._news.set()
        if len(self._arrived) > MOST_UNREAD:
            self._transport.pause_reading()

    def eof_received(self) -> None:
        self._ended = True
        self._news.set()

    def connection_lost(self, exc: Exception | None) -> None:
        self._ended, self._error = True, str(exc or "")
        self._news.set()

    async def write(self, buffer: bytes, timeout: float | None = None) -> None:
        """Take in a part of a request."""
        self._held += buffer

    async def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        """What has arrived; b"" at the end."""
        if self._held:
            self._transport.write(bytes(self._held))
            self._held.clear()
        if not self._arrived and not self._ended:
            self._news.clear()
            try:
                async with asyncio.timeout(timeout):
                    await self._news.wait()
            except TimeoutError:
                raise httpcore.ReadTimeout from None
        if not self._arrived and self._error:
            raise httpcore.ReadError(self._error)
        data = bytes(self._arrived[:max_bytes])
        del self._arrived[:max_bytes]
        self._transport.resume_reading()  # nothing where it was not paused
        return data

    async def aclose(self) -> None:
        """Close it, whatever is under way."""
        self._transport.abort()

    def get_extra_info(self, info: str) -> Any:
        """`is_readable`: whether a connection that waits for a request has ended or got what nobody asked for."""
        return self._ended or bool(self._arrived) if info == "is_readable" else self._transport.get_extra_info(info)


class _Backend(httpcore.AsyncNetworkBackend):
    async def connect_tcp(
        self, host: str, port: int, timeout: float | None = None, **_: Any
    ) -> httpcore.AsyncNetworkStream:
        try:
            async with asyncio.timeout(timeout):
                _, connection = await asyncio.get_running_loop().create_connection(_Connection, host, port)
        except TimeoutError:
            raise httpcore.ConnectTimeout from None
        except OSError as error:
            raise httpcore.ConnectError(str(error)) from None
        return connection


class PlainTransport(httpx.AsyncHTTPTransport):
    """To a server without TLS; `kept` is how many connections wait for their next request."""

    def __init__(self, kept: int) -> None:
        self._pool = httpcore.AsyncConnectionPool(
            max_connections=None, max_keepalive_connections=kept, keepalive_expiry=5.0, network_backend=_Backend()
        )
