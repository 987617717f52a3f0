"""A router after PolyServe: requests of one class share instances, the fullest that still fits."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from neustream.cluster.fleet import Fleet, Floats, Ints, Route
from neustream.cluster.rules.checks import at_least
from neustream.core.outlook import Asked


@dataclass(frozen=True)
class Tiered:
    """The most loaded instance where the request fits, of those that serve its class of promises.

    An instance serves the class of the requests that it has; an empty one any. If no such one fits,
    any instance where it fits; if there is none, the one with the least backlog. `most`: how many
    are asked.
    """

    reads_params: ClassVar[bool] = False

    most: int = 16

    def __post_init__(self) -> None:
        at_least("tiered", 1, most=self.most)

    def route(self, fleet: Fleet, asked: Asked) -> Route:
        rows = fleet.able(asked)
        backlog = fleet.backlog(rows)
        order = np.argsort(-backlog, kind="stable")
        mine = [place for place in order.tolist() if self._of_class(fleet, int(rows[place]), asked)]
        found = self._first(fleet, rows, mine, asked, "its tier")
        if found is None:
            found = self._first(fleet, rows, order.tolist()[::-1], asked, "another tier")
        if found is not None:
            return found
        instance = fleet.at(int(rows[_least(backlog)]))
        return Route(instance.name, "least backlog", forecast=fleet.ask(instance, asked))

    def _of_class(self, fleet: Fleet, row: int, asked: Asked) -> bool:
        if not fleet.live[row]:
            return True
        classes = {_tier(place.asked) for place in fleet.requests(fleet.at(row).name)}
        return classes <= {_tier(asked)}

    def _first(
        self, fleet: Fleet, rows: Ints, places: list[int], asked: Asked, reason: str
    ) -> Route | None:
        """The first of some instances where it fits."""
        for place in places[: self.most]:
            instance = fleet.at(int(rows[place]))
            told = fleet.ask(instance, asked)
            if told.fits:
                return Route(instance.name, reason, forecast=told)
        return None


def _tier(asked: Asked) -> str:
    """Its class: by name, else by its pace."""
    if asked.slo.name:
        return asked.slo.name
    pace = asked.step if asked.step < math.inf else asked.slo.total
    return f"{pace:.1g}"


def _least(values: Floats) -> int:
    return int(values.argmin())
