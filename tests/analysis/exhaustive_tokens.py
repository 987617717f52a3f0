"""Small random loads of a language model, and the most that any scheduler can serve of one, by trying everything."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

from neustream import SLO, Graph, KVCache, LinearProfile, Pool, Request
from neustream.core.steps import PrefillTable, Step, StepProfile
from neustream.core.types import TICK
from neustream.graphs import llm

INF = float("inf")


@dataclass
class Load:
    requests: list[Request]
    lengths: dict[str, int]
    steps: StepProfile
    memory: int | None
    max_batch: int

    @property
    def pool(self) -> Pool:
        caches = {} if self.memory is None else {"llm": KVCache(self.memory, 1)}
        return Pool("gpu", ("llm.prefill", "llm.decode"), kv_caches=caches)


def draw(seed: int) -> Load:
    """A random load; times are multiples of 1/4 s, so that sums are exact."""
    rng = random.Random(seed)
    steps = draw_steps(rng)
    graph = Graph("chat", llm("llm", max_batch=4))
    count, spread = rng.choice([2, 3, 3, 3]), rng.choice([0, 4, 10])
    weights = rng.choice([[1], [1], [1, 2], [0.5, 1.25]])
    requests, lengths = [], {}
    for at in range(count):
        prompt, outputs = rng.randint(1, 3), rng.randint(1, 4 if count == 2 else 3)
        first = steps.seconds(Step(1, prompt, prompt * prompt))
        pace = steps.seconds(Step(decodes=1, context=prompt + outputs))
        slo = _promise(rng, first, pace, outputs, rng.choice(weights))
        params = {"prompt_tokens": prompt, "max_tokens": 8}
        requests.append(Request(str(at), graph, rng.randint(0, spread) / 4, slo, params))
        lengths[str(at)] = outputs
    most = max(r.params["prompt_tokens"] + lengths[r.id] - 1 for r in requests)
    memory = rng.choice([None, most, most + 1, most + 3])
    return Load(sorted(requests, key=lambda r: r.arrival), lengths, steps, memory, rng.choice([1, 2, 4, 4]))


def draw_steps(rng: random.Random) -> StepProfile:
    """A random profile, in multiples of 1/4 s."""
    prefill = [rng.randint(2, 5)]
    for _ in range(5):
        prefill.append(prefill[-1] + rng.randint(0, 3))
    per_token, per_job, per_read = rng.choice([0.25, 0.5]), rng.choice([0, 0, 0.25]), rng.choice([0, 0, 0.25])
    table = PrefillTable("p", range(1, 7), [x / 4 for x in prefill], (0.0, per_token, 0.0))
    line = LinearProfile("d", base=rng.randint(1, 5) / 4, per_job=per_job, per_size=per_read, max_batch=4)
    return StepProfile("s", table, line, sequential=rng.random() < 0.3)


def _promise(rng: random.Random, first: float, pace: float, outputs: int, weight: float) -> SLO:
    scale = rng.choice([1.0, 1.3, 1.7, 2.5, 4.0])

    def quarter(seconds: float) -> float:
        return max(round(seconds * scale * 4), 1) / 4

    kind = rng.choice(["pace", "pace", "pace", "pace", "first", "total", "both"])
    total = quarter(first + pace * (outputs - 1))
    return SLO(
        total=total if kind in ("total", "both") else INF,
        first=quarter(first) if kind != "total" else INF,
        step=quarter(pace) if kind in ("pace", "both") else INF,
        weight=weight,
    )


@dataclass(frozen=True)
class _Text:
    """What is known of a request, and `due`: of each output."""

    arrival: float
    prompt: int
    outputs: int
    weight: float
    due: tuple[float, ...]


def _text(request: Request, outputs: int) -> _Text:
    """Outputs without a deadline come last, and are left out: they can come at any time."""
    slo = request.slo
    paced = [slo.first + output * slo.step if output else slo.first for output in range(outputs)]
    due = tuple(request.arrival + min(at, slo.total) + TICK for at in paced if min(at, slo.total) < INF)
    return _Text(request.arrival, request.params["prompt_tokens"], len(due), slo.weight, due)


State = tuple[int, int]
"""Of a request: outputs so far, tokens in memory. (-1, 0) is one that is over."""
OVER: State = (-1, 0)


Choice = tuple[State, int]
"""Memory of a request before a step, and tokens that it computes in it."""


def optimum(load: Load) -> float:
    """The most weight on time over all schedules.

    Steps start when something arrives or ends: moving one to the earliest moment makes none late.
    Before each, any requests lose their memory, and then any set of them computes any part of what
    the next output needs: one token of it is a decode, if an output came before.
    """
    return _Schedules(load).ahead(0.0, ((0, 0),) * len(load.requests))


class _Schedules:
    """All schedules of a load."""

    def __init__(self, load: Load) -> None:
        self._load = load
        self._texts = [_text(request, load.lengths[request.id]) for request in load.requests]
        self._memory = INF if load.memory is None else load.memory
        prefill, decode = Step(1, 1, 1), Step(decodes=1, context=2)
        self._quickest = min(load.steps.seconds(prefill), load.steps.seconds(decode))
        self.ahead = cache(self._ahead)

    def _told(self, at: int, state: State, now: float) -> State:
        """What is over, if it will be late: each output takes a step."""
        outputs, _ = state
        if outputs < 0:
            return OVER
        for further, due in enumerate(self._texts[at].due[outputs:], 1):
            if now + further * self._quickest > due:
                return OVER
        return state

    def _choices(self, at: int, state: State, now: float) -> list[Choice]:
        text, (outputs, held) = self._texts[at], state
        if outputs < 0 or text.arrival > now:
            return [(state, 0)]
        found = []
        for kept in sorted({held, 0}):
            left = text.prompt + outputs - kept
            found += [((outputs, kept), new) for new in range(left, -1, -1)]
        return found

    def _decodes(self, at: int, state: State, new: int) -> bool:
        outputs, held = state
        return new == 1 and outputs > 0 and held == self._texts[at].prompt + outputs - 1

    def _seconds(self, chosen: tuple[Choice, ...]) -> float | None:
        """Of a step; None if it is none, or has no room."""
        prefills = tokens = square = jobs = context = filled = 0
        for at, (state, new) in enumerate(chosen):
            held = state[1]
            filled += held + new
            if self._decodes(at, state, new):
                jobs, context = jobs + 1, context + held + 1
            elif new:
                prefills, tokens, square = prefills + 1, tokens + new, square + (2 * held + new) * new
        if not prefills + jobs or filled > self._memory or max(jobs, prefills) > self._load.max_batch:
            return None
        return self._load.steps.seconds(Step(prefills, tokens, square, jobs, context))

    def _after(self, at: int, state: State, new: int, end: float) -> tuple[State, float]:
        """The state after a step, and the weight that is on time by it."""
        outputs, held = state
        text = self._texts[at]
        if outputs < 0 or held + new < text.prompt + outputs:
            return self._told(at, (outputs, held + new), end), 0.0
        if end > text.due[outputs]:
            return OVER, 0.0
        if outputs + 1 == text.outputs:
            return OVER, text.weight
        return self._told(at, (outputs + 1, held + new), end), 0.0

    def _steps(self, now: float, states: tuple[State, ...]) -> Iterator[tuple[float, tuple[Choice, ...]]]:
        """When each step that may start now ends, and who computes what in it."""
        options = [self._choices(at, state, now) for at, state in enumerate(states)]
        for chosen in itertools.product(*options):
            if (lasts := self._seconds(chosen)) is not None:
                yield now + lasts, chosen

    def _ahead(self, now: float, states: tuple[State, ...]) -> float:
        """Weight on time from here on."""
        hope = sum(text.weight for text, (outputs, _) in zip(self._texts, states, strict=True) if outputs >= 0)
        if not hope:
            return 0.0
        best = 0.0
        later = [text.arrival for text in self._texts if text.arrival > now]
        if later:
            best = self.ahead(min(later), tuple(self._told(at, state, min(later)) for at, state in enumerate(states)))
        for end, chosen in self._steps(now, states):
            if best >= hope:
                break
            found = [self._after(at, state, new, end) for at, (state, new) in enumerate(chosen)]
            best = max(best, sum(gain for _, gain in found) + self.ahead(end, tuple(state for state, _ in found)))
        return best
