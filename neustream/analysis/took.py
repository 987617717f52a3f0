"""The device as it was while a run was served, for a simulation of the same run.

The speed of a machine drifts, and steps stall: neither is in a profile. A simulated step takes as many
times its profile as the served step of its kind that began nearest in time. Steps beside which
requests came in are left out, unless all are such or it hardly mattered: the calls for them held them
up, which the simulator adds by itself (`call_s`). On a cluster instances take requests in: their
steps count with what that took. What is left of the error is of the engine and the policy.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable
from typing import NamedTuple

from neustream.core.batch import Batch
from neustream.core.events import Submitted
from neustream.engine.events import Finished, Record

SLIGHT = 0.01
"""Share of a step that calls beside it may take without a difference."""


class _Step(NamedTuple):
    start: float
    end: float
    ratio: float


class Took:
    """An observer of a served run: when each step began, and how many times its profile it took.

    `called`: whether the calls for requests are beside the steps, in one process.
    """

    def __init__(self, *, called: bool = True) -> None:
        self._called = called
        self._steps: dict[str, list[_Step]] = {}
        self._calls: list[tuple[float, float]] = []

    def __call__(self, record: Record) -> None:
        if isinstance(record, Submitted) and self._called:
            self._calls.append((record.arrival, record.at))
        elif isinstance(record, Finished) and not record.error:
            step = record.step
            ratio = (record.at - step.started_at) / step.profiled_s
            self._steps.setdefault(step.stage, []).append(_Step(step.started_at, record.at, ratio))

    def stretch(self, start: float) -> Callable[[Batch], float]:
        """How many times its profile a step takes; `start`: the instant that the served trace began at.

        1 for kinds of steps that were not served.
        """
        kinds = {stage: self._undisturbed(some) for stage, some in self._steps.items()}
        began = {stage: [step.start - start for step in some] for stage, some in kinds.items()}

        def factor(batch: Batch) -> float:
            if batch.stage not in kinds:
                return 1.0
            return kinds[batch.stage][_nearest(began[batch.stage], batch.started_at)].ratio

        return factor

    def _undisturbed(self, steps: list[_Step]) -> list[_Step]:
        """Those without a call beside them, by their start; all, if there are none."""
        calls = sorted(self._calls)
        ends = [end for _, end in calls]  # calls of one thread end in their order
        found = []
        for step in sorted(steps):
            spent = 0.0
            for call, end in calls[bisect_right(ends, step.start) :]:
                if call >= step.end:
                    break
                spent += end - call
            if spent <= SLIGHT * (step.end - step.start):
                found.append(step)
        return found or sorted(steps)


def _nearest(instants: list[float], at: float) -> int:
    """The place of the instant that is nearest to `at`; `instants` ascend."""
    after = bisect_left(instants, at)
    if after == 0:
        return 0
    if after == len(instants) or at - instants[after - 1] <= instants[after] - at:
        return after - 1
    return after
