"""The jobs of one worker as `priced` sees them: at loops, in front of them, behind them."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial

import numpy as np

from neustream.core.job import Job
from neustream.core.observed import Ratios
from neustream.core.policies.curve import Curve, Floats, curve_of
from neustream.core.policies.feasibility import Line
from neustream.core.policies.price import blocked_until, some_are_blocked, value_of
from neustream.core.policies.several import Lines, Need
from neustream.core.policies.shortlist import (
    FOREVER,
    Waiting,
    shortlist,
    urgencies,
)
from neustream.core.policies.tied import share
from neustream.core.policy import View
from neustream.core.types import TICK

WEIGHED = 64
"""Waiting jobs that are weighed in one decision, those with the most time per step first."""
LONG = 256
"""Jobs from which on only those of a queue are looked at that may be weighed."""

_Row = tuple[int, float, int, float, bool, Job]
"""Steps left, due, place in the queue, seconds behind the loop, whether committed, the job.

Rows sort by steps left, then by due; the place is unlike that of any other row of the line."""


@dataclass
class LineUp:
    """The jobs that have a loop ahead of them, in the order of `plan`; the others are `ending`.

    `committed`: whether a job has run here and has a deadline.
    `entering`: those in front of their loop, by stage. `ending`: those behind all loops, by stage.
    """

    now: float
    plan: Line | Lines
    jobs: Sequence[Job]
    committed: Sequence[bool]
    entering: Mapping[str, Sequence[Job]]
    ending: Mapping[str, Sequence[Job]]

    @cached_property
    def density(self) -> list[float]:
        """Weight per second of charge."""
        columns = self.plan.arrays
        spare = np.maximum(columns.due - self.now, TICK)
        charge = columns.behind + TICK
        for first, line in self.plan.parts:
            jobs = slice(first, first + len(line.left))
            left = columns.left[jobs]
            charge[jobs] += left * line.curve.charge(spare[jobs] / left / line.speed) * line.speed
        density: list[float] = (np.array([job.weight for job in self.jobs]) / charge).tolist()
        return density

    def most_urgent_first(self, places: list[int]) -> list[int]:
        """In the order of admission: the most time per step, by weight; at the end no deadline.

        Time per step helps up to the latency of the most efficient batch. Those that have several
        times as much can come later as well: they are behind all others, by deadline.
        """
        if len(places) < 2:
            return places
        columns = self.plan.arrays
        chosen = np.array(places)
        jobs = [self.jobs[place] for place in places]
        weight = np.array([job.weight for job in jobs])
        spare = np.maximum(columns.due[chosen] - self.now, TICK)
        pace = spare / columns.left[chosen]
        alone, efficient = self._steps[:, chosen]
        urgency, loose = urgencies(spare, pace, weight, alone, efficient)
        if math.inf in [job.due for job in jobs]:
            urgency[[job.deadline == math.inf for job in jobs]] = math.inf
        ranked: list[int] = chosen[np.lexsort((urgency, loose))].tolist()
        return ranked

    @property
    def _steps(self) -> Floats:
        """Seconds of a step of the line of each job: alone, and in the most efficient batch."""
        columns = [
            np.full((len(line.left), 2), (line.step(1), line.speed * line.curve.enough))
            for _, line in self.plan.parts
        ]
        return np.concatenate(columns).T

    def in_front(self, place: int) -> bool:
        """Whether a job is in front of its loop."""
        stage = self.jobs[place].stage
        return stage is not None and stage.name in self.entering

    def entries(self, jobs: Sequence[int]) -> float:
        """Seconds of encodings (one batch a stage) before the loops of `jobs` can all run."""
        if not self.entering:
            return 0.0
        entry = self.plan.entry
        return max([entry[index] for index in jobs], default=0.0)


def line_up(view: View, drop: Collection[Job], least: Callable[[], float] | None = None) -> LineUp:
    """The jobs that `view.worker` could serve, without those in `drop`.

    Where device time is reserved for others, they are due earlier by as much. `least`: the weight
    by the second of charge that somebody who waits must bring; of long queues only those are there
    who may be weighed.
    """
    queues, entering, ending = _sorted_out(view, drop)
    start = view.now
    if ending and len(queues) <= 1:
        start += sum([seconds_of_step(view, name, queue) for name, queue in ending.items()])
    in_front = _in_front(view, entering)
    entry = _encodings(view, entering)
    slower = _mean_speed_outside(view, queues)
    value = partial(value_of, view)
    lines: list[Line] = []
    everyone: list[Job] = []
    committed: list[bool] = []
    for name, queue in queues.items():
        curve = _curve(view, name, queue)
        if least is not None and len(queue) > LONG:
            alone = curve.seconds[1]
            waiting = Waiting(name, queue, view.now, view.reserved, alone, slower, in_front)
            speed, most = view.speed.get(name, 1.0), max(WEIGHED, curve.limit) + 1
            queue = shortlist(waiting, queue, curve, speed, least(), most)
        rows = _rows(view, name, queue, curve.seconds[1], slower, in_front)
        rows.sort()
        left, due, _, behind, began, jobs = zip(*rows, strict=True)
        entries = [entry.get(job, 0.0) for job in jobs] if entry else [0.0] * len(jobs)
        speed = view.speed.get(name, 1.0)
        weight = [job.weight for job in jobs]
        lines.append(
            Line(
                start,
                curve,
                speed,
                left,
                due,
                behind,
                entries,
                weight,
                value,
                partial(share, view, jobs[0], name),
                view.spread.get(name) or Ratios(),
            )
        )
        everyone += jobs
        committed += began
    plan: Line | Lines
    if len(lines) == 1:
        plan = lines[0]
    else:
        plan = Lines(start, lines, _needed_behind(view, ending))
    return LineUp(view.now, plan, everyone, committed, entering, ending)


def blocking(view: View, drop: Collection[Job]) -> dict[Job, float]:
    """Jobs that have not begun, and whose steps would make more weight late than they bring.

    Each with the time until which that is so, if nobody comes.
    """
    aside: dict[Job, float] = {}
    if not some_are_blocked(view):
        return aside
    steps: dict[tuple[str, float], float] = {}
    for stage, queue in view.queues.items():
        for job in queue:
            if job.worker >= 0 or job.deadline == math.inf or job in drop:
                continue
            line = _line_of(job, stage)
            declared = job.request.graph.stages.get(line)
            if declared is None:
                continue
            key = (line, 0.0 if declared.size is None else declared.size_of(job))
            if key not in steps:
                steps[key] = view.speed.get(line, 1.0) * view.work(job, 1, {line: 1})
            until = blocked_until(view, steps[key], job)
            if until > view.now:
                aside[job] = until
    return aside


def _needed_behind(view: View, ending: Mapping[str, Sequence[Job]]) -> Need:
    """What jobs behind all loops need, each its share of its stage's next step, by deadline."""
    need = []
    for name, queue in ending.items():
        share = seconds_of_step(view, name, queue) / min(len(queue), view.limit(name))
        need += [(job.deadline, share) for job in queue]
    return sorted(need)


_Queues = dict[str, Sequence[Job]]


def _sorted_out(view: View, drop: Collection[Job]) -> tuple[_Queues, _Queues, _Queues]:
    """The jobs by line; those in front of their loop, and those behind all loops, by stage."""
    lines: _Queues = {}
    entering: _Queues = {}
    ending: _Queues = {}
    for stage, queue in view.queues.items():
        jobs = _servable(view, queue, drop)
        graphs = {job.request.graph for job in jobs}
        if all(stage in graph.looped for graph in graphs):
            by_line: _Queues = {stage: jobs} if jobs else {}
        else:
            by_line = _by_line(stage, jobs)
        for line, members in by_line.items():
            if not line:
                ending[stage] = members
                continue
            lines[line] = [*lines[line], *members] if line in lines else members
            if line != stage:
                entering[stage] = [*entering.get(stage, ()), *members]
    return lines, entering, ending


def _by_line(stage: str, queue: Sequence[Job]) -> _Queues:
    """The jobs of a queue by the looped stage that they are at or get to; "" behind all loops."""
    jobs: dict[str, list[Job]] = {}
    for job in queue:
        jobs.setdefault(_line_of(job, stage), []).append(job)
    return {**jobs}


def _servable(view: View, queue: Sequence[Job], drop: Collection[Job]) -> Sequence[Job]:
    """The jobs of a queue that this worker ran or that nobody ran, without those in `drop`."""
    if view.pool.workers > 1:
        queue = [job for job in queue if job.worker in (-1, view.worker)]
    if drop:
        queue = [job for job in queue if job not in drop]
    return queue


def _line_of(job: Job, stage: str) -> str:
    """The looped stage that it is at, or gets to first; "" behind all loops."""
    looped = job.request.graph.looped
    if stage in looped:
        return stage
    for name in job.calls_left:
        if name in looped:
            return name
    return ""


def _rows(
    view: View,
    name: str,
    queue: Sequence[Job],
    alone: float,
    slower: float,
    in_front: Mapping[Job, float],
) -> list[_Row]:
    """The jobs of a line, in the order of its queue. `alone`: seconds of a step of one of them."""
    rows: list[_Row] = []
    latest = view.now + FOREVER
    reserved = view.reserved or None
    for place, job in enumerate(queue):
        left = job.calls_left[name]
        work = job.remaining_s
        if in_front:
            work -= in_front.get(job, 0.0)
        work -= left * alone
        behind = work * slower if work > 0.0 else 0.0
        deadline = job.due if job.due <= job.due_next else job.deadline  # mostly the first
        due = deadline if deadline < latest else latest
        if reserved is not None:
            due = view.now + reserved.left(due - view.now)
        due -= behind
        committed = job.worker >= 0 and deadline < math.inf
        rows.append((left, due, place, behind, committed, job))
    return rows


def _in_front(view: View, entering: Mapping[str, Sequence[Job]]) -> dict[Job, float]:
    """Seconds of the step alone of each job in front of its loop."""
    seconds: dict[Job, float] = {}
    for stage, queue in entering.items():
        declared = queue[0].stage
        if declared is not None and declared.size is None:  # it takes as long for all
            seconds |= dict.fromkeys(queue, view.work(queue[0], 1, {stage: 1}))
        else:
            seconds |= {job: view.work(job, 1, {stage: 1}) for job in queue}
    return seconds


def _encodings(view: View, entering: Mapping[str, Sequence[Job]]) -> dict[Job, float]:
    """Seconds of the next step of the stage of each job that is in front of its loop."""
    entry: dict[Job, float] = {}
    for stage, queue in entering.items():
        entry.update(dict.fromkeys(queue, seconds_of_step(view, stage, queue)))
    return entry


def _mean_speed_outside(view: View, lines: Mapping[str, Sequence[Job]]) -> float:
    """How many times their latency the stages outside of the lines take, on average."""
    speeds = [speed for name, speed in view.speed.items() if name not in lines]
    return sum(speeds) / len(speeds) if speeds else 1.0


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
