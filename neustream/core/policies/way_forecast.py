"""When requests of one device end that go from one kind of steps there to another: a forecast.

Each model that has requests runs a step in turn, so a request has its next one a whole turn later.
A prompt or an image that begins delays everybody. Time elsewhere (tools, other devices) passes.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from heapq import heapify, heappop, heappush
from math import inf
from typing import NamedTuple

from neustream.core.job import Job
from neustream.core.policies.way_ahead import SHARES, Leg
from neustream.core.policy import View
from neustream.core.types import TICK


class Part(NamedTuple):
    """Of what a request has ahead: seconds elsewhere, seconds of the device, and then steps there.

    `model`: whose steps, by the stage; "": there are none.
    """

    away: float
    here: float
    model: str
    steps: float


@dataclass(frozen=True, slots=True)
class Way:
    """What a request has ahead.

    Args:
        time: seconds that it has.
        parts: in order.
        alone: seconds that all of it takes alone.
        more: seconds that it takes more than that, at each of `SHARES` of how long texts get.
    """

    job: Job
    time: float
    parts: Sequence[Part]
    alone: float
    more: Sequence[float]

    def in_time(self, end: float) -> bool:
        """Whether it is in time more likely than not, if it should end in so many seconds.

        What it may take more is stretched as all of it is. (Chances of many are no help here: small
        gains of each would add up to somebody who is given up for nothing.)
        """
        stretch, latest = max(end / max(self.alone, TICK), 1.0), self.time + TICK
        late = [more for more in self.more if end + more * stretch > latest]
        return 2 * len(late) <= len(self.more)


class Forecast:
    """Requests of a device, and which of them are in time beside the others.

    Args:
        turns: seconds of a step of each model: of the step itself, and of each request in it.
    """

    def __init__(self, turns: Mapping[str, tuple[float, float]], ways: Sequence[Way]) -> None:
        self.turns, self.ways = turns, list(ways)

    @cached_property
    def weights(self) -> list[float]:
        """The weight of each that is expected in time, else 0."""
        return [
            way.job.weight * way.in_time(end)
            for way, end in zip(self.ways, self.ends(), strict=True)
        ]

    @cached_property
    def value(self) -> float:
        """All of that together."""
        return sum(self.weights)

    def plus(self, way: Way) -> Forecast:
        """These and one more, the last."""
        return Forecast(self.turns, [*self.ways, way])

    def only(self, ways: Sequence[Way]) -> Forecast:
        """Some of these."""
        return Forecast(self.turns, ways)

    def less(self, jobs: Collection[Job]) -> Job | None:
        """That of `jobs` without whom more is in time, if there is one; the least is looked at."""
        places = [at for at, way in enumerate(self.ways) if way.job in jobs]
        if not places:
            return None
        worst = min(places, key=self.weights.__getitem__)
        others = [*self.ways[:worst], *self.ways[worst + 1 :]]
        if self.only(others).value <= self.value + TICK:
            return None
        return self.ways[worst].job

    def ends(self) -> list[float]:
        """In how many seconds each ends.

        A turn is a step of each model that somebody is at. So who ends there next is known by the
        number of turns, and who comes next by the time.
        """
        ways, ends = self.ways, [0.0] * len(self.ways)
        turn = _Turn(self.turns)
        coming = [(way.parts[0].away, at, 0) for at, way in enumerate(ways) if way.parts]
        heapify(coming)
        going: list[tuple[float, int, int]] = []
        now = turns = 0.0
        while coming or going:
            next_end = now + (going[0][0] - turns) * turn.seconds if going else inf
            if coming and coming[0][0] <= next_end:
                at_s, at, number = heappop(coming)
                part = ways[at].parts[number]
                turns += max(at_s - now, 0.0) / turn.seconds if turn.seconds else 0.0
                now = max(now, at_s) + part.here
                if part.steps > 0:
                    turn.change(part.model, 1)
                    heappush(going, (turns + part.steps, at, number))
                    continue
            else:
                turns, at, number = heappop(going)
                now = next_end
                turn.change(ways[at].parts[number].model, -1)
            ends[at] = now
            if number + 1 < len(ways[at].parts):
                heappush(coming, (now + ways[at].parts[number + 1].away, at, number + 1))
        return ends


class _Turn:
    """A step of each model that somebody is at.

    Attributes:
        seconds: that it takes.
    """

    __slots__ = ("_models", "seconds")

    def __init__(self, models: Mapping[str, tuple[float, float]]) -> None:
        self._models = {model: [0, *seconds] for model, seconds in models.items()}
        self.seconds = 0.0

    def change(self, model: str, requests: int) -> None:
        """So many requests more, or less, are at a model."""
        self._models[model][0] += requests
        self.seconds = 0.0
        for count, base, each in self._models.values():
            if count:
                self.seconds += base + each * count


def turns_of(view: View, legs: Sequence[Leg]) -> dict[str, tuple[float, float]]:
    """Seconds of a step of each model that some legs in the pool of a view are at."""
    turns = {}
    for leg in legs:
        if leg.outputs and leg.pool == view.pool.name:
            speed = view.speed.get(leg.stage, 1.0)
            turns[leg.stage] = (speed * leg.base, speed * leg.each)
    return turns


def way_of(view: View, job: Job, legs: Sequence[Leg], left: float) -> Way:
    """What a job has ahead, as the pool of a view sees it; `left`: the share of its first leg."""
    parts: list[Part] = []
    away = here = alone = 0.0
    more = [0.0] * len(SHARES)
    for at, leg in enumerate(legs):
        share = left if at == 0 else 1.0
        speed = view.speed.get(leg.stage, 1.0)
        alone += speed * share * leg.alone
        more = [
            least + speed * share * longer for least, longer in zip(more, leg.longer, strict=True)
        ]
        if leg.pool != view.pool.name:
            if here:
                parts.append(Part(away, here, "", 0.0))
                away = here = 0.0
            away += speed * share * leg.alone
            continue
        here += speed * leg.crowded
        if leg.outputs:
            parts.append(Part(away, here, leg.stage, share * leg.decodes))
            away = here = 0.0
    if away or here:
        parts.append(Part(away, here, "", 0.0))
    return Way(job, job.due - view.now, parts, alone, more)
