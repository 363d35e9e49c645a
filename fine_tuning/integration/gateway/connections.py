"""Connections to the model's server: httpcore's, with fewer system calls for each request and each part of an answer.

A connection of anyio stops and resumes reading around every part, and head and body of a request are two packets. Both
count where an answer has a hundred parts and many are under way.
"""

import asyncio
from collections.abc import Iterable
from typing import Any

import httpcore
import httpx

MOST_UNREAD = 1 << 16  # bytes that have arrived and wait for a reader


class _Connection(asyncio.Protocol, httpcore.AsyncNetworkStream):
    """What is written goes out with the next read, which always follows."""

    def __init__(self) -> None:
        self._arrived, self._held = bytearray(), bytearray()
        self._news, self._writable = asyncio.Event(), asyncio.Event()
        self._writable.set()
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
        self._writable.set()

    def pause_writing(self) -> None:
        self._writable.clear()

    def resume_writing(self) -> None:
        self._writable.set()

    async def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        """What has arrived; b"" at the end."""
        await self._send(timeout)
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

    async def write(self, buffer: bytes, timeout: float | None = None) -> None:
        """Take in a part of a request."""
        self._held += buffer
        if len(self._held) > MOST_UNREAD:
            await self._send(timeout)

    async def _send(self, timeout: float | None) -> None:
        if self._held:
            self._transport.write(bytes(self._held))
            self._held.clear()
        if not self._writable.is_set():
            try:
                async with asyncio.timeout(timeout):
                    await self._writable.wait()
            except TimeoutError:
                raise httpcore.WriteTimeout from None

    async def aclose(self) -> None:
        """Close it, whatever is under way."""
        self._transport.abort()

    def get_extra_info(self, info: str) -> Any:
        """`is_readable`: whether a connection that waits for a request has ended or got what nobody asked for."""
        return self._ended or bool(self._arrived) if info == "is_readable" else self._transport.get_extra_info(info)


class _Backend(httpcore.AsyncNetworkBackend):
    async def connect_tcp(
        self, host: str, port: int, timeout: float | None = None, local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore.AsyncNetworkStream:  # fmt: skip
        try:
            async with asyncio.timeout(timeout):
                _, connection = await asyncio.get_running_loop().create_connection(_Connection, host, port)
        except TimeoutError:
            raise httpcore.ConnectTimeout from None
        except OSError as error:
            raise httpcore.ConnectError(str(error)) from None
        return connection

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)


class PlainTransport(httpx.AsyncHTTPTransport):
    """To a server without TLS; `kept` is how many connections wait for their next request."""

    def __init__(self, kept: int) -> None:
        self._pool = httpcore.AsyncConnectionPool(
            max_connections=None, max_keepalive_connections=kept, keepalive_expiry=5.0, network_backend=_Backend()
        )
