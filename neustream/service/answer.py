"""What `submit` returns: a future that can be awaited, and read while outputs still come."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import threading
from collections.abc import AsyncIterator, Callable, Generator, Iterator, Sequence
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass
from typing import Any, Generic, Literal, TypeVar

from neustream.core.events import Emitted, LegEnded
from neustream.engine.answers import Result
from neustream.errors import RequestCancelled, RequestError, RequestFailed, told
from neustream.service.feed import Bell, Feed
from neustream.service.mount import Reader

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Outcome(Generic[T]):
    """How a request went, as a value.

    Args:
        status: "done" if there is a `value`; "refused" if it was never accepted.
        reason: why there is none; `code`, `retry_after_s`: see `RequestError`.
        latency_s: from the request to its end; 0 if it was refused.
        on_time: whether every promise was kept.
        error: what `result()` raises; None if it is done.
    """

    id: str
    status: Literal["done", "refused", "dropped", "failed", "cancelled"]
    value: T | None = None
    reason: str = ""
    code: str = "done"
    retry_after_s: float | None = None
    latency_s: float = 0.0
    on_time: bool = False
    error: BaseException | None = None


def _on_its_loop(fn: Callable[[Any], object]) -> Callable[[Any], object]:
    """A callback that runs where it was made: in the running event loop, if there is one."""
    try:
        loop = asyncio.get_running_loop()
    except RuntimeError:
        return fn

    @functools.wraps(fn)
    def call(done: Any) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody listens
            loop.call_soon_threadsafe(fn, done)

    return call


def _tell(answer: Any) -> None:
    """Tell an answer's listeners that it is done. One that held a function of its own would outlive its last use."""
    answer._tell()


def _nothing(answer: Answer[Any]) -> None:
    """What is given up of a request that is over: it keeps its service from being forgotten no more."""


class Answer(Future[T]):
    """What comes of a request: the model's own output, and what streams before it is complete.

    A `concurrent.futures.Future` that can be awaited too. Where outputs stream, `for` and
    `async for` give them as they come, to any number of readers, each from the first one on.

    `result()`, `await` and the end of an iteration raise `RequestDropped` or `RequestFailed` where
    the request came to nothing, with `reason` and `retry_after_s`; CancelledError if the caller
    cancelled it, `RequestCancelled` if the service did. `outcome()` tells the same as a value.
    `cancel()` gives the request up, at the latest after the step that it is in; a reader that
    stops reading does not.

    Attributes:
        id: of the request; model: the name of the one that was asked.
        ended: how it went and how long it took; None before that is known.
    """

    def __init__(
        self,
        id: str,
        model: str,
        give_up: Callable[[Answer[Any]], None],
        reader: Callable[[], Reader] | None = None,
    ) -> None:
        super().__init__()
        self.id = id
        self.model = model
        self.ended: Result | None = None
        self._give_up = give_up
        self._reader = reader
        self._came: list[Emitted] = []
        self._through: list[tuple[int, LegEnded]] = []
        self._told: list[Callable[[Emitted], None]] = []
        self._news = threading.Condition()
        self._listeners: set[Callable[[], None]] = set()
        super().add_done_callback(_tell)

    @property
    def outputs(self) -> Sequence[Emitted]:
        """The outputs that came so far, as the engine told them; none where nothing streams."""
        return tuple(self._came)

    @property
    def legs(self) -> Sequence[LegEnded]:
        """The calls and tools of an agent's run that it is through so far, in that order."""
        return tuple([leg for _, leg in self._through])

    def cancel(self) -> bool:
        """Give the request up; False if it is over."""
        cancelled = super().cancel()
        if cancelled and self.ended is None:
            self._give_up(self)
        return cancelled

    def add_done_callback(self, fn: Callable[[Future[T]], object]) -> None:
        """Have `fn` called with this once it is done.

        On the service's thread; on the event loop's if it is added there, as `asyncio.wait` does.
        """
        super().add_done_callback(_on_its_loop(fn))

    def remove_done_callback(self, fn: Callable[[Future[T]], object]) -> int:
        """Have `fn` not called; how often it would have been."""
        with self._condition:
            known: list[Any] = self._done_callbacks  # type: ignore[attr-defined]
            kept = [one for one in known if fn not in (one, getattr(one, "__wrapped__", one))]
            gone = len(known) - len(kept)
            known[:] = kept
        return gone

    def outcome(self, timeout: float | None = None) -> Outcome[T]:
        """Wait, and say how it went; TimeoutError after `timeout` seconds, nothing else."""
        try:
            error = self.exception(timeout)
        except CancelledError as cancelled:
            error = RequestCancelled(
                f"request {self.id!r} was cancelled by the caller", reason="cancelled by the caller"
            )
            error.__cause__ = cancelled
        ended = self.ended
        latency_s, on_time = (0.0, False) if ended is None else (ended.latency_s, ended.on_time)
        if error is None:
            value = self.result()
            return Outcome(self.id, "done", value, latency_s=latency_s, on_time=on_time)
        if not isinstance(error, RequestError):
            kind = RequestError if ended is None else RequestFailed
            known = kind(told(error))
            known.__cause__ = error
        else:
            known = error
        return Outcome(
            self.id,
            known.status,
            reason=known.reason,
            code=known.code,
            retry_after_s=known.retry_after_s,
            latency_s=latency_s,
            error=error,
        )

    def __await__(self) -> Generator[Any, None, T]:
        return asyncio.wrap_future(self).__await__()

    # -- reading ----------------------------------------------------------------------------------

    def __iter__(self) -> Iterator[Any]:
        return self._read(self.reader())

    def __aiter__(self) -> AsyncIterator[Any]:
        self.reader()  # it raises where nothing streams, not only once somebody waits
        return self._read_async()

    @property
    def streams(self) -> bool:
        """Whether there are outputs to be read while they come."""
        return self._reader is not None

    def reader(self) -> Reader:
        """What reads its outputs, all of them in order; TypeError if nothing streams."""
        if self._reader is None:
            raise TypeError(f"request {self.id!r}: nothing streams; its result comes as a whole")
        return self._reader()

    def _read(self, item_of: Reader) -> Iterator[Any]:
        index = 0
        while True:
            with self._news:
                while len(self._came) == index and not self.done():
                    self._news.wait()
            if index == len(self._came):
                self.result()  # raises what went wrong
                return
            yield item_of(self._came[index])
            index += 1

    async def _read_async(self) -> AsyncIterator[Any]:
        news = asyncio.Event()
        feed = Feed(self, news.set)
        try:
            while True:
                news.clear()
                came = feed.take()
                for item in came:
                    yield item
                if feed.over:
                    return
                if not came:
                    await news.wait()
        finally:
            feed.close()

    async def happenings(self) -> AsyncIterator[Any]:
        """What `async for` gives, and a `LegEnded` wherever it is through a call or a tool."""
        read, news = self.reader(), asyncio.Event()
        bell = Bell.here()

        def ring() -> None:
            bell.ring(news.set)

        self.tell(ring)
        outputs = legs = 0
        try:
            while True:
                news.clear()
                over = self.done()  # asked first: what came last is there before the end
                with self._news:
                    came, through = self._came[outputs:], self._through[legs:]
                outputs, legs = outputs + len(came), legs + len(through)
                for happened in _in_order(came, through, outputs - len(came)):
                    yield happened if isinstance(happened, LegEnded) else read(happened)
                if over:
                    self.result()  # raises what went wrong
                    return
                if not (came or through):
                    await news.wait()
        finally:
            self.tell_no_more(ring)

    # -- for feeds --------------------------------------------------------------------------------

    @property
    def count(self) -> int:
        """How many outputs came so far."""
        return len(self._came)

    def since(self, index: int) -> Sequence[Emitted]:
        """The outputs from the one at `index` on."""
        return self._came[index:]

    def tell(self, listener: Callable[[], None]) -> None:
        """Have `listener` called at each output and at the end, on the service's thread; it must not raise."""
        with self._news:
            self._listeners.add(listener)

    def tell_no_more(self, listener: Callable[[], None]) -> None:
        """Have `listener` called no more."""
        with self._news:
            self._listeners.discard(listener)

    # -- called by the service --------------------------------------------------------------------

    def push(self, output: Emitted) -> None:
        """The next output, on the engine's thread."""
        with self._news:
            self._came.append(output)
            for tell in self._told:
                tell(output)
        self._tell()

    def leg(self, record: LegEnded) -> None:
        """It is through a call or a tool, on the engine's thread."""
        with self._news:
            self._through.append((len(self._came), record))
        self._tell()

    def follow(self, tell: Callable[[Emitted], None]) -> None:
        """Have `tell` called with each output, from the first one on."""
        with self._news:
            for output in self._came:
                tell(output)
            self._told.append(tell)

    def settle(self, done: Future[Result], value: Callable[[Result, Sequence[Emitted]], T]) -> None:
        """Answer as the engine did; `value` makes what the caller gets of it, or raises."""
        self._give_up = _nothing
        error = done.exception()
        if error is None:
            self.ended = done.result()
        if not self.set_running_or_notify_cancel():
            return  # its caller cancelled it
        if error is not None:
            self.set_exception(error)
            return
        try:
            found = value(done.result(), self._came)
        except RequestError as ended:
            self.set_exception(ended.with_traceback(None))  # its frames are ours, and know this answer
        except Exception as failed:  # noqa: BLE001  the answer raises it
            self.set_exception(failed)
        else:
            self.set_result(found)

    def refuse(self, error: BaseException) -> None:
        """Answer with an error before the engine has had the request itself."""
        self._give_up = _nothing
        if self.set_running_or_notify_cancel():
            self.set_exception(error.with_traceback(None) if isinstance(error, RequestError) else error)

    def _tell(self) -> None:
        with self._news:
            self._news.notify_all()
            listeners = list(self._listeners)
        for listener in listeners:
            listener()


def _in_order(
    came: Sequence[Emitted], through: Sequence[tuple[int, LegEnded]], first: int
) -> Iterator[Emitted | LegEnded]:
    """Outputs, the first of which has the number `first`, and legs, each behind as many outputs as were there."""
    rest = list(reversed(through))
    for number, output in enumerate(came, first):
        while rest and rest[-1][0] <= number:
            yield rest.pop()[1]
        yield output
    for _, leg in reversed(rest):
        yield leg
