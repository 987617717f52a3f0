"""What ways to instances and back took while a cluster served, for a simulation of the same run.

A request on its way waits for the process of the head, for that of its instance, and for what is
between them. All of it changes with what else runs on the machines, and none of it is in a profile.
A simulated message takes as long as the served one that went the same way nearest in time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from neustream.cluster.happenings import Entered, Happening
from neustream.core.events import Ended, Submitted
from neustream.engine.events import Finished, Record

DRAWS = 4096
"""So many are drawn before they come again."""


class Way:
    """Seconds that one way took, by when it began."""

    def __init__(self, found: Sequence[tuple[float, float]], start: float) -> None:
        ordered = sorted(found)
        self._began = np.array([at - start for at, _ in ordered])
        self._took = np.array([seconds for _, seconds in ordered])

    def took(self, at: float) -> float:
        """Of the way that began nearest to `at`; 0: there was none."""
        if not len(self._began):
            return 0.0
        after = int(np.searchsorted(self._began, at))
        near = range(max(after - 1, 0), min(after + 1, len(self._began)))
        return float(self._took[min(near, key=lambda place: abs(self._began[place] - at))])

    def spread(self, count: int) -> tuple[float, ...]:
        """So many quantiles in equal distances, rising; none of no ways."""
        if not len(self._took):
            return ()
        places = (np.arange(count) + 0.5) / count
        return tuple(float(value) for value in np.quantile(self._took, places))

    def quantiles(self) -> dict[str, float]:
        """Its median and 99th percentile, seconds; none of no ways."""
        if not len(self._took):
            return {}
        return {f"p{q}": float(np.percentile(self._took, q)) for q in (50, 99)}


class Drawn(Way):
    """One that takes now this and now that of some `seconds`, each for `every_s`."""

    def __init__(self, seconds: Sequence[float], every_s: float, seed: Sequence[int]) -> None:
        super().__init__([(0.0, one) for one in seconds], 0.0)
        self._every_s = every_s
        self._drawn = np.random.default_rng(seed).choice(self._took, DRAWS)

    def took(self, at: float) -> float:
        """Of the way that begins at `at`."""
        return float(self._drawn[int(at / self._every_s) % DRAWS])


@dataclass(frozen=True)
class Took:
    """What ways took; instants count from the start of a trace.

    `there`: from the call of `submit` to the queues of an instance. `back`: from the end of a
    request's last step to its answer.
    """

    there: Way
    back: Way

    def to_dict(self) -> dict[str, dict[str, float]]:
        """Quantiles in seconds of those ways that somebody went."""
        ways = {"there": self.there.quantiles(), "back": self.back.quantiles()}
        return {name: seconds for name, seconds in ways.items() if seconds}


class Ways:
    """An observer and a watcher of a served run."""

    def __init__(self) -> None:
        self._asked: dict[str, float] = {}
        self._last: dict[str, float] = {}
        self._there: list[tuple[float, float]] = []
        self._back: list[tuple[float, float]] = []

    def __call__(self, record: Record) -> None:
        if isinstance(record, Submitted):
            self._asked[record.id] = record.arrival
        elif isinstance(record, Finished):
            for id in record.step.ids:
                self._last[id] = record.at
        elif isinstance(record, Ended):
            self._asked.pop(record.id, None)
            last = self._last.pop(record.id, None)
            if last is not None and record.status == "done":
                self._back.append((last, max(record.at - last, 0.0)))

    def happened(self, event: Happening) -> None:
        """A request came to its instance: the first one counts, others are of moves."""
        if isinstance(event, Entered):
            asked = self._asked.pop(event.id, None)
            if asked is not None:
                self._there.append((asked, max(event.at - asked, 0.0)))

    def told(self, start: float) -> Took:
        """What ways took, counted from `start`, once the run is over."""
        return Took(Way(self._there, start), Way(self._back, start))
