"""A profile that was read: who is asked what, in which loads, and what of it is not done."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from neustream.bench.plan import Plan, Target
from neustream.bench.profiles.arrivals import LAWS, Law, arrivals, arrivals_until, growing
from neustream.errors import ConfigError
from neustream.workload.arrivals import Ramp
from neustream.workload.asks import NO_LIMITS, Limits
from neustream.workload.mixing import with_models
from neustream.workload.sources import Asked, Source
from neustream.workload.texts import Texts

Dialect = Literal["inference-perf", "guidellm", "vllm-benchmark", "nop"]
FASTEST_S = 0.01
MOST = 200_000
LARGEST = 2_000_000
"""Requests of a closed loop that only its duration ends: for so many seconds each, at most `MOST`;
a load with more than `LARGEST` is refused."""


@dataclass(frozen=True)
class Load:
    """One stage.

    Attributes:
        law: how requests come; `cv` of the gaps between them.
        requests: how many; None: as many as come in `duration_s`.
        rate: requests a second; None: there is none.
        concurrency: the most under way at once; None: no bound.
        duration_s: after which no more are sent; None: no bound.
        ramp: the rate, where it changes; its gaps are random.
        rampup_s: in which the rate of the law `even` grows from nothing.
    """

    law: Law
    requests: int | None = None
    rate: float | None = None
    concurrency: int | None = None
    duration_s: float | None = None
    cv: float = 1.0
    ramp: Ramp | None = None
    rampup_s: float = 0.0

    @property
    def name(self) -> str:
        """Short, for tables."""
        if self.rate is not None:
            return f"rate {self.rate:g}"
        if self.ramp is not None:
            return f"ramp {self.ramp.start:g} to {self.ramp.end:g}"
        return f"concurrency {self.concurrency}" if self.concurrency else "all at once"

    def __str__(self) -> str:
        parts = [] if self.rate is None else [f"{self.rate:g} requests/s"]
        if self.ramp is not None:
            parts.append(str(self.ramp))
        if self.rampup_s:
            parts.append(f"growing from nothing in {self.rampup_s:g} s")
        if self.concurrency is not None:
            parts.append(f"at most {self.concurrency} at once")
        if self.requests is not None:
            parts.append(f"{self.requests} requests")
        if self.duration_s is not None:
            parts.append(f"{self.duration_s:g} s")
        return ", ".join([*parts, LAWS[self.law]])

    @property
    def expected(self) -> float:
        """How many requests there will be, about; of a closed loop with a duration, at most."""
        if self.requests is not None:
            return self.requests
        rate, seconds, growing_s = self.rate or 0.0, self.duration_s or 0.0, self.rampup_s
        if seconds < growing_s:
            return rate * seconds**2 / growing_s / 2
        return rate * (seconds - growing_s / 2)

    @property
    def seconds(self) -> float | None:
        """How long it takes as far as that is known beforehand."""
        if self.duration_s is not None:
            return self.duration_s
        if self.ramp is not None:
            return float(self._arrivals(0)[-1])
        if not self.rate or self.requests is None:
            return None
        return float(self._arrivals(0)[-1]) if self.rampup_s else self.requests / self.rate

    def plan(self, number: int, source: Source, seed: int, texts: Texts, limits: Limits) -> Plan:
        """What is played: the requests of this load, stage `number` (from 0)."""
        when = self._arrivals(seed + number)
        requests = self._requests() if when is None else len(when)
        streams = self.concurrency or 0
        asked = Asked(requests, seed, texts, when, limits, min(streams, requests), number)
        asks = source.asks(asked)
        return Plan(
            asks=asks if self.open_ended else list(asks),
            name=self.name,
            rate=self.rate,
            concurrency=self.concurrency,
            duration_s=self.duration_s,
            arrivals=LAWS[self.law],
            seed=seed,
            meta={"scenario": source.scenario, "stage": number},
        )

    @property
    def open_ended(self) -> bool:
        """Whether only its duration ends it."""
        return self.requests is None and self.law == "closed"

    def _drawn(self) -> int:
        """As many arrivals as there can be."""
        return self.requests or math.ceil((self.rate or 1.0) * (self.duration_s or 0.0)) + 1

    def _requests(self) -> int:
        if self.requests is not None:
            return self.requests
        places = self.concurrency or 1
        return min(MOST, math.ceil(places * (self.duration_s or 0.0) / FASTEST_S))

    def _arrivals(self, seed: int) -> Any:
        if self.ramp is not None:
            return self.ramp.arrivals(self._requests(), cv=self.cv, seed=seed)
        rate = self.rate or 1.0
        if self.rampup_s:
            grown = growing(self._drawn(), rate, self.rampup_s)
            return grown if self.duration_s is None else grown[grown < self.duration_s]
        if self.requests is None and self.law not in ("closed", "at once"):
            assert self.duration_s is not None
            return arrivals_until(self.law, self.duration_s, rate, self.cv, seed)
        found = arrivals(self.law, self._requests(), rate, self.cv, seed)
        if found is not None and self.law in ("even", "poisson") and self.duration_s is not None:
            return found[found < self.duration_s]
        return found


@dataclass(frozen=True)
class Sweep:
    """Loads whose rates are found by loads before them.

    Attributes:
        kind: "saturation" is inference-perf's: one burst, and the rate at which its requests end;
            "between" is guidellm's: one request at a time, then many, and rates between the two.
        probes: the loads that are played first.
        count: of the loads that follow; `spacing` of their rates.
        percentile: of the rates at which requests ended, of `saturation`.
        load: what the following ones are like but for their rate.
    """

    kind: Literal["saturation", "between"]
    probes: tuple[Load, ...]
    count: int
    load: Load
    spacing: Literal["linear", "geometric"] = "linear"
    percentile: float = 95.0

    def __str__(self) -> str:
        shown = dataclasses.replace(self.load, rate=None)
        if self.kind == "saturation":
            return f"{self.count} loads up to the rate of a burst's end ({self.spacing}): {shown}"
        return f"{self.count} loads at rates between those two: {shown}"


@dataclass(frozen=True)
class Left:
    """A key that changes nothing, and why."""

    key: str
    why: str


@dataclass
class Parts:
    """What a profile says in its dialect.

    Attributes:
        loads: one after another, `pause_s` seconds between them; empty of a sweep, and of nop.
        warmups: requests that go before all, of which nothing is kept.
        tokenizer: as the profile names it, "" if it does not.
        limits: what each request is promised; `constraints`: further ones, by inference-perf's
            names, in seconds.
        models: that each request asks for one of, drawn or `in_turns`; none: the target's.
        shares: of these models in what is drawn; none: all alike.
        left: what is read and not used; notes: what is done otherwise than its tool does it.
    """

    target: Target
    source: Source | None = None
    loads: tuple[Load, ...] = ()
    sweep: Sweep | None = None
    pause_s: float = 0.0
    warmups: int = 0
    seed: int = 0
    tokenizer: str = ""
    limits: Limits = NO_LIMITS
    models: Sequence[str] = ()
    in_turns: bool = False
    shares: Sequence[float] = ()
    constraints: Mapping[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    left: list[Left] = field(default_factory=list)

    def plan(self, load: Load, number: int, texts: Texts) -> Plan:
        """What is played of a load, stage `number` (from 0).

        Raises:
            ConfigError: the profile sends no load, or its file has no prompt.
        """
        if self.source is None:
            raise ConfigError("a profile without a source of requests sends no load")
        found = load.plan(number, self.source, self.seed, texts, self.limits)
        if not self.models:
            return found
        asks = with_models(found.asks, self.models, self.in_turns, self.seed + number, self.shares)
        return dataclasses.replace(found, asks=asks)

    def leave(self, key: str, why: str) -> None:
        """Say that a key changes nothing."""
        self.left.append(Left(key, why))

    @property
    def played_first(self) -> tuple[Load, ...]:
        """The loads that are known beforehand."""
        return self.loads if self.sweep is None else self.sweep.probes


@dataclass(kw_only=True)
class Profile(Parts):
    """A profile that was read from a file.

    Attributes:
        lacks: what must be known before it is run.
        values: as it was read, with what was put in place of tokens and overridden.
    """

    path: Path
    dialect: Dialect
    lacks: Sequence[str] = ()
    values: Mapping[str, Any] = field(default_factory=dict)
