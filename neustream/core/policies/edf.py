"""Step-level continuous batching in order of deadline."""

from __future__ import annotations

import math
from dataclasses import dataclass

from neustream.core.job import Job
from neustream.core.policies.batching import in_order
from neustream.core.policies.model_queues import ModelQueues, decision, split_by_model
from neustream.core.policy import Decision, View


def _deadline(job: Job) -> float:
    return min(job.due, job.due_next)


@dataclass(frozen=True)
class EDF:
    """Earliest deadline first at every step (Liu and Layland, 1973), batched up to `max_batch`.

    Optimal for one job at a time below capacity; under overload it favours requests that are about
    to be late (the domino effect), which `drop_hopeless` only softens. Prompts of a language model
    are prefilled in that order, beside all decodes.
    """

    drop_hopeless: bool = True

    def decide(self, view: View) -> Decision:
        return split_by_model(
            view, self._tokens, lambda rest: in_order(rest, _deadline, self.drop_hopeless)
        )

    def _tokens(self, view: View, model: ModelQueues) -> Decision:
        paced = any(job.slo.step < math.inf for job in model.decodes)
        tokens = view.pool.step_tokens
        return decision(view, model, _deadline, tokens, self.drop_hopeless, lasts=not paced)
