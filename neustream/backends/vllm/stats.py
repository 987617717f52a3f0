"""What the scheduler inside vLLM has done so far, as numbers."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any


@dataclass(slots=True)
class Stats:
    """Counters since the engine started.

    Args:
        steps: turns of vLLM's loop; `steered` of them with an SLO to keep, `stock` left to vLLM.
        decisions, decision_s: times that the policy was asked, and seconds that it took.
        overhead_s: seconds of all turns that our code took beyond vLLM's own, decisions included.
        promised, dropped: requests that came with an SLO, and requests that were given up.
        ignored: SLO values that made no sense, by kind.
        preempted: times that vLLM took a request's memory during steered steps.
        errors: decisions that the policy got wrong; those turns ran as stock.
        step_error: median error of single steps lately, a share (`LearntSteps.error`); None before
            any.
    """

    steps: int = 0
    steered: int = 0
    decisions: int = 0
    decision_s: float = 0.0
    overhead_s: float = 0.0
    promised: int = 0
    dropped: int = 0
    preempted: int = 0
    errors: int = 0
    ignored: Counter[str] = field(default_factory=Counter)
    step_error: float | None = None

    @property
    def stock(self) -> int:
        return self.steps - self.steered

    def to_dict(self) -> dict[str, Any]:
        """For a log line or JSON."""
        names = [name for name in self.__slots__ if name != "ignored"]
        return {name: getattr(self, name) for name in names} | {"ignored": dict(self.ignored)}
