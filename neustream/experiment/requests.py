"""What drawing the requests of a workload is made of, whatever they ask for.

Every draw has a seed of its own, so that one key of a config changes one thing. What a trace says of
a request is taken instead of what would be drawn for it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from neustream.config.fields import MOST_WORK
from neustream.config.promises import Slo, SloClass
from neustream.config.workload import Workload
from neustream.core.types import Request
from neustream.errors import ConfigError, nearest
from neustream.experiment.trace_rows import Rows
from neustream.workload import constant_arrivals, gamma_arrivals, with_burst

Params = Mapping[str, Any]


@dataclass(frozen=True)
class Drawn:
    """The requests of a workload in order of arrival.

    `lengths`: outputs after which generations end, by request. `notes`: what the user of a trace
    should know, one sentence each.
    """

    requests: list[Request]
    lengths: Mapping[str, int] = field(default_factory=dict)
    notes: Sequence[str] = ()


def promised(seconds: float | None, scale: float | None, alone: float) -> float:
    """Seconds within which something is due: as given, or a multiple of what it takes alone."""
    if seconds is not None:
        return seconds
    return math.inf if scale is None else scale * alone


def check_work(steps: int) -> None:
    """ConfigError if requests ask for more steps than any machine finishes."""
    if steps > MOST_WORK:
        raise ConfigError(f"workload: its requests ask for {steps} steps in all; allowed: at most {MOST_WORK}")


def arrivals_of(load: Workload, rows: Rows, alone: float) -> list[float]:
    """When requests come that take `alone` seconds one after the other."""
    count = len(rows.rows)
    if load.arrivals == "trace":
        return [row.arrival_s or 0.0 for row in rows.rows]
    rate = load.rate if load.load is None else load.load * count / alone
    if load.arrivals == "constant":
        arrivals = constant_arrivals(count, rate=rate)
    else:
        arrivals = gamma_arrivals(count, rate=rate, cv=load.cv, seed=load.seed)
    changed: NDArray[np.float64] = arrivals
    if load.burst is not None:
        changed = with_burst(arrivals, **load.burst.model_dump())
    return [float(at) for at in changed]


def classes_of(slo: Slo, seed: int, rows: Rows) -> list[SloClass]:
    """Each request's class of promises: the one that its row names, or one drawn by share."""
    drawn = _drawn_classes(slo, seed, len(rows.rows))
    named = {known.name: known for known in slo.classes or () if known.name}
    for at, row in enumerate(rows.rows):
        if row.slo_class is not None and row.slo_class not in named:
            hint = nearest(row.slo_class, named)
            raise ConfigError(f"{rows.where(at)}: slo_class {row.slo_class!r} is no class of the config's slo; {hint}")
    return [
        other if row.slo_class is None else named[row.slo_class] for row, other in zip(rows.rows, drawn, strict=True)
    ]


def _drawn_classes(slo: Slo, seed: int, count: int) -> list[SloClass]:
    if slo.classes is None:
        given = slo.model_dump(exclude_none=True, exclude={"extra_s"})
        return [SloClass(**given)] * count
    share = np.array([c.share for c in slo.classes])
    draw = np.random.default_rng([seed, 1])  # a stream apart from arrivals and steps
    chosen = draw.choice(len(share), count, p=share / share.sum())
    return [slo.classes[int(at)] for at in chosen]
