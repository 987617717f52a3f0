"""What has to be done: generations, and when their outputs are due. Times are seconds."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from neustream.analysis.bounds.linear import Floats
from neustream.analysis.bounds.tokens.costs import Costs
from neustream.core.types import TICK, Request
from neustream.core.work import Walk
from neustream.errors import GraphError

SLACK = 2 * TICK
"""Tolerance: one TICK late still counts as on time, a second one absorbs rounding in sums."""


@dataclass(frozen=True, slots=True)
class Task:
    """A request of `prompt` tokens and so many `outputs`.

    `due` are the deadlines of those outputs, from the first on, that have one: d[k] in README.md.
    """

    id: str
    weight: float
    start: float
    prompt: int
    outputs: int
    due: Floats

    @property
    def end(self) -> float:
        return float(self.due[-1])

    @property
    def first(self) -> float:
        return float(self.due[0])

    @property
    def most(self) -> int:
        """The most tokens that one of its decodes reads."""
        return self.prompt + self.outputs - 1

    def read(self, outputs: int) -> float:
        """Tokens that are read for so many outputs, the first of which is the prefill's."""
        return (outputs - 1) * self.prompt + outputs * (outputs - 1) / 2


def task_of(request: Request, outputs: int) -> Task:
    """A request with so many outputs; `due` is empty if it was promised nothing.

    Raises:
        GraphError: its graph is not one call of a language model alone.
    """
    slo = request.slo
    if slo.step < math.inf:
        paces = np.arange(outputs) * slo.step
    else:
        paces = np.array([0.0] + [math.inf] * (outputs - 1))
    due = request.arrival + np.minimum(slo.first + paces, slo.total) + SLACK
    due, weight = due[due < math.inf], float(slo.weight)
    return Task(request.id, weight, request.arrival, _prompt(request), outputs, due)


def _prompt(request: Request) -> int:
    walk = Walk(request)
    phases = [stage.phase for stage in request.graph.stages.values()]
    if walk.stage is None or sorted(phases) != ["decode", "prefill"]:
        name = request.graph.name
        raise GraphError(f"no bound for graph {name!r}: it is not a language model's")
    return int(walk.job.size)


def in_time_if_alone(task: Task, costs: Costs, memory: int | None) -> bool:
    """Whether it could perhaps be on time if it were alone, with `memory` tokens of KV cache."""
    if memory is not None and task.most > memory:
        return False
    steps = costs.base * np.arange(len(task.due))
    left = task.due - task.start - costs.whole(task.prompt) - steps
    return bool((left >= 0).all())
