"""What serving adds to the steps of a model: decisions, calls, and handing steps to a worker and back."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import replace
from itertools import pairwise
from queue import Empty
from typing import Any

from neustream.core.batch import StepInput
from neustream.core.events import Submitted, Update
from neustream.core.policies import DEFAULT, POLICIES
from neustream.core.policy import Pool
from neustream.core.profile import LatencyProfile
from neustream.core.scheduler import Scheduler
from neustream.core.types import SLO, Request
from neustream.engine.answers import Result
from neustream.engine.clock import WallClock, stopwatch
from neustream.engine.decision_time import decision_time
from neustream.engine.engine import Engine
from neustream.engine.events import Decided, Finished, Record, Started
from neustream.engine.executor import StreamModule, ThreadExecutor, alone_s
from neustream.engine.inbox import Inbox
from neustream.engine.member import Member
from neustream.errors import RequestError, StageFailed
from neustream.profiling.files import EngineCosts

STEPS = 96
"""Steps that are served, at most."""
TOGETHER = 8
"""Requests that are served at once."""
APART = 3
"""Steps between two of them, at least."""
PATIENT = SLO(total=1e6)
"""A promise that is kept in any case: the policy has to think of it."""


def engine_costs(
    pools: Sequence[Pool],
    profiles: Mapping[str, LatencyProfile],
    modules: Mapping[str, StreamModule],
    calls: Sequence[Callable[[], Request]],
    device: str,
) -> EngineCosts:
    """Serve some requests under the default policy, on one worker a pool, and see what that takes.

    Args:
        modules: by stage, or model; as for a `ThreadExecutor`.
        calls: each makes a request as a caller of the service does, while those before are served. The
            first few are made; the requests' own promises do not count.
    """
    alone = [replace(pool, workers=1) for pool in pools]
    watches = {pool.name: _Watch() for pool in alone}
    executors = {
        name: ThreadExecutor({stage: _Timed(module, watch) for stage, module in modules.items()}, [device])
        for name, watch in watches.items()
    }
    scheduler = Scheduler(alone, POLICIES[DEFAULT](), profiles)

    steps: Inbox[None] = Inbox()
    late: list[float] = []

    def observe(record: Record) -> None:
        if isinstance(record, Submitted):
            late.append(record.at - record.arrival)
        elif isinstance(record, Decided):
            watches[record.pool].decided(record)
        elif isinstance(record, Started):
            watches[record.step.pool].started(record)
        elif isinstance(record, Finished):
            watches[record.step.pool].finished.append(record)
            steps.put(None)
            if sum(len(watch.finished) for watch in watches.values()) == STEPS:
                engine.interrupt()

    engine = Engine(Member(scheduler, executors), WallClock(), [observe], forgiving=False)
    with engine:
        answers = [_asked(engine, call, steps) for call in calls[:TOGETHER]]
        results = [answer.result() for answer in answers if answer is not None and answer.exception() is None]
    if engine.fault is not None:
        raise engine.fault
    for result in results:
        if result.status == "failed":
            raise StageFailed(f"serving the sample requests: {result.reason}")
    return _seen(list(watches.values()), late, alone_s([device]))


def _seen(watches: Sequence[_Watch], late: Sequence[float], alone_s: float) -> EngineCosts:
    """What the watches of all pools saw; `late`: seconds that each call took; `alone_s`: of the device."""
    gaps, decisions, ratios = list[float](), list[Decided](), list[float]()
    for watch in watches:
        gaps += watch.gaps()
        decisions += watch.decisions
        ratios += watch.ratios()
    # a step that returns before its device is done seems short, and tells nothing
    scale = max(statistics.median(ratios), 1.0) if ratios else 1.0
    return EngineCosts(
        handover_s=_median(gaps),
        alone_s=alone_s,
        call_s=_median(late),
        latency_scale=scale,
        **decision_time(decisions)._asdict(),
    )


def _asked(engine: Engine, call: Callable[[], Request], steps: Inbox[None]) -> Future[Result] | None:
    """Have a request served, and wait for a few steps or its end; None once enough was served."""
    since = engine.clock.now()
    request = call()
    try:
        answer = engine.submit(request.graph, request.params, slo=PATIENT, id=request.id, since=since)
    except RequestError:  # it was interrupted
        return None
    for _ in range(APART):
        while not answer.done():
            with suppress(Empty):
                steps.get(0.01)
                break
    return answer


def _median(seconds: Sequence[float]) -> float:
    return max(statistics.median(seconds), 0.0) if seconds else 0.0


class _Watch:
    """What happened in one pool: when its modules were called, and what the engine told."""

    def __init__(self) -> None:
        self.called: list[tuple[float, float]] = []
        self.finished: list[Finished] = []
        self.decisions: list[Decided] = []
        self._waited: list[float] = []  # by step: for a decision, before it started
        self._latest = 0.0

    def decided(self, record: Decided) -> None:
        self.decisions.append(record)
        self._latest = record.seconds

    def started(self, record: Started) -> None:
        self._waited.append(0.0 if record.step.planned else self._latest)

    def gaps(self) -> list[float]:
        """Seconds from the end of each step to the start of the next, but for a decision in between."""
        found = []
        for (before, after), waited in zip(pairwise(self.called), self._waited[1:], strict=False):
            found.append(after[0] - before[1] - waited)
        return found

    def ratios(self) -> list[float]:
        """Seconds of each step over those of its profile."""
        steps = zip(self.called, self.finished, strict=False)
        return [(end - began) / told.step.profiled_s for (began, end), told in steps]


class _Timed:
    """A stream module whose steps are timed; otherwise the module itself."""

    def __init__(self, module: StreamModule, watch: _Watch) -> None:
        self._module = module
        self._watch = watch

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)

    def load(self, device: str) -> None:
        self._module.load(device)

    def step(self, inputs: Sequence[StepInput]) -> Sequence[Update | StageFailed]:
        began = stopwatch()
        updates = self._module.step(inputs)
        self._watch.called.append((began, stopwatch()))
        return updates
