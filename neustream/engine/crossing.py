"""Requests that leave for another engine, maybe in another process, and go on there.

A request leaves at a step boundary: with its place in its graph, its state, and what the executors
keep of it. All of that is plain data. It has one owner at any moment: from `give` on the source
knows nothing of it any more, and the target accounts for it once it was taken.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from neustream.core.batch import StepInput, input_of
from neustream.core.carry import Carry, pack
from neustream.core.entry import Entry
from neustream.core.events import Ended, planned_steps, submitted
from neustream.core.types import Request
from neustream.engine.events import Adopted, Give, Gone, Record, Take
from neustream.engine.executor import Mover
from neustream.engine.packing import Packing, Parcel, Places, has_room, held, movable
from neustream.errors import GraphError, NeustreamError, RequestError, StageFailed, told

if TYPE_CHECKING:
    from neustream.engine.loop import Loop
    from neustream.engine.member import Drive


@dataclass(frozen=True, slots=True)
class Moved:
    """A request on its way between two engines: plain data, to be pickled.

    `pieces`: what the executors kept of it, by pool and stage; empty: nothing but its state.
    """

    carry: Carry
    pieces: Places


class Crossing:
    """Gives requests to other engines and takes theirs.

    Attributes:
        resolve: answers a future of a caller; forget: a request's own future is answered elsewhere
            from now on; accept: the answer of a request that goes on here.
    """

    resolve: Callable[[Future[Any], Any], None]
    forget: Callable[[str], None]
    accept: Callable[[Take], Future[Any]]

    def __init__(self, loop: Loop, packing: Packing) -> None:
        self._loop = loop
        self._packing = packing
        self._giving: dict[str, Give] = {}
        self._taking: set[str] = set()
        loop.handlers |= {Give: self._give, Take: self._take, Adopted: self._adopted}

    def hear(self, record: Record) -> None:
        """An observer of the loop: a request that ended needs to go nowhere."""
        if isinstance(record, Ended):
            give = self._giving.pop(record.id, None)
            if give is not None:
                why = f": {record.reason}" if record.reason else ""
                self._refuse(give, RequestError(f"request {record.id!r} is {record.status}{why}"))

    # -- going ------------------------------------------------------------------------------------

    def wants(self, id: str) -> bool:
        """Whether a request is to leave."""
        return id in self._giving

    def _give(self, event: Give, now: float) -> None:
        drive = self._loop.of(event.id)
        if drive is None or event.id in self._giving:
            what = "is no request that is served here" if drive is None else "is to leave already"
            self._refuse(event, RequestError(f"{event.id!r} {what}"))
            return
        self._giving[event.id] = event
        self._loop.touch(drive)
        job = drive.scheduler.jobs[event.id]
        if job.status in (
            "held",
            "away",
        ):  # held for another member, or its next stage is elsewhere
            self.held(drive, event.id, now)
        else:
            drive.scheduler.hold(event.id, now)

    def held(self, drive: Drive, id: str, now: float) -> None:
        """A request that is to leave waits at a step boundary."""
        job = held(drive, id)
        if job is None:
            return
        if job.started_at is None or not self._with_pieces(job, self._giving[id]):
            self._part(Parcel(drive, id, self._part), now)
        elif movable(drive):
            self._packing.begin(Parcel(drive, id, self._part), input_of(job), now)
        else:
            why = "its executor cannot part with what it keeps, or has lost a worker"
            self._part(Parcel(drive, id, self._part, failed=why), now)

    @staticmethod
    def _with_pieces(job: Entry, give: Give) -> bool:
        """Whether it goes with what executors keep of it."""
        return give.cached or job.stage is None or not job.stage.caches

    def _part(self, parcel: Parcel, now: float) -> None:
        """All is there that is to go along: the request leaves; or it stays, and why."""
        drive, id = parcel.source, parcel.id
        job, give = held(drive, id), self._giving.get(id)
        if job is None or give is None:
            return  # it ended meanwhile: `hear` answers
        del self._giving[id]
        self._loop.touch(drive)
        if parcel.failed:
            if job.keep:
                drive.scheduler.resume(id)
            self._refuse(give, StageFailed(f"request {id!r} stays: {parcel.failed}"))
            return
        carry, steps = pack(job, now), planned_steps(job)
        drive.scheduler.give(id, now)
        self._loop.tell(Gone(id, carry.slo, steps, now, drive.name))
        self._loop.publish()  # its outputs are told before it is known to be gone
        self.forget(id)
        self.resolve(give.answer, Moved(carry, parcel.kept))

    def _refuse(self, give: Give, error: NeustreamError) -> None:
        self.resolve(give.answer, error)

    # -- coming -----------------------------------------------------------------------------------

    def _take(self, event: Take, now: float) -> None:
        carry, pieces = event.moved.carry, event.moved.pieces
        try:
            drive = self._chosen(event)
        except NeustreamError as error:
            self.resolve(event.answer, error)
            return
        self._loop.touch(drive)
        if not pieces:
            self._seat(event, drive, now, cached=False)
            return
        self._taking.add(carry.id)
        waiting = [_adopting(drive, name, carry.input(), pieces[name]) for name in pieces]
        for adopting in waiting:
            adopting.add_done_callback(partial(self._one_adopted, event, drive, waiting))

    def _one_adopted(
        self, event: Take, drive: Drive, waiting: Sequence[Future[None]], done: Future[None]
    ) -> None:
        """On whatever thread: tell the loop once all pools have what was kept."""
        if not all(one.done() for one in waiting):
            return
        errors = [one.exception() for one in waiting]
        failed = "; ".join([told(error) for error in errors if error is not None])
        clock = self._loop.clock
        clock.post(Adopted(event, drive, failed), clock.now())

    def _adopted(self, event: Adopted, now: float) -> None:
        carry, drive = event.take.moved.carry, event.drive
        if carry.id not in self._taking:
            return  # told twice
        self._taking.discard(carry.id)
        self._loop.touch(drive)
        if not event.failed:
            self._seat(event.take, drive, now, cached=True)
            return
        drive.release(carry.id)
        if _caches(event.take) and not self._elsewhere(drive, event.take):  # its tokens are enough
            self._seat(event.take, drive, now, cached=False)
        else:
            refused = StageFailed(f"request {carry.id!r} cannot go on here: {event.failed}")
            self.resolve(event.take.answer, refused)

    def _seat(self, event: Take, drive: Drive, now: float, *, cached: bool) -> None:
        """Let a request go on at a member; what was kept of it is there if `cached`."""
        carry = event.moved.carry
        cached = cached and _caches(event)
        try:
            job = self._enter(drive, event, now, cached=cached)
        except NeustreamError as error:
            drive.release(carry.id)
            self.resolve(event.answer, error)
            return
        self._loop.tell(submitted(job, now))
        self.resolve(event.answer, self.accept(event))

    def _enter(self, drive: Drive, event: Take, now: float, *, cached: bool) -> Any:
        carry = event.moved.carry
        try:
            return drive.scheduler.take(carry, event.graph, now, cached=cached)
        except RequestError:
            if not cached or carry.id in drive.scheduler.jobs or self._elsewhere(drive, event):
                raise
        drive.release(carry.id)  # there are no KV blocks for it: its tokens are computed again
        return drive.scheduler.take(carry, event.graph, now, cached=False)

    @staticmethod
    def _elsewhere(drive: Drive, event: Take) -> bool:
        """Whether what would compute a request's tokens again is served elsewhere."""
        return not drive.scheduler.away.isdisjoint(event.graph.stages)

    def _chosen(self, event: Take) -> Drive:
        """The member at which a request goes on; NeustreamError if there is none."""
        carry, loop = event.moved.carry, self._loop
        if loop.of(carry.id) is not None or carry.id in self._taking:
            raise RequestError(f"request id {carry.id!r} is already being served")
        if event.graph.print != carry.print:
            raise GraphError(
                f"request {carry.id!r} comes from graph {carry.graph!r} with print {carry.print}; "
                f"graph {event.graph.name!r} here has print {event.graph.print}"
            )
        request = Request(carry.id, event.graph, loop.clock.now(), carry.slo, carry.params)
        able = [drive for drive in loop.drives if drive.serves(request)]
        fit = [drive for drive in able if has_room(drive, event.moved.pieces)]
        if not fit:
            what = "can go on from what was kept of it" if able else f"serves {carry.graph!r}"
            raise RequestError(f"request {carry.id!r}: no member here {what}")
        return loop.chosen(fit, request)


def _adopting(drive: Drive, pool: str, given: StepInput, pieces: Any) -> Future[None]:
    executor = drive.executors[pool]
    assert isinstance(executor, Mover)
    try:
        return executor.adopt(given, pieces)
    except NeustreamError as error:
        failed: Future[None] = Future()
        failed.set_exception(error)
        return failed


def _caches(event: Take) -> bool:
    """Whether a request is at a stage that can compute again what was kept of it."""
    stage = event.moved.carry.saved.stage
    return stage is not None and event.graph.stages[stage].caches
