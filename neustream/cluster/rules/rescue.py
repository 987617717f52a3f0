"""A mover: away from where a promise would break, to where it is kept."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from neustream.cluster.fleet import Fleet, Instance, Move, Place
from neustream.cluster.rules.checks import at_least
from neustream.cluster.rules.memory import text_of
from neustream.core.outlook import FOREVER


@dataclass(frozen=True)
class Rescue:
    """Requests that would be late where they are move to the first of `k` instances where they fit.

    A reason is a forecast of a miss here and none there, an instance that is suspect, or requests
    that lost their KV blocks. The largest weight goes first, one of an instance at a time. Nothing
    moves again within `rest_s`, and nothing that is nearly over: `least_s` seconds of work have to
    be ahead.
    """

    k: int = 8
    rest_s: float = 5.0
    least_s: float = 0.1

    def __post_init__(self) -> None:
        at_least("rescue", 1, k=self.k)
        at_least("rescue", 0, rest_s=self.rest_s, least_s=self.least_s)

    def moves(self, fleet: Fleet) -> Sequence[Move]:
        moves: list[Move] = []
        taken: set[str] = set()
        for instance in list(fleet.instances.values()):
            found = self._one(fleet, instance, taken)
            if found is not None:
                moves.append(found)
                taken.add(found.target)
        return moves

    def _one(self, fleet: Fleet, instance: Instance, taken: set[str]) -> Move | None:
        """A request that should leave an instance, and where to."""
        reason = self._reason(fleet, instance)
        if not reason:
            return None
        places = [place for place in fleet.requests(instance.name) if self._may_move(fleet, place)]
        places.sort(key=lambda place: -place.asked.weight)
        for place in places[: self.k]:
            late = fleet.now - place.arrival
            asked = place.asked.aged(late)
            target = self._target(fleet, instance, place, taken)
            if target is not None and asked.due_in > 0:
                return Move(place.id, instance.name, target, reason)
        return None

    def _reason(self, fleet: Fleet, instance: Instance) -> str:
        if instance.state == "suspect":
            return "suspect"
        if text_of(instance.outlook).evicted:
            return "lost its KV blocks"
        return "would be late" if late_at(fleet, instance) else ""

    def _may_move(self, fleet: Fleet, place: Place) -> bool:
        if not place.free or fleet.now - place.moved_at < self.rest_s:
            return False
        return fleet.now - place.arrival < place.asked.due_in

    def _target(self, fleet: Fleet, source: Instance, place: Place, taken: set[str]) -> str | None:
        """The first of the instances with the least backlog where it fits."""
        asked = place.asked.aged(fleet.now - place.arrival)
        rows = fleet.able(asked)
        if not len(rows):
            return None
        backlog = fleet.backlog(rows)
        for row in rows[np.argsort(backlog, kind="stable")[: self.k]].tolist():
            instance = fleet.at(row)
            if instance is source or instance.name in taken:
                continue
            told = fleet.ask(instance, asked)
            if told.fits and told.finish >= self.least_s:
                return instance.name
        return None


def late_at(fleet: Fleet, instance: Instance) -> bool:
    """Whether the forecast of an instance breaks a promise that it has."""
    outlook = fleet.seen(instance)
    age = max(fleet.now - outlook.sent_at, 0.0)
    rates = fleet.rates[instance.device]
    for line in outlook.lines:
        curve = rates.curve(line.stage, 2**20)
        turns = curve.turn_list(len(line.left))
        speed = outlook.speed.get(line.stage, 1.0)
        end, before, count = outlook.until, 0.0, len(line.left)
        for place in range(count):
            end += (line.left[place] - before) * turns[count - place] * speed
            before = line.left[place]
            if end > line.due_in[place] < FOREVER / 2 and line.due_in[place] > age:
                return True
            end += line.behind[place]
    return any(text.spare < math.inf and text.spare < age for text in outlook.texts)
