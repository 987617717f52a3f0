"""The default scaler: as many instances as the device time that is asked for needs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from neustream.cluster.fleet import Fleet
from neustream.cluster.rules.checks import above_zero
from neustream.errors import ConfigError


@dataclass(frozen=True)
class Charge:
    """Device seconds that came in the last `window_s`, over what an instance does at `fill`.

    What came counts, not what ran: a queue hides nothing. The backlog is to be worked off within
    `horizon_s` beside that. Up at once, by as many as it takes; down by one, if the others would be
    filled to less than `fill - 0.15`, and for as long as the window has been like that.
    """

    min: int = 1
    max: int = 16
    fill: float = 0.85
    window_s: float = 20.0
    horizon_s: float = 10.0
    role: str = "whole"

    def __post_init__(self) -> None:
        if not 1 <= self.min <= self.max:
            raise ConfigError(f"charge: min must be from 1 to max ({self.max}), got {self.min!r}")
        if not 0.15 < self.fill <= 1:
            raise ConfigError(f"charge: fill must be over 0.15, up to 1, got {self.fill!r}")
        above_zero("charge", window_s=self.window_s, horizon_s=self.horizon_s)

    def target(self, fleet: Fleet) -> Mapping[str, int]:
        serving = [one for one in fleet.instances.values() if one.role == self.role]
        serving = [one for one in serving if one.state == "up"]
        count = len(serving) + fleet.starting.get(self.role, 0)
        if not serving:
            return {self.role: max(count, self.min)}
        rates = fleet.rates[serving[0].device]
        latest = fleet.now - self.window_s
        came = [asked for at, asked in fleet.arrivals if at >= latest]
        span = min(self.window_s, max(fleet.now, 1.0))
        load = sum([rates.charge(asked.calls) for asked in came]) / span
        rows = np.array([one.row for one in serving], dtype=np.int64)
        queued = sum([rates.charge(asked.calls) for asked in fleet.queued()])
        backlog = float(fleet.backlog(rows).sum()) + queued
        needed = math.ceil((load + max(backlog / self.horizon_s - load, 0.0)) / self.fill)
        if needed >= count:
            return {self.role: min(max(needed, self.min), self.max)}
        quiet = load <= (count - 1) * (self.fill - 0.15)
        whole = fleet.now >= self.window_s
        down = count - 1 if quiet and whole else count
        return {self.role: min(max(down, self.min), self.max)}
