"""What callers say: what was promised (SLO) and what is asked for (Request).

Times are seconds: `arrival`, `*_at` and `now` are instants on the engine's clock, `due*` are
deadlines, plain words durations.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from numbers import Real
from typing import Any

from neustream.core.graph import Graph
from neustream.errors import RequestError, shown

TICK = 1e-9
"""Seconds by which an instant may pass a deadline: sums of latencies are no finer than this."""


@dataclass(frozen=True, slots=True)
class SLO:
    """What a request was promised, as seconds from its arrival; `inf` promises nothing.

    Output k (from 0) is due at `arrival + first + k * step`, so that an early token buys slack;
    everything is due at `arrival + total`. A request of `weight` 10 is worth ten. `name` is the
    SLO class that reports group by.

    With `finish` it is served even if it will be late: where a policy gives it up, it goes on as
    one that was promised nothing.

    Raises:
        RequestError: a duration or weight is not above 0, there is a `step` without a `first`, or
            another field is of another type.
    """

    total: float = math.inf
    first: float = math.inf
    step: float = math.inf
    weight: float = 1.0
    name: str = ""
    finish: bool = False

    def __post_init__(self) -> None:
        for what in ("total", "first", "step", "weight"):
            object.__setattr__(self, what, _positive(what, getattr(self, what)))
        if math.isinf(self.weight):
            raise RequestError("SLO: weight must be finite, got inf")
        if not isinstance(self.name, str):
            raise RequestError(f"SLO: name must be a string, got {shown(self.name)}")
        if not isinstance(self.finish, bool):
            raise RequestError(f"SLO: finish must be true or false, got {shown(self.finish)}")
        if self.step < math.inf and self.first == math.inf:
            raise RequestError(
                f"SLO: step={self.step!r} needs first: output k is due at first + k * step"
            )

    @property
    def promises(self) -> bool:
        """Whether anything was promised at all."""
        return self.total < math.inf or self.first < math.inf


def _positive(what: str, value: object) -> float:
    """A number of an SLO as a float; RequestError for anything else."""
    if isinstance(value, Real) and not isinstance(value, bool):
        try:
            number = float(value)
        except (OverflowError, ValueError):
            raise RequestError(f"SLO: {what} is out of range, got {shown(value)}") from None
        if number > 0:
            return number
        raise RequestError(f"SLO: {what} must be greater than 0, got {shown(value)}")
    raise RequestError(f"SLO: {what} must be a number of seconds, got {shown(value)}")


@dataclass(frozen=True, slots=True)
class Request:
    """What a caller asks for. `params` is the caller's: graphs and modules read it, core never.

    Raises:
        RequestError: the id is no string or empty, the arrival is no time >= 0 in seconds, or
            another field is of another type.
    """

    id: str
    graph: Graph
    arrival: float = 0.0
    slo: SLO = SLO()
    params: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.id, str) or not self.id:
            raise RequestError(f"request id must be a string, not empty, got {shown(self.id)}")
        if type(self.id) is not str:  # another class's may compare and hash as it likes
            object.__setattr__(self, "id", str.__str__(self.id))
        kinds = (("graph", Graph, "a Graph"), ("slo", SLO, "an SLO"), ("params", Mapping, "a dict"))
        for what, kind, called in kinds:
            value = getattr(self, what)
            if not isinstance(value, kind):
                raise RequestError(
                    f"request {self.id!r}: {what} must be {called}, got {shown(value)}"
                )
        if not (math.isfinite(self.arrival) and self.arrival >= 0):
            raise RequestError(
                f"request {self.id!r}: arrival must be a finite time >= 0, got {self.arrival!r}"
            )
