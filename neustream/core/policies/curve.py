"""What follows from the latencies of a looped stage: efficient batches, turns, charges."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Hashable

import numpy as np
from numpy.typing import NDArray

from neustream.core.policy import View
from neustream.core.profile import LatencyProfile
from neustream.core.steps import PhaseProfile

Floats = NDArray[np.float64]

CURVES = 64
"""Curves of one stage that are kept, of different limits and sizes; the latest ones."""


class Curve:
    """What follows from a looped stage's latencies at batches of up to `limit`.

    `latency[b]` in seconds, as a list in `seconds`. `best[n]`, the most efficient batch of at most
    n. `reach[b - 1]`, the least latency of b or more (rising; `fast` as a list), for finding the
    largest batch that is fast enough. `enough`: the pace beyond which steps cost no less.
    """

    def __init__(self, profile: LatencyProfile, limit: int, size: float) -> None:
        self.limit = limit
        steps = [profile.latency(b, b * size, b * size * size) for b in range(1, limit + 1)]
        self.seconds = [0.0, *steps]
        self.latency = np.array(self.seconds)
        self.reach = np.minimum.accumulate(self.latency[:0:-1])[::-1]
        self.fast: list[float] = self.reach.tolist()
        self.best = _most_efficient(self.seconds)
        self._best = np.array(self.best)
        batches = np.arange(1, limit + 1)
        self._each = np.minimum.accumulate(self.latency[1:] / batches)
        self._turns = np.zeros(1)
        self._turn_list = [0.0]
        self._paces, self._charges = _lower_hull(self.reach, self.reach / batches)
        self._corners: tuple[list[float], list[float]] = (
            self._paces.tolist(),
            self._charges.tolist(),
        )
        self.enough = self._corners[0][-1]

    def turns(self, count: int) -> Floats:
        """`turn(n)` for n from 0 to at least `count`."""
        if len(self._turns) <= count:
            n = np.arange(1, 2 * count + 9)
            each = self._each[np.minimum(n, self.limit) - 1]
            self._turns = np.concatenate([[0.0], n * each])
            self._turn_list = self._turns.tolist()
        return self._turns

    def turn_list(self, count: int) -> list[float]:
        """`turns` as a list."""
        if len(self._turn_list) <= count:
            self.turns(count)
        return self._turn_list

    def affordable(self, pace: Floats, most: int) -> NDArray[np.int64]:
        """The most efficient batch of at most `most` that takes at most `pace`; 0 if none does."""
        fast = self.reach.searchsorted(pace, side="right")
        return self._best[np.minimum(fast, min(most, self.limit))]

    def charge(self, pace: Floats) -> Floats:
        """Device seconds that one step costs at least, if steps may take `pace` seconds on average.

        A step in a batch of b takes latency(b) and occupies 1/b of the device meanwhile. Mixtures
        of batches lie on the lower convex hull of these points (the slack-priced bound's measure).
        """
        return np.interp(pace, self._paces, self._charges)

    def charge_of(self, pace: float) -> float:
        """The same for one job."""
        paces, charges = self._corners
        index = bisect_right(paces, pace)
        if index == 0:
            return charges[0]
        if index == len(paces):
            return charges[-1]
        share = (pace - paces[index - 1]) / (paces[index] - paces[index - 1])
        return charges[index - 1] + share * (charges[index] - charges[index - 1])


def _most_efficient(seconds: list[float]) -> list[int]:
    """For each n the batch of at most n with the least latency per job, the larger of equals."""
    best = [0]
    batch = 1
    for n in range(1, len(seconds)):
        if seconds[n] * batch <= seconds[batch] * n:
            batch = n
        best.append(batch)
    return best


def _lower_hull(x: Floats, y: Floats) -> tuple[Floats, Floats]:
    """The falling part of the lower convex hull of points with rising x."""
    hull: list[tuple[float, float]] = []
    for point in zip(x.tolist(), y.tolist(), strict=True):
        if hull and point[1] >= hull[-1][1]:
            continue
        while hull and _replaces(hull, point):
            hull.pop()
        hull.append(point)
    return np.array([p[0] for p in hull]), np.array([p[1] for p in hull])


def _replaces(hull: list[tuple[float, float]], point: tuple[float, float]) -> bool:
    """Whether the last corner of `hull` is none once `point` is."""
    if hull[-1][0] >= point[0]:
        return True
    return len(hull) > 1 and _above(hull[-2], hull[-1], point)


def _above(a: tuple[float, float], b: tuple[float, float], c: tuple[float, float]) -> bool:
    return (b[1] - a[1]) * (c[0] - a[0]) >= (c[1] - a[1]) * (b[0] - a[0])


def profile_key(profile: LatencyProfile) -> Hashable:
    """What tells a profile from its corrections: itself, and what it says now if it learns."""
    if isinstance(profile, PhaseProfile) and profile.steps.learns:
        return profile, f"{profile.latency(1, 1.0, 1.0):.2g}"
    return profile


def curve_of(view: View, stage: str, limit: int, size: float) -> Curve:
    """The curve of a stage's profile for batches of jobs of `size`, kept in `view.memo`."""
    profile = view.profiles[stage]
    key = profile_key(profile)
    known, curves = view.memo.get((Curve, stage), (None, {}))
    if known != key:
        curves = {}
        view.memo[Curve, stage] = key, curves
    curve: Curve | None = curves.get((limit, size))
    if curve is None:
        if len(curves) >= CURVES:
            del curves[next(iter(curves))]
        curve = curves[limit, size] = Curve(profile, limit, size)
    return curve
