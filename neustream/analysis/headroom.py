"""How close a policy is to what could be done: the bound and hindsight of a prepared experiment.

What they are is in `bounds/README.md` and `hindsight.py`; here is how the simulated device's truth is handed
to them, and what the results of the command line say of it.
"""

from __future__ import annotations

from typing import Any

from neustream.analysis.bounds import Bound, token_bound, upper_bound
from neustream.analysis.hindsight import Hindsight, served_by
from neustream.config.schema import Simulation
from neustream.core.profile import LatencyProfile
from neustream.core.steps import PhaseProfile
from neustream.engine.report import Report
from neustream.errors import ConfigError
from neustream.experiment.running import Prepared

KNOWN = ("edf", "priced")
"""Policies whose schedules the bound is held against."""


def least_scale(simulation: Simulation) -> float:
    """The least that a step takes of its profiled seconds, but for the overhead."""
    return simulation.latency_scale * min([1.0, *(slow.factor for slow in simulation.slowdowns)])


class TrueProfile:
    """The least that a step of a simulated stage takes: its profile, scaled, and the overhead of a step."""

    def __init__(self, profile: LatencyProfile, simulation: Simulation) -> None:
        self.name = profile.name
        self.device = profile.device
        self.max_batch = profile.max_batch
        self._profile = profile
        self._scale = least_scale(simulation)
        self._overhead_s = simulation.handover_s or 0.0

    def latency(self, batch: int, total: float = 0.0, square: float = 0.0) -> float:
        return self._profile.latency(batch, total, square) * self._scale + self._overhead_s


def true_profiles(prepared: Prepared) -> dict[str, LatencyProfile]:
    """What steps take at least in the simulation of `prepared`, by stage.

    Raises:
        ConfigError: with `latency_noise`, where a step may be arbitrarily fast.
    """
    found: dict[str, LatencyProfile] = {}
    for experiment in prepared.experiments:
        if experiment.simulation.latency_noise:
            raise ConfigError(f"config {experiment.name!r}: there is no bound under simulation.latency_noise")
        for stage in experiment.stages:
            found[stage] = TrueProfile(prepared.profiles[stage], experiment.simulation)
    return found


def bound_of(prepared: Prepared, time_limit_s: float = 100.0) -> Bound:
    """The most weight that any scheduler could serve on time of the workload of `prepared`.

    It is held against the schedules of a few policies, for what a solver claims may be wrong.

    Raises:
        ConfigError: there is no bound for such a config.
        NeustreamError: a policy serves more than was proven to be possible.
    """
    profiles = true_profiles(prepared)
    if any(experiment.llm is not None for experiment in prepared.experiments):
        return _bound_of_llm(prepared, time_limit_s)
    known = [served_by(prepared, policy) for policy in KNOWN]
    return upper_bound(prepared.requests, profiles, prepared.pools, time_limit_s=time_limit_s, known=known)


def _bound_of_llm(prepared: Prepared, time_limit_s: float) -> Bound:
    simulation = prepared.experiment.simulation
    llm, part = prepared.experiment.llm, prepared.profiles["llm.decode"]
    assert llm is not None and isinstance(part, PhaseProfile)
    if llm.instances > 1:
        raise ConfigError(
            f"config {prepared.experiment.name!r}: llm.instances is {llm.instances}, and the bound of an llm is for one"
        )
    (pool,) = prepared.pools
    return token_bound(
        prepared.requests,
        prepared.lengths,
        part.steps,
        pool,
        max_batch=llm.max_batch,
        scale=least_scale(simulation),
        overhead_s=simulation.handover_s or 0.0,
        time_limit_s=time_limit_s,
        known=[served_by(prepared, policy) for policy in KNOWN],
    )


def weight_on_time(report: Report) -> float:
    """What a report's requests on time are worth."""
    return sum(share.weight_on_time for share in report.classes.values())


def headroom(prepared: Prepared, report: Report, bound: Bound | None, best: Hindsight | None) -> dict[str, Any]:
    """What the JSON of a result says of the bound and of hindsight, where they are known.

    Raises:
        NeustreamError: the policy served more than was proven to be possible.
    """
    value = weight_on_time(report)
    out: dict[str, Any] = {}
    if bound is not None:
        span = max(request.arrival for request in prepared.requests) or report.duration
        most = bound.above(value)
        keys = ("relaxed", "proven", "method", "seconds")
        out["bound"] = {"value": most} | {key: getattr(bound, key) for key in keys}
        out["bound"]["goodput_rps"] = most / span if span else None
        out["bound_ratio"] = value / most if most else 1.0
    if best is not None:
        out["hindsight"] = {"value": best.value, "tried": best.tried, "seconds": best.seconds}
        out["hindsight_ratio"] = value / best.value if best.value else 1.0
    return out
