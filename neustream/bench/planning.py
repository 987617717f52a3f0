"""From a data set and a rate to a plan."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from neustream.bench.plan import Plan
from neustream.errors import ConfigError
from neustream.workload.arrivals import (
    Ramp,
    conditioned_arrivals,
    constant_arrivals,
    gamma_arrivals,
)
from neustream.workload.asks import Ask
from neustream.workload.mixing import with_arrivals

Law = Literal["gamma", "conditioned", "constant"]


@dataclass(frozen=True)
class Timing:
    """When requests come.

    Attributes:
        rate: requests a second; None: as a trace has them, else as soon as there is a place.
        burstiness: 1 / cv**2 of the gaps (1: Poisson); inf: they are all the same.
        law: "conditioned" draws as "gamma" does, and scales all gaps so that the rate is exact.
        concurrency: the most under way at once; None: no bound.
    """

    rate: float | None = None
    burstiness: float = 1.0
    law: Law = "gamma"
    concurrency: int | None = None
    ramp: Ramp | None = None

    def __str__(self) -> str:
        cv = "" if math.isinf(self.burstiness) else f", cv {1 / math.sqrt(self.burstiness):.3g}"
        if self.ramp is not None:
            return f"{self.ramp}{cv}"
        if self.rate is None:
            return "as there are places" if self.concurrency else "as fast as can be"
        return f"{self.rate:g} requests/s, {self._law(cv)}"

    def _law(self, cv: str) -> str:
        if self.law == "constant":
            return "constant"
        return "Poisson" if self.law == "gamma" and self.burstiness == 1.0 else self.law + cv

    def arrivals(self, number: int, seed: int) -> NDArray[np.float64] | None:
        """Seconds, in order; None: there is no schedule."""
        if self.ramp is None and self.rate is None:
            return None
        cv = 0.0 if math.isinf(self.burstiness) else 1 / math.sqrt(self.burstiness)
        if self.ramp is not None:
            return self.ramp.arrivals(number, cv=cv, seed=seed)
        assert self.rate is not None
        if self.law == "constant":
            return constant_arrivals(number, rate=self.rate)
        draw = conditioned_arrivals if self.law == "conditioned" else gamma_arrivals
        return draw(number, rate=self.rate, cv=cv, seed=seed)


def plan_of(asks: Sequence[Ask], timing: Timing, seed: int, name: str = "", **meta: Any) -> Plan:
    """The requests, at the instants that are drawn for them.

    Raises:
        ConfigError: there are none.
    """
    if not asks:
        raise ConfigError("no request is asked for")
    when = timing.arrivals(len(asks), seed)
    traced = when is None and asks[0].arrival_s is not None
    if when is not None:
        asks = with_arrivals(asks, [float(at) for at in when])
    return Plan(
        asks,
        name or ("trace" if traced else str(timing).partition(",")[0]),
        None if when is None else timing.rate,
        timing.concurrency,
        arrivals="of the trace" if traced else str(timing),
        seed=seed,
        meta={
            **meta,
            "burstiness": timing.burstiness if math.isfinite(timing.burstiness) else "inf",
        },
    )


def warming(asks: Sequence[Ask], number: int) -> Plan:
    """So many requests like the first ones, at once, of which nothing is kept."""
    first = [ask for ask in asks if not ask.follows][:number]
    own = [
        dataclasses.replace(first[at % len(first)], id=f"warm-{at}", arrival_s=None, session="")
        for at in range(number)
        if first
    ]
    return Plan(own, "warm up", concurrency=max(1, number))
