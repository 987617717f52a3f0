"""Members that leave: what becomes of their requests."""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import Future
from typing import TYPE_CHECKING

from neustream.core.batch import StepInput, input_of
from neustream.core.carry import Carry, pack
from neustream.core.entry import Entry
from neustream.engine.events import Unfit
from neustream.engine.executor import Mover
from neustream.engine.packing import Packing, Parcel, Places, has_room, held, movable
from neustream.engine.worker import Pieces
from neustream.errors import NeustreamError, told

if TYPE_CHECKING:
    from neustream.engine.loop import Loop
    from neustream.engine.member import Drive

log = logging.getLogger(__name__)


class Departures:
    """Moves the requests of members that leave to others, at step boundaries.

    A request that has not begun goes without anything; one that has begun with what the executors
    keep of it, if all of them can part with that. A request that nobody else can take ends where it
    is.
    """

    def __init__(self, loop: Loop, packing: Packing) -> None:
        self._loop = loop
        self._packing = packing
        self._answers: dict[Drive, Future[None]] = {}
        self.resolve: Callable[[Future[None], None], None] = Future.set_result
        loop.handlers[Unfit] = self._unfit

    def begin(self, drive: Drive, answer: Future[None], now: float) -> None:
        """`drive` takes no more requests; `answer` is for when its last one is gone or over."""
        drive.leaving = True
        self._loop.touch(drive)
        self._answers[drive] = answer
        for id in drive.scheduler.requests:
            drive.scheduler.hold(id, now)

    def settle(self) -> None:
        """Members that have no requests any more are gone."""
        if not self._answers:
            return
        for drive in [drive for drive in self._answers if not drive.scheduler.busy]:
            self._loop.drop(drive)
            self.resolve(self._answers.pop(drive), None)

    def held(self, drive: Drive, id: str, now: float) -> None:
        """A request of a member that leaves waits at a step boundary."""
        job = held(drive, id)
        if job is None:
            return
        if not self._loop.others(job.request, drive):
            drive.scheduler.resume(id)
        elif job.started_at is None:
            self._move(Parcel(drive, id, self._packed), now)
        elif movable(drive):
            self._packing.begin(Parcel(drive, id, self._packed), input_of(job), now)
        else:
            drive.scheduler.resume(id)

    # -- moving -----------------------------------------------------------------------------------

    def _packed(self, parcel: Parcel, now: float) -> None:
        if parcel.failed:
            log.info("request %r stays with %r: %s", parcel.id, parcel.source.name, parcel.failed)
            self._stay(parcel)
        else:
            self._move(parcel, now)

    def _stay(self, parcel: Parcel) -> None:
        """Let a request go on where it is, if it is still there."""
        if held(parcel.source, parcel.id) is not None:
            self._loop.touch(parcel.source)
            parcel.source.scheduler.resume(parcel.id)

    def _move(self, parcel: Parcel, now: float) -> None:
        """Let the member that the router chooses take a request, or another; else it stays."""
        source, id = parcel.source, parcel.id
        job = held(source, id)
        if job is None:
            return
        pieces = parcel.kept
        able = [
            drive for drive in self._loop.others(job.request, source) if has_room(drive, pieces)
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
