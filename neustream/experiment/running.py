"""From a validated config to something that runs: graph, requests, policy, engine, report.

`simulate` and `serve` differ in the clock and the executors that they hand to the same engine.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from operator import attrgetter
from typing import Any

import numpy as np
from pydantic import ValidationError

from neustream.config.messages import explain
from neustream.config.schema import SWEEPABLE, Experiment, Simulation
from neustream.core.batch import Batch
from neustream.core.graph import Graph
from neustream.core.policy import Policy, Pool
from neustream.core.profile import LatencyProfile
from neustream.core.scheduler import Scheduler
from neustream.core.types import Request
from neustream.engine.clock import VirtualClock, WallClock
from neustream.engine.engine import Engine
from neustream.engine.events import Observer
from neustream.engine.executor import Executor, ProfiledExecutor
from neustream.engine.member import Member
from neustream.engine.report import Report
from neustream.errors import ConfigError, nearest
from neustream.experiment.pipelines import LlmPipeline, Pipeline, pipeline_of
from neustream.experiment.pipelines.stages import check_device
from neustream.experiment.policies import build_policy, policy_faults
from neustream.experiment.requests import Params


@dataclass(frozen=True)
class Prepared:
    """An experiment made ready: the same requests and profiles for every policy.

    After `merge` several of them, each with a graph of its own, on the same pool.
    """

    pipelines: Sequence[Pipeline[Experiment]]
    pools: Sequence[Pool]
    profiles: Mapping[str, LatencyProfile]
    requests: Sequence[Request]
    lengths: Mapping[str, int] = field(default_factory=dict)
    """Outputs after which generations end, by request: what only the simulated device knows."""
    notes: Sequence[str] = ()
    """What the user of a trace should know of how it was read, one sentence each."""

    @property
    def experiments(self) -> list[Experiment]:
        """The experiment of each pipeline."""
        return [pipeline.experiment for pipeline in self.pipelines]

    @property
    def graphs(self) -> list[Graph]:
        """The graph of each pipeline."""
        return [pipeline.graph for pipeline in self.pipelines]

    @property
    def pipeline(self) -> Pipeline[Experiment]:
        """The pipeline, where there is one."""
        (pipeline,) = self.pipelines
        return pipeline

    @property
    def experiment(self) -> Experiment:
        """The experiment, where there is one."""
        return self.pipeline.experiment

    @property
    def graph(self) -> Graph:
        """Its graph, where there is one."""
        return self.pipeline.graph

    @property
    def instances(self) -> int:
        """How many there are of what serves."""
        return max(experiment.instances for experiment in self.experiments)

    def members(
        self, policy: str | Policy, executors: Sequence[Mapping[str, Executor]], *, learn: bool = False
    ) -> list[Member]:
        """A member for each of `executors` (those of an instance, by pool); see `scheduler`."""
        names = [str(number) for number in range(len(executors))] if len(executors) > 1 else [""]
        return [
            Member(self.scheduler(policy, learn=learn), each, name) for name, each in zip(names, executors, strict=True)
        ]

    def scheduler(self, policy: str | Policy, *, learn: bool = False) -> Scheduler:
        """A scheduler for its pools; a policy by name gets the config's parameters.

        `learn`: whether the steps of a language model that run correct its profile.
        """
        rule = _policy_for(self.pipelines, policy) if isinstance(policy, str) else policy
        profiles = dict(self.profiles)
        for pipeline in self.pipelines if learn else ():
            profiles |= pipeline.learning({name: profiles[name] for name in pipeline.stages})
        return Scheduler(self.pools, rule, profiles)


def prepare(experiment: Experiment, params: Callable[[int], Params] = lambda at: {}, *, prefix: str = "") -> Prepared:
    """Load the profiles and draw the workload of an experiment.

    `prefix` is put in front of its name and of its stages' names (in reports and traces too), so
    that it can be merged with others.
    """
    profiles = pipeline_of(experiment, prefix).load_profiles()
    pipeline = pipeline_of(_with_costs(experiment), prefix)
    drawn = pipeline.draw(profiles, params)
    return Prepared([pipeline], pipeline.pools, profiles, drawn.requests, drawn.lengths, drawn.notes)


def _with_costs(experiment: Experiment) -> Experiment:
    """The experiment with what its profiles say of serving, where the config does not say it."""
    costs, simulation = pipeline_of(experiment).costs(), experiment.simulation
    update = {name: cost for name, cost in costs if getattr(simulation, name) is None}
    return experiment.model_copy(update={"simulation": simulation.model_copy(update=update)})


def merge(prepared: Sequence[Prepared]) -> Prepared:
    """The requests of several experiments in order of arrival, on one pool "gpu" with all of their stages.

    Each has a pool of its own before, all with as many workers; stages, and ids of requests, are
    told apart by the prefixes that they were prepared with. In simulations each experiment's stages
    keep its `simulation`. A policy gets those parameters that all the experiments agree on (the
    `slo_scale` that follows from the SLO is one), of mappings all entries, and its defaults beside.
    """
    pools = [pool for one in prepared for pool in one.pools]
    if len(pools) != len(prepared) or len({(pool.workers, pool.sticky) for pool in pools}) != 1:
        shown = [(pool.name, pool.workers, pool.sticky) for pool in pools]
        raise ConfigError(f"experiments to merge need one pool each, all alike; got (name, workers, sticky): {shown}")
    stages = [stage for pool in pools for stage in pool.stages]
    requests = sorted((request for one in prepared for request in one.requests), key=attrgetter("arrival"))
    for what, names in (("stages", stages), ("requests", [request.id for request in requests])):
        if len(set(names)) < len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise ConfigError(f"two {what} named {twice!r}: prepare the experiments to merge with prefixes")
    pool = Pool("gpu", tuple(stages), pools[0].workers, pools[0].sticky)
    profiles = {name: profile for one in prepared for name, profile in one.profiles.items()}
    check_device(pool, profiles)
    pipelines = [pipeline for one in prepared for pipeline in one.pipelines]
    if any(isinstance(pipeline, LlmPipeline) for pipeline in pipelines):
        raise ConfigError("an llm cannot be merged with others yet")
    notes = [note for one in prepared for note in one.notes]
    return Prepared(pipelines, [pool], profiles, requests, notes=notes)


def _policy_for(pipelines: Sequence[Pipeline[Experiment]], name: str) -> Policy:
    """The policy `name` with the parameters that all the experiments give it."""
    experiments = [pipeline.experiment for pipeline in pipelines]
    policies = [build_policy(one.experiment, name, prefix=one.prefix) for one in pipelines]
    first = policies[0]
    if len(policies) == 1:
        return first
    if not dataclasses.is_dataclass(first):
        if any(experiment.policies.get(name) != experiments[0].policies.get(name) for experiment in experiments):
            raise ConfigError(f"policies.{name}: the merged experiments do not agree on its parameters")
        return first
    agreed: dict[str, Any] = {}
    for name in [parameter.name for parameter in dataclasses.fields(first)]:
        values = [getattr(policy, name) for policy in policies]
        if isinstance(values[0], Mapping):
            agreed[name] = {key: value for some in values for key, value in some.items()}
        elif all(value == values[0] for value in values):
            agreed[name] = values[0]
    try:
        return type(first)(**agreed)
    except TypeError as error:
        raise ConfigError(f"policies.{name}: the merged experiments do not agree on its parameters: {error}") from None


def simulate(
    prepared: Prepared,
    policy: str | Policy,
    observers: Sequence[Observer] = (),
    speed: Mapping[str, float] = {},
) -> Report:
    """Serve the workload in virtual time, steps taking as long as the profiles say.

    `speed` asks what the simulator says at a speed that was observed (`Report.profile_error`): it
    multiplies the profiled latencies of stages in place of what the config says under
    `simulation`; policies go on planning with the profiles.
    """
    decision_s = 0.0
    handovers: dict[str, float] = {}
    stretches: dict[str, Callable[[Batch], float]] = {}
    for pipeline in prepared.pipelines:
        simulation = Simulation() if speed else pipeline.experiment.simulation
        stretch = _stretch(simulation, pipeline.experiment.workload.seed)
        decision_s = max(decision_s, simulation.decision_s or 0.0)
        handovers |= dict.fromkeys(pipeline.labels, simulation.handover_s or 0.0)
        stretches |= dict.fromkeys(pipeline.labels, stretch)

    def factor(batch: Batch) -> float:
        return stretches[batch.stage](batch) * speed.get(batch.stage, 1.0)

    outcome = partial(_outcome, prepared.lengths) if prepared.lengths else None
    executor = ProfiledExecutor(handover_s=handovers, stretch=factor, outcome=outcome)
    executors = dict.fromkeys((pool.name for pool in prepared.pools), executor)
    members = prepared.members(policy, [executors] * prepared.instances)
    engine = Engine(members, VirtualClock(decision_s), observers)
    with policy_faults(policy):
        return engine.run(prepared.requests)


def _outcome(lengths: Mapping[str, int], batch: Batch) -> list[dict[str, bool]]:
    """Which generations end with the output of this step."""
    return [{"ended": True} if job.call_outputs + 1 >= lengths[job.id] else {} for job in batch.jobs]


def _stretch(simulation: Simulation, seed: int) -> Callable[[Batch], float]:
    """How many times its profiled latency a step takes."""
    noise, sigma = np.random.RandomState(seed), simulation.latency_noise

    def factor(batch: Batch) -> float:
        times = simulation.latency_scale
        if sigma:
            times *= float(np.exp(sigma * noise.standard_normal()))
        for slow in simulation.slowdowns:
            if 0 <= batch.started_at - slow.start_s < slow.duration_s:
                times *= slow.factor
        return times

    return factor


def serve(
    prepared: Prepared,
    policy: str,
    executors: Sequence[Mapping[str, Executor]],
    observers: Sequence[Observer] = (),
    started: Callable[[Engine], None] = lambda engine: None,
) -> Report:
    """Serve the workload in real time; `started` gets the engine.

    `executors`: of each instance, by pool; they stay open.
    """
    engine = Engine(prepared.members(policy, executors, learn=True), WallClock(), observers)
    started(engine)
    with policy_faults(policy):
        return engine.run(prepared.requests)


def record(experiment: Experiment, policy: str, report: Report) -> dict[str, Any]:
    """One entry of the JSON that `simulate`, `sweep` and `run` write."""
    return {"policy": policy, "config": experiment.name, "seed": experiment.workload.seed, **report.to_dict()}


def sweep_points(experiment: Experiment, over: str, values: Sequence[float]) -> Iterator[tuple[float, Experiment]]:
    """The experiment at each value of a key of `SWEEPABLE`."""
    section, _, key = over.partition(".")
    if over not in SWEEPABLE:
        raise ConfigError(f"cannot sweep {over!r}; {nearest(over, SWEEPABLE)}")
    part = getattr(experiment, section)
    load = experiment.workload
    unused = (load.arrivals == "trace") != (key == "speed") or (key == "cv" and load.arrivals != "gamma")
    unused = section == "workload" and (unused or (key == "rate" and load.load is not None))
    if getattr(part, key) is None or unused:
        raise ConfigError(f"cannot sweep {over}: config {experiment.name!r} does not use it")
    for value in values:
        try:
            changed = type(part).model_validate({**part.model_dump(exclude_unset=True), key: value})
        except ValidationError as error:
            raise ConfigError(f"cannot sweep {over}: {explain(error, type(part))}") from None
        yield value, experiment.model_copy(update={section: changed})
