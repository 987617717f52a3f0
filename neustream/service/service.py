"""Models behind one engine: `submit` from any thread, an `Answer` for each request."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import replace
from typing import Any

from neustream.by_name import make_policy
from neustream.core.carry import later
from neustream.core.policy import Policy
from neustream.core.profile import LatencyProfile
from neustream.core.types import SLO
from neustream.engine.clock import WallClock
from neustream.engine.desk import Limit
from neustream.engine.engine import Engine
from neustream.engine.events import Observer, Record
from neustream.engine.report import Report
from neustream.engine.routing import Router
from neustream.engine.snapshot import Snapshot
from neustream.errors import BackendError, RequestError, nearest, shown
from neustream.service.agents import AgentMount
from neustream.service.answer import Answer
from neustream.service.hosting import Hosting
from neustream.service.members import device_at, member_of, open_all
from neustream.service.mount import OWN, Mount, OfSequences
from neustream.service.options import names_of, places_of, slo_of
from neustream.service.parting import check_known, check_stages
from neustream.service.rehearsing import Rehearsing
from neustream.service.requests import Asked, Moved, Requests, checked
from neustream.service.several import Several, ask, ids_of


class Service:
    """One model or several, on one device or several, decided by one scheduler a device.

    It serves from the moment it is made until `close`; as a context manager it closes itself. One
    that nobody refers to any more serves what is open, and closes itself then.

    Args:
        mounts: the models by name; "" is the name of one that is alone.
        devices: where they are served, an instance of each model on each; a place that is named
            twice is two. None: each model where it is.
        placement: the devices of some models; the others go to all.
        slo: what requests are promised that bring no promise of their own; a number is
            `SLO(total=...)`.
        policy: an object or the name of one; default: `neustream.core.policies.DEFAULT`.
        max_open: the most requests without an answer; more are refused. None: no limit.
        stages: those that are served here, by their names or by those of models and of a pipeline's
            roles ("sd", "encode"); None: all. A request whose next stage is not waits to be given to
            another service, and observers are told `Left`; so a service of roles has whoever gives.
        router, step_timeout_s, forgiving: see `Engine`.
        observers: told of every Record; they must be quick.

    Attributes:
        engine: what serves; report: what became of all requests so far. stages: as given.

    Raises:
        BackendError: a model cannot be served, or stages are named that there are not; models that
            were ready are the caller's again.
    """

    def __init__(
        self,
        mounts: Mapping[str, Mount],
        *,
        devices: Sequence[str] | None = None,
        placement: Mapping[str, Sequence[str]] | None = None,
        slo: SLO | float | None = None,
        policy: Policy | str | None = None,
        stages: Sequence[str] | None = None,
        router: Router | None = None,
        max_open: int | None = None,
        step_timeout_s: float | None = None,
        forgiving: bool = True,
        observers: Sequence[Observer] = (),
    ) -> None:
        self.slo = slo_of(slo)
        self.stages = check_stages(stages, mounts)
        self.report = Report()
        self._mounts = dict(mounts)
        self._open: dict[str, Answer[Any]] = {}
        self._limit = Limit(max_open)
        rule = make_policy(policy)
        if not mounts:
            raise BackendError("a service needs a model; got none")
        for mount in self._mounts.values():
            if isinstance(mount, AgentMount):
                mount.join(self._mounts)
        for name, mount in self._mounts.items():
            mount.check(name)
        if len({id(mount) for mount in mounts.values()}) < len(mounts):
            raise BackendError(f"a mount is served once, got one under several names: {list(mounts)}")
        homes = {name: mount.device for name, mount in self._mounts.items()}
        places, placed = places_of(homes, devices, placement)
        told: list[Observer] = [self.report, *observers]
        heard: list[Observer] = [OfCallers(observer) for observer in told]
        with contextlib.ExitStack() as undo:
            named = zip(names_of(places), places, strict=True)
            self._devices = [device_at(place, undo, name, self.stages) for name, place in named]
            host = Hosting(self._devices, self.stages)
            here = open_all(self._mounts, self._devices, placed, host, undo)
            check_known(self.stages, here)
            self.engine = host.engine = Engine(
                [
                    member_of(self._mounts, device, instances, rule, self.stages)
                    for device, instances in zip(self._devices, here, strict=True)
                ],
                WallClock(),
                [*heard, *[one for mount in self._mounts.values() for one in mount.observers]],
                router=router,
                step_timeout_s=step_timeout_s,
                forgiving=forgiving,
            ).start()
            undo.pop_all()
        rehearsed = self._mounts if self.stages is None else {}  # the others' rehearsals would leave
        self._rehearsing = Rehearsing(self.engine, rehearsed, self._open)
        self._requests = Requests(self.engine, self._open, self._rehearsing.begin)
        self.engine.observe(self._requests.hear)
        self._closing = Closing(self._mounts, self._rehearsing, host)
        self._forgotten = weakref.finalize(self, self._closing.forget)
        self._forgotten.atexit = False
        host.begin(self)

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

        A language model takes `n` beside its other arguments: so many sequences of one prompt, which
        is computed once. They are a `Several`. Sequence k has the seed `seed + k`.

        Raises:
            RequestError: for what cannot be served, while `max_open` requests are open, or once
                the service is closed. What a model's own library has against its arguments is
                raised as it is.
        """
        if (count := kwargs.get("n")) is None or not isinstance(self.mount(model)[1], OfSequences):
            return self.ask(args, kwargs, model=model, slo=slo, id=id)
        return self._several(count, args, kwargs, model=model, slo=slo, id=id)

    def _several(
        self,
        count: Any,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        *,
        model: str | None,
        slo: SLO | float | None,
        id: str | None,
    ) -> Several[Any]:
        """So many sequences of one prompt."""
        name, mount = self.mount(model)
        assert isinstance(mount, OfSequences)
        whole = checked(id)
        ids = ids_of(whole, count, mount.most_sequences)
        self._limit.check(whole, len(self._open), self.engine.wait_s, count)
        more = {key: value for key, value in kwargs.items() if key not in ("n", "seed")}

        def submit(id: str, **own: Any) -> Answer[Any]:
            return self.ask(args, {**more, **own}, model=name, slo=slo, id=id)

        return ask(submit, whole, ids, kwargs.get("seed"))

    def ask(
        self,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        *,
        model: str | None = None,
        slo: SLO | float | None = None,
        id: str | None = None,
        age: float = 0.0,
    ) -> Answer[Any]:
        """`submit`, for one that came `age` seconds ago: its promises count from then."""
        self.engine.ready()
        name, mount = self.mount(model)
        promise = self.slo if slo is None else slo_of(slo)
        request = checked(id)
        self._limit.check(request, len(self._open), self.engine.wait_s)
        since = max(self.engine.clock.now() - age, 0.0)
        call = mount.request(*args, **kwargs)
        asked = Asked(name, tuple(args), kwargs)
        answer = self._requests.add(request, asked, call, promise, since)
        self._rehearsing.stop()
        return answer

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Ask and wait."""
        return self.submit(*args, **kwargs).result()

    def cancel(self, id: str) -> bool:
        """Give a request up by its id; False if it is over, or never was."""
        answer = self._open.get(id)
        return answer is not None and not answer.cancelled() and answer.cancel()

    # -- requests that move -----------------------------------------------------------------------

    def give(self, id: str, *, cached: bool = True) -> Future[Moved]:
        """Let a request leave for another service of the same models, at the end of its step.

        The future gets it as plain data for that service's `take`, in this process or another. Its
        answer here raises RequestError with the code "moved", and nothing more is told of it. A
        request that cannot leave stays, and goes on.

        Args:
            cached: whether what a language model's KV cache holds goes along; else it is computed
                again there, from the tokens.

        Raises:
            RequestError: from the future: no such request is open, it ended before it could leave,
                or (code "too_early") its device still looks at it.
            StageFailed: from the future: what a model keeps of it cannot leave, by name.
        """
        self.engine.ready()
        return self._requests.give(id, cached=cached)

    def take(self, moved: Moved, *, waited_s: float = 0.0) -> Future[Answer[Any]]:
        """Go on with a request that another service gave; the future gets its answer once it is here.

        The answer's outputs are all from the first one on, whoever made them.

        Args:
            waited_s: seconds since it left; its deadlines did not wait.

        Raises:
            RequestError: its arguments cannot be served here; from the future: its id is being
                served, or nobody here can go on with it.
            GraphError, StageFailed: from the future: the model differs, or cannot go on.
        """
        self.engine.ready()
        _, mount = self.mount(moved.asked.model)
        carry = later(moved.there.carry, waited_s)
        moved = replace(moved, there=replace(moved.there, carry=carry))
        call = mount.request(*moved.asked.args, **moved.asked.kwargs)
        taken = self._requests.take(moved, call, self.engine.clock.now() - carry.age)
        self._rehearsing.stop()
        return taken

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

    @property
    def answers(self) -> Mapping[str, Answer[Any]]:
        """What callers wait for, by id; it changes."""
        return self._open

    def snapshot(self) -> Snapshot:
        """How the engine is; from any thread, without waiting."""
        return self.engine.snapshot()

    def close(self, *, cancel: bool = False, timeout_s: float | None = None) -> None:
        """Serve what is open (or end it as cancelled), then stop; models are the caller's again.

        `timeout_s`, and the errors: see `Engine.close`. Closing twice is nothing.
        """
        self._rehearsing.end()
        self.engine.close(cancel=cancel, timeout_s=timeout_s)
        self._forgotten.detach()
        self._closing.close()

    def __enter__(self) -> Service:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close(cancel=exc[0] is not None)

    # -- inside -----------------------------------------------------------------------------------

    def mount(self, name: str | None) -> tuple[str, Mount]:
        """A model by its name, None: the only one; RequestError if there is none of it."""
        if name is None and len(self._mounts) == 1:
            return next(iter(self._mounts.items()))
        if not isinstance(name, str) or name not in self._mounts:
            raise RequestError(f"model={shown(name)}: {nearest(str(name), self._mounts)}")
        return name, self._mounts[name]


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


class Closing:
    """How a service ends; it does not refer to it, for that may be what has to be noticed."""

    def __init__(self, mounts: Mapping[str, Mount], rehearsing: Rehearsing, host: Hosting) -> None:
        self._mounts = mounts
        self._rehearsing = rehearsing
        self._host = host

    def forget(self) -> None:
        """Nobody can ask for anything any more: serve what is open, and end; without waiting."""
        self._rehearsing.end()
        self._host.engine.abandon(self.close)

    def close(self) -> None:
        """Models are the caller's again."""
        with contextlib.ExitStack() as closing:  # all of them, also if one raises
            closing.callback(self._host.ended.set)
            for mount in self._mounts.values():
                closing.callback(mount.close)
