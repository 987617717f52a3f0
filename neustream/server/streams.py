"""Streams of events: they begin with the first one, and end whole or are cut."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Mapping
from typing import TYPE_CHECKING, Any

from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from neustream.server.errors import HTTPError, forget_frames, log_fault, of_request
from neustream.server.wire import CHUNKS, SLOW, Gone, while_there

if TYPE_CHECKING:
    from neustream.server.context import Context

SSE = {
    "content-type": "text/event-stream; charset=utf-8",
    "cache-control": "no-cache",
    "x-accel-buffering": "no",
}
COMMENT = b": still here\n\n"
"""What a client gets that has had no event for long; it is none."""


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
    event, and the connection is cut, so that no client takes the stream for whole. Who asks for the
    head alone (HEAD) gets that, and no events.

    Args:
        first: the first event; events: the others.
        outlet: by which those who make them hear of a client that does not read.
        failed: told of what went wrong behind it.
        comment_s: after so long without an event a comment is sent; None: never.
    """

    def __init__(
        self,
        first: bytes,
        events: AsyncIterator[bytes],
        headers: Mapping[str, str],
        *,
        outlet: Outlet,
        failed: Callable[[HTTPError | Gone], None],
        comment_s: float | None = None,
    ) -> None:
        self._first = first
        self._events = events
        self._headers = {**SSE, **headers}
        self._outlet = outlet
        self._failed = failed
        self._comment_s = comment_s
        self._chunk: Callable[[bytes], bool] = _cannot
        self._bare = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            self._chunk = scope.get("state", {}).get(CHUNKS, _cannot)
            self._bare = scope["method"] == "HEAD"
            await while_there(receive, self._copied(send))
        except Gone as away:
            slow = scope.get("state", {}).get(SLOW)
            self._failed(_too_slow() if slow else away)
        except _Full:
            self._failed(_too_slow())
        except BaseException as error:
            known = of_request(error)
            self._failed(known)
            with contextlib.suppress(Exception):  # the client may be gone too
                await send(_part(known.event))  # and no end: the connection is cut
            if not isinstance(error, Exception):
                raise
            log_fault(error, scope.get("state", {}).get("id", ""))
            forget_frames(error)
        else:
            with contextlib.suppress(Exception):  # the client may be gone: it has had all
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
        if self._bare:
            return
        if self._first:
            await self._write(send, self._first)
        events = self._events if self._comment_s is None else commented(self._events, self._comment_s)
        async for event in events:
            await self._write(send, event)

    async def _write(self, send: Send, event: bytes) -> None:
        """Send an event, straight on where its connection can; while that waits for the client, others see it."""
        if self._chunk(event):
            return
        self._outlet.blocked = True
        await send(_part(event))
        self._outlet.blocked = False


def _cannot(body: bytes) -> bool:
    """There is no short way to the connection."""
    return False


class _Full(Exception):
    """Too many events wait."""


def _too_slow() -> HTTPError:
    return HTTPError(499, "the client reads too slowly", "slow_reader")


def _part(body: bytes) -> Message:
    return {"type": "http.response.body", "body": body, "more_body": True}


async def commented(events: AsyncIterator[bytes], seconds: float) -> AsyncIterator[bytes]:
    """The same, with a comment after so long without one of them."""
    coming: asyncio.Future[bytes] = asyncio.ensure_future(_next(events))
    try:
        while True:
            await asyncio.wait({coming}, timeout=seconds)
            if not coming.done():
                yield COMMENT
                continue
            try:
                yield coming.result()
            except StopAsyncIteration:
                return
            coming = asyncio.ensure_future(_next(events))
    finally:
        coming.cancel()
        await asyncio.gather(coming, return_exceptions=True)


async def _next(events: AsyncIterator[bytes]) -> bytes:
    return await anext(events)


async def stream_of(
    context: Context, events: AsyncIterator[bytes], headers: Mapping[str, str], outlet: Outlet
) -> Response:
    """The answer of some events, once there is one, or the operator's `head_after_s` are over."""
    http = context.config.http
    coming: asyncio.Future[bytes] = asyncio.ensure_future(_next(events))
    first = b""
    try:
        await while_there(context.request.receive, asyncio.wait({coming}, timeout=http.head_after_s))
        if coming.done():
            first, rest = coming.result(), events
        else:
            rest = _behind(coming, events)
    except BaseException:
        coming.cancel()
        await asyncio.gather(coming, return_exceptions=True)
        raise
    stream: Any = EventStream(first, rest, headers, outlet=outlet, failed=context.cut, comment_s=http.sse_keepalive_s)
    response: Response = stream
    return response


async def _behind(coming: asyncio.Future[bytes], events: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """All events, the first of which is waited for already."""
    try:
        yield await coming
        async for event in events:
            yield event
    finally:
        coming.cancel()
        await asyncio.gather(coming, return_exceptions=True)
        close: Any = getattr(events, "aclose", None)
        if close is not None:
            await close()
