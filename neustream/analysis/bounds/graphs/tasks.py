"""What has to be done: requests to graphs as visits at stages, each in a window of time.

Times are seconds. Where windows come from is in README.md, "Clean-up".
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from neustream.analysis.bounds.linear import Floats
from neustream.core.graph import Graph, Loop, Node, Par, Seq, Switch
from neustream.core.graph import Stage as GraphStage
from neustream.core.policy import Pool
from neustream.core.profile import LatencyProfile
from neustream.core.types import TICK, Request
from neustream.core.work import Walk
from neustream.errors import GraphError, ProfileError

Calls = Sequence[tuple[GraphStage, int]]
"""Stages in the order of their calls, and how many calls in a row."""


@dataclass(frozen=True, slots=True)
class Devices:
    """Devices of one kind: their pools (with the workers of all), and latencies by stage."""

    profiles: Mapping[str, LatencyProfile]
    pools: Sequence[Pool]


@dataclass(frozen=True, slots=True)
class Stage:
    """A stage on a kind of device.

    `pool` is the place of the pool that it draws on, `latency` the seconds of a step of 1, 2, ...
    jobs or more: l(b) in README.md.
    """

    pool: int
    latency: Floats


@dataclass(frozen=True, slots=True)
class Visit:
    """`calls` steps of a job at a stage, all of them between `start` and `end`.

    `stages` are that stage on each kind of device that serves it.
    """

    stages: tuple[int, ...]
    calls: int
    start: float
    end: float


@dataclass(frozen=True, slots=True)
class Task:
    """A request that can be served on time if it is alone."""

    id: str
    weight: float
    visits: tuple[Visit, ...]

    @property
    def start(self) -> float:
        return min(visit.start for visit in self.visits)

    @property
    def end(self) -> float:
        return max(visit.end for visit in self.visits)


@dataclass(frozen=True, slots=True)
class Work:
    """What is to be done.

    `stages` of a load, on each kind of device; `tasks`; `free`, the weight of requests that cannot
    be late; `workers` of each pool.
    """

    stages: Sequence[Stage]
    tasks: Sequence[Task]
    free: float
    workers: Sequence[int]


def work_of(requests: Sequence[Request], devices: Sequence[Devices], overhead_s: float) -> Work:
    """The tasks among `requests`; those that are late even if alone are left out.

    Raises:
        GraphError: it is not known in advance what a request takes, or a stage is in no pool.
        ProfileError: a stage has no profile on a device that serves it.
    """
    graphs = dict.fromkeys(request.graph for request in requests)
    stages, places = _stages(graphs, devices, overhead_s)
    alone = {
        name: min(float(stages[at].latency[0]) for at in some) for name, some in places.items()
    }
    tasks: list[Task] = []
    free = 0.0
    for request in requests:
        calls = list(Walk(request).ahead())
        # one tick late is on time; another is for the rounding of whoever adds up latencies
        due = request.arrival + _promise(request, calls) + 2 * TICK
        seconds = [count * alone[stage.name] for stage, count in calls]
        if due == math.inf or not calls:
            free += request.slo.weight
        elif sum(seconds) <= due - request.arrival:
            work = [(places[stage.name], count) for stage, count in calls]
            visits = _visits(work, seconds, request.arrival, due)
            tasks.append(Task(request.id, float(request.slo.weight), visits))
    workers = [pool.seats for kind in devices for pool in kind.pools]
    return Work(stages, tasks, free, workers)


def _stages(
    graphs: Iterable[Graph], devices: Sequence[Devices], overhead_s: float
) -> tuple[list[Stage], dict[str, tuple[int, ...]]]:
    """The stages of graphs on each kind of device, and where those of a name are."""
    pools = [(kind, pool) for kind in devices for pool in kind.pools]
    stages: list[Stage] = []
    places: dict[str, tuple[int, ...]] = {}
    for graph in graphs:
        _check(graph.root, graph)
        for name, stage in graph.stages.items():
            if name in places:
                continue
            for at, (kind, pool) in enumerate(pools):
                if name not in pool.stages:
                    continue
                if name not in kind.profiles:
                    raise ProfileError(f"stage {name!r} of graph {graph.name!r} has no profile")
                places[name] = (*places.get(name, ()), len(stages))
                stages.append(Stage(at, _latency(stage, kind.profiles[name], overhead_s)))
            if name not in places:
                raise GraphError(f"stage {name!r} of graph {graph.name!r} is in no pool")
    return stages, places


def _check(node: Node, graph: Graph) -> None:
    """GraphError unless the steps of a job of `graph`, and their lengths, are known in advance."""
    no_bound = f"no bound for graph {graph.name!r}"
    match node:
        case GraphStage(size=None, model=""):
            pass
        case GraphStage():
            raise GraphError(f"{no_bound}: stage {node.name!r} has sized or fused steps")
        case Seq():
            for child in node.nodes:
                _check(child, graph)
        case Loop():
            if node.times is None or node.expect is not node.times:
                raise GraphError(f"{no_bound}: the length of a loop is not known in advance")
            _check(node.body, graph)
        case Switch():
            raise GraphError(f"{no_bound}: the way through a switch is not known in advance")
        case Par():
            raise GraphError(f"{no_bound}: branches of a par run at the same time")


def _promise(request: Request, calls: Calls) -> float:
    """Seconds from arrival in which the last call has to end."""
    slo = request.slo
    outputs = sum(count for stage, count in calls if stage.emits)
    if outputs and not calls[-1][0].emits:
        return slo.total
    if outputs <= 1:
        return min(slo.total, slo.first)
    if slo.step == math.inf:
        return slo.total
    return min(slo.total, slo.first + (outputs - 1) * slo.step)


def _latency(stage: GraphStage, profile: LatencyProfile, overhead_s: float) -> Floats:
    """l(b), b from 1: the least seconds of a batch of b or more jobs."""
    most = min(stage.max_batch, profile.max_batch)
    seconds = np.array([profile.latency(batch) + overhead_s for batch in range(1, most + 1)])
    return np.minimum.accumulate(seconds[::-1])[::-1]


def _visits(
    work: Sequence[tuple[tuple[int, ...], int]],
    seconds: Sequence[float],
    start: float,
    end: float,
) -> tuple[Visit, ...]:
    """One visit a stage, in the window that calls of other stages before and after it leave."""
    names = [stage for stage, _ in work]
    visits = []
    for stage in dict.fromkeys(names):
        first = names.index(stage)
        last = len(names) - 1 - names[::-1].index(stage)
        # Of a loop over several stages only the first round is in order: what comes after a call
        # of such a stage may be in the loop too, unless it is the only place of its own stage.
        after = [
            at for at in range(last + 1, len(names)) if first == last or names.count(names[at]) == 1
        ]
        head, tail = sum(seconds[:first]), sum(seconds[at] for at in after)
        calls = sum(count for at, count in work if at == stage)
        visits.append(Visit(stage, calls, start + head, end - tail))
    return tuple(visits)
