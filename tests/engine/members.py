"""Engines with several members, for tests."""

from __future__ import annotations

import time
from concurrent.futures import Future

from toys import one_stage, table

from neustream import (
    FCFS,
    Engine,
    EventLog,
    Member,
    Pool,
    ProfiledExecutor,
    Scheduler,
    ThreadExecutor,
    VirtualClock,
    WallClock,
)
from neustream.engine.events import Leave

ONE = one_stage()
SLOW = {"s": table("s", 1.0)}
TOY = {"draw": table("draw", 1.0, 1.5), "decode": table("decode", 0.5)}


def member(name, graph=ONE, profiles=SLOW, policy=None, executor=None, **pool):
    scheduler = Scheduler([Pool("gpu", tuple(graph.stages), **pool)], policy or FCFS(), profiles)
    return Member(scheduler, {"gpu": executor or ProfiledExecutor()}, name)


def run(members, requests, *, leave=(), observers=()):
    """The log and the report; `leave`: who goes when."""
    log, clock = EventLog(), VirtualClock()
    engine = Engine(members, clock, [log, *observers])
    for name, at in leave:
        clock.post(Leave(name, Future()), at)
    return log, engine.run(requests)


def by_member(log):
    return {name: request.get("member") for name, request in log.requests.items()}


def serving(modules, **options):
    """An engine of members named by `modules`, each with modules of its own for the stage "s"."""
    members = [member(name, executor=ThreadExecutor({"s": module})) for name, module in modules.items()]
    return Engine(members, WallClock(), **options)


def until(condition):
    """Wait for what another thread does."""
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.001)
