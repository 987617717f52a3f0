"""A solver's claim about whole tasks, tried by a search of our own that prices alone decide.

A branch holds some tasks at 0 or 1. It is closed when prices prove that no solution in it is worth
more than the claim. A solution that is worth more refutes the claim.
"""

from __future__ import annotations

import math

from neustream.analysis.bounds.linear import ROUNDING, Floats, Program
from neustream.engine.clock import WallClock

BRANCHES = 200
"""After so many branches the search gives up."""
COLUMNS = 60_000
"""Larger programs are not searched: their branches take too long."""
HALF = 0.5

Branch = dict[int, bool]
"""Tasks that are held at 1 (True) or 0."""


def examined(program: Program, claim: float, step: float, seconds: float) -> bool | None:
    """Whether no whole solution is worth more than `claim`: True is proven, False refuted.

    None is unknown, after `BRANCHES` or `seconds`. Weights are multiples of `step`, 0 for any.
    """
    clock = WallClock()
    if program.size > COLUMNS or math.isinf(claim):
        return None
    more = claim + max(step - ROUNDING, ROUNDING)
    branches: list[Branch] = [{}]
    unsure = False
    for _ in range(BRANCHES):
        if not branches:
            break
        fixed = branches.pop()
        found = program.relaxed(seconds - clock.now(), interior=False, fixed=fixed)
        if found is None:
            return None
        if program.refutes(found.columns, claim):
            return False
        if program.certified(found.prices, fixed) >= more:
            parts = _parts(found.columns[: len(program.weight)], fixed)
            branches += parts
            unsure |= not parts
    return None if branches or unsure else True


def _parts(served: Floats, fixed: Branch) -> list[Branch]:
    """Two branches of one, by the task that is closest to half served; none if all are held."""
    free = [task for task in range(len(served)) if task not in fixed]
    if not free:
        return []
    task = min(free, key=lambda one: abs(float(served[one]) - HALF))
    return [{**fixed, task: False}, {**fixed, task: True}]
