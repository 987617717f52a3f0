"""The futures that callers of an engine hold: which are open, and what each of them gets.

Whatever a caller does with its future, or in a callback, is its own: nothing here raises for it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, TypeVar

from neustream.core.events import Emitted, Ended
from neustream.core.job import Status
from neustream.engine.events import Listener, Record, Submit
from neustream.errors import (
    NeustreamError,
    RequestCancelled,
    RequestDropped,
    RequestError,
    RequestFailed,
    told,
)

log = logging.getLogger(__name__)
T = TypeVar("T")

UNSERVED: Mapping[str, type[RequestError]] = {
    "dropped": RequestDropped,
    "failed": RequestFailed,
    "cancelled": RequestCancelled,
}
"""What a request that came to nothing raises, by how it ended."""
FORGET = 0.1
"""Weight of the latest request in the mean of gaps between those that are done."""


@dataclass(frozen=True, slots=True)
class Result:
    """How a request ended. `output` is the last output of its graph; None unless it is done.

    `retry_after_s`, of a dropped request, and `code`: see `RequestError`; `waited_s`: from its
    arrival until it first ran, None: it never did, or nobody can tell.
    """

    id: str
    status: Status
    reason: str
    output: Mapping[str, Any] | None
    latency_s: float
    on_time: bool
    retry_after_s: float | None = None
    code: str = ""
    waited_s: float | None = None

    def unwrap(self) -> Mapping[str, Any]:
        """The output; RequestDropped, RequestFailed or RequestCancelled if there is none."""
        if self.output is None:
            raise UNSERVED[self.status](
                f"request {self.id!r} was {self.status}: {self.reason}",
                reason=self.reason,
                code=self.code,
                retry_after_s=self.retry_after_s,
            )
        return self.output


class Answers:
    """The futures of an engine's callers. `hear` is an observer of its loop.

    Attributes:
        open: those of requests that have no answer yet; asked: those of other questions.
    """

    def __init__(self) -> None:
        self.open: set[Future[Any]] = set()
        self.asked: set[Future[Any]] = set()
        self._accepted: dict[str, Future[Any]] = {}
        self._listeners: dict[str, Listener] = {}
        self._done_at: float | None = None
        self._gap_s: float | None = None  # between requests that are done

    def wait_s(self, count: int) -> float | None:
        """Seconds in which `count` requests are done, at the pace of late; None: not known."""
        return None if self._gap_s is None else count * self._gap_s

    def accept(self, event: Submit) -> None:
        """The request of `event` is being served: its future gets how it ends."""
        self.listen(event.request.id, event.answer, event.listener)

    def listen(self, id: str, answer: Future[Any], listener: Listener | None) -> None:
        """The future of request `id`, and who is told of its outputs."""
        self._accepted[id] = answer
        if listener is not None:
            self._listeners[id] = listener

    def moved(self, id: str) -> None:
        """Request `id` left for another engine: its future says so."""
        self._listeners.pop(id, None)
        answer = self._accepted.pop(id, None)
        if answer is not None:
            left = f"request {id!r} left: another engine goes on with it"
            self.resolve(answer, RequestError(left, code="moved"))

    def of(self, id: str) -> Future[Any] | None:
        """The future of the accepted request `id`; None if it was answered, or is none."""
        return self._accepted.get(id)

    def resolve(self, answer: Future[Any], value: Any) -> None:
        """Answer a future, with an exception if `value` is one."""
        self.open.discard(answer)
        self.asked.discard(answer)
        try:
            if not answer.set_running_or_notify_cancel():
                return  # its caller gave it up
            if isinstance(value, BaseException):
                answer.set_exception(value)
            else:
                answer.set_result(value)
        except BaseException:
            log.exception("a callback of a future raised, or its caller had answered it")

    def abandon(self, fault: BaseException | None) -> None:
        """The loop is over: nobody may wait for an answer that cannot come."""
        reason = fault
        if not isinstance(fault, NeustreamError):
            reason = RequestError("the engine stopped before this request was served")
            reason.__cause__ = fault
        for answer in [*self.open, *self.asked]:
            self.resolve(answer, reason)
        self._accepted.clear()
        self._listeners.clear()

    def hear(self, record: Record) -> None:
        """Hand outputs and ends to callers."""
        if isinstance(record, Emitted):
            listener = self._listeners.get(record.id)
            if listener is not None:
                self._call(listener, record)
        elif isinstance(record, Ended):
            self._listeners.pop(record.id, None)
            if record.status == "done":
                self._one_done(record)
            answer = self._accepted.pop(record.id, None)
            if answer is not None:
                self.resolve(answer, self._result(record))

    def _one_done(self, record: Ended) -> None:
        if self._done_at is not None:
            gap = min(record.at - self._done_at, record.latency_s)  # idle time does not count
            before = gap if self._gap_s is None else self._gap_s
            self._gap_s = before + FORGET * (gap - before)
        self._done_at = record.at

    def _result(self, record: Ended) -> Result:
        wait_s = self.wait_s(len(self._accepted) + 1) if record.status == "dropped" else None
        return Result(
            record.id,
            record.status,
            record.reason,
            record.output,
            record.latency_s,
            record.on_time,
            wait_s,
            record.code,
            record.waited_s,
        )

    def _call(self, listener: Listener, record: Emitted) -> None:
        try:
            listener(record)
        except BaseException:
            del self._listeners[record.id]
            log.exception("on_output of request %r raised; it is called no more", record.id)


def settle(answer: Future[T], function: Callable[[], T]) -> None:
    """Answer a future with what `function` returns or raises; not called if the caller gave up."""
    if not answer.set_running_or_notify_cancel():
        return
    try:
        value = function()
    except BaseException as error:  # noqa: BLE001  it is the caller's
        answer.set_exception(error)
    else:
        answer.set_result(value)


def refusal(error: BaseException, what: str) -> NeustreamError:
    """What a caller is told whose request, or more stages, could not be accepted."""
    if isinstance(error, NeustreamError):
        return error
    refused = RequestError(f"{what}: {told(error)}")
    refused.__cause__ = error
    return refused
