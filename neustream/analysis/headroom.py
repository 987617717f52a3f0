"""How close a policy is to what could be done: the bound and hindsight of a prepared experiment.

What they are is in `bounds/README.md` and `hindsight.py`; here is how the simulated device's truth is handed
to them, and what the results of the command line say of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from neustream.analysis.agent_ways import Ways
from neustream.analysis.bounds import Bound, Devices, agent_bound, token_bound, upper_bound
from neustream.analysis.bounds.agents.upper import Model
from neustream.analysis.bounds.tokens.costs import Limits
from neustream.analysis.hindsight import Hindsight, served_by
from neustream.config.cluster import ClusterConfig
from neustream.config.schema import Experiment, Simulation
from neustream.core.profile import LatencyProfile
from neustream.core.steps import PhaseProfile
from neustream.engine.report import Report
from neustream.errors import ConfigError
from neustream.experiment.pipelines import LlmPipeline, Pipeline, StagesPipeline
from neustream.experiment.pipelines.agent import AgentPipeline
from neustream.experiment.prepared import Prepared
from neustream.experiment.roles import roles_of

KNOWN = ("edf", "priced")
"""Policies whose schedules the bound is held against."""


def least_scale(simulation: Simulation) -> float:
    """The least that a step takes of its profiled seconds, but for the overhead."""
    return (simulation.latency_scale or 1.0) * min([1.0, *(slow.factor for slow in simulation.slowdowns)])


class TrueProfile:
    """The least that a step of a simulated stage takes: what is true of it, scaled, and the handover."""

    def __init__(self, profile: LatencyProfile, simulation: Simulation, faster: float = 1.0) -> None:
        self.name = profile.name
        self.device = profile.device
        self.max_batch = profile.max_batch
        self._profile = profile
        self._scale = least_scale(simulation) * faster
        self._overhead_s = simulation.handover_s or 0.0

    def latency(self, batch: int, total: float = 0.0, square: float = 0.0) -> float:
        return self._profile.latency(batch, total, square) * self._scale + self._overhead_s


def true_profiles(prepared: Prepared) -> dict[str, LatencyProfile]:
    """What steps take at least in the simulation of `prepared`, by stage.

    Raises:
        ConfigError: with `latency_noise`, where a step may be arbitrarily fast.
    """
    found: dict[str, LatencyProfile] = {}
    for pipeline in prepared.pipelines:
        simulation = pipeline.experiment.simulation
        if simulation.latency_noise:
            raise ConfigError(f"config {pipeline.name!r}: there is no bound under simulation.latency_noise")
        for stage in pipeline.stages:
            profile = prepared.truth.get(stage, prepared.profiles[stage])
            found[stage] = TrueProfile(profile, simulation)
    return found


def bound_of(prepared: Prepared, time_limit_s: float = 100.0, known: Sequence[str] = KNOWN) -> Bound:
    """The most weight that any scheduler could serve on time of the workload of `prepared`.

    It is held against the schedules of the policies `known`, for what a solver claims may be wrong.

    Raises:
        ConfigError: there is no bound for such a config.
        NeustreamError: a policy serves more than was proven to be possible.
    """
    if prepared.instances > 1:
        first, count = prepared.pipelines[0].name, prepared.instances
        raise ConfigError(f"config {first!r}: devices are {count}, and the bound is for one")
    cluster = prepared.experiments[0].cluster
    if cluster is not None:
        return _bound_of_cluster(prepared, cluster, time_limit_s, known)
    kinds = {type(pipeline) for pipeline in prepared.pipelines}
    names = ", ".join(pipeline.name for pipeline in prepared.pipelines)
    if AgentPipeline in kinds and len(prepared.pipelines) > 1:
        raise ConfigError(f"there is no bound for an agent beside others: {names}")
    if len(kinds) > 1:
        raise ConfigError(f"there is no bound for a language model that shares its device: {names}")
    return BOUNDS[kinds.pop()](prepared, time_limit_s, known)


def _bound_of_stages(prepared: Prepared, time_limit_s: float, known: Sequence[str]) -> Bound:
    profiles = true_profiles(prepared)
    return upper_bound(
        prepared.requests,
        profiles,
        prepared.pools,
        time_limit_s=time_limit_s,
        known=[served_by(prepared, policy) for policy in known],
    )


def _bound_of_cluster(prepared: Prepared, cluster: ClusterConfig, time_limit_s: float, known: Sequence[str]) -> Bound:
    """That of all instances together, whatever is routed and moved; nothing takes time on its way."""
    name = prepared.pipelines[0].name
    if cluster.scaler:
        raise ConfigError(
            f"config {name!r}: with cluster.scaler the bound would depend on how many instances there are"
        )
    if any(isinstance(pipeline, LlmPipeline | AgentPipeline) for pipeline in prepared.pipelines):
        raise ConfigError(f"config {name!r}: there is no bound for language models on several instances")
    true_profiles(prepared)  # tells what there is no bound for
    faster = min([1.0, *(fault.factor for fault in cluster.faults if fault.kind == "slow")])
    truth = {**prepared.profiles, **prepared.truth} if prepared.truth else {}
    simulations = {stage: one.experiment.simulation for one in prepared.pipelines for stage in one.stages}
    first, *others = [
        Devices(
            {
                stage: TrueProfile(truth.get(stage, profile), simulations[stage], faster)
                for stage, profile in role.profiles.items()
            },
            [replace(pool, workers=pool.workers * cluster.kinds[kind].count) for pool in role.pools],
        )
        for kind, role in roles_of(prepared, cluster).items()
        if cluster.kinds[kind].count
    ]
    return upper_bound(
        prepared.requests,
        first.profiles,
        first.pools,
        others=others,
        time_limit_s=time_limit_s,
        known=[served_by(prepared, policy) for policy in known],
    )


def _bound_of_llm(prepared: Prepared, time_limit_s: float, known: Sequence[str]) -> Bound:
    true_profiles(prepared)  # tells what there is no bound for
    pipeline = prepared.pipeline
    simulation, part = pipeline.experiment.simulation, prepared.profiles[pipeline.main_stage]
    assert isinstance(part, PhaseProfile)
    (pool,) = prepared.pools
    return token_bound(
        prepared.requests,
        prepared.lengths,
        part.steps,
        pool,
        max_batch=part.max_batch,
        scale=least_scale(simulation),
        overhead_s=simulation.handover_s or 0.0,
        time_limit_s=time_limit_s,
        known=[served_by(prepared, policy) for policy in known],
    )


def _bound_of_agent(prepared: Prepared, time_limit_s: float, known: Sequence[str]) -> Bound:
    profiles, pipeline = true_profiles(prepared), prepared.pipeline
    assert isinstance(pipeline, AgentPipeline)
    simulation, models = pipeline.experiment.simulation, {}
    for pool in prepared.pools:
        for label in pipeline.replicas_of(pool.stages).values():
            part = prepared.profiles[f"{label}.decode"]
            assert isinstance(part, PhaseProfile)
            cache = pool.kv_caches.get(label)
            limits = Limits(
                part.max_batch,
                None if cache is None else cache.capacity,
                least_scale(simulation),
                simulation.handover_s or 0.0,
            )
            models[label] = Model(part.steps, limits, pool.name)
    ways = Ways(pipeline, profiles)
    return agent_bound(
        prepared.requests,
        {request.id: ways.of(request) for request in prepared.requests},
        models,
        time_limit_s=time_limit_s,
        known=[served_by(prepared, policy) for policy in known],
    )


BOUNDS: Mapping[type[Pipeline[Experiment]], Callable[[Prepared, float, Sequence[str]], Bound]] = {
    StagesPipeline: _bound_of_stages,
    LlmPipeline: _bound_of_llm,
    AgentPipeline: _bound_of_agent,
}


def weight_on_time(report: Report) -> float:
    """What a report's requests on time are worth."""
    return sum(share.weight_on_time for share in report.classes.values())


def headroom(prepared: Prepared, report: Report, bound: Bound | None, best: Hindsight | None) -> dict[str, Any]:
    """What the JSON of a result says of the bound and of hindsight, where they are known.

    Values are weights on time (requests, where each weighs 1), `goodput_rps` so much a second; the
    bound's `weight` is that of all requests.

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
        out["bound"]["weight"] = sum(share.weight for share in report.classes.values())
        out["bound_ratio"] = value / most if most else 1.0
    if best is not None:
        out["hindsight"] = {"value": best.value, "tried": best.tried, "seconds": best.seconds}
        out["hindsight_ratio"] = value / best.value if best.value else 1.0
    return out
