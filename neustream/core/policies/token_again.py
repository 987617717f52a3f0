"""For how many steps of decodes the rule for texts need not be asked if nobody comes or goes."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from neustream.core.policies.model_queues import at_decode, in_part
from neustream.core.policies.recent_prompts import patience

if TYPE_CHECKING:
    from neustream.core.policies.token_step import StepPlan

LONGER = 1.25
"""Times what a step takes now that later ones are taken to take at most, while the same decode."""
AGAIN = 32
"""Such steps of decodes that are in time after which the rule looks again."""
LATE_AGAIN = 8
"""The same where some of them are late: whether they cost the others something is seen anew."""
FULL_AGAIN = 3
"""The same where prompts wait for which there is no room."""


def until(plan: StepPlan, seconds: float) -> float:
    """Until when those that decode in this step, which takes so many seconds, do so again."""
    if plan.rule.steady or plan.view.reserved or not all(map(at_decode, plan.broken)):
        return -math.inf
    now, longest = plan.view.now, LONGER * seconds
    if plan.waiting:
        over = now + FULL_AGAIN * longest
        return over if plan.full and _can_wait(plan, over + longest) else -math.inf
    if plan.broken:
        return now + LATE_AGAIN * longest
    due = plan.due(plan.alive[0]) if plan.alive else math.inf
    if due < math.inf and plan.rule.pause and patience(plan.view, plan.model) < longest:
        return -math.inf  # they may soon leave the device free
    return now + AGAIN * longest


def _can_wait(plan: StepPlan, until: float) -> bool:
    """Whether each of those that wait is in time if its prompt runs alone from then on."""
    speed = plan.model.prompt_speed
    for job in plan.waiting:
        if in_part(job) or until > plan.due(job) - speed * job.next_output_s:
            return False
    return True
