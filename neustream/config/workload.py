"""The `workload` section: which requests come, and when; of pipelines and of language models."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from neustream.config.fields import (
    MOST_REQUESTS,
    Factor,
    Rate,
    Requests,
    Seconds,
    Section,
    Steps,
    TokenCount,
    Tokens,
    dropped,
    either,
)


class Burst(Section):
    """A surge: the `requests` that come after the first `after` do so `factor` times as fast.

    Below 1 the factor makes a lull.
    """

    after: int = Field(ge=0, le=MOST_REQUESTS)
    requests: Requests
    factor: Factor


class Workload(Section):
    """Arrivals. `seed` seeds each draw anew (0: the artifact's numbers).

    `rate` is in requests per second; `load` instead of it makes the rate that many times what one
    request after the other could be served at, so that a config fits any machine. `burst` speeds up
    some of the arrivals; those before it stay as they are, those behind it keep their gaps.

    `trace` takes arrivals, and what requests ask for, from a file, in a `format` that its content
    tells or that is named: `requests` of it at most, from `start_s` for `duration_s`, `speed` times
    as fast. What the trace does not say is drawn; `columns` names those that count. A trace of
    texts needs a `tokenizer`, and one without arrivals has `arrivals: gamma` or `constant`.
    `configs/README.md` has more.
    """

    arrivals: Literal["gamma", "constant", "trace"] = "gamma"
    requests: Requests = 500
    rate: Rate = 1.0
    load: Factor | None = None
    cv: float = Field(default=1.0, ge=0.001, le=1000)
    trace: Path | None = None
    format: str = "auto"
    start_s: float = Field(default=0.0, ge=0, le=1e11)
    duration_s: Seconds | None = None
    speed: Factor = 1.0
    columns: list[str] | None = Field(default=None, min_length=1)
    tokenizer: Path | None = None
    seed: int = Field(default=0, ge=0, lt=2**32)
    burst: Burst | None = None

    @model_validator(mode="before")
    @classmethod
    def _arrivals_of_trace(cls, raw: Any) -> Any:
        """A trace brings its arrivals, unless others are asked for."""
        if isinstance(raw, dict) and raw.get("trace") is not None:
            return {"arrivals": "trace", **raw}
        return raw

    @model_validator(mode="after")
    def _trace(self) -> Workload:
        given = self.model_fields_set
        own = sorted(given & {"format", "start_s", "duration_s", "speed", "columns", "tokenizer"})
        if self.trace is None and (own or self.arrivals == "trace"):
            raise ValueError(f"{own[0] if own else 'arrivals: trace'} needs a trace: FILE")
        idle = [key for key in ("rate", "load", "cv", "burst") if key in given]
        if self.arrivals == "trace" and idle:
            hint = dropped(*(f"workload.{key}" for key in idle))
            raise ValueError(f"a trace brings its arrivals: {', '.join(idle)} do not go with it; {hint}")
        if self.load is not None and "rate" in given:
            hint = either("workload.load", "workload.rate")
            raise ValueError(f"load takes the place of rate; {hint}")
        if self.burst is not None and self.burst.after >= self.requests:
            raise ValueError(f"burst: none comes after {self.burst.after} of {self.requests} requests")
        return self


class StepsWorkload(Workload):
    """The workload of a pipeline: `steps` is what a stage's `times: steps` counts."""

    steps: Steps = 1

    @model_validator(mode="before")
    @classmethod
    def _no_tokens(cls, raw: Any) -> Any:
        tokens = ("prompt", "output", "max_tokens")
        return without(raw, tokens, "numbers of tokens are for an llm")


class TokensWorkload(Workload):
    """The workload of a language model.

    `prompt` are the tokens of the prompts, `output` those after which the model ends (which no
    policy knows), and `max_tokens` what requests allow at most, which policies do know. `images`:
    the share of requests whose prompt has an image, its tokens among the prompt's.
    """

    prompt: Tokens = 128
    output: Tokens = 128
    max_tokens: TokenCount = 256
    images: float = Field(default=0.0, ge=0, le=1)

    @model_validator(mode="before")
    @classmethod
    def _no_steps(cls, raw: Any) -> Any:
        return without(raw, ("steps",), "numbers of steps are for a pipeline of stages")


def without(raw: Any, keys: tuple[str, ...], why: str) -> Any:
    """What was given, if it has none of the keys of the other kind."""
    other = [key for key in keys if isinstance(raw, dict) and key in raw]
    if other:
        raise ValueError(f"{other[0]}: {why}")
    return raw
