"""What lies ahead of a request on its way through several pools, and what it costs each of them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray

from neustream.core.demand import Demand
from neustream.core.graph import Stage
from neustream.core.job import Job
from neustream.core.lengths import Lengths
from neustream.core.policies.model_queues import kind_of
from neustream.core.policy import View
from neustream.core.steps import PhaseProfile, Step, StepLatency

Floats = NDArray[np.float64]
PROBE = 8
"""Requests in a step from which it is found how much longer steps get with each."""
CROWD = 4
"""Requests that are taken to begin together where there are many."""
SHARES = (0.125, 0.375, 0.625, 0.875)
"""How long generations get, as numbers: the middles of four parts that are as likely."""


@dataclass(frozen=True)
class Leg:
    """What a request has ahead in one pool: calls of a model, or of a stage.

    Args:
        pool: its name; "": the stage just starts, and nothing is charged for it.
        once: seconds that it takes alone beside its decodes.
        outputs: steps that it decodes, at each of `SHARES`; none: no call of a language model.
        base, each: seconds of a decode beside those of its requests, and of each request in it.
        most: requests in a decode, by memory and seats.
        stage: in whose steps it is, the last of them.
        crowded: seconds that `once` costs in a step with others.
    """

    pool: str
    once: float
    outputs: tuple[float, ...] = ()
    base: float = 0.0
    each: float = 0.0
    most: float = 1.0
    stage: str = ""
    crowded: float = 0.0

    @cached_property
    def decodes(self) -> float:
        """Steps that it decodes in the mean."""
        return sum(self.outputs) / len(self.outputs) if self.outputs else 0.0

    @cached_property
    def alone(self) -> float:
        """Seconds that it takes alone in the mean."""
        return self.once + self.decodes * (self.base + self.each)

    @cached_property
    def alones(self) -> Floats:
        """Seconds that it takes alone, at each of `SHARES`."""
        outputs = np.array(self.outputs or (0.0,) * len(SHARES))
        seconds: Floats = self.once + outputs * (self.base + self.each)
        return seconds

    @cached_property
    def longer(self) -> tuple[float, ...]:
        """Seconds more than in the mean that it takes alone, at each of `SHARES`."""
        return tuple((self.alones - self.alone).tolist())

    def charge(self, stretch: float, left: float = 1.0) -> float:
        """Seconds that it costs the pool, if it may take `stretch` times what it takes alone.

        In a step of b requests each costs 1/b of it, and how many that are depends on the time that
        they have. `left`: the share of it that is still ahead.
        """
        if not self.pool:
            return 0.0
        if not self.outputs:
            return left * self.once
        return left * (self.once + self.decodes * (self.base / self._batch(stretch) + self.each))

    def stay(self, stretch: float, left: float = 1.0) -> float:
        """Seconds that it is there in such batches."""
        each = self.base + self.each * self._batch(stretch)
        return left * (self.once + self.decodes * each)

    def _batch(self, stretch: float) -> float:
        """Requests in a decode that takes at most `stretch` times what it takes alone."""
        batch = self.most
        if self.each > 0:
            batch = min(batch, (stretch * (self.base + self.each) - self.base) / self.each)
        return max(batch, 1.0)


def legs_of_job(view: View, job: Job) -> list[Leg]:
    """The legs of a live job, that which it is in first.

    What follows the join of a branch takes time, but is charged to none of the branches.
    """
    here = {name: job.calls_here(name) for name in job.calls_left}
    legs = list(_legs(view, _asked(job), here))
    joins = job.joins
    while joins is not None:
        legs += [replace(leg, pool="") for leg in _legs(view, _asked(joins), {})]
        joins = joins.joins
    return legs


def _asked(job: Job) -> list[tuple[Stage, int, float]]:
    stages = job.request.graph.stages
    calls = job.calls_left.items()
    return [(stages[name], count, job.size_ahead(stages[name])) for name, count in calls]


def legs_of_demand(view: View, demand: Demand, stages: Mapping[str, Stage]) -> list[Leg]:
    """The legs of what a request asked for; `stages`: those that are known, by name."""
    asked = [
        (stages[name], calls.count, calls.size)
        for name, calls in demand.calls.items()
        if name in stages
    ]
    return list(_legs(view, asked, {}))


def _legs(
    view: View, asked: Sequence[tuple[Stage, int, float]], here: Mapping[str, int]
) -> Iterator[Leg]:
    """`here`: calls of each stage that are of the leg that a request is in.

    Later calls of a model that it is at come last.
    """
    behind: list[Leg] = []
    prompts = {stage.model: (stage, count) for stage, count, _ in asked if stage.phase == "prefill"}
    for stage, count, size in asked:
        profile = view.profiles[stage.name]
        pool = view.pool_of(stage.name)
        if not isinstance(profile, PhaseProfile):
            charged = pool is not None and pool.concurrency is None
            seconds = count * profile.latency(1, size, size * size)
            batch = min(CROWD, profile.max_batch, stage.max_batch)
            crowded = count * profile.latency(batch, batch * size, batch * size * size) / batch
            name = pool.name if pool is not None and charged else ""
            yield Leg(name, seconds, stage=stage.name, crowded=crowded)
        elif stage.phase == "decode":
            prefill, calls = prompts.get(stage.model, (stage, 0))
            one = profile.steps.seconds(Step(1, size, size * size))
            batch = min(CROWD, profile.max_batch, stage.max_batch)
            many = profile.steps.seconds(Step(batch, batch * size, batch * size * size))
            each = one, min(many / batch, one)
            own = here.get(stage.name, 0)
            if own > 0:
                first = here.get(prefill.name, 0) if calls else 0
                yield _calls(view, stage, profile.steps, 1, _times(first, each), own, size)
                calls -= first
            if count > own:
                calls = max(calls, 1)
                most = (count - own) / calls
                made = _times(calls, each)
                behind.append(_calls(view, stage, profile.steps, calls, made, most, size))
    yield from behind


def _calls(
    view: View,
    stage: Stage,
    steps: StepLatency,
    calls: int,
    prompts: tuple[float, float],
    most: float,
    size: float,
) -> Leg:
    """The leg of calls that decode up to `most` outputs each behind prompts of `size` tokens.

    `prompts`: seconds of these, and those that they cost in steps with others.
    """
    pool = view.pool_of(stage.name)
    outputs = likely(view.lengths.get(stage.model), 0, most)
    mean = float(outputs.mean())
    context = size + mean / 2
    one = steps.seconds(Step(decodes=1, context=context))
    probe = min(PROBE, view.profiles[stage.name].max_batch, stage.max_batch)
    many = steps.seconds(Step(decodes=probe, context=probe * context))
    each = max((many - one) / max(probe - 1, 1), 0.0)
    batch = float(stage.max_batch)
    cache = None if pool is None else pool.kv_caches.get(stage.model)
    if cache is not None:
        batch = min(batch, cache.capacity / (context + cache.block_size / 2))
    name = "" if pool is None else pool.name
    decodes = tuple((calls * outputs).tolist())
    base = max(one - each, 0.0)
    return Leg(name, prompts[0], decodes, base, each, max(batch, 1.0), stage.name, prompts[1])


def _times(count: float, each: tuple[float, float]) -> tuple[float, float]:
    return count * each[0], count * each[1]


def likely(lengths: Lengths | None, made: int, most: float) -> Floats:
    """`to_come` as an array."""
    return np.array(to_come(lengths, made, most))


def to_come(lengths: Lengths | None, made: int, most: float) -> list[float]:
    """Outputs that a generation which made some should still make, of at most so many.

    At each of `SHARES`, at least one.
    """
    known = lengths or Lengths()
    within = known.within(made, SHARES, made + most)
    most = max(most, 1.0)
    return [min(max(outputs, 1.0), most) for outputs in within]


def applies(view: View) -> bool:
    """Whether requests go through several pools, and only their end is promised."""
    here = set(view.pool.stages)
    if all(queue[-1].request.graph.stages.keys() <= here for queue in view.queues.values()):
        return False
    for queue in view.queues.values():
        for job in queue:
            if job.due == math.inf or job.slo.first < math.inf:
                return False
    return True


def go_on(view: View) -> bool:
    """Whether some requests go through several kinds of steps of this pool."""
    known = view.memo.setdefault((go_on, view.pool.name), WeakKeyDictionary())
    graphs = {id(job.request.graph): job.request.graph for job in view.jobs}
    for graph in graphs.values():
        kinds = known.get(graph)
        if kinds is None or kinds[0] != view.pool.stages:
            here = [stage for name, stage in graph.stages.items() if name in view.pool.stages]
            kinds = view.pool.stages, len({kind_of(view, stage) for stage in here}) > 1
            known[graph] = kinds
        if kinds[1]:
            return True
    return False
