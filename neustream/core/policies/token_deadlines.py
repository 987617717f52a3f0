"""Our rule for the steps of a language model: which prompts ride along, whom to admit, whom to give
up.

A generation is on time if each of its outputs is, and an output that comes early buys slack for
those behind it. So a running generation has `slack + n * TPOT` seconds for its next n outputs, and
what a prompt's prefill takes comes out of everybody's slack.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from neustream.core.policies.model_queues import one_model
from neustream.core.policies.token_step import StepPlan
from neustream.core.policy import Decision, View
from neustream.errors import ConfigError


@dataclass(frozen=True, slots=True)
class TokenDeadlines:
    """For pools of one language model (`per_model.py` for others beside it). Before each step:

    1. Waiting requests that cannot have their first output in time are given up. Of the others,
       those whose prefill has begun come first, then the shortest prompts (by weight), then those
       that were promised nothing.
    2. Prompts join this step as long as everyone in it, and every running generation, still has its
       next output in time; and as long as all admitted generations are expected to keep pace and to
       have memory until they end (`horizon.py`). A prompt that is too long for this step begins
       with a part, if the rest can follow in time.
    3. Three kinds of steps are compared: prompts beside all decodes, beside only those decodes that
       would be late otherwise, or alone. The one that takes most prompts in wins; at equality,
       prompts run alone where requests are promised so little that they could not wait for a longer
       step, or where a common step saves nothing.
    4. In such times decodes with slack to spare also leave the device free until their slack is
       down to `pause` prefills: who comes then need not wait for a step to end.
    5. Who was late already runs where that makes nobody else late, and is given up once others need
       its memory or its seat.

    Args:
        margin: share of a step's expected seconds that is kept as slack. Where steps are learnt,
            three times the median error of the latest predictions comes on top.
        memory: share of the memory that admitted generations are expected to fill at most.
        pause: see 4; 0 never leaves the device free.
        steady: whether outputs are also to come at their TPOT from the first one on, as far as that
            is possible, so that a request's mean TPOT keeps to its SLO (what client-side harnesses
            count) although its first output came early.
    """

    margin: float = 0.0
    memory: float = 1.0
    pause: float = 2.0
    steady: bool = False

    def __post_init__(self) -> None:
        for name in ("margin", "pause"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ConfigError(
                    f"tokens: {name} must be 0 or more and finite, got {getattr(self, name)}"
                )
        if not 0 < self.memory <= 1:
            raise ConfigError(f"tokens: memory must be above 0 and at most 1, got {self.memory}")

    def decide(self, view: View) -> Decision:
        plan = StepPlan(view, one_model(view), self)
        plan.keep()
        plan.admit()
        return plan.decision()
