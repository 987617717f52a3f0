"""Who comes in place of those who end: under load the steps ahead do not get shorter.

A load that only shrinks lets those look in time who keep pace only beside fewer. They were taken
in, each newcomer with more time cost them some of their chance, and most of them were late in the
end, after all that they had taken. Their prompts, two to five percent of all steps, count where an
end was promised: they all come before it. A pace is kept from step to step, by taking in nobody
whose prompt would break it. Where several models share a device the places are the others'
too, and nobody is expected to come.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from neustream.core.lengths import Lengths
from neustream.core.policies.model_queues import ModelQueues
from neustream.core.policies.recent_prompts import arriving
from neustream.core.steps import Step

Floats = NDArray[np.float64]


def in_prompts(model: ModelQueues, lengths: Lengths, most: float, decodes: Step) -> float:
    """Seconds by which the prompts of those who come make a step of `decodes` longer, about.

    In each step as many come as end, and no more than there are. 0 where too few came to tell.
    `most`: outputs up to which lengths are guessed.
    """
    rate, size = arriving(model.view, f"{model.label}.prefill")
    if not rate:
        return 0.0
    [outputs], _ = lengths.joined(np.array([most]), most)
    each_step = rate * model.seconds(decodes) / model.view.pool.workers  # its share of them
    number = min(decodes.decodes / max(float(outputs), 1.0), each_step)
    count = min(max(round(number), 1), model.seats)
    beside = min(decodes.decodes, model.seats - count)
    context = decodes.context * beside / decodes.decodes
    together = model.seconds(Step(count, count * size, count * size * size, beside, context))
    alone = model.seconds(Step(decodes=beside, context=context)) if beside else 0.0
    return number * max(together - alone, 0.0) / count


@dataclass(frozen=True, slots=True)
class Coming:
    """Generations that are expected to have come, and not to have ended, at some points.

    They take the places of those that end, and no more than that: who is taken in beside all that
    run is decided when it comes.

    Attributes:
        count: how many, if all who come are taken in [points].
        tokens: what each of them reads by then [points].
        prompt_s: seconds by which their prompts make each step longer.
    """

    count: Floats
    tokens: Floats
    prompt_s: float = 0.0

    @classmethod
    def to(
        cls, model: ModelQueues, lengths: Lengths, points: Floats, most: float, decodes: Step
    ) -> Coming | None:
        """Those that come to a model, by the latest requests; None where too few came to tell.

        Args:
            points: steps from now; each takes as long as the `decodes` of all that run.
            most: outputs up to which lengths are guessed.
        """
        rate, prompt = arriving(model.view, f"{model.label}.prefill")
        if not rate:
            return None
        each = rate * model.seconds(decodes) / model.view.pool.workers  # a worker has its share
        there, outputs = lengths.joined(points, most)
        tokens = np.maximum(prompt, 1.0) + outputs / np.maximum(there, 1.0)
        return cls(each * there, tokens, in_prompts(model, lengths, most, decodes))

    def beside(
        self, count: Floats, context: Floats, kept: Floats, units: float
    ) -> tuple[Floats, Floats, Floats]:
        """What is needed with them, by what is needed without [..., points] (see `Load`).

        Of `units` of memory they have what others leave.
        """
        new = np.minimum(count.max(-1, keepdims=True) - count, self.count)
        more = new * self.tokens
        if units < math.inf:
            room = np.maximum(units - kept, 0.0)
            if (more > room).any():
                more = np.minimum(more, room)
                new = more / self.tokens
        return count + new, context + more, kept + more
