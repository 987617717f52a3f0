"""What the latest requests to a language model look like: prompts, and times to first outputs."""

from __future__ import annotations

import math
from typing import NamedTuple

from neustream.core.demand import Demand
from neustream.core.policies.model_queues import ModelQueues
from neustream.core.policy import View
from neustream.core.steps import Step

ENOUGH = 4
"""Requests by which it is known how many come."""


class _Prompts(NamedTuple):
    """Of the latest requests: the median TTFT that was promised, and the median prompt; of those
    that were promised something behind their first output the number, and when the first came."""

    first: float
    size: float
    number: int
    since: float


def typical(view: View, stage: str) -> tuple[float, float]:
    """The median TTFT that the latest requests were promised, and their median prompt."""
    prompts = _prompts(view, stage)
    return prompts.first, prompts.size


def arriving(view: View, stage: str) -> tuple[float, float]:
    """How many requests come a second that are promised something behind their first output, and
    their prompts, about; 0 where too few came to tell."""
    prompts = _prompts(view, stage)
    if prompts.number < ENOUGH or view.now <= prompts.since:
        return 0.0, prompts.size
    return (prompts.number - 1) / (view.now - prompts.since), prompts.size


def _prompts(view: View, stage: str) -> _Prompts:
    """`view.memo` keeps it until the next request comes."""
    known: tuple[object, _Prompts] | None = view.memo.get((typical, stage))
    if known is None or known[0] is not view.recent:
        known = view.memo[typical, stage] = view.recent, _typical(view.recent, stage)
    return known[1]


def _typical(recent: tuple[Demand, ...], stage: str) -> _Prompts:
    demands = [demand for demand in recent if stage in demand.calls]
    if not demands:
        return _Prompts(math.inf, 0.0, 0, math.inf)
    middle = len(demands) // 2
    firsts = sorted([demand.first for demand in demands])
    sizes = sorted([demand.calls[stage].size for demand in demands])
    long = [demand.at for demand in demands if min(demand.step, demand.budget) < math.inf]
    return _Prompts(firsts[middle], sizes[middle], len(long), min(long, default=math.inf))


def patience(view: View, model: ModelQueues) -> float:
    """Seconds that requests like the latest can wait before their prefill; inf without an SLO."""
    first, size = typical(view, f"{model.label}.prefill")
    if first == math.inf:
        return math.inf
    return first - model.seconds(Step(1, size, size * size))
