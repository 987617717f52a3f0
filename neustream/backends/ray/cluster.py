"""What users hold: a service on many devices, as instances of one that their `make` makes."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import wait
from dataclasses import replace
from typing import Any

from neustream.backends.ray.callers import Counts, Machines
from neustream.backends.ray.driver import Driver
from neustream.backends.ray.entries import asked_print
from neustream.backends.ray.kinds import Each, Kind
from neustream.backends.ray.telling import Telling, Watcher
from neustream.backends.ray.wire import START_S
from neustream.cluster.book import Settings
from neustream.cluster.fleet import Mover, Router, Scaler
from neustream.cluster.head import Head
from neustream.cluster.rules.slack import Slack
from neustream.config.cluster import NAME
from neustream.core.types import SLO
from neustream.engine.clock import stopwatch
from neustream.engine.events import Observer
from neustream.engine.snapshot import InstanceStatus
from neustream.errors import BackendError, RequestError, shown
from neustream.service.answer import Answer
from neustream.service.options import slo_of
from neustream.service.requests import checked
from neustream.service.service import Service

WHOLE = "whole"
"""What instances are called that serve all there is."""
LEASE_S = 60.0
"""How long instances that outlive their head wait for the next."""


class Cluster:
    """Instances of a service on the machines of a Ray cluster, behind one `submit`.

    It serves from the moment it is made until `close`; as a context manager it closes itself. The
    process that makes it is its head: with it, the instances end.

    Args:
        make: makes the service of one instance, as `neustream.serve` does; called on each machine
            with the device there ("cuda:0", "cpu"). Or several kinds of instances by name, all of the
            same models, on unlike devices: each says itself how many and on what.
        instances: how many; or the least and the most, between which `scaler` chooses. Not with kinds.
        address: of a Ray cluster ("host:port", or "auto" for the one of this machine); None: a Ray
            of its own on this machine.
        resources: what an instance takes, by Ray's names; default: a GPU where there are any, else
            a CPU. Not with kinds.
        slo: what requests are promised that bring no promise; None: what `make`'s service says.
        router, mover, scaler: rules of `neustream.cluster.rules`.
        settings: times after which instances are suspect, gone, and so on.
        name: of the cluster, with an `address`: instances outlive this process. A `Cluster` of the same
            name finds them, and what they have: who submits with an `id` that is there gets its answer.
        lease_s: how long instances with a `name` go on without such a process; and how long what
            nobody asked for is kept.
        role: what instances are called in front of their numbers, and by scalers.
        observers: told of every record, as those of a service are, on the cluster's clock and
            thread: `member` is the instance. With some, instances tell of each of their steps.
        watchers: told there of what happens to instances, of moves and of restarts.

    Raises:
        BackendError: Ray is not there, or not one that has been tried; the address does not answer;
            there are too few devices; `make` raised, with the machine; instances do not start in time;
            another process that began at the same moment is the head of that name.
    """

    def __init__(
        self,
        make: Callable[[str], Any] | Mapping[str, Kind],
        *,
        instances: int | tuple[int, int] | None = None,
        address: str | None = None,
        resources: Mapping[str, float] | None = None,
        slo: SLO | float | None = None,
        router: Router | None = None,
        mover: Mover | None = None,
        scaler: Scaler | None = None,
        settings: Settings | None = None,
        name: str | None = None,
        lease_s: float = LEASE_S,
        role: str = WHOLE,
        observers: Sequence[Observer] = (),
        watchers: Sequence[Watcher] = (),
    ) -> None:
        kinds = _kinds(make, instances, resources, role)
        if scaler is None and any(kind.at_most != kind.count for kind in kinds.values()):
            raise BackendError(f"instances={instances}: a scaler is to choose between them")
        first = {name: kind.count for name, kind in kinds.items()}
        self._slo = None if slo is None else slo_of(slo)
        self._kinds = list(kinds)
        self._closed = False
        lasting = _lasting(name, lease_s, address)
        self._machines = machines_of(kinds, address, observed=bool(observers), start_s=START_S, **lasting)
        head = Head(
            [],
            {},
            router or Slack(),
            mover,
            Each(first),
            settings=settings,
            epoch=self._machines.epoch,
            mark=lambda request: asked_print(request.params["asked"]),
            stopwatch=stopwatch,
        )
        count = sum(first.values())
        self._driver = Driver(head, self._machines, count, Telling(observers, watchers))
        try:
            if not wait([self._driver.up], START_S).done:
                raise BackendError(f"the {count} instance(s) did not all start in {START_S:g} s")
            self._driver.up.result()
        except BaseException:
            self.close(cancel=True)
            raise
        if scaler is not None:
            self._driver.ask(lambda head, now: head.scale(scaler)).result()

    # -- requests ---------------------------------------------------------------------------------

    def submit(
        self,
        *args: Any,
        model: str | None = None,
        slo: SLO | float | None = None,
        id: str | None = None,
        **kwargs: Any,
    ) -> Answer[Any]:
        """Ask for something, as of a service; safe from any thread, never waits.

        Arguments are checked on an instance: what is wrong with them is raised by the answer.

        Raises:
            RequestError: they cannot go to another process; the id is taken; it is closed.
        """
        if self._closed:
            raise RequestError("the cluster is closed", code="closed")
        promise = self._slo if slo is None else slo_of(slo)
        return self._driver.submit(args, kwargs, model, promise, checked(id))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Ask and wait."""
        return self.submit(*args, **kwargs).result()

    @property
    def open(self) -> int:
        """How many requests have no answer."""
        return self._driver.open

    @property
    def answers(self) -> Mapping[str, Answer[Any]]:
        """What callers wait for, by id."""
        return self._driver.answers

    def interrupt(self) -> None:
        """End what is open as cancelled; safe from a signal handler."""
        for answer in self._driver.answers.values():
            answer.cancel()

    def wait(self, timeout_s: float | None = None) -> bool:
        """Wait until nothing is open; False if something is, still, after `timeout_s`."""
        return self._driver.wait_empty(timeout_s)

    def cancel(self, id: str) -> bool:
        """Give a request up by its id; False if it is over, or never was."""
        answer = self._driver.answers.get(id)
        return answer is not None and not answer.cancelled() and answer.cancel()

    # -- how it is --------------------------------------------------------------------------------

    @property
    def counts(self) -> Counts:
        """What became of requests and instances so far."""
        return self._driver.counts

    @property
    def instances(self) -> Mapping[str, InstanceStatus]:
        """How each instance is, by name."""
        return self._driver.status()

    @property
    def fault(self) -> BackendError | None:
        """Why the engine of an instance died, if one did: its policy raised and was not forgiven."""
        return self._driver.fault

    def instance_s(self, since: float, until: float) -> float:
        """Seconds that instances were there between two instants of the cluster's clock, added up."""
        stays = list(self._driver.stays.values())
        return sum([max(min(over, until) - max(came, since), 0.0) for came, over in stays])

    def inspect(self, question: Callable[[Service], Any]) -> Any:
        """What a function says of the service of some instance, where that is; what it raises is raised.

        RequestError if no instance is there.
        """
        names = list(self._driver.places)
        if not names:
            raise RequestError("no instance is there to be asked")
        return self._machines.inspect(names[0], question).result()

    @property
    def pids(self) -> Mapping[str, int]:
        """The processes of the instances, on their machines."""
        return {name: joined.pid for name, joined in dict(self._driver.places).items()}

    # -- growing and shrinking --------------------------------------------------------------------

    def resize(self, instances: int) -> None:
        """Have so many instances; those that are too many are drained. Returns at once.

        BackendError if there are several kinds, or the machines have no room for them.
        """
        count, _ = _range(instances)
        if len(self._kinds) > 1:
            raise BackendError(f"resize: there are several kinds of instances: {', '.join(self._kinds)}")
        counts = {self._kinds[0]: count}
        self._machines.check_room(counts)

        def keep(head: Head, now: float) -> None:
            head.scale(Each(counts))

        self._driver.ask(keep).result()

    def drain(self, instance: str) -> None:
        """Let an instance go: its requests move, or end there. Another takes its place.

        RequestError if there is none of that name.
        """
        self._driver.ask(lambda head, now: head.drain(instance, now)).result()

    def move(self, id: str, instance: str) -> None:
        """Have a request go on at another instance; what cannot move stays.

        RequestError if the request or the instance is not there, or it moves already.
        """
        self._driver.ask(lambda head, now: head.move(id, instance, "wanted", now)).result()

    def close(self, *, cancel: bool = False, timeout_s: float | None = None) -> None:
        """Serve what is open (or end it as cancelled), then end all instances.

        After `timeout_s` seconds what is still open ends as cancelled, too. Closing twice is nothing.
        """
        if self._closed:
            return
        self._closed = True
        if cancel or not self._driver.wait_empty(timeout_s):
            self.interrupt()
        self._driver.close()
        self._machines.close()

    def __enter__(self) -> Cluster:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close(cancel=exc[0] is not None)


def joined(address: str | None) -> Callable[[], None]:
    """Have this process in a Ray cluster, for several `Cluster`s one after the other.

    What is returned leaves it again, unless it was there before. BackendError as of `Cluster`.
    """
    ray = check_ray()
    from neustream.backends.ray.machines import connect

    leave: Callable[[], None] = ray.shutdown if connect(address) else lambda: None
    return leave


def _lasting(name: str | None, lease_s: Any, address: str | None) -> dict[str, Any]:
    """What lets instances outlive their cluster's process; BackendError for what cannot be."""
    if name is None:
        return {}
    if not re.fullmatch(NAME, name):
        raise BackendError(f"name must be letters, digits, '-', '_' and '.', got {shown(name)}")
    if address is None:
        raise BackendError(f"name={name!r}: a Ray of its own ends with this process; give an address")
    if not isinstance(lease_s, int | float) or not lease_s > 0:
        raise BackendError(f"lease_s must be a number of seconds greater than 0, got {shown(lease_s)}")
    return {"name": name, "lease_s": float(lease_s)}


def machines_of(
    kinds: Mapping[str, Kind],
    address: str | None,
    *,
    observed: bool,
    start_s: float,
    name: str = "",
    lease_s: float = math.inf,
) -> Machines:
    """Machines of a Ray cluster with room for all instances of these kinds; BackendError as of `Cluster`."""
    ray = check_ray()
    from neustream.backends.ray.machines import RayMachines, connect

    owned = connect(address)
    try:
        usual = {"num_gpus": 1.0} if ray.cluster_resources().get("GPU") else {"num_cpus": 1.0}
        kinds = {name: replace(kind, resources=kind.resources or usual) for name, kind in kinds.items()}
        machines = RayMachines(kinds, owned=owned, observed=observed, name=name, lease_s=lease_s, start_s=start_s)
        machines.check_room({name: kind.at_most for name, kind in kinds.items()})
    except BaseException:
        if owned:
            ray.shutdown()
        raise
    return machines


def _kinds(make: Any, instances: Any, resources: Mapping[str, float] | None, role: str) -> Mapping[str, Kind]:
    """The kinds of instances of a cluster; BackendError for what is none."""
    if not isinstance(make, Mapping):
        least, most = _range(1 if instances is None else instances)
        return {role: Kind(make, least, most, resources)}
    if instances is not None or resources is not None:
        raise BackendError("instances, resources: each kind of instances says itself how many and on what")
    wrong = [name for name, kind in make.items() if not isinstance(kind, Kind)]
    if wrong or not any(kind.count for kind in make.values()):
        what = f"{wrong[0]!r} is {shown(make[wrong[0]])}" if wrong else "there is no instance"
        raise BackendError(f"make: kinds of instances by name, each a neustream.backends.ray.Kind; {what}")
    return make


def _range(instances: Any) -> tuple[int, int]:
    pair: Sequence[Any] = instances if isinstance(instances, tuple) else (instances, instances)
    whole = [isinstance(one, int) and not isinstance(one, bool) and one > 0 for one in pair]
    if len(pair) != 2 or not all(whole) or pair[0] > pair[1]:
        raise BackendError(f"instances must be a number from 1 on, or the least and the most, got {shown(instances)}")
    return pair[0], pair[1]


def check_ray() -> Any:
    """Ray, if it is there and one that has been tried."""
    try:
        import ray
    except ImportError as error:
        raise BackendError("a cluster needs Ray: pip install 'neustream[ray]'") from error
    from neustream.backends.ray.contract import check

    check(ray)
    return ray
