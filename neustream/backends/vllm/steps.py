"""Steps of vLLM's loop: what they compute, how long they take, and which are under way."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from neustream.core.learnt_steps import LearntSteps
from neustream.core.steps import Step

SURE, SPARSE = 64, 8
"""Without a profile, after SURE observed steps, one in SPARSE decodes is taken in: they are alike,
and each costs some hundredths of a millisecond."""


class TurnSteps(LearntSteps):
    """Learns step latencies from whole turns of vLLM's loop.

    Beside a profile from all of them, since blocks of steps in a row tell phases from what lasts;
    without one, of decodes alike from some.
    """

    _decodes = 0

    def learn(self, step: Step, seconds: float) -> bool:
        """Take in one step that ran; whether it was one of those that are learnt from."""
        if self.base is None and self.observed >= SURE and not step.prefills:
            self._decodes += 1
            if self._decodes % SPARSE:
                return False
        self.observe(step, seconds)
        return True


@dataclass(frozen=True, slots=True, eq=False)
class StepInFlight:
    """A step that vLLM has scheduled and not yet reported on.

    Args:
        output: vLLM's SchedulerOutput, by whose identity the step is found again.
        step: what it computes; None: its turn is not timed.
        began: when its turn began.
        expected: seconds that it should take, 0 where nobody asked; ends_at: when it should end.
        unpromised: the share of its requests that were promised nothing.
    """

    output: Any
    step: Step | None
    began: float
    expected: float = 0.0
    ends_at: float = 0.0
    unpromised: float = 0.0


class Progress(Protocol):
    """What is read of a request of vLLM's that was just scheduled."""

    num_computed_tokens: int
    num_prompt_tokens: int


def step_of_tokens(requests: Mapping[str, Progress], tokens: Mapping[str, int]) -> Step:
    """What a step of `tokens` by request id computes; to be asked right after it was scheduled."""
    prefills = new = square = decodes = context = 0
    for id, count in tokens.items():
        request = requests[id]
        past = request.num_computed_tokens - count
        if count == 1 and past >= request.num_prompt_tokens:
            decodes += 1
            context += past + 1
        else:
            prefills += 1
            new += count
            square += (2 * past + count) * count
    return Step(prefills, new, square, decodes, context)
