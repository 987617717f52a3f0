"""The requests of a service's callers, from `submit` to their answers."""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import Any

from neustream.core.types import SLO
from neustream.engine.answers import Result
from neustream.engine.engine import Engine
from neustream.errors import RequestError, shown
from neustream.service.answer import Answer
from neustream.service.mount import OWN, Call, Probe


@dataclass(frozen=True, slots=True)
class Sent:
    """A request of a caller: its answer, what it was promised, and when it came."""

    answer: Answer[Any]
    promise: SLO
    since: float


class Requests:
    """Has an engine serve what callers ask for, and answers them; it knows nothing of its service.

    Args:
        idle: called whenever a request has ended.

    Attributes:
        open: the answers that callers wait for, by id.
    """

    def __init__(self, engine: Engine, open: dict[str, Answer[Any]], idle: Callable[[], None]) -> None:
        self.open = open
        self._engine = engine
        self._idle = idle
        self._probing: set[str] = set()  # requests that are still to be looked at

    def add(self, id: str, model: str, asked: Call | Probe, promise: SLO, since: float) -> Answer[Any]:
        """Have a request served that came at `since`; RequestError if its id is taken."""
        answer: Answer[Any] = Answer(id, model, self.give_up, asked.reader)
        if self.open.setdefault(id, answer) is not answer:
            asked.over()
            raise RequestError(f"request id {id!r} is already being served")
        try:
            self._post(Sent(answer, promise, since), asked)
        except BaseException:
            del self.open[id]
            asked.over()
            raise
        return answer

    def give_up(self, answer: Answer[Any]) -> None:
        """Its caller wants no answer any more."""
        if self.open.get(answer.id) is answer:
            id = _probe_id(answer) if answer.id in self._probing else answer.id
            with contextlib.suppress(RequestError):  # the engine is closed: it is over anyway
                self._engine.cancel(id)

    def _post(self, sent: Sent, asked: Call | Probe, *, follows: bool = False) -> None:
        """Have the engine serve a request, or first what has to be known of it."""
        answer, graph, params = sent.answer, asked.graph, asked.params
        if isinstance(asked, Probe):
            probe = asked
            self._probing.add(answer.id)
            done = self._engine.submit(graph, params, slo=sent.promise, id=_probe_id(answer))
            done.add_done_callback(lambda done: self._probed(sent, probe, done))
            return
        call = asked
        done = self._engine.submit(
            graph,
            params,
            slo=sent.promise,
            id=answer.id,
            on_output=None if call.reader is None else answer.push,
            since=sent.since,
            follows=follows,
        )
        done.add_done_callback(lambda done: self._answered(sent, call, done))

    def _probed(self, sent: Sent, probe: Probe, done: Future[Result]) -> None:
        """What the device told of a request is there: go on with the request itself."""
        answer = sent.answer
        call: Call | None = None
        try:
            result = replace(done.result(), id=answer.id)
            if result.output is None:
                answer.ended = result
            result.unwrap()
            call = probe.then(result)
            self._probing.discard(answer.id)
            self._post(sent, call, follows=True)
            if answer.cancelled():  # just now
                self.give_up(answer)
        except Exception as error:
            (probe if call is None else call).over()
            self._forget(answer)
            answer.refuse(error)

    def _answered(self, sent: Sent, call: Call, done: Future[Result]) -> None:
        self._forget(sent.answer)
        call.over()
        sent.answer.settle(done, call.value)
        self._idle()

    def _forget(self, answer: Answer[Any]) -> None:
        self._probing.discard(answer.id)
        self.open.pop(answer.id, None)


def checked(id: str | None) -> str:
    """The id of a request; RequestError for one that is reserved."""
    if id is None:
        return uuid.uuid4().hex
    if not isinstance(id, str):
        raise RequestError(f"a request's id is a string, got {shown(id)}")
    if id.startswith(OWN):
        raise RequestError(f"request id {shown(id)}: ids that begin with {OWN!r} are the service's")
    return id


def _probe_id(answer: Answer[Any]) -> str:
    return f"{OWN}probe/{answer.id}"
