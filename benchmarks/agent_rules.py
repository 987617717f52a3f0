"""Rules that agents.py compares ours with, and when each token is due by the artifact's promise."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from operator import attrgetter

from neustream.core.job import Job
from neustream.core.policies.batching import in_order
from neustream.core.policies.model_queues import ModelQueues, continuous, has_progress, split_by_model
from neustream.core.policy import Decision, View
from neustream.core.steps import Step
from neustream.core.types import TICK

arrival = attrgetter("arrival")


@dataclass(frozen=True)
class Call:
    """What one model call of a request is promised: tokens at `start` + `first`, then by `steps`.

    `start`: when it begins if all before it takes as long as promised. A decode at a context of c tokens is given
    `base` + `each` * c seconds.
    """

    model: str
    start: float
    first: float
    prompt: int
    outputs: int
    base: float
    each: float

    def due(self, index: int) -> float:
        """When token `index` (from 0) is due."""
        contexts = index * self.prompt + index * (index + 1) / 2
        return self.start + self.first + index * self.base + self.each * contexts

    @property
    def end(self) -> float:
        return self.due(self.outputs - 1)


@dataclass(frozen=True)
class PrefillFirst:
    """vLLM before chunked prefill: whole prompts in order of arrival as long as there is memory, else all decode."""

    most_tokens: int = 4096

    def decide(self, view: View) -> Decision:
        return split_by_model(view, self._tokens, lambda rest: in_order(rest, arrival, False))

    def _tokens(self, view: View, model: ModelQueues) -> Decision:
        chosen: list[Job] = []
        tokens, free = 0.0, model.room()
        for job in sorted(model.prefills, key=lambda job: (not has_progress(job), job.arrival)):
            tokens += job.size
            free -= model.blocks(job, job.size)
            if tokens > self.most_tokens or free < 0 or len(chosen) + len(model.decodes) >= model.seats:
                break
            chosen.append(job)
        if chosen:
            return Decision(chosen)
        jobs, _ = continuous(view, model, arrival, 0, model.prefills if model.decodes else ())
        return Decision(jobs or model.prefills[:1])


@dataclass(frozen=True)
class Budgets:
    """The artifact's rule: what a call saved is handed to the next, and who is late at one goes no further.

    Its credit of ten tokens is counted too.
    """

    calls: Mapping[str, Sequence[Call]] = field(repr=False)
    scale: float
    credit: int = 10

    def decide(self, view: View) -> Decision:
        return split_by_model(view, self._tokens, lambda rest: in_order(rest, arrival, True))

    def _call(self, job: Job) -> Call:
        assert job.stage is not None
        model = job.stage.model
        return next(call for call in self.calls[job.id] if call.model == model)

    def _rest(self, view: View, job: Job) -> float:
        """Seconds until its next token is due, with its credit."""
        call = self._call(job)
        earned = max(self.credit - job.call_outputs, 0) * (1 - 1 / self.scale) * call.base
        return call.due(job.call_outputs) - view.now + earned

    def _tokens(self, view: View, model: ModelQueues) -> Decision:
        drop, waiting = {}, []
        for job in model.prefills:
            if has_progress(job):
                waiting.append(job)
            elif job.joined_at > self._call(job).start + TICK:
                drop[job] = "late at the call before"
            elif self._rest(view, job) < model.speed * job.next_output_s:
                drop[job] = "its prefill cannot be in time"
            else:
                waiting.append(job)
        waiting.sort(key=attrgetter("size"))
        chosen = self._largest(view, model, waiting)
        if chosen or not model.decodes:
            return Decision(chosen or waiting[:1], drop)
        jobs, _ = continuous(view, model, arrival, 0, model.prefills)
        return Decision(jobs, drop)

    def _largest(self, view: View, model: ModelQueues, waiting: list[Job]) -> list[Job]:
        """The most prompts, shortest first, that leave all time for the token after a decode of all."""
        rest = min([self._rest(view, job) for job in model.decodes], default=math.inf)
        context = sum([job.size for job in model.decodes])
        count, free = len(model.decodes), model.room()
        tokens = square = 0.0
        chosen: list[Job] = []
        for job in waiting:
            tokens += job.size
            square += job.size**2
            context += job.size + 1
            free -= model.blocks(job, job.size)
            prompts = len(chosen) + 1
            both = model.seconds(Step(prompts, tokens, square))
            both += model.seconds(Step(decodes=prompts + count, context=context))
            rest = min(rest, self._rest(view, job) + self._call(job).base)
            if free < 0 or both > rest or prompts + count > model.seats:
                break
            chosen.append(job)
        return chosen
