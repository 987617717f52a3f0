"""What came of a run on a cluster, beside what came of any run."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict
from typing import Any

from neustream.cluster.foretold import Foretold
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
from neustream.core.events import Emitted, Ended
from neustream.engine.report import Report
from neustream.engine.tally import Distribution


class ClusterReport(Report):
    """A report with what happened between instances.

    Attributes:
        instance_s: seconds that instances were there, added up.
        foretold: what the router's forecasts said of requests, and what became of them.
    """

    def __init__(self, start: float = 0.0) -> None:
        super().__init__(start)
        self._adds_up[Emitted] = self._emitted
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
        self.foretold = Foretold()
        self.scaled: list[tuple[float, str, int]] = []

    def _emitted(self, record: Emitted) -> None:
        self.tokens.emitted(record)
        self.foretold.emitted(record)

    def _ended(self, record: Ended) -> None:
        super()._ended(record)
        self.foretold.ended(record)

    def happened(self, event: Happening) -> None:
        """What happened in the cluster."""
        match event:
            case Routed():
                self.routed[event.reason] += 1
                if event.seconds:
                    self.routing.add(event.seconds * 1e6)
                self.foretold.routed(event)
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
            "forecasts": self.foretold.as_dict(),
            "forecast_error_s": self.foretold.errors_as_dict(),
            "scaled": [list(each) for each in self.scaled],
        }
        if self.moves:
            found["downtime_s"] = {f"p{q}": self.downtime.percentile(q) for q in (50, 99)}
        told |= {name: value for name, value in found.items() if value}
        return {**super().to_dict(), "cluster": told}
