"""Stall-free batching of LLM requests: prefills ride along only as far as decodes stay in pace."""

from __future__ import annotations

import math
from dataclasses import dataclass
from operator import attrgetter

from neustream.core.policies.batching import in_order
from neustream.core.policies.model_queues import ModelQueues, decision, split_by_model
from neustream.core.policy import Decision, View
from neustream.core.steps import Step
from neustream.errors import ConfigError

LEAST = 32
"""Tokens of prompts that a step computes even if decodes alone are out of pace."""


@dataclass(frozen=True)
class Sarathi:
    """Sarathi-Serve (OSDI'24): every decode runs in every step; prompts fill a token budget beside
    them.

    The budget bounds the time between tokens. The paper picks it once per deployment from a
    profile; `token_budget` does so here, and None takes the most tokens with which a step of the
    present decodes keeps to the strictest TPOT of the requests that are there. Requests are served
    in order of arrival.
    """

    token_budget: int | None = None
    drop_hopeless: bool = False

    def __post_init__(self) -> None:
        if self.token_budget is not None and self.token_budget < 1:
            raise ConfigError(f"sarathi: token_budget must be 1 or more, got {self.token_budget}")

    def decide(self, view: View) -> Decision:
        return split_by_model(view, self._tokens, self._steps)

    def _steps(self, view: View) -> Decision:
        return in_order(view, attrgetter("arrival"), self.drop_hopeless)

    def _tokens(self, view: View, model: ModelQueues) -> Decision:
        budget = self.token_budget or _stall_free(view, model)
        return decision(
            view,
            model,
            attrgetter("arrival"),
            min(budget, view.pool.step_tokens),
            self.drop_hopeless,
        )


def _stall_free(view: View, model: ModelQueues) -> int:
    """The most tokens of a step that takes no longer than the strictest time per output."""
    jobs = (*model.decodes, *model.prefills)
    pace = min([job.slo.step for job in jobs], default=math.inf)
    decodes = len(model.decodes)
    if decodes >= model.seats:  # no prompt has a seat
        return decodes
    context = sum([job.size for job in model.decodes])
    low, high = LEAST, max(view.pool.step_tokens - decodes, LEAST)
    while low < high:
        middle = (low + high + 1) // 2
        if model.seconds(Step(1, middle, middle * middle, decodes, context)) <= pace:
            low = middle
        else:
            high = middle - 1
    return low + decodes
