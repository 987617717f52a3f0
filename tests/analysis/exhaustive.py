"""Small random instances, and the most that any scheduler can serve of one, by trying everything."""

from __future__ import annotations

import itertools
import math
import random
from dataclasses import dataclass, field
from functools import cache

from toys import table

from neustream import SLO, Graph, Pool, Request, Stage, loop, seq
from neustream.analysis.bounds import Devices
from neustream.core.types import TICK
from neustream.core.work import Walk

SHAPES = ("loop", "ends", "rounds", "two")


@dataclass
class Instance:
    requests: list[Request]
    profiles: dict
    pools: list[Pool]
    overhead_s: float
    others: list[Devices] = field(default_factory=list)

    @property
    def workers(self) -> list[tuple[Pool, dict]]:
        """All pools, with the profiles of their devices."""
        kinds = [Devices(self.profiles, self.pools), *self.others]
        return [(pool, kind.profiles) for kind in kinds for pool in kind.pools]


def draw_fleet(seed: int) -> Instance:
    """A random instance with a second kind of device, which may serve only some of the stages."""
    rng = random.Random(f"fleet {seed}")
    shape = rng.choice(("loop", "ends", "two"))
    graphs = _graphs(shape, rng)
    stages = list({name: stage for graph in graphs for name, stage in graph.stages.items()})
    kinds = []
    for _ in range(2):
        profiles = {name: table(name, *_seconds(rng, True)) for name in stages}
        kinds.append(Devices(profiles, [Pool("a", tuple(stages), rng.choice([1, 1, 1, 2]))]))
    if len(stages) > 1 and rng.random() < 0.4:
        cut = rng.randrange(1, len(stages))
        kinds[1] = Devices(kinds[1].profiles, [Pool("b", tuple(stages[cut:]))])
        if rng.random() < 0.5:
            kinds[0] = Devices(kinds[0].profiles, [Pool("a", tuple(stages[:cut]))])
    requests = []
    for at in range(rng.choice([2, 3, 4] if shape == "loop" else [2, 3])):
        graph, steps = rng.choice(graphs), rng.randint(1, 3 if shape == "loop" else 2)
        sequence = _sequence(Request("alone", graph, params={"steps": steps}))
        alone = sum(min(kinds[0].profiles[name].latency_s) for name in sequence)
        total = math.ceil(alone * rng.choice([0.8, 1.0, 1.2, 1.6, 2.5]) * 4) / 4
        slo = SLO(total, weight=rng.choice([1, 1, 2]))
        requests.append(Request(str(at), graph, rng.randint(0, 4) / 4, slo, {"steps": steps}))
    return Instance(requests, dict(kinds[0].profiles), list(kinds[0].pools), 0.0, [kinds[1]])


def draw(seed: int) -> Instance:
    """A random instance; times are multiples of 1/4 s, so that sums are exact."""
    rng = random.Random(seed)
    shape = rng.choice(SHAPES)
    monotone = rng.random() < 0.7
    graphs = _graphs(shape, rng)
    stages = list({name: stage for graph in graphs for name, stage in graph.stages.items()})
    profiles = {name: table(name, *_seconds(rng, monotone)) for name in stages}
    if len(stages) > 1 and rng.random() < 0.25:
        cut = rng.randrange(1, len(stages))
        pools = [Pool("a", tuple(stages[:cut]), rng.choice([1, 1, 2])), Pool("b", tuple(stages[cut:]))]
    else:
        pools = [Pool("a", tuple(stages), rng.choice([1, 1, 1, 2]))]
    overhead_s = rng.choice([0.0, 0.0, 0.25])
    count = rng.choice([2, 3, 3, 4, 4, 5] if monotone and shape in ("loop", "two") else [2, 3, 3])
    weights = rng.choice([[1], [1], [1, 2, 3], [0.5, 1.25]])
    spread = rng.choice([0, 4, 12])
    requests = []
    for at in range(count):
        graph, steps = rng.choice(graphs), rng.randint(1, 3 if shape in ("loop", "two") else 2)
        arrival = rng.randint(0, spread) / 4
        sequence = _sequence(Request("alone", graph, params={"steps": steps}))
        alone = sum(min(profiles[name].latency_s) + overhead_s for name in sequence)
        total = math.ceil(alone * rng.choice([0.8, 1.0, 1.2, 1.6, 2.5]) * 4) / 4
        requests.append(Request(str(at), graph, arrival, SLO(total, weight=rng.choice(weights)), {"steps": steps}))
    return Instance(requests, profiles, pools, overhead_s)


def _graphs(shape: str, rng: random.Random) -> list[Graph]:
    def stage(name, **other):
        return Stage(name, max_batch=rng.randint(1, 4), **other)

    def steps(job):
        return job.params["steps"]

    if shape == "loop":
        return [Graph("loop", loop(stage("s"), times=steps))]
    if shape == "ends":
        return [Graph("ends", seq(stage("e"), loop(stage("s"), times=steps), stage("d", emits=True)))]
    if shape == "rounds":
        return [Graph("rounds", seq(loop(seq(stage("s"), stage("t")), times=steps), stage("d")))]
    return [Graph("one", loop(stage("s"), times=steps)), Graph("other", seq(loop(stage("u"), times=steps)))]


def _seconds(rng: random.Random, monotone: bool) -> list[float]:
    seconds = [rng.randint(2, 8)]
    for _ in range(3):
        seconds.append(seconds[-1] + rng.randint(0, 5))
    if not monotone:
        rng.shuffle(seconds)
    return [x / 4 for x in seconds]


def _sequence(request: Request) -> list[str]:
    """The stages of a request's steps, one by one."""
    walk, names = Walk(request), []
    while walk.stage is not None:
        names.append(walk.stage.name)
        walk.advance({})
    return names


def optimum(instance: Instance) -> float:
    """The most weight on time over all schedules.

    Moving each batch to the earliest moment at which its jobs and a worker are free changes no
    decision and makes none late, so that batches need to start only when something arrives or ends;
    at each such moment every batch is tried, and so is waiting.
    """
    return _Schedules(instance).ahead(0.0, (0,) * len(instance.requests), ())


class _Schedules:
    """All schedules of an instance."""

    def __init__(self, instance: Instance) -> None:
        self._requests = instance.requests
        self._sequences = [_sequence(request) for request in self._requests]
        self._workers = instance.workers
        stages = {name: stage for request in self._requests for name, stage in request.graph.stages.items()}
        self._seconds = {
            (name, at): [x + instance.overhead_s for x in profiles[name].latency_s]
            for at, (pool, profiles) in enumerate(self._workers)
            for name in pool.stages
            if name in stages
        }
        self._most = {key: min(stages[key[0]].max_batch, len(each)) for key, each in self._seconds.items()}
        self._quickest = {name: self._least(name) for name in stages}
        self._monotone = all(a <= b for each in self._seconds.values() for a, b in itertools.pairwise(each))
        self._dues = [request.arrival + request.slo.total + TICK for request in self._requests]
        self.ahead = cache(self._ahead)

    def _least(self, name):
        """Seconds of the quickest step of a stage."""
        return min(min(each[: self._most[key]]) for key, each in self._seconds.items() if key[0] == name)

    def _hopeful(self, job, now, done):
        rest = self._sequences[job][done[job] :]
        earliest = max(now, self._requests[job].arrival) + sum(self._quickest[name] for name in rest)
        return bool(rest) and earliest <= self._dues[job]

    def _ahead(self, now, done, running):
        """Weight on time from here on; `running`: (end, pool, jobs) of the steps under way."""
        busy = {job for _, _, jobs in running for job in jobs}
        if not busy and not any(self._hopeful(job, now, done) for job in range(len(done))):
            return 0.0
        best = 0.0
        later = [end for end, _, _ in running] + [r.arrival for r in self._requests if r.arrival > now]
        if later:
            best = self._proceed(min(later), done, running)
        for step in self._steps(now, done, running, busy):
            best = max(best, self.ahead(now, done, tuple(sorted((*running, step)))))
        return best

    def _queues(self, now, done, busy):
        """Who waits, by stage; where more jobs can make a step shorter, those without a hope may be of use."""
        queues: dict[str, list[int]] = {}
        for job, sequence in enumerate(self._sequences):
            waits = self._requests[job].arrival <= now and job not in busy and done[job] < len(sequence)
            if waits and (self._hopeful(job, now, done) or not self._monotone):
                queues.setdefault(sequence[done[job]], []).append(job)
        return queues

    def _steps(self, now, done, running, busy):
        """Every batch that a free worker may start."""
        queues = self._queues(now, done, busy)
        for (name, pool), each in self._seconds.items():
            if sum(at == pool for _, at, _ in running) == self._workers[pool][0].workers:
                continue
            queue = queues.get(name, [])
            for size in range(1, min(len(queue), self._most[name, pool]) + 1):
                for jobs in itertools.combinations(queue, size):
                    yield now + each[size - 1], pool, jobs

    def _proceed(self, now, done, running):
        """Weight on time from the moment `now`, at which the first step ends or a request arrives."""
        after, gained = list(done), 0.0
        for job in [job for end, _, jobs in running if end <= now for job in jobs]:
            after[job] += 1
            if after[job] == len(self._sequences[job]) and now <= self._dues[job]:
                gained += self._requests[job].slo.weight
        return gained + self.ahead(now, tuple(after), tuple(step for step in running if step[0] > now))
