"""How long generations turn out to be: what a scheduler learns from the ends it has seen."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
BIN = 8
"""Outputs counted together."""
PRIOR = 4.0
"""Generations that count as seen beforehand, at every number of outputs."""
SEEN = 8
"""Generations that must have come to a number of outputs for others to be counted as far."""
REFRESH = 16
"""Ends after which the survival curve is computed anew, once there are many; sooner before that."""


class Lengths:
    """A discrete hazard: of the generations that reached a number of outputs, how many ended there.

    Generations that were given up, or are still running, count as far as they came (censored), so
    that short answers, which end first, do not make all answers look short. What nobody has reached
    yet is taken to be as `typical` says: generations of so many outputs in the mean, with the same
    hazard at each. Without it (inf) everything is expected to go on: a policy then budgets with the
    request's own maximum.

    Attributes:
        ends: generations that ended of themselves.
        far: outputs that some (`SEEN`) generations came to.
    """

    __slots__ = ("_curve", "_ended", "_reached", "ends", "far")

    def __init__(self) -> None:
        self.ends = self.far = 0
        self._reached = [0] * 64
        self._ended = [0] * 64
        self._curve = _Curve(0, np.inf, np.ones(65), np.ones(64 * BIN + 1))

    def reached(self, outputs: int) -> None:
        """A generation has come to `outputs`; called for each output."""
        if outputs % BIN and outputs != 1:
            return
        index = self._bin(outputs)
        self._reached[index] += 1
        if self._reached[index] == SEEN:
            self.far = max(self.far, index * BIN)

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

    def survival(self, typical: float = np.inf) -> Floats:
        """The share of generations that reach `k * BIN` outputs, for k from 0; then constant."""
        return self._curve_of(typical).bins

    def _curve_of(self, typical: float) -> _Curve:
        if self.ends >= self._curve.stale or typical != self._curve.typical:
            stale = self.ends + min(max(self.ends // 8, 1), REFRESH)
            bins = self._survival(typical)
            outputs = np.arange((len(bins) - 1) * BIN + 1) / BIN
            self._curve = _Curve(stale, typical, bins, _interpolated(bins, outputs))
        return self._curve

    def _survival(self, typical: float) -> Floats:
        reached = np.array(self._reached, dtype=float)
        ended = np.array(self._ended, dtype=float)
        prior = PRIOR * min(BIN / typical, 0.5)
        hazard = (ended + prior) / (np.maximum(reached, ended) + PRIOR)
        survival = np.cumprod(1.0 - np.minimum(hazard, 1.0))
        return np.concatenate([[1.0], survival])

    def median(self, outputs: int) -> float:
        """Median outputs to come of a generation with `outputs`; inf if none was seen to end."""
        return self.within(outputs, 0.5)

    def within(self, outputs: int, share: float) -> float:
        """Outputs to come within which more than `share` of those with `outputs` end; inf: never.

        Of what was seen: where nothing was, all go on.
        """
        return float(self.each_within(np.array([outputs]), share)[0])

    def least(self, outputs: int, share: float) -> float:
        """Outputs that a generation with `outputs` should still make at least.

        No more than `share` of such ended before, and `SEEN` generations came as far.
        """
        return float(self.each_least(np.array([outputs]), share)[0])

    def each_least(self, outputs: NDArray[np.int64], share: float) -> Floats:
        """`least` of each of many generations [jobs]."""
        before = self.each_within(outputs, share) - BIN  # they end somewhere in that bin
        least: Floats = np.maximum(np.minimum(before, self.far - outputs), 0.0)
        return least

    def each_within(self, outputs: NDArray[np.int64], share: float) -> Floats:
        """`within` of each of many generations [jobs]."""
        curve = self.survival()
        now = curve[np.minimum(outputs // BIN, len(curve) - 1)]
        least = now * (1 - share)
        below = np.searchsorted(-curve, -least, side="right")  # the first that is less
        never = (below == len(curve)) | (now <= 0)
        return np.where(never, np.inf, np.maximum(below * float(BIN) - outputs, 0.0))

    def ahead(self, outputs: Floats, horizon: Floats, typical: float = np.inf) -> Floats:
        """The chance that a generation at `outputs[i]` lasts for `horizon[j]` more: [i, j].

        Both are whole numbers.
        """
        each = self._curve_of(typical).outputs
        last = len(each) - 1
        now = np.minimum(outputs, last).astype(np.int64)
        then = np.minimum(outputs[:, None] + horizon, last).astype(np.int64)
        base = np.maximum(each[now], 1e-9)
        return np.minimum(each[then] / base[:, None], 1.0)


class _Curve(NamedTuple):
    """A survival curve by `bins` and by single `outputs`; made anew from the `stale`-th end on."""

    stale: int
    typical: float
    bins: Floats
    outputs: Floats


def _interpolated(curve: Floats, points: Floats) -> Floats:
    """`curve` between its places; `points` do not go beyond the last one."""
    low = points.astype(np.int64)
    share = points - low
    high = np.minimum(low + 1, len(curve) - 1)
    between: Floats = curve[low] * (1 - share) + curve[high] * share
    return between
