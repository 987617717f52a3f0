"""What came of a run on a cluster, beside what came of any run."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict
from typing import Any

from neustream.cluster.happenings import (
    Happening,
    Lost,
    Moved,
    Restarted,
    Routed,
    Saved,
    Scaled,
    Succeeded,
    Unmoved,
)
from neustream.core.events import Ended
from neustream.engine.events import Record
from neustream.engine.report import Report
from neustream.engine.tally import Distribution


class ClusterReport(Report):
    """A report with what happened between instances.

    Attributes:
        instance_s: seconds that instances were there, added up.
        forecasts: of requests that were sent once, by what the router's forecast said (fits or
            not) and whether they were on time.
    """

    def __init__(self, start: float = 0.0) -> None:
        super().__init__(start)
        self.instance_s = 0.0
        self.moves: Counter[str] = Counter()
        self.unmoved: Counter[str] = Counter()
        self.restarts: Counter[str] = Counter()
        self.snapshots: Counter[str] = Counter()
        self.lost: list[dict[str, Any]] = []
        self.heads: list[dict[str, Any]] = []
        self.downtime = Distribution()
        self.routing = Distribution()
        self.routed: Counter[str] = Counter()
        self.forecasts: Counter[tuple[bool, bool]] = Counter()
        self.scaled: list[tuple[float, str, int]] = []
        self._said: dict[str, bool] = {}

    def __call__(self, record: Record) -> None:
        super().__call__(record)
        if isinstance(record, Ended):
            said = self._said.pop(record.id, None)
            if said is not None:
                self.forecasts[said, record.on_time] += 1

    def happened(self, event: Happening) -> None:
        """What happened in the cluster."""
        match event:
            case Routed():
                self.routed[event.reason] += 1
                if event.seconds:
                    self.routing.add(event.seconds * 1e6)
                if event.fits is not None:
                    self._said[event.id] = event.fits
            case Moved():
                self.moves[event.reason] += 1
                self.downtime.add(event.at - event.held_at)
            case Unmoved():
                self.unmoved[event.reason] += 1
            case Saved():
                self.snapshots["saved"] += 1
            case Restarted():
                self.restarts[event.why] += 1
                if event.saved:
                    self.snapshots["gone on from"] += 1
            case Lost():
                self.lost.append(asdict(event))
            case Scaled():
                self.scaled.append((event.at, event.role, event.count))
            case Succeeded():
                self.heads.append(asdict(event))

    def to_dict(self) -> dict[str, Any]:
        """Also `cluster`: seconds, but `routing_us` in microseconds."""
        on_time = self.counts["on_time"]
        said = {
            ("fits" if fits else "does not fit"): {
                "on_time": self.forecasts[fits, True],
                "not_on_time": self.forecasts[fits, False],
            }
            for fits in (True, False)
            if self.forecasts[fits, True] + self.forecasts[fits, False]
        }
        told: dict[str, Any] = {
            "instance_s": self.instance_s,
            "instances": self.instance_s / self.duration if self.duration > 0 else 0.0,
            "on_time_per_instance_s": on_time / self.instance_s if self.instance_s > 0 else 0.0,
            "routing_us": {f"p{q}": self.routing.percentile(q) for q in (50, 99)},
            "routed": dict(self.routed),
        }
        found = {
            "moves": dict(self.moves),
            "moves_that_came_to_nothing": dict(self.unmoved),
            "restarts": dict(self.restarts),
            "snapshots": dict(self.snapshots),
            "lost": self.lost,
            "heads_that_began_anew": self.heads,
            "forecasts": said,
            "scaled": [list(each) for each in self.scaled],
        }
        if self.moves:
            found["downtime_s"] = {f"p{q}": self.downtime.percentile(q) for q in (50, 99)}
        told |= {name: value for name, value in found.items() if value}
        return {**super().to_dict(), "cluster": told}
