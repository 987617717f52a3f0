"""Callers that wait for an answer: what comes of their requests goes to them, and is counted first."""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import replace
from functools import partial
from typing import Any

from neustream.backends.ray.callers import Caller, Counts, came_out_different, value_of
from neustream.backends.ray.telling import Telling
from neustream.backends.ray.wire import PRINT
from neustream.cluster import messages as to
from neustream.cluster.happenings import Happening, Lost, Moved, Restarted, Unmoved
from neustream.core.events import Emitted
from neustream.engine.answers import Result
from neustream.errors import RequestError, RequestFailed
from neustream.service.answer import Answer


def closed() -> RequestError:
    """For who asks for something when nobody is answered any more."""
    return RequestError("the cluster was closed, or another head has its instances", code="closed")


class Waiting:
    """Callers by the ids of their requests. They come on any thread; all else is the driver's.

    Args:
        telling: is told of outputs and ends, before their callers have them.

    Attributes:
        counts: what became of requests; whoever has an answer finds it counted.
    """

    def __init__(self, telling: Telling) -> None:
        self.counts = Counts()
        self._telling = telling
        self._callers: dict[str, Caller] = {}
        self._changed = threading.Condition()
        self._over = False

    def __len__(self) -> int:
        return len(self._callers)

    def add(self, caller: Caller) -> None:
        """One more; RequestError if its id is taken, or nobody is answered any more."""
        id = caller.answer.id
        with self._changed:
            if self._over:
                raise closed()
            if id in self._callers:
                raise RequestError(f"request id {id!r} is already being served")
            self._callers[id] = caller
            self.counts.submitted += 1

    def get(self, id: str) -> Caller | None:
        """Who waits for a request."""
        return self._callers.get(id)

    @property
    def answers(self) -> Mapping[str, Answer[Any]]:
        """What they wait for, by id."""
        with self._changed:
            return {id: caller.answer for id, caller in self._callers.items()}

    def wait_empty(self, timeout_s: float | None) -> bool:
        """Wait until nobody waits for an answer."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._callers, timeout_s)

    def end(self, why: BaseException) -> None:
        """Nobody is answered any more; whoever waits hears why."""
        with self._changed:
            self._over = True
        for caller in list(self._callers.values()):
            self.refuse(caller, why)

    # -- what comes of a request ------------------------------------------------------------------

    def forward(self, emitted: Emitted) -> None:
        """An output."""
        caller = self._callers.get(emitted.id)
        if caller is not None:
            caller.prints.append(emitted.update[PRINT])
            caller.answer.push(emitted)
        self._telling.tell(emitted)

    def compare(self, made: to.Made) -> str:
        """Why a request cannot go on: an output that is made again has to be the one that its caller has."""
        caller = self._callers.get(made.id)
        if caller is None or not came_out_different(caller, made):
            return ""
        reason = f"its instance was lost, and output {made.index} came out different when it was made again"
        caller.fault = RequestFailed(f"request {made.id!r}: {reason}", reason=reason)
        return reason

    def answer(self, order: to.Answer) -> None:
        """A request is over."""
        ended = order.ended
        caller = self._callers.get(ended.id)
        if caller is None:
            return
        status = "failed" if caller.fault is not None else ended.status
        outcome: str = status if status != "done" else ("on_time" if ended.on_time else "late")
        outcome = "refused" if caller.refused else outcome
        setattr(self.counts, outcome, getattr(self.counts, outcome) + 1)
        self._forget(caller)
        reason = ended.reason if caller.fault is None else caller.fault.reason
        output: Mapping[str, Any] | None = {} if status == "done" else None
        latency_s, on_time = ended.latency_s, ended.on_time and status == "done"
        code = ended.code if status == ended.status else "failed"
        self._telling.tell(ended if status == ended.status else replace(ended, status="failed", on_time=False))
        result = Result(ended.id, status, reason, output, latency_s, on_time, code=code, waited_s=ended.waited_s)
        done: Future[Result] = Future()
        done.set_result(result)
        caller.answer.settle(done, partial(value_of, caller))

    def refuse(self, caller: Caller, error: BaseException) -> None:
        """A request that never came to the head, or whose head is no more."""
        self.counts.refused += 1
        self._forget(caller)
        caller.answer.refuse(error)

    def gave_up(self, caller: Caller) -> None:
        """Its caller gave a request up of which the head knows nothing."""
        self.counts.cancelled += 1
        self._forget(caller)

    def _forget(self, caller: Caller) -> None:
        with self._changed:
            self._callers.pop(caller.answer.id, None)
            self._changed.notify_all()

    # -- what becomes of moves and instances ------------------------------------------------------

    def happened(self, event: Happening) -> None:
        """Count what happened, and tell of it."""
        counts = self.counts
        match event:
            case Moved():
                counts.moved += 1
                if event.held_at < math.inf:
                    counts.downtimes_s.append(event.at - event.held_at)
            case Unmoved():
                counts.unmoved += 1
            case Restarted():
                counts.restarted += 1
            case Lost():
                counts.lost += 1
        self._telling.happened(event)
