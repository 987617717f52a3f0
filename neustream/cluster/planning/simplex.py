"""Small linear programs, exactly: the simplex method on a dense table."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
ZERO = 1e-11


def solve(worth: Floats, rows: Floats, right: Floats) -> Floats:
    """The x >= 0 of the largest worth * x with rows * x <= right.

    Args:
        right: not negative, so that x = 0 is allowed.

    Raises:
        ValueError: there is no largest.
    """
    count, width = rows.shape
    table = np.zeros((count + 1, width + count + 1))
    table[:count, :width] = rows
    table[:count, width:-1] = np.eye(count)
    table[:count, -1] = right
    table[count, :width] = -worth
    basis = np.arange(width, width + count)
    while True:
        better = np.flatnonzero(table[count, :-1] < -ZERO)
        if not len(better):
            break
        enters = int(better[0])  # the first one (Bland's rule): no basis comes twice
        _exchange(table, basis, enters)
    x: Floats = np.zeros(width + count)
    x[basis] = table[:count, -1]
    return x[:width]


def _exchange(table: Floats, basis: NDArray[np.int64], enters: int) -> None:
    """Let a column into the basis, for the one that gets to 0 first."""
    column = table[:-1, enters]
    able = np.flatnonzero(column > ZERO)
    if not len(able):
        raise ValueError("the program has no largest solution")
    ratio = table[able, -1] / column[able]
    ties = able[ratio <= ratio.min() + ZERO]
    leaves = int(ties[np.argmin(basis[ties])])
    table[leaves] /= table[leaves, enters]
    others = np.arange(len(table)) != leaves
    table[others] -= np.outer(table[others, enters], table[leaves])
    basis[leaves] = enters
