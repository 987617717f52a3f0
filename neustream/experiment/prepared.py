"""A config made ready: graphs, profiles, pools and requests of its models, the same for every policy."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from operator import attrgetter
from typing import Any

from neustream.config.schema import Config, Experiment
from neustream.config.several import ModelsConfig
from neustream.core.graph import Graph
from neustream.core.kv_cache import KVCache
from neustream.core.learnt_steps import LearntSteps
from neustream.core.policy import Policy, Pool
from neustream.core.profile import LatencyProfile
from neustream.core.scheduler import Scheduler
from neustream.core.steps import PhaseProfile
from neustream.core.types import Request
from neustream.engine.decision_time import DecisionTime
from neustream.engine.executor import Executor
from neustream.engine.member import Member
from neustream.engine.places import Places
from neustream.engine.turns import Turn
from neustream.errors import ConfigError
from neustream.experiment.pipelines import LlmPipeline, Pipeline, pipeline_of
from neustream.experiment.pipelines.stages import check_device
from neustream.experiment.policies import build_policy
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
    placed: Mapping[str, Sequence[Pool]] = field(default_factory=dict)
    """The pools of each device, where devices differ; else each instance has `pools`."""
    truth: Mapping[str, LatencyProfile] = field(default_factory=dict)
    """How long simulated steps really take, of stages whose profiles do not say it."""
    turns: Mapping[str, Turn] = field(default_factory=dict)
    """Of requests that go on with others, by their ids; see `neustream.engine.turns`."""
    at_once: int | None = None
    """The most requests under way; None: no bound."""
    scheduled: bool = True
    """Whether requests that wait for a place get it in order; else turns get it before the others."""

    def bound(self) -> Places:
        """The bound on what is under way, for one replay."""
        return Places(self.at_once, () if self.scheduled else self.turns)

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
        return len(self.placed) or max(experiment.instances for experiment in self.experiments)

    @property
    def places(self) -> dict[str, list[Pool]]:
        """The pools of each member, by its name, which is empty where there is one."""
        if self.placed:
            places = {name: list(pools) for name, pools in self.placed.items()}
        else:
            places = {str(number): list(self.pools) for number in range(self.instances)}
        return places if len(places) > 1 else {"": next(iter(places.values()))}

    def members(self, policy: str | Policy, executors: Sequence[Mapping[str, Executor]]) -> list[Member]:
        """A member for each of `executors` (those of an instance, by pool); see `scheduler`."""
        return [
            Member(self.scheduler(policy, pools=pools), each, name)
            for (name, pools), each in zip(self.places.items(), executors, strict=True)
        ]

    def scheduler(self, policy: str | Policy, *, pools: Sequence[Pool] | None = None) -> Scheduler:
        """A scheduler for pools, by default those of an instance with all models.

        A policy by name gets the config's parameters. Steps are learnt from as in a service: what
        keeps taking other times than profiled corrects the profiles.
        """
        rule = policy_for(self.pipelines, policy) if isinstance(policy, str) else policy
        pools = self.pools if pools is None else pools
        stages = {stage for pool in pools for stage in pool.stages}
        profiles = {name: self.profiles[name] for name in self.profiles if name in stages}
        return Scheduler(pools, rule, learning(profiles), correct=True)


def learning(profiles: Mapping[str, LatencyProfile]) -> dict[str, LatencyProfile]:
    """Profiles whose steps of language models are learnt on, as they are when these are served."""
    learnt: dict[int, LearntSteps] = {}
    found = dict(profiles)
    for name, profile in profiles.items():
        if isinstance(profile, PhaseProfile):
            steps = learnt.setdefault(id(profile.steps), LearntSteps(profile.steps))
            found[name] = PhaseProfile(steps, profile.phase, max_batch=profile.max_batch)
    return found


def prepare(config: Config, params: Mapping[str, Callable[[int], Params]] = {}, *, prefix: str = "") -> Prepared:
    """Load the profiles and draw the workload of a config's model, or of all that it has.

    `params` adds what real models need, by name of the model; "" is the name of one that is alone.
    `prefix` is put in front of the name of an experiment and of its stages' names (in reports and
    traces too), so that it can be merged with others. Of several models the names with a dot are
    prefixes, and in front of the names of their classes of promises.
    """
    if isinstance(config, ModelsConfig):
        return _of_several(config, params)
    assert isinstance(config, Experiment)
    experiment = config
    profiles = pipeline_of(experiment, prefix).load_profiles()
    pipeline = pipeline_of(_with_costs(experiment), prefix)
    truth = pipeline.load_truth(profiles)
    drawn = pipeline.draw(profiles, params.get("", _no_params))
    return Prepared(
        [pipeline],
        pipeline.pools,
        profiles,
        drawn.requests,
        drawn.lengths,
        drawn.notes,
        truth=truth,
    )


def _no_params(at: int) -> Params:
    return {}


def _of_several(config: ModelsConfig, params: Mapping[str, Callable[[int], Params]]) -> Prepared:
    """All models of a config, on the devices that they are placed on."""
    each = []
    for name, experiment in config.experiments().items():
        prepared = prepare(experiment, {"": params.get(name, _no_params)}, prefix=f"{name}.")
        requests = [_of_class(name, request) for request in prepared.requests]
        each.append(replace(prepared, requests=requests))
    profiles = {name: profile for one in each for name, profile in one.profiles.items()}
    pipelines = dict(zip(config.models, (one.pipeline for one in each), strict=True))
    placed = {
        device: [_shared([pipelines[name] for name in names], profiles)] for device, names in config.placed.items()
    }
    return _gathered(each, next(iter(placed.values())), placed)


def _of_class(model: str, request: Request) -> Request:
    """The request, whose class of promises names the model too."""
    name = f"{model}.{request.slo.name}" if request.slo.name else model
    return replace(request, slo=replace(request.slo, name=name))


def _with_costs(experiment: Experiment) -> Experiment:
    """The experiment with what its profiles say of serving, where the config does not say it."""
    costs, simulation = pipeline_of(experiment).costs(), experiment.simulation
    update = {name: cost for name, cost in costs if getattr(simulation, name, 0.0) is None}
    if simulation.decision_s is not None:  # then any decision takes that, as far as nothing more is said
        update = {name: cost for name, cost in update.items() if name not in DecisionTime._fields}
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
    pipelines = [pipeline for one in prepared for pipeline in one.pipelines]
    profiles = {name: profile for one in prepared for name, profile in one.profiles.items()}
    return _gathered(prepared, [_shared(pipelines, profiles)])


def _gathered(
    prepared: Sequence[Prepared],
    pools: Sequence[Pool],
    placed: Mapping[str, Sequence[Pool]] = {},
) -> Prepared:
    """Several experiments on pools that serve them all."""
    requests = [request for one in prepared for request in one.requests]
    _check_names("requests", [request.id for request in requests])
    profiles = {name: profile for one in prepared for name, profile in one.profiles.items()}
    lengths = {id: length for one in prepared for id, length in one.lengths.items()}
    truth = {name: profile for one in prepared for name, profile in one.truth.items()}
    return Prepared(
        [pipeline for one in prepared for pipeline in one.pipelines],
        pools,
        profiles,
        sorted(requests, key=attrgetter("arrival")),
        lengths,
        [note for one in prepared for note in one.notes],
        placed,
        truth,
    )


def _check_names(what: str, names: Sequence[str]) -> None:
    """ConfigError if two have the same name."""
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ConfigError(f"two {what} named {twice!r}: prepare the experiments to merge with prefixes")


def _shared(pipelines: Sequence[Pipeline[Experiment]], profiles: Mapping[str, LatencyProfile]) -> Pool:
    """One pool for the stages of several pipelines, each with one pool of its own before.

    Raises:
        ConfigError: they cannot share a device.
        ProfileError: their profiles are of different devices.
    """
    pools = [pipeline.pools[0] for pipeline in pipelines]
    _check_names("stages", [stage for pool in pools for stage in pool.stages])
    caches: dict[str, KVCache] = {}
    for pool in pools:
        caches |= pool.kv_caches
    texts = [one for one in pipelines if isinstance(one, LlmPipeline)]
    tokens = {one.name: one.pools[0].step_tokens for one in texts}
    if len(set(tokens.values())) > 1:
        raise ConfigError(f"language models of one device need one llm.step_tokens; got {tokens}")
    stages = tuple(stage for pool in pools for stage in pool.stages)
    pool = Pool("gpu", stages, pools[0].workers, pools[0].sticky, caches)
    if tokens:
        pool = replace(pool, step_tokens=next(iter(tokens.values())))
    if not any(pipeline.experiment.simulation.mixed_devices for pipeline in pipelines):
        check_device(pool, profiles)
    return pool


def policy_for(pipelines: Sequence[Pipeline[Experiment]], name: str) -> Policy:
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
    for parameter in dataclasses.fields(first):
        values = [getattr(policy, parameter.name) for policy in policies]
        if isinstance(values[0], Mapping):
            agreed[parameter.name] = {key: value for some in values for key, value in some.items()}
        elif all(value == values[0] for value in values):
            agreed[parameter.name] = values[0]
    try:
        return type(first)(**agreed)
    except TypeError as error:
        raise ConfigError(f"policies.{name}: the merged experiments do not agree on its parameters: {error}") from None
