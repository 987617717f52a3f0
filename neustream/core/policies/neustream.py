"""The rule of the NeuStream artifact (EuroSys'25) for diffusion models."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from neustream.core.job import Job
from neustream.core.policy import Decision, View
from neustream.core.reasons import due, span
from neustream.errors import ConfigError


@dataclass(frozen=True)
class NeuStream:
    """Step-level batching under a static cap, two queues, and a drop test by remaining budget.

    Source: the workers of the public artifact (`utils/worker.py` of its diffusion experiments).

    * Cap: the largest b, scanning from 1 up to the first failure, with
      `latency(b) < latency(1) * slo_scale * step_delta`: at the cap in every step, a request spends
      `step_delta` of its SLO in the loop.
    * Two queues: requests that were never skipped, in order of coming; then those skipped at least
      once, the least often skipped first. With `sticky_demotion` (DiT, Palette) a request once
      skipped stays in the second queue, so a newcomer pre-empts it; without (Stable Diffusion)
      it jumps to the front of the first when it runs again, and keeps its seat.
    * Drop, before each step: budget left <= steps left alone + stages behind + `margin_s`
      (the transport constant of the artifact, charged in front of a later stage).

    Differences from that source:
    * There, each stage was a process of its own on the same GPU and CUDA arbitrated; here one
      decision serves the pool, stages that run once before looped ones (`View.first_stage`).
    * There, a cap of 0 (`slo_scale * step_delta <= 1`) hung the worker; here it is at least 1.
    * There, a request that arrived during a step was seen one step later; here at once.
    * `slo_scale` was a constant of the run; None takes the mean over the waiting requests of their
      SLO over their solo latency, so that requests with other SLOs can be served at all.

    Raises:
        ConfigError: a parameter is out of bounds.
    """

    slo_scale: float | None = None
    step_delta: float = 0.95
    margin_s: float = 0.0
    sticky_demotion: bool = True

    def __post_init__(self) -> None:
        for name in ("slo_scale", "step_delta"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ConfigError(
                    f"neustream: {name} must be greater than 0 and finite, got {value}"
                )
        if not 0 <= self.margin_s < math.inf:
            raise ConfigError(f"neustream: margin_s must be a time >= 0, got {self.margin_s}")

    def decide(self, view: View) -> Decision:
        drop = self._hopeless(view)
        stage = view.first_stage(lambda job: job.joined_at, without=drop)
        if stage is None:
            return Decision(drop=drop)
        jobs = view.queues[stage]
        if drop:
            jobs = [job for job in jobs if job not in drop]
        rank = _sticky_rank if self.sticky_demotion else _seated_rank
        cap = self.cap(view, stage, jobs)
        if len(jobs) > cap:
            jobs = sorted(jobs, key=rank)[:cap]
        return Decision(jobs, drop)

    def cap(self, view: View, stage: str, jobs: Sequence[Job]) -> int:
        """The static batch cap of `stage`."""
        profile, limit = view.profiles[stage], view.limit(stage)
        scale = self.slo_scale
        if scale is None:
            scale = sum(job.slo.total / job.alone_s for job in jobs) / len(jobs)
        # the artifact knows no sizes: all count as the mean one
        size = sum([job.size for job in jobs]) / len(jobs)

        def latency(batch: int) -> float:
            return profile.latency(batch, batch * size, batch * size * size)

        budget = latency(1) * scale * self.step_delta
        cap = 0
        while cap < limit and latency(cap + 1) < budget:
            cap += 1
        return max(1, cap)

    def _hopeless(self, view: View) -> dict[Job, str]:
        drop = {}
        for name, queue in view.queues.items():
            margin = self.margin_s if _has_later_stage(queue[0], name) else 0.0
            for job in queue:
                if job.slack(view.now + margin) <= 0:
                    needs = f"{span(job.remaining_s)} and {span(margin)} of margin"
                    left = min(job.due, job.due_next) - view.now
                    drop[job] = f"budget: needs {needs}, {due(left)}"
        return drop


def _has_later_stage(job: Job, loop: str) -> bool:
    """Whether a stage is a loop with another stage behind it."""
    graph = job.request.graph
    return loop in graph.looped and graph.position[loop] + 1 < len(graph.stages)


def _sticky_rank(job: Job) -> int:
    return job.skipped


def _seated_rank(job: Job) -> tuple[int, int]:
    if job.skipped == 0:
        return (1, 0)
    return (0 if job.ran_last else 2, job.skipped)
