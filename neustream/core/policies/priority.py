"""Continuous batching of LLM requests by priority, which is their deadline."""

from __future__ import annotations

from dataclasses import dataclass

from neustream.core.job import Job
from neustream.core.policies.batching import in_order
from neustream.core.policies.model_queues import ModelQueues, decision, split_by_model
from neustream.core.policy import Decision, View


def _first_due(job: Job) -> float:
    return job.first_due


@dataclass(frozen=True)
class Priority:
    """vLLM's `--scheduling-policy priority` with the deadline of the first output as the priority.

    Requests are admitted in that order, and lose their memory in the reverse one. The priority of a
    request never changes, and nobody is given up unless `drop_hopeless`. Stages that are no
    language model's run in the same order.
    """

    drop_hopeless: bool = False

    def decide(self, view: View) -> Decision:
        return split_by_model(
            view, self._tokens, lambda rest: in_order(rest, _first_due, self.drop_hopeless)
        )

    def _tokens(self, view: View, model: ModelQueues) -> Decision:
        return decision(view, model, _first_due, view.pool.step_tokens, self.drop_hopeless)
