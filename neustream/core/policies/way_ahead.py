"""What lies ahead of a request on its way through several pools, and what it costs each of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from neustream.core.demand import Demand
from neustream.core.graph import Stage
from neustream.core.job import Job
from neustream.core.lengths import Lengths
from neustream.core.policy import Pool, View
from neustream.core.steps import PhaseProfile, Step, StepLatency

PROBE = 8
"""Requests in a step from which it is found how much longer steps get with each."""


@dataclass(frozen=True, slots=True)
class Leg:
    """What a request has ahead in one pool: a model call, or calls of a stage.

    Args:
        pool: its name; "": the stage just starts, and nothing is charged for it.
        once: seconds that it takes alone beside its decodes.
        decodes: steps that it should decode; 0: it is no call of a language model.
        base, each: seconds of a decode beside those of its requests, and of each request in it.
        most: requests in a decode, by memory and seats.
    """

    pool: str
    once: float
    decodes: float = 0.0
    base: float = 0.0
    each: float = 0.0
    most: float = 1.0

    @property
    def alone(self) -> float:
        """Seconds that it takes alone."""
        return self.once + self.decodes * (self.base + self.each)

    def charge(self, stretch: float, left: float = 1.0) -> float:
        """Seconds that it costs the pool, if it may take `stretch` times what it takes alone.

        In a step of b requests each costs 1/b of it, and how many that are depends on the time that
        they have. `left`: the share of it that is still ahead.
        """
        if not self.pool:
            return 0.0
        if not self.decodes:
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
    """The legs of a live job, that which it is in first."""
    stages = job.request.graph.stages
    asked = (
        (stages[name], count, job.size_ahead(stages[name]))
        for name, count in job.calls_left.items()
    )
    return list(_legs(view, asked))


def legs_of_demand(view: View, demand: Demand, stages: Mapping[str, Stage]) -> list[Leg]:
    """The legs of what a request asked for; `stages`: those that are known, by name."""
    asked = (
        (stages[name], calls.count, calls.size)
        for name, calls in demand.calls.items()
        if name in stages
    )
    return list(_legs(view, asked))


def _legs(view: View, asked: Iterable[tuple[Stage, int, float]]) -> Iterator[Leg]:
    prompt = 0.0
    for stage, count, size in asked:
        profile = view.profiles[stage.name]
        pool = view.pool_of(stage.name)
        if not isinstance(profile, PhaseProfile):
            charged = pool is not None and pool.concurrency is None
            seconds = count * profile.latency(1, size, size * size)
            yield Leg(pool.name if pool is not None and charged else "", seconds)
        elif stage.phase == "prefill":
            prompt = count * profile.steps.seconds(Step(1, size, size * size))
        else:
            outputs = expected(view.lengths.get(stage.model), 0, count)
            yield _call(stage, pool, profile.steps, prompt, outputs, size)
            prompt = 0.0


def _call(
    stage: Stage, pool: Pool | None, steps: StepLatency, prompt: float, outputs: float, size: float
) -> Leg:
    """The leg of a call that decodes so many `outputs` behind a prompt of `size` tokens."""
    context = size + outputs / 2
    one = steps.seconds(Step(decodes=1, context=context))
    many = steps.seconds(Step(decodes=PROBE, context=PROBE * context))
    each = max((many - one) / (PROBE - 1), 0.0)
    most = float(stage.max_batch)
    cache = None if pool is None else pool.kv_caches.get(stage.model)
    if cache is not None:
        most = min(most, cache.capacity / (context + cache.block_size / 2))
    name = "" if pool is None else pool.name
    return Leg(name, prompt, outputs, max(one - each, 0.0), each, max(most, 1.0))


def expected(lengths: Lengths | None, made: int, most: float) -> float:
    """Outputs that a generation which made some should still make, of at most so many.

    All as long as none was seen to end early; then no more than some came to, and at least one.
    """
    if lengths is None or not lengths.ends:
        return most
    known = min(lengths.within(made, 0.5), lengths.far - made)
    return min(most, max(known, 1.0))
