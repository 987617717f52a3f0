"""How long generations turn out to be: what a scheduler learns from the ends it has seen."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

BIN = 8
"""Outputs counted together."""
PRIOR = 2.0
"""Generations that are taken to have gone on through all of what nobody has reached yet."""
REFRESH = 16
"""Ends after which the survival curve is computed anew."""


class Lengths:
    """A discrete hazard: of the generations that reached a number of outputs, how many ended there.

    Generations that were given up, or are still running, count as far as they came (censored), so
    that short answers, which end first, do not make all answers look short. Without observations
    everything is expected to go on: a policy then budgets with the request's own maximum.
    """

    __slots__ = ("_ended", "_fresh", "_reached", "_survival", "ends")

    def __init__(self) -> None:
        self.ends = 0
        self._reached = [0] * 64
        self._ended = [0] * 64
        self._survival: NDArray[np.float64] = np.ones(65)
        self._fresh = 0

    def reached(self, outputs: int) -> None:
        """A generation has come to `outputs`; called for each output."""
        if outputs % BIN and outputs != 1:
            return
        self._reached[self._bin(outputs)] += 1

    def ended(self, outputs: int) -> None:
        """A generation ended of itself (not at its maximum) after `outputs`."""
        self._ended[self._bin(outputs)] += 1
        self.ends += 1

    def _bin(self, outputs: int) -> int:
        """The bin of a number of outputs; there are bins up to it from now on."""
        index = outputs // BIN
        while index >= len(self._reached):
            self._reached += [0] * len(self._reached)
            self._ended += [0] * len(self._ended)
        return index

    def survival(self) -> NDArray[np.float64]:
        """The share of generations that reach `k * BIN` outputs, for k from 0; then constant."""
        if self.ends >= self._fresh:
            self._fresh = self.ends + (REFRESH if self.ends else 1)
            reached = np.array(self._reached, dtype=float)
            ended = np.array(self._ended, dtype=float)
            hazard = np.minimum(ended / (np.maximum(reached, ended) + PRIOR), 1.0)
            self._survival = np.concatenate([[1.0], np.cumprod(1.0 - hazard)])
        return self._survival

    def median(self, outputs: int) -> float:
        """Median outputs to come of a generation with `outputs`; inf if none was seen to end."""
        curve = self.survival()
        last = len(curve) - 1
        now = curve[min(outputs // BIN, last)]
        below = np.flatnonzero(curve < now / 2)
        return max(float(below[0]) * BIN - outputs, 0.0) if len(below) and now > 0 else np.inf

    def ahead(
        self, outputs: NDArray[np.float64], horizon: NDArray[np.float64]
    ) -> NDArray[np.float64]:
        """The chance that a generation at `outputs[i]` lasts for `horizon[j]` more: [i, j]."""
        curve = self.survival()
        last = len(curve) - 1
        then = np.minimum((outputs[:, None] + horizon[None, :]) / BIN, last)
        now = np.minimum(outputs[:, None] / BIN, last)
        base = np.maximum(_interpolated(curve, now), 1e-9)
        return np.minimum(_interpolated(curve, then) / base, 1.0)


def _interpolated(curve: NDArray[np.float64], points: NDArray[np.float64]) -> NDArray[np.float64]:
    """`curve` between its places; `points` do not go beyond the last one."""
    low = points.astype(np.int64)
    share = points - low
    high = np.minimum(low + 1, len(curve) - 1)
    between: NDArray[np.float64] = curve[low] * (1 - share) + curve[high] * share
    return between
