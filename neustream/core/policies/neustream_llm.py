"""NeuStream's rule for LLMs: prefill as many as leave every running request its next token."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from operator import attrgetter

from neustream.core.job import Job
from neustream.core.policies.batching import in_order
from neustream.core.policies.model_queues import (
    ModelQueues,
    continuous,
    has_progress,
    split_by_model,
)
from neustream.core.policy import Decision, View
from neustream.core.reasons import due, span
from neustream.core.steps import Step
from neustream.errors import ConfigError

_arrival = attrgetter("arrival")


def _in_order_of_arrival(view: View) -> Decision:
    return in_order(view, _arrival, True)


@dataclass(frozen=True)
class NeuStreamLLM:
    """The temporal scheduler that NeuStream (EuroSys'25) put into vLLM, after its published code.

    A step is either prefills or decodes. Waiting requests that cannot prefill by their first
    deadline are given up. Of the others, the shortest prompts first, as many are prefilled together
    as leave everyone, running and new, in time for its next token after this step and a decode of
    all; if none does, all running requests decode.

    What differs from that code, on purpose: arrivals are those of the clients, not the moments at
    which the serving loop looked; the cost of a batch is that of the prompts in it (there, of as
    many others in order of arrival); requests are never lost; hopeless ones are given up also while
    nothing runs, and only as many are prefilled then as can be in time (there: all); a batch also
    keeps the first deadlines of those in it; and there is no credit by default. With `credit` (30
    in that code), deadlines are taken to be later by what the next so many tokens are hoped to
    earn: their TPOT less a decode of all who run. It lets first tokens be late, and gives short
    answers what they never earn, so it is counted here only for as many tokens as the request may
    still have, and never for a first one. `most_tokens` bounds a prefill (8192 there). Its
    correction terms for decodes (2 to 4 ms) are left
    out: they are fits to one device.
    """

    credit: int = 0
    most_tokens: int = 8192

    def __post_init__(self) -> None:
        for name in ("credit", "most_tokens"):
            if getattr(self, name) < 0:
                raise ConfigError(
                    f"neustream_llm: {name} must be 0 or more, got {getattr(self, name)}"
                )

    def decide(self, view: View) -> Decision:
        return split_by_model(view, self._tokens, _in_order_of_arrival)

    def _tokens(self, view: View, model: ModelQueues) -> Decision:
        drop = self._hopeless(view, model)
        waiting = [job for job in model.prefills if job not in drop]
        waiting.sort(key=attrgetter("size"))
        chosen = self._admitted(view, model, waiting)
        if chosen or not model.decodes:
            return Decision(chosen or waiting[:1], drop)
        jobs, _ = continuous(view, model, _arrival, 0, model.prefills)
        return Decision(jobs, drop)

    def _hopeless(self, view: View, model: ModelQueues) -> dict[Job, str]:
        """Waiting requests that cannot prefill by their first deadline, with the reason to give."""
        drop = {}
        for job in model.prefills:
            time = job.due_next - view.now
            if time < model.prompt_speed * job.next_output_s and not has_progress(job):
                needs = span(job.next_output_s)
                drop[job] = f"hopeless: its first token needs {needs}, {due(time)}"
        return drop

    def _admitted(self, view: View, model: ModelQueues, waiting: Sequence[Job]) -> list[Job]:
        """The most of `waiting`, from the front, whose prefill leaves everyone in time."""
        count = len(model.decodes)
        read = sum([job.size for job in model.decodes])
        decode = model.seconds(Step(decodes=max(count, 1), context=max(read, 1.0)))
        rest = min([self._rest(view, job, decode) for job in model.decodes], default=math.inf)
        first_due = math.inf
        chosen: list[Job] = []
        tokens = square = 0.0
        context = sum([job.size + 1 for job in model.decodes])
        free = model.room()
        for job in waiting[: max(model.seats - count, 0)]:
            tokens += job.size
            square += job.size**2
            context += job.size + 1
            free -= model.blocks(job, job.size)
            if tokens > self.most_tokens or free < 0:
                break
            prompts = len(chosen) + 1
            prefill = model.seconds(Step(prompts, tokens, square))
            both = prefill + model.seconds(Step(decodes=prompts + count, context=context))
            rest = min(rest, self._rest(view, job, decode) + job.slo.step)
            first_due = min(first_due, job.due_next)
            if both > rest or prefill > first_due - view.now:
                break  # the larger the batch, the less time it leaves
            chosen.append(job)
        return chosen

    def _rest(self, view: View, job: Job, decode: float) -> float:
        """Seconds to the deadline of its next token, with its credit."""
        assert job.stage is not None
        earned = 0.0
        if job.call_outputs and math.isfinite(job.slo.step):
            left = job.calls_left.get(f"{job.stage.model}.decode", 0)
            ahead = min(self.credit - job.call_outputs, left)
            earned = max(ahead, 0) * (job.slo.step - decode)
        return job.due_next - view.now + earned
