"""Drives a head for callers: their requests in, its orders out, over machines of whatever kind.

One thread does all of it. It knows nothing of Ray: `Machines` starts instances and carries
messages.
"""

from __future__ import annotations

import contextlib
import logging
import math
import queue
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from functools import partial
from typing import Any

from neustream.backends.ray.alike import likeness_of
from neustream.backends.ray.callers import Caller, Counts, Machines, reader
from neustream.backends.ray.looking import Looking
from neustream.backends.ray.starting import Starting
from neustream.backends.ray.telling import Telling
from neustream.backends.ray.waiting import Waiting, closed
from neustream.backends.ray.wire import EngineDied, Heard, Joined, News, NotMovable, Superseded, asked_as_bytes
from neustream.cluster import messages as to
from neustream.cluster.happenings import Entered, Lost
from neustream.cluster.head import Head
from neustream.cluster.status import status_of
from neustream.core.events import Submitted
from neustream.core.stage_names import named
from neustream.core.types import SLO, Request
from neustream.engine.clock import stopwatch
from neustream.engine.inbox import Inbox
from neustream.engine.snapshot import InstanceStatus
from neustream.errors import RequestError, RequestFailed, told
from neustream.service.answer import Answer

log = logging.getLogger(__name__)

OVERSLEPT_S = 0.1
"""Of the driver's thread, beyond when it was to wake up: another one had the interpreter, or the machine."""


class Driver:
    """Runs a head on a thread of its own.

    Args:
        head: nobody else touches it.
        first: instances that are there before anybody is served.
        telling: who is told of what happens to requests and instances, on that thread.

    Attributes:
        up: set once the first instances serve, or with why one of them does not.
        places: where the instances are, by name.
        states: how each is: "up", "suspect" or "draining".
        stays: when instances came and went: name, since, until (inf: it is there).
        fault: why the engine of an instance died, if one did.
    """

    def __init__(
        self,
        head: Head,
        machines: Machines,
        first: int,
        telling: Telling | None = None,
    ) -> None:
        self._starting = Starting(head, machines, first, self.post, self._enter, self._give_way)
        self.up = self._starting.up
        self.places: dict[str, Joined] = {}
        self.states: Mapping[str, str] = {}
        self.stays: dict[str, tuple[float, float]] = {}
        self.fault: EngineDied | None = None
        self._head = head
        self._machines = machines
        self._telling = telling or Telling((), ())
        self._inbox: Inbox[Callable[[float], None]] = Inbox()
        self._waiting = Waiting(self._telling)
        self._alive: set[str] = set()
        self._then: list[Callable[[], None]] = []
        self._looking = Looking(head, machines, self._waiting, self.places, self._alive, self.post, self._submitted)
        self._over = False
        self._ended = False
        self._questions: set[Future[Any]] = set()
        self._gate = threading.Lock()
        self._starting.adopt()
        self._thread = threading.Thread(target=self._run, name="neustream-cluster", daemon=True)
        self._thread.start()

    # -- on callers' threads ----------------------------------------------------------------------

    def submit(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any], model: str | None, slo: SLO | None, id: str
    ) -> Answer[Any]:
        """A request of a caller; RequestError if its arguments cannot leave this process."""
        payload = asked_as_bytes(model, args, kwargs)
        answer: Answer[Any] = Answer(id, model or "", self._give_up, reader)
        caller = Caller(answer, payload, slo, stopwatch(), model, likeness_of(model, args, kwargs, slo))
        self._waiting.add(caller)
        self.post(partial(self._looking.come, caller))
        return answer

    @property
    def counts(self) -> Counts:
        """What became of requests and instances; whoever has an answer finds it counted."""
        return self._waiting.counts

    @property
    def open(self) -> int:
        """How many callers wait for an answer."""
        return len(self._waiting)

    @property
    def answers(self) -> Mapping[str, Answer[Any]]:
        """What callers wait for, by id."""
        return self._waiting.answers

    def status(self) -> Mapping[str, InstanceStatus]:
        """How each instance is, by its latest report; nobody is waited for."""
        now, there = stopwatch(), self.places
        known = [(each, there.get(each.name)) for each in list(self._head.fleet.instances.values())]
        return {each.name: status_of(each, place.place if place else "", now) for each, place in known}

    def post(self, work: Callable[[float], None]) -> None:
        """Have `work` done on the thread, with the present instant."""
        self._inbox.put(work)

    def ask(self, question: Callable[[Head, float], Any]) -> Future[Any]:
        """What `question` says of the head, on its thread, once its orders are on their way.

        RequestError, at once or as its answer, if nothing is asked any more.
        """
        answer: Future[Any] = Future()
        with self._gate:
            if self._ended:
                raise closed()
            self._questions.add(answer)
        answer.add_done_callback(self._questions.discard)

        def work(now: float) -> None:
            try:
                found = question(self._head, now)
            except BaseException as error:  # noqa: BLE001  it is the caller's
                self._then.append(partial(answer.set_exception, error))
            else:
                self._then.append(partial(answer.set_result, found))

        self.post(work)
        return answer

    def wait_empty(self, timeout_s: float | None) -> bool:
        """Wait until nobody waits for an answer."""
        return self._waiting.wait_empty(timeout_s)

    def close(self) -> None:
        """End the thread; requests without an answer end as cancelled."""
        self.post(self._close)
        self._thread.join()

    def _give_up(self, answer: Answer[Any]) -> None:
        self.post(partial(self._cancel, answer))

    # -- the thread -------------------------------------------------------------------------------

    def _run(self) -> None:
        woke_at = stopwatch()
        while not self._over:
            wake_at = self._head.wake_at()
            left = None if wake_at is None else max(wake_at - stopwatch(), 0.0)
            work: Callable[[float], None] | None = None
            with contextlib.suppress(queue.Empty):
                work = self._inbox.get(left)
            now = stopwatch()
            if wake_at is not None and now - max(wake_at, woke_at) > OVERSLEPT_S:
                self._head.overslept(now - max(wake_at, woke_at), now)
            woke_at = now
            while work is not None:
                self._do(work)
                work = None
                with contextlib.suppress(queue.Empty):
                    work = self._inbox.get_nowait()
            self._do(self._tick)
            self._do(self._carry_out)
            then, self._then = self._then, []
            for answer in then:
                answer()
        with self._gate:
            self._ended = True
        for question in list(self._questions):
            question.set_exception(closed())

    def _do(self, work: Callable[[float], None]) -> None:
        """One piece of work; what it raises is nobody else's."""
        try:
            work(stopwatch())
        except Exception:
            log.exception("the driver of a cluster met what it does not know")

    def _tick(self, now: float) -> None:
        wake_at = self._head.wake_at()
        if wake_at is not None and now >= wake_at:
            self._head.tick(now)

    def _close(self, now: float) -> None:
        self._end(RequestError("the cluster was closed", code="cancelled"))

    def _end(self, why: BaseException) -> None:
        """The thread ends; whoever waits hears why."""
        self._over = True
        self._waiting.end(why)

    def _give_way(self, error: Superseded) -> None:
        """Another head has the instances: nothing here counts any more."""
        if self._over:
            return
        log.error("%s", error)
        self._machines.leave()
        self._starting.give_way(error)
        self._end(RequestFailed(told(error), reason=str(error)))

    # -- requests ---------------------------------------------------------------------------------

    def _submitted(self, request: Request, now: float) -> None:
        """The head has a request."""
        steps, due = self._head.steps_of(request.id), request.arrival + request.slo.total
        arrival, name = request.arrival, request.graph.name
        self._telling.tell(Submitted(request.id, name, arrival, due, request.slo, steps, now))

    def _cancel(self, answer: Answer[Any], now: float) -> None:
        caller = self._waiting.get(answer.id)
        if caller is None or caller.answer is not answer:
            return
        if caller.described:
            self._head.cancel(answer.id, now)
        else:
            self._waiting.gave_up(caller)

    # -- orders -----------------------------------------------------------------------------------

    def _carry_out(self, now: float) -> None:
        """Tell of what happened, then carry out what the head wants.

        Whoever has an answer finds what happened before it counted. Instances that are lost end
        last: what they have to pass on is asked for before.
        """
        orders, events = self._head.pop_orders(), self._head.pop_events()
        for event in events:
            self._waiting.happened(event)
        self._tell_states()
        lost = [event for event in events if isinstance(event, Lost) and self._leaves(event.instance)]
        going: dict[str, list[to.ToInstance]] = {}
        for order in orders:
            self._carry_out_one(order, going)
        self._flush(going)
        for each in lost:
            self._machines.stop(each.instance, each.why, kill=True)

    def _carry_out_one(self, order: to.Order, going: dict[str, list[to.ToInstance]]) -> None:
        match order:
            case to.Answer():
                self._waiting.answer(order)
            case to.Forward():
                self._waiting.forward(order.emitted)
            case to.Start():
                self._starting.start(order.role)
            case to.Stop():
                if self._leaves(order.instance):
                    self._machines.stop(order.instance, order.why, kill=False)
            case to.Give():
                self._flush(going)
                self._pass_on(order, self._machines.pass_on(order))
            case to.Restore():
                self._flush(going)
                self._pass_on(order, self._machines.restore(order))
            case _:
                going.setdefault(order.instance, []).append(order)

    def _flush(self, going: dict[str, list[to.ToInstance]]) -> None:
        for name, orders in going.items():
            if name in self._alive:
                self._machines.order(name, orders)
        going.clear()

    def _pass_on(self, give: to.Give | to.Restore, passed: Future[None]) -> None:
        def failed(passed: Future[None]) -> None:
            error = passed.exception()
            if error is not None:
                text = str(error) if isinstance(error, NotMovable) else told(error)
                refused = to.Refused(give.id, give.next_term, text)
                self.post(lambda now: self._head.heard(give.target, refused, now))

        passed.add_done_callback(failed)

    # -- instances --------------------------------------------------------------------------------

    def _enter(self, name: str, role: str, found: Joined, now: float) -> None:
        head, device = self._head, f"{role} on {found.device}"
        self._looking.check_models(name, found)
        for graph in found.graphs:
            known = head.graphs.get(graph.name)
            if known is None:
                profiles = {stage: found.profiles[stage] for stage in graph.stages}
                head.extend(graph, profiles, device, "repeat")
        stages = {stage for graph in head.graphs.values() for stage in graph.stages if named(stage, found.stages)}
        prints = {graph.name: graph.print for graph in found.graphs}
        head.know(device, found.profiles)
        head.joined(name, now, stages=sorted(stages), role=role, device=device, prints=prints, only=found.stages)
        self._alive.add(name)
        self.places[name] = found
        self.stays[name] = now, math.inf
        self._tell_states()  # whoever waits for it may look at once
        self._listen(name, now)

    def _tell_states(self) -> None:
        self.states = {name: each.state for name, each in self._head.fleet.instances.items()}

    def _listen(self, name: str, now: float) -> None:
        news = self._machines.listen(name, now)
        news.add_done_callback(lambda news: self.post(partial(self._heard, name, news)))

    def _heard(self, name: str, news: Future[Heard], now: float) -> None:
        """An instance reported, or is dead."""
        if name not in self._alive:
            return
        error = news.exception()
        if isinstance(error, Superseded):
            self._give_way(error)
            return
        if error is not None:
            self._alive.discard(name)
            self.fault = error if isinstance(error, EngineDied) else self.fault
            self._head.lost(name, told(error), now)
            self._looking.elsewhere(name)
            return
        self._listen(name, now)
        heard = news.result()
        for id in heard.surprises:
            self._looking.surprised(id)
        for record in heard.records:
            if isinstance(record, Entered):
                self._telling.happened(record)
            else:
                self._telling.tell(record)
        for one in heard.news:
            self._one_heard(name, one, now)

    def _one_heard(self, name: str, news: News, now: float) -> None:
        report = news.report
        caller = self._waiting.get(getattr(report, "id", ""))
        if caller is not None and news.value:
            caller.value = news.value
        if caller is not None and caller.guessed and isinstance(report, to.Refused):
            caller.refused = bool(news.value)
        if isinstance(report, to.Made) and self._waiting.compare(report):
            self._head.cancel(report.id, now)
        self._head.heard(name, report, now)

    def _leaves(self, name: str) -> bool:
        """An instance is not there any more; whether it was."""
        if name not in self.places:
            return False
        del self.places[name]
        self.stays[name] = self.stays[name][0], stopwatch()
        self._alive.discard(name)
        self._looking.elsewhere(name)
        return True
