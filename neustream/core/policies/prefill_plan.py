"""The prompts of a step."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from neustream.core.job import Job
from neustream.core.steps import Step


@dataclass(slots=True)
class PrefillPlan:
    """Prompts in a step: who, how many tokens of each, beside which decodes.

    Attributes:
        slack: seconds that the step may take for the decodes' sake.
        due: seconds after which it must be over for the prompts that end in it.
        chosen: tokens of each prompt; `tokens`, `square`: their sums (see `Step`).
        instead: late requests whose room they need.
        outside: prompts for which the decodes have no slack.
        context: tokens that the decodes read.
    """

    decodes: list[Job]
    slack: float = math.inf
    due: float = math.inf
    chosen: dict[Job, float] = field(default_factory=dict)
    tokens: float = 0.0
    square: float = 0.0
    instead: list[Job] = field(default_factory=list)
    outside: list[Job] = field(default_factory=list)
    context: float = 0.0

    @property
    def worth(self) -> float:
        """The weight of the prompts, each by the part of it that is prefilled."""
        return sum([job.weight * size / job.size for job, size in self.chosen.items()])

    def step(self) -> Step:
        """The step as it is."""
        return Step(len(self.chosen), self.tokens, self.square, len(self.decodes), self.context)

    def step_with(self, job: Job, size: float) -> Step:
        """The step with `size` tokens of one more prompt."""
        square = self.square + (2 * job.computed + size) * size
        prompts, tokens = len(self.chosen) + 1, self.tokens + size
        return Step(prompts, tokens, square, len(self.decodes), self.context)

    def without_decodes(self) -> Step:
        """The prompts' step alone."""
        return Step(len(self.chosen), self.tokens, self.square)

    def add(self, job: Job, size: float) -> None:
        """Prefill `size` tokens of `job` in this step."""
        self.square += (2 * job.computed + size) * size
        self.tokens += size
        self.chosen[job] = size
