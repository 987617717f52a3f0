"""How long generations turn out to be: what a scheduler learns from the ends it has seen."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

BIN = 8
"""Outputs counted together."""
PRIOR = 4.0
"""Generations that count as seen beforehand, at every number of outputs."""
REFRESH = 16
"""Ends after which the survival curve is computed anew, once there are many; sooner before that."""


class Lengths:
    """A discrete hazard: of the generations that reached a number of outputs, how many ended there.

    Generations that were given up, or are still running, count as far as they came (censored), so
    that short answers, which end first, do not make all answers look short. What nobody has reached
    yet is taken to be as `typical` says: generations of so many outputs in the mean, with the same
    hazard at each. Without it (inf) everything is expected to go on: a policy then budgets with the
    request's own maximum.
    """

    __slots__ = ("_ended", "_fresh", "_reached", "_survival", "_typical", "ends")

    def __init__(self) -> None:
        self.ends = 0
        self._reached = [0] * 64
        self._ended = [0] * 64
        self._survival: NDArray[np.float64] = np.ones(65)
        self._fresh = 0
        self._typical = np.inf

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

    def survival(self, typical: float = np.inf) -> NDArray[np.float64]:
        """The share of generations that reach `k * BIN` outputs, for k from 0; then constant."""
        if self.ends >= self._fresh or typical != self._typical:
            self._typical = typical
            self._fresh = self.ends + min(max(self.ends // 8, 1), REFRESH)
            reached = np.array(self._reached, dtype=float)
            ended = np.array(self._ended, dtype=float)
            prior = PRIOR * min(BIN / typical, 0.5)
            hazard = (ended + prior) / (np.maximum(reached, ended) + PRIOR)
            survival = np.cumprod(1.0 - np.minimum(hazard, 1.0))
            self._survival = np.concatenate([[1.0], survival])
        return self._survival

    def median(self, outputs: int) -> float:
        """Median outputs to come of a generation with `outputs`; inf if none was seen to end."""
        return self.within(outputs, 0.5)

    def within(self, outputs: int, share: float) -> float:
        """Outputs to come within which more than `share` of those with `outputs` end; inf: never.

        Of what was seen: where nothing was, all go on.
        """
        curve = self.survival()
        last = len(curve) - 1
        now = curve[min(outputs // BIN, last)]
        below = np.flatnonzero(curve < now * (1 - share))
        return max(float(below[0]) * BIN - outputs, 0.0) if len(below) and now > 0 else np.inf

    def ahead(
        self,
        outputs: NDArray[np.float64],
        horizon: NDArray[np.float64],
        typical: float = np.inf,
    ) -> NDArray[np.float64]:
        """The chance that a generation at `outputs[i]` lasts for `horizon[j]` more: [i, j]."""
        curve = self.survival(typical)
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
