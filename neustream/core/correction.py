"""What observed steps say about a profile: a factor for each range of batch sizes, within bounds."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from statistics import median

from neustream.core.profile import LatencyProfile

WINDOW = 31
"""Latest steps of a range that count; their median is robust against stalls."""
ENOUGH = 8
"""Steps of a range before it is believed."""
CHANGE = 0.05
"""Factors are replaced when one of them has moved by more than this share."""
BOUND = 2.0
"""A factor lies between 1 / BOUND and BOUND: a device off by more needs a new profile."""


class CorrectedProfile:
    """A profile times a factor by range of batch sizes.

    `factors` maps k to the factor at sizes near 2**k (jobs, or what the stage counts its steps by);
    between two such sizes it is interpolated, beyond them it is the nearest one's.
    """

    def __init__(self, base: LatencyProfile, factors: Mapping[int, float]) -> None:
        self.base = base
        self.factors = dict(sorted(factors.items()))
        self.name = base.name
        self.device = base.device
        self.max_batch = base.max_batch

    def latency(self, batch: int, total: float = 0.0, square: float = 0.0) -> float:
        return self.base.latency(batch, total, square) * self.factor(total or batch)

    def factor(self, size: float) -> float:
        at = math.log2(max(size, 1e-9))
        below = above = None
        for k in self.factors:
            if k <= at:
                below = k
            elif above is None:
                above = k
        if below is None or above is None:
            known = above if below is None else below
            return 1.0 if known is None else self.factors[known]
        share = (at - below) / (above - below)
        return self.factors[below] * (1 - share) + self.factors[above] * share


class Watch:
    """Compares the steps of one stage with its profile."""

    def __init__(self, base: LatencyProfile) -> None:
        self.base = base
        self.factors: dict[int, float] = {}
        self._ratios: dict[int, deque[float]] = {}

    def observe(self, batch: int, total: float, square: float, seconds: float) -> CorrectedProfile | None:
        """Take in one step; a profile to use from now on, if it should be another one than before."""
        expected = self.base.latency(batch, total, square)
        k = round(math.log2(max(total or batch, 1)))
        ratios = self._ratios.setdefault(k, deque(maxlen=WINDOW))
        ratios.append(seconds / expected)
        if len(ratios) < ENOUGH:
            return None
        factor = min(max(median(ratios), 1 / BOUND), BOUND)
        if abs(factor / self.factors.get(k, 1.0) - 1) <= CHANGE:
            return None
        self.factors[k] = factor
        return CorrectedProfile(self.base, self.factors)
