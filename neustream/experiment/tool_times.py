"""Simulated tools: how long each call takes, and which fail."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

from neustream.config.agent import Latency, LogNormalSeconds, Samples, ToolConfig, Uniform
from neustream.core.batch import Batch
from neustream.core.entry import Entry
from neustream.core.reasons import span
from neustream.engine.clock import Clock
from neustream.engine.events import Call, Done
from neustream.engine.executor import ProfiledExecutor
from neustream.errors import ConfigError, StageFailed

Draw = Callable[[np.random.Generator], float]


class SimulatedTool(ProfiledExecutor):
    """Lets the time of a tool's calls pass; the same request's calls take as long under any policy.

    A call is over at once if its request, or the branch that it is for, is, as that of an `async def`
    which is served (`ToolExecutor`).
    """

    def __init__(self, name: str, config: ToolConfig, seed: int) -> None:
        super().__init__()
        self._name = name
        self._config = config
        self._draw = draw_of(name, config.latency_s)
        self._seed = [seed, zlib.crc32(name.encode())]
        self._calls: dict[str, int] = {}
        self._under_way: dict[str, tuple[Batch, Clock]] = {}

    def start(self, batch: Batch, clock: Clock) -> None:
        [job] = batch.jobs
        assert isinstance(job, Entry)
        calls = self._calls[job.id] = self._calls.get(job.id, 0) + 1
        seconds, why = self.drawn(job.id, calls)
        done = Done(batch, [StageFailed(f"stage {self._name!r}: {why}") if why else {}])
        self._under_way[job.id] = batch, clock
        clock.post(Call(partial(self._over, job.id, done), Done.rank), clock.now() + seconds)

    def _over(self, id: str, done: Done, now: float) -> None:
        """The time of a call has passed; nothing happens if it was stopped before."""
        batch, clock = self._under_way.get(id, (None, None))
        if clock is not None and batch is done.batch:
            del self._under_way[id]
            clock.post(done, now)

    def stop(self, id: str) -> None:
        """Nobody wants any more what a job's call makes: it is over now."""
        if id in self._under_way:
            batch, clock = self._under_way.pop(id)
            clock.post(Done(batch, [{}]), clock.now())

    def drawn(self, id: str, call: int) -> tuple[float, str]:
        """Seconds of a job's `call`-th call, from 1 on, and why it fails; "" if it does not."""
        return self._tried(np.random.default_rng([*self._seed, zlib.crc32(id.encode()), call]))

    def _tried(self, drawn: np.random.Generator) -> tuple[float, str]:
        """Seconds of a call with its tries, and why it failed; "" if it did not."""
        config, seconds, why = self._config, 0.0, ""
        limit = math.inf if config.timeout_s is None else config.timeout_s
        for _ in range(config.retries + 1):
            taken = self._draw(drawn)
            failed = drawn.random() < config.fails
            seconds += min(taken, limit)
            if taken <= limit and not failed:
                return seconds, ""
            why = "it failed" if taken <= limit else f"it did not return within {span(limit)}"
        return seconds, why if not config.retries else f"{why} ({config.retries + 1} tries)"

    def release(self, id: str) -> None:
        self._calls.pop(id, None)


def mean_of_latency(name: str, latency: Latency) -> float:
    """What a call is expected to take."""
    if isinstance(latency, Uniform):
        return (latency.min + latency.max) / 2
    if isinstance(latency, LogNormalSeconds):
        return latency.median * math.exp(latency.sigma**2 / 2)
    if isinstance(latency, Samples):
        return float(np.mean(_samples(name, latency.samples)))
    return float(latency)


def draw_of(name: str, latency: Latency) -> Draw:
    """How seconds of a call are drawn."""
    if isinstance(latency, Uniform):
        low, high = latency.min, latency.max
        return lambda drawn: float(drawn.uniform(low, high))
    if isinstance(latency, LogNormalSeconds):
        middle, sigma = math.log(latency.median), latency.sigma
        return lambda drawn: float(np.exp(drawn.normal(middle, sigma)))
    if isinstance(latency, Samples):
        seconds = _samples(name, latency.samples)
        return lambda drawn: seconds[int(drawn.integers(len(seconds)))]
    constant = float(latency)
    return lambda drawn: constant


def _samples(name: str, path: Path) -> list[float]:
    """The seconds of a file; ConfigError for what is none."""
    where = f"tools.{name}.latency_s.samples"
    try:
        lines = [line.strip() for line in path.read_text().splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{where}: {path} cannot be read: {error}") from None
    seconds: list[float] = []
    for number, line in enumerate(lines, 1):
        if not line or line.startswith("#"):
            continue
        try:
            value = float(line)
        except ValueError:
            value = math.nan
        if not 0 < value < 1e9:
            raise ConfigError(f"{where}: {path}, line {number}: seconds are above 0, got {line!r}")
        seconds.append(value)
    if not seconds:
        raise ConfigError(f"{where}: {path} has no numbers")
    return seconds
