"""Measuring stream modules: how long each stage of a graph takes, over its batch sizes."""

from __future__ import annotations

import contextlib
import math
import platform
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from neustream.core.batch import input_of
from neustream.core.events import Update
from neustream.core.graph import Graph
from neustream.core.profile import LatencyProfile, TableProfile
from neustream.core.types import Request
from neustream.core.work import Walk
from neustream.engine.clock import stopwatch
from neustream.engine.executor import StreamModule
from neustream.errors import NeustreamError, ProfileError, StageFailed, told
from neustream.profiling.files import Measurement

LEAST_REPEATS = 3
"""Timed steps of each batch size, however long they take."""


def measure(
    graph: Graph,
    modules: Mapping[str, StreamModule],
    sample: Callable[[int], Mapping[str, Any]],
    *,
    device: str = "cpu",
    batches: Sequence[int] | Mapping[str, Sequence[int]] | None = None,
    repeats: int = 15,
    warmup: int = 2,
    seconds: float = math.inf,
    sync: Callable[[], None] = lambda: None,
    tick: Callable[[str, int, float], None] = lambda stage, batch, seconds: None,
    out_of_memory: tuple[type[BaseException], ...] = (MemoryError,),
    on_limit: Callable[[str, int, BaseException], None] = lambda stage, batch, error: None,
    stages: Collection[str] | None = None,
) -> dict[str, list[Measurement]]:
    """Time every stage of `graph` at `batches`, one list for all or by stage (default: see `default_batches`).

    Real jobs walk the real graph: before a stage is timed, its jobs have run all stages in front of
    it. Each timed step gets jobs in the state they have there; where a stage is looped, they stay
    for as many rounds as their loop has. The batch sizes take turns, so that a moment in which the
    device is slow falls on all of them.

    Args:
        sample: parameters of the i-th sample request; its loops must have at least one round.
        warmup: untimed steps of each batch size, before the timed ones.
        seconds: that a stage may take, about, bringing requests there included: no step is repeated then, once
            each batch size was timed `LEAST_REPEATS` times.
        sync: waits for the device (`torch.cuda.synchronize`); called around each timing.
        tick: told of each step: stage, batch, seconds.
        out_of_memory: on these, that batch and larger ones are left out, and `on_limit` is told.
        stages: which stages to time, default: all.
    """
    for name, module in modules.items():
        with module_faults(f"stage {name!r}: loading it"):
            module.load(device)
    lab = _Lab(graph, modules, sample, sync, out_of_memory)
    out: dict[str, list[Measurement]] = {}
    for name, stage in graph.stages.items():
        if stages is not None and name not in stages:
            continue
        wanted = batches.get(name) if isinstance(batches, Mapping) else batches
        sizes = [batch for batch in wanted or default_batches(stage.max_batch) if batch <= stage.max_batch]
        timed = _timed(lab, name, sizes, warmup, repeats, seconds, out_of_memory, tick, on_limit)
        out[name] = [Measurement(name, batch, tuple(some)) for batch, some in timed.items()]
        lab.clear()
    return out


def go_through(
    graph: Graph,
    modules: Mapping[str, StreamModule],
    params: Mapping[str, Any],
    *,
    device: str = "cpu",
    out_of_memory: tuple[type[BaseException], ...] = (MemoryError,),
) -> None:
    """Run a request to its end, untimed: what a model does once for all requests of a kind is behind it then."""
    for name, module in modules.items():
        with module_faults(f"stage {name!r}: loading it"):
            module.load(device)
    lab = _Lab(graph, modules, lambda at: params, lambda: None, out_of_memory)
    try:
        lab.whole()
    finally:
        lab.clear()


def _timed(
    lab: _Lab,
    name: str,
    sizes: Sequence[int],
    warmup: int,
    repeats: int,
    most_s: float,
    out_of_memory: tuple[type[BaseException], ...],
    tick: Callable[[str, int, float], None],
    on_limit: Callable[[str, int, BaseException], None],
) -> dict[int, list[float]]:
    """Seconds of the steps of one stage by batch size; sizes take turns. See `measure`."""
    seconds: dict[int, list[float]] = {batch: [] for batch in sizes}
    began = stopwatch()
    for turn in range(warmup + repeats):
        if turn >= warmup + LEAST_REPEATS and stopwatch() - began > most_s:
            break
        for batch in list(seconds):
            try:
                with module_faults(f"stage {name!r}: a step of {batch}", out_of_memory):
                    lasted = lab.step(name, batch)
            except out_of_memory as error:
                lab.clear()
                if batch == min(seconds):
                    raise ProfileError(f"stage {name!r}: out of memory at batch {batch}: {error}") from error
                on_limit(name, batch, error)
                seconds = {smaller: some for smaller, some in seconds.items() if smaller < batch}
                break
            if turn >= warmup:
                seconds[batch].append(lasted)
            tick(name, batch, lasted)
    return seconds


@contextlib.contextmanager
def module_faults(what: str, passed: tuple[type[BaseException], ...] = ()) -> Iterator[None]:
    """What a stream module raises becomes a StageFailed that says what was done, but for what is `passed` on."""
    try:
        yield
    except NeustreamError:
        raise
    except Exception as error:
        if isinstance(error, passed):
            raise
        raise StageFailed(f"{what} raised {told(error)}") from error


def default_batches(largest: int) -> list[int]:
    """1, 2, 3, 4, 6, 8, 12, 16, 24, ... up to `largest`, which is always in."""
    sizes = {b for k in range(32) for b in (2**k, 3 * 2**k) if b < largest}
    return sorted(sizes | {largest})


class _Lab:
    """Sample requests, and the means to bring them to a stage and time it."""

    def __init__(
        self,
        graph: Graph,
        modules: Mapping[str, StreamModule],
        sample: Callable[[int], Mapping[str, Any]],
        sync: Callable[[], None],
        out_of_memory: tuple[type[BaseException], ...],
    ) -> None:
        self._graph, self._modules, self._sample, self._sync = graph, modules, sample, sync
        self._out_of_memory = out_of_memory
        self._most: dict[str, int] = {}  # requests at once that there is memory for, where that was found out
        self._ready: list[Walk] = []  # requests that are at the stage being measured
        self._made = 0

    def clear(self) -> None:
        for walk in self._ready:
            self._release(walk)
        self._ready = []

    def _release(self, walk: Walk) -> None:
        """Tell the modules that keep something of a request that it is over."""
        for module in self._modules.values():
            if (release := getattr(module, "release", None)) is not None:
                release(walk.job.id)

    def step(self, stage: str, batch: int) -> float:
        """Run one step of `batch` requests at `stage`; seconds."""
        walks = self._at(stage, batch)
        inputs = [input_of(walk.job) for walk in walks]
        self._sync()
        began = stopwatch()
        updates = self._modules[stage].step(inputs)
        self._sync()
        seconds = stopwatch() - began
        self._apply(walks, updates)
        return seconds

    def whole(self) -> None:
        """One request from its first stage to its end."""
        walk = self._new()
        self._ready.append(walk)
        while walk.stage is not None:
            stage = walk.stage.name
            try:
                with module_faults(f"stage {stage!r}: a step of 1", self._out_of_memory):
                    updates = self._modules[stage].step([input_of(walk.job)])
            except self._out_of_memory as error:
                raise ProfileError(f"stage {stage!r}: out of memory at batch 1: {error}") from error
            self._apply([walk], updates)

    def _at(self, stage: str, count: int) -> list[Walk]:
        """`count` requests whose next stage is `stage`."""
        ready = []
        for walk in self._ready:
            if walk.stage is not None and walk.stage.name == stage:
                ready.append(walk)
            else:
                self._release(walk)
        self._ready = ready
        new = [self._new() for _ in range(count - len(ready))]
        ready += new
        self._bring(new, stage)
        return ready[:count]

    def _new(self) -> Walk:
        params = self._sample(self._made)
        self._made += 1
        return Walk(Request(f"sample-{self._made - 1}", self._graph, params=params))

    def _bring(self, walks: Sequence[Walk], stage: str) -> None:
        """Run all stages in front of `stage`, for as many requests at once as each may have, and has memory for."""
        while ahead := [walk for walk in walks if walk.stage is not None and walk.stage.name != stage]:
            here = ahead[0].stage
            assert here is not None
            most = self._most.get(here.name, here.max_batch)
            some = [walk for walk in ahead if walk.stage is not None and walk.stage.name == here.name][:most]
            try:
                updates = self._modules[here.name].step([input_of(walk.job) for walk in some])
            except self._out_of_memory:
                if len(some) == 1:
                    raise
                self._most[here.name] = len(some) // 2
                continue
            self._apply(some, updates)
        if any(walk.stage is None for walk in walks):
            raise ProfileError(f"the sample requests never get to stage {stage!r}; check their parameters")

    def _apply(self, walks: Sequence[Walk], updates: Sequence[Update | StageFailed]) -> None:
        if len(updates) != len(walks):
            raise StageFailed(f"stage {walks[0].stage} returned {len(updates)} results for {len(walks)} jobs")
        for walk, update in zip(walks, updates, strict=True):
            if isinstance(update, StageFailed):
                raise update
            walk.advance(update)


def profiles_of(measured: Mapping[str, Sequence[Measurement]], device: str = "") -> dict[str, LatencyProfile]:
    """Profiles from measurements, without a detour over files."""
    return {
        name: TableProfile(name, [m.batch for m in some], [m.median for m in some], device=device)
        for name, some in measured.items()
    }


def processor() -> str:
    """The processor's name, as far as the system tells."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def versions() -> dict[str, str]:
    """The libraries that latencies depend on, as installed here."""
    found = {"python": platform.python_version()}
    for name in ("neustream", "numpy", "torch", "diffusers", "transformers"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
