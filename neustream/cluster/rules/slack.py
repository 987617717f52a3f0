"""The default router: an instance where the request is on time and nobody else is made late."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from neustream.cluster.fleet import Fleet, Route
from neustream.cluster.rules.checks import at_least
from neustream.core.outlook import Asked

MANY = 512
"""Of more instances only a sample is looked at."""
SAMPLE = 64


@dataclass(frozen=True)
class Slack:
    """Of the `k` instances with the shortest queue the first that keeps all promises.

    Its forecast has to keep those of the requests that are there and this one's. If there is none,
    the one where it ends soonest. A queue is so many requests as are there and this one, each as
    large as it is, in seconds of that device. Of texts, whose lengths nobody knows, it is the
    backlog in seconds, and the least of it if none fits. Of more than 512 instances the k are the
    least of a random 64.
    """

    reads_params: ClassVar[bool] = False

    k: int = 8

    def __post_init__(self) -> None:
        at_least("slack", 1, k=self.k)

    def route(self, fleet: Fleet, asked: Asked) -> Route:
        rows = fleet.able(asked)
        if len(rows) > MANY:
            rows = rows[fleet.random.integers(0, len(rows), SAMPLE)]
        backlog = fleet.backlog(rows)
        queue = backlog if asked.tokens else fleet.queue(rows, asked)
        few = rows[np.lexsort((backlog, queue))[: self.k]].tolist()
        told = []
        for row in few:
            instance = fleet.at(row)
            found = fleet.ask(instance, asked)
            if found.fits:
                return Route(instance.name, "fits", forecast=found)
            told.append(found)
        if asked.tokens:
            return Route(fleet.at(few[0]).name, "least backlog", forecast=told[0])
        ends = [each.finish for each in told]
        best = ends.index(min(ends))
        return Route(fleet.at(few[best]).name, "ends soonest", forecast=told[best])
