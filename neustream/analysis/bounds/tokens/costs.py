"""Lower bounds of what steps take, from a profile of tables.

Notation, for the formulas below: T tokens of prompts, D decodes, C tokens of context that these
read; g is the prefill by tokens, f is g(1), d the decode, m is `mixed`, and h a rising lower bound
of g. By `StepProfile`, a step without decodes takes g(T) >= h(T), one without prompts d(D, C), and
a mixed one

    m * max(d(D, C) + max(g(T) - f, 0), g(T + D) + d(D, C) - d(D, D)),
    or, if `sequential` ("apart"), m * (g(T) + d(D, C)).

Let s + e * T be a line below h, d(D, C) >= b + j * D + r * C, and
d(D, C) - d(D, D) >= k + q * (C - D), with j, r, q >= 0 >= k, and n = min(m, 1). Then the following
are below every step with T > 0 tokens, with D and without:

    min(s, m * (b + s - f)) + n * (e * T + j * D + r * C)        (apart: min(s, m * (b + s)) + ...)
    min(s, m * (s + k)) + n * (e * (T + D) + q * (C - D))        (not if apart)

and n * (b + j * D + r * C) is below every other step: if others' prompts are in it, it takes m * d
or longer.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from neustream.analysis.bounds.linear import Floats
from neustream.analysis.bounds.tokens.lines import (
    Line,
    decode_lines,
    highest,
    hull,
    prefill_corners,
)
from neustream.core.steps import PrefillTable, StepLatency, StepProfile
from neustream.errors import ProfileError

TOKENS = 4096
"""Tokens up to which windows are looked at."""


@dataclass(frozen=True, slots=True)
class Limits:
    """The most decodes in a step, tokens of KV cache, and what steps take of their profile."""

    max_batch: int
    memory: int | None
    scale: float = 1.0
    overhead_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Costs:
    """Lower bounds of steps, in seconds.

    `least[T]` is of a step with T or more tokens of prompts, `within[T]` of whole steps for T or
    more, and `base` of any step. `prompts` are below steps with tokens of prompts, `decodes` below
    the others.
    """

    base: float
    least: Floats
    within: Floats
    prompts: Sequence[Line]
    decodes: Line

    def whole(self, tokens: int) -> float:
        """Least seconds of steps that compute so many tokens."""
        return float(self.within[min(tokens, TOKENS)])

    def most(self, seconds: float) -> int | None:
        """Tokens that whole steps compute in `seconds` at most; None: more than is known."""
        tokens = int(np.searchsorted(self.within, seconds, "right")) - 1
        return None if tokens >= TOKENS else tokens


def costs_of(steps: StepLatency, context: int, limits: Limits) -> Costs:
    """From a profile, for requests of at most `context` tokens.

    Raises:
        ProfileError: it is not a `StepProfile` of tables, which alone say enough of themselves.
    """
    if not isinstance(steps, StepProfile) or not isinstance(steps.prefill, PrefillTable):
        kind = type(steps).__name__
        raise ProfileError(f"no bound for steps {steps.name!r}: a {kind} says too little of itself")
    batch = min(limits.max_batch, steps.decode.max_batch)
    most = (batch * context if limits.memory is None else limits.memory) + batch
    tokens, seconds = prefill_corners(steps.prefill, context, most)
    floor = steps.prefill.latency(1, 1.0, 1.0)
    decode, reading = decode_lines(steps.decode, context, batch)
    mix = _Mix(steps.mixed, steps.sequential, floor, decode, reading)
    lines = (line for start, slope in hull(tokens, seconds) for line in mix.below(start, slope))
    scale, overhead_s = limits.scale, limits.overhead_s
    others = mix.others().stretched(scale, overhead_s)
    first = mix.least(tokens, seconds) * scale + overhead_s
    return Costs(
        base=min(float(first[0]), others.start + others.job + others.read),
        least=np.concatenate([[0.0], first]),
        within=_within(first),
        prompts=highest(line.stretched(scale, overhead_s) for line in lines),
        decodes=others,
    )


@dataclass(frozen=True, slots=True)
class _Mix:
    """How prompts and decodes share a step: m, whether `apart`, f, and lines below decodes."""

    mixed: float
    apart: bool
    floor: float
    decode: Line
    reading: Line

    def below(self, start: float, token: float) -> Iterator[Line]:
        """Lines below steps with prompts, from one below prefills alone: s and e above.

        The first counts no decodes if a token costs less than one of context and its part of a
        decode: README.md, "Steps of prompts and decodes".
        """
        decode, reading, least = self.decode, self.reading, min(self.mixed, 1.0)
        alone = least * token
        rising = token >= decode.job + decode.read
        job, read = (least * decode.job, least * decode.read) if rising else (0.0, 0.0)
        beside = self.mixed * (decode.start + self._beside(start, token))
        yield Line(min(start, beside), alone, job, read)
        if not self.apart and token >= reading.read:
            read = least * reading.read
            beside = self.mixed * (start + reading.start)
            yield Line(min(start, beside), alone, alone - read, read)

    def _beside(self, start: float, token: float) -> float:
        """What a prefill adds to decodes at least, at no tokens."""
        if self.apart:
            return start
        return start - self.floor if token else max(start - self.floor, 0.0)

    def others(self) -> Line:
        """A line below steps without prompts of those that count."""
        least = min(self.mixed, 1.0)
        start, job, read = self.decode.start, self.decode.job, self.decode.read
        return Line(least * start, 0.0, least * job, least * read)

    def least(self, tokens: Floats, seconds: Floats) -> Floats:
        """Seconds of a step with 1, 2, ... `TOKENS` tokens or more, from corners of prefills."""
        alone = np.interp(np.arange(1, TOKENS + 1), tokens, seconds)
        more = alone if self.apart else np.maximum(alone - self.floor, 0.0)
        first = np.minimum(alone, self.mixed * (self.decode.start + self.decode.job + more))
        after = float(seconds[tokens >= TOKENS].min(initial=math.inf))
        after = min(after, float(first[-1]))
        beside = self.mixed * (self.decode.start + max(after - self.floor, 0.0))
        first = np.append(first, min(after, beside))
        return np.minimum.accumulate(first[::-1])[::-1][:-1]


def _within(least: Floats) -> Floats:
    """Least seconds of whole steps that compute 0, 1, 2, ... tokens.

    `least` is of one step with 1, 2, ...
    """
    within = np.zeros(len(least) + 1)
    for tokens in range(1, len(least) + 1):
        within[tokens] = (least[:tokens] + within[tokens - 1 :: -1][:tokens]).min()
    return within
