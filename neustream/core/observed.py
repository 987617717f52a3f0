"""What steps really took, over what they were expected to take."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import deque
from collections.abc import Mapping, Sequence
from statistics import median
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from neustream.core.profile import GuessedProfile, LatencyProfile
from neustream.core.types import TICK

Floats = NDArray[np.float64]

LATEST = 256
"""Latest steps that the spread is taken from."""
ENOUGH = 8
"""Steps before a median is believed."""
FORGET = 0.05
"""Weight of the latest step in the running mean."""
MANY = 20
"""Steps from which on that is more than its share of all."""
STALL = 2.5
"""A step that takes so many times the median is a stall."""
HIGH = 0.9
"""The quantile that is called high."""
BLOCK = 10
"""Steps of one block: noise averages out over them."""
BLOCKS = 20
"""Latest blocks that the usual speed is the median of."""
FEW = 5
"""Blocks below which the missing ones count as if they were as expected."""
LASTING = BLOCKS // 2
"""Blocks of one range of batch sizes from which on a measured profile is corrected: what ends
sooner may be a phase, and until then the usual speed says it."""
BIN = 31
"""Latest steps of one range of batch sizes that the correction of a guess is the median of."""
CHANGE = 0.05
"""Corrections are replaced when one of them has moved by more than this share."""
NEAR = 5
"""Latest steps, of any size and it among them, that one is held against."""
BOUND = 2.0
"""A correction of what was measured lies between 1 / BOUND and BOUND: a device off by more needs a
new profile."""


class Spread(NamedTuple):
    """What the latest ratios look like once `seen` were: see the properties of `Ratios`."""

    seen: int = 0
    typical: float = 1.0
    high: float = 1.0
    stalls: float = 0.0
    error: float = 0.0


class Usual:
    """The usual ratio of observed to expected seconds of one kind of step.

    `mean` starts as that of all steps and becomes an exponentially weighted one. A single step
    counts as at most twice and at least half of the mean so far, so that an outlier (a first call
    that compiles, a stall) does not make everything look hopeless.

    `usual` is what a plan of some length is made with: the median of the means of the latest blocks
    of steps. A mean follows a slow phase that ends before the plan does. A median of single steps
    is biased where they spread. While blocks are `FEW`, expectations count as the missing ones: a
    phase at the start is none of the device's usual speed. `lasting`: whether it is that of so many
    blocks that no phase can be all of it.
    """

    __slots__ = ("_block", "_blocks", "count", "lasting", "mean", "usual")

    def __init__(self) -> None:
        self.count = 0
        self.mean = self.usual = 1.0
        self.lasting = False
        self._block: list[float] = []
        self._blocks: deque[float] = deque(maxlen=BLOCKS)

    def add(self, ratio: float) -> None:
        mean, block = self.mean, self._block
        counted = ratio
        if ratio < mean / 2:
            counted = mean / 2
        elif ratio > mean * 2:
            counted = mean * 2
        self.count = count = self.count + 1
        self.mean = mean + (counted - mean) * (FORGET if count >= MANY else 1 / (count + 1))
        block.append(counted)
        if len(block) == BLOCK:
            self._blocks.append(sum(block) / BLOCK)
            block.clear()
            missing = max(FEW - len(self._blocks), 0)
            self.usual = median([*self._blocks, *[1.0] * missing])
            self.lasting = len(self._blocks) >= LASTING

    def rescale(self, times: float) -> None:
        """Expectations changed, so that the ratios of all steps so far are `times` theirs."""
        self.mean *= times
        self.usual *= times
        self._block = [ratio * times for ratio in self._block]
        self._blocks = deque([mean * times for mean in self._blocks], BLOCKS)

    def reset_mean(self) -> None:
        """What was expected was a guess: the mean starts anew."""
        self.mean = self.usual = 1.0
        self.count = 0
        self.lasting = False
        self._block = []
        self._blocks.clear()


class Ratios(Usual):
    """The latest ratios of observed to expected seconds of one kind of step, and their spread."""

    __slots__ = ("_latest", "_quantiles")

    def __init__(self, window: int = LATEST) -> None:
        super().__init__()
        self._latest: deque[float] = deque(maxlen=window)
        self._quantiles = Spread()

    def add(self, ratio: float) -> None:
        super().add(ratio)
        self._latest.append(ratio)

    def runs(self, steps: float) -> Floats:
        """How many times `usual` so many steps in a row took on average lately, rising."""
        blocks = [*[1.0] * (FEW - len(self._blocks)), *self._blocks]
        count = max(1, min(len(blocks), round(steps / BLOCK)))
        sums = np.cumsum([0.0, *blocks])
        means: Floats = np.sort(sums[count:] - sums[:-count]) / (count * self.usual)
        return means

    @property
    def slow(self) -> float:
        """How many times `usual` a slow step takes, of which nine in ten take less; at least 1."""
        return max(1.0, self.high / self.usual)

    @property
    def full(self) -> bool:
        """Whether as many steps were seen as are kept."""
        return len(self._latest) == self._latest.maxlen

    @property
    def median(self) -> float:
        """The middle one of the latest; 1 before the first."""
        return median(self._latest) if self._latest else 1.0

    def rescale(self, times: float) -> None:
        super().rescale(times)
        self._latest = deque([ratio * times for ratio in self._latest], self._latest.maxlen)
        self._quantiles = Spread()

    def reset_mean(self) -> None:
        super().reset_mean()
        self._latest.clear()
        self._quantiles = Spread()

    # -- the spread -------------------------------------------------------------------------------

    def _spread(self) -> Spread:
        """Computed anew every `ENOUGH` steps, if anybody asks."""
        if self.count - self._quantiles.seen >= ENOUGH:
            rising = sorted(self._latest)
            typical, high = _quantile(rising, 0.5), _quantile(rising, HIGH)
            stalls = (len(rising) - bisect_right(rising, STALL * typical)) / len(rising)
            error = _median_distance(rising, max(typical, TICK))  # a clock may stand still
            self._quantiles = Spread(self.count, typical, high, stalls, error)
        return self._quantiles

    @property
    def typical(self) -> float:
        """Median ratio: that of an undisturbed step. 1 until some steps were seen."""
        return self._spread().typical

    @property
    def error(self) -> float:
        """Median distance of a ratio to `typical`, as a share of that; 0 until some were seen."""
        return self._spread().error

    @property
    def high(self) -> float:
        """The ratio that nine steps in ten stay below. 1 until some steps were seen."""
        return self._spread().high

    @property
    def stalls(self) -> float:
        """Share of the latest steps that took more than `STALL` times the typical one."""
        return self._spread().stalls


def _quantile(rising: Sequence[float], share: float) -> float:
    """Between the two numbers around it, as `numpy.quantile`, which takes a hundred times as long
    for so few."""
    low, part = divmod(share * (len(rising) - 1), 1)
    below = rising[int(low)]
    above = rising[min(int(low) + 1, len(rising) - 1)]
    gap = above - below
    return above - gap * (1 - part) if part >= 0.5 else below + gap * part


def _median_distance(rising: Sequence[float], middle: float) -> float:
    """The median of what numbers differ from one of them, as shares of it.

    Half of them are nearer, and in a row: where that begins is found by bisection.
    """
    count = len(rising)
    half = (count + 1) // 2
    low, high = 0, count - half
    while low < high:
        at = (low + high) // 2
        if middle - rising[at] > rising[at + half] - middle:
            low = at + 1
        else:
            high = at
    last = max(abs(rising[low] / middle - 1), abs(rising[low + half - 1] / middle - 1))
    if count % 2:
        return last
    beyond = [abs(rising[at] / middle - 1) for at in (low - 1, low + half) if 0 <= at < count]
    return (last + min(beyond)) / 2


class CorrectedProfile:
    """A profile times a factor by range of batch sizes.

    `factors` maps k to the factor at sizes near 2**k (jobs, or what the stage counts its steps by);
    between two such sizes it is interpolated, beyond them it is the nearest one's.
    """

    def __init__(self, base: LatencyProfile, factors: Mapping[int, float]) -> None:
        self.base = base
        self.factors = dict(sorted(factors.items()))
        self._keys, self._values = list(self.factors), list(self.factors.values())
        self.name = base.name
        self.device = base.device
        self.max_batch = base.max_batch

    def latency(self, batch: int, total: float = 0.0, square: float = 0.0) -> float:
        return self.base.latency(batch, total, square) * self.factor(total or batch)

    def factor(self, size: float) -> float:
        """The factor at steps of `size`."""
        if not self.factors:
            return 1.0
        log = math.log2(max(size, 1e-9))
        index = bisect_right(self._keys, log)
        if index in (0, len(self._keys)):
            return self._values[0 if index == 0 else -1]
        below, above = self._keys[index - 1], self._keys[index]
        share = (log - below) / (above - below)
        return self._values[index - 1] * (1 - share) + self._values[index] * share


class Correction:
    """Compares the steps of one stage with its profile, by range of batch sizes.

    A guess is corrected from the first step on, by the median of the latest ones of a range. Of a
    profile that was measured only what lasts is a correction, as `Ratios.usual` has it: a median of
    single steps follows each slow phase, and is biased where steps spread.

    What was measured is off by what all steps take, and by what those of a range take beside the
    steps around them. A slow phase slows all sizes. But more jobs wait in it, so that large batches
    run in slow phases: by their own steps alone they look slower than small ones. A rule that
    believes that makes small ones from then on, and never sees that it is wrong.
    """

    def __init__(self, base: LatencyProfile) -> None:
        self.base = base
        self.factors: dict[int, float] = {}
        self.measured = not isinstance(base, GuessedProfile)
        self._bound = BOUND if self.measured else math.inf
        self._all = Usual()
        self._around: deque[float] = deque(maxlen=NEAR)
        self._each = Usual()
        self._beside: dict[int, Ratios] = {}

    def observe(
        self, batch: int, total: float, square: float, seconds: float
    ) -> CorrectedProfile | None:
        """Take in one step; a new profile if its size has another correction by now, else None."""
        key = round(math.log2(max(total or batch, 1)))
        own = self._beside.get(key)
        if own is None:
            own = self._beside[key] = Ratios(BIN)
        ratio = seconds / self.base.latency(batch, total, square)
        if not self.measured:
            own.add(ratio)
            middle = own.median
            return self._corrected({key: middle}) if self._moved(key, middle) else None
        level = ratio / self._own(own)
        self._all.add(level)
        self._around.append(level)
        around = math.fsum(self._around) / len(self._around)
        beside = ratio / around if around > 0 else 1.0  # 0: by a clock that stood still
        own.add(beside)
        self._each.add(beside)
        if not self._all.lasting:
            return None
        usual = self._all.usual
        if not self._moved(key, usual * self._own(own)):
            return None
        return self._corrected({size: usual * self._own(of) for size, of in self._beside.items()})

    def _own(self, own: Ratios) -> float:
        """How many times as long as those around them steps of a range take, by what all do."""
        return own.usual / self._each.usual if own.lasting else 1.0

    def _moved(self, key: int, ratio: float) -> bool:
        """Whether the factor of a range is another one by now."""
        return abs(self._bounded(ratio) / self.factors.get(key, 1.0) - 1) > CHANGE

    def _bounded(self, ratio: float) -> float:
        return min(max(ratio, 1 / self._bound), self._bound)

    def _corrected(self, found: Mapping[int, float]) -> CorrectedProfile:
        """The profile with other factors."""
        self.factors |= {size: self._bounded(ratio) for size, ratio in found.items()}
        return CorrectedProfile(self.base, self.factors)
