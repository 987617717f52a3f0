"""The lives of requests at a head: routed, sent, answered; begun anew when an instance is gone."""

from __future__ import annotations

import math
from collections.abc import Callable

from neustream.cluster.book import Book, Open, Snapshot
from neustream.cluster.fleet import Instance, Route, Router
from neustream.cluster.happenings import Restarted, Routed
from neustream.cluster.messages import (
    Answer,
    Cancel,
    Forward,
    Free,
    Made,
    Outputs,
    Over,
    Reserve,
    Restore,
    Send,
)
from neustream.cluster.succession import THERE, Succession
from neustream.core.events import Emitted, Ended, Update
from neustream.core.job import Status
from neustream.core.reasons import due, span
from neustream.core.types import TICK
from neustream.errors import PolicyError, shown

RETRY_S = 0.05
"""A router that lets a request wait without saying until when is asked again after so long."""


class Placing:
    """Finds instances for requests, and gives each its one answer."""

    def __init__(
        self,
        book: Book,
        router: Router,
        succession: Succession,
        stopwatch: Callable[[], float],
    ) -> None:
        self.book = book
        self.router = router
        self._succession = succession
        self._stopwatch = stopwatch

    # -- going out --------------------------------------------------------------------------------

    def place(self, one: Open, now: float) -> None:
        """Send a request to where it stands, or to the instance that the router chooses.

        It waits if there is none.
        """
        if self._succession.until > now:
            until = self._succession.until
            self._wait(one, until if until < math.inf else self._patience(one, now), now)
            return
        fleet = self.book.fleet
        fleet.now = now
        there = self._succession.where(one.id)
        died = self._succession.pasts.recall(one, standing=there != "")
        if died:
            self.restart(one, f"lost with instance {died!r} while there was no head", now)
            return
        if there:
            self._send(one, fleet.instances[there], Route(there, THERE), 0.0, now)
            return
        asked = one.ask(now)
        if not len(fleet.able(asked)):
            self._wait(one, self._patience(one, now), now)
            return
        began = self._stopwatch()
        route = self.router.route(fleet, asked)
        seconds = self._stopwatch() - began
        if route.instance is None:
            until = now + RETRY_S if route.wait_until is None else route.wait_until
            self._wait(one, max(until, now + TICK), now)
            return
        instance = fleet.instances.get(route.instance)
        if instance is None or instance.row not in fleet.able(asked):
            name = type(self.router).__name__
            raise PolicyError(
                f"router {name!r} chose instance {shown(route.instance)} for request {one.id!r}, "
                "which is none that can serve it now"
            )
        self._send(one, instance, route, seconds, now)

    def _send(
        self, one: Open, instance: Instance, route: Route, seconds: float, now: float
    ) -> None:
        """Have an instance serve a request. `seconds`: that it took to choose it."""
        book = self.book
        one.issued += 1
        one.term = one.issued
        one.phase = "sent"
        one.began, one.away = False, ""
        one.number = book.fleet.sent(instance, one.ask(now))
        book.put(one, instance.name)
        book.wake(one, now + book.settings.send_s)
        if one.snapshot is not None:
            self._restore(one, one.snapshot, instance)
        else:
            self._begin(one, instance, now)
        book.events.append(
            Routed(one.id, one.term, instance.name, route.reason, now, seconds, route.forecast)
        )

    def _begin(self, one: Open, instance: Instance, now: float) -> None:
        """It begins at its start, or where it stands."""
        book, request = self.book, one.request
        age = now - one.arrival + book.settings.delay_s
        made = tuple(one.made)
        book.orders.append(
            Send(
                instance.name,
                one.id,
                one.term,
                request.graph.name,
                request.slo,
                request.params,
                age,
                now,
                one.number,
                made,
            )
        )

    def _restore(self, one: Open, snapshot: Snapshot, instance: Instance) -> None:
        """It goes on from its copy, which another instance sends there, or has itself."""
        one.restoring = True
        target, orders = instance.name, self.book.orders
        orders.append(Reserve(target, one.id, one.term, one.number, 0.0))
        orders.append(Restore(snapshot.keeper, one.id, snapshot.term, target, one.term))

    def refused(self, one: Open, why: str, now: float) -> None:
        """Its instance does not take it. If nothing came of its copy it begins at its start."""
        if not one.restoring:
            self.end(one, "failed", why, None, now)
            return
        self.book.forget_copy(one)
        self.restart(one, why, now)

    def _wait(self, one: Open, until: float, now: float) -> None:
        self.book.put(one, "")
        one.phase = "waiting"
        self.book.wake(one, until)

    def _patience(self, one: Open, now: float) -> float:
        """Until when a request waits for an instance that can serve it."""
        latest = one.due - self.alone(one)
        if latest < math.inf:
            return max(latest, now + TICK)
        return max(one.arrival + self.book.settings.patience_s, now + TICK)

    def alone(self, one: Open) -> float:
        """Seconds that a request takes alone, on the best kind of device for it."""
        seconds = math.inf
        calls = one.ahead.calls
        for rates in self.book.fleet.rates.values():
            if rates.profiles.keys() >= calls.keys():
                seconds = min(seconds, rates.alone(calls))
        return seconds if seconds < math.inf else 0.0

    def again(self, one: Open, now: float) -> None:
        """The time of a request that waits, or that no instance acknowledged, has come."""
        if one.phase == "sent":
            self._free(one)
            if one.restoring:  # whoever kept its copy may have none any more
                self.book.forget_copy(one)
            self.restart(one, f"instance {one.where!r} did not acknowledge it", now)
        elif not len(self.book.fleet.able(one.ask(now))) and now >= self._patience(one, now) - TICK:
            left = due(one.due - now) if one.due < math.inf else "no promise"
            waited = span(now - one.arrival)
            reason = f"no instance serves stage {one.asked.stage!r}: waited {waited}, {left}"
            self.end(one, "failed", reason, None, now)
        else:
            self.place(one, now)

    def retry(self, now: float) -> None:
        """The fleet changed: whoever waits is asked about again."""
        for one in list(self.book.waiting.values()):
            self.place(one, now)

    def _free(self, one: Open) -> None:
        if one.where in self.book.fleet.instances:
            self.book.orders.append(Free(one.where, one.id, one.issued))

    # -- beginning anew ---------------------------------------------------------------------------

    def restart(self, one: Open, why: str, now: float) -> None:
        """A request's instance is gone, or out of reach: it begins anew, or ends here."""
        settings = self.book.settings
        if one.moving is not None and one.moving.target in self.book.fleet.instances:
            self.book.orders.append(Free(one.moving.target, one.id, one.moving.term))
        one.moving, one.restoring = None, False
        one.restarts += 1
        if one.snapshot is not None and one.snapshot.keeper not in self.book.fleet.instances:
            one.snapshot = None
        if one.cancelled:
            self.end(one, "cancelled", "cancelled by the caller", None, now)
            return
        if one.deaths >= settings.deaths:
            reason = f"was running when {one.deaths} instances died; the last: {why}"
            self.end(one, "failed", reason, None, now)
            return
        if one.restarts > settings.restarts:
            reason = f"{why}; it had begun anew {settings.restarts} times before"
            self.end(one, "failed", reason, None, now)
            return
        if one.delivered and one.again == "fail":
            reason = f"{why}, after {one.delivered} outputs; its stream cannot be made again"
            self.end(one, "failed", reason, None, now)
            return
        needed, left = self.alone(one), one.due - now
        if needed > left + TICK:
            self.end(one, "failed", f"{why}; needs {span(needed)} more, {due(left)}", None, now)
            return
        saved = one.snapshot is not None
        self.book.events.append(Restarted(one.id, one.issued + 1, why, now, saved))
        self.place(one, now)

    # -- coming back ------------------------------------------------------------------------------

    def made(self, one: Open, told: Made, now: float) -> None:
        """An instance made an output."""
        self.deliver(one, told.index, told.update, now)

    def unheard(self, one: Open, outputs: Outputs, now: float) -> None:
        """Outputs of the place that a request came from."""
        for index, update in outputs:
            self.deliver(one, index, update, now)

    def deliver(self, one: Open, index: int, update: Update, now: float) -> None:
        """Pass an output on, unless the caller has it. After a gap it begins anew."""
        if index < one.delivered or one.id not in self.book.requests:
            return
        if index > one.delivered:
            self._gap(one, index, now)
            return
        late = now > one.due_next + TICK
        one.late = one.late or late
        one.had([update])
        emitted = Emitted(one.id, index, update, now, now - one.arrival, late, one.where)
        self.book.orders.append(Forward(emitted))

    def _gap(self, one: Open, index: int, now: float) -> None:
        """Outputs before one are missing."""
        self._free(one)
        self.restart(one, f"outputs {one.delivered} to {index - 1} of its stream were lost", now)

    def over(self, one: Open, told: Over, now: float) -> None:
        """An instance says that a request is over."""
        one.ran(told.waited_s)
        if told.outputs > one.delivered and told.status == "done":
            self._gap(one, told.outputs, now)
            return
        if one.cancelled and told.status != "done":
            self.end(one, "cancelled", "cancelled by the caller", None, now)
            return
        self.end(one, told.status, told.reason, told.output, now, attainable=told.attainable)

    def end(
        self,
        one: Open,
        status: Status,
        reason: str,
        output: Update | None,
        now: float,
        *,
        attainable: bool = True,
    ) -> None:
        """The one answer of a request."""
        book = self.book
        where = one.where
        there = self._succession.where(one.id)
        if there:
            book.orders.append(Free(there, one.id, self._succession.before))
        book.forget_copy(one)
        book.put(one, "")
        del book.waiting[one.id], book.requests[one.id]
        late = one.late or now > one.due + TICK
        if not one.delivered:
            late = late or now > one.due_next + TICK
        on_time = status == "done" and not late
        ended = Ended(
            one.id,
            status,
            reason,
            output,
            on_time,
            one.arrival,
            now,
            one.request.slo,
            one.steps,
            where,
            one.waited_s,
            attainable,
            one.delivered,
        )
        book.orders.append(Answer(ended))

    def cancel(self, one: Open, now: float) -> None:
        """A caller gave a request up: it ends here if it waits here, else where it is."""
        one.cancelled = True
        if one.phase == "waiting":
            self.end(one, "cancelled", "cancelled by the caller", None, now)
        else:
            self.book.orders.append(Cancel(one.where, one.id, one.term))
