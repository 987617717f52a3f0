"""Rows of starts: in which cells of time the steps with prompts begin (README.md)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from neustream.analysis.bounds.linear import Ints, Program
from neustream.analysis.bounds.tokens.costs import TOKENS, Costs
from neustream.analysis.bounds.tokens.tasks import Task

COLUMNS = 60_000
"""A group with more columns than that keeps its coarser program."""
MANY = 2**31
"""Tokens of the largest steps: more than any has."""
LOOSE = 1e-9
"""Cells are so much shorter, and windows so much longer, than sums of floats say."""


@dataclass(frozen=True, slots=True)
class _Cells:
    """Cells of `seconds`, counted from the first arrival.

    Task i starts in cells from `begin[i]` to `last[i][k]`, for a step of class k to be in time.
    Class k has at most `size[k]` tokens, and keeps `cover[k]` cells.
    """

    begin: list[int]
    last: list[Ints]
    size: list[int]
    cover: list[int]

    @property
    def count(self) -> int:
        return max(int(ends[0]) for ends in self.last) + 1

    @property
    def kinds(self) -> int:
        return len(self.size)

    @property
    def columns(self) -> int:
        parts = zip(self.last, self.begin, strict=True)
        return self.count * self.kinds + sum(max(int(e[0]) - b + 1, 0) for e, b in parts)

    def places(self, task: int) -> range:
        """Cells in which a part of the prompt may start."""
        return range(max(self.begin[task], 0), int(self.last[task][0]) + 1)

    def fitting(self, task: int, place: int) -> int:
        """How many classes, short ones first, can start in a cell and end in time."""
        return int((self.last[task] >= place).sum())


def add_starts(program: Program, tasks: Sequence[Task], costs: Costs, cells: int) -> bool:
    """Add the rows of starts on cells of `costs.base / cells` seconds.

    False if there would be too many; nothing is added then.
    """
    grid = _grid(tasks, costs, cells)
    if grid.columns > COLUMNS:
        return False
    numbers = program.columns(grid.count * grid.kinds)
    steps = np.array(numbers).reshape(grid.count, grid.kinds)
    there: list[dict[int, int]] = [{} for _ in range(grid.count)]
    for task in range(len(tasks)):
        _add_parts(program, grid, steps, task, there)
    for place, parts in enumerate(there):
        _add_sizes(program, grid, steps[place], tasks, place, parts)
    _add_cover(program, grid, steps)
    return True


def _grid(tasks: Sequence[Task], costs: Costs, cells: int) -> _Cells:
    cell = costs.base / cells * (1 - LOOSE)
    classes = _classes(costs, cell, max(task.first - task.start for task in tasks))
    length = np.array([seconds for _, seconds in classes])
    origin = math.floor(tasks[0].start / cell)
    last = [np.floor((task.first - length) / cell + LOOSE).astype(int) - origin for task in tasks]
    return _Cells(
        begin=[math.floor(task.start / cell - LOOSE) - origin for task in tasks],
        last=last,
        size=[size for size, _ in classes],
        cover=np.floor(length / cell).astype(int).tolist(),
    )


def _classes(costs: Costs, apart: float, longest: float) -> list[tuple[int, float]]:
    """Classes of steps: the most tokens, and the least seconds, about `apart` from each other."""
    classes: list[tuple[int, float]] = []
    tokens = 1
    while tokens <= TOKENS and float(costs.least[tokens]) <= longest:
        seconds = float(costs.least[tokens])
        stop = int(np.searchsorted(costs.least, seconds + apart, "right"))
        classes.append((stop - 1, seconds))
        tokens = stop
    if tokens > TOKENS:  # larger steps exist, and are as long at least
        classes[-1] = (MANY, classes[-1][1])
    return classes


def _add_parts(
    program: Program, grid: _Cells, steps: Ints, task: int, there: list[dict[int, int]]
) -> None:
    """Columns y of a task, kept in `there` by cell and task, and rows y <= w and x <= sum of y."""
    places = grid.places(task)
    parts = program.columns(len(places))
    for place, part in zip(places, parts, strict=True):
        there[place][task] = part
        some = steps[place, : grid.fitting(task, place)].tolist()
        program.row([part, *some], [1.0] + [-1.0] * len(some))
    program.row([task, *parts], [1.0] + [-1.0] * len(parts))


def _add_sizes(
    program: Program,
    grid: _Cells,
    steps: Ints,
    tasks: Sequence[Task],
    place: int,
    parts: dict[int, int],
) -> None:
    """Rows of tokens in a cell: parts of those tasks that are late in longer steps fit in `w`."""
    most = {task: grid.fitting(task, place) for task in parts}
    for limit in sorted(set(most.values())):
        some = [task for task in parts if most[task] <= limit]
        program.row(
            [*(parts[task] for task in some), *steps[:limit].tolist()],
            [
                *(float(tasks[task].prompt) for task in some),
                *(-float(size) for size in grid.size[:limit]),
            ],
        )


def _add_cover(program: Program, grid: _Cells, steps: Ints) -> None:
    """At most one step covers a cell: as many as the cell before, who starts, less who ended."""
    covered = program.columns(grid.count)
    for place, here in enumerate(covered):
        ended = [
            steps[place - cells, kind].item()
            for kind, cells in enumerate(grid.cover)
            if cells <= place
        ]
        more = [*covered[max(place - 1, 0) : place], *steps[place].tolist()]
        program.row([here, *more, *ended], [-1.0, *[1.0] * len(more), *[-1.0] * len(ended)])
