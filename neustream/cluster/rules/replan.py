"""A scaler that plans anew which stages are on which devices, as the load changes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from neustream.cluster.fleet import Fleet
from neustream.cluster.rules.checks import above_zero, at_least
from neustream.errors import ConfigError


@dataclass(frozen=True)
class Replan:
    """Asked each `plan_s`, and when the device time that is asked for has changed by `range`.

    It simulates placements on the arrivals of the last `window_s`: up to `most` candidates, and
    `tries` with one device changed. A change has to gain `gain` and what it costs, `drain_s` for
    each device that changes and the time in which it loads.
    """

    plan_s: float = 300.0
    window_s: float = 60.0
    range: float = 0.2
    gain: float = 0.03
    most: int = 6
    tries: int = 8
    drain_s: float = 5.0

    def __post_init__(self) -> None:
        above_zero("plan", plan_s=self.plan_s, window_s=self.window_s, range=self.range)
        at_least("plan", 1, most=self.most)
        at_least("plan", 0, gain=self.gain, tries=self.tries, drain_s=self.drain_s)

    def target(self, fleet: Fleet) -> Mapping[str, int]:
        """ConfigError: who runs the cluster has to make a `Replanner` of it, as simulations do."""
        raise ConfigError("scaler plan: it is for simulated clusters")
