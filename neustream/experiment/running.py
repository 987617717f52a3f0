"""From a validated config to something that runs: graph, requests, policy, engine, report.

`simulate` drives the same engine as a service does, on another clock, with other executors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
from pydantic import ValidationError

from neustream.cluster.ways import Took
from neustream.config import ModelsConfig, experiments_of
from neustream.config.cluster import ClusterConfig
from neustream.config.fields import Factor, Section
from neustream.config.messages import explain
from neustream.config.schema import Config, Experiment, Model, Simulation
from neustream.config.workload import Workload
from neustream.core.batch import Batch
from neustream.core.policy import Policy
from neustream.engine.clock import VirtualClock
from neustream.engine.decision_time import AT_ONCE, DecisionTime
from neustream.engine.engine import Engine
from neustream.engine.events import Observer, Record
from neustream.engine.executor import BRIEF_S, Executor, ProfiledExecutor
from neustream.engine.report import Report
from neustream.errors import ConfigError, nearest
from neustream.experiment.calls import Calls
from neustream.experiment.clusters import Bench, parted, simulate_cluster
from neustream.experiment.ends import Ends
from neustream.experiment.pipelines import Pipeline
from neustream.experiment.policies import policy_faults
from neustream.experiment.prepared import Prepared, policy_for


def simulate(
    prepared: Prepared,
    policy: str | Policy,
    observers: Sequence[Observer] = (),
    speed: Mapping[str, float] = {},
    device: Simulation | None = None,
    took: Callable[[Batch], float] | None = None,
    cluster: ClusterConfig | None = None,
    ways: Took | None = None,
) -> Report:
    """Serve the workload in virtual time, steps taking as long as the profiles say.

    What policies plan with is learnt from the steps as in a service. `speed` asks what the
    simulator says at a speed that was observed (`Report.profile_error`): it multiplies the profiled
    latencies of stages in place of what the config says under `simulation`. `took` does so step by
    step (`Took`), calls of tools too, in place of what is drawn for them. `device` says the rest in
    the config's place.
    `cluster`: another one than the config's; `ways`: what messages in it took where it was served.
    Outside of clusters turns of conversations, and requests that wait for a place, take nothing of the
    steps beside them (`call_s`): nobody knows their instants beforehand.
    """
    observed = bool(speed) or took is not None
    costs = _costs(prepared, Simulation() if observed and device is None else device)

    def factor(batch: Batch) -> float:
        times = costs.stretches[batch.stage](batch) * speed.get(batch.stage, 1.0)
        return times if took is None else times * took(batch)

    generates = prepared.lengths or any(one.kind == "agent" for one in prepared.pipelines)
    ends = Ends(prepared.lengths) if generates else None
    real = {} if observed or device is not None else prepared.truth
    cluster = cluster or prepared.experiments[0].cluster
    if cluster is not None:
        seconds = costs.decision, costs.call_s
        bench = Bench(factor, ends, costs.handovers, real, *seconds, alone_s=costs.alone_s, ways=ways)
        return _on_cluster(prepared, cluster, policy, bench, observers)
    truth = {**prepared.profiles, **real}  # what is learnt changes no device
    beside = None
    if costs.call_s and prepared.at_once is None:
        arrivals = [request.arrival for request in prepared.requests if request.id not in prepared.turns]
        beside = Calls(arrivals, costs.call_s).beside
    executor = ProfiledExecutor(
        truth,
        handover_s=costs.handovers,
        stretch=factor,
        beside=beside,
        outcome=ends,
        quiet=None if ends is None else ends.quiet,
        alone_s=costs.alone_s,
    )
    own = (
        {} if took is not None else {name: made for one in prepared.pipelines for name, made in one.executors().items()}
    )
    members = prepared.members(policy, _executors(prepared, executor, own))
    engine = Engine(members, VirtualClock(costs.decision), observers)
    with policy_faults(policy):
        return engine.run(prepared.requests, call_s=costs.call_s, turns=prepared.turns, places=prepared.bound())


@dataclass
class _Costs:
    """What a simulated device adds to the profiles; the dicts are by stage.

    `alone_s`: steps shorter than that have no decision beside them.
    `decision`, `call_s`: of a decision and of a call of `submit`. `handovers`: seconds between a
    step's end and the next. `stretches`: how many times its profiled latency a step takes.
    """

    decision: DecisionTime = AT_ONCE
    alone_s: float = BRIEF_S
    call_s: float = 0.0
    handovers: dict[str, float] = field(default_factory=dict)
    stretches: dict[str, Callable[[Batch], float]] = field(default_factory=dict)


def _costs(prepared: Prepared, device: Simulation | None) -> _Costs:
    """What `device` says, or, if it is None, each pipeline's own config."""
    costs = _Costs(alone_s=min([_alone_s(device, each.experiment.simulation) for each in prepared.pipelines]))
    for pipeline in prepared.pipelines:
        simulation = device or pipeline.experiment.simulation
        stretch = _stretch(simulation, _noise(pipeline))
        costs.decision = DecisionTime(*map(max, costs.decision, _decision(simulation)))
        costs.call_s = max(costs.call_s, simulation.call_s or 0.0)
        costs.handovers |= dict.fromkeys(pipeline.labels, simulation.handover_s or 0.0)
        costs.stretches |= dict.fromkeys(pipeline.labels, stretch)
    return costs


def _decision(simulation: Simulation) -> DecisionTime:
    """What a decision takes; what nobody says is nothing."""
    return DecisionTime(*[getattr(simulation, name) or 0.0 for name in DecisionTime._fields])


def _alone_s(*simulations: Simulation | None) -> float:
    """Of the first of these that says how short steps are that have Python to themselves."""
    return next((one.alone_s for one in simulations if one is not None and one.alone_s is not None), BRIEF_S)


def _on_cluster(
    prepared: Prepared,
    cluster: ClusterConfig,
    policy: str | Policy,
    bench: Bench,
    observers: Sequence[Observer],
) -> Report:
    """The same on the instances of a cluster; a policy by name may name a router too."""
    rule, router = policy, ""
    if isinstance(policy, str):
        name, router = parted(policy)
        rule = policy_for(prepared.pipelines, name)
    assert not isinstance(rule, str)
    with policy_faults(policy):
        return simulate_cluster(prepared, cluster, rule, router, bench, observers)


def _executors(prepared: Prepared, executor: Executor, own: Mapping[str, Executor]) -> list[dict[str, Executor]]:
    """By pool, for each place: its `own`, or `executor`."""
    return [{pool.name: own.get(pool.name, executor) for pool in pools} for pools in prepared.places.values()]


def _noise(pipeline: Pipeline[Experiment]) -> np.random.RandomState:
    """What a model's noise is drawn from: by its seed, and by its name where it is one of several."""
    seed = pipeline.experiment.workload.seed
    return np.random.RandomState([seed, *pipeline.prefix.encode()] if pipeline.prefix else seed)


def _stretch(simulation: Simulation, noise: np.random.RandomState) -> Callable[[Batch], float]:
    """How many times its profiled latency a step takes."""
    sigma = simulation.latency_noise

    def factor(batch: Batch) -> float:
        times = simulation.latency_scale or 1.0
        if sigma:
            times *= float(np.exp(sigma * noise.standard_normal()))
        for slow in simulation.slowdowns:
            if 0 <= batch.started_at - slow.start_s < slow.duration_s:
                times *= slow.factor
        return times

    return factor


class ByModel:
    """An observer that keeps a report of each of several models, by the prefixes of ids."""

    def __init__(self, config: Config) -> None:
        names = config.models if isinstance(config, ModelsConfig) else ()
        self.reports = {name: Report() for name in names}

    def __call__(self, record: Record) -> None:
        id = getattr(record, "id", None)  # steps are of several models
        if id is not None and self.reports:
            self.reports[id.partition(".")[0]](record)


OF_THE_DEVICE = ("batch_size", "decisions", "decision_us", "busy_s", "profile_error")
"""What a report of one of several models does not tell, since its steps are not told apart."""


def record(config: Config, policy: str, report: Report, by_model: ByModel | None = None) -> dict[str, Any]:
    """One entry of the JSON that `simulate`, `sweep` and `run` write.

    Of several models there is a part for each, with its own latencies and outputs (an image is no
    first token), and the seed of each.
    """
    entry = {"policy": policy, "config": config.name}
    if isinstance(config, ModelsConfig):
        assert by_model is not None
        seeds = {name: model.workload.seed for name, model in config.models.items()}
        told = {name: one.to_dict() for name, one in by_model.reports.items()}
        parts = {
            name: {key: value for key, value in part.items() if key not in OF_THE_DEVICE} for name, part in told.items()
        }
        whole = {key: value for key, value in report.to_dict().items() if key != "tokens"}
        return {**entry, "seed": seeds, **whole, "models": parts}
    (experiment,) = experiments_of(config)
    return {**entry, "seed": experiment.workload.seed, **report.to_dict()}


class Speed(Section):
    """How many times as fast the arrivals of all models come."""

    speed: Factor


Swept = TypeVar("Swept", bound=Config)


def sweep_points(config: Swept, over: str, values: Sequence[float]) -> Iterator[tuple[float, Swept]]:
    """The config at each value of a key that may be swept; ConfigError for one that it does not use."""
    if over not in config.sweepable:
        raise ConfigError(f"cannot sweep {over!r}; {nearest(over, config.sweepable)}")
    for value in values:
        yield value, _changed(config, over, value)


def _changed(config: Swept, over: str, value: float) -> Swept:
    if isinstance(config, Experiment):
        return config.model_copy(update=_update(config, over, value, config.name))
    assert isinstance(config, ModelsConfig)
    if over == "speed":
        return config.model_copy(update={"speed": _valid(Speed, {"speed": value}, over).speed})
    _, name, key = over.split(".", 2)
    model = config.models[name]
    changed = model.model_copy(update=_update(model, key, value, f"{config.name}.{name}"))
    return config.model_copy(update={"models": {**config.models, name: changed}})


Part = TypeVar("Part", bound=Section)


def _update(model: Model, over: str, value: float, name: str) -> dict[str, Section]:
    """The section of a model that a sweep changes; ConfigError if the model does not use the key."""
    section, _, key = over.partition(".")
    part: Section = getattr(model, section)
    if getattr(part, key) is None or (section == "workload" and not _used(model.workload, key)):
        raise ConfigError(f"cannot sweep {over}: config {name!r} does not use it")
    given = {**part.model_dump(exclude_unset=True), key: value}
    return {section: _valid(type(part), given, over)}


def _used(load: Workload, key: str) -> bool:
    """Whether the arrivals of a workload depend on a key."""
    if load.arrivals == "trace" or key == "speed":
        return load.arrivals == "trace" and key == "speed"
    return not (key == "cv" and load.arrivals != "gamma") and not (key == "rate" and load.load is not None)


def _valid(kind: type[Part], given: Mapping[str, Any], over: str) -> Part:
    try:
        return kind.model_validate(given)
    except ValidationError as error:
        raise ConfigError(f"cannot sweep {over}: {explain(error, kind)}") from None
