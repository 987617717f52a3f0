"""The highest rate at which enough requests are on time."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from neustream.bench.records import Since
from neustream.bench.runs import Run
from neustream.bench.shares import Share
from neustream.bench.summary import attainment, valid

GROWTH = 4.0
"""By so much the rate goes up as long as enough is on time, and down as long as too little is."""
Play = Callable[[float, int, float], Run]
"""Serves requests at a rate, from a seed, for about so many seconds."""
Bracketed = Literal["yes", "above", "below"]


@dataclass(frozen=True)
class Goal:
    """What is looked for, and how.

    Attributes:
        attainment: the share that is to be on time.
        start: the rate of the first point; least, most: rates that are not gone beyond.
        precision: the found rate and the next one that fails are no further apart (0.02: 2 %).
        points: the most that are measured, those that confirm the found rate among them.
        confirm: how often the found rate is measured again, with other seeds.
        point_s: seconds of a point. As long as its interval has the goal in it, it goes on,
            to `most_s` at the most.
    """

    attainment: float = 0.9
    start: float = 1.0
    least: float = 1e-3
    most: float = 1e6
    precision: float = 0.02
    points: int = 10
    confirm: int = 2
    point_s: float = 30.0
    most_s: float = 120.0


@dataclass
class Point:
    """A rate, and the share of its requests that were on time.

    `sure`: whether the interval of the share is on one side of the goal. `valid`: whether the
    client kept its schedule.
    """

    rate: float
    share: Share
    served: float
    sure: bool
    valid: bool
    runs: list[Run] = field(repr=False, default_factory=list)

    def met(self, goal: Goal) -> bool:
        return (self.share.value or 0.0) >= goal.attainment

    def to_dict(self) -> dict[str, Any]:
        told = {"rate": self.rate, "served": self.served, "sure": self.sure, "valid": self.valid}
        return {**told, "attainment": self.share.to_dict()}


@dataclass
class Found:
    """What a search came to.

    Attributes:
        points: all that were measured, in order; confirmed: those at the found rate, again.
        rate: the highest at which enough was on time; None: at none that was tried.
        fails: the lowest at which too little was; None: at none.
    """

    goal: Goal
    points: list[Point] = field(default_factory=list)
    confirmed: list[Point] = field(default_factory=list)
    rate: float | None = None
    fails: float | None = None

    @property
    def bracketed(self) -> Bracketed:
        """Whether rates on both sides were found; else on which side of all tried it is."""
        if self.rate is None:
            return "below"
        return "above" if self.fails is None else "yes"

    @property
    def precise(self) -> bool:
        """Whether the two sides are as close as was asked for."""
        if self.rate is None or self.fails is None:
            return False
        return self.fails <= self.rate * (1 + self.goal.precision) * (1 + 1e-9)

    @property
    def share(self) -> Share:
        """Of all requests at the found rate."""
        same = [each for each in [*self.points, *self.confirmed] if each.rate == self.rate]
        return Share(sum(each.share.number for each in same), sum(each.share.of for each in same))

    @property
    def holds(self) -> bool:
        """Whether all that was measured at the found rate, together, does not speak against it."""
        return self.rate is not None and self.share.interval[1] >= self.goal.attainment

    def to_dict(self) -> dict[str, Any]:
        return {
            "attainment_goal": self.goal.attainment,
            "rate": self.rate,
            "fails_at": self.fails,
            "bracketed": self.bracketed,
            "precise": self.precise,
            "holds": self.holds,
            "attainment": self.share.to_dict(),
            "points": [each.to_dict() for each in self.points],
            "confirmed": [each.to_dict() for each in self.confirmed],
        }


class Search:
    """Looks for a rate: up until too little is on time, then between.

    `found` is what is known so far, also when `play` raised.
    """

    def __init__(self, goal: Goal, play: Play, seed: int = 0, since: Since = "scheduled") -> None:
        self.found = Found(goal)
        self._goal = goal
        self._play = play
        self._seed = seed
        self._since: Since = since
        self._guesses: list[float] = []

    def run(self) -> Found:
        """Measure until the rate is known, or there are as many points as there may be."""
        goal, found = self._goal, self.found
        rate: float | None = goal.start
        while rate is not None and len(found.points) < goal.points - goal.confirm:
            point = self._measure(rate)
            found.points.append(point)
            self._learn(point)
            rate = self._next()
        if found.rate is not None:
            for _ in range(min(goal.confirm, goal.points - len(found.points))):
                found.confirmed.append(self._measure(found.rate))
        return found

    def _learn(self, point: Point) -> None:
        goal, found = self._goal, self.found
        if point.met(goal):
            found.rate = max(found.rate or 0.0, point.rate)
        else:
            found.fails = min(found.fails or math.inf, point.rate)
            if not self._guesses and point.served > 0:  # what it serves is about what it can
                step = 1 + goal.precision / 2
                self._guesses = [point.served * step, point.served / step]
        if found.fails is not None and found.rate is not None and found.rate >= found.fails:
            found.rate = self._highest_below(found.fails)

    def _highest_below(self, fails: float) -> float | None:
        """By chance a higher rate may do well: what is above a failure is not trusted."""
        met = [
            each.rate for each in self.found.points if each.met(self._goal) and each.rate < fails
        ]
        return max(met, default=None)

    def _next(self) -> float | None:
        """The next rate to try; None: it is found, or out of bounds."""
        goal, low, high = self._goal, self.found.rate, self.found.fails
        while self._guesses:
            guess = self._guesses.pop()
            if (low or goal.least) < guess < (high or goal.most):
                return guess
        if high is None:
            assert low is not None
            return min(low * GROWTH, goal.most) if low < goal.most else None
        if low is None:
            return max(high / GROWTH, goal.least) if high > goal.least else None
        return None if self.found.precise else math.sqrt(low * high)

    def _measure(self, rate: float) -> Point:
        goal = self._goal
        runs: list[Run] = []
        number = of = 0
        seconds, left = goal.point_s, goal.most_s
        while True:
            self._seed += 1
            run = self._play(rate, self._seed, seconds)
            runs.append(run)
            share = attainment(run, self._since)
            number, of = number + share.number, of + share.of
            left -= seconds
            low, high = Share(number, of).interval
            sure = not low <= goal.attainment <= high
            if sure or left < seconds:
                break
        good = all(valid(each) for each in runs)
        return Point(rate, Share(number, of), _served(runs), sure, good, runs)


def _served(runs: list[Run]) -> float:
    """Requests that were done a second, from the first arrival to the last end."""
    done = seconds = 0.0
    for run in runs:
        if run.records:
            done += sum(record.done for record in run.records)
            seconds += run.duration_s - run.records[0].scheduled_s
    return done / seconds if seconds > 0 else 0.0
