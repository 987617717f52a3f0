"""Rows of windows: prompts that whole steps cannot compute in time together (README.md)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np

from neustream.analysis.bounds.linear import Floats, Ints
from neustream.analysis.bounds.tokens.costs import Costs
from neustream.analysis.bounds.tokens.tasks import Task

ENTRIES = 200_000
"""Of the windows of a group so many are left out that their rows have about so many entries."""

Row = tuple[list[int], list[float], float]
"""Places of tasks, tokens, and the most of those."""


def window_rows(tasks: Sequence[Task], costs: Costs) -> list[Row]:
    """For windows from an arrival to a deadline of a first output, where not all prompts fit."""
    order = np.array(sorted(range(len(tasks)), key=lambda at: tasks[at].first), dtype=np.int64)
    first = np.array([tasks[at].first for at in order])
    begin = np.array([tasks[at].start for at in order])
    prompt = np.array([tasks[at].prompt for at in order])
    longest = float(costs.within[-1])
    starts = sorted({task.start for task in tasks})
    insides = [np.flatnonzero((begin >= start) & (first - start < longest)) for start in starts]
    every = max(math.ceil(sum(len(inside) ** 2 / 2 for inside in insides) / ENTRIES), 1)
    rows: list[Row] = []
    for start, inside in list(zip(starts, insides, strict=True))[::every]:
        rows += _rows(order[inside], first[inside] - start, prompt[inside], costs)
    return rows


def _rows(order: Ints, seconds: Floats, prompt: Ints, costs: Costs) -> Iterator[Row]:
    """Rows of one arrival: `seconds` from it to the deadlines of tasks, early ones first."""
    total = np.cumsum(prompt)
    for count, left in enumerate(seconds.tolist(), start=1):
        most = costs.most(left)
        if most is None:
            return
        if count > 1 and total[count - 1] > most:
            values = np.minimum(prompt[:count], most + 1).astype(float)
            yield order[:count].tolist(), values.tolist(), float(most)
