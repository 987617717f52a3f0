"""Symphony's deferred batches, at the step level."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from neustream.core.job import Job
from neustream.core.policies.batching import largest_in_time, latest_start
from neustream.core.policy import Decision, View
from neustream.core.types import TICK
from neustream.errors import ConfigError


@dataclass(frozen=True)
class Symphony:
    """A batch that is not full waits while a larger one could still be in time.

    Source: Symphony's deferred batch scheduling (arXiv 2308.07470): a batch of b starts in the
    window between d - l(b + 1) and d - l(b), where d is the deadline of its most urgent member.
    Before that window a further request could still join it at no one's cost; after it, it would be
    late.

    Here l is what a request has left, all of its steps run in batches of that size:

    * Members: the largest b such that b requests are in time if each of their steps left takes
      l(b), those of the least slack first. Requests that would be late even alone are dropped.
    * Window: a batch that holds everyone who waits at its stage, and could hold more, waits until
      its most urgent member must start to be in time at b + 1. Each request that is in a loop ahead
      of it counts as one more, since they will share their steps there.
    * Only batches that are to start wait: those of stages that run once, and, with `defer_loops`,
      of loops that nobody in them has begun. A loop can be joined at every step, hence the default.
    * While a stage waits, the worker runs the others. It stops waiting early enough for one step of
      each of them, and `margin_s` earlier still, for steps that are slower than their profile. A
      batch that was promised nothing starts at once.

    Differences from that source: it schedules whole invocations, of many models on many GPUs, that
    nobody can join once they run; there, waiting is how a batch grows. A loop can be joined at
    every step, so that waiting in front of one (or in front of an encoder that leads to one) only
    spends the slack that its requests would share steps with. Counting those ahead, looking at all
    that a request has left, the order by slack and the choice among several stages are this port's
    own.

    Raises:
        ConfigError: a parameter is out of bounds.
    """

    defer_loops: bool = False
    margin_s: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.margin_s < math.inf:
            raise ConfigError(f"symphony: margin_s must be a time >= 0, got {self.margin_s}")

    def decide(self, view: View) -> Decision:
        drop = view.hopeless()
        batches: dict[str, list[Job]] = {}
        for stage, queue in view.queues.items():
            jobs = [job for job in queue if job not in drop]
            if jobs:
                jobs.sort(key=lambda job: job.slack(view.now))
                batches[stage] = largest_in_time(view, stage, jobs)
        waits = self._waits(view, batches, drop)
        later = drop | {job: "" for stage in waits for job in batches[stage]}
        chosen = view.first_stage(lambda job: job.slack(view.now), without=later)
        if chosen is not None:
            return Decision(batches[chosen], drop)
        return Decision(drop=drop, wake_at=min(waits.values(), default=None))

    def _waits(
        self, view: View, batches: dict[str, list[Job]], drop: dict[Job, str]
    ) -> dict[str, float]:
        """Until when batches that could be larger wait, by stage."""
        steps = {}
        for stage, batch in batches.items():
            steps[stage] = view.work(batch[0], len(batch), {stage: 1})
        waits = {}
        for stage, batch in batches.items():
            others = sum(seconds for other, seconds in steps.items() if other != stage)
            until = self._window(view, stage, batch, without=drop) - others - self.margin_s
            if view.now + TICK < until < math.inf:
                waits[stage] = until
        return waits

    def _window(
        self, view: View, stage: str, batch: Sequence[Job], without: dict[Job, str]
    ) -> float:
        """Latest start of `batch` if it were one larger; -inf if it should not wait."""
        queue = view.queues[stage]
        if len(batch) == view.limit(stage) or set(queue) - without.keys() - set(batch):
            return -math.inf
        looped = batch[0].request.graph.looped
        if stage in looped and not self._may_defer(queue):
            return -math.inf
        loops_ahead = (looped & batch[0].calls_left.keys()) - {stage}
        ahead = sum([len(view.queues.get(name, ())) for name in loops_ahead])
        # the smaller one too: tables need not be monotone
        sizes = (len(batch), len(batch) + 1 + ahead)
        return min([latest_start(view, job, size) for job in batch for size in sizes])

    def _may_defer(self, queue: Sequence[Job]) -> bool:
        """Whether a looped stage may wait: none of its jobs has begun."""
        return self.defer_loops and all(job.started_at is None for job in queue)
