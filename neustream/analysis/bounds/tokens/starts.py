"""Rows of starts: in which cells of time steps begin, with prompts or for decodes (README.md)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from neustream.analysis.bounds.linear import Floats, Ints, Program
from neustream.analysis.bounds.tokens.costs import TOKENS, Costs
from neustream.analysis.bounds.tokens.tasks import Task

COLUMNS = 60_000
"""A group with more columns than that keeps its coarser program."""
LINKED = 4_000
"""So many columns of steps at most, where those without prompts are among them."""
MANY = 2**31
"""Tokens of the largest steps: more than any has."""
LOOSE = 1e-9
"""Cells are so much shorter, and windows so much longer, than sums of floats say."""


@dataclass(frozen=True, slots=True)
class _Cells:
    """Cells of `seconds`, `count` of them; the first has the number `origin` from time 0 on.

    Task i starts in cells from `begin[i]` to `last[i][k]`, for a step of class k to be in time.
    Class k has at most `size[k]` tokens, takes `length[k]`, and keeps `cover[k]` cells. Those of
    size 0, if there are any, are the last class.
    """

    seconds: float
    origin: int
    count: int
    begin: list[int]
    last: list[Ints]
    size: list[int]
    length: Floats
    cover: list[int]

    @property
    def kinds(self) -> int:
        """Classes of steps with prompts."""
        return sum(size > 0 for size in self.size)

    @property
    def columns(self) -> int:
        parts = zip(self.last, self.begin, strict=True)
        every = self.count * len(self.size)
        return every + sum(max(int(e[0]) - b + 1, 0) for e, b in parts)

    def places(self, task: int) -> range:
        """Cells in which a part of the prompt may start."""
        return range(max(self.begin[task], 0), int(self.last[task][0]) + 1)

    def fitting(self, task: int, place: int) -> int:
        """How many classes, short ones first, can start in a cell and end in time."""
        return int((self.last[task][: self.kinds] >= place).sum())

    def latest(self, due: float) -> Ints:
        """The last cell in which a step of each class starts that ends by `due`."""
        return _last(due, self.length, self.seconds) - self.origin


def add_starts(
    program: Program, tasks: Sequence[Task], costs: Costs, cells: int, *, linked: bool = False
) -> bool:
    """Add the rows of starts on cells of `costs.base / cells` seconds.

    `linked`: with steps for the later outputs, as far as `LINKED` columns reach.

    False if there would be too many columns; nothing is added then.
    """
    grid = _grid(tasks, costs, cells, linked)
    if grid.columns > COLUMNS:
        return False
    numbers = program.columns(grid.count * len(grid.size))
    steps = np.array(numbers).reshape(grid.count, len(grid.size))
    there: list[dict[int, int]] = [{} for _ in range(grid.count)]
    for at, task in enumerate(tasks):
        _add_parts(program, grid, steps, at, there)
        if linked:
            _add_outputs(program, grid, steps, at, task)
    for place, parts in enumerate(there):
        _add_sizes(program, grid, steps[place], tasks, place, parts)
    _add_cover(program, grid, steps)
    return True


def _grid(tasks: Sequence[Task], costs: Costs, cells: int, linked: bool) -> _Cells:
    cell = costs.base / cells * (1 - LOOSE)
    classes = _classes(costs, cell, max(task.first - task.start for task in tasks))
    if linked:
        classes.append((0, costs.base))
    length = np.array([seconds for _, seconds in classes])
    origin = math.floor(tasks[0].start / cell)
    last = [_last(task.first, length, cell) - origin for task in tasks]
    count = max(int(ends[0]) for ends in last) + 1
    if linked:
        end = int(_last(max(task.end for task in tasks), length, cell)[-1]) - origin + 1
        count = max(count, min(end, LINKED // len(classes)))
    return _Cells(
        seconds=cell,
        origin=origin,
        count=count,
        begin=[math.floor(task.start / cell - LOOSE) - origin for task in tasks],
        last=last,
        size=[size for size, _ in classes],
        length=length,
        cover=np.floor(length / cell).astype(int).tolist(),
    )


def _last(due: float, length: Floats, cell: float) -> Ints:
    """The last cell, from time 0 on, in which steps of some lengths start that end by `due`."""
    last: Ints = np.floor((due - length) / cell + LOOSE).astype(np.int64)
    return last


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


def _add_outputs(program: Program, grid: _Cells, steps: Ints, at: int, task: Task) -> None:
    """By when an output is due there were as many steps since the task came, of any class."""
    begin = max(grid.begin[at], 0)
    for output, due in enumerate(task.due.tolist()[1:], start=2):
        latest = grid.latest(due)
        if int(latest.max()) >= grid.count:
            return
        some = [
            steps[begin : max(int(last) + 1, begin), kind].tolist()
            for kind, last in enumerate(latest)
        ]
        columns = [column for part in some for column in part]
        program.row([at, *columns], [1.0] + [-1 / output] * len(columns))


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
