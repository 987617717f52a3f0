"""How long generations turn out to be: what a scheduler learns from the ends it has seen."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
BIN = 8
"""Outputs counted together."""
PRIOR = 2.0
"""Generations that count as seen beforehand, at every number of outputs."""
SEEN = 8
"""Generations that must have come to a number of outputs for others to be counted as far."""
FILLED = 0.125
"""Share that is taken to fill its maximum before any ended; it weighs as much as one that did."""
MOST_HAZARD = 0.5
"""Share that is taken to end in one bin at most, before any was seen."""
FAR = 2048
"""Outputs beyond those that were seen for which lengths are guessed, where there is a maximum."""
TINY = 1e-200
"""The least chance that is divided by: after many ends hardly any is left for longer ones."""
REFRESH = 16
"""Ends after which survival curves are computed anew, once there are many; sooner before that."""


class Lengths:
    """A discrete hazard: of the generations that reached a number of outputs, how many ended there.

    Generations that were given up, or are still running, count as far as they came (censored), so
    that short answers, which end first, do not make all answers look short. What nobody has reached
    yet is guessed by a maximum. Some fill it (`filled` of those that ended, `FILLED` before any
    did); of the others each order of magnitude is as likely (log-uniform). What ran on without an
    end already speaks against short ones. Without a maximum (inf) everything is expected to go on:
    a policy then budgets with the request's own.

    Attributes:
        ends: generations that ended of themselves.
        far: outputs that some (`SEEN`) generations came to.
        times: how often what is said of them was computed anew.
    """

    __slots__ = (
        "_by_most",
        "_curves",
        "_ended",
        "_fresh",
        "_passed",
        "_reached",
        "ends",
        "far",
        "times",
    )

    def __init__(self) -> None:
        self.ends = self.far = self.times = self._passed = 0
        self._by_most: dict[int, list[int]] = {}
        self._reached = [0] * 64
        self._ended = [0] * 64
        self._curves: dict[float, _Curve] = {}
        self._fresh = (1, 1)  # ends, and bins reached, up to which the curves are good

    def reached(self, outputs: int) -> None:
        """A generation has come to `outputs`; called for each output."""
        if outputs % BIN and outputs != 1:
            return
        index = self._bin(outputs)
        self._reached[index] += 1
        self._passed += 1
        if self._reached[index] == SEEN:
            self.far = max(self.far, index * BIN)

    def passed(self, before: int, outputs: int) -> None:
        """One that had come to `before`, 1 or more, has come to `outputs`."""
        for at in range(before - before % BIN + BIN, outputs + 1, BIN):
            self.reached(at)

    def ended(self, outputs: int, most: int) -> None:
        """A generation of at most so many outputs ended of itself, before that, after `outputs`."""
        self._ended[self._bin(outputs)] += 1
        self.ends += 1
        self._by_most.setdefault(_power(most), [0, 0])[1] += 1

    def full(self, most: int) -> None:
        """A generation came to its maximum."""
        self._by_most.setdefault(_power(most), [0, 0])[0] += 1

    @property
    def filled(self) -> int:
        """Generations that came to their maximum."""
        return sum([full for full, _ in self._by_most.values()])

    def _filling(self, most: float) -> float:
        """The share of those with such a maximum that fill it.

        Those with others say as much of it, each order of magnitude, as one generation would. Short
        answers that fill a small maximum do not make long ones look as if they filled theirs.
        """
        power = _power(most)
        others = [full / (full + ends) for at, (full, ends) in self._by_most.items() if at != power]
        expected = (FILLED + sum(others)) / (1 + len(others))
        full, ends = self._by_most.get(power, (0, 0))
        return (full + expected) / (full + ends + 1)

    def _bin(self, outputs: int) -> int:
        """The bin of a number of outputs; there are bins up to it from now on."""
        index = outputs // BIN
        while index >= len(self._reached):
            self._reached += [0] * len(self._reached)
            self._ended += [0] * len(self._ended)
        return index

    def survival(self, most: float = np.inf) -> Floats:
        """The share of generations that reach `k * BIN` outputs, for k from 0; then constant."""
        return self._curve(most).bins

    def curve(self, most: float = np.inf) -> Floats:
        """The share of generations that reach each number of outputs, from 0; then constant."""
        return self._curve(most).outputs

    def _curve(self, most: float) -> _Curve:
        if self.ends >= self._fresh[0] or self._passed >= self._fresh[1]:
            self._fresh = (self.ends + _some(self.ends), self._passed + max(self._passed // 8, 1))
            self._curves.clear()
            self.times += 1
        curve = self._curves.get(most)
        if curve is None:
            power = 2.0 ** np.ceil(np.log2(most)) if most < np.inf else most  # so that they are few
            curve = self._curves[most] = self._curves.get(power) or self._computed(power)
            self._curves[power] = curve
        return curve

    def _computed(self, most: float) -> _Curve:
        bins = self._survival(most)
        numbers = np.arange((len(bins) - 1) * BIN + 1)
        outputs = _interpolated(bins, numbers / BIN)
        sums = np.zeros((2, len(outputs) + 1))
        np.cumsum([outputs, outputs * numbers], axis=1, out=sums[:, 1:])
        return _Curve(bins, outputs, (-bins).tolist(), sums)

    def _survival(self, most: float) -> Floats:
        bins = len(self._reached)
        if most < np.inf:
            bins += math.ceil(min(most, FAR) / BIN)
        reached, ended = np.zeros(bins), np.zeros(bins)
        reached[: len(self._reached)] = self._reached
        ended[: len(self._ended)] = self._ended
        prior = PRIOR * (_guessed(most, self._filling(most), bins) if most < np.inf else 0.0)
        hazard = (ended + prior) / (np.maximum(reached, ended) + PRIOR)
        survival = np.cumprod(1.0 - np.minimum(hazard, 1.0))
        return np.concatenate([[1.0], survival])

    def within(self, outputs: int, shares: Sequence[float], most: float = np.inf) -> list[float]:
        """Outputs to come within which more than a share of those with `outputs` end; inf: never.

        At each of some `shares`. `most`: the maximum by which unseen lengths are guessed; without
        it they all go on.
        """
        rising = self._curve(most).rising
        now = -rising[min(outputs // BIN, len(rising) - 1)]
        if now <= 0:
            return [math.inf] * len(shares)
        found = []
        for share in shares:
            below = bisect_right(rising, -(now * (1 - share)))  # the first that is less
            end = max(below * float(BIN) - outputs, 0.0)
            found.append(math.inf if below == len(rising) else end)
        return found

    def least(self, outputs: int, share: float) -> float:
        """Outputs that a generation with `outputs` should still make at least.

        No more than `share` of such ended before, and `SEEN` generations came as far.
        """
        [within] = self.within(outputs, (share,))  # they end somewhere in the bin before that
        return max(min(within - BIN, float(self.far - outputs)), 0.0)

    def each_least(self, outputs: NDArray[np.int64], share: float) -> Floats:
        """`least` of each of many generations [jobs]."""
        before = self.each_within(outputs, share) - BIN  # they end somewhere in that bin
        least: Floats = np.maximum(np.minimum(before, self.far - outputs), 0.0)
        return least

    def each_within(self, outputs: NDArray[np.int64], share: float, most: float = np.inf) -> Floats:
        """The same at one share, of each of many generations [jobs]."""
        curve = self.survival(most)
        now = curve[np.minimum(outputs // BIN, len(curve) - 1)]
        least = now * (1 - share)
        below = np.searchsorted(-curve, -least, side="right")  # the first that is less
        never = (below == len(curve)) | (now <= 0)
        return np.where(never, np.inf, np.maximum(below * float(BIN) - outputs, 0.0))

    def ahead(self, outputs: Floats, horizon: Floats, most: float = np.inf) -> Floats:
        """The chance that a generation at `outputs[i]` lasts for `horizon[j]` more: [i, j].

        Both are whole numbers.
        """
        then = np.add.outer(outputs.astype(np.int64), horizon.astype(np.int64))
        return self._chances(outputs, then, most)

    def lasts(self, outputs: Floats, more: Floats, most: float = np.inf) -> Floats:
        """The chance that a generation at `outputs[i]` lasts for `more[i, j]`: [i, j].

        Both are whole numbers.
        """
        return self._chances(outputs, (outputs[:, None] + more).astype(np.int64), most)

    def joined(self, steps: Floats, most: float = np.inf) -> tuple[Floats, Floats]:
        """If one generation begins at each step: how many there are after so many steps, and the
        outputs that those have made together. Whole numbers of `steps`."""
        there, outputs = self._curve(most).sums.take(steps.astype(np.int64), 1, mode="clip")
        return there, outputs

    def _chances(self, outputs: Floats, then: NDArray[np.int64], most: float) -> Floats:
        """The chance that a generation at `outputs[i]` comes to `then[i, j]`."""
        each = self._curve(most).outputs
        now = each.take(outputs.astype(np.int64), mode="clip")
        chance = each.take(then, mode="clip")
        chance /= np.maximum(now, TINY)[:, None]
        return np.minimum(chance, 1.0, out=chance)


class _Curve(NamedTuple):
    """A survival curve by `bins` and by single `outputs`; `rising`: that by bins, negated.

    `sums`: of the shares that reach fewer outputs, and of the outputs of those [2, outputs].
    """

    bins: Floats
    outputs: Floats
    rising: list[float]
    sums: Floats


def _power(most: float) -> int:
    """The order of magnitude of a maximum, by twos."""
    return math.ceil(math.log2(max(most, 1.0)))


def _some(ends: int) -> int:
    """Ends after which curves are computed anew."""
    return min(max(ends // 8, 1), REFRESH)


def _guessed(most: float, full: float, bins: int) -> Floats:
    """The hazard of each bin: a share `full` goes on to `most`, others are log-uniform up to it."""
    edges = np.maximum(np.arange(bins + 1) * float(BIN), 1.0)
    left = np.log(np.maximum(most / edges, 1.0)) / np.log(max(most, 2.0))
    survival = full + (1.0 - full) * left
    hazard: Floats = np.minimum(1.0 - survival[1:] / survival[:-1], MOST_HAZARD)
    return hazard


def _interpolated(curve: Floats, points: Floats) -> Floats:
    """`curve` between its places; `points` do not go beyond the last one."""
    low = points.astype(np.int64)
    share = points - low
    high = np.minimum(low + 1, len(curve) - 1)
    between: Floats = curve[low] * (1 - share) + curve[high] * share
    return between
