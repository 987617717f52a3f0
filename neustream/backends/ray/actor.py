"""An instance as a Ray actor: a process with a service, asked by its cluster's driver."""

from __future__ import annotations

import asyncio
import faulthandler
import math
import os
import socket
import threading
from collections.abc import Callable, Sequence
from typing import Any

import ray

from neustream.backends.ray.entries import graphs_of
from neustream.backends.ray.formats import FORMAT
from neustream.backends.ray.lease import Lease
from neustream.backends.ray.service_instance import ServiceInstance
from neustream.backends.ray.wire import START_S, Described, Joined, Left, Superseded, dumps, loads
from neustream.cluster import messages as to
from neustream.cluster.epochs import Grant
from neustream.core.types import SLO
from neustream.engine.clock import stopwatch
from neustream.errors import BackendError, told
from neustream.service.service import Service

REPORT_S = 0.05
"""How often it is told how an instance is, while anything happens there."""
IDLE_S = 0.5
"""And while nothing does."""
ANSWER_S = 1.0
"""After so long a head hears that a `make` goes on."""
CLOSE_S = 10.0
"""How long an instance may take to end by itself."""
OFFSETS = 30
"""Calls whose way was the quickest tells what the other clock says."""


class Instance:
    """One actor. All methods run on its event loop, the service on threads of its own.

    Args:
        lease_s: it ends when no head was heard for so long, whatever `make` does; inf: it ends with
            its head.
        start_s: how long `make` may take. One that lets no other thread run ends the process then.
    """

    def __init__(
        self,
        name: str,
        make: bytes,
        *,
        observed: bool = False,
        lease_s: float = math.inf,
        start_s: float = START_S,
    ) -> None:
        self._name = name
        self._lease_s = lease_s
        self._start_s = start_s
        self._grant = Grant()
        self._lease = Lease(lease_s)
        self._began_at = stopwatch()
        self._starting: asyncio.Task[Joined] | None = None
        self._observed = observed
        self._make = make
        self._instance: ServiceInstance | None = None
        self._offsets: list[float] = []
        self._number = 0
        self._early: dict[int, Sequence[to.ToInstance]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        faulthandler.dump_traceback_later(start_s + CLOSE_S, exit=True, file=2)
        if lease_s < math.inf:
            threading.Thread(target=self._watch, name="neustream-lease", daemon=True).start()

    def _watch(self) -> None:
        """Without a head the process ends with its lease, also in the middle of `make`."""
        pause, pause_s = threading.Event(), min(self._lease_s / 4, ANSWER_S)
        while not self._lease.ended(pause_s):
            pause.wait(pause_s)
        if self._instance is not None:
            closing = threading.Thread(target=self._instance.close, daemon=True)
            closing.start()
            closing.join(CLOSE_S)
        os._exit(0)

    async def epoch(self) -> int:
        """Of the latest head that it listened to."""
        return self._grant.epoch

    async def start(self, epoch: int, format: str) -> bytes:
        """Make the service, once: a `Joined`, or the BackendError, with the machine's name, if that fails.

        `format`: of the head's messages (see `formats.py`). Nothing (b""): `make` goes on, and the head
        has to ask again. Superseded: another head has it.
        """
        if format != FORMAT:
            differ = f"its messages have the format {FORMAT}, those of its head {format}"
            return _error(BackendError(f"{self._where()}: {differ}: install the same neustream on all machines"))
        if self._grant.claim(epoch):
            self._number, self._early, self._offsets = 0, {}, []
            if self._instance is not None:
                self._instance.succeed(epoch)
                self._news.set()  # the earlier head has not to wait
        self._check(epoch)
        self._lease.heard()
        if self._starting is None:
            self._starting = asyncio.create_task(self._start())
        starting = self._starting
        await asyncio.wait([starting], timeout=min(ANSWER_S, self._lease_s / 4))
        self._check(epoch)
        if not starting.done() and stopwatch() < self._began_at + self._start_s:
            return b""
        try:
            if not starting.done():
                raise BackendError(f"{self._where()}: make did not return in {self._start_s:g} s")
            return dumps((starting.result(), None))
        except BackendError as error:
            return _error(error)

    async def _start(self) -> Joined:
        self._loop = asyncio.get_running_loop()
        self._news = asyncio.Event()
        device = _device()
        service = await asyncio.to_thread(self._made, device)
        faulthandler.cancel_dump_traceback_later()
        self._instance = instance = ServiceInstance(service, self._name, self._wake, observed=self._observed)
        self._tasks.add(asyncio.create_task(self._report(instance)))
        profiles = dict(service.profiles)
        graphs = [graph for mount in service.models.values() for graph in graphs_of(mount)]
        kinds = sorted({str(profile.device) for profile in profiles.values() if profile.device})
        return Joined(
            kinds[0] if kinds else device,
            f"{socket.gethostname()}, {device}",
            os.getpid(),
            tuple(graphs),
            profiles,
            tuple(service.models),
            service.stages,
        )

    def _where(self) -> str:
        """For people."""
        return f"instance {self._name!r} on {socket.gethostname()} ({_device()})"

    def _made(self, device: str) -> Service:
        where = self._where()
        make: Callable[[str], Any] = loads(self._make)
        try:
            service = make(device)
        except BaseException as error:  # noqa: BLE001  `make` is the caller's
            raise BackendError(f"{where}: make raised {told(error)}") from None
        if not isinstance(service, Service):
            kind = type(service).__name__
            raise BackendError(f"{where}: make is to return what neustream.serve does, got {kind}")
        return service

    async def listen(self, epoch: int, now: float) -> bytes:
        """Reports (`Heard`), once there are any; what its engine died of is raised.

        Superseded: another head listens.
        """
        self._check(epoch)
        self._lease.heard()
        self._offsets = [*self._offsets[1 - OFFSETS :], now - stopwatch()]
        instance = self._serving()
        instance.offset = max(self._offsets)
        await self._news.wait()
        self._check(epoch)
        self._news.clear()
        return dumps(instance.news())

    def _check(self, epoch: int) -> None:
        if not self._grant.holds(epoch):
            raise Superseded(f"instance {self._name!r}: another process is the head of this cluster by now")

    async def orders(self, epoch: int, number: int, orders: bytes) -> None:
        """What the head wants, several `ToInstance`; calls come in any order, numbers tell theirs."""
        self._check(epoch)
        instance = self._serving()
        self._early[number] = loads(orders)
        while self._number in self._early:
            instance.carry_out(self._early.pop(self._number))
            self._number += 1

    async def describe(self, id: str, payload: bytes, slo: SLO | None) -> bytes:
        """What a request is, or what is raised for it."""
        try:
            found: Described = await asyncio.wrap_future(self._serving().describing.describe(id, payload, slo))
        except Exception as error:  # noqa: BLE001  it is raised where the request was made
            return _error(error)
        return dumps((found, None))

    async def inspect(self, question: bytes) -> bytes:
        """What a function says of the service, or raises; on a thread, it may take long."""
        what: Callable[[Service], Any] = loads(question)
        try:
            return dumps((await asyncio.to_thread(what, self._serving().service), None))
        except Exception as error:  # noqa: BLE001  it is raised where that was asked
            return _error(error)

    async def leave(self, id: str, term: int) -> Left:
        return self._serving().leave(id, term)

    async def take(self, id: str, term: int, left: Left) -> None:
        """Go on with a request of another instance."""
        self._serving().take(id, term, left)

    async def keep(self, id: str, term: int, left: Left) -> None:
        """Keep a copy of a request of another instance."""
        self._serving().copies.keep(id, term, left)

    async def kept(self, id: str, term: int) -> Left:
        """A copy that is kept here."""
        return self._serving().copies.get(id, term)

    async def close(self, epoch: int) -> None:
        """End the service. Superseded: another head has it, and it goes on."""
        self._check(epoch)
        if self._instance is not None:
            await asyncio.to_thread(self._instance.close)

    async def _report(self, instance: ServiceInstance) -> None:
        """Tell how it is, often while anything happens."""
        quiet = 0.0
        while True:
            instance.end_lease(self._lease_s)
            if instance.dirty or quiet >= IDLE_S:
                quiet = 0.0
                await asyncio.wrap_future(instance.look())
            await asyncio.sleep(REPORT_S)
            quiet += REPORT_S

    def _serving(self) -> ServiceInstance:
        if self._instance is None:
            raise BackendError(f"instance {self._name!r} does not serve yet")
        return self._instance

    def _wake(self) -> None:
        self._loop.call_soon_threadsafe(self._news.set)


def _error(error: Exception) -> bytes:
    """An error as it is, or in words if it cannot leave the process."""
    try:
        data = dumps((None, error))
        loads(data)
    except Exception:  # noqa: BLE001  an error may hold anything
        return dumps((None, BackendError(told(error))))
    return data


def _device() -> str:
    """The device that Ray gave to this process, as torch calls it."""
    found = ray.get_runtime_context().get_accelerator_ids()
    return "cuda:0" if found.get("GPU") else "cpu"
