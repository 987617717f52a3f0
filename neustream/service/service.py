"""Models behind one engine: `submit` from any thread, an `Answer` for each request."""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import Any

from neustream.by_name import make_policy
from neustream.core.policy import Policy
from neustream.core.profile import LatencyProfile
from neustream.core.types import SLO
from neustream.engine.answers import Result
from neustream.engine.clock import WallClock
from neustream.engine.desk import Limit
from neustream.engine.engine import Engine
from neustream.engine.events import Observer, Record
from neustream.engine.report import Report
from neustream.engine.routing import Router
from neustream.engine.snapshot import Snapshot
from neustream.errors import BackendError, RequestError, nearest, shown
from neustream.service.answer import Answer
from neustream.service.members import POOL, Gone, device_at, member_of, open_all
from neustream.service.mount import OWN, REHEARSAL, Call, Instance, Mount, Probe
from neustream.service.options import names_of, places_of, slo_of


class Service:
    """One model or several, on one device or several, decided by one scheduler a device.

    It serves from the moment it is made until `close`; as a context manager it closes itself.

    Args:
        mounts: the models by name; "" is the name of one that is alone.
        devices: where they are served, an instance of each model on each; a place that is named
            twice is two. None: each model where it is.
        placement: the devices of some models; the others go to all.
        slo: what requests are promised that bring no promise of their own; a number is
            `SLO(total=...)`.
        policy: an object or the name of one; default: `neustream.core.policies.DEFAULT`.
        max_open: the most requests without an answer; more are refused. None: no limit.
        router, step_timeout_s, forgiving: see `Engine`.
        observers: told of every Record; they must be quick.

    Attributes:
        engine: what serves; report: what became of all requests so far.

    Raises:
        BackendError: a model cannot be served; those that were ready are the caller's again.
    """

    def __init__(
        self,
        mounts: Mapping[str, Mount],
        *,
        devices: Sequence[str] | None = None,
        placement: Mapping[str, Sequence[str]] | None = None,
        slo: SLO | float | None = None,
        policy: Policy | str | None = None,
        router: Router | None = None,
        max_open: int | None = None,
        step_timeout_s: float | None = None,
        forgiving: bool = True,
        observers: Sequence[Observer] = (),
    ) -> None:
        self.slo = slo_of(slo)
        self.report = Report()
        self._mounts = dict(mounts)
        self._open: dict[str, Answer[Any]] = {}
        self._probing: set[str] = set()  # requests that are still to be looked at
        self._rehearsing: set[str] = set()
        self._closing = False
        self._limit = Limit(max_open)
        rule = make_policy(policy)
        if not mounts:
            raise BackendError("a service needs a model; got none")
        for name, mount in self._mounts.items():
            mount.check(name)
        homes = {name: mount.device for name, mount in self._mounts.items()}
        places, placed = places_of(homes, devices, placement)
        told: list[Observer] = [self.report, *observers]
        heard: list[Observer] = [OfCallers(observer) for observer in told]
        with contextlib.ExitStack() as undo:
            self._devices = [device_at(place, undo, name) for name, place in zip(names_of(places), places, strict=True)]
            here = open_all(self._mounts, self._devices, placed, self, undo)
            self.engine = Engine(
                [
                    member_of(self._mounts, device, instances, rule)
                    for device, instances in zip(self._devices, here, strict=True)
                ],
                WallClock(),
                [*heard, *[one for mount in self._mounts.values() for one in mount.observers]],
                router=router,
                step_timeout_s=step_timeout_s,
                forgiving=forgiving,
            ).start()
            undo.pop_all()

    # -- requests ---------------------------------------------------------------------------------

    def submit(
        self,
        *args: Any,
        model: str | None = None,
        slo: SLO | float | None = None,
        id: str | None = None,
        **kwargs: Any,
    ) -> Answer[Any]:
        """Ask a model for something, with its own arguments; safe from any thread, never waits.

        What they are is the model's business: those of a pipeline's own call, `prompt` and
        `max_tokens` of a language model, parameters of a graph. They are checked before anything
        is queued.

        Args:
            model: which one, if there are several.
            slo: what the request is promised; a number is `SLO(total=...)`. Default: the service's.
            id: its name; default: a random one.

        Raises:
            RequestError: for what cannot be served, while `max_open` requests are open, or once
                the service is closed. What a model's own library has against its arguments is
                raised as it is.
        """
        self.engine.ready()
        name, mount = self._mount(model)
        promise = self.slo if slo is None else slo_of(slo)
        request = _checked(id)
        self._limit.check(request, len(self._open), self.engine.wait_s)
        since = self.engine.clock.now()
        asked = mount.request(*args, **kwargs)
        answer: Answer[Any] = Answer(request, name, self._give_up, asked.reader)
        if self._open.setdefault(request, answer) is not answer:
            asked.over()
            raise RequestError(f"request id {request!r} is already being served")
        try:
            self._post(Sent(answer, promise, since), asked)
        except BaseException:
            del self._open[request]
            asked.over()
            raise
        self._stop_rehearsing()
        return answer

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Ask and wait."""
        return self.submit(*args, **kwargs).result()

    def cancel(self, id: str) -> bool:
        """Give a request up by its id; False if it is over, or never was."""
        answer = self._open.get(id)
        return answer is not None and not answer.cancelled() and answer.cancel()

    # -- how it is --------------------------------------------------------------------------------

    @property
    def models(self) -> Mapping[str, Mount]:
        """What is served, by name."""
        return dict(self._mounts)

    @property
    def profiles(self) -> Mapping[str, LatencyProfile]:
        """The profiles that decisions are made by now, what was learnt included.

        Where several devices serve a stage, those of the first.
        """
        found: dict[str, LatencyProfile] = {}
        for member in reversed(self.engine.members):
            found |= member.scheduler.times.profiles
        return found

    def snapshot(self) -> Snapshot:
        """How the engine is; from any thread, without waiting."""
        return self.engine.snapshot()

    def close(self, *, cancel: bool = False, timeout_s: float | None = None) -> None:
        """Serve what is open (or end it as cancelled), then stop; models are the caller's again.

        `timeout_s`, and the errors: see `Engine.close`. Closing twice is nothing.
        """
        self._closing = True
        self._stop_rehearsing()
        self.engine.close(cancel=cancel, timeout_s=timeout_s)
        with contextlib.ExitStack() as closing:  # all of them, also if one raises
            for mount in self._mounts.values():
                closing.callback(mount.close)

    def __enter__(self) -> Service:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close(cancel=exc[0] is not None)

    # -- what it does for its mounts --------------------------------------------------------------

    def extend(self, instances: Mapping[str, Instance]) -> None:
        """See `Host`."""
        for device in self._devices:
            instance = instances.get(device.name)
            if instance is not None:
                device.executor.add(instance.modules, check_finite=instance.check_finite)
                self.engine.add(POOL, instance.profiles, device.name)

    def retire(self, stages: Mapping[str, Sequence[str]]) -> None:
        """See `Host`."""
        for device in self._devices:
            if device.name in stages:
                gone = self.engine.retire(POOL, stages[device.name], device.name)
                gone.add_done_callback(Gone(device.executor, stages[device.name]))

    # -- inside -----------------------------------------------------------------------------------

    def _mount(self, name: str | None) -> tuple[str, Mount]:
        if name is None and len(self._mounts) == 1:
            return next(iter(self._mounts.items()))
        if not isinstance(name, str) or name not in self._mounts:
            raise RequestError(f"model={shown(name)}: {nearest(str(name), self._mounts)}")
        return name, self._mounts[name]

    def _post(self, sent: Sent, asked: Call | Probe) -> None:
        """Have the engine serve a request, or first what has to be known of it."""
        answer, graph, params = sent.answer, asked.graph, asked.params
        if isinstance(asked, Probe):
            probe = asked
            self._probing.add(answer.id)
            done = self.engine.submit(graph, params, slo=sent.promise, id=_probe_id(answer))
            done.add_done_callback(lambda done: self._probed(sent, probe, done))
            return
        call = asked
        done = self.engine.submit(
            graph,
            params,
            slo=sent.promise,
            id=answer.id,
            on_output=None if call.reader is None else answer.push,
            since=sent.since,
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
            self._post(sent, call)
            if answer.cancelled():  # just now
                self._give_up(answer)
        except Exception as error:
            (probe if call is None else call).over()
            self._forget(answer)
            answer.refuse(error)

    def _answered(self, sent: Sent, call: Call, done: Future[Result]) -> None:
        self._forget(sent.answer)
        call.over()
        sent.answer.settle(done, call.value)
        if not self._open:
            self._rehearse()

    def _forget(self, answer: Answer[Any]) -> None:
        self._probing.discard(answer.id)
        self._open.pop(answer.id, None)

    def _give_up(self, answer: Answer[Any]) -> None:
        if self._open.get(answer.id) is answer:
            self._cancel(_probe_id(answer) if answer.id in self._probing else answer.id)

    def _cancel(self, id: str) -> None:
        with contextlib.suppress(RequestError):  # the engine is closed: it is over anyway
            self.engine.cancel(id)

    # -- while it idles ---------------------------------------------------------------------------

    def _rehearse(self) -> None:
        """Nobody wants anything: let a mount serve some requests that teach it what steps take."""
        if self._closing or self._rehearsing:
            return
        for mount in self._mounts.values():
            for call in mount.rehearsal():
                self._rehearse_one(call)
            if self._rehearsing:
                return

    def _rehearse_one(self, call: Call) -> None:
        id = f"{REHEARSAL}{uuid.uuid4().hex}"
        try:
            done = self.engine.submit(call.graph, call.params, id=id)
        except RequestError:  # it is being closed
            call.over()
            return
        self._rehearsing.add(id)
        done.add_done_callback(lambda _: self._rehearsed(call, id))
        if self._open:  # since a moment ago: who asked may not have seen this one
            self._cancel(id)

    def _rehearsed(self, call: Call, id: str) -> None:
        self._rehearsing.discard(id)
        call.over()
        if not self._open:
            self._rehearse()

    def _stop_rehearsing(self) -> None:
        for id in list(self._rehearsing):
            self._cancel(id)


@dataclass(frozen=True, slots=True)
class Sent:
    """A request of a caller: its answer, what it was promised, and when it came."""

    answer: Answer[Any]
    promise: SLO
    since: float


class OfCallers:
    """An observer, told of what callers asked for; not of requests that are the service's own."""

    def __init__(self, observer: Observer) -> None:
        self._observer = observer

    def __call__(self, record: Record) -> None:
        id = getattr(record, "id", "")
        if not id.startswith(OWN):
            self._observer(record)

    def __repr__(self) -> str:
        return repr(self._observer)


def _probe_id(answer: Answer[Any]) -> str:
    return f"{OWN}probe/{answer.id}"


def _checked(id: str | None) -> str:
    """The id of a request; RequestError for one that is reserved."""
    if id is None:
        return uuid.uuid4().hex
    if not isinstance(id, str):
        raise RequestError(f"a request's id is a string, got {shown(id)}")
    if id.startswith(OWN):
        raise RequestError(f"request id {shown(id)}: ids that begin with {OWN!r} are the service's")
    return id
