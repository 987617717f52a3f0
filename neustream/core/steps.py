"""How long one step of a continuously batched LLM takes: prefill, decode, or both in one.

A step is described by five numbers: prompts in prefill, their new tokens and the squares that their
attention costs, requests in decode, and the tokens of context that those read.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from neustream.core.graph import Phase
from neustream.core.profile import LatencyProfile, check_rising, check_table
from neustream.errors import ProfileError

Floats = NDArray[np.float64]


class Step(NamedTuple):
    """What one step computes. `square`: sum over prompts of (past + new)^2 - past^2, tokens^2."""

    prefills: int = 0
    tokens: float = 0.0
    square: float = 0.0
    decodes: int = 0
    context: float = 0.0


class StepLatency(Protocol):
    """Latency of the steps that the stages of one model share.

    `learns`: whether it changes with the steps that run. `error`: median relative error of its
    latest predictions; 0 for measured latencies, and until something was predicted.
    """

    name: str
    device: str

    @property
    def learns(self) -> bool: ...

    @property
    def error(self) -> float: ...

    def seconds(self, step: Step) -> float: ...

    def profiled(self, step: Step) -> float:
        """What was measured beforehand, where `seconds` has learnt since."""
        ...

    def observe(self, step: Step, seconds: float) -> None:
        """Take in a step that ran; measured latencies ignore it."""
        ...


class PrefillTable:
    """A measured table by tokens of a step, interpolated; a fit above it.

    Below the smallest measured size a step costs as much as that one (the device reads its weights
    anyway). Above the largest, `base + per_token * tokens + per_square * square`, moved up or down
    so that it joins the table.
    """

    def __init__(
        self,
        name: str,
        tokens: Sequence[int],
        latency_s: Sequence[float],
        fit: tuple[float, float, float],
        *,
        max_batch: int = 2**30,
        device: str = "",
    ) -> None:
        check_table(name, "tokens", tokens, latency_s)
        self.name, self.device, self.max_batch = name, device, max_batch
        self.tokens = [float(t) for t in tokens]
        self.latency_s = [float(x) for x in latency_s]
        self.fit = fit
        last = self.tokens[-1]
        self._join = self.latency_s[-1] - self._fitted(last, last * last)

    def _fitted(self, tokens: float, square: float) -> float:
        base, per_token, per_square = self.fit
        return base + per_token * tokens + per_square * square

    def latency(self, batch: int, total: float = 0.0, square: float = 0.0) -> float:
        sizes, seconds = self.tokens, self.latency_s
        if total <= sizes[0]:
            return seconds[0]
        if total >= sizes[-1]:
            return max(self._fitted(total, square) + self._join, seconds[-1])
        index = bisect_right(sizes, total)
        below, above = sizes[index - 1], sizes[index]
        share = (total - below) / (above - below)
        # of parts that follow others
        past = max(self.fit[2], 0.0) * max(square - total * total, 0.0)
        return seconds[index - 1] + share * (seconds[index] - seconds[index - 1]) + past


class DecodeGrid:
    """Measured decodes by batch and total context: bilinear inside of the grid, a linear fit
    outside.

    `latency_s[i][j]` is a step of `batch[i]` requests of `context[j]` tokens each. The fit is
    `base + per_job * batch + per_token * total context`.
    """

    def __init__(
        self,
        name: str,
        batch: Sequence[int],
        context: Sequence[int],
        latency_s: Sequence[Sequence[float]],
        fit: tuple[float, float, float],
        *,
        max_batch: int = 2**30,
        device: str = "",
    ) -> None:
        table = np.array(latency_s, dtype=float)
        if table.shape != (len(batch), len(context)) or not table.size:
            raise ProfileError(
                f"profile {name!r}: latency_s must be {len(batch)} rows (batch) "
                f"of {len(context)} (context)"
            )
        if not (np.isfinite(table).all() and (table > 0).all()):
            raise ProfileError(f"profile {name!r}: latencies must be finite and greater than 0")
        for what, axis in (("batch", batch), ("context", context)):
            check_rising(name, what, axis)
        self.name, self.device, self.max_batch = name, device, max_batch
        self.batch, self.context = [float(b) for b in batch], [float(c) for c in context]
        self.latency_s: list[list[float]] = table.tolist()
        self.arrays = np.array(self.batch), np.array(self.context), table
        self.fit = fit

    def latency(self, batch: int, total: float = 0.0, square: float = 0.0) -> float:
        context = total / batch
        nearest_batch = min(max(batch, self.batch[0]), self.batch[-1])
        nearest_context = min(max(context, self.context[0]), self.context[-1])
        seconds = self._inside(nearest_batch, nearest_context)
        if nearest_batch == batch and nearest_context == context:
            return seconds
        _, per_job, per_token = self.fit
        beyond = per_job * (batch - nearest_batch)
        beyond += per_token * (total - nearest_batch * nearest_context)
        return max(seconds + beyond, self.latency_s[0][0] / 2)

    def _inside(self, batch: float, context: float) -> float:
        """Seconds of `batch` requests of `context` tokens each, within the grid."""
        i, x = _cell(self.batch, batch)
        j, y = _cell(self.context, context)
        low, high = self.latency_s[i], self.latency_s[min(i + 1, len(self.batch) - 1)]
        k = min(j + 1, len(self.context) - 1)
        return (1 - x) * ((1 - y) * low[j] + y * low[k]) + x * ((1 - y) * high[j] + y * high[k])


def _cell(axis: list[float], value: float) -> tuple[int, float]:
    """The index of the point at or below `value`, and how far it is to the next one."""
    index = max(bisect_right(axis, value) - 1, 0)
    if index >= len(axis) - 1:
        return len(axis) - 1, 0.0
    below, above = axis[index], axis[index + 1]
    return index, (value - below) / (above - below)


class StepProfile:
    """Steps from a prefill and a decode profile; how the two mix is a model.

    A mixed step costs the larger of two estimates, times `mixed`:

    * the decode, and the prefill's tokens beyond the floor that every step pays (reading the
    weights);
    * a prefill of all tokens of the step, those of the decodes too, and the context that they read.

    The first is right while the step is bound by memory, the second while it is bound by compute
    (the roofline model). Where a backend runs the two one after the other (`sequential`), a mixed
    step costs their sum, times `mixed`. That is the median of measured over modelled mixed steps,
    where those were measured, else 1.
    """

    def __init__(
        self,
        name: str,
        prefill: LatencyProfile,
        decode: LatencyProfile,
        *,
        mixed: float = 1.0,
        sequential: bool = False,
        device: str = "",
    ) -> None:
        self.name, self.device = name, device
        self.prefill, self.decode = prefill, decode
        self.mixed, self.sequential = mixed, sequential
        self._floor = prefill.latency(1, 1.0, 1.0)
        self._latest = (0, 0.0, 0.0, 0.0)
        self._decoded = (0, 0.0, 0.0)

    @property
    def learns(self) -> bool:
        return False

    @property
    def error(self) -> float:
        return 0.0

    def profiled(self, step: Step) -> float:
        return self.seconds(step)

    def observe(self, step: Step, seconds: float) -> None:
        pass

    def seconds(self, step: Step) -> float:
        prefills, tokens, square, decodes, context = step
        if not decodes:
            return self.prefill.latency(prefills, tokens, square)
        if not prefills:  # the latest is kept: who expects, runs and observes a step all ask for it
            size, total, took = self._decoded
            if size != decodes or total != context:
                took = self.decode.latency(decodes, context)
                self._decoded = decodes, context, took
            return took
        decode, reading = self._decodes(decodes, context)
        prefill = self.prefill.latency(prefills, tokens, square)
        if self.sequential:
            return self.mixed * (prefill + decode)
        together = (
            self.prefill.latency(prefills + decodes, tokens + decodes, square + decodes) + reading
        )
        return self.mixed * max(decode + max(prefill - self._floor, 0.0), together)

    def _decodes(self, decodes: int, context: float) -> tuple[float, float]:
        """Seconds of a step of decodes, and of it what reading their context takes.

        The latest are kept: rules ask for many prompts beside the same decodes.
        """
        size, total, seconds, reading = self._latest
        if size != decodes or total != context:
            seconds = self.decode.latency(decodes, context)
            reading = seconds - self.decode.latency(decodes, float(decodes))
            self._latest = decodes, context, seconds, reading
        return seconds, reading


class PhaseProfile:
    """One phase of a step profile, as a latency profile of its own: steps of that phase alone."""

    def __init__(self, steps: StepLatency, phase: Phase, *, max_batch: int) -> None:
        self.steps = steps
        self.phase = phase
        self.name, self.device, self.max_batch = steps.name, steps.device, max_batch
        self._lone: Callable[[float], float] | None = None
        if phase == "decode":
            self._lone = getattr(steps, "lone", None)

    def latency(self, batch: int, total: float = 0.0, square: float = 0.0) -> float:
        if batch == 1 and self._lone is not None:  # it is asked for each job at each output
            return self._lone(total)
        if self.phase == "decode":
            return self.steps.seconds(Step(decodes=batch, context=total))
        return self.steps.seconds(Step(batch, total, square))
