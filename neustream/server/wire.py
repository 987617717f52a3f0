"""Bodies read within limits, streams that begin with their first event, clients that go away."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from starlette.requests import Request
from starlette.types import Message, Receive, Scope, Send

from neustream.server.errors import HTTPError, of_request, of_validation

T = TypeVar("T")
B = TypeVar("B", bound=BaseModel)
SSE = {
    "content-type": "text/event-stream; charset=utf-8",
    "cache-control": "no-cache",
    "x-accel-buffering": "no",
}

SLOW = "slow_reader"
"""In the state of a request whose client did not read what was written to it in time."""


class Gone(Exception):
    """The client went away."""


async def body_of(request: Request, kind: type[B], most: int, timeout_s: float) -> B:
    """A JSON body as `kind`; HTTPError if it is none, too large, or does not come."""
    media = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media not in ("application/json", "application/x-ndjson"):
        raise HTTPError(415, f"content-type must be application/json, got {media[:60]!r}", "invalid")
    raw = await raw_body(request, most, timeout_s)
    try:
        return kind.model_validate_json(raw)
    except ValidationError as error:
        raise of_validation(error) from None


async def raw_body(request: Request, most: int, timeout_s: float) -> bytes:
    """The bytes of a body."""
    length = request.headers.get("content-length", "0")
    digits = length.isascii() and length.isdecimal()
    if not digits or int(length[:20]) > most:
        raise HTTPError(413, f"the body is larger than {most} bytes", "too_large")
    try:
        return await asyncio.wait_for(_read(request.receive, most), timeout_s)
    except TimeoutError:
        raise HTTPError(408, f"the body did not come within {timeout_s:g} s", "timeout") from None


async def _read(receive: Receive, most: int) -> bytes:
    parts: list[bytes] = []
    size = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise Gone
        part = message.get("body", b"")
        size += len(part)
        if size > most:
            raise HTTPError(413, f"the body is larger than {most} bytes", "too_large")
        parts.append(part)
        if not message.get("more_body"):
            return b"".join(parts)


async def while_there(receive: Receive, work: Awaitable[T]) -> T:
    """What `work` gives; Gone, with it cancelled, as soon as the client goes away."""
    task = asyncio.ensure_future(work)
    watcher = asyncio.ensure_future(gone(receive))
    try:
        await asyncio.wait({task, watcher}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise Gone
        return task.result()
    finally:
        for each in (task, watcher):
            each.cancel()
        with contextlib.suppress(BaseException):
            await asyncio.gather(task, watcher, return_exceptions=True)


async def gone(receive: Receive) -> None:
    """Until the client goes away."""
    while (await receive())["type"] != "http.disconnect":
        pass


class Outlet:
    """Where a stream's events leave it.

    Attributes:
        blocked: whether the client does not take what is written.
        full: set by those who make events, once too many of them wait for such a client.
    """

    def __init__(self) -> None:
        self.blocked = False
        self.full = asyncio.Event()


class EventStream:
    """A response of events, as ASGI.

    It begins with the first one: until then, what goes wrong is a status. Behind it an error is an
    event, and the connection is cut, so that no client takes the stream for whole.

    Args:
        first: the first event; events: the others.
        outlet: by which those who make them hear of a client that does not read.
        failed: told of what went wrong behind it.
    """

    def __init__(
        self,
        first: bytes,
        events: AsyncIterator[bytes],
        headers: Mapping[str, str],
        *,
        outlet: Outlet,
        failed: Callable[[HTTPError | Gone], None],
    ) -> None:
        self._first = first
        self._events = events
        self._headers = {**SSE, **headers}
        self._outlet = outlet
        self._failed = failed

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await while_there(receive, self._copied(send))
        except Gone as away:
            slow = scope.get("state", {}).get(SLOW)
            self._failed(_too_slow() if slow else away)
        except _Full:
            self._failed(_too_slow())
        except BaseException as error:
            known = of_request(error)
            self._failed(known)
            with contextlib.suppress(Exception):
                await send(_part(known.event))  # and no end: the connection is cut
            if not isinstance(error, Exception):
                raise
        else:
            with contextlib.suppress(Exception):
                await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            close: Any = getattr(self._events, "aclose", None)
            if close is not None:
                await close()

    async def _copied(self, send: Send) -> None:
        """Send all events; _Full if too many of them wait for a client that does not read."""
        copying = asyncio.ensure_future(self._copy(send))
        full = asyncio.ensure_future(self._outlet.full.wait())
        try:
            await asyncio.wait({copying, full}, return_when=asyncio.FIRST_COMPLETED)
            if not copying.done():
                raise _Full
            copying.result()
        finally:
            for each in (copying, full):
                each.cancel()
            await asyncio.gather(copying, full, return_exceptions=True)

    async def _copy(self, send: Send) -> None:
        headers = [(name.encode(), value.encode("latin-1")) for name, value in self._headers.items()]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await self._write(send, self._first)
        async for event in self._events:
            await self._write(send, event)

    async def _write(self, send: Send, event: bytes) -> None:
        """Send an event; while that waits for the client, others see it."""
        self._outlet.blocked = True
        await send(_part(event))
        self._outlet.blocked = False


class _Full(Exception):
    """Too many events wait."""


def _too_slow() -> HTTPError:
    return HTTPError(499, "the client reads too slowly", "slow_reader")


def _part(body: bytes) -> Message:
    return {"type": "http.response.body", "body": body, "more_body": True}
