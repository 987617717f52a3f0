"""A router: in turns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from neustream.cluster.fleet import Fleet, Route
from neustream.core.outlook import Asked


@dataclass(frozen=True)
class RoundRobin:
    """The instance that the fewest requests were sent to so far; of several the first."""

    reads_params: ClassVar[bool] = False

    def route(self, fleet: Fleet, asked: Asked) -> Route:
        rows = fleet.able(asked)
        return Route(fleet.at(int(rows[fleet.dispatched[rows].argmin()])).name, "its turn")
