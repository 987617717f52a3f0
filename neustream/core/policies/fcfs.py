"""Step-level continuous batching in order of arrival."""

from __future__ import annotations

from dataclasses import dataclass
from operator import attrgetter

from neustream.core.policies.batching import in_order
from neustream.core.policies.model_queues import ModelQueues, decision, split_by_model
from neustream.core.policy import Decision, View


@dataclass(frozen=True)
class FCFS:
    """Iteration-level batching as in Orca (OSDI'22): requests join and leave between any two steps.

    The oldest requests run, as many as the stage's `max_batch`; requests at different steps share a
    batch. Orca has no deadlines; with `drop_hopeless` (the honest baseline) a request that would
    be late even if it ran alone is given up. Of a language model all decodes run, and prompts are
    prefilled beside them in parts, within the pool's `step_tokens`: vLLM's default, which gives up
    nobody (`drop_hopeless=False`).
    """

    drop_hopeless: bool = True

    def decide(self, view: View) -> Decision:
        return split_by_model(view, self._tokens, self._steps)

    def _steps(self, view: View) -> Decision:
        return in_order(view, attrgetter("arrival"), self.drop_hopeless)

    def _tokens(self, view: View, model: ModelQueues) -> Decision:
        return decision(
            view, model, attrgetter("arrival"), view.pool.step_tokens, self.drop_hopeless
        )
