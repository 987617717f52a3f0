"""A plan put to a server over HTTP, by this process or by several."""

from __future__ import annotations

import asyncio
import gc
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from itertools import cycle
from multiprocessing.connection import Connection
from typing import Any, Protocol

from neustream.bench.client import Client
from neustream.bench.plan import Plan, Target
from neustream.bench.playing import Player, Tick
from neustream.bench.records import Record
from neustream.bench.runs import Run
from neustream.engine.clock import epoch, stopwatch
from neustream.errors import BackendError

try:
    import resource
except ImportError:  # not on Windows
    resource = None  # type: ignore[assignment]

LEAD_S = 0.05
"""From when all is ready to the load's start."""
READY_S = 60.0
"""The longest that a process of the client may take until it is ready."""
THRESHOLDS = (50_000, 20, 50)
"""Of the garbage collector, which would stop the client for milliseconds more often."""


class Counting(Protocol):
    """Makes a counter of tokens, in the process that needs one; can be pickled."""

    def __call__(self) -> Callable[[str], int]: ...


@dataclass(frozen=True)
class Options:
    """How a client works: its processes; who counts tokens (None: events); texts kept or not."""

    workers: int = 1
    counting: Counting | None = None
    keep: bool = False


@dataclass
class _Part:
    """What one process did."""

    records: list[Record]
    cpu_s: float
    interrupted: bool


class Load:
    """A plan and who it is put to; `run` does it once.

    Args:
        tick: called for each request that is over, if the client is one process.
    """

    def __init__(
        self,
        plan: Plan,
        target: Target,
        options: Options | None = None,
        tick: Tick = lambda record: None,
    ) -> None:
        self._plan = plan
        self._target = target
        self._options = options or Options()
        self._tick = tick
        self._stop: Callable[[], None] = lambda: None
        self._interrupted = False

    def interrupt(self) -> None:
        """End it early, from any thread or a signal handler."""
        self._interrupted = True
        self._stop()

    def run(self) -> Run:
        """Send all requests of the plan, and wait for all.

        Raises:
            BackendError: a process of the client died.
        """
        began = epoch()
        workers = min(self._options.workers, len(self._plan.asks), self._plan.concurrency or 10**9)
        if workers > 1:
            parts = self._several(workers)
        else:
            parts = [_play(self._plan, self._target, self._options, None, self._tick, self._watch)]
        records = [record for part in parts for record in part.records]
        records.sort(key=lambda record: record.scheduled_s)
        cpu_s = sum(part.cpu_s for part in parts)
        events = sum(len(record.token_times_s) for record in records)
        return Run(
            self._plan.name,
            records,
            self._plan.about(),
            shown_target(self._target),
            began,
            max((record.end_s or 0.0 for record in records), default=0.0),
            any(part.interrupted for part in parts),
            {"processes": len(parts), "cpu_s": cpu_s, "events": events},
        )

    def _watch(self, stop: Callable[[], None]) -> None:
        self._stop = stop
        if self._interrupted:
            stop()

    def _several(self, workers: int) -> list[_Part]:
        context = multiprocessing.get_context("spawn")
        pipes, children = [], []
        for plan in split(self._plan, workers):
            ours, theirs = context.Pipe()
            args = (theirs, plan, self._target, self._options)
            children.append(context.Process(target=_child, args=args, daemon=True))
            children[-1].start()
            theirs.close()
            pipes.append(ours)
        try:
            for pipe in pipes:
                if not pipe.poll(READY_S) or _received(pipe) is not None:
                    raise BackendError(f"a process of the client was not ready in {READY_S:g} s")
            start = stopwatch() + LEAD_S
            for pipe in pipes:
                pipe.send(start)
            self._watch(lambda: _tell_to_stop(pipes))
            return [_received(pipe) for pipe in pipes]
        finally:
            self._stop = lambda: None
            for pipe in pipes:
                pipe.close()
            for child in children:
                child.join(1.0)
                child.kill()
                child.join()


def shown_target(target: Target) -> dict[str, Any]:
    """A target for the files of results: without the values of headers, which may be keys."""
    return {**asdict(target), "headers": sorted(target.headers)}


def split(plan: Plan, parts: int) -> list[Plan]:
    """A plan shared out: conversations stay together, a bound on concurrency is divided."""
    shares: list[list[Any]] = [[] for _ in range(parts)]
    turns = cycle(range(parts))
    homes: dict[str, int] = {}
    for ask in plan.asks:
        home = homes.get(ask.follows)
        homes[ask.id] = next(turns) if home is None else home
        shares[homes[ask.id]].append(ask)
    bounds: Sequence[int | None] = [None] * parts
    if plan.concurrency is not None:
        each, more = divmod(plan.concurrency, parts)
        bounds = [each + (part < more) for part in range(parts)]
    return [
        replace(plan, asks=asks, concurrency=bound)
        for asks, bound in zip(shares, bounds, strict=True)
    ]


def _received(pipe: Connection) -> Any:
    try:
        return pipe.recv()
    except EOFError:
        raise BackendError("a process of the client died") from None


def _tell_to_stop(pipes: Sequence[Connection]) -> None:
    for pipe in pipes:
        try:
            pipe.send("stop")
        except OSError:  # it is done, or gone
            continue


def _child(pipe: Connection, plan: Plan, target: Target, options: Options) -> None:
    """A process of the client: ready, start, records."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent sees to it
    pipe.send(None)
    start = pipe.recv()

    def watch(stop: Callable[[], None]) -> None:
        def listen() -> None:
            try:
                pipe.recv()
            except (EOFError, OSError):
                return
            stop()

        threading.Thread(target=listen, daemon=True).start()

    pipe.send(_play(plan, target, options, start, lambda record: None, watch))


def _play(
    plan: Plan,
    target: Target,
    options: Options,
    start: float | None,
    tick: Tick,
    watch: Callable[[Callable[[], None]], None],
) -> _Part:
    """Play a plan here; `watch` is given what ends it early."""
    count = options.counting() if options.counting is not None else None
    _raise_limit()
    with _quiet_collector():
        start = stopwatch() + LEAD_S if start is None else start
        before = os.times()
        client = Client(target, start, count=count, keep=options.keep)
        player = Player(plan, client, start, retries=target.retries, tick=tick)
        records = asyncio.run(_watched(player, client, watch))
        after = os.times()
    cpu_s = after.user + after.system - before.user - before.system
    return _Part(records, cpu_s, player.interrupted)


async def _watched(
    player: Player, client: Client, watch: Callable[[Callable[[], None]], None]
) -> list[Record]:
    loop = asyncio.get_running_loop()
    playing = loop.create_task(player.play())

    def stop() -> None:
        try:
            loop.call_soon_threadsafe(playing.cancel)
        except RuntimeError:  # the loop is closed: all is over
            return

    watch(stop)
    async with client:
        return await playing


def _raise_limit() -> None:
    """As many connections as the system lets this process have; by default it is often 1,024."""
    if resource is None:
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


@contextmanager
def _quiet_collector() -> Any:
    before = gc.get_threshold()
    gc.collect()
    gc.freeze()
    gc.set_threshold(*THRESHOLDS)
    try:
        yield
    finally:
        gc.set_threshold(*before)
        gc.unfreeze()
