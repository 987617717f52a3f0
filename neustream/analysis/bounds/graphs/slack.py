"""A cheaper bound for graphs, by what the slack of each task can save at most.

It is our own; the interval bound behind it is that of preemptive scheduling.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence

import numpy as np

from neustream.analysis.bounds.graphs.grid import spans
from neustream.analysis.bounds.graphs.shares import useful
from neustream.analysis.bounds.graphs.tasks import Devices, Stage, Task, work_of
from neustream.analysis.bounds.linear import Floats, Program
from neustream.core.policy import Pool
from neustream.core.profile import LatencyProfile
from neustream.core.types import Request


def slack_bound(
    requests: Sequence[Request],
    profiles: Mapping[str, LatencyProfile],
    pools: Sequence[Pool],
    *,
    overhead_s: float = 0.0,
) -> float:
    """A bound on the same as `upper_bound`, never below `Bound.relaxed` with exact slots.

    A job's calls fit into its window one after the other, so their mean latency is given, and the
    least that they can be charged follows from the convex hull of (l(b), l(b)/b). A pool has to
    deliver that much in each job's window; the least bound of all pools counts. It is not rounded.
    """
    work = work_of(requests, [Devices(profiles, pools)], overhead_s)
    if not work.tasks:
        return work.free
    best = math.inf
    for at, pool in enumerate(pools):
        charges = np.array([_least_charge(task, work.stages, at) for task in work.tasks])
        best = min(best, _flow(work.tasks, charges, pool.seats))
    return work.free + best


def _least_charge(task: Task, stages: Sequence[Stage], pool: int) -> float:
    """Least seconds of workers of `pool` that `task` costs.

    The best use of its slack is larger batches, where they save most.
    """
    slack, charge = task.end - task.start, 0.0
    savings: list[tuple[float, float]] = []  # (seconds of slack, what each of them saves)
    for visit in task.visits:
        (stage,) = visit.stages
        latency = stages[stage].latency
        slack -= visit.calls * float(latency[0])
        if stages[stage].pool != pool:
            continue
        corners = [
            (float(latency[b - 1]), float(latency[b - 1]) / b) for b in useful(latency)[::-1]
        ]
        charge += visit.calls * corners[0][1]
        for (x0, y0), (x1, y1) in itertools.pairwise(corners):
            savings.append((visit.calls * (x1 - x0), (y0 - y1) / (x1 - x0)))
    for seconds, saved in sorted(savings, key=lambda saving: -saving[1]):
        used = min(seconds, max(0.0, slack))
        slack, charge = slack - used, charge - used * saved
    return charge


def _flow(tasks: Sequence[Task], charges: Floats, workers: int) -> float:
    """The most weight whose `charges` fit into the windows, preempted and in fractions at will."""
    weight = np.array([task.weight for task in tasks])
    start, end = np.array([(task.start, task.end) for task in tasks]).T
    cuts = np.unique(np.concatenate([start, end]))
    job, slot = spans(np.searchsorted(cuts, start), np.searchsorted(cuts, end))
    program = Program(weight)
    use = np.array(program.columns(len(job), math.inf, np.diff(cuts)[slot] * workers))
    all_jobs, ones = np.arange(len(tasks)), np.ones(len(job))
    program.rows(np.zeros(len(tasks)), (all_jobs, all_jobs, charges), (job, use, -ones))
    program.rows(workers * np.diff(cuts), (slot, use, ones))
    found = program.relaxed(math.inf, interior=True)
    return float(weight.sum()) if found is None else program.certified(found.prices)
