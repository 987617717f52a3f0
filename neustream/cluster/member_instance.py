"""An instance that is a member of a loop: carries out a head's orders, and reports. No I/O here.

Whoever drives it gives it each message of the head and of other instances (`receive`, on the loop's
thread), and each record of its member (`noted`), and takes what it has to say from `send`. Clusters
are simulated with it; those that serve have a `ServiceInstance` (`backends/ray`) in its place.
"""

from __future__ import annotations

import logging
import math
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from neustream.cluster import messages as say
from neustream.cluster.keeping import Keeping
from neustream.cluster.packing import Packing
from neustream.cluster.parcels import fresh, size_of, take
from neustream.cluster.reporting import Reporter, Reporting
from neustream.cluster.room import Room
from neustream.cluster.served import Served, cancelled, over_of
from neustream.core.batch import input_of
from neustream.core.carry import Carry, later, pack
from neustream.core.entry import Entry
from neustream.core.events import Emitted, Ended, Given, Held, Left
from neustream.core.graph import Graph
from neustream.core.rates import Rates
from neustream.engine.events import Call, Finished, Record, Started
from neustream.engine.loop import Loop
from neustream.engine.member import Drive
from neustream.errors import NeustreamError, told

log = logging.getLogger(__name__)

REMEMBERED = 4096
"""Requests whose latest freed term is remembered."""


class MemberInstance:
    """One instance.

    Args:
        name: of the instance; drive: the member that serves; graphs: by name.
        send: takes a message to an address: `say.HEAD`, or an instance's name.
        unheard: outputs of a request that were sent and may not have reached the head.
        offset_s: the cluster's clock less this loop's.
        token_bytes: what a token in the KV cache takes.

    Attributes:
        epoch: of the latest head that it heard of.
    """

    def __init__(
        self,
        name: str,
        loop: Loop,
        drive: Drive,
        graphs: Mapping[str, Graph],
        rates: Rates,
        send: Callable[[str, Any], None],
        *,
        reporting: Reporting | None = None,
        unheard: Callable[[str], say.Outputs] = lambda id: (),
        offset_s: float = 0.0,
        token_bytes: float = 0.0,
    ) -> None:
        self.name = name
        self.drive = drive
        self.offset_s = offset_s
        reporting = reporting or Reporting()
        self._reporter = Reporter(name, loop.clock, drive, rates, send, reporting, offset_s)
        self.beat, self.tell = self._reporter.beat, self._reporter.tell
        self._loop = loop
        self._scheduler = drive.scheduler
        self._graphs = graphs
        self._send = send
        self._unheard = unheard
        self._token_bytes = token_bytes
        self._served = served = Served()
        self._terms, self._began, self._made_here = served.terms, served.began, served.made
        self._orphans, self._drop = served.orphans, served.drop
        self.not_heard = served.not_heard
        self._room = Room(name, drive.scheduler)
        self._keeping = Keeping(name, send, self._parcel)
        self._freed: OrderedDict[str, int] = OrderedDict()
        self._later: dict[str, say.Send | say.Parcel] = {}  # their ids are still being served here
        self.epoch = 0
        self._does: dict[type[Any], Callable[[Any, float], None]] = {
            say.Send: self._begin,
            say.Reserve: self._reserve,
            say.Copy: self._copy,
            say.Hold: self._hold,
            say.Give: self._give,
            say.Resume: self._resume,
            say.Free: self._free,
            say.Cancel: self._cancel,
            say.Ask: self._ask,
            say.Remember: lambda order, now: served.pasts.hear(order),
            say.Restore: self._keeping.restore,
            say.Fence: self._fence,
            say.Piece: self._piece,
            say.Parcel: self._parcel,
        }
        self._hears: dict[type[Any], Callable[[Any], None]] = {
            Emitted: self._made,
            Started: self._started,
            Finished: self._reporter.finished,
            Ended: self._ended,
            Held: lambda record: self._waits(record.id, ""),
            Left: lambda record: self._waits(record.id, record.stage),
            Given: lambda record: self._again(record.id),
        }

    def receive(self, message: say.ToInstance | say.BetweenInstances, now: float) -> None:
        """A message of the head, or of another instance. `now`: on the loop's clock.

        What an earlier head wanted is not heard.
        """
        if getattr(message, "term", math.inf) < self.epoch * say.TERMS:
            return
        self._loop.touch(self.drive)
        self._does[type(message)](message, now)

    # -- requests ---------------------------------------------------------------------------------

    def _begin(self, order: say.Send, now: float) -> None:
        self._reporter.hear(order.number)
        if order.id in self._orphans:
            self._go_on(order)
            return
        if not self._wanted(order):
            return
        graph = self._graphs.get(order.graph)
        if graph is None:
            self._refuse(order, f"instance {self.name!r} has no graph {order.graph!r}")
            return
        try:
            fresh(self.drive, order, graph, order.sent_at - order.age - self.offset_s, now)
        except NeustreamError as error:
            self._refuse(order, told(error))
            return
        self._terms[order.id] = order.term
        self._say(say.Took(order.id, order.term))

    def _wanted(self, message: say.Send | say.Parcel) -> bool:
        """Whether a request is to begin now: not if it was freed, or is in its last step here."""
        id, term = message.id, message.term
        if self._freed.get(id, 0) >= term or self._terms.get(id, 0) >= term:
            return False
        if id in self._terms:
            self._forget(id)
        if id in self._scheduler.jobs:
            self._later[id] = message
            return False
        return True

    def _refuse(self, order: say.Send | say.Reserve | say.Give | say.Parcel, reason: str) -> None:
        self._say(say.Refused(order.id, order.term, reason))

    def _cancel(self, order: say.Cancel, now: float) -> None:
        if self._terms.get(order.id) == order.term:
            self._scheduler.cancel(order.id, now)
        elif order.id in self._later and self._later[order.id].term == order.term:
            del self._later[order.id]
            self._say(cancelled(order.id, order.term))

    def _free(self, order: say.Free, now: float) -> None:
        id, term = order.id, order.term
        self._freed[id] = max(self._freed.pop(id, 0), term)
        while len(self._freed) > REMEMBERED:
            self._freed.popitem(last=False)
        self._room.free(id, term)
        self._keeping.free(id, term)
        later = self._later.get(id)
        if later is not None and later.term <= term:
            del self._later[id]
        if self._terms.get(id, term + 1) <= term:
            self._forget(id)

    def _forget(self, id: str) -> None:
        """A request is no longer ours: it goes at once, or after its step."""
        self._drop(id)
        job = self._scheduler.jobs.get(id)
        if job is None:
            return
        now = self._loop.clock.now()
        if job.status == "running":
            self._scheduler.cancel(id, now)
        else:
            self._scheduler.give(id, now)

    def _ask(self, order: say.Ask, now: float) -> None:
        if order.epoch > self.epoch:
            self.epoch = order.epoch
            self._lose_head(now)
        standing = [say.Standing(id, term) for id, term in self._terms.items()]
        self._say(say.Here(tuple(standing), self._served.pasts.all))

    def _lose_head(self, now: float) -> None:
        """The head is gone: what is here goes on for a while, and nobody hears of it."""
        self._reporter.begin_anew()
        self._later.clear()
        self._room.free_all()
        self._keeping.clear()
        self._served.lose_head()
        for id in self._terms:
            job = self._scheduler.jobs.get(id)
            if isinstance(job, Entry) and job.keep:
                self._scheduler.resume(id)
        until = now + self._reporter.reporting.lease_s
        self._loop.clock.post(Call(partial(self._end_lease, self.epoch)), until)

    def _end_lease(self, epoch: int, now: float) -> None:
        """Nobody asked for what is left of an earlier head's requests."""
        if epoch == self.epoch:
            for id in list(self._orphans):
                self._forget(id)
            self._served.pasts.end(epoch)

    def _go_on(self, order: say.Send) -> None:
        """The head that came after wants a request: it goes on, under the term of that one."""
        id = order.id
        self._terms[id] = order.term
        over = self._orphans.pop(id)
        self._say(say.Took(id, order.term, tuple(self._made_here.get(id, ()))))
        if id in self._began:
            self._say(say.Began(id, order.term))
        if over is not None:
            self._drop(id)
            self._say(replace(over, term=order.term))
            return
        job = self._scheduler.jobs.get(id)  # None: that it ended is about to be noted
        if job is not None and job.status == "away" and job.stage is not None:
            self._waits(id, job.stage.name)

    def _fence(self, order: say.Fence, now: float) -> None:
        for id in list(self._terms):
            self._forget(id)
        self._room.free_all()
        self._keeping.clear()
        self._later.clear()
        self._say(say.Fenced())

    # -- moves ------------------------------------------------------------------------------------

    def _reserve(self, order: say.Reserve, now: float) -> None:
        self._reporter.hear(order.number)
        if self._freed.get(order.id, 0) >= order.term:
            return
        try:
            self._room.keep(order.id, order.term, order.tokens)
        except NeustreamError as error:
            self._refuse(order, told(error))
            return
        self._say(say.Reserved(order.id, order.term))

    def _mine(self, order: say.Copy | say.Hold | say.Give | say.Resume) -> Entry | None:
        """The job that an order means, if it is still ours."""
        job = self._scheduler.jobs.get(order.id)
        mine = self._terms.get(order.id) == order.term and isinstance(job, Entry)
        return job if mine and isinstance(job, Entry) else None

    def _copy(self, order: say.Copy, now: float) -> None:
        job = self._mine(order)
        if job is not None:
            size = job.kept * self._token_bytes
            self._send(order.target, say.Piece(order.id, order.next_term, job.kept, size))

    def _piece(self, piece: say.Piece, now: float) -> None:
        self._say(say.Copied(piece.id, piece.term, piece.tokens))

    def _hold(self, order: say.Hold, now: float) -> None:
        if self._mine(order) is not None:
            self._scheduler.hold(order.id, now)

    def _resume(self, order: say.Resume, now: float) -> None:
        job = self._mine(order)
        if job is not None and job.keep:
            self._scheduler.resume(order.id)

    def _give(self, order: say.Give, now: float) -> None:
        """Pass a copy on; it is held here until the head says that the target has it."""
        job = self._mine(order)
        if job is None or job.status not in ("held", "away"):
            return
        if job.started_at is None:
            self._post(order, pack(job, now), {})
            return
        packing = Packing(self._loop.clock, partial(self.packed, order))
        packing.ask_all(self.drive, input_of(job))

    def packed(self, order: say.Give, pieces: Mapping[str, Mapping[str, Any]], failed: str) -> None:
        """The executors told what they keep of a request, or that they cannot part with it."""
        job = self._mine(order)
        if job is None or job.status not in ("held", "away") or order.id in self._orphans:
            return
        if failed:
            self._refuse(order, f"not movable: {failed}")
            return
        self._post(order, pack(job, self._loop.clock.now()), pieces)

    def _post(self, order: say.Give, carry: Carry, pieces: Mapping[str, Mapping[str, Any]]) -> None:
        copied = order.copied is not None
        size = size_of(carry, order.copied, self._token_bytes)
        unheard = self._unheard(order.id)
        at = self._loop.clock.now() + self.offset_s
        id, term = order.id, order.next_term
        parcel = say.Parcel(id, term, carry, pieces, copied, unheard, size, at, order.keep)
        self._send(order.target, parcel)

    def _parcel(self, parcel: say.Parcel, now: float) -> None:
        if parcel.keep:
            if self._freed.get(parcel.id, 0) < parcel.term:
                self._keeping.keep(parcel)
            return
        if not self._wanted(parcel):
            return
        self._room.free(parcel.id)
        graph = self._graphs.get(parcel.carry.graph)
        if graph is None:
            self._refuse(parcel, f"no graph {parcel.carry.graph!r}")
            return
        passed = max(now + self.offset_s - parcel.sent_at, 0.0)
        parcel = replace(parcel, carry=later(parcel.carry, passed))
        try:
            take(self.drive, parcel, graph, now, partial(self._unfit, parcel.id, parcel.term))
        except NeustreamError as error:
            self._refuse(parcel, told(error))
            return
        self._terms[parcel.id] = parcel.term
        self._made_here[parcel.id] = list(parcel.unheard)
        self._say(say.Took(parcel.id, parcel.term, parcel.unheard))

    def _unfit(self, id: str, term: int, reason: str) -> None:
        """On whatever thread: a module cannot go on from what was kept of a request."""

        def give_up(now: float) -> None:
            if self._terms.get(id) == term:
                self._loop.touch(self.drive)
                self._scheduler.give_up(id, reason, now)

        self._loop.clock.post(Call(give_up), self._loop.clock.now())

    # -- what is reported -------------------------------------------------------------------------

    def noted(self, record: Record) -> None:
        """A record of its member."""
        heard = self._hears.get(type(record))
        if heard is not None:
            heard(record)

    def _started(self, record: Started) -> None:
        for id in record.step.ids:
            if id not in self._began and id in self._terms:
                self._began.add(id)
                self._tell(say.Began(id, self._terms[id]))

    def _made(self, record: Emitted) -> None:
        term = self._terms.get(record.id)
        if term is not None:
            self._made_here.setdefault(record.id, []).append((record.index, record.update))
            self._tell(say.Made(record.id, term, record.index, record.update))

    def _waits(self, id: str, away: str) -> None:
        job = self._scheduler.jobs.get(id)
        if id in self._terms and isinstance(job, Entry):
            self._tell(say.Waits(id, self._terms[id], job.kept, away, dict(job.calls_left)))

    def _tell(self, report: say.Began | say.Made | say.Waits) -> None:
        """Tell the head of a request, if it wants to hear of it."""
        if report.id not in self._orphans:
            self._say(report)

    def _say(self, report: say.Report) -> None:
        """Tell the head something; how it all is follows."""
        self._send(say.HEAD, report)
        self._reporter.soon()

    def _ended(self, record: Ended) -> None:
        id = record.id
        term = self._terms.get(id)
        if term is not None:
            over = over_of(record, term)
            if id in self._orphans:
                self._orphans[id] = over
            else:
                self._drop(id)
                self._say(over)
        self._again(id)

    def _again(self, id: str) -> None:
        """A request is no longer here; one of the same id may wait for that."""
        self._reporter.soon()
        message = self._later.pop(id, None)
        if message is not None:
            clock = self._loop.clock
            clock.post(Call(partial(self.receive, message)), clock.now())
