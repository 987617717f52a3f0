"""What the latest requests to a language model look like: prompts, and times to first outputs."""

from __future__ import annotations

import math

from neustream.core.demand import Demand
from neustream.core.policies.model_queues import ModelQueues
from neustream.core.steps import Step


def typical(recent: tuple[Demand, ...], stage: str) -> tuple[float, float]:
    """The median TTFT that the latest requests were promised, and their median prompt."""
    some = [(demand.first, demand.calls[stage].size) for demand in recent if stage in demand.calls]
    if not some:
        return math.inf, 0.0
    middle = len(some) // 2
    return sorted(first for first, _ in some)[middle], sorted(size for _, size in some)[middle]


def patience(recent: tuple[Demand, ...], model: ModelQueues) -> float:
    """Seconds that requests like the latest can wait before their prefill; inf without an SLO."""
    first, size = typical(recent, f"{model.label}.prefill")
    return first - model.seconds(Step(1, size, size * size)) if first < math.inf else math.inf
