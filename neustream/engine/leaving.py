"""Members that leave: what becomes of their requests."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from neustream.core.batch import StepInput, input_of
from neustream.core.carry import Carry, pack
from neustream.core.job import Entry
from neustream.engine.events import Packed, Unfit, Unpacked
from neustream.engine.executor import Mover
from neustream.engine.worker import Pieces
from neustream.errors import NeustreamError, told

if TYPE_CHECKING:
    from neustream.engine.loop import Loop
    from neustream.engine.member import Drive

log = logging.getLogger(__name__)

Places = Mapping[str, Pieces]
"""What executors keep of a request, by pool."""


@dataclass(eq=False)
class Parcel:
    """A request that is about to leave `source`; `pieces` come from its executors."""

    source: Drive
    id: str
    left: int = 0
    failed: str = ""
    pieces: dict[str, dict[str, Any]] = field(default_factory=dict)


class Departures:
    """Moves the requests of members that leave to others, at step boundaries.

    A request that has not begun goes without anything; one that has begun with what the executors
    keep of it, if all of them can part with that. A request that nobody else can take ends where it
    is.
    """

    def __init__(self, loop: Loop) -> None:
        self._loop = loop
        self._parcels: dict[tuple[Drive, str], Parcel] = {}
        self._answers: dict[Drive, Future[None]] = {}
        self.resolve: Callable[[Future[None], None], None] = Future.set_result
        loop.handlers |= {
            Packed: self._packed,
            Unpacked: self._unpacked,
            Unfit: self._unfit,
        }

    def begin(self, drive: Drive, answer: Future[None], now: float) -> None:
        """`drive` takes no more requests; `answer` is for when its last one is gone or over."""
        drive.departures = self
        self._loop.touch(drive)
        self._answers[drive] = answer
        for id in list(drive.scheduler.jobs):
            drive.scheduler.hold(id, now)

    def settle(self) -> None:
        """Members that have no requests any more are gone."""
        for drive in [drive for drive in self._answers if not drive.scheduler.jobs]:
            self._loop.drop(drive)
            self.resolve(self._answers.pop(drive), None)

    def held(self, drive: Drive, id: str, now: float) -> None:
        """A request of a member that leaves waits at a step boundary."""
        job = _held(drive, id)
        if job is None:
            return
        if not self._loop.others(job.request, drive):
            drive.scheduler.resume(id)
        elif job.started_at is None:
            self._move(Parcel(drive, id), now)
        elif _movable(drive):
            self._pack(drive, input_of(job), now)
        else:
            drive.scheduler.resume(id)

    def give_up(self, drive: Drive) -> None:
        """A worker is lost, with what it would have handed over: what waits for that stays."""
        for place, parcel in list(self._parcels.items()):
            if parcel.source is drive:
                del self._parcels[place]
                self._stay(parcel)

    # -- packing ----------------------------------------------------------------------------------

    def _pack(self, drive: Drive, given: StepInput, now: float) -> None:
        """Ask all workers for what they keep of a request."""
        parcel = self._parcels[drive, given.id] = Parcel(drive, given.id)
        asked: list[tuple[str, Future[Pieces]]] = []
        for name, executor in drive.executors.items():
            assert isinstance(executor, Mover)
            for worker in range(drive.scheduler.pools[name].workers):
                try:
                    asked.append((name, executor.export(given, worker)))
                except NeustreamError as error:
                    parcel.failed = told(error)
        parcel.left = len(asked)
        for name, pieces in asked:
            pieces.add_done_callback(partial(self._post, parcel, name))
        if not asked:
            self._stay(parcel)
        elif drive.patience_s < math.inf and not all(pieces.done() for _, pieces in asked):
            self._loop.clock.post(Unpacked(parcel), now + drive.patience_s)

    def _post(self, parcel: Parcel, pool: str, pieces: Future[Pieces]) -> None:
        """On whatever thread: hand a worker's answer to the loop."""
        clock = self._loop.clock
        clock.post(Packed(parcel, pool, pieces), clock.now())

    def _packed(self, event: Packed, now: float) -> None:
        parcel = event.parcel
        error = event.pieces.exception()
        if error is not None:
            parcel.failed = told(error)
        else:
            parcel.pieces.setdefault(event.pool, {}).update(event.pieces.result())
        parcel.left -= 1
        place = parcel.source, parcel.id
        if parcel.left or self._parcels.get(place) is not parcel:
            return
        del self._parcels[place]
        if parcel.failed:
            log.info("request %r stays with %r: %s", parcel.id, parcel.source.name, parcel.failed)
            self._stay(parcel)
        else:
            self._move(parcel, now)

    def _unpacked(self, event: Unpacked, now: float) -> None:
        """A module's `export` does not come back: the request goes on without it."""
        parcel = event.parcel
        if self._parcels.get((parcel.source, parcel.id)) is parcel:
            del self._parcels[parcel.source, parcel.id]
            log.error("request %r stays: nobody told in time what is kept of it", parcel.id)
            self._stay(parcel)

    # -- moving -----------------------------------------------------------------------------------

    def _stay(self, parcel: Parcel) -> None:
        """Let a request go on where it is, if it is still there."""
        if _held(parcel.source, parcel.id) is not None:
            self._loop.touch(parcel.source)
            parcel.source.scheduler.resume(parcel.id)

    def _move(self, parcel: Parcel, now: float) -> None:
        """Let the member that the router chooses take a request, or another; else it stays."""
        source, id = parcel.source, parcel.id
        job = _held(source, id)
        if job is None:
            return
        pieces = {name: kept for name, kept in parcel.pieces.items() if kept}
        able = [
            drive for drive in self._loop.others(job.request, source) if _has_room(drive, pieces)
        ]
        carry = pack(job, now)
        while able:
            target = self._loop.chosen(able, job.request)
            self._loop.touch(target)
            if self._take(target, carry, job, pieces, now):
                self._loop.touch(source)
                source.scheduler.give(id, now)
                return
            able.remove(target)
        self._stay(parcel)

    def _take(self, target: Drive, carry: Carry, job: Entry, pieces: Places, now: float) -> bool:
        """Whether `target` took a request, with what was kept of it or, where KV blocks lack,
        without that."""
        for cached in (True, False) if pieces else (False,):
            try:
                target.scheduler.take(carry, job.request.graph, now, cached=cached)
            except NeustreamError as error:
                log.info("request %r cannot go to %r: %s", carry.id, target.name, told(error))
                continue
            if cached or job.stage is None or not job.stage.caches:
                for pool, kept in pieces.items():
                    self._adopt(target, pool, carry.input(), kept)
            return True
        return False

    def _adopt(self, target: Drive, pool: str, given: StepInput, pieces: Pieces) -> None:
        """Hand what was kept of a request to the worker of `target`, before its next step there."""
        executor = target.executors[pool]
        assert isinstance(executor, Mover)

        def told_back(done: Future[None]) -> None:
            error = done.exception()
            if error is not None:
                clock = self._loop.clock
                clock.post(Unfit(target, given.id, told(error)), clock.now())

        executor.adopt(given, pieces).add_done_callback(told_back)

    def _unfit(self, event: Unfit, now: float) -> None:
        """A member could not go on from what another one kept of a request."""
        self._loop.touch(event.drive)
        event.drive.scheduler.give_up(event.id, event.reason, now)


def _held(drive: Drive, id: str) -> Entry | None:
    """The request, if it waits to be given."""
    job = drive.scheduler.jobs.get(id)
    return job if isinstance(job, Entry) and job.status == "held" else None


def _movable(drive: Drive) -> bool:
    """Whether all workers can be asked for what they keep, and will answer."""
    able = all(isinstance(executor, Mover) for executor in drive.executors.values())
    return able and not any(drive.lost(pool) for pool in drive.executors)


def _has_room(drive: Drive, pieces: Places) -> bool:
    """Whether what was kept of a request finds the worker that will ask for it: the only one."""
    pools = drive.scheduler.pools
    return all(
        name in pools and pools[name].workers == 1 and isinstance(drive.executors[name], Mover)
        for name in pieces
    )
