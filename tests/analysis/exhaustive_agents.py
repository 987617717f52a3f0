"""Small random agents on several devices, and the most that any scheduler can serve of them, by trying everything."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

from exhaustive_tokens import draw_steps

from neustream import SLO, Graph, Request
from neustream.analysis.bounds.agents.upper import Model
from neustream.analysis.bounds.agents.ways import Call, Fork, Line, Wait, Way, Within
from neustream.analysis.bounds.tokens.costs import Limits
from neustream.core.steps import Step
from neustream.core.types import TICK
from neustream.graphs import llm

INF = float("inf")
GRAPH = Graph("agent", llm("llm"))
"""Of requests whose ways are told beside them."""


@dataclass
class Load:
    requests: list[Request]
    ways: dict[str, Line]
    models: dict[str, Model]


def draw_agents(seed: int) -> Load:
    """A random load; times are multiples of 1/4 s, so that sums are exact."""
    rng = random.Random(seed)
    devices = rng.choice([("one", "two"), ("one", "two"), ("one", "one")])
    models = {name: _model(rng, device) for name, device in zip("ab", devices, strict=True)}
    requests, ways = [], {}
    for at in range(rng.choice([1, 2, 2, 2])):
        way = _way(rng)
        total = max(round(_alone(way, models) * rng.choice([0.9, 1.0, 1.2, 1.6]) * 4), 1) / 4
        slo = SLO(total, weight=rng.choice([1, 1, 1, 2.5]))
        requests.append(Request(str(at), GRAPH, rng.randint(0, 3) / 4, slo, {}))
        ways[str(at)] = way
    return Load(sorted(requests, key=lambda request: request.arrival), ways, models)


def _model(rng: random.Random, device: str) -> Model:
    return Model(draw_steps(rng), Limits(rng.choice([1, 2, 4]), rng.choice([None, 3, 4])), device)


def _call(rng: random.Random) -> Call:
    return Call(rng.choice("ab"), rng.randint(1, 2), rng.randint(1, 2), rng.choice([0.0, 0.0, 0.25]))


def _way(rng: random.Random) -> Line:
    kind = rng.choice(["chain", "chain", "tool", "loop", "fork", "first", "promise"])
    if kind == "chain":
        return Line([_call(rng) for _ in range(rng.randint(1, 2))])
    if kind == "tool":
        return Line([_call(rng), Wait(rng.randint(1, 4) / 4), _call(rng)])
    if kind == "loop":
        return Line([_call(rng)] * 2)
    if kind == "promise":
        return Line([Within(_call(rng), rng.randint(1, 12) / 4), _call(rng)])
    fork = Fork([_call(rng), rng.choice([_call(rng), Wait(0.5)])], 2 if kind == "fork" else 1)
    return Line([fork, *([_call(rng)] * rng.randint(0, 1))])


def _alone(way: Way, models: dict[str, Model]) -> float:
    """Seconds of a way alone, without parts of prompts."""
    match way:
        case Call():
            steps, prompt = models[way.model].steps, way.prompt
            decodes = [steps.seconds(Step(decodes=1, context=prompt + at)) for at in range(1, way.outputs)]
            return way.before_s + steps.seconds(Step(1, prompt, prompt * prompt)) + sum(decodes)
        case Wait():
            return way.seconds
        case Line():
            return sum(_alone(part, models) for part in way.parts)
        case Fork():
            return sorted(_alone(branch, models) for branch in way.branches)[way.need - 1]
        case Within():
            return _alone(way.part, models)


@dataclass(frozen=True)
class Text:
    """A call that is under way: outputs so far, tokens in memory, and when its prompt may begin.

    `until`: when it has to be over by a promise of its own.
    """

    outputs: int
    held: int
    ready: float
    until: float


Branch = Text | float
"""A call, or when a tool comes back; what is done is inf seconds away, and waits for nothing."""
DONE = -1.0


@dataclass(frozen=True)
class Place:
    """How far a request is: the part of its line, and its branches there. `part` is -1 once it is over."""

    part: int
    branches: tuple[Branch, ...] = ()


OVER = Place(-1)
Chosen = tuple[int, int, int, int]
"""Request, part, branch, and tokens that a step computes of it."""
Running = tuple[float, tuple[Chosen, ...]] | None
"""When a step ends, and who is in it."""
State = tuple[tuple[Place, ...], tuple[Running, ...]]


def optimum_of_agents(load: Load) -> float:
    """The most weight in time over all schedules: steps start where something happens."""
    return _Schedules(load).most()


class _Schedules:
    def __init__(self, load: Load) -> None:
        self.requests = load.requests
        self.parts = [[_branches(part) for part in load.ways[one.id].parts] for one in load.requests]
        self.models = load.models
        self.devices = sorted({model.device for model in load.models.values()})
        self.due = [one.arrival + one.slo.total + TICK for one in load.requests]
        self.ahead = cache(self._ahead)

    def most(self) -> float:
        places = tuple([Place(-2)] * len(self.requests))
        return self.ahead(0.0, (places, tuple([None] * len(self.devices))))

    # -- what happens of itself ---------------------------------------------------------------------

    def _arrive(self, at: int, part: int, now: float) -> Place:
        """A request comes to a part of its line; OVER behind the last one."""
        if part == len(self.parts[at]):
            return OVER
        calls, _ = self.parts[at][part]
        return Place(part, tuple([_begun(call, now) for call in calls]))

    def _settled(self, at: int, place: Place, now: float) -> tuple[Place, float]:
        """The place of a request once all that has happened by `now` is taken in, and what it won."""
        if place.part == -2:
            if self.requests[at].arrival > now:
                return place, 0.0
            place = self._arrive(at, 0, now)
        while place.part >= 0:
            branches = tuple([DONE if isinstance(one, float) and one <= now else one for one in place.branches])
            place = Place(place.part, branches)
            _, need = self.parts[at][place.part]
            if branches.count(DONE) < need:
                return (OVER, 0.0) if now > self.due[at] else (place, 0.0)
            place = self._arrive(at, place.part + 1, now)
            if place == OVER:
                return OVER, self.requests[at].slo.weight if now <= self.due[at] else 0.0
        return place, 0.0

    def _next(self, now: float, state: State) -> float:
        """The next moment at which something happens by itself."""
        places, running = state
        ahead = [step[0] for step in running if step is not None]
        ahead += [one.arrival for one in self.requests]
        for place in places:
            for branch in place.branches:
                ahead.append(branch if isinstance(branch, float) else branch.ready)
        return min([at for at in ahead if at > now], default=INF)

    def _after(self, now: float, state: State) -> tuple[float, State]:
        """Steps that end by `now` are over; what was won, and the state."""
        places, running = list(state[0]), list(state[1])
        for device, step in enumerate(running):
            if step is not None and step[0] <= now:
                running[device] = None
                for at, part, branch, tokens in step[1]:
                    if places[at].part == part:
                        places[at] = self._stepped(at, places[at], branch, tokens, now)
        won = 0.0
        for at, place in enumerate(places):
            places[at], more = self._settled(at, place, now)
            won += more
        return won, (tuple(places), tuple(running))

    def _stepped(self, at: int, place: Place, branch: int, tokens: int, now: float) -> Place:
        part = place.part
        text, (calls, _) = place.branches[branch], self.parts[at][part]
        call = calls[branch]
        assert isinstance(text, Text) and isinstance(call, _Promised)
        held, outputs = text.held + tokens, text.outputs
        new: Branch = Text(outputs, held, text.ready, text.until)
        if held == call.call.prompt + outputs:
            new = Text(outputs + 1, held, text.ready, text.until)
            if outputs + 1 == call.call.outputs:
                new = DONE if now <= text.until else INF
        return Place(part, (*place.branches[:branch], new, *place.branches[branch + 1 :]))

    # -- what is chosen -----------------------------------------------------------------------------

    def _ahead(self, now: float, state: State) -> float:
        won, state = self._after(now, state)
        return won + self._chosen(now, state, 0)

    def _chosen(self, now: float, state: State, device: int) -> float:
        """The most from here on, where devices from `device` on may still start a step."""
        places, running = state
        if all(place == OVER for place in places):
            return 0.0
        if device == len(self.devices):
            later = self._next(now, state)
            return self.ahead(later, state) if later < INF else 0.0
        best = self._chosen(now, state, device + 1)
        if running[device] is not None:
            return best
        for kept, seconds, chosen in self._steps(now, places, device):
            started = (*running[:device], (now + seconds, chosen), *running[device + 1 :])
            best = max(best, self._chosen(now, (kept, started), device + 1))
        return best

    def _steps(
        self, now: float, places: tuple[Place, ...], device: int
    ) -> Iterator[tuple[tuple[Place, ...], float, tuple[Chosen, ...]]]:
        """Steps that a device may start: what is left of memory, seconds, and who computes what."""
        for name, model in self.models.items():
            if model.device != self.devices[device]:
                continue
            texts = [
                (at, branch, one, self.parts[at][place.part][0][branch].call)
                for at, place in enumerate(places)
                for branch, one in enumerate(place.branches)
                if isinstance(one, Text) and self.parts[at][place.part][0][branch].call.model == name
            ]
            ready = [some for some in texts if some[2].ready <= now]
            options = [list(_options(text, call)) for _, _, text, call in ready]
            others = sum(text.held for _, _, text, _ in texts) - sum(text.held for _, _, text, _ in ready)
            for choice in itertools.product(*options):
                seconds = _seconds(model, ready, choice, others)
                if seconds is not None:
                    yield _kept(places, ready, choice), seconds, _whom(places, ready, choice)


@dataclass(frozen=True)
class _Promised:
    """A call, and what it may take from its start."""

    call: Call
    seconds: float


def _branches(part: Way) -> tuple[list[_Promised | float], int]:
    """The branches of a part, calls or seconds, and how many have to be done."""
    match part:
        case Fork():
            return [_branches(branch)[0][0] for branch in part.branches], part.need
        case Within():
            assert isinstance(part.part, Call)
            return [_Promised(part.part, part.seconds)], 1
        case Call():
            return [_Promised(part, INF)], 1
        case Wait():
            return [part.seconds], 1
    raise AssertionError(part)


def _begun(one: _Promised | float, now: float) -> Branch:
    if isinstance(one, float):
        return now + one
    return Text(0, 0, now + one.call.before_s, now + one.seconds + TICK)


def _options(text: Text, call: Call) -> Iterator[tuple[int, int]]:
    """What of its memory a text keeps, and how many tokens it computes."""
    for held in sorted({text.held, 0}):
        for new in range(call.prompt + text.outputs - held + 1):
            yield held, new


Ready = list[tuple[int, int, Text, Call]]


def _seconds(model: Model, ready: Ready, choice: tuple[tuple[int, int], ...], others: int) -> float | None:
    """Of a step; None if it is none, or has no room."""
    prefills = tokens = square = jobs = context = 0
    filled = others
    for (_, _, text, call), (held, new) in zip(ready, choice, strict=True):
        filled += held + new
        if new == 1 and text.outputs and held == call.prompt + text.outputs - 1:
            jobs, context = jobs + 1, context + held + 1
        elif new:
            prefills, tokens, square = prefills + 1, tokens + new, square + (2 * held + new) * new
    memory = INF if model.limits.memory is None else model.limits.memory
    if not prefills + jobs or filled > memory or max(jobs, prefills) > model.limits.max_batch:
        return None
    return model.steps.seconds(Step(prefills, tokens, square, jobs, context))


def _kept(places: tuple[Place, ...], ready: Ready, choice: tuple[tuple[int, int], ...]) -> tuple[Place, ...]:
    """The places once memory that is not kept is lost."""
    found = list(places)
    for (at, branch, text, _), (held, _) in zip(ready, choice, strict=True):
        if held != text.held:
            place, less = found[at], Text(text.outputs, held, text.ready, text.until)
            found[at] = Place(place.part, (*place.branches[:branch], less, *place.branches[branch + 1 :]))
    return tuple(found)


def _whom(places: tuple[Place, ...], ready: Ready, choice: tuple[tuple[int, int], ...]) -> tuple[Chosen, ...]:
    every = zip(ready, choice, strict=True)
    return tuple([(at, places[at].part, branch, new) for (at, branch, _, _), (_, new) in every if new])
