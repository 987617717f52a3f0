"""The jobs of one worker as `priced` sees them: at loops, in front of them, behind them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from neustream.core.job import Job
from neustream.core.policies.curve import Curve, Floats, curve_of
from neustream.core.policies.feasibility import Ints, Lines
from neustream.core.policy import View
from neustream.core.types import TICK

FOREVER = 1e6
"""Seconds in which a job without a deadline is planned to be done."""


_Row = tuple[float, float, int, int, int, float, bool, Job]
"""Turns left, due, place among all, line, steps left, seconds behind the loop, committed, the job.

Rows sort by turns left, then by due; the place is unlike that of any other row."""


@dataclass
class LineUp:
    """The jobs that have a loop ahead of them, in the order of `plan`; the others are `ending`.

    `committed`: whether a job has run here and has a deadline.
    `entering`: those in front of their loop, by stage. `ending`: those behind all loops, by stage.
    """

    now: float
    plan: Lines
    jobs: Sequence[Job]
    committed: Sequence[bool]
    entering: dict[str, list[Job]] = field(default_factory=dict)
    ending: dict[str, list[Job]] = field(default_factory=dict)

    @cached_property
    def weight(self) -> Floats:
        return np.array([job.weight for job in self.jobs])

    @cached_property
    def spare(self) -> Floats:
        """Seconds that each has for its steps."""
        return np.maximum(self.plan.arrays.due - self.now, TICK)

    @cached_property
    def density(self) -> Floats:
        """Weight per second of charge."""
        plan, columns = self.plan, self.plan.arrays
        charge = columns.behind + TICK
        for line, (curve, speed) in enumerate(zip(plan.curves, plan.speeds, strict=True)):
            jobs = columns.line == line
            left = columns.left[jobs]
            charge[jobs] += left * curve.charge(self.spare[jobs] / left / speed) * speed
        return self.weight / charge

    @cached_property
    def urgency(self) -> Floats:
        """In the order of admission: minus the time per step, by weight; inf without a deadline."""
        endless = np.array([math.isinf(job.deadline) for job in self.jobs], dtype=bool)
        return np.where(endless, math.inf, -self.spare / self.plan.arrays.left * self.weight)

    def entries(self, jobs: Sequence[int] | Ints) -> float:
        """Seconds of encodings (one batch a stage) before the loops of `jobs` can all run."""
        if not self.entering:
            return 0.0
        return float(self.plan.arrays.entry[jobs].max(initial=0.0))


def line_up(view: View, drop: Mapping[Job, str]) -> LineUp:
    """The jobs that `view.worker` could serve, without those in `drop`."""
    lines: dict[str, list[Job]] = {}
    entering: dict[str, list[Job]] = {}
    ending: dict[str, list[Job]] = {}
    for stage, queue in view.queues.items():
        queue = _servable(view, queue, drop)
        graphs = {job.request.graph for job in queue}
        if queue and all(stage in graph.looped for graph in graphs):
            lines.setdefault(stage, []).extend(queue)
            continue
        for job in queue:
            line = _line_of(job, stage)
            if line is None:
                ending.setdefault(stage, []).append(job)
                continue
            lines.setdefault(line, []).append(job)
            if line != stage:
                entering.setdefault(stage, []).append(job)
    rows, curves, paces = _rows(view, lines, entering)
    columns = zip(*rows, strict=True) if rows else [()] * 8
    _, due, _, lines_of, left, behind, committed, jobs = columns
    entry = _encodings(view, entering)
    plan = Lines(
        view.now + sum(seconds_of_step(view, name, queue) for name, queue in ending.items()),
        curves,
        [view.speed.get(name, 1.0) for name in lines],
        paces,
        lines_of,
        left,
        due,
        behind,
        [entry.get(job, 0.0) for job in jobs] if entry else [0.0] * len(jobs),
    )
    return LineUp(view.now, plan, jobs, committed, entering, ending)


def _servable(view: View, queue: Sequence[Job], drop: Mapping[Job, str]) -> Sequence[Job]:
    """The jobs of a queue that this worker ran or that nobody ran, without those in `drop`."""
    if view.pool.workers > 1:
        queue = [job for job in queue if job.worker in (-1, view.worker)]
    if drop:
        queue = [job for job in queue if job not in drop]
    return queue


def _line_of(job: Job, stage: str) -> str | None:
    """The looped stage that it is at, or gets to first; None behind all loops."""
    looped = job.request.graph.looped
    if stage in looped:
        return stage
    for name in job.calls_left:
        if name in looped:
            return name
    return None


def _rows(
    view: View, lines: Mapping[str, Sequence[Job]], entering: Mapping[str, Sequence[Job]]
) -> tuple[list[_Row], list[Curve], list[float]]:
    """The jobs in the order of their plan, and the curves and paces of their lines."""
    rows: list[_Row] = []
    curves: list[Curve] = []
    slower = _mean_speed_outside(view, lines)
    latest = view.now + FOREVER
    for name, queue in lines.items():
        line, curve = len(curves), _curve(view, name, queue)
        curves.append(curve)
        alone = curve.seconds[1]
        for job in queue:
            left = job.calls_left[name]
            work = job.remaining_s
            if entering:
                work -= _in_front(view, job, name)
            behind = max(0.0, work - left * alone) * slower
            deadline = job.deadline
            due = min(deadline, latest) - behind
            committed = job.worker >= 0 and deadline < math.inf
            rows.append((left, due, len(rows), line, left, behind, committed, job))
    paces = [1.0]
    if len(curves) > 1:
        paces = _paces(view, rows, len(curves))
        rows = [(row[0] / paces[row[3]], *row[1:]) for row in rows]
    rows.sort()
    return rows, curves, paces


def _in_front(view: View, job: Job, line: str) -> float:
    """Seconds of its step alone if that is in front of its line."""
    stage = job.stage
    if stage is None or stage.name == line:
        return 0.0
    return view.work(job, 1, {stage.name: 1})


def _encodings(view: View, entering: Mapping[str, Sequence[Job]]) -> dict[Job, float]:
    """Seconds of the next step of the stage of each job in front of its loop."""
    entry: dict[Job, float] = {}
    for stage, queue in entering.items():
        entry.update(dict.fromkeys(queue, seconds_of_step(view, stage, queue)))
    return entry


def _mean_speed_outside(view: View, lines: Mapping[str, Sequence[Job]]) -> float:
    """How many times their latency the stages outside of the lines take, on average."""
    speeds = [speed for name, speed in view.speed.items() if name not in lines]
    return sum(speeds) / len(speeds) if speeds else 1.0


def _paces(view: View, rows: Sequence[_Row], lines: int) -> list[float]:
    """Steps of each line in a unit of the common plan: its mean steps per second to spare."""
    line = np.array([row[3] for row in rows])
    left = np.array([row[4] for row in rows])
    spare = np.maximum(np.array([row[1] for row in rows]) - view.now, TICK)
    per_second = left / spare
    return [float(per_second[line == index].mean()) for index in range(lines)]


def _curve(view: View, stage: str, jobs: Sequence[Job]) -> Curve:
    """The curve of a looped stage for these jobs; steps with sizes count as the mean one."""
    declared = jobs[0].request.graph.stages[stage]
    size = 0.0
    if declared.size is not None:
        mean = sum(declared.size_of(job) for job in jobs) / len(jobs)
        size = float(f"{mean:.2g}")  # jobs of nearly the same sizes share a curve
    limit = min(declared.max_batch, view.profiles[stage].max_batch)
    return curve_of(view, stage, limit, size)


def seconds_of_step(view: View, stage: str, jobs: Sequence[Job]) -> float:
    """Seconds of one step of a stage with as many of `jobs` as it takes."""
    batch = min(len(jobs), view.limit(stage))
    return view.speed.get(stage, 1.0) * view.work(jobs[0], batch, {stage: 1})
