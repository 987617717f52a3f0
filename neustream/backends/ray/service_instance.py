"""An instance that is a service: carries out a head's orders, and reports to it. It knows nothing of Ray.

Simulations have a `MemberInstance` (`cluster`) in its place, on one thread. Here models look at arguments
and read outputs: `carry_out` and `describe` come on one thread, what the service tells on the engine's;
reports are taken with `news` from any.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import partial
from typing import Any

from neustream.backends.ray.describing import Describing, holds
from neustream.backends.ray.entries import Entry
from neustream.backends.ray.outbox import Outbox
from neustream.backends.ray.telling import shifted
from neustream.backends.ray.wire import EngineDied, Heard, Left, NotMovable, loads, value_as_bytes
from neustream.cluster import messages as to
from neustream.core.events import Emitted, Submitted
from neustream.core.outlook import Outlook, Rates, outlook_of
from neustream.engine.answers import Result
from neustream.engine.clock import stopwatch
from neustream.engine.events import Record, Started
from neustream.engine.member import Member
from neustream.errors import BackendError, NeustreamError, RequestError, StageFailed, told
from neustream.service.answer import Answer
from neustream.service.requests import Moved
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
        self._lock = threading.RLock()
        self._entries: dict[str, Entry] = {}
        self._heard = 0  # the number of the latest request that was sent here
        self._rates = Rates(service.profiles)
        self._fault: EngineDied | None = None
        service.engine.observe(self._observe)

    # -- asked by the driver ----------------------------------------------------------------------

    def carry_out(self, orders: Sequence[to.ToInstance]) -> None:
        """Do what the head wants, in order."""
        for order in orders:
            try:
                self._carry_out(order)
            except Exception:
                log.exception("instance %r: an order could not be carried out", self.name)

    def news(self) -> Heard:
        """What there is to report; what was fetched before has arrived. EngineDied once that is so."""
        if self._fault is not None:
            raise self._fault
        with self._lock:
            found = self._outbox.fetch()
            for id, count in found.arrived.items():
                entry = self._entries.get(id)
                if entry is not None:
                    entry.heard = max(entry.heard, count)
        by_s = self.now() - self.service.engine.clock.now()
        return Heard(found.news, shifted(found.records, self.name, by_s), found.surprises)

    def leave(self, id: str, term: int) -> Left:
        """A request that waits to be passed on; NotMovable if it does not, and why."""
        with self._lock:
            entry = self._entries.get(id)
            if entry is None or entry.term != term or (entry.left is None and not entry.why):
                raise NotMovable(f"request {id!r} does not wait at instance {self.name!r}")
            if entry.left is None:
                raise NotMovable(entry.why)
            return Left(entry.left, entry.heard)

    def take(self, id: str, term: int, left: Left, waited_s: float) -> None:
        """Go on with a request that left another instance; `Took` or `Refused` tells of it."""
        entry = Entry(id, term, told=False)
        with self._lock:
            if id in self._entries:
                self._outbox.put(to.Refused(id, term, "it is here already"))
                return
            self._entries[id] = entry
        self._enter(entry, left.moved, left.heard, waited_s)

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
                self._hold(order)
            case to.Resume():
                self._resume(order)
            case to.Free():
                self._free(order.id, order.term)
            case to.Cancel():
                self._cancel(order)
            case to.Ask():
                with self._lock:
                    here = [e for e in self._entries.values() if not e.quiet]
                standing = [to.Standing(e.id, e.term, len(e.items)) for e in here]
                self._outbox.put(to.Here(tuple(standing)))
            case to.Fence():
                for entry in list(self._entries.values()):
                    self._free(entry.id, entry.term)
                self._outbox.put(to.Fenced())
            case to.Give():
                pass  # the driver asks for it

    def _send(self, order: to.Send) -> None:
        id = order.id
        entry = Entry(id, order.term, guess=order.params["guess"])
        with self._lock:
            before = self._entries.get(id)
            if before is not None:  # of an older term: it is still ending
                before.next = order
                self._drop(before)
                return
            self._entries[id] = entry
        payload: bytes = order.params["asked"]
        try:
            model, args, kwargs = loads(payload)
            age = order.age
            answer = self.service.ask(args, kwargs, model=model, slo=order.slo, id=id, age=age)
        except Exception as error:  # noqa: BLE001  the model's own library may raise anything
            self._remove(entry)
            self._outbox.put(to.Refused(id, order.term, told(error)), value_as_bytes(id, None, error))
            return
        entry.answer = answer
        self._outbox.put(to.Took(id, order.term), hurry=False)
        answer.add_done_callback(lambda _: self._over(entry, answer))

    def _hold(self, order: to.Hold) -> None:
        entry = self._of(order.id, order.term)
        if entry is not None:
            gone = self.service.give(order.id)
            gone.add_done_callback(partial(self._gone, entry))

    def _gone(self, entry: Entry, gone: Future[Moved]) -> None:
        """It left the service, or cannot; of one that ended meanwhile is told by its end."""
        error = gone.exception()
        ended = isinstance(error, RequestError) and error.code != "too_early"
        if ended:
            return
        with self._lock:
            if error is None:
                entry.left, entry.left_at = gone.result(), stopwatch()
            else:
                stuck = isinstance(error, StageFailed)
                entry.why = f"not movable: {told(error)}" if stuck else told(error)
            if entry.quiet and error is None:
                self._remove(entry)
                return
            self._outbox.put(to.Waits(entry.id, entry.term))

    def _resume(self, order: to.Resume) -> None:
        entry = self._of(order.id, order.term)
        if entry is None:
            return
        with self._lock:
            moved, entry.left, entry.why = entry.left, None, ""
        if moved is not None:
            entry.reader = None
            self._enter(entry, moved, entry.sent, stopwatch() - entry.left_at)

    def _free(self, id: str, term: int) -> None:
        with self._lock:
            entry = self._entries.get(id)
            if entry is None or entry.term > term:
                return
            self._drop(entry)

    def _drop(self, entry: Entry) -> None:
        """Nobody wants to hear of it any more."""
        entry.quiet = True
        if entry.left is not None:
            self._remove(entry)
        else:
            self.service.cancel(entry.id)

    def _cancel(self, order: to.Cancel) -> None:
        with self._lock:
            entry = self._of(order.id, order.term)
            if entry is None:
                return
            if entry.left is None:
                self.service.cancel(order.id)
                return
            self._remove(entry)
        self._tell_over(entry, "cancelled", "cancelled by the caller")

    # -- requests ---------------------------------------------------------------------------------

    def _of(self, id: str, term: int) -> Entry | None:
        with self._lock:
            entry = self._entries.get(id)
        return entry if entry is not None and entry.term == term else None

    def _remove(self, entry: Entry) -> None:
        """It is not here any more; what waited for that begins."""
        with self._lock:
            if self._entries.get(entry.id) is entry:
                del self._entries[entry.id]
            order, entry.next = entry.next, None
        if order is not None:
            self._send(order)

    def _enter(self, entry: Entry, moved: Moved, heard: int, waited_s: float) -> None:
        """Have the service go on with a request."""
        try:
            taken = self.service.take(moved, waited_s=waited_s)
        except Exception as error:  # noqa: BLE001  the answer raises it
            taken = Future()
            taken.set_exception(error)
        taken.add_done_callback(partial(self._entered, entry, heard))

    def _entered(self, entry: Entry, heard: int, taken: Future[Answer[Any]]) -> None:
        error = taken.exception()
        if error is not None:
            self._remove(entry)
            if entry.told:
                self._tell_over(entry, "failed", told(error))
            else:
                self._outbox.put(to.Refused(entry.id, entry.term, told(error)))
            return
        answer = taken.result()
        with self._lock:
            entry.answer = answer
            if entry.told:
                self._made(entry, answer)
            else:
                entry.catch_up(answer)
                entry.told, entry.sent = True, len(entry.items)
                unheard = tuple(enumerate(entry.items))[heard:]
                self._outbox.put(to.Took(entry.id, entry.term, unheard))
        if entry.quiet:
            self.service.cancel(entry.id)
        answer.add_done_callback(lambda _: self._over(entry, answer))

    def _over(self, entry: Entry, answer: Answer[Any]) -> None:
        """A request ended here, or left."""
        error = None if answer.cancelled() else answer.exception()
        if isinstance(error, RequestError) and error.code == "moved":
            return
        with self._lock:
            self._made(entry, answer)
        self._remove(entry)
        if entry.quiet:
            return
        if answer.cancelled():
            self._tell_cancelled(entry, answer.ended)
            return
        payload = value_as_bytes(entry.id, answer.result() if error is None else None, error)
        result = answer.ended
        if result is None:  # the engine did not take it
            self._outbox.put(to.Refused(entry.id, entry.term, told(error or RequestError(""))), payload)
            return
        status = "failed" if error is not None and result.status == "done" else result.status
        self._tell_over(entry, status, result.reason, payload, result)

    def _tell_cancelled(self, entry: Entry, result: Result | None) -> None:
        """Its answer was cancelled; `result`: how it ended, if the engine had taken it."""
        if result is None:
            self._tell_over(entry, "cancelled", "cancelled by the caller")
            return
        status = "failed" if result.status == "done" else result.status
        self._tell_over(entry, status, result.reason, result=result)

    def _tell_over(
        self, entry: Entry, status: Any, reason: str, value: bytes = b"", result: Result | None = None
    ) -> None:
        attainable = result is None or result.code != "unattainable"
        count, began = len(entry.items), entry.began
        over = to.Over(entry.id, entry.term, status, reason, None, count, began, attainable)
        self._outbox.put(over, value)

    # -- what the engine tells, on its thread -----------------------------------------------------

    def _observe(self, record: Record) -> None:
        self._outbox.record(record)
        if isinstance(record, Emitted):
            with self._lock:
                entry = self._entries.get(record.id)
                answer = self.service.answers.get(record.id)
                if entry is not None and answer is not None and not entry.quiet:
                    self._made(entry, answer)
        elif isinstance(record, Submitted):
            self._submitted(record)
        elif isinstance(record, Started):
            self._outbox.dirty = True
            with self._lock:
                for id in record.step.ids:
                    self._began(id)

    def _submitted(self, record: Submitted) -> None:
        """What a request is, is known now."""
        with self._lock:
            entry = self._entries.get(record.id)
        if entry is not None and entry.guess is not None:
            job = self.service.engine.members[0].scheduler.jobs.get(record.id)
            if not holds(entry.guess, record, job):
                self._outbox.surprise(record.id)

    def _began(self, id: str) -> None:
        entry = self._entries.get(id)
        if entry is not None and not entry.began:
            entry.began = True
            self._outbox.put(to.Began(id, entry.term))

    def _made(self, entry: Entry, answer: Answer[Any]) -> None:
        """Report what a request put out since."""
        entry.catch_up(answer)
        if not entry.told or entry.quiet:
            return
        for index in range(entry.sent, len(entry.items)):
            self._outbox.put(to.Made(entry.id, entry.term, index, entry.items[index]))
        entry.sent = len(entry.items)

    # -- how it is --------------------------------------------------------------------------------

    def _outlook(self, members: Sequence[Member], now: float) -> Outlook:
        [member] = members
        profiles = member.scheduler.times.profiles
        if profiles.keys() != self._rates.profiles.keys():
            self._rates = Rates(profiles)
        return outlook_of(member.scheduler, self.name, self._rates, now, heard=self._heard, sent_at=self.now())
