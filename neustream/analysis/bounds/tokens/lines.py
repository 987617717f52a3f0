"""Lines that are below what steps take: of prefills by tokens, of decodes by jobs and context.

Slopes are seconds a token, a decode, and a token of context that is read.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass

import numpy as np

from neustream.analysis.bounds.linear import Floats, Program
from neustream.core.profile import LatencyProfile, LinearProfile
from neustream.core.steps import DecodeGrid, PrefillTable
from neustream.errors import ProfileError

CLAMPED = 1 + 1e-9
"""A grid's latency counts as clamped up to its lowest times this."""


@dataclass(frozen=True, slots=True)
class Line:
    """At least `start + token * tokens + job * decodes + read * context` seconds."""

    start: float
    token: float
    job: float
    read: float

    def stretched(self, scale: float, overhead_s: float) -> Line:
        """Of steps that take `scale` times as long, and `overhead_s` on top."""
        start = self.start * scale + overhead_s
        return Line(start, self.token * scale, self.job * scale, self.read * scale)


def highest(lines: Iterable[Line]) -> list[Line]:
    """Those that are not below another."""

    def below(line: Line, other: Line) -> bool:
        pairs = zip(astuple(line), astuple(other), strict=True)
        return line is not other and all(x <= y for x, y in pairs)

    distinct = list(dict.fromkeys(lines))
    return [line for line in distinct if not any(below(line, other) for other in distinct)]


def hull(x: Floats, y: Floats) -> list[tuple[float, float]]:
    """Start and slope of the lines of the lower convex hull that do not fall."""
    corners: list[tuple[float, float]] = []
    heights = np.minimum.accumulate(y[::-1])[::-1].tolist()
    for at, height in zip(x.tolist(), heights, strict=True):
        while len(corners) > 1:
            (x0, y0), (x1, y1) = corners[-2:]
            if (y1 - y0) * (at - x1) < (height - y1) * (x1 - x0):
                break
            corners.pop()
        corners.append((at, height))
    lines = [(float(y.min()), 0.0)]
    for (x0, y0), (x1, y1) in itertools.pairwise(corners):
        slope = (y1 - y0) / (x1 - x0)
        if slope > 0:
            lines.append((y0 - slope * x0, slope))
    return lines


def prefill_corners(table: PrefillTable, context: int, most: int) -> tuple[Floats, Floats]:
    """Tokens and seconds: a function, linear between them, below the table at 1 to `most` tokens.

    The squares of T tokens are between T and 2 * context * T, for prompts of up to `context`.
    """
    last, high = table.tokens[-1], table.latency_s[-1]
    corners = {1.0: table.latency_s[0]} | dict(zip(table.tokens, table.latency_s, strict=True))
    if most > last:
        corners |= _beyond(table, context, most)
        if corners[float(most)] == high:  # it stays flat
            corners[last] = high
    tokens = np.array(sorted(corners))
    return tokens, np.array([corners[t] for t in tokens.tolist()])


def _beyond(table: PrefillTable, context: int, most: int) -> dict[float, float]:
    """Corners from the last point of `table` on, by its fit."""
    last, high = table.tokens[-1], table.latency_s[-1]
    _, token, square = table.fit
    slope = token + (square if square >= 0 else 2 * context * square)
    if slope <= 0:
        return {last: high, float(most): high}
    there = high - token * last - square * last * last  # the line below the fit, at 0

    def above(tokens: float) -> float:
        return max(there + slope * tokens, high)

    corners: dict[float, float] = {last: high}
    if last < (kink := (high - there) / slope) < most:
        corners[kink] = high
    corners[float(most)] = above(most)
    if above(last) > high:  # it jumps up behind the last point
        corners[math.nextafter(last, math.inf)] = above(last)
    return corners


def decode_lines(profile: LatencyProfile, context: int, batch: int) -> tuple[Line, Line]:
    """Lines below decodes of up to `batch` jobs, of up to `context` tokens each.

    The first is by (D, C). The second is below what they take beyond a context of 1 each, by
    (D, C - D): its `job` is 0.

    Raises:
        ProfileError: the profile says too little of itself.
    """
    if isinstance(profile, LinearProfile):
        base, job, read, _ = profile.coefficients
        if min(base, job, read) >= 0:
            return Line(base, 0.0, job, read), Line(0.0, 0.0, 0.0, read)
        return _lines_below(_Points(profile, [1.0, float(context)], -math.inf), batch)
    if isinstance(profile, DecodeGrid):
        inner = (each for each in profile.context if 1 < each < context)
        each = sorted({1.0, float(context), *inner})
        return _lines_below(_Points(profile, each, profile.latency_s[0][0] / 2), batch)
    kind = type(profile).__name__
    raise ProfileError(f"no bound for decodes of a {kind}: it says too little of itself")


@dataclass(frozen=True, slots=True)
class _Points:
    """A profile at contexts `each` a job, between which it is linear unless clamped to `lowest`."""

    profile: LatencyProfile
    each: Sequence[float]
    lowest: float

    def seconds(self, count: int) -> list[float]:
        """Lower bounds at `each`, of `count` jobs, such that lines between them are below too."""
        values = [self.profile.latency(count, count * context) for context in self.each]
        clamped = [value <= self.lowest * CLAMPED for value in values]
        for at in range(len(values)):  # next to where it is clamped it is convex, not linear
            if any(clamped[max(at - 1, 0) : at + 2]):
                values[at] = min(values[at], self.lowest)
        return values


def _lines_below(points: _Points, batch: int) -> tuple[Line, Line]:
    jobs, total, seconds, more = [], [], [], []
    for count in range(1, batch + 1):
        values = points.seconds(count)
        floor = points.profile.latency(count, float(count))
        jobs += [float(count)] * len(values)
        total += [count * context for context in points.each]
        seconds += values
        more += [value - floor for value in values]
    d, c, y, z = (np.array(some) for some in (jobs, total, seconds, more))
    slope = max(float(np.polyfit(c - d, z, 1)[0]), 0.0) if points.each[-1] > 1 else 0.0
    short = min(float((z - slope * (c - d)).min()), 0.0)
    return _highest_below(d, c, y), Line(short, 0.0, 0.0, slope)


def _highest_below(d: Floats, c: Floats, y: Floats) -> Line:
    """The line below all points that is highest at their mean; whatever the solver says, below."""
    program = Program(np.array([1.0, d.mean(), c.mean()]), top=math.inf)
    rows = np.arange(len(d))
    parts = [(rows, np.full(len(d), at), x) for at, x in enumerate((np.ones(len(d)), d, c))]
    program.rows(y, *parts)
    found = program.relaxed(math.inf, interior=False)
    start, job, read = (0.0, 0.0, 0.0) if found is None else found.columns.tolist()
    start -= max(float((start + job * d + read * c - y).max()), 0.0)
    return Line(start, 0.0, job, read)
