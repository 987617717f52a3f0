"""From a validated config to something that runs: graph, requests, policy, engine, report.

`simulate` and `serve` differ in the clock and the executors that they hand to the same engine.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ValidationError

from neustream.config.messages import explain
from neustream.config.schema import SWEEPABLE, Experiment, Simulation, StageConfig
from neustream.core.batch import Batch
from neustream.core.graph import Graph, Node, Stage, loop, seq
from neustream.core.job import Job
from neustream.core.kv_cache import KVCache
from neustream.core.policy import Policy, Pool
from neustream.core.profile import LatencyProfile
from neustream.core.scheduler import Scheduler
from neustream.core.steps import LearntSteps, PhaseProfile
from neustream.core.types import Request
from neustream.engine.clock import VirtualClock, WallClock
from neustream.engine.engine import Engine
from neustream.engine.events import Observer
from neustream.engine.executor import Executor, ProfiledExecutor
from neustream.engine.member import Member
from neustream.engine.report import Report
from neustream.errors import ConfigError, ProfileError, nearest
from neustream.experiment.policies import build_policy, policy_faults
from neustream.experiment.requests import Params, draw
from neustream.graphs import llm, llm_profiles
from neustream.profiling.files import load_costs, load_stage
from neustream.profiling.steps import load_steps


def build_graph(experiment: Experiment) -> Graph:
    """The pipeline of the config: its stages in order, looped where they say `times`; the last emits."""
    if experiment.llm is not None:
        return Graph(experiment.name, llm("llm", max_batch=experiment.llm.max_batch))
    names = list(experiment.stages)
    nodes: list[Node] = []
    for name, config in experiment.stages.items():
        stage = Stage(name, max_batch=config.max_batch, emits=name == names[-1])
        nodes.append(stage if config.times is None else loop(stage, times=partial(_param, config.times)))
    return Graph(experiment.name, seq(*nodes))


def _param(name: str, job: Job) -> Any:
    return job.params[name]


def load_profiles(experiment: Experiment) -> dict[str, LatencyProfile]:
    """The profile of each stage; those of one pool must come from one device."""
    profiles: dict[str, LatencyProfile] = {}
    if experiment.llm is not None:
        steps = load_steps(experiment.profiles / f"{experiment.llm.profile}.json")
        return llm_profiles("llm", steps, experiment.llm.max_batch)
    for name, stage in experiment.stages.items():
        profiles[name] = load_stage(name, _files(experiment.profiles, name, stage))
    for pool in build_pools(experiment):
        _check_device(pool, profiles)
    return profiles


def profile_files(experiment: Experiment) -> list[Path]:
    """The files that `load_profiles` reads."""
    if experiment.llm is not None:
        return [experiment.profiles / f"{experiment.llm.profile}.json"]
    return [file for name, stage in experiment.stages.items() for file in _files(experiment.profiles, name, stage)]


def _check_device(pool: Pool, profiles: Mapping[str, LatencyProfile]) -> None:
    devices = {name: profiles[name].device for name in pool.stages}
    if len(set(devices.values())) > 1:
        raise ProfileError(f"pool {pool.name!r} mixes profiles of different devices: {devices}")


def _files(folder: Path, name: str, stage: StageConfig) -> list[Path]:
    return [folder / f"{part}.json" for part in stage.profile or [name]]


def build_pools(experiment: Experiment) -> list[Pool]:
    if experiment.llm is not None:
        kv = experiment.llm.memory
        caches = {} if kv is None else {"llm": KVCache(kv.tokens // kv.block, kv.block)}
        return [Pool("gpu", tuple(experiment.stages), kv_caches=caches, step_tokens=experiment.llm.step_tokens)]
    return [
        Pool(name, tuple(s for s, stage in experiment.stages.items() if stage.pool == name), pool.workers, pool.sticky)
        for name, pool in experiment.pools.items()
    ]


# -- running ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Prepared:
    """An experiment made ready: the same requests and profiles for every policy.

    After `merge` several of them, each with a graph of its own, on the same pool.
    """

    experiments: Sequence[Experiment]
    graphs: Sequence[Graph]
    pools: Sequence[Pool]
    profiles: Mapping[str, LatencyProfile]
    requests: Sequence[Request]
    lengths: Mapping[str, int] = field(default_factory=dict)
    """Outputs after which generations end, by request: what only the simulated device knows."""
    notes: Sequence[str] = ()
    """What the user of a trace should know of how it was read, one sentence each."""

    @property
    def experiment(self) -> Experiment:
        """The experiment, where there is one."""
        (experiment,) = self.experiments
        return experiment

    @property
    def graph(self) -> Graph:
        """Its graph, where there is one."""
        (graph,) = self.graphs
        return graph

    @property
    def instances(self) -> int:
        """How many there are of what serves."""
        counts = [1 if experiment.llm is None else experiment.llm.instances for experiment in self.experiments]
        return max(counts)

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
        rule = _policy_for(self.experiments, policy) if isinstance(policy, str) else policy
        profiles = dict(self.profiles)
        for name, profile in self.profiles.items() if learn else ():
            if isinstance(profile, PhaseProfile) and profile.phase == "prefill":
                label = name.removesuffix(".prefill")
                profiles |= llm_profiles(label, LearntSteps(profile.steps), profile.max_batch)
        return Scheduler(self.pools, rule, profiles)


def prepare(experiment: Experiment, params: Callable[[int], Params] = lambda at: {}, *, prefix: str = "") -> Prepared:
    """Load the profiles and draw the workload of an experiment.

    `prefix` is put in front of its name and of its stages' names (in reports and traces too), so that
    it can be merged with others; the policies' parameters stay those of the config.
    """
    if prefix and experiment.llm is not None:
        raise ConfigError(f"config {experiment.name!r}: an llm cannot be merged with others yet")
    if prefix:
        experiment = _prefixed(experiment, prefix)
    graph, profiles = build_graph(experiment), load_profiles(experiment)
    experiment = _with_costs(experiment)
    pools = build_pools(experiment)
    drawn = draw(experiment, graph, profiles, params)
    return Prepared([experiment], [graph], pools, profiles, drawn.requests, drawn.lengths, drawn.notes)


def _with_costs(experiment: Experiment) -> Experiment:
    """The experiment with what its profiles say of serving, where the config does not say it."""
    costs, simulation = load_costs(profile_files(experiment)), experiment.simulation
    update = {name: cost for name, cost in costs if getattr(simulation, name) is None}
    return experiment.model_copy(update={"simulation": simulation.model_copy(update=update)})


def _prefixed(experiment: Experiment, prefix: str) -> Experiment:
    stages = {
        prefix + name: stage.model_copy(update={"profile": stage.profile or [name]})
        for name, stage in experiment.stages.items()
    }
    policies = {name: dict(given) for name, given in experiment.policies.items()}
    for given in policies.values():
        if isinstance(plan := given.get("plan"), dict):
            given["plan"] = {f"{prefix}{stage}": files for stage, files in plan.items()}
    changed = {"name": prefix + experiment.name, "stages": stages, "policies": policies}
    return experiment.model_copy(update=changed)


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
    _check_device(pool, profiles)
    experiments = [experiment for one in prepared for experiment in one.experiments]
    graphs = [graph for one in prepared for graph in one.graphs]
    notes = [note for one in prepared for note in one.notes]
    return Prepared(experiments, graphs, [pool], profiles, requests, notes=notes)


def _policy_for(experiments: Sequence[Experiment], name: str) -> Policy:
    """The policy `name` with the parameters that all the experiments give it."""
    policies = [build_policy(experiment, name) for experiment in experiments]
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
    for experiment in prepared.experiments:
        simulation = Simulation() if speed else experiment.simulation
        stretch = _stretch(simulation, experiment.workload.seed)
        handover_s = simulation.handover_s or 0.0
        decision_s = max(decision_s, simulation.decision_s or 0.0)
        handovers |= dict.fromkeys(experiment.stages, handover_s)
        stretches |= dict.fromkeys(experiment.stages, stretch)
        if experiment.llm is not None:  # steps of both of its stages
            handovers["llm"], stretches["llm"] = handover_s, stretch

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
