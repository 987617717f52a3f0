"""Bodies read within limits, clients that go away, and work that something else may end."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from starlette.requests import Request
from starlette.types import Receive

from neustream.server.errors import HTTPError, of_validation

T = TypeVar("T")
B = TypeVar("B", bound=BaseModel)
SLOW = "slow_reader"
"""In the state of a request whose client did not read what was written to it in time."""


CHUNKS = "chunks"
"""In the state of a request, where its connection can do that: writes a part of a body that has begun, and says
whether it did. Of what a token costs, the parser's account of each part is a fifth."""


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
    """The bytes of a body; HTTPError if they are packed, too many, or do not come."""
    packed = request.headers.get("content-encoding", "identity").strip().lower()
    if packed not in ("", "identity"):
        raise HTTPError(415, f"content-encoding: bodies are not packed here, got {packed[:60]!r}", "invalid")
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
        with contextlib.suppress(BaseException):  # theirs was told; ours goes on being raised
            await asyncio.gather(task, watcher, return_exceptions=True)


async def gone(receive: Receive) -> None:
    """Until the client goes away."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def unless(work: Awaitable[T], failed: asyncio.Future[Any]) -> T:
    """What `work` gives; what `failed` raises, with it cancelled, if that comes first."""
    task = asyncio.ensure_future(work)
    try:
        await asyncio.wait({task, failed}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            failed.result()
        return task.result()
    finally:
        task.cancel()
