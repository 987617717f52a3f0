"""The bound for agents: one program of time of all devices, whose calls are served together."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from neustream.analysis.bounds.agents.ways import Lengths, Served, Way, Window, calls_of
from neustream.analysis.bounds.bound import Bound, Group, known_weight, methods
from neustream.analysis.bounds.linear import Floats, Program
from neustream.analysis.bounds.tokens.buckets import add_time, cuts_of
from neustream.analysis.bounds.tokens.costs import Limits, costs_of
from neustream.analysis.bounds.tokens.prompts import PromptGroup
from neustream.analysis.bounds.tokens.tasks import SLACK, Task
from neustream.analysis.bounds.tokens.upper import improve_by_time, parts
from neustream.core.steps import StepLatency
from neustream.core.types import Request
from neustream.engine.clock import WallClock

GRIDS = (2, 8)
"""Buckets in the mean life of a call: few first, so that large loads have a bound soon."""


@dataclass(frozen=True, slots=True)
class Model:
    """A model: its steps, their limits, and the device that it is on."""

    steps: StepLatency
    limits: Limits
    device: str


@dataclass(frozen=True, slots=True)
class _Asked:
    """A request that can be in time if it is alone: `calls` are those that it has to make."""

    id: str
    weight: float
    start: float
    calls: Sequence[Window]


def agent_bound(
    requests: Sequence[Request],
    ways: Mapping[str, Way],
    models: Mapping[str, Model],
    *,
    time_limit_s: float = 60.0,
    known: Sequence[Collection[str]] = (),
) -> Bound:
    """The most weight of agents' requests that any scheduler could serve in time.

    Only the end of a request counts, and of parts that have a promise of their own. Requests
    without a deadline count as served.

    Args:
        ways: what each request has to go through, by id.
        models: those that are called.
        time_limit_s: after about so long the best bound found so far is returned.
        known: as of `upper_bound`.

    Raises:
        ProfileError: the steps of a model cannot be bounded.
        NeustreamError: one of `known` serves more than was proven to be possible.
    """
    clock = WallClock()
    served = {name: _served(name, model, ways) for name, model in models.items()}
    lengths = Lengths(served)
    free = [request for request in requests if request.slo.total == math.inf]
    promised = [request for request in requests if request.slo.total < math.inf]
    asked = list(_asked(promised, ways, lengths))
    load = Group(asked, known_weight(asked, known))
    shares = {request.id: float(request.slo.total == math.inf) for request in requests}
    shares |= {one.id: 1.0 for one in asked}
    devices = _Devices(asked, models, served, lengths)
    for buckets in GRIDS if asked else ():
        program = Program(np.array([one.weight for one in asked]))
        groups = devices.add_to(program, buckets)
        found = improve_by_time(load, program, groups, time_limit_s - clock.now())
        shares |= dict(zip([one.id for one in asked], found, strict=False))
    weight = sum(float(request.slo.weight) for request in free)
    return Bound(
        weight + load.value,
        weight + load.relaxed,
        weight + load.proven,
        methods([load]),
        clock.now(),
        shares,
    )


def _served(name: str, model: Model, ways: Mapping[str, Way]) -> Served:
    calls = [call for way in ways.values() for call in calls_of(way) if call.model == name]
    sizes = [call.prompt + call.outputs for call in calls]
    return Served(costs_of(model.steps, max(sizes, default=1), model.limits), model.limits)


def _asked(
    requests: Sequence[Request], ways: Mapping[str, Way], lengths: Lengths
) -> Iterator[_Asked]:
    for request in sorted(requests, key=lambda one: one.arrival):
        way, start = ways[request.id], request.arrival
        end = start + request.slo.total + SLACK
        if lengths.least(way) <= end - start:
            windows = list(lengths.windows(way, start, end))
            yield _Asked(request.id, float(request.slo.weight), start, windows)


class _Devices:
    """The calls of requests as tasks of each model: which request's, and a task."""

    def __init__(
        self,
        asked: Sequence[_Asked],
        models: Mapping[str, Model],
        served: Mapping[str, Served],
        lengths: Lengths,
    ) -> None:
        self.served = served
        self.calls: dict[str, list[tuple[int, Task]]] = {name: [] for name in models}
        for at, one in enumerate(asked):
            for number, window in enumerate(one.calls):
                task = _task(f"{one.id} {number}", one.weight, window, lengths)
                self.calls[window.call.model].append((at, task))
        self.devices: dict[str, list[str]] = {}
        for name, model in models.items():
            if self.calls[name]:
                self.devices.setdefault(model.device, []).append(name)

    def add_to(self, program: Program, buckets: int) -> list[PromptGroup]:
        """Add the rows of all devices; the groups of prompts whose windows they hold.

        `buckets`: of time, in the mean life of a call.
        """
        groups: list[PromptGroup] = []
        for names in self.devices.values():
            tasks = [task for name in names for _, task in self.calls[name]]
            cuts = cuts_of(tasks, min(self.served[name].costs.base for name in names), buckets)
            used = self._shared(program, cuts, len(names))
            for name, columns in zip(names, used, strict=True):
                of, places = self.served[name], [at for at, _ in self.calls[name]]
                some = [task for _, task in self.calls[name]]
                own = [PromptGroup(part, of.costs, known=0.0) for part in parts(some)]
                add_time(program, places, some, own, of.costs, of.limits, cuts, columns)
                groups += own
        return groups

    def _shared(self, program: Program, cuts: Floats, models: int) -> list[Sequence[int]]:
        """For each model on a device the columns of its seconds of each bucket; none if alone."""
        if models == 1:
            return [()]
        seconds = np.diff(cuts)
        columns = [program.columns(len(seconds), math.inf, seconds) for _ in range(models)]
        for bucket, width in enumerate(seconds.tolist()):
            program.row([some[bucket] for some in columns], [1.0] * models, width)
        return list(columns)


def _task(id: str, weight: float, window: Window, lengths: Lengths) -> Task:
    """A call as a generation: its outputs are due so that those behind them can end in time."""
    call, seconds = window.call, lengths.outputs(window.call)
    behind = np.concatenate([np.cumsum(seconds[:0:-1])[::-1], [0.0]])
    return Task(id, weight, window.start, call.prompt, call.outputs, window.end - behind)
