"""Groups of generations whose prompts compete with each other."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from neustream.analysis.bounds.bound import Group
from neustream.analysis.bounds.linear import Program
from neustream.analysis.bounds.tokens.costs import Costs
from neustream.analysis.bounds.tokens.starts import add_starts
from neustream.analysis.bounds.tokens.tasks import Task
from neustream.analysis.bounds.tokens.windows import window_rows

SIMPLEX = 5000
"""Larger programs, in columns, are solved by interior points."""
PATIENCE_S = 3.0
"""Seconds that a program of a group gets with whole tasks."""


class PromptGroup(Group[Task]):
    """A group, its rows of windows, and what steps cost."""

    def __init__(self, tasks: Sequence[Task], costs: Costs, known: float) -> None:
        super().__init__(tasks, known)
        self.costs = costs
        self.windows = window_rows(tasks, costs)

    def solve(self, cells: int, whole: bool, seconds: float, *, linked: bool = False) -> None:
        """Bound it by windows, or by starts on `cells` of the shortest step if there are any.

        With `whole` tasks only if fractions did not fit, or `linked` (as of `add_starts`).
        """
        if len(self.tasks) == 1 or (not cells and not self.windows):
            return
        program = Program(np.array([task.weight for task in self.tasks]))
        for row in self.windows:
            program.row(*row)
        if cells and not add_starts(program, self.tasks, self.costs, cells, linked=linked):
            return
        method = "starts" if cells else "windows"
        if not whole:
            found = prices_bound(program, seconds)
            if found is not None:
                self.improve(found[0], method)
        elif linked or self.method != "all":
            self.improve_by_whole(program, method, min(seconds, PATIENCE_S))


def prices_bound(program: Program, seconds: float) -> tuple[float, list[float]] | None:
    """What prices certify, and how much of each task is served; None if not in `seconds`."""
    if program.free() and seconds > 0:
        return float(program.weight.sum()), [1.0] * len(program.weight)
    found = program.relaxed(seconds, interior=program.size > SIMPLEX)
    if found is None:
        return None
    return program.certified(found.prices), found.columns[: len(program.weight)].tolist()
