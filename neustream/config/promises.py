"""The `slo` section: what requests are promised."""

from __future__ import annotations

from pydantic import Field, model_validator

from neustream.config.fields import Seconds, Section, Share, dropped, either

TOKEN_SLOS = ("first_scale", "step_scale", "first_s", "step_s")


def _check_slo(slo: Slo | SloClass) -> None:
    """What is wrong in combinations of promises, as ValueErrors."""
    for a, b in (("scale", "total_s"), ("first_scale", "first_s"), ("step_scale", "step_s")):
        if getattr(slo, a) is not None and getattr(slo, b) is not None:
            hint = f"; {either(f'slo.{a}', f'slo.{b}')}" if isinstance(slo, Slo) else ""
            raise ValueError(f"give {a} or {b}, not both{hint}")
    if slo.first_scale is None and slo.first_s is None and (slo.step_scale or slo.step_s) is not None:
        step = "step_s" if slo.step_scale is None else "step_scale"
        hint = f"; {dropped(f'slo.{step}')}" if isinstance(slo, Slo) else ""
        raise ValueError(f"{step} needs first_scale or first_s: output k is due at first + k * step{hint}")


class SloClass(Section):
    """A class of promises: as a `scale` of the request's own solo latency, or absolute; without any, none."""

    name: str = ""
    share: Share = 1.0
    weight: Share = 1.0
    scale: Share | None = None
    total_s: Seconds | None = None
    first_scale: Share | None = None
    step_scale: Share | None = None
    first_s: Seconds | None = None
    step_s: Seconds | None = None

    @property
    def of_tokens(self) -> bool:
        """Whether anything is promised of single outputs."""
        return any(getattr(self, name) is not None for name in TOKEN_SLOS)

    @model_validator(mode="after")
    def _one(self) -> SloClass:
        _check_slo(self)
        return self


class Slo(Section):
    """What requests are promised: one `scale` or `total_s` for all, or `classes` drawn by share.

    With a scale, a request's SLO is `scale * (solo latency + extra_s)`. Outputs of an LLM: the first is
    due after `first_s` (TTFT), or `first_scale` times the prefill of that prompt alone; each further one
    `step_s` later (TPOT, cumulative: an early token buys slack), or `step_scale` times a decode alone
    in the middle of the request's `max_tokens`. A scale of an LLM's whole request is of all `max_tokens`.
    With none of them, nothing is promised: requests are on time whenever they end.
    """

    scale: Share | None = None
    total_s: Seconds | None = None
    classes: list[SloClass] | None = Field(default=None, min_length=1)
    first_scale: Share | None = None
    step_scale: Share | None = None
    first_s: Seconds | None = None
    step_s: Seconds | None = None
    extra_s: float = Field(default=0.0, ge=0, le=1e9)

    @property
    def of_tokens(self) -> bool:
        """Whether anything is promised of single outputs."""
        if self.classes is not None:
            return any(some.of_tokens for some in self.classes)
        return any(getattr(self, name) is not None for name in TOKEN_SLOS)

    @model_validator(mode="after")
    def _one(self) -> Slo:
        _check_slo(self)
        alone = [name for name in ("scale", "total_s", *TOKEN_SLOS) if getattr(self, name) is not None]
        if self.classes is not None and alone:
            raise ValueError(f"{alone[0]} goes into the classes, or alone; {either('slo.classes', f'slo.{alone[0]}')}")
        return self
