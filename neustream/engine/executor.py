"""Who carries out a step: `ProfiledExecutor` pretends, `ThreadExecutor` runs stream modules."""

from __future__ import annotations

import math
import queue
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from functools import partial
from typing import Any, Protocol

from neustream.core.batch import Batch, StepInput
from neustream.core.events import Update
from neustream.core.profile import LatencyProfile
from neustream.core.step_times import step_latency
from neustream.engine.clock import Clock
from neustream.engine.events import Done
from neustream.errors import BackendError, NeustreamError, StageFailed, told


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

        Three more methods are optional, for modules that keep something of a request outside of its
        state; all are called on the same thread, between two steps:

        `release(id)`: the request is over, gone, or lost its KV blocks: nothing is to be kept.
        `export(input) -> Any`: what it keeps, as plain data that can leave the process.
        `adopt(input, piece)`: make it this module's own; StageFailed if that cannot be.
        """
        ...


class Executor(Protocol):
    """Starts steps for one pool; each ends as a `Done` event on the clock."""

    def start(self, batch: Batch, clock: Clock) -> None: ...

    def release(self, id: str) -> None:
        """Request `id` is over, or lost its KV blocks: nothing of it needs to be kept."""
        ...

    def close(self) -> None: ...


_NOTHING: Update = {}


class ProfiledExecutor:
    """Lets the profiled time pass and computes nothing.

    Here live the true futures that no policy may see.

    Args:
        truth: profiles of how long steps really take, by stage; None: as the scheduler expects.
        overhead_s: added to each step (launch, transport); one for all, or by stage.
        stretch: multiplies a step's latency (noise, a device that slows down).
        outcome: updates of a step's jobs (an end-of-sequence that only the simulation knows).
    """

    def __init__(
        self,
        truth: Mapping[str, LatencyProfile] | None = None,
        *,
        overhead_s: float | Mapping[str, float] = 0.0,
        stretch: Callable[[Batch], float] | None = None,
        outcome: Callable[[Batch], Sequence[Update]] | None = None,
    ) -> None:
        self._truth = truth
        self._overhead_s = overhead_s
        self._stretch = stretch
        self._outcome = outcome

    def start(self, batch: Batch, clock: Clock) -> None:
        seconds = (
            batch.expected
            if self._truth is None
            else step_latency(self._truth, batch.jobs, batch.sizes)
        )
        if self._stretch is not None:
            seconds *= self._stretch(batch)
        overhead = (
            self._overhead_s
            if isinstance(self._overhead_s, float | int)
            else self._overhead_s[batch.stage]
        )
        updates = (_NOTHING,) * len(batch) if self._outcome is None else self._outcome(batch)
        clock.post(Done(batch, updates), batch.started_at + seconds + overhead)

    def release(self, id: str) -> None:
        pass

    def close(self) -> None:
        pass


class ThreadExecutor:
    """Runs stream modules on threads of this process, one thread per worker.

    Args:
        modules: the modules by stage name (or model), for one worker; or a sequence of such
            mappings, one per worker of the pool.
        devices: where each worker's modules are loaded, in the same order.
        check_finite: fail a job whose update holds NaN or infinity (costs a device sync a step).
    """

    def __init__(
        self,
        modules: Mapping[str, StreamModule] | Sequence[Mapping[str, StreamModule]],
        devices: Sequence[str] = ("cpu",),
        *,
        check_finite: bool = False,
    ) -> None:
        workers = [modules] if isinstance(modules, Mapping) else list(modules)
        if len(workers) != len(devices):
            raise BackendError(
                f"{len(workers)} set(s) of modules for {len(devices)} device(s): {list(devices)}"
            )
        self._check_finite = check_finite
        self._inbox: list[queue.SimpleQueue[Callable[[], None] | None]] = []
        self._closing = threading.Lock()
        self._closed = False
        self._modules = [dict(mods) for mods in workers]
        self._releasing = [_releasing(mods.values()) for mods in workers]
        self._threads = []
        places = {
            (id(module), at): module
            for mods, at in zip(workers, devices, strict=True)
            for module in mods.values()
        }
        for (_, device), module in places.items():
            module.load(device)
        for worker in range(len(self._modules)):
            self._inbox.append(queue.SimpleQueue())
            thread = threading.Thread(target=_work, args=(self._inbox[worker],), daemon=True)
            thread.name = f"neustream-worker-{worker}"
            self._threads.append(thread)
            thread.start()

    def start(self, batch: Batch, clock: Clock) -> None:
        work = partial(self._run, batch, batch.inputs(), clock)
        self._inbox[batch.worker].put(work)

    def add(self, modules: Mapping[str, StreamModule], worker: int = 0) -> None:
        """More stages for a worker; their modules are loaded already."""
        self._modules[worker].update(modules)
        self._releasing[worker] = _releasing(self._modules[worker].values())

    def call(self, function: Callable[[], Any], worker: int = 0) -> Future[Any]:
        """Run `function` on a worker's thread, between two steps. BackendError if it is closed."""
        answer: Future[Any] = Future()
        with self._closing:
            if self._closed:
                raise BackendError("this executor is closed")
            self._inbox[worker].put(partial(_answer, function, answer))
        return answer

    def release(self, id: str) -> None:
        for at, releasing in enumerate(self._releasing):
            if releasing:
                work = partial(_release, releasing, id)
                self._inbox[at].put(partial(_answer, work, Future()))

    def close(self) -> None:
        """Let the steps under way end, and what was called before; then the threads end."""
        with self._closing:
            self._closed = True
            for inbox in self._inbox:
                inbox.put(None)
        for thread in self._threads:
            thread.join()

    def _run(self, batch: Batch, inputs: Sequence[StepInput], clock: Clock) -> None:
        results = self._step(batch, inputs, self._modules[batch.worker])
        clock.post(Done(batch, results), clock.now())

    def _step(
        self, batch: Batch, inputs: Sequence[StepInput], modules: Mapping[str, StreamModule]
    ) -> Sequence[Update | NeustreamError] | BaseException:
        try:
            if batch.stage not in modules:
                raise StageFailed(f"no module for it; modules: {sorted(modules)}")
            results = _one_each(modules[batch.stage].step(inputs))
            if self._check_finite:
                results = [_finite(batch.stage, result) for result in results]
            return results
        except BaseException as error:  # noqa: BLE001  a stage may raise anything
            failed = StageFailed(f"stage {batch.stage!r}: {told(error)}")
            failed.__cause__ = error
            return failed


def _work(inbox: queue.SimpleQueue[Callable[[], None] | None]) -> None:
    """A worker's thread: one thing after the other, until None comes."""
    while (work := inbox.get()) is not None:
        work()
        del work  # hold no finished request's tensors while idle


def _one_each(updates: object) -> list[Update | StageFailed]:
    """What a module returned, as a list of updates; StageFailed if it is none."""
    if isinstance(updates, Mapping) or not isinstance(updates, Iterable):
        raise StageFailed(f"must return one dict per job, got {type(updates).__name__}")
    results = list(updates)
    for result in results:
        if not isinstance(result, Mapping | StageFailed):
            raise StageFailed(f"must return one dict per job, got {type(updates).__name__}")
    return results


def _answer(function: Callable[[], Any], answer: Future[Any]) -> None:
    try:
        answer.set_result(function())
    except BaseException as error:  # noqa: BLE001  it is the caller's
        answer.set_exception(error)


def _releasing(modules: Iterable[StreamModule]) -> list[Callable[[str], None]]:
    known = {id(module): module.release for module in modules if hasattr(module, "release")}
    return list(known.values())


def _release(releasing: Sequence[Callable[[str], None]], id: str) -> None:
    for release in releasing:
        release(id)


def _finite(stage: str, update: Update | StageFailed) -> Update | StageFailed:
    if isinstance(update, StageFailed):
        return update
    for key, value in update.items():
        if isinstance(value, float):
            finite = math.isfinite(value)
        elif hasattr(value, "isfinite"):  # torch
            finite = bool(value.isfinite().all())
        elif hasattr(value, "dtype") and value.dtype.kind in "fc":  # numpy
            finite = bool((abs(value) < math.inf).all())
        else:
            continue
        if not finite:
            return StageFailed(f"stage {stage!r} returned NaN or infinity in {key!r}")
    return update
