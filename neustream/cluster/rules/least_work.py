"""A router: where the least work is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from neustream.cluster.fleet import Fleet, Route
from neustream.core.outlook import Asked


@dataclass(frozen=True)
class LeastWork:
    """The instance with the least backlog in seconds of its own device; of several the first."""

    reads_params: ClassVar[bool] = False

    def route(self, fleet: Fleet, asked: Asked) -> Route:
        rows = fleet.able(asked)
        return Route(fleet.at(int(rows[fleet.backlog(rows).argmin()])).name, "least work")
