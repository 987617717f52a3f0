"""An instance as a Ray actor: a process with a service, asked by its cluster's driver."""

from __future__ import annotations

import asyncio
import math
import os
import socket
from collections.abc import Callable, Sequence
from typing import Any

import ray

from neustream.backends.ray.entries import graphs_of
from neustream.backends.ray.service_instance import ServiceInstance
from neustream.backends.ray.wire import Described, Joined, Left, Superseded, dumps, loads
from neustream.cluster import messages as to
from neustream.core.types import SLO
from neustream.engine.clock import stopwatch
from neustream.errors import BackendError, told
from neustream.service.service import Service

REPORT_S = 0.05
"""How often it is told how an instance is, while anything happens there."""
IDLE_S = 0.5
"""And while nothing does."""
OFFSETS = 30
"""Calls whose way was the quickest tells what the other clock says."""


class Instance:
    """One actor. All methods run on its event loop, the service on threads of its own."""

    def __init__(self, name: str, make: bytes, *, observed: bool = False, lease_s: float = math.inf) -> None:
        self._name = name
        self._lease_s = lease_s
        self._epoch = 0
        self._heard_at = math.inf
        self._starting: asyncio.Task[Joined] | None = None
        self._observed = observed
        self._make = make
        self._instance: ServiceInstance | None = None
        self._offsets: list[float] = []
        self._number = 0
        self._early: dict[int, Sequence[to.ToInstance]] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    async def epoch(self) -> int:
        """Of the latest head that it listened to."""
        return self._epoch

    async def start(self, epoch: int) -> bytes:
        """Make the service, once: a `Joined`, or the BackendError, with the machine's name, if that fails.

        What a head of an older epoch wants is not heard any more.
        """
        if epoch > self._epoch:
            self._epoch, self._number, self._early, self._offsets = epoch, 0, {}, []
        if self._starting is None:
            self._starting = asyncio.create_task(self._start())
        elif self._instance is not None:
            self._instance.succeed(self._epoch)
            self._news.set()  # the earlier head has not to wait
        try:
            return dumps((await asyncio.shield(self._starting), None))
        except BackendError as error:
            return _error(error)

    async def _start(self) -> Joined:
        self._loop = asyncio.get_running_loop()
        self._news = asyncio.Event()
        device = _device()
        service = await asyncio.to_thread(self._made, device)
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
            service.stages,
        )

    def _made(self, device: str) -> Service:
        where = f"instance {self._name!r} on {socket.gethostname()} ({device})"
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
        self._heard_at = stopwatch()
        self._offsets = [*self._offsets[1 - OFFSETS :], now - stopwatch()]
        instance = self._serving()
        instance.offset = max(self._offsets)
        await self._news.wait()
        self._check(epoch)
        self._news.clear()
        return dumps(instance.news())

    def _check(self, epoch: int) -> None:
        if epoch < self._epoch:
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

    async def close(self) -> None:
        """End the service."""
        if self._instance is not None:
            await asyncio.to_thread(self._instance.close)

    async def _report(self, instance: ServiceInstance) -> None:
        """Tell how it is, often while anything happens. Without a head it ends with its lease."""
        quiet = 0.0
        self._heard_at = stopwatch()
        while True:
            instance.end_lease(self._lease_s)
            if stopwatch() > self._heard_at + self._lease_s:
                await self.close()
                os._exit(0)
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
