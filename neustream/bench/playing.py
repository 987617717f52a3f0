"""A plan, played: each request is sent when it is due, whatever became of those before it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import asdict
from typing import Any, Protocol

from neustream.bench.hearing import fail
from neustream.bench.plan import Plan
from neustream.bench.records import Record
from neustream.engine.clock import stopwatch
from neustream.errors import ConfigError
from neustream.workload.asks import Ask, Prompt

Turns = tuple[tuple[str, str], ...]
"""What was asked and answered before, of a conversation."""
Tick = Callable[[Record], None]
AHEAD = 100
"""Turns that are looked at while the ones before them go on, beyond the number of places."""


class Sender(Protocol):
    """Who puts a request to a server: `neustream.bench.client.Client`."""

    async def send(self, ask: Ask, before: Turns, record: Record) -> str:
        """Ask, fill the record, and return what was generated."""
        ...


class Player:
    """Plays a plan by a sender.

    Args:
        start: the instant (`stopwatch`) that the plan's arrivals count from.
        retries: see `Target`.
        tick: called for each request that is over.
    """

    def __init__(
        self,
        plan: Plan,
        sender: Sender,
        start: float,
        *,
        retries: int = 0,
        tick: Tick = lambda record: None,
    ) -> None:
        self._plan = plan
        self._sender = sender
        self._start = start
        self._retries = retries
        self._tick = tick
        self._records: list[Record] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._fault: BaseException | None = None
        self._ends: dict[str, asyncio.Future[tuple[Turns | None, float]]] = {}
        self._closed = not plan.scheduled
        places = plan.concurrency or (len(plan.asks) if self._closed else None)
        self._places = asyncio.Semaphore(places) if places else None
        self._ahead = AHEAD + (places or 0)
        self._parked: set[asyncio.Task[None]] = set()
        self._ready: asyncio.Queue[Ask] = asyncio.Queue()
        self.interrupted = False

    async def play(self) -> list[Record]:
        """Send all and wait for all; the records, by scheduled arrival.

        Cancelled meanwhile, it interrupts what is under way, and returns what there is.
        """
        try:
            await (self._in_places() if self._closed else self._on_schedule())
            while self._tasks and self._fault is None:
                await asyncio.wait(self._tasks, return_when=asyncio.FIRST_COMPLETED)
        except asyncio.CancelledError:
            self.interrupted = True
        await self._stop()
        if self._fault is not None:
            raise self._fault
        return sorted(self._records, key=lambda record: record.scheduled_s)

    async def _stop(self) -> None:
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)

    def _now(self) -> float:
        return stopwatch() - self._start

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._over)
        return task

    def _over(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (fault := task.exception()) is not None:
            self._fault = self._fault or fault

    # -- open: by schedule ------------------------------------------------------------------------

    async def _on_schedule(self) -> None:
        """Begin with each request at its instant; before each, others get their turn."""
        for ask in self._plan.asks:
            due = ask.arrival_s or 0.0
            await asyncio.sleep(max(0.0, due - self._now()))
            while (left := due - self._now()) > 0:
                await asyncio.sleep(left)
            if self._fault is not None:
                return
            self._open(ask)
            self._spawn(self._scheduled(ask, due))

    async def _scheduled(self, ask: Ask, due: float) -> None:
        record = record_of(ask, due)
        self._records.append(record)
        before = await self._turns(ask, record)
        if before is None:
            return
        if self._places is None:
            await self._send(ask, before, record)
            return
        try:
            async with self._places:
                record.waited_s = max(0.0, self._now() - record.scheduled_s)
                await self._send(ask, before, record)
        except asyncio.CancelledError:
            fail(record, "interrupted", "interrupted")
            raise

    # -- closed: as many at once as there are places ----------------------------------------------

    async def _in_places(self) -> None:
        """The next in order begins when there is a place."""
        assert self._places is not None
        asks = iter(self._plan.asks)
        await asyncio.sleep(max(0.0, -self._now()))
        while self._fault is None:
            await self._places.acquire()
            ask = await self._next(asks)
            if ask is None or self._late():
                break
            self._open(ask)
            self._spawn(self._placed(ask))
            await asyncio.sleep(0)
        for task in self._parked:
            task.cancel()

    def _late(self) -> bool:
        return self._plan.duration_s is not None and self._now() >= self._plan.duration_s

    async def _next(self, asks: Iterator[Ask]) -> Ask | None:
        """The next request that may begin: a turn may once the one before it is over."""
        while self._ready.empty() and len(self._parked) < self._ahead:
            ask = next(asks, None)
            if ask is None:
                break
            if not ask.follows:
                return ask
            task = self._spawn(self._park(ask, self._end_of(ask)))
            self._parked.add(task)
            task.add_done_callback(self._parked.discard)
            await asyncio.sleep(0)  # it may be over already
        if self._ready.empty() and not self._parked:
            return None
        return await self._ready.get()

    async def _park(self, ask: Ask, end: asyncio.Future[tuple[Turns | None, float]]) -> None:
        self._open(ask)  # others may follow it
        _, ended = await asyncio.shield(end)
        await asyncio.sleep(max(0.0, ended + ask.think_s - self._now()))
        self._ready.put_nowait(ask)

    async def _placed(self, ask: Ask) -> None:
        assert self._places is not None
        record = record_of(ask, self._now())
        self._records.append(record)
        try:
            before = await self._turns(ask, record)
            if before is not None:
                await self._send(ask, before, record)
        finally:
            self._places.release()

    # -- one request ------------------------------------------------------------------------------

    def _open(self, ask: Ask) -> None:
        """A turn of a conversation has an end that others may wait for."""
        if ask.session and ask.id not in self._ends:
            self._ends[ask.id] = asyncio.get_running_loop().create_future()

    def _end_of(self, ask: Ask) -> asyncio.Future[tuple[Turns | None, float]]:
        """The end of the turn before it, which must have come before it."""
        found = self._ends.get(ask.follows)
        if found is None:
            raise ConfigError(
                f"plan {self._plan.name!r}: {ask.id!r} follows {ask.follows!r}; "
                "expected a request of a session that comes before it"
            )
        return found

    async def _turns(self, ask: Ask, record: Record) -> Turns | None:
        """The conversation before it, once the turn before it is over; None: that one failed."""
        if not ask.follows:
            return ()
        try:
            before, ended = await asyncio.shield(self._end_of(ask))
            due = ended + ask.think_s
            while (left := due - self._now()) > 0:
                await asyncio.sleep(left)
        except asyncio.CancelledError:
            self._records.remove(record)  # it was not due yet
            raise
        record.scheduled_s = max(record.scheduled_s, due)
        if before is None:
            fail(record, "blocked", f"the turn before it, {ask.follows!r}, failed")
            self._end(ask, None, record)
        return before

    async def _send(self, ask: Ask, before: Turns, record: Record) -> None:
        text = await self._sender.send(ask, before, record)
        for _ in range(self._retries):
            if record.done:
                break
            self._again(ask, record)
            text = await self._sender.send(ask, before, record)
        after = (*before, (as_text(ask.prompt), text)) if record.done else None
        self._end(ask, after, record)

    def _again(self, ask: Ask, record: Record) -> None:
        """Forget how it went, but not when it was to come."""
        fresh = record_of(ask, record.scheduled_s)
        fresh.waited_s, fresh.retries = record.waited_s, record.retries + 1
        for name, value in vars(fresh).items():
            setattr(record, name, value)

    def _end(self, ask: Ask, turns: Turns | None, record: Record) -> None:
        end = self._ends.get(ask.id)
        if end is not None and not end.done():
            end.set_result((turns, self._now()))
        self._tick(record)


def as_text(prompt: Prompt) -> str:
    """A prompt for who takes no ids of tokens."""
    return prompt if isinstance(prompt, str) else " ".join(map(str, prompt))


def record_of(ask: Ask, scheduled_s: float) -> Record:
    """The record of a request that nothing has become of yet."""
    image = (
        {} if ask.image is None else {k: v for k, v in asdict(ask.image).items() if v is not None}
    )
    return Record(
        ask.id,
        "text" if ask.image is None else "image",
        scheduled_s=scheduled_s,
        asked_tokens=ask.output_tokens,
        input_tokens=ask.input_tokens,
        image=image,
        limits=ask.limits,
        slo_class=ask.slo_class,
        session=ask.session,
        model=ask.model,
        params=dict(ask.params),
    )
