"""An engine whose module does in a step what its request says."""

from __future__ import annotations

from neustream import (
    FCFS,
    Engine,
    Graph,
    Member,
    Pool,
    Scheduler,
    Stage,
    TableProfile,
    ThreadExecutor,
    WallClock,
    loop,
)

WORK = Stage("work", max_batch=8, emits=True)
PROFILES = {"work": TableProfile("work", [1, 8], [1e-4, 2e-4])}
GRAPH = Graph("good", loop(WORK, times=lambda job: job.params.get("rounds", 1)))


class Module:
    """Does in a step what a request's parameters say."""

    def load(self, device):
        pass

    def step(self, inputs):
        for given in inputs:
            given.params.get("in_step", int)()
        return [{"value": given.params.get("value")} for given in inputs]


def engine_of(executor=None, **options):
    scheduler = Scheduler([Pool("p", ("work",))], FCFS(drop_hopeless=False), PROFILES)
    return Engine(Member(scheduler, {"p": executor or ThreadExecutor({"work": Module()})}), WallClock(), **options)


def served(engine, value=1):
    return engine.submit(GRAPH, {"value": value}).result(20).output == {"value": value}
