"""Continuous batching of LLM requests by a priority that is their deadline, as a client can set it."""

from __future__ import annotations

from dataclasses import dataclass

from neustream.core.policies.generation import Generation, apart, decision
from neustream.core.policies.order import in_order
from neustream.core.policy import Decision, View
from neustream.core.types import Job


def _first_due(job: Job) -> float:
    return min(job.due, job.arrival + job.slo.first)


@dataclass(frozen=True)
class Priority:
    """vLLM's `--scheduling-policy priority` with the deadline of the first output as the priority.

    Requests are admitted in that order, and lose their memory in the reverse one. The priority of a
    request never changes, and nobody is given up unless `drop_hopeless`. Stages that are no language
    model's run in the same order.
    """

    drop_hopeless: bool = False

    def decide(self, view: View) -> Decision:
        return apart(view, self._tokens, lambda rest: in_order(rest, _first_due, self.drop_hopeless))

    def _tokens(self, view: View, model: Generation) -> Decision:
        return decision(view, model, _first_due, view.pool.step_tokens, self.drop_hopeless)
