"""The one loop: it feeds schedulers with what happens, and starts the steps that they choose.

Simulating and serving differ in `clock` and `executors`, nowhere else. Where requests come from is
the business of `replay.py` (a workload) and `engine.py` (callers); what is done for each scheduler
that of `member.py`.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import ExitStack
from typing import Any, Protocol

from neustream.core.batch import Batch
from neustream.core.events import Ended, Left, Submitted
from neustream.core.profile import LatencyProfile
from neustream.core.types import Request
from neustream.engine.clock import Clock
from neustream.engine.crossing import Crossing
from neustream.engine.events import Call, Done, Event, Look, Observer, Overdue, Record, Wake
from neustream.engine.leaving import Departures
from neustream.engine.member import Drive, Member
from neustream.engine.packing import Packing
from neustream.engine.routing import Router
from neustream.errors import PolicyError, RequestError, shown

log = logging.getLogger(__name__)


class Source(Protocol):
    """Where requests come from."""

    @property
    def over(self) -> bool:
        """Whether no more will come."""
        ...


class Loop:
    """Drives members on one clock.

    Args:
        members: what is driven; their names differ.
        clock: virtual or wall.
        router: chooses the member that a request goes to, where several can serve it.
        step_timeout_s: see `Limits`.

    Attributes:
        drives: what is done for each member; observers: told of every record. One that raises is
            removed, and the log says so. ending: whether no more requests come.
    """

    def __init__(
        self,
        members: Sequence[Member],
        clock: Clock,
        router: Router,
        observers: Sequence[Observer] = (),
        step_timeout_s: float | None = None,
    ) -> None:
        names = [member.name for member in members]
        if not names or len(set(names)) < len(names):
            raise RequestError(f"an engine needs members with different names, got {names}")
        self.clock = clock
        self.router = router
        self.observers = list(observers)
        self._steps: dict[Batch, Drive] = {}
        self._step_timeout_s = step_timeout_s
        self.drives: list[Drive] = []
        self.handlers: dict[type[Any], Callable[[Any, float], None]] = {
            Done: self._done,
            Wake: lambda event, now: self.touch(event.drive),
            Look: self._look,
            Overdue: self._overdue,
            Call: lambda event, now: event.what(now),
        }
        self._touched: dict[Drive, None] = {}  # members that something happened to
        self.packing = Packing(self)
        self.departures = Departures(self, self.packing)
        self.crossing = Crossing(self, self.packing)
        self.ending = False
        self._records: list[Record] = []  # what observers are still to be told
        self._guest: int | None = None  # the thread that takes a turn in place of its own
        for member in members:
            self.add(member)

    @property
    def open(self) -> int:
        """Requests that have not ended."""
        return sum([len(drive.scheduler.requests) for drive in self.drives])

    @property
    def busy(self) -> bool:
        """Whether there are any."""
        return any(drive.scheduler.busy for drive in self.drives)

    def touch(self, drive: Drive) -> None:
        """Something happens to a member: it takes its turn once all events are taken in."""
        self._touched[drive] = None

    # -- running ----------------------------------------------------------------------------------

    def run(self, source: Source) -> None:
        """Until `source` is over and all requests have ended."""
        while not source.over or self.busy:
            events = self.clock.wait()
            if not events:
                raise RequestError(f"{self.open} request(s) are open, but nothing will ever happen")
            self.turn(events)
            del events  # while idle, hold no finished request's results

    def turn(self, events: Sequence[Event]) -> bool:
        """Take events in, start what can start, tell observers.

        Whether requests have ended, on a thread that takes the turn in place of the loop's own: who
        waited for one of these may ask for more, and where this was the last, this is over. So the
        loop's own thread has the next turn.
        """
        for event in events:
            self.handle(event)
        if self._touched:
            touched, self._touched = self._touched, {}
            for drive in touched:
                drive.turn()
        self.departures.settle()
        ended = self._guest is not None and any(
            isinstance(record, Ended) for record in self._records
        )
        self.publish()
        return ended

    def turn_for(self, source: Source, events: Sequence[Event]) -> bool:
        """A turn on another thread, while its own waits; whether that is to have the next one.

        It is to look where `source` is over: then `run` may be, too.
        """
        self._guest, begun = threading.get_ident(), self.clock.now()
        try:
            ended = self.turn(events)
        finally:
            self._guest = None
        seconds = self.clock.now() - begun
        for drive in self.drives:
            drive.put_off(begun, seconds)
        return ended or source.over

    def here(self) -> bool:
        """Whether the present thread takes a turn for its own, or is one that `close` waits for."""
        return self._guest == threading.get_ident() or any(drive.here() for drive in self.drives)

    def handle(self, event: Event) -> None:
        """Take in one event."""
        self.handlers[type(event)](event, self.clock.now())
        if self._touched:
            for drive in list(self._touched):
                drive.settle()

    def accept(self, request: Request, now: float) -> Submitted:
        """Take a request in, at the member that the router chooses; NeustreamError if none can."""
        drives = self.drives
        if len(drives) == 1:
            self.touch(drives[0])
            return drives[0].accept(request, now)
        if not drives:
            raise RequestError(f"request {request.id!r}: no member is left")
        if self.of(request.id) is not None:
            raise RequestError(f"request id {request.id!r} is already being served")
        able = [drive for drive in drives if drive.serves(request)]
        staying = [drive for drive in drives if not drive.leaving]
        chosen = self.chosen(able or (staying or drives)[:1], request)  # who cannot says why
        self.touch(chosen)
        return chosen.accept(request, now)

    def others(self, request: Request, drive: Drive) -> list[Drive]:
        """The members beside `drive` that can serve a request."""
        return [other for other in self.drives if other is not drive and other.serves(request)]

    def chosen(self, able: Sequence[Drive], request: Request) -> Drive:
        """Which of some members a request goes to; not where its steps fail, if that can be."""
        able = [drive for drive in able if not drive.ails(request)] or able
        if len(able) == 1:
            return able[0]
        loads = [drive.load() for drive in able]
        place = self.router.choose(loads, request)
        if place not in range(len(able)):
            raise PolicyError(
                f"router {type(self.router).__name__!r} chose {shown(place)} of {len(able)} members"
            )
        return able[place]

    def leave(self, name: str, answer: Future[None], now: float) -> None:
        """Have a member go; RequestError if there is none of that name that stays."""
        for drive in self.drives:
            if drive.name == name and not drive.leaving:
                self.departures.begin(drive, answer, now)
                return
        names = [drive.name for drive in self.drives if not drive.leaving]
        raise RequestError(f"no member {shown(name)}; members: {names}")

    def add(self, member: Member) -> Drive:
        """One more member, of a name that no other has."""
        drive = Drive(member, self.clock, self.tell, self._steps, self._step_timeout_s)
        drive.held, drive.left, drive.lost_one = self._held, self._left, self.packing.give_up
        self.drives.append(drive)
        return drive

    def drop(self, drive: Drive) -> None:
        """A member is gone; its threads end by themselves."""
        self.drives = [other for other in self.drives if other is not drive]
        try:
            with ExitStack() as closing:
                drive.close(closing, wait=False)
        except Exception:
            log.exception("member %r: an executor could not be closed", drive.name)

    def of(self, id: str) -> Drive | None:
        """Where a request is being served; None if it is not."""
        for drive in self.drives:
            if id in drive.scheduler.jobs:
                return drive
        return None

    def extend(
        self,
        pool: str,
        profiles: Mapping[str, LatencyProfile],
        away: Mapping[str, LatencyProfile],
        member: str | None = None,
    ) -> None:
        """Serve more stages on `pool` of a member; None: of each that has such a pool."""
        for drive in self._having(pool, member):
            self.touch(drive)
            drive.scheduler.add(pool, profiles, away)

    def retire(self, pool: str, stages: Sequence[str], member: str | None = None) -> None:
        """Forget stages of `pool`, of the same members; RequestError while they are needed."""
        drives = self._having(pool, member)
        for drive in drives:
            drive.scheduler.check_unused(pool, stages)
        for drive in drives:
            drive.scheduler.remove(pool, stages)

    def _having(self, pool: str, member: str | None) -> list[Drive]:
        """The members that are meant, as far as they have a pool; who has none is to say so."""
        drives = [drive for drive in self.drives if member in (None, drive.name)]
        if not drives:
            names = [drive.name for drive in self.drives]
            raise RequestError(f"no member {shown(member)}; members: {names}")
        having = [drive for drive in drives if pool in drive.scheduler.pools]
        return having or drives[:1]

    def cancel_all(self, now: float) -> None:
        """End all open requests as cancelled."""
        for drive in self.drives:
            self.touch(drive)
            for id in drive.scheduler.requests:
                drive.scheduler.cancel(id, now)

    def tell(self, record: Record) -> None:
        """Let observers know, once the steps that can start have started."""
        self._records.append(record)

    def publish(self) -> None:
        """Tell observers what has happened, while the next steps run."""
        records, self._records = self._records, []
        for record in records:
            for observer in list(self.observers):
                try:
                    observer(record)
                except BaseException:
                    self.observers.remove(observer)
                    log.exception("observer %r raised; it is told nothing more", observer)

    def _held(self, drive: Drive, id: str, now: float) -> None:
        """A request of a member waits to be given: to another engine, or to another member."""
        if self.crossing.wants(id):
            self.crossing.held(drive, id, now)
        elif drive.leaving:
            self.departures.held(drive, id, now)

    def _left(self, drive: Drive, event: Left, now: float) -> None:
        """The next stage of a request is served elsewhere; nobody takes it there once this ends."""
        if self.crossing.wants(event.id):
            self.crossing.held(drive, event.id, now)
        elif self.ending:
            self._strand(drive, event.id, event.stage, now)

    def _strand(self, drive: Drive, id: str, stage: str, now: float) -> None:
        self.touch(drive)
        drive.scheduler.give_up(id, f"stage {stage!r} is served elsewhere, and this ends", now)

    def end(self, now: float) -> None:
        """No more requests come: those that wait to be taken elsewhere fail."""
        self.ending = True
        for drive in self.drives:
            for job in list(drive.scheduler.jobs.values()):
                if job.status == "away" and job.stage is not None:
                    self._strand(drive, job.id, job.stage.name, now)

    def close(self, then: Callable[[], None]) -> None:
        """Close all executors, also if one raises, tell nobody more, and call `then`."""
        with ExitStack() as closing:
            closing.callback(then)
            for drive in self.drives:
                drive.close(closing)
        self.observers.clear()

    def _done(self, event: Done, now: float) -> None:
        drive = self._steps.pop(event.batch, None)
        if drive is None:
            log.error("a step of stage %r came back twice; ignored", event.batch.stage)
        else:
            self.touch(drive)
            drive.done(event, now)

    def _look(self, event: Look, now: float) -> None:
        self.touch(event.drive)
        event.drive.look(event, now)

    def _overdue(self, event: Overdue, now: float) -> None:
        self.touch(event.drive)
        event.drive.overdue(now)
