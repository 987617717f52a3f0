"""Clockwork (OSDI'20) as the NeuStream artifact ran it."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from operator import attrgetter, itemgetter

from neustream.core.job import Job
from neustream.core.policies.batching import continued
from neustream.core.policy import Decision, View
from neustream.core.profile import LatencyProfile
from neustream.core.reasons import due, span
from neustream.errors import ConfigError


@dataclass(frozen=True)
class Clockwork:
    """Whole-request batches, the latest start time first, run to completion.

    Source: the artifact's `*_clockwork_infer.py`. Requests are grouped by what they have to run:
    only equal step counts share a batch. A group of n offers batches of 1 to n; the offer with the
    earliest latest-start (deadline of its oldest request minus the batch's predicted time) is
    taken, grown to the largest size whose members all still make it. Requests that cannot be on
    time alone are dropped.

    `lead_s` is how far ahead of the worker the artifact's controller planned; `max_batch` its
    largest batch; `plan` replaces profiles in the predictions by others (by stage name): on its
    H100 the artifact planned with tables of an RTX 4090. Its controller handed a worker the next
    batch when the present one should have been over; so with a `plan` that is slower than the
    device, steps wait for the plan.

    Differences from that source: the Stable Diffusion controller looked only at groups of exactly b
    requests and polled every 1 to 5 ms; here all of a group's sizes count and nothing is polled.
    Differences from Clockwork itself: no LOAD/INFER actions (models stay loaded), one model per
    step count.

    Raises:
        ConfigError: a parameter is out of bounds.
    """

    max_batch: int = 10
    lead_s: float = 0.001
    plan: Mapping[str, LatencyProfile] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.max_batch < 1:
            raise ConfigError(f"clockwork: max_batch must be 1 or more, got {self.max_batch}")
        if not 0 <= self.lead_s < math.inf:
            raise ConfigError(f"clockwork: lead_s must be a time >= 0, got {self.lead_s}")

    def decide(self, view: View) -> Decision:
        if self.plan:
            profiles = {**view.profiles, **self.plan}
            view = View(view.now, view.pool, view.worker, view.queues, profiles, view.running)
        if batch := continued(view):
            ready = self._planned_start(view, batch)
            return Decision(batch) if ready <= view.now else Decision(wake_at=ready)
        start = view.now + self.lead_s
        groups, drop = self._groups(view, start)
        offers = [self._offer(view, group, start) for group in groups]
        if not offers:
            return Decision(drop=drop)
        _, batch = min(offers, key=itemgetter(0))
        return Decision(batch, drop)

    def _groups(self, view: View, start: float) -> tuple[list[list[Job]], dict[Job, str]]:
        """Jobs that have not begun, with those that run the same calls, and those that expired."""
        drop: dict[Job, str] = {}
        groups: dict[Hashable, list[Job]] = {}
        for job in view.jobs:
            if job.worker >= 0:
                continue  # another worker is in the middle of its batch
            alone = view.work(job, 1)
            if job.due < start + alone:
                drop[job] = f"expired: needs {span(alone)}, {due(job.due - view.now)}"
                continue
            calls = (job.request.graph, job.stage, *sorted(job.calls_left.items()))
            groups.setdefault(calls, []).append(job)
        return [sorted(group, key=attrgetter("arrival")) for group in groups.values()], drop

    def _planned_start(self, view: View, batch: list[Job]) -> float:
        """When the plan starts this step of a batch that is under way."""
        job, size = batch[0], len(batch)
        if not self.plan or job.started_at is None:
            return view.now
        return job.started_at + view.work(job, size, job.planned_calls) - view.work(job, size)

    def _offer(self, view: View, group: list[Job], start: float) -> tuple[float, list[Job]]:
        """The earliest latest-start among this group's batch sizes, and the batch it would run."""
        assert group[0].stage is not None
        most = min(self.max_batch, view.limit(group[0].stage.name), len(group))
        latest, chosen, growing = group[0].due, group[:1], True
        for size in range(1, most + 1):
            seconds = view.work(group[0], size)
            alive = [job for job in group if job.due >= start + seconds]
            if len(alive) < size:
                growing = False
                continue
            latest = min(latest, alive[0].due - seconds)
            if growing:
                chosen = alive[:size]
        return latest, chosen
