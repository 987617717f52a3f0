"""An instance that is a service: carries out a head's orders, and reports to it. It knows nothing of Ray.

Simulations have a `MemberInstance` (`cluster`) in its place, on one thread. Here models look at arguments
and read outputs: `carry_out` and `describe` come on one thread, what the service tells on the engine's;
reports are taken with `news` from any.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from concurrent.futures import Future

from neustream.backends.ray.answering import Answering
from neustream.backends.ray.copies import Copies
from neustream.backends.ray.describing import Describing, holds
from neustream.backends.ray.entries import Entries, Entry, asked_print
from neustream.backends.ray.outbox import Outbox
from neustream.backends.ray.passing import Passing
from neustream.backends.ray.telling import shifted
from neustream.backends.ray.wire import EngineDied, Heard, Left, loads, value_as_bytes
from neustream.cluster import messages as to
from neustream.cluster.past import Remembered
from neustream.core.events import Emitted, Ended, Submitted
from neustream.core.events import Left as Leaves
from neustream.core.outlook import Outlook, outlook_of
from neustream.core.rates import Rates
from neustream.engine.clock import stopwatch
from neustream.engine.events import Finished, Gone, Record, Started
from neustream.engine.member import Member
from neustream.errors import BackendError, NeustreamError, told
from neustream.service.requests import PROBE
from neustream.service.service import Service

log = logging.getLogger(__name__)


class ServiceInstance:
    """Serves what a head orders.

    Args:
        service: of one device; closed by `close`.
        woken: called, on any thread, when there is something to report.
        observed: whether records of steps are reported, too.

    Raises:
        BackendError: the service has several devices: each is an instance of its own.
    """

    def __init__(self, service: Service, name: str, woken: Callable[[], None], *, observed: bool = False) -> None:
        members = service.engine.members
        if len(members) != 1:
            names = [member.name for member in members]
            raise BackendError(f"make: an instance of a cluster is one device, got a service on {names}")
        self.service = service
        self.describing = Describing(service)
        self.name = name
        self.offset = 0.0
        """Of the cluster's clock to this process's stopwatch."""
        self._outbox = Outbox(woken, observed=observed)
        self._woken = woken
        self._entries = Entries(self._begin_later)
        self._later: dict[str, to.Send] = {}  # their ids are still being served, of an older term
        self._answering = Answering(self._entries, self._outbox)
        self._passing = Passing(service, name, self._entries, self._outbox, self._answering)
        self.leave = self._passing.leave
        self._remembered = Remembered()
        self.copies = Copies(name, self._outbox.put)
        self._epoch = 0
        self._lost_at = math.inf  # when the next head began
        self._heard = 0  # the number of the latest request that was sent here
        self._rates = Rates(service.profiles)
        self._fault: EngineDied | None = None
        service.engine.observe(self._observe)

    # -- asked by the driver ----------------------------------------------------------------------

    def carry_out(self, orders: Sequence[to.ToInstance]) -> None:
        """Do what the head wants, in order; not what an earlier one wanted."""
        for order in orders:
            if getattr(order, "term", math.inf) < self._epoch * to.TERMS:
                continue
            try:
                self._carry_out(order)
            except Exception:
                log.exception("instance %r: an order could not be carried out", self.name)

    def take(self, id: str, term: int, left: Left) -> None:
        """Go on with a request that left another instance; not with one that an earlier head passed on."""
        if term >= self._epoch * to.TERMS:
            self._passing.take(id, term, left)

    def news(self) -> Heard:
        """What there is to report; what was fetched before has arrived. EngineDied once that is so."""
        if self._fault is not None:
            raise self._fault
        with self._entries.lock:
            found = self._outbox.fetch()
            for id, count in found.arrived.items():
                entry = self._entries.get(id)
                if entry is not None:
                    entry.heard = max(entry.heard, count)
        by_s = self.now() - self.service.engine.clock.now()
        return Heard(found.news, shifted(found.records, self.name, by_s), found.surprises)

    def look(self) -> Future[None]:
        """Report how it is, as of the engine's thread; done once that is reported."""
        self._outbox.dirty = False
        done: Future[None] = Future()
        try:
            looked = self.service.engine.inspect(self._outlook)
        except NeustreamError as error:
            looked = Future()
            looked.set_exception(error)

        def tell(looked: Future[Outlook]) -> None:
            error = looked.exception()
            if error is None:
                self._outbox.put(to.Told(looked.result()))
            else:
                self._died(error)
            self._outbox.dirty = False
            done.set_result(None)

        looked.add_done_callback(tell)
        return done

    def _died(self, error: BaseException) -> None:
        """Its engine serves nothing any more."""
        why = told(self.service.engine.fault or error)
        self._fault = EngineDied(f"instance {self.name!r}: its engine died: {why}")
        self._woken()

    @property
    def dirty(self) -> bool:
        """Whether anything happened since it was looked at."""
        return self._outbox.dirty

    def now(self) -> float:
        """On the cluster's clock."""
        return stopwatch() + self.offset

    def close(self) -> None:
        """End all, and give the models back."""
        self.service.close(cancel=True)

    # -- orders -----------------------------------------------------------------------------------

    def _carry_out(self, order: to.ToInstance) -> None:
        match order:
            case to.Send():
                self._heard = max(self._heard, order.number)
                self._send(order)
            case to.Reserve():
                self._heard = max(self._heard, order.number)
                self._outbox.put(to.Reserved(order.id, order.term))
            case to.Copy():
                self._outbox.put(to.Copied(order.id, order.next_term, 0.0))
            case to.Hold():
                self._passing.hold(order.id, order.term)
            case to.Resume():
                self._passing.resume(order.id, order.term)
            case to.Free():
                self._free(order.id, order.term)
            case to.Cancel():
                self._cancel(order)
            case to.Ask():
                self._ask(order)
            case to.Remember():
                self._remembered.hear(order)
            case to.Fence():
                self._fence()
            case to.Give() | to.Restore():
                pass  # the driver asks for it

    def _fence(self) -> None:
        self.copies.clear()
        with self._entries.lock:
            self._later.clear()
        for entry in self._entries.all():
            self._free(entry.id, entry.term)
        self._outbox.put(to.Fenced())

    def _ask(self, order: to.Ask) -> None:
        self.succeed(order.epoch)
        standing = [to.Standing(each.id, each.term) for each in self._entries.all() if not each.quiet]
        self._outbox.put(to.Here(tuple(standing), self._remembered.all))

    def succeed(self, epoch: int) -> None:
        """If another head begins: what is here goes on for a while, and nobody hears of it."""
        if epoch <= self._epoch:
            return
        self._epoch = epoch
        self.copies.clear()
        with self._entries.lock:
            self._heard, self._lost_at = 0, stopwatch()
            self._later.clear()
            for entry in self._outbox.begin_anew():
                self._entries.add(entry)
            for entry in self._entries.all():
                entry.orphan = not entry.quiet

    def end_lease(self, lease_s: float) -> None:
        """What nobody asked for of an earlier head's requests ends after so long."""
        if stopwatch() < self._lost_at + lease_s:
            return
        self._lost_at = math.inf
        self._remembered.end(self._epoch)
        with self._entries.lock:
            for entry in self._entries.all():
                if entry.orphan:
                    self._drop(entry)

    def _go_on(self, entry: Entry, order: to.Send) -> None:
        """The next head wants a request: it goes on, under the term of that one."""
        entry.orphan, entry.term, entry.guess = False, order.term, None
        self._answering.again(entry)
        self._passing.again(entry)

    def _send(self, order: to.Send) -> None:
        id = order.id
        entry = Entry(id, order.term, guess=order.params["guess"], asked=asked_print(order.params["asked"]))
        with self._entries.lock:
            before = self._entries.get(id)
            if before is not None and before.orphan and before.asked == entry.asked:
                self._go_on(before, order)
                return
            if before is not None or id in self.service.answers:  # of an older term: it is still ending
                self._later[id] = order
                if before is not None:
                    self._drop(before)
                self._begin_later(id)
                return
            self._entries.add(entry)
        payload: bytes = order.params["asked"]
        try:
            model, args, kwargs = loads(payload)
            age = order.age
            answer = self.service.ask(args, kwargs, model=model, slo=order.slo, id=id, age=age)
        except Exception as error:  # noqa: BLE001  the model's own library may raise anything
            self._entries.remove(entry)
            self._outbox.put(to.Refused(id, order.term, told(error)), value_as_bytes(id, None, error))
            return
        entry.answer = answer
        self._outbox.put(to.Took(id, order.term), hurry=False)
        answer.add_done_callback(lambda _: self._answering.over(entry, answer))

    def _begin_later(self, id: str) -> None:
        """A request may have ended here; one of the same id may wait for that."""
        with self._entries.lock:
            if id not in self._later or self._entries.get(id) is not None or id in self.service.answers:
                return
            self._send(self._later.pop(id))

    def _free(self, id: str, term: int) -> None:
        self.copies.free(id, term)
        with self._entries.lock:
            if id in self._later and self._later[id].term <= term:
                del self._later[id]
            entry = self._entries.get(id)
            if entry is None or entry.term > term:
                return
            self._drop(entry)

    def _drop(self, entry: Entry) -> None:
        """Nobody wants to hear of it any more."""
        entry.quiet = True
        if entry.left is not None or entry.over is not None:
            self._entries.remove(entry)
        else:
            self.service.cancel(entry.id)

    def _cancel(self, order: to.Cancel) -> None:
        with self._entries.lock:
            later = self._later.get(order.id)
            if later is not None and later.term == order.term:
                del self._later[order.id]
                self._answering.tell(Entry(order.id, order.term), "cancelled", "cancelled by the caller")
                return
            entry = self._entries.of(order.id, order.term)
            if entry is None:
                return
            if entry.left is None:
                self.service.cancel(order.id)
                return
            self._entries.remove(entry)
        self._answering.tell(entry, "cancelled", "cancelled by the caller")

    # -- what the engine tells, on its thread -----------------------------------------------------

    def _observe(self, record: Record) -> None:
        self._outbox.record(record)
        if isinstance(record, Emitted):
            self._emitted(record.id)
        elif isinstance(record, Leaves):
            self._passing.away(record.id, record.stage)
        elif isinstance(record, Submitted):
            self._submitted(record)
        elif isinstance(record, Ended | Gone):
            if self._later:
                self._begin_later(record.id.removeprefix(PROBE))
        elif isinstance(record, Finished):
            if record.error and self.service.engine.members[0].faults.failing(record.at):
                self.look()  # it has the least work: nobody waits with sending it more
        elif isinstance(record, Started):
            self._outbox.dirty = True
            with self._entries.lock:
                for id in record.step.ids:
                    self._began(id)

    def _emitted(self, id: str) -> None:
        """A request has an output more."""
        with self._entries.lock:
            entry, answer = self._entries.get(id), self.service.answers.get(id)
            if entry is not None and answer is not None and not entry.quiet:
                self._answering.made(entry, answer)

    def _submitted(self, record: Submitted) -> None:
        """What a request is, is known now."""
        entry = self._entries.get(record.id)
        if entry is not None and entry.guess is not None:
            job = self.service.engine.members[0].scheduler.jobs.get(record.id)
            if not holds(entry.guess, record, job):
                self._outbox.surprise(record.id)

    def _began(self, id: str) -> None:
        entry = self._entries.get(id)
        if entry is not None and not entry.began:
            entry.began = True
            if not entry.orphan:
                self._outbox.put(to.Began(id, entry.term))

    # -- how it is --------------------------------------------------------------------------------

    def _outlook(self, members: Sequence[Member], now: float) -> Outlook:
        [member] = members
        profiles = member.scheduler.times.profiles
        if profiles.keys() != self._rates.profiles.keys():
            self._rates = Rates(profiles)
        return outlook_of(
            member.scheduler,
            self.name,
            self._rates,
            now,
            heard=self._heard,
            sent_at=self.now(),
            failing=member.faults.failing(now),
        )
