"""What the latest requests to a language model look like: prompts, and times to first outputs."""

from __future__ import annotations

import math

from neustream.core.demand import Demand
from neustream.core.policies.model_queues import ModelQueues
from neustream.core.policy import View
from neustream.core.steps import Step


def typical(view: View, stage: str) -> tuple[float, float]:
    """The median TTFT that the latest requests were promised, and their median prompt.

    `view.memo` keeps it until the next request comes.
    """
    known: tuple[object, tuple[float, float]] | None = view.memo.get((typical, stage))
    if known is None or known[0] is not view.recent:
        known = view.memo[typical, stage] = view.recent, _typical(view.recent, stage)
    return known[1]


def _typical(recent: tuple[Demand, ...], stage: str) -> tuple[float, float]:
    demands = [demand for demand in recent if stage in demand.calls]
    if not demands:
        return math.inf, 0.0
    middle = len(demands) // 2
    firsts = sorted([demand.first for demand in demands])
    sizes = sorted([demand.calls[stage].size for demand in demands])
    return firsts[middle], sizes[middle]


def patience(view: View, model: ModelQueues) -> float:
    """Seconds that requests like the latest can wait before their prefill; inf without an SLO."""
    first, size = typical(view, f"{model.label}.prefill")
    if first == math.inf:
        return math.inf
    return first - model.seconds(Step(1, size, size * size))
