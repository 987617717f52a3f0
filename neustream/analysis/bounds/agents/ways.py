"""The ways of agents' requests, known in advance, and the windows that they leave to each call."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from neustream.analysis.bounds.linear import Floats
from neustream.analysis.bounds.tokens.costs import TOKENS, Costs, Limits


@dataclass(frozen=True, slots=True)
class Call:
    """A call of a model: tokens of its prompt, outputs, and seconds of what comes first."""

    model: str
    prompt: int
    outputs: int
    before_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Wait:
    """So many seconds pass, at a tool for instance; inf: it fails."""

    seconds: float


@dataclass(frozen=True, slots=True)
class Line:
    """Parts one after the other."""

    parts: Sequence[Way]


@dataclass(frozen=True, slots=True)
class Fork:
    """Branches at the same time, of which `need` have to be done."""

    branches: Sequence[Way]
    need: int


@dataclass(frozen=True, slots=True)
class Within:
    """A part that may take so many seconds from its start to its end."""

    part: Way
    seconds: float


Way = Call | Wait | Line | Fork | Within


def calls_of(way: Way) -> Iterator[Call]:
    """All calls of a way, of forks those of every branch."""
    match way:
        case Call():
            yield way
        case Line():
            for part in way.parts:
                yield from calls_of(part)
        case Fork():
            for branch in way.branches:
                yield from calls_of(branch)
        case Within():
            yield from calls_of(way.part)


@dataclass(frozen=True, slots=True)
class Window:
    """A call, and when it begins at the earliest and ends at the latest."""

    call: Call
    start: float
    end: float


@dataclass(frozen=True, slots=True)
class Served:
    """A model: lower bounds of what its steps take, and its limits."""

    costs: Costs
    limits: Limits


class Lengths:
    """How long ways take at least."""

    def __init__(self, models: Mapping[str, Served]) -> None:
        self._models = models
        self._known: dict[Call, float] = {}

    def outputs(self, call: Call) -> Floats:
        """Least seconds of each output: the prompt's, then of decodes, or of computing it again."""
        costs = self._models[call.model].costs
        context = call.prompt + np.arange(1, call.outputs, dtype=np.float64)
        other = costs.decodes
        alone = other.start + other.job + other.read * context
        lines = [line.start + line.token + line.job + line.read * context for line in costs.prompts]
        beside = np.max(lines, axis=0) if lines else alone
        again = costs.within[np.minimum(context, TOKENS).astype(np.int64)]
        later = np.minimum(np.minimum(alone, beside), again)
        return np.concatenate([[costs.whole(call.prompt)], later])

    def least(self, way: Way) -> float:
        """Seconds that a way takes if it meets nobody, or less; inf: it cannot be done."""
        match way:
            case Call():
                if way not in self._known:
                    self._known[way] = self._alone(way)
                return self._known[way]
            case Wait():
                return way.seconds
            case Line():
                return sum([self.least(part) for part in way.parts])
            case Fork():
                return sorted([self.least(branch) for branch in way.branches])[way.need - 1]
            case Within():
                seconds = self.least(way.part)
                return seconds if seconds <= way.seconds else math.inf

    def _alone(self, call: Call) -> float:
        memory = self._models[call.model].limits.memory
        if memory is not None and call.prompt + call.outputs - 1 > memory:
            return math.inf
        return call.before_s + float(self.outputs(call).sum())

    def windows(self, way: Way, start: float, end: float) -> Iterator[Window]:
        """Those of all calls that have to be made, if the way lies between `start` and `end`.

        Of a fork that does not need all branches none has to.
        """
        match way:
            case Call():
                yield Window(way, start + way.before_s, end)
            case Line():
                after = self.least(way)
                for part in way.parts:
                    seconds = self.least(part)
                    after -= seconds
                    yield from self.windows(part, start, end - max(after, 0.0))
                    start += seconds
            case Fork():
                for branch in way.branches if way.need == len(way.branches) else ():
                    yield from self.windows(branch, start, end)
            case Within():
                yield from self.windows(way.part, start, end)
