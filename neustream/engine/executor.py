"""Who carries out a step: `ProfiledExecutor` pretends, `ThreadExecutor` runs stream modules."""

from __future__ import annotations

import contextlib
import math
import os
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future
from functools import partial
from typing import Any, Protocol, runtime_checkable

from neustream.core.batch import Batch, StepInput
from neustream.core.events import Update
from neustream.core.profile import LatencyProfile
from neustream.core.step_times import latency_of
from neustream.engine.answers import settle
from neustream.engine.clock import Clock
from neustream.engine.events import Done
from neustream.engine.worker import Pieces, Worker
from neustream.errors import BackendError, StageFailed

BRIEF_S = 0.004
"""Steps on a device that computes by itself have Python to themselves if they are shorter: the
decision is ready no later, and waking another thread takes a share of them."""
BRIEF_ON_CPU_S = 0.05
"""The same of steps on a CPU: their thread wants Python's lock between any two operations, so who
holds it holds the step up. A decision beside a step costs all of itself and the changes of threads
too: 5 ms steps of a small text model took 1.7 times as long with one of 1 ms beside each."""


class StreamModule(Protocol):
    """The user's code for one kind of step."""

    def load(self, device: str) -> None:
        """Get ready to run on `device` ("cpu", "cuda:0"), before the first step; maybe again."""
        ...

    def step(self, inputs: Sequence[StepInput]) -> Sequence[Update | StageFailed]:
        """Run one step for requests that may be at different rounds of their loops.

        Reads `params` (the caller's) and `state` (what earlier steps returned) of each; changes
        neither, but for objects that it put into the state itself. Returns one update each, in the
        same order, to be merged into the state: whatever the graph asks of it is in there. A
        StageFailed in place of an update fails that request alone, an exception fails them all.

        Four more methods are optional, for modules that keep something of a request outside of its
        state; all are called on the same thread, between two steps:

        `release(id)`: the request is over, gone, or lost its KV blocks: nothing is to be kept.
        `put_aside(id)`: it lost its KV blocks, and what was in them is to be kept in the host's
        memory: it goes on from there. `release(id)` comes all the same when it is over. Modules of
        a model whose `KVCache` has `host_blocks` need it if they have `release`.
        `export(input) -> Any`: what it keeps, as plain data that can be pickled; None: nothing.
            StageFailed if another module could not go on from it.
        `adopt(input, piece)`: make it this module's own; StageFailed if that cannot be.

        Requests of a module with `release` and without the other two cannot move once they have
        begun (`movable`). One object may serve several stages: what it keeps then moves once.
        """
        ...


class Executor(Protocol):
    """Starts steps for one pool; each ends as a `Done` event on the clock."""

    @property
    def alone_s(self) -> float:
        """Steps shorter than this have Python to themselves: what follows them is decided once they
        have ended, not beside them."""
        ...

    def start(self, batch: Batch, clock: Clock) -> None: ...

    def release(self, id: str) -> None:
        """Request `id` is over, or lost its KV blocks: nothing of it needs to be kept."""
        ...

    def close(self, *, wait: bool = True) -> None:
        """No more steps. `wait` for those under way; without, their threads end when they do."""
        ...

    def here(self) -> bool:
        """Whether the present thread is one that `close` waits for."""
        ...


@runtime_checkable
class Mover(Protocol):
    """An executor whose requests can go on elsewhere; see `ThreadExecutor`."""

    def export(self, input: StepInput, worker: int = 0) -> Future[Pieces]: ...

    def adopt(self, input: StepInput, pieces: Pieces, worker: int = 0) -> Future[None]: ...


@runtime_checkable
class Stopper(Protocol):
    """An executor that can end a step early for one of its requests."""

    def stop(self, id: str) -> None:
        """Nobody wants what request `id` makes in its step; that ends as soon as it can."""
        ...


@runtime_checkable
class Keeper(Protocol):
    """An executor whose modules may keep what preempted requests had in their KV blocks."""

    def put_aside(self, id: str) -> None:
        """Request `id` lost its KV blocks; what was in them is to be kept in the host's memory."""
        ...

    def forgets(self, model: str) -> str:
        """Which module of a model would forget it instead, and why; "": none."""
        ...


@runtime_checkable
class Foreseeing(Protocol):
    """An executor that knows before they run what steps will return: it only pretends."""

    def quiet(self, batch: Batch) -> float:
        """How many steps of the jobs of a step in a row, that one first, return nothing (`{}`)."""
        ...


_NOTHING: Update = {}


class ProfiledExecutor:
    """Lets the profiled time pass and computes nothing.

    Here live the true futures that no policy may see.

    Args:
        truth: profiles of how long steps really take, by stage; None: as the scheduler expects.
        handover_s: from the end of a step to the start of the next; one for all, or by stage.
        stretch: multiplies a step's latency (noise, a device that slows down).
        beside: by when a step starts and how long it takes alone, what it loses to what else the
            process does meanwhile. Seconds.
        outcome: updates of a step's jobs (an end-of-sequence that only the simulation knows).
        quiet: how many steps return nothing (see `Foreseeing`), where there is an `outcome`.
        alone_s: see `Executor`.
    """

    def __init__(
        self,
        truth: Mapping[str, LatencyProfile] | None = None,
        *,
        handover_s: float | Mapping[str, float] = 0.0,
        stretch: Callable[[Batch], float] | None = None,
        beside: Callable[[float, float], float] | None = None,
        outcome: Callable[[Batch], Sequence[Update]] | None = None,
        quiet: Callable[[Batch], float] | None = None,
        alone_s: float = BRIEF_S,
    ) -> None:
        self._truth = truth
        self._beside = beside
        self._handover_s = handover_s
        self._stretch = stretch
        self._outcome = outcome
        self._quiet = quiet
        self.alone_s = alone_s

    def start(self, batch: Batch, clock: Clock) -> None:
        seconds = batch.expected if self._truth is None else latency_of(self._truth, batch)
        if self._stretch is not None:
            seconds *= self._stretch(batch)
        if self._beside is not None:
            seconds += self._beside(clock.now(), seconds)
        handover = self._handover_s
        if not isinstance(handover, float | int):
            handover = handover[batch.stage]
        updates: Sequence[Update] = (_NOTHING,) * len(batch.jobs)
        if self._outcome is not None and not batch.quiet:
            updates = self._outcome(batch)
        clock.post(Done(batch, updates), clock.now() + seconds + handover)

    def quiet(self, batch: Batch) -> float:
        if self._outcome is None:
            return math.inf
        return 0 if self._quiet is None else self._quiet(batch)

    def release(self, id: str) -> None:
        pass

    def put_aside(self, id: str) -> None:
        pass

    def forgets(self, model: str) -> str:
        """Nobody: nothing is kept, and nothing is computed."""
        return ""

    def export(self, input: StepInput, worker: int = 0) -> Future[Pieces]:
        """Nothing: it keeps nothing."""
        return settled({})

    def adopt(self, input: StepInput, pieces: Pieces, worker: int = 0) -> Future[None]:
        """Nothing to do."""
        return settled(None)

    def close(self, *, wait: bool = True) -> None:
        pass

    def here(self) -> bool:
        return False


class ThreadExecutor:
    """Runs stream modules on threads of this process, one thread per worker.

    Where they are in for short steps (`alone_s`), the loop's turn follows on a worker's thread if
    the loop's own sleeps. Behind longer ones observers are told beside the next.

    Args:
        modules: the modules by stage name (or model), for one worker; or a sequence of such
            mappings, one per worker of the pool.
        devices: where each worker's modules are loaded, in the same order.
        check_finite: fail a job whose update holds NaN or infinity (costs a device sync a step).

    Raises:
        BackendError: modules and devices are not equally many, it is closed, or another process
            made it.
    """

    def __init__(
        self,
        modules: Mapping[str, StreamModule] | Sequence[Mapping[str, StreamModule]],
        devices: Sequence[str] = ("cpu",),
        *,
        check_finite: bool = False,
    ) -> None:
        sets = [modules] if isinstance(modules, Mapping) else list(modules)
        if len(sets) != len(devices):
            raise BackendError(
                f"{len(sets)} set(s) of modules for {len(devices)} device(s): {list(devices)}"
            )
        places = {
            (id(module), at): module
            for mods, at in zip(sets, devices, strict=True)
            for module in mods.values()
        }
        for (_, device), module in places.items():
            module.load(device)
        self.alone_s = alone_s(devices)
        self._process = os.getpid()
        self._closing = threading.RLock()  # it may be closed by a finalizer, anywhere
        self._closed = False
        self._check_finite = check_finite
        self._checked: set[str] = set()  # stages that are checked in any case
        self._workers = [Worker(f"neustream-worker-{at}", mods) for at, mods in enumerate(sets)]

    def start(self, batch: Batch, clock: Clock) -> None:
        self._post(batch.worker, partial(self._run, batch, batch.inputs(), clock))

    def add(
        self, modules: Mapping[str, StreamModule], worker: int = 0, *, check_finite: bool = False
    ) -> None:
        """More stages for a worker; their modules are loaded already. `check_finite`: as of all."""
        if check_finite:
            self._checked.update(modules)
        self._workers[worker].modules.update(modules)

    def remove(self, stages: Collection[str], worker: int = 0) -> None:
        """Forget stages of a worker that no request needs any more."""
        for stage in stages:
            self._workers[worker].modules.pop(stage, None)

    def call(self, function: Callable[[], Any], worker: int = 0) -> Future[Any]:
        """Run `function` on a worker's thread, between two steps. BackendError if it is closed.

        At once if that is the present thread, and in no step: a callback may wait for the Future.
        """
        if not self._workers[worker].free:
            return self._behind(worker, function)
        with self._open():
            pass
        answer: Future[Any] = Future()
        settle(answer, function)
        return answer

    def _behind(self, worker: int, function: Callable[[], Any]) -> Future[Any]:
        """Run `function` on a worker's thread behind all that was posted before."""
        answer: Future[Any] = Future()
        self._post(worker, partial(settle, answer, function))
        return answer

    def release(self, id: str) -> None:
        for worker in self._workers:
            if worker.releases:
                worker.post(partial(worker.release, id))

    def put_aside(self, id: str) -> None:
        for worker in self._workers:
            if worker.releases:
                worker.post(partial(worker.put_aside, id))

    def forgets(self, model: str) -> str:
        return next(filter(None, [worker.forgets(model) for worker in self._workers]), "")

    def export(self, input: StepInput, worker: int = 0) -> Future[Pieces]:
        """What a worker's modules keep of a request that waits, as plain data, for `adopt`.

        Ask for it while the scheduler holds the request, before `give`. Nothing changes here: that
        is for `release`. Empty if the modules keep nothing of it.

        Raises:
            StageFailed: from the Future, if a module cannot part with it; names the module's class.
            BackendError: the executor is closed.
        """
        return self._behind(worker, partial(self._workers[worker].export, input))

    def adopt(self, input: StepInput, pieces: Pieces, worker: int = 0) -> Future[None]:
        """Make what `export` gave a worker's own; steps that start after this call find it there.

        Raises:
            StageFailed: from the Future: a module cannot go on from it. Then none keeps anything.
            BackendError: the executor is closed.
        """
        return self._behind(worker, partial(self._workers[worker].adopt, input, pieces))

    def close(self, *, wait: bool = True) -> None:
        """Let the steps under way end, and what was called before; then the threads end."""
        with self._closing:
            self._closed = True
            for worker in self._workers:
                worker.post(worker.modules.clear)  # models are no longer needed
                worker.post(None)
        if wait:
            for worker in self._workers:
                worker.join()

    def here(self) -> bool:
        return any(worker.here() for worker in self._workers)

    def _post(self, worker: int, work: Callable[[], None]) -> None:
        """Have a worker do `work`; BackendError if nobody would ever do it."""
        with self._open():
            self._workers[worker].post(work)

    @contextlib.contextmanager
    def _open(self) -> Iterator[None]:
        """Kept from closing meanwhile; BackendError if it is closed, or in another process."""
        if os.getpid() != self._process:
            raise BackendError(f"this executor's threads are those of process {self._process}")
        with self._closing:
            if self._closed:
                raise BackendError("this executor is closed")
            yield

    def _run(self, batch: Batch, inputs: Sequence[StepInput], clock: Clock) -> None:
        worker = self._workers[batch.worker]
        check = self._check_finite or batch.stage in self._checked
        results = worker.step(batch, inputs, check_finite=check)
        now = clock.now()
        if now - batch.started_at < self.alone_s:
            clock.deliver(Done(batch, results))
        else:
            clock.post(Done(batch, results), now)


def alone_s(devices: Sequence[str]) -> float:
    """How short steps on `devices` are that have Python to themselves, in seconds."""
    return BRIEF_ON_CPU_S if all(device == "cpu" for device in devices) else BRIEF_S


def settled(value: Any) -> Future[Any]:
    """A future that has its value."""
    answer: Future[Any] = Future()
    answer.set_result(value)
    return answer
