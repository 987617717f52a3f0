"""Our rule for the steps of a language model: which prompts ride along, whom to admit, whom to give
up.

A generation is on time if each of its outputs is, and an output that comes early buys slack for
those behind it. So a running generation has `slack + n * TPOT` seconds for its next n outputs, and
what a prompt's prefill takes comes out of everybody's slack.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from neustream.core.policies.edf import EDF
from neustream.core.policies.model_queues import ModelQueues, split_by_model
from neustream.core.policies.token_step import StepPlan
from neustream.core.policy import Decision, View
from neustream.errors import ConfigError


@dataclass(frozen=True, slots=True)
class TokenDeadlines:
    """For steps of one language model. As a rule of its own it also serves other models, and other
    stages in order of deadline (`edf`), each when one of its jobs is the most urgent, and plans as
    if the others were not there; `PerModel` has one account of all. Before each step:

    1. Waiting requests that cannot have their first output in time are given up. Running ones
       whose chance to be on time is next to nothing count as late: they hold nobody back. Those
       that were promised their end alone are kept longer: no output of theirs is due.
    2. Each of the others has a *chance* to be on time: that of ending, by how long generations have
       been getting, before the steps ahead take longer than the time that it has (`on_time.py`).
       Whose maximum would come just in time has half of that: steps are known to a twelfth.
       As long as requests come, others take the places of those that end (`coming.py`). Few are
       weighed as if steps went on to take what they take now (`token_few.py`).
       A waiting prompt is taken in if the expected number on time, by weight, rises by two
       fifths of its own chance. So a newcomer may cost others a little, and nobody who costs more
       than it brings gets in; a maximum of outputs is no reason to refuse anybody. Memory is none
       either: where it may not suffice, steps are expected to take their turns with those who
       cannot wait. Those that add most are tried first, then the shortest; where memory is short,
       then the most urgent for what they keep.
    3. Prompts join this step as long as everyone in it, and every running generation, still has its
       next output in time. Where only the end was promised, no single output is due: 2 looks after
       those. A prompt that is too long for this step begins with a part, if the rest can follow in
       time. What any prompt adds to a step is charged to the first one in it alone. Where the
       decodes have slack for some of the prompts, those wait for the others if they bring more by
       the second together (`token_company.py`).
    4. Three kinds of steps are compared: prompts beside all decodes, beside only those decodes that
       would be late otherwise, or alone. The one that takes most prompts in wins; at equality,
       prompts run alone where requests are promised so little that they could not wait for a longer
       step, or where a common step saves nothing.
    5. In such times decodes with slack to spare also leave the device free until their slack is
       down to `pause` prefills: who comes then need not wait for a step to end.
    6. Who lost its memory gets some again when it can wait no longer, or where what stays free
       lasts those that run until it has made up for its prompt: who comes back sooner soon takes
       the memory of another one, whose prompt is then computed again too. Beside one that would be
       the next to lose its own, a block stays free for each that runs. Who was late already runs
       where that makes nobody else late, and is given up once others need its memory or its seat.
       Who is promised nothing more holds nobody back either: once it lost its memory it gets some
       again only when nobody waits who is promised something.

    Where other kinds of jobs were promised some of the device (`View.reserved`), 2 is stricter:
    a prompt is taken in only if all who run and it fit into what is left, and into the memory. If
    those who run do not fit, 2 decides by what the others leave of each one's time.

    Args:
        margin: share of a step's expected seconds that is kept as slack. The median error of what
            was expected of the latest steps comes on top, for the next output: once where few
            decode, twice where many do, who are all late by a long step. Over many steps errors
            average out. It does not for a prompt's own output: refused, it is surely late.
        memory: share of the memory that admitted generations are expected to fill at most.
        pause: see 5; 0 never leaves the device free.
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
        return split_by_model(view, self._tokens, EDF().decide)

    def _tokens(self, view: View, model: ModelQueues) -> Decision:
        plan = StepPlan(view, model, self)
        plan.keep()
        plan.admit()
        return plan.decision()
