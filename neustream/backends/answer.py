"""What `submit` of a served model returns: a future of the model's own output."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Generator
from concurrent.futures import Future
from typing import Any, TypeVar

from neustream.engine.answers import Result

T = TypeVar("T")


class Answer(Future[T]):
    """What `submit` returns: the model's own output, once it is there.

    A `concurrent.futures.Future` that can be awaited too. `result()` raises RequestError if the request
    was dropped or failed, CancelledError if it was cancelled; `cancel()` gives the request up, at the
    latest after the step that it is in. `ended` says how it went and how long it took.
    """

    def __init__(self, id: str, give_up: Callable[[str], Any]) -> None:
        super().__init__()
        self.id = id
        self.ended: Result | None = None
        self._give_up = give_up

    def cancel(self) -> bool:
        cancelled = super().cancel()
        if cancelled and self.ended is None:
            self._give_up(self.id)
        return cancelled

    def __await__(self) -> Generator[Any, None, T]:
        return asyncio.wrap_future(self).__await__()

    def settle(self, done: Future[Result], output: Callable[[Result], T]) -> None:
        """Answer as the engine did; `output` makes of its result what the caller gets, or raises."""
        error = done.exception()
        if error is None:
            self.ended = done.result()
        if not self.set_running_or_notify_cancel():
            return  # its caller cancelled it
        if error is not None:
            self.set_exception(error)
            return
        try:
            value = output(done.result())
        except Exception as failed:
            self.set_exception(failed)
        else:
            self.set_result(value)
