"""What a report adds up by leg: the model calls and tools of requests whose parts have promises."""

from __future__ import annotations

from typing import Any

from neustream.core.events import BranchEnded, Ended, LegEnded
from neustream.engine.tally import Distribution

Way = list[tuple[str, float]]
"""Legs and their seconds, one after the other."""


class Leg:
    """The legs of one name: TTFT and TPOT from the start of each, and the slack around them.

    `given_s`: seconds by which they ended before they were due, for those behind them; `taken_s`:
    seconds by which they ended after that. `path_s`: seconds on the critical path of requests that
    are done, where of branches the one counts that decided the join.
    """

    def __init__(self) -> None:
        self.ended = self.on_time = self.on_path = 0
        self.given_s = self.taken_s = self.path_s = 0.0
        self.seconds, self.ttft, self.tpot = (Distribution() for _ in range(3))

    def add(self, record: LegEnded) -> None:
        """One leg is over."""
        self.ended += 1
        self.on_time += not record.late
        if record.status != "done":
            return
        self.seconds.add(record.at - record.began)
        spare = record.due - record.at
        if abs(spare) < float("inf"):
            self.given_s += max(spare, 0.0)
            self.taken_s += max(-spare, 0.0)
        if record.first_at is not None:
            self.ttft.add(record.first_at - record.began)
            if record.outputs > 1:
                self.tpot.add((record.at - record.first_at) / (record.outputs - 1))

    def to_dict(self, done: int) -> dict[str, Any]:
        """Seconds; `done`: requests that were, over which the critical path is shared."""
        out: dict[str, Any] = {"ended": self.ended, "attainment": self.on_time / self.ended}
        for name, some in (("seconds", self.seconds), ("ttft_s", self.ttft), ("tpot_s", self.tpot)):
            if some.count:
                quantiles = {f"p{q}": some.percentile(q) for q in (50, 90, 99)}
                out[name] = {"mean": some.mean, **quantiles}
        out |= {"slack_given_s": self.given_s, "slack_taken_s": self.taken_s}
        if done:
            out |= {"critical_path_s": self.path_s / done, "on_critical_path": self.on_path / done}
        return out


class ByLeg:
    """Adds up the legs of a run by their names; the ways of open requests are kept."""

    def __init__(self) -> None:
        self.legs: dict[str, Leg] = {}
        self._ways: dict[tuple[str, str], Way] = {}
        self._done = 0

    def leg(self, record: LegEnded) -> None:
        """A leg is over."""
        self.legs.setdefault(record.leg, Leg()).add(record)
        if record.status == "done":
            way = self._ways.setdefault((record.id, record.branch), [])
            way.append((record.leg, record.at - record.began))

    def branch(self, record: BranchEnded) -> None:
        """A branch is over: the one that decided the join is on the way of its request."""
        way = self._ways.pop((record.id, record.branch), [])
        if record.decided and record.status == "done":
            outer = record.branch.rpartition("/")[0]
            self._ways.setdefault((record.id, outer), []).extend(way)

    def ended(self, record: Ended) -> None:
        """A request is over."""
        way = self._ways.pop((record.id, ""), None)
        if way is None or record.status != "done":
            return
        self._done += 1
        for name, seconds in way:
            self.legs[name].path_s += seconds
        for name in {name for name, _ in way}:
            self.legs[name].on_path += 1

    def gone(self, id: str) -> None:
        """A request ends elsewhere."""
        self._ways.pop((id, ""), None)

    def to_dict(self) -> dict[str, Any]:
        """By name, in the order in which they first ended."""
        return {name: leg.to_dict(self._done) for name, leg in self.legs.items()}
