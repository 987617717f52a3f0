"""A group of tasks on a grid of slots of time: what the rows of "Shares" and "Teams" are made of.

Any grid is valid (README.md, "LP"); fewer slots give a smaller program and a looser bound.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from neustream.analysis.bounds.graphs.tasks import Stage, Task
from neustream.analysis.bounds.linear import Floats, Ints

PART = 8
"""So many slots a window are left in any case."""


@dataclass(slots=True)
class Grid:
    """Tasks in slots; times are seconds.

    An entry is a visit in one slot of its window on one kind of device, a pair is a job in one slot
    of its window, a cell is a pool in one slot.
    """

    stages: Sequence[Stage]
    weight: Floats  # by job
    job: Ints  # by visit
    stage: Ints  # by entry, on a kind of device
    calls: Floats  # by visit: n in README.md
    capacity: Floats  # by cell: workers * D[k]
    visit: Ints  # by entry
    limit: Ints  # by entry: N[m,k], the most jobs in a batch
    cell: Ints  # by entry
    pair: Ints  # by entry
    pair_job: Ints  # by pair
    pair_seconds: Floats  # by pair: D[j,k]
    merged: bool = False  # whether it has fewer cuts than there are edges of windows

    @property
    def columns(self) -> int:
        """About how many columns a program on it has: half of the batch sizes are useful."""
        return int(self.limit.sum()) // 2


def grid_of(
    group: Sequence[Task], stages: Sequence[Stage], workers: Sequence[int], columns: int
) -> Grid:
    """The finest grid for a group whose program is below about so many columns.

    `workers` are those of each pool.
    """
    edges = [edge for task in group for visit in task.visits for edge in (visit.start, visit.end)]
    cuts = np.unique(edges)
    grid = _on_cuts(group, stages, workers, cuts)
    apart = float(np.diff(cuts).mean()) / 2
    most = float(np.mean([task.end - task.start for task in group])) / PART
    while grid.columns > columns and apart < most:
        cuts, apart = _thinned(cuts, apart), 2 * apart
        grid = _on_cuts(group, stages, workers, cuts)
        grid.merged = True
    return grid


def _thinned(cuts: Floats, apart: float) -> Floats:
    """`cuts` without those within `apart` of the one before; the first and the last stay."""
    kept = [float(cuts[0])]
    for cut in cuts[1:-1].tolist():
        if cut >= kept[-1] + apart:
            kept.append(cut)
    return np.array([*kept, float(cuts[-1])])


def _on_cuts(
    group: Sequence[Task], stages: Sequence[Stage], workers: Sequence[int], cuts: Floats
) -> Grid:
    """The grid whose slots are between `cuts`."""
    visits = [visit for task in group for visit in task.visits]
    job = np.array([at for at, task in enumerate(group) for _ in task.visits])
    slots = len(cuts) - 1
    first = np.searchsorted(cuts, [visit.start for visit in visits], "right") - 1
    stop = np.searchsorted(cuts, [visit.end for visit in visits], "left")
    place = np.array([at for at, visit in enumerate(visits) for _ in visit.stages])
    where = np.array([stage for visit in visits for stage in visit.stages])
    way, slot = spans(first[place], stop[place])
    visit, stage = place[way], where[way]
    pairs, pair = np.unique(job[visit] * slots + slot, return_inverse=True)
    pair_job, pair_slot = np.divmod(pairs, slots)
    pool = np.array([one.pool for one in stages])
    return Grid(
        stages=stages,
        weight=np.array([task.weight for task in group]),
        job=job,
        stage=stage,
        calls=np.array([float(visit.calls) for visit in visits]),
        capacity=np.outer(workers, np.diff(cuts)).ravel(),
        visit=visit,
        limit=_limits(stages, where, first[place], stop[place], slots)[stage, slot],
        cell=pool[stage] * slots + slot,
        pair=pair,
        pair_job=pair_job,
        pair_seconds=_seconds(group, cuts, pair_job, pair_slot),
    )


def spans(first: Ints, stop: Ints) -> tuple[Ints, Ints]:
    """For ranges from `first` to `stop`: the place of the range of each number, and the number."""
    numbers = [np.arange(*span) for span in zip(first, stop, strict=True)]
    return np.repeat(np.arange(len(first)), stop - first), np.concatenate(numbers)


def _limits(stages: Sequence[Stage], stage: Ints, first: Ints, stop: Ints, slots: int) -> Ints:
    """The most jobs in a batch by stage and slot: those whose windows meet it, or `max_batch`."""
    alive = np.zeros((len(stages), slots + 1), dtype=np.int64)
    np.add.at(alive, (stage, first), 1)
    np.add.at(alive, (stage, stop), -1)
    most = np.array([[len(one.latency)] for one in stages])
    limits: Ints = np.minimum(alive.cumsum(axis=1), most)
    return limits


def _seconds(group: Sequence[Task], cuts: Floats, job: Ints, slot: Ints) -> Floats:
    """How much of each job's window lies in the slot."""
    start, end = np.array([(task.start, task.end) for task in group]).T
    seconds: Floats = np.minimum(cuts[slot + 1], end[job]) - np.maximum(cuts[slot], start[job])
    return seconds
