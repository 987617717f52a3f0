"""Who comes in place of those who end: under load the steps ahead do not get shorter.

A load that only shrinks lets those look in time who keep pace only beside fewer. They were taken
in, each newcomer with more time cost them some of their chance, and most of them were late in the
end, after all that they had taken. Where several models share a device the places are the others'
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

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Coming:
    """Generations that are expected to have come, and not to have ended, at some points.

    They take the places of those that end, and no more than that: who is taken in beside all that
    run is decided when it comes.

    Attributes:
        count: how many, if all who come are taken in [points].
        tokens: what each of them reads by then [points].
    """

    count: Floats
    tokens: Floats

    @classmethod
    def to(
        cls, model: ModelQueues, lengths: Lengths, points: Floats, most: float, step: float
    ) -> Coming | None:
        """Those that come to a model, by the latest requests; None where too few came to tell.

        Args:
            points: steps from now; each takes `step` seconds.
            most: outputs up to which lengths are guessed.
        """
        rate, prompt = arriving(model.view, f"{model.label}.prefill")
        if not rate:
            return None
        each = rate * step / model.view.pool.workers  # a worker has its share of them
        there, outputs = lengths.joined(points, most)
        return cls(each * there, np.maximum(prompt, 1.0) + outputs / np.maximum(there, 1.0))

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
