"""What requests asked for lately, in numbers: no graph, no job and no model is kept alive by it."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from neustream.core.job import Job
from neustream.core.lengths import Lengths
from neustream.core.record import record
from neustream.core.seen import Seen

RECENT = 100
"""Requests that are remembered for policies to see the load by."""


@record()
class Calls:
    """`count` calls of a stage, of `size` each (0: no sizes), in batches of at most `max_batch`."""

    count: int
    looped: bool
    max_batch: int
    size: float = 0.0


@dataclass(frozen=True, slots=True, eq=False)
class Demand:
    """What a request asked for when it came at `at`: `calls` by stage, within `budget` seconds.

    Its first output was promised within `first` seconds, each next one within `step`. inf: nothing
    was promised.
    """

    at: float
    budget: float
    weight: float = 1.0
    calls: Mapping[str, Calls] = field(default_factory=dict)
    first: float = math.inf
    step: float = math.inf

    @classmethod
    def of(cls, job: Job) -> Demand:
        """That of a job that was just submitted."""
        graph = job.request.graph
        calls = {}
        for name, count in job.planned_calls.items():
            stage = graph.stages[name]
            size = job.size_ahead(stage)
            calls[name] = Calls(count, name in graph.looped, stage.max_batch, size)
        budget = job.deadline - job.arrival
        return cls(job.arrival, budget, job.weight, calls, job.slo.first, job.slo.step)


class Missed(NamedTuple):
    """A request was not on time, at an instant, of some weight."""

    at: float
    weight: float


class Recent:
    """The demand of the latest requests, the lengths of generations by model, what graphs did.

    Attributes:
        missed: the latest requests that broke a promise, or were given up, in the order they ended.
    """

    def __init__(self) -> None:
        self.seen = Seen()
        self.lengths: dict[str, Lengths] = {}
        self._demands: deque[Demand] = deque(maxlen=RECENT)
        self._tuple: tuple[Demand, ...] | None = ()
        self.missed: deque[Missed] = deque(maxlen=RECENT)

    def ended(self, job: Job, now: float) -> None:
        """A request is over."""
        if job.promised and job.status != "cancelled" and not job.on_time:
            self.missed.append(Missed(now, job.weight))

    def add(self, demand: Demand) -> None:
        self._demands.append(demand)
        self._tuple = None

    def remove(self, stages: Collection[str]) -> None:
        """Forget requests that asked for stages which are gone."""
        kept = [demand for demand in self._demands if demand.calls.keys().isdisjoint(stages)]
        self._demands = deque(kept, maxlen=RECENT)
        self._tuple = None

    @property
    def demands(self) -> tuple[Demand, ...]:
        """In the order they came; the same tuple until another request comes."""
        if self._tuple is None:
            self._tuple = tuple(self._demands)
        return self._tuple

    def lengths_of(self, model: str) -> Lengths:
        """What is known of how long generations of `model` get."""
        lengths = self.lengths.get(model)
        if lengths is None:
            lengths = self.lengths[model] = Lengths()
        return lengths
