"""The short way in for one graph on one pool: `serve` it for real, or `simulate` it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from neustream.core.graph import Graph
from neustream.core.policies import Priced
from neustream.core.policy import Policy, Pool
from neustream.core.profile import LatencyProfile
from neustream.core.scheduler import Scheduler
from neustream.core.types import Request
from neustream.engine.clock import VirtualClock, WallClock
from neustream.engine.engine import Engine
from neustream.engine.events import Observer
from neustream.engine.executor import ProfiledExecutor, StreamModule, ThreadExecutor
from neustream.engine.report import Report

POOL = "pool"


def _scheduler(graph: Graph, profiles: Mapping[str, LatencyProfile], policy: Policy | None) -> Scheduler:
    return Scheduler([Pool(POOL, tuple(graph.stages))], policy or Priced(), profiles)


def serve(
    graph: Graph,
    modules: Mapping[str, StreamModule],
    profiles: Mapping[str, LatencyProfile],
    *,
    policy: Policy | None = None,
    device: str = "cpu",
    observers: Sequence[Observer] = (),
) -> Engine:
    """An engine for `graph` on one worker of this process; use it as a context manager.

    `policy` defaults to `Priced`.
    """
    executor = ThreadExecutor(modules, (device,))
    return Engine(_scheduler(graph, profiles, policy), {POOL: executor}, WallClock(), observers)


def simulate(
    graph: Graph,
    profiles: Mapping[str, LatencyProfile],
    requests: Iterable[Request],
    *,
    policy: Policy | None = None,
    observers: Sequence[Observer] = (),
) -> Report:
    """What would come of `requests` on one worker, by the profiles, in virtual time."""
    scheduler = _scheduler(graph, profiles, policy)
    return Engine(scheduler, {POOL: ProfiledExecutor()}, VirtualClock(), observers).run(requests)
