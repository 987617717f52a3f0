"""Images as events: those under way where that is asked, and those that are done."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from neustream.engine.clock import date
from neustream.errors import NeustreamError
from neustream.server.gateway import Gateway
from neustream.server.models import ImageModel
from neustream.service.answer import Answer

if TYPE_CHECKING:
    from neustream.server.images import Job


@dataclass(frozen=True)
class Partial:
    """A picture under way: of which image, and which of them."""

    number: int
    index: int
    answer: Answer[Any]


class Shown:
    """The pictures of one request's images under way.

    Args:
        count: for each image.
    """

    def __init__(self, gateway: Gateway, model: ImageModel, id: str, count: int) -> None:
        self.count = count
        self._gateway = gateway
        self._model = model
        self._id = id
        self._loop = asyncio.get_running_loop()
        self._open: list[Answer[Any]] = []
        self.came: asyncio.Queue[Partial] = asyncio.Queue()

    def watcher(self, number: int) -> Callable[[Any], None]:
        """What is told of the steps of an image, on the device's thread."""
        told = 0

        def on_step(progress: Any) -> None:
            nonlocal told
            if told < self.count and progress.step >= step_of(told, self.count, progress.total):
                if progress.step < progress.total:
                    self._loop.call_soon_threadsafe(self._ask, number, told, progress.preview())
                told += 1

        return on_step

    def _ask(self, number: int, index: int, preview: Any) -> None:
        id = f"{self._id}-{number}-shown-{index}"
        with contextlib.suppress(NeustreamError):  # too much is open: the image itself matters more
            answer = self._gateway.preview(self._model, preview, id)
            self._open.append(answer)
            answer.add_done_callback(partial(self._made, number, index))

    def _made(self, number: int, index: int, answer: Any) -> None:
        if answer in self._open:
            self.came.put_nowait(Partial(number, index, answer))

    def cancel(self) -> None:
        """Nobody wants more of them; none is kept, since each knows this by its callback."""
        for answer in self._open:
            answer.cancel()
        self._open = []
        self.came = asyncio.Queue()


def step_of(index: int, count: int, total: int) -> int:
    """The step (from 1) behind which picture number `index` of `count` is made: they part the steps evenly."""
    return max(1, round(total * (index + 1) / (count + 1)))


async def events(job: Job) -> AsyncIterator[bytes]:
    """An event for each image, and for those under way that come before it."""
    queue: asyncio.Queue[tuple[int, int | None, Any]] = asyncio.Queue()
    tasks = [asyncio.ensure_future(_done(job, number, queue)) for number in range(len(job.answers))]
    tasks.append(asyncio.ensure_future(_partials(job, queue)))
    done: set[int] = set()
    try:
        while len(done) < len(job.answers):
            number, index, found = await queue.get()
            if isinstance(found, BaseException):
                raise found
            if index is None:
                done.add(number)
                yield _event(job, "completed", found)
            elif number not in done:
                yield _event(job, "partial_image", found, partial_image_index=index)
    finally:
        job.end()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _done(job: Job, number: int, queue: asyncio.Queue[tuple[int, int | None, Any]]) -> None:
    try:
        queue.put_nowait((number, None, await job.image(number)))
    except Exception as error:  # noqa: BLE001  it is raised where events are made
        queue.put_nowait((number, None, error))


async def _partials(job: Job, queue: asyncio.Queue[tuple[int, int | None, Any]]) -> None:
    """Those that came to something; the others are left out."""
    while True:
        found = await job.shown.came.get()
        if found.answer.cancelled() or found.answer.exception() is not None:
            continue
        picture = await job.encoded(found.answer.result().images[0])
        queue.put_nowait((found.number, found.index, picture))


def _event(job: Job, what: str, picture: str, **more: Any) -> bytes:
    body, kind = job.body, f"{job.event}.{what}"
    event = {
        "type": kind,
        "b64_json": picture,
        "created_at": int(date()),
        "output_format": body.output_format or "png",
        "size": body.size or "auto",
        "quality": "auto",
        "background": "auto",
        **more,
    }
    return f"event: {kind}\ndata: {json.dumps(event)}\n\n".encode()
