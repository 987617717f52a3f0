"""The requests of a service's callers, from `submit` to their answers."""

from __future__ import annotations

import contextlib
import threading
import uuid
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from neustream.core.events import Emitted, LegEnded
from neustream.core.types import SLO
from neustream.engine import crossing as engine
from neustream.engine.answers import Result, settle
from neustream.engine.engine import Engine
from neustream.engine.events import Record
from neustream.errors import RequestError, shown
from neustream.service.answer import Answer
from neustream.service.mount import OWN, Call, Probe

PROBE = f"{OWN}probe/"
"""What ids of requests begin with that show what another one is."""


@dataclass(frozen=True, slots=True)
class Asked:
    """What a caller asked of a model, in the model's own arguments."""

    model: str
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Moved:
    """A request on its way from one service to another: plain data, as far as its arguments are.

    Args:
        asked: what its caller asked; it is checked anew by the service that goes on with it.
        there: where it is.
        outputs: those that came so far, as far as they are read.
    """

    asked: Asked
    there: engine.Moved
    outputs: tuple[Emitted, ...]

    @property
    def id(self) -> str:
        return self.there.carry.id


@dataclass(slots=True)
class Sent:
    """A request of a caller: its answer, what it was promised, and when it came.

    `call`: as the engine serves it, once that is known; `moved`: where it was, if it came from
    another service, until it is here; `taken`: who waits for that.
    """

    answer: Answer[Any]
    asked: Asked
    promise: SLO
    since: float
    call: Call | None = None
    moved: Moved | None = None
    taken: Future[Answer[Any]] | None = None


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
        self._sent: dict[str, Sent] = {}
        self._lock = threading.Lock()
        self._behind: dict[str, list[tuple[Sent, Call]]] = {}  # those that wait for another one, by its id

    def add(self, id: str, asked: Asked, call: Call | Probe, promise: SLO, since: float) -> Answer[Any]:
        """Have a request served that came at `since`; RequestError if its id is taken."""
        answer = self._open(id, asked, call)
        self._begin(Sent(answer, asked, promise, since), call)
        return answer

    def hear(self, record: Record) -> None:
        """Observe the engine: who reads an answer is told of the parts that it is through."""
        if isinstance(record, LegEnded) and (answer := self.open.get(record.id)) is not None:
            answer.leg(record)

    def give(self, id: str, *, cached: bool) -> Future[Moved]:
        """See `Service.give`."""
        gone: Future[Moved] = Future()
        sent = self._sent.get(id)
        if sent is None or sent.moved is not None:
            gone.set_exception(RequestError(f"give: no request {id!r} is being served here"))
        elif sent.call is None:
            looked_at = f"give: request {id!r} is still being looked at"
            gone.set_exception(RequestError(looked_at, code="too_early"))
        else:
            left = self._engine.give(id, cached=cached)
            left.add_done_callback(lambda left: settle(gone, lambda: _moved(sent, left.result())))
        return gone

    def take(self, moved: Moved, call: Call | Probe, since: float) -> Future[Answer[Any]]:
        """See `Service.take`."""
        answer = self._open(moved.id, moved.asked, call)
        for output in moved.outputs:
            answer.push(output)
        promise = moved.there.carry.slo
        taken: Future[Answer[Any]] = Future()
        self._begin(Sent(answer, moved.asked, promise, since, moved=moved, taken=taken), call)
        return taken

    def _open(self, id: str, asked: Asked, call: Call | Probe) -> Answer[Any]:
        """The answer of a request; RequestError if its id is taken."""
        answer: Answer[Any] = Answer(id, asked.model, self.give_up, call.reader)
        if self.open.setdefault(id, answer) is not answer:
            call.over()
            raise RequestError(f"request id {id!r} is already being served")
        return answer

    def _begin(self, sent: Sent, call: Call | Probe) -> None:
        id = sent.answer.id
        self._sent[id] = sent
        if isinstance(call, Call) and self._waits(sent, call):
            return
        try:
            self._post(sent, call)
        except BaseException:
            self._forget(sent.answer)
            call.over()
            raise

    def give_up(self, answer: Answer[Any]) -> None:
        """Its caller wants no answer any more."""
        if self.open.get(answer.id) is not answer:
            return
        waiting = self._no_longer_waits(answer)
        if waiting is not None:
            self._forget(answer)
            waiting.over()
        else:
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
        call = sent.call = asked
        if sent.moved is not None:
            self._enter(sent, sent.moved, call)
            return
        done = self._engine.submit(
            graph,
            params,
            slo=sent.promise,
            id=answer.id,
            on_output=None if call.reader is None else partial(self._made, answer),
            since=sent.since,
            follows=follows,
        )
        done.add_done_callback(lambda done: self._answered(sent, call, done))

    def _enter(self, sent: Sent, moved: Moved, call: Call) -> None:
        """Have the engine go on with a request of another service."""
        carry = replace(moved.there.carry, params=call.params)
        there = self._engine.take(
            replace(moved.there, carry=carry),
            call.graph,
            on_output=None if call.reader is None else partial(self._made, sent.answer),
        )
        there.add_done_callback(lambda there: self._entered(sent, call, there))

    def _entered(self, sent: Sent, call: Call, there: Future[Future[Result]]) -> None:
        """It is here, or cannot be."""
        answer, taken = sent.answer, sent.taken
        sent.moved = None
        assert taken is not None
        if there.exception() is not None:
            self._forget(answer)
            call.over()
        else:
            done = there.result()
            done.add_done_callback(lambda done: self._answered(sent, call, done))
            if answer.cancelled():
                self.give_up(answer)

        def here() -> Answer[Any]:
            there.result()  # or what it raises
            return answer

        settle(taken, here)

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
        except Exception as error:  # noqa: BLE001  the answer raises it
            (probe if call is None else call).over()
            self._forget(answer)
            answer.refuse(error)
            if sent.taken is not None and not sent.taken.done():
                sent.taken.set_exception(error)

    def _answered(self, sent: Sent, call: Call, done: Future[Result]) -> None:
        self._forget(sent.answer)
        call.over()
        sent.answer.settle(done, call.value)
        self._idle()

    def _forget(self, answer: Answer[Any]) -> None:
        self._probing.discard(answer.id)
        with self._lock:
            self._sent.pop(answer.id, None)
        self.open.pop(answer.id, None)
        self._go_on(answer.id)

    # -- those that begin as another one does -----------------------------------------------------

    def _waits(self, sent: Sent, call: Call) -> bool:
        """Whether another one goes first, and has not had an output."""
        if call.behind is None or call.behind.id == sent.answer.id or sent.moved is not None:
            return False
        with self._lock:
            first = self._sent.get(call.behind.id)
            if first is None or first.answer.outputs:
                return False
            self._behind.setdefault(call.behind.id, []).append((sent, call))
        return True

    def _no_longer_waits(self, answer: Answer[Any]) -> Call | None:
        """The call of a request that waits for another one: it is out of the line; None: it does not wait."""
        with self._lock:
            for line in self._behind.values():
                for at, (sent, call) in enumerate(line):
                    if sent.answer is answer:
                        del line[at]
                        return call
        return None

    def _made(self, answer: Answer[Any], output: Emitted) -> None:
        """An output of a request, on the engine's thread."""
        answer.push(output)
        if not output.index:
            self._go_on(answer.id)

    def _go_on(self, id: str) -> None:
        """Request `id` has had an output, or is over: those behind it are served."""
        with self._lock:
            waiting = self._behind.pop(id, [])
            there = id in self._sent
        for sent, call in waiting:
            if sent.answer.cancelled():
                self._forget(sent.answer)
                call.over()
                continue
            assert call.behind is not None
            known = call.behind.known if there else {}
            try:
                self._post(sent, replace(call, params={**call.params, **known}), follows=True)
            except Exception as error:  # noqa: BLE001  the answer raises it
                self._forget(sent.answer)
                call.over()
                sent.answer.refuse(error)
            else:
                if sent.answer.cancelled():  # just now
                    self.give_up(sent.answer)


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
    return f"{PROBE}{answer.id}"


def _moved(sent: Sent, there: engine.Moved) -> Moved:
    """What goes to another service; the parameters are made anew there."""
    call = sent.call
    assert call is not None
    outputs = [replace(one, update=call.reads(one.update)) for one in sent.answer.outputs]
    carry = replace(there.carry, params={})
    return Moved(sent.asked, replace(there, carry=carry), tuple(outputs))
