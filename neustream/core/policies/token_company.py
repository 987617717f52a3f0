"""Whether prompts wait for company: what any prompt adds to a step is paid once for many."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from neustream.core.policies.prefill_plan import PrefillPlan
from neustream.core.steps import Step
from neustream.core.types import TICK

if TYPE_CHECKING:
    from neustream.core.policies.token_step import StepPlan

RATHER = 0.95
"""Prompts wait if they bring less than this share of what they bring later, by the second."""


def waits(plan: StepPlan, part: PrefillPlan) -> bool:
    """Whether the prompts of a step had better wait until others fit into it too.

    A prompt makes a step longer, which takes slack from all that decode; a decode without one earns
    some. Where not all who wait fit into the slack that there is, it is what limits how many are
    served. So prompts run when they bring most by the second that they take: now, or with others
    once there is slack for those too, if all of them are in time then. Nobody waits if the others
    are in time even if the prompts of this step run now.
    """
    if not plan.alive or not part.outside:
        return False
    company = _Company(plan, part)
    return 0 < company.gain < math.inf and company.better()


class _Company:
    """The prompts of a step, and those for which the decodes have no slack.

    Attributes:
        gain: seconds of slack that each decode earns.
    """

    def __init__(self, plan: StepPlan, part: PrefillPlan) -> None:
        self._plan = plan
        self._part = part
        self.gain = min([job.slo.step for job in plan.alive]) - plan.together
        self._slack = plan.due(plan.alive[0]) - plan.view.now
        beside = len(part.decodes) == len(plan.alive)
        self._now = plan.seconds(part.step()) - (plan.together if beside else 0.0)

    def better(self) -> bool:
        """Whether some of them bring more together, and not all can be in time behind this step."""
        plan, part = self._plan, self._part
        least = part.worth / max(self._now, TICK) / RATHER
        some = PrefillPlan(plan.alive, context=plan.context)
        others = PrefillPlan(plan.alive, context=plan.context)
        seats = plan.model.seats - len(plan.alive)
        for job in (*part.chosen, *part.outside):
            if len(some.chosen) == seats:
                break
            size, time = plan.sizes[job], plan.due(job) - plan.view.now
            if size > plan.view.pool.step_tokens - len(plan.alive) - some.tokens:
                continue
            if self._over(some.step_with(job, size), self._slack) > min(some.due, time):
                continue
            for taken in (some,) if job in part.chosen else (some, others):
                taken.add(job, size)
                taken.due = min(taken.due, time)
            seconds = plan.seconds(some.step()) - plan.together
            if some.worth > least * seconds and self._late(others):
                return True
        return False

    def _late(self, others: PrefillPlan) -> bool:
        """Whether one of the others is late if the prompts of this step run now."""
        return self._now + self._over(others.step(), self._slack - self._now) > others.due

    def _over(self, step: Step, slack: float) -> float:
        """Seconds until a step is over that begins once there is slack for it."""
        seconds = self._plan.seconds(step)
        decodes = math.ceil(max(seconds - slack, 0.0) / self.gain)
        return decodes * self._plan.together + seconds
