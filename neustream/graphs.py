"""Ready-made graphs: the LLM whose requests are prefilled once and decoded token by token."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from neustream.core.graph import Node, Stage, loop, seq, switch
from neustream.core.job import Job
from neustream.core.nodes import call
from neustream.core.profile import LatencyProfile
from neustream.core.steps import PhaseProfile, StepLatency
from neustream.core.types import SLO

Count = Callable[[Job], int] | str
SEE_BATCH = 8
"""Requests whose images a vision tower looks at in one step, at most."""


def llm(
    name: str = "llm",
    *,
    max_batch: int = 256,
    prompt: Count = "prompt_tokens",
    max_tokens: Count = "max_tokens",
    cached: str = "cached_tokens",
    slo: SLO | None = None,
) -> Node:
    """One call of a language model: `<name>.prefill`, then `<name>.decode` until it ends.

    Both stages emit a token a step, may share a step (label `name`) and keep their tokens in the pool's
    memory. A step's update `{"ended": True}` says that the model ended (EOS, a stop string); at
    `max_tokens` outputs the call ends of itself. A job whose memory was taken goes back to its
    prefill, whose tokens are then those of the prompt and those generated so far.

    Args:
        max_batch: the most requests in one step.
        prompt: tokens of the prompt: a request parameter's name, or a function of the job.
        max_tokens: the most outputs, 1 or more, likewise.
        cached: the request parameter that says how many tokens of the prompt are in the cache when it
            comes, 0 if it is not given; these are not computed.
        slo: what this call is promised; None: what the request is (see `call`).
    """
    tokens, most = _count(prompt, "tokens of a prompt"), _count(max_tokens, "max_tokens")

    def made(job: Job) -> int:
        stage = job.stage
        if stage is None or stage.model != name:  # in a call before this one
            return 0
        return job.call_outputs

    def context(job: Job) -> int:
        return tokens(job) + made(job)

    def ended(job: Job) -> bool:
        latest = job.state if job.output is None else job.output  # of this call, not of one before it
        return job.call_outputs >= most(job) or bool(latest.get("ended"))

    def expected(job: Job) -> int:
        return max(most(job) - max(made(job), 1), 0)

    def known(job: Job) -> float:
        return float(job.params.get(cached, 0))

    prefill = Stage(
        f"{name}.prefill",
        max_batch,
        emits=True,
        size=context,
        model=name,
        phase="prefill",
        known=known,
    )
    decode = Stage(f"{name}.decode", max_batch, emits=True, size=context, model=name, phase="decode")
    more = loop(decode, until=ended, expect=expected, steady=True)
    return call(seq(prefill, switch(ended, {False: more, True: seq()}, likely=False)), name, slo=slo)


def with_eyes(stage: Stage, node: Node, looks: Callable[[Job], int]) -> Node:
    """A language model's node behind its vision tower's stage, which runs `looks(job)` times: 0 without images."""
    return seq(loop(stage, times=looks), node)


def llm_profiles(name: str, steps: StepLatency, max_batch: int = 256) -> dict[str, LatencyProfile]:
    """The profiles that a scheduler needs for `llm(name)`, by stage."""
    return {
        f"{name}.prefill": PhaseProfile(steps, "prefill", max_batch=max_batch),
        f"{name}.decode": PhaseProfile(steps, "decode", max_batch=max_batch),
    }


def _count(of: Count, what: str) -> Callable[[Job], int]:
    def checked(value: Any) -> int:
        if type(value) is int and value >= 1:
            return value
        raise ValueError(f"{what} must be a whole number of 1 or more, got {value!r}")

    if callable(of):
        asked = of
        return lambda job: checked(asked(job))
    name = of

    def given(job: Job) -> int:  # at each output
        value = job.params[name]
        return value if type(value) is int and value >= 1 else checked(value)

    return given
