"""Linear programs over tasks, the bounds that their prices prove, and what a solver claims beyond.

The one file that knows scipy. What holds is in README.md, "Certificate" and "Whole tasks".
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from neustream.errors import BackendError

try:
    from scipy.optimize import (  # type: ignore[import-untyped]
        Bounds,
        LinearConstraint,
        linprog,
        milp,
    )
    from scipy.sparse import csr_array  # type: ignore[import-untyped]
except ImportError:
    raise BackendError("bounds need scipy: pip install 'neustream[analysis]'") from None

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Entries = tuple[Ints, Ints, Floats]
"""Rows (from 0 in their block), columns and values."""
Fixed = Mapping[int, bool]
"""Tasks that are held at 1 (True) or 0."""

ROUNDING = 1e-6
"""What solvers and sums of floats may be off by, in units of weight."""
VIOLATION = 1e-6
"""By how much a row may be broken, relative to the largest of its terms."""
PENALTY = 100.0
"""What a task that is held at 1 is worth, in weights of all tasks."""


@dataclass(frozen=True, slots=True)
class Relaxed:
    """A solution of a program with fractions: all columns, and a price >= 0 of each row."""

    columns: Floats
    prices: Floats


@dataclass(frozen=True, slots=True)
class Whole:
    """What a solver claims of a program with whole tasks.

    `bound` is inf if it claims nothing, or what its own solution refutes. `done` is whether it got
    to the end.
    """

    bound: float
    done: bool


class Program:
    """Maximise the weight of x, the first columns, under rows that are at most their right sides.

    A column is from 0 to its `top`, which is told to the solver. `most` is what the rows imply that
    it is at most; only certificates use it.
    """

    def __init__(self, weight: Floats, top: float = 1.0) -> None:
        self.weight = weight
        self._top = [np.full(len(weight), top)]
        self._most = [np.full(len(weight), top)]
        self._right: list[float] = []
        self._blocks: list[Entries] = []
        self._row: list[int] = []  # entries of single rows
        self._column: list[int] = []
        self._value: list[float] = []
        self.size = len(weight)

    def columns(self, count: int, top: float = 1.0, most: Floats | None = None) -> range:
        """`count` new columns."""
        self._top.append(np.full(count, top))
        self._most.append(np.full(count, top) if most is None else most)
        self.size += count
        return range(self.size - count, self.size)

    def row(self, columns: Sequence[int], values: Sequence[float], right: float = 0.0) -> None:
        """A new row."""
        self._row += [len(self._right)] * len(columns)
        self._column += columns
        self._value += values
        self._right.append(right)

    def rows(self, right: Floats, *parts: Entries) -> slice:
        """A block of new rows, with entries in several parts; where their prices are."""
        first = len(self._right)
        self._blocks += [(first + row, column, value) for row, column, value in parts]
        self._right += right.tolist()
        return slice(first, len(self._right))

    def free(self) -> bool:
        """Whether there are no rows, so that all tasks are served."""
        return not self._right

    def relaxed(self, seconds: float, *, interior: bool, fixed: Fixed = {}) -> Relaxed | None:
        """The solution with fractions, by interior points or simplex; None if none in `seconds`.

        Tasks that are `fixed` at 1 are worth a penalty more each, so that a solution always exists.
        """
        if seconds <= 0:
            return None
        cost, top = self._held(np.concatenate(self._top), fixed)
        found = linprog(
            cost,
            A_ub=self._matrix(),
            b_ub=np.array(self._right),
            bounds=np.stack([np.zeros(self.size), top], axis=1),
            method="highs-ipm" if interior else "highs",
            options={"time_limit": seconds},
        )
        if found.status != 0:
            return None
        return Relaxed(found.x, np.maximum(0.0, -found.ineqlin.marginals))

    def certified(self, prices: Floats, fixed: Fixed = {}) -> float:
        """No solution is worth more, whatever the prices >= 0 are (README.md, "Certificate")."""
        cost, most = self._held(np.concatenate(self._most), fixed)
        gain = np.maximum(0.0, -cost - self._matrix().T @ prices)
        return float(prices @ np.array(self._right) + gain @ most) - self._penalty * sum(
            fixed.values()
        )

    def whole(self, seconds: float) -> Whole:
        """The solver's own bound with whole tasks."""
        top = np.concatenate(self._top)
        found = milp(
            self._held(top, {})[0],
            constraints=LinearConstraint(self._matrix(), -np.inf, np.array(self._right)),
            bounds=Bounds(0.0, top),
            integrality=(np.arange(self.size) < len(self.weight)).astype(int),
            options={"time_limit": seconds},
        )
        claim = math.inf if found.mip_dual_bound is None else -float(found.mip_dual_bound)
        if math.isnan(claim) or (found.x is not None and self.refutes(found.x, claim)):
            return Whole(math.inf, False)
        return Whole(claim, found.status == 0)

    def refutes(self, columns: Floats, claim: float) -> bool:
        """Whether a solution with whole tasks is worth more than `claim`; the rows are checked."""
        served = np.round(columns[: len(self.weight)])
        return float(self.weight @ served) > claim + ROUNDING * max(1.0, abs(claim)) and (
            self._allows(np.concatenate([served, columns[len(self.weight) :]]))
        )

    def _allows(self, columns: Floats) -> bool:
        """Whether columns break neither a row nor their own limits, but for rounding."""
        matrix, right = self._matrix(), np.array(self._right)
        terms = abs(matrix).multiply(np.abs(columns)[np.newaxis, :]).max(axis=1).toarray().ravel()
        slack = VIOLATION * np.maximum(1.0, np.maximum(terms, np.abs(right)))
        top = np.concatenate(self._top)
        inside = (columns >= -VIOLATION) & (columns <= top + VIOLATION * np.maximum(1.0, top))
        return bool((matrix @ columns <= right + slack).all() and inside.all())

    def _held(self, top: Floats, fixed: Fixed) -> tuple[Floats, Floats]:
        """Costs and tops where some tasks are fixed."""
        cost = np.concatenate([-self.weight, np.zeros(self.size - len(self.weight))])
        for task, on in fixed.items():
            if on:
                cost[task] -= self._penalty
            else:
                top[task] = 0.0
        return cost, top

    @property
    def _penalty(self) -> float:
        """What a task that is held at 1 is worth more, so that a little less of it shows."""
        return PENALTY * (1.0 + float(self.weight.sum()))

    def _matrix(self) -> Any:
        single = (np.array(self._row, int), np.array(self._column, int), np.array(self._value))
        parts = zip(*self._blocks, single, strict=True)
        row, column, value = (np.concatenate(part) for part in parts)
        return csr_array((value, (row, column)), shape=(len(self._right), self.size))
