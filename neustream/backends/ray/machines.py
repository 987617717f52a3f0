"""Instances as actors of a Ray cluster."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import socket
import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from neustream.backends.ray.actor import CLOSE_S, Instance
from neustream.backends.ray.formats import FORMAT
from neustream.backends.ray.kinds import Kind, check_room, options_of
from neustream.backends.ray.wire import START_S, Described, Heard, Joined, Superseded, dumps, loads
from neustream.cluster import messages as to
from neustream.cluster.epochs import holder, next_epoch
from neustream.core.types import SLO
from neustream.engine.answers import settle
from neustream.errors import BackendError, told
from neustream.service.service import Service

log = logging.getLogger(__name__)

CALLS = 1000
"""Calls that an actor has under way at once."""
CONNECT_S = 5.0
"""How long an address may take to answer."""
STAYS = ThreadPoolExecutor(1, thread_name_prefix="neustream-ray")
QUIET = {"address": "local", "include_dashboard": False, "log_to_driver": False, "configure_logging": False}
"""Of a Ray of our own: without an address Ray joins whichever runs on the machine."""


class RayMachines:
    """Starts actors and carries messages to them.

    Args:
        kinds: of instances, each with its `resources`.
        owned: whether Ray is to end with it; observed: whether instances tell of their steps.
        name: of the cluster: instances outlive this process, for `lease_s` without a head; "": they
            end with it. start_s: how long they may take to start.
    """

    def __init__(
        self,
        kinds: Mapping[str, Kind],
        *,
        owned: bool,
        observed: bool = False,
        name: str = "",
        lease_s: float = math.inf,
        start_s: float = START_S,
    ) -> None:
        self._makes = {name: dumps(kind.make) for name, kind in kinds.items()}
        self._resources = {name: dict(kind.resources or {}) for name, kind in kinds.items()}
        self._actors: dict[str, Any] = {}
        self._numbers: dict[str, int] = {}
        self._lock = threading.Lock()
        self._ending = ThreadPoolExecutor(8, thread_name_prefix="neustream-ending")
        self._opening = ThreadPoolExecutor(2, thread_name_prefix="neustream-opening")
        self._owned = owned
        self._observed = observed
        self._lasting = {"lifetime": "detached", "namespace": f"neustream-{name}"} if name else {}
        self._lease_s = lease_s if name else math.inf
        self._start_s = start_s
        self.epoch = 0
        self.taken: Collection[str] = ()
        self.found: Mapping[str, str] = self._find(f"neustream-{name}") if name else {}

    def _find(self, namespace: str) -> Mapping[str, str]:
        """Instances of a head that is gone, each with its kind. Those that do not answer are ended."""
        for each in ray.util.list_named_actors(all_namespaces=True):
            if each["namespace"] == namespace:
                with contextlib.suppress(ValueError):  # it ended just now
                    self._actors[each["name"]] = ray.get_actor(each["name"], namespace=namespace)
        asked = {actor.epoch.remote(): name for name, actor in self._actors.items()}
        said, _ = ray.wait(list(asked), num_returns=len(asked), timeout=CLOSE_S) if asked else ([], [])
        found, epochs = {}, []
        for ref in said:
            name = asked[ref]
            with contextlib.suppress(RayError):
                epochs.append(ray.get(ref))
                found[name] = name.rpartition("-")[0]
        found = {name: kind for name, kind in found.items() if kind in self._makes}
        self.taken = set(self._actors)
        for name in self.taken - set(found):
            self.stop(name, "it does not answer, or no kind is called so", kill=True)
        self._numbers = dict.fromkeys(found, 0)
        self.epoch = next_epoch(epochs, holder())
        return found

    def check_room(self, counts: Mapping[str, int]) -> None:
        check_room(counts, self._resources, ray.cluster_resources())

    def start(self, name: str, kind: str) -> Future[Joined]:
        options = {"max_concurrency": CALLS, "max_restarts": 0, "scheduling_strategy": "SPREAD"}
        if self._lasting:  # another head of the same name may start it at the same moment
            options |= {**self._lasting, "name": name, "get_if_exists": True}
        made = ray.remote(Instance).options(**options, **options_of(self._resources[kind]))
        make, lease_s, start_s = self._makes[kind], self._lease_s, self._start_s
        actor = made.remote(name, make, observed=self._observed, lease_s=lease_s, start_s=start_s)
        with self._lock:
            self._actors[name] = actor
            self._numbers[name] = 0
        return self._opened(self._started(name))

    def adopt(self, name: str) -> Future[Joined]:
        return self._opened(self._started(name))

    def listen(self, name: str, now: float) -> Future[Heard]:
        return _read(self._call(name, "listen", self.epoch, now))

    def describe(self, name: str, id: str, payload: bytes, slo: SLO | None) -> Future[Described]:
        return self._opened(self._call(name, "describe", id, payload, slo))

    def inspect(self, name: str, question: Callable[[Service], Any]) -> Future[Any]:
        return self._opened(self._call(name, "inspect", dumps(question)))

    def order(self, name: str, orders: Sequence[to.ToInstance]) -> None:
        with self._lock:
            number = self._numbers.get(name, 0)
            self._numbers[name] = number + 1
        self._call(name, "orders", self.epoch, number, dumps(list(orders)))

    def pass_on(self, give: to.Give) -> Future[None]:
        with self._lock:
            source, target = self._actors.get(give.instance), self._actors.get(give.target)
        if source is None or target is None:
            return _failed(BackendError("one of its two instances is gone"))
        left = source.leave.remote(give.id, give.term)
        taken = target.keep if give.keep else target.take
        return _plain(taken.remote(give.id, give.next_term, left))

    def restore(self, order: to.Restore) -> Future[None]:
        with self._lock:
            keeper, target = self._actors.get(order.instance), self._actors.get(order.target)
        if keeper is None or target is None:
            return _failed(BackendError("one of its two instances is gone"))
        left = keeper.kept.remote(order.id, order.term)
        return _plain(target.take.remote(order.id, order.next_term, left))

    def stop(self, name: str, why: str, *, kill: bool) -> None:
        with self._lock:
            actor = self._actors.pop(name, None)
        if actor is None:
            return
        log.info("instance %r ends: %s", name, why)
        self._ending.submit(_end, actor, self.epoch, kill=kill)

    def leave(self) -> None:
        with self._lock:
            self._actors.clear()

    def close(self) -> None:
        """End all instances, and Ray if it was started for them."""
        with self._lock:
            names = list(self._actors)
        for name in names:
            self.stop(name, "the cluster was closed", kill=False)
        self._ending.shutdown()
        self._opening.shutdown()
        if self._owned:
            ray.shutdown()

    def _started(self, name: str) -> Future[bytes]:
        """What an instance says once its `make` is over; it is asked until then."""
        found: Future[bytes] = Future()

        def ask() -> None:
            self._call(name, "start", self.epoch, FORMAT).add_done_callback(heard)

        def heard(said: Future[bytes]) -> None:
            if said.exception() is None and said.result() == b"":
                try:
                    self._opening.submit(ask)
                except RuntimeError as error:  # the cluster was closed meanwhile
                    found.set_exception(error)
            else:
                settle(found, said.result)

        ask()
        return found

    def _opened(self, said: Future[bytes]) -> Future[Any]:
        """What an instance said as bytes. To read them may import a library: on no thread that Ray calls back on."""
        found: Future[Any] = Future()

        def read(said: Future[bytes]) -> None:
            try:
                self._opening.submit(_open, found, said)
            except RuntimeError as error:  # the cluster was closed meanwhile
                found.set_exception(error)

        said.add_done_callback(read)
        return found

    def _call(self, name: str, method: str, *args: Any) -> Future[Any]:
        with self._lock:
            actor = self._actors.get(name)
        if actor is None:
            return _failed(BackendError(f"instance {name!r} is gone"))
        return _plain(getattr(actor, method).remote(*args))


def connect(address: str | None) -> bool:
    """Have a Ray; whether it is one of our own. BackendError if there is none at `address`."""
    if ray.is_initialized():
        if address not in (None, "auto"):
            here = ray.get_runtime_context().gcs_address
            if here != address:
                raise BackendError(f"address {address!r}: this process is connected to {here!r}")
        return False
    if address is None:
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        os.environ.setdefault("RAY_worker_niceness", "0")  # Ray's own 15 lets everything else on the machine go first
        _init(**QUIET)
        return True
    _answers(address)
    try:
        _init(address=address, log_to_driver=False, configure_logging=False)
    except Exception as error:
        raise BackendError(f"address {address!r}: {told(error)}") from error
    return True


def _init(**options: Any) -> None:
    """Start or join Ray, on a thread that stays: what Ray starts ends with the thread that started it."""
    if threading.current_thread() is threading.main_thread():
        ray.init(**options)
    else:
        STAYS.submit(ray.init, **options).result()


def _answers(address: str) -> None:
    """BackendError if nobody listens at an address."""
    if address in ("auto", "local") or "://" in address:
        return
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise BackendError(f"address must be 'auto' or 'host:port', got {address!r}")
    try:
        with contextlib.closing(socket.create_connection((host, int(port)), CONNECT_S)):
            pass
    except OSError as error:
        raise BackendError(f"address {address!r} does not answer: {told(error)}") from error


def _plain(ref: Any) -> Future[Any]:
    """The future of a call, with the error that was raised there in place of Ray's around it."""
    found: Future[Any] = Future()

    def over(done: Future[Any]) -> None:
        error = done.exception()
        if isinstance(error, RayTaskError):
            error = error.cause if isinstance(error.cause, Exception) else error
        if error is not None:
            found.set_exception(error)
        else:
            found.set_result(done.result())

    ref.future().add_done_callback(over)
    return found


def _read(said: Future[bytes]) -> Future[Any]:
    """What bytes say, read on the thread that they come on. Ray's own pickler calls Python for each object."""
    found: Future[Any] = Future()

    said.add_done_callback(lambda said: settle(found, lambda: loads(said.result())))
    return found


def _open(found: Future[Any], said: Future[bytes]) -> None:
    """Read a value, or what was raised."""
    value, error = None, said.exception()
    if error is None:
        try:
            value, error = loads(said.result())
        except Exception as fault:  # noqa: BLE001  classes may be missing here
            error = fault
    if error is not None:
        found.set_exception(error)
    else:
        found.set_result(value)


def _failed(error: Exception) -> Future[Any]:
    failed: Future[Any] = Future()
    failed.set_exception(error)
    return failed


def _end(actor: Any, epoch: int, *, kill: bool) -> None:
    """End an actor; not on a thread that Ray calls back on: that would wait for itself.

    Without `kill` one that another head has by now goes on.
    """
    with contextlib.suppress(Exception):  # it is dead
        if not kill and _superseded(actor, epoch):
            return
    with contextlib.suppress(Exception):  # it is dead
        ray.kill(actor, no_restart=True)


def _superseded(actor: Any, epoch: int) -> bool:
    """Have an actor close its service; whether it does not, since another head has it."""
    closed, _ = ray.wait([actor.close.remote(epoch)], timeout=CLOSE_S)
    try:
        ray.get(closed)
    except RayTaskError as error:
        return isinstance(error.cause, Superseded)
    return False
