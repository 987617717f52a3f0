"""Clusters as configs describe them, made ready and simulated."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial

from neustream.by_name import make_rule, only_rule
from neustream.cluster.book import Again, Settings
from neustream.cluster.happenings import Happening, Moved
from neustream.cluster.head import Head
from neustream.cluster.network import Fault, Network
from neustream.cluster.place import Place
from neustream.cluster.planning.replanner import Replanner
from neustream.cluster.report import ClusterReport
from neustream.cluster.reporting import Reporting
from neustream.cluster.rules import MOVERS, ROUTERS, SCALERS
from neustream.cluster.rules.checks import check_role
from neustream.cluster.rules.replan import Replan
from neustream.cluster.simulation import Cluster, Kind, Watcher
from neustream.cluster.ways import Drawn, Took
from neustream.config.cluster import ClusterConfig
from neustream.core.batch import Batch
from neustream.core.policy import Policy
from neustream.core.profile import LatencyProfile
from neustream.core.scheduler import Scheduler
from neustream.engine.clock import stopwatch
from neustream.engine.decision_time import DecisionTime
from neustream.engine.events import Observer
from neustream.engine.executor import BRIEF_S, ProfiledExecutor
from neustream.engine.report import Report
from neustream.engine.trace import EventLog
from neustream.experiment.ends import Ends
from neustream.experiment.pipelines import LlmPipeline
from neustream.experiment.placements import ground_of
from neustream.experiment.prepared import Prepared
from neustream.experiment.replanning import replanner_of, role_names, with_all_roles
from neustream.experiment.roles import Role, roles_of

WAY_S = 0.05
"""How long a way takes as long as it does, where requests do not come at instants of their own."""
COLLECT = 100_000, 50, 100
"""Thresholds of the collector while a fleet is simulated: its objects are many and stay. To search
them for cycles as often as usual takes an eighth of the time."""
BETWEEN = " @ "
"""Between a policy and a router, in the names of what is compared."""


def contenders(config: ClusterConfig | None, policies: Sequence[str]) -> list[str]:
    """What is compared: policies, each with each of several routers."""
    if config is None or len(config.router) == 1:
        return list(policies)
    return [f"{policy}{BETWEEN}{router}" for policy in policies for router in config.router]


def parted(name: str) -> tuple[str, str]:
    """The policy and the router of a contender; "" for the only one."""
    policy, _, router = name.partition(BETWEEN)
    return policy, router


def check_rules(config: ClusterConfig) -> None:
    """ConfigError for a rule that is none, or has no such parameter, or scales what there is not."""
    for name, given in config.router.items():
        make_rule("router", ROUTERS, name, given, "route")
    only_rule("mover", MOVERS, config.mover, "moves")
    check_role(only_rule("scaler", SCALERS, config.scaler, "target"), config.kinds)


class Bench:
    """What a simulated cluster runs on: how steps go, whatever the instance.

    Args:
        factor: how many times as long a step takes; ends: when generations do.
        handovers: by stage; truth: how long steps really take, of stages whose profiles do not say it.
        decision, call_s: of a decision, of taking a request in at an instance.
        alone_s: steps shorter than that have no decision beside them.
        ways: what messages took where this was served.
    """

    def __init__(
        self,
        factor: Callable[[Batch], float],
        ends: Ends | None,
        handovers: Mapping[str, float],
        truth: Mapping[str, LatencyProfile],
        decision: DecisionTime,
        call_s: float = 0.0,
        *,
        alone_s: float = BRIEF_S,
        ways: Took | None = None,
    ) -> None:
        self.factor = factor
        self.ends = ends
        self.handovers = handovers
        self.truth = truth
        self.decision = decision
        self.call_s = call_s
        self.alone_s = alone_s
        self.ways = ways

    def executor(self, place: Place, profiles: Mapping[str, LatencyProfile]) -> ProfiledExecutor:
        """That of an instance on a device of these profiles."""

        def stretch(batch: Batch) -> float:
            return self.factor(batch) * place.stretch(batch)

        truth = {**profiles, **self.truth}  # what is learnt changes no device
        return ProfiledExecutor(
            truth,
            handover_s=self.handovers,
            stretch=stretch,
            outcome=self.ends,
            quiet=None if self.ends is None else self.ends.quiet,
            alone_s=self.alone_s,
        )


def simulate_cluster(
    prepared: Prepared,
    config: ClusterConfig,
    rule: Policy,
    router: str,
    bench: Bench,
    observers: Sequence[Observer],
) -> Report:
    """Serve a workload by a cluster in virtual time."""
    scaler = only_rule("scaler", SCALERS, config.scaler, "target")
    check_role(scaler, config.kinds)
    if isinstance(scaler, Replan):
        config, scaler = _replanning(prepared, config, scaler, rule, router, bench)
    roles = roles_of(prepared, config)
    profiles = {name: role.profiles for name, role in roles.items()}
    name = router or next(iter(config.router))
    failure, network = config.failure, config.network
    told = failure.model_dump(exclude_none=True)
    settings = Settings(**told, delay_s=network.delay_s, bandwidth=network.bandwidth)
    again: dict[str, Again] = {}
    for pipeline in prepared.pipelines:
        again[pipeline.graph.name] = "replay" if isinstance(pipeline, LlmPipeline) else "repeat"
    seed = prepared.experiments[0].workload.seed
    measured = None if bench.ways is not None else ways_of(prepared, config, seed)

    def begin(epoch: int) -> Head:
        return Head(
            prepared.graphs,
            profiles,
            make_rule("router", ROUTERS, name, config.router[name], "route"),
            only_rule("mover", MOVERS, config.mover, "moves"),
            scaler,
            settings=settings,
            again=again,
            epoch=epoch,
            seed=seed,
            stopwatch=stopwatch,
        )

    kinds = [
        Kind(
            role,
            role,
            kind.count,
            partial(_instance, rule, roles[role], bench),
            roles[role].load_s,
            network.token_bytes,
        )
        for role, kind in config.kinds.items()
    ]
    report = ClusterReport()
    watchers: list[Watcher] = [report.happened]
    watchers += [partial(_draw, log) for log in observers if isinstance(log, EventLog)]
    with _collected_rarely():
        cluster = Cluster(
            begin(0),
            kinds,
            prepared.graphs,
            Network(
                network.delay_s, network.bandwidth, network.loss, seed, network.state_bytes, bench.ways or measured
            ),
            successor=begin,
            faults=[Fault(f.at_s, f.instance, f.kind, f.seconds, f.factor) for f in config.faults],
            reporting=Reporting(network.report_s),
            watchers=watchers,
            decision=bench.decision,
            call_s=bench.call_s if measured is None else 0.0,  # it is part of the way there
        )
        cluster.run(prepared.requests, observers, report, prepared.turns, prepared.bound())
    report.instance_s = cluster.instance_s
    return report


@contextmanager
def _collected_rarely() -> Iterator[None]:
    before = gc.get_threshold()
    gc.set_threshold(*COLLECT)
    try:
        yield
    finally:
        gc.set_threshold(*before)


def ways_of(prepared: Prepared, config: ClusterConfig, seed: int) -> Took | None:
    """What ways to instances and back take, drawn from what was measured with the profiles.

    They change as often as requests come, as those that were measured do. None: nobody measured it,
    or the config says what a message takes.
    """
    costs = [pipeline.costs() for pipeline in prepared.pipelines]
    there_s = max((cost.there_s for cost in costs), key=sum)
    back_s = max((cost.back_s for cost in costs), key=sum)
    if "delay_s" in config.network.model_fields_set or not (there_s and back_s):
        return None
    arrivals = [request.arrival for request in prepared.requests]
    every_s = (max(arrivals) - min(arrivals)) / len(arrivals) or WAY_S
    return Took(Drawn(there_s, every_s, [seed, 11]), Drawn(back_s, every_s, [seed, 12]))


def _replanning(
    prepared: Prepared, config: ClusterConfig, scaler: Replan, rule: Policy, router: str, bench: Bench
) -> tuple[ClusterConfig, Replanner]:
    """A config with all roles that devices may get, and the scaler that gives them some."""
    ground = ground_of(prepared, config)
    names = role_names(ground)

    def serve(some: Prepared, cluster: ClusterConfig) -> Report:
        return simulate_cluster(some, cluster, rule, router, bench, [])

    return with_all_roles(ground, names), replanner_of(ground, scaler, names, serve)


def _instance(rule: Policy, role: Role, bench: Bench, place: Place) -> tuple[Scheduler, dict[str, ProfiledExecutor]]:
    executor = bench.executor(place, role.profiles)
    return role.scheduler(rule), {pool.name: executor for pool in role.pools}


def _draw(log: EventLog, event: Happening) -> None:
    """Moves as arrows in a trace."""
    if isinstance(event, Moved):
        log.moved(event.id, event.source, event.target, event.held_at, event.at, event.reason)
