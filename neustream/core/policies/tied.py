"""Jobs of one line that end in the same turn, and go through what is behind the loop together.

Where all jobs of a line run in every step, those with equally many steps left end together. What is
behind the loop (a decode) is then one batch, which costs less than one each.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from typing import NamedTuple

from neustream.core.job import Job
from neustream.core.policies.curve import Curve
from neustream.core.policy import View
from neustream.core.types import TICK

MOST = 256
"""Shares that are kept."""
MUCH = 0.1
"""Part of the work that runs once from which on it is planned to be shared."""


class Row(NamedTuple):
    """A job in a loop: steps left there, when it must be over, and seconds behind the loop."""

    left: float
    due: float
    behind: float


def in_time(
    rows: Sequence[Row], curve: Curve, speed: float, start: float, shared: Callable[[int], float]
) -> bool:
    """Whether all are on time if all run in every step and those who end together stay together.

    Args:
        rows: in order of the steps left.
        shared: what each of so many jobs behind the loop costs in one batch, by what it does alone.
    """
    count = len(rows)
    if not 1 < count <= curve.limit:
        return False
    end, before = start - TICK, 0.0
    for left, group in groupby(rows, key=_left):
        if curve.best[count] != count:
            return False  # they take turns, and do not end together
        together = list(group)
        end += (left - before) * speed * curve.seconds[count]
        over = end + sum([row.behind for row in together]) * shared(len(together))
        if min([row.due + row.behind for row in together]) < over:
            return False
        count -= len(together)
        end, before = over, left
    return True


def _left(row: Row) -> float:
    return row.left


def share(view: View, job: Job, line: str, count: int) -> float:
    """What each of `count` jobs costs behind their loop in one batch, by what it does alone.

    1 where another loop is behind this one, and where nothing is. Also where stages that run once
    are a small part of the work: in long loops jobs come and go, and fewer end together than that.
    """
    graph = job.request.graph
    after = graph.position[line]
    calls = {name: n for name, n in job.calls_left.items() if graph.position[name] > after}
    if not calls or not graph.looped.isdisjoint(calls) or _outside_loops(view) < MUCH:
        return 1.0
    known: dict[object, float] = view.memo.setdefault(share, {})
    key = (tuple(calls.items()), tuple([view.profiles[name] for name in calls]), count)
    if key not in known:
        if len(known) >= MOST:
            known.clear()
        known[key] = _seconds(view, job, calls, count) / (count * view.work(job, 1, calls))
    return known[key]


def _outside_loops(view: View) -> float:
    """The part that stages which run once have of the work of recent requests, run alone."""
    known: tuple[object, float] = view.memo.get(_outside_loops, (None, 0.0))
    if known[0] is view.recent:
        return known[1]
    once = everything = 0.0
    for demand in view.recent:
        for name, calls in demand.calls.items():
            if name not in view.profiles:
                continue
            size = calls.size
            seconds = calls.count * view.profiles[name].latency(1, size, size * size)
            everything += seconds
            once += 0.0 if calls.looped else seconds
    part = once / everything if everything else 0.0
    view.memo[_outside_loops] = view.recent, part
    return part


def _seconds(view: View, job: Job, calls: Mapping[str, int], count: int) -> float:
    """Seconds of the calls of `count` jobs like this one, in batches as large as they may be."""
    graph = job.request.graph
    seconds = 0.0
    for name, n in calls.items():
        limit = min(graph.stages[name].max_batch, view.profiles[name].max_batch)
        full, rest = divmod(count, limit)
        seconds += full * view.work(job, limit, {name: n})
        if rest:
            seconds += view.work(job, rest, {name: n})
    return seconds
