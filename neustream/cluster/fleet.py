"""All instances as rules see them: numpy columns over the fleet, and what one is asked.

Rules read it and change nothing. The head keeps it.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from neustream.core.demand import Calls
from neustream.core.forecasts import Forecast, Question
from neustream.core.outlook import Asked, LineOutlook, Outlook
from neustream.core.rates import Rates
from neustream.core.record import record
from neustream.errors import RequestError

WINDOW_S = 60.0
"""Arrivals of so long are remembered for scalers."""
Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]


@record()
class Route:
    """Where a request goes. None: it waits at the head, until `wait_until` at the latest.

    `forecast`: what would become of it there; None: nobody asked.
    """

    instance: str | None
    reason: str = ""
    wait_until: float | None = None
    forecast: Forecast | None = None


@dataclass(frozen=True, slots=True)
class Move:
    """A request that is to leave for another instance, and why."""

    id: str
    source: str
    target: str
    reason: str


class Router(Protocol):
    """Where requests go. Pure.

    One that never reads `asked.params` says so by `reads_params = False` (see `reads_params`).
    """

    def route(self, fleet: Fleet, asked: Asked) -> Route:
        """One of `fleet.able(asked)`, which is not empty."""
        ...


def reads_params(router: Router) -> bool:
    """Whether a router may read the arguments of requests (`asked.params`): if it does not deny it.

    Where only instances know these, one then looks at each request before it is routed.
    """
    return bool(getattr(router, "reads_params", True))


class Mover(Protocol):
    """Which requests leave for another instance; asked now and then. Pure."""

    def moves(self, fleet: Fleet) -> Sequence[Move]: ...


class Scaler(Protocol):
    """How many instances of each role there should be; asked now and then. Pure."""

    def target(self, fleet: Fleet) -> Mapping[str, int]: ...


@dataclass(frozen=True, slots=True)
class Place:
    """A request at an instance, as movers see it. `outputs`: that it has made.

    `arrival`: when it came; `moved_at`: when it came here by a move, -inf: never. `free`: whether
    it may be moved now.
    """

    id: str
    instance: str
    asked: Asked
    arrival: float
    began: bool
    outputs: int
    moved_at: float = -math.inf
    free: bool = True


@dataclass(slots=True)
class Instance:
    """An instance as the head knows it.

    Attributes:
        row: its place in the columns; role: what it serves, by name; stages: those.
        only: names of the stages that it serves of graphs that are still to come; None: all.
        state: up, suspect (it has not been heard of), draining (it is to go).
        outlook: its latest. `sent`: what was sent there since, by order of sending.
        sends: requests that were sent or moved there so far.
        token_bytes: what a token in its KV cache takes.
    """

    name: str
    row: int
    role: str
    device: str
    stages: frozenset[str]
    outlook: Outlook
    joined_at: float
    heard_at: float
    state: str = "up"
    sends: int = 0
    sent: dict[int, Asked] = field(default_factory=dict)
    told: bool = False
    token_bytes: float = 0.0
    drain_at: float = math.inf
    only: tuple[str, ...] | None = None


class Fleet:
    """What rules know.

    Attributes:
        now: of the present question.
        instances: by name; `names[row]` of the columns' rows.
        live, waiting: columns, by the latest outlooks and what was sent since.
        dispatched: requests that were ever sent to each.
        up: which take requests now.
        requests: those that are at an instance. queued: those that wait for one.
        arrivals: what came in the last minute, with when. starting: instances by role.
        random: for rules that draw.
    """

    def __init__(self, rates: Mapping[str, Rates], seed: int = 0) -> None:
        self.now = 0.0
        self.rates = dict(rates)
        self.instances: dict[str, Instance] = {}
        self.names: list[str] = []
        self.random = np.random.default_rng(seed)
        self.requests: Callable[[str], Sequence[Place]] = lambda instance: ()
        self.queued: Callable[[], Sequence[Asked]] = tuple
        self.arrivals: deque[tuple[float, Asked]] = deque()
        self.starting: dict[str, int] = {}
        self._spread(np.zeros((7, 8)))
        self.up: Bools = np.zeros(8, dtype=bool)
        self._able: dict[str, Ints] = {}
        self._devices: list[str] = []
        self._free_rows: list[int] = []
        self._ailing: dict[str, tuple[str, ...]] = {}  # stages that fail, by instance
        self._asked: Asked | None = None  # the latest that was asked about
        self._questions: dict[tuple[str, frozenset[str]], Question] = {}  # of it

    def backlog(self, rows: Ints) -> Floats:
        """Seconds of work at some instances: by their latest outlooks and what was sent since."""
        passed = np.maximum(self.now - self._told_at[rows], 0.0)
        left: Floats = np.maximum(self._work[rows] - passed, 0.0)
        return left

    def queue(self, rows: Ints, asked: Asked) -> Floats:
        """Seconds that some instances need for what they have and this one, if all were as it is.

        At learnt speed, of the slowest stage.
        """
        charges = np.zeros(len(self._devices))
        for at, device in enumerate(self._devices):
            rates = self.rates[device]
            known = {name: each for name, each in asked.calls.items() if name in rates.profiles}
            charges[at] = rates.charge(known)
        each = charges[self._device[rows].astype(np.int64)]
        found: Floats = (self.live[rows] + 1.0) * each * self._speed[rows]
        return found

    # -- asked by rules ---------------------------------------------------------------------------

    def able(self, asked: Asked) -> Ints:
        """The rows of the instances that take requests and serve the next stage of this one.

        Not those whose steps of its stages fail, one after the other, unless all do.
        """
        rows = self._able.get(asked.stage)
        if rows is None:
            found = [
                each.row
                for each in self.instances.values()
                if each.state == "up" and asked.stage in each.stages
            ]
            rows = self._able[asked.stage] = np.array(sorted(found), dtype=np.int64)
        if not self._ailing:
            return rows
        well = [row for row in rows.tolist() if not self._fails(self.names[row], asked)]
        return np.array(well, dtype=np.int64) if well else rows

    def _fails(self, name: str, asked: Asked) -> bool:
        """Whether an instance fails steps that a request needs."""
        return any(stage in asked.calls for stage in self._ailing.get(name, ()))

    def at(self, row: int) -> Instance:
        """The instance of a row."""
        return self.instances[self.names[row]]

    def ask(self, instance: Instance, asked: Asked) -> Forecast:
        """What would become of a request there."""
        if self._asked is not asked:
            self._asked, self._questions = asked, {}
        key = instance.device, instance.stages
        question = self._questions.get(key)
        if question is None:
            rates = self.rates[instance.device]
            question = self._questions[key] = Question(_leg(asked, instance, rates), rates)
        return question.at(self.seen(instance), self.now)

    def seen(self, instance: Instance) -> Outlook:
        """Its outlook, with what was sent there since."""
        outlook = instance.outlook
        if not instance.sent:
            return outlook
        return _with(outlook, list(instance.sent.values()), self.rates[instance.device])

    # -- kept by the head -------------------------------------------------------------------------

    def _spread(self, columns: Floats) -> None:
        """Have these columns from now on, each by its name too."""
        self._columns = columns
        self._work, self.live, self.waiting, self.dispatched = columns[:4]
        self._told_at, self._device, self._speed = columns[4:]

    def came(self, asked: Asked, now: float) -> None:
        """A caller asks."""
        self.arrivals.append((now, asked))
        while self.arrivals[0][0] < now - WINDOW_S:
            self.arrivals.popleft()

    def add(self, instance: Instance) -> None:
        """A new one; its row is given here. RequestError if the name is taken."""
        if instance.name in self.instances:
            raise RequestError(f"instance {instance.name!r} has joined already")
        if self._free_rows:
            instance.row = self._free_rows.pop()
            self.names[instance.row] = instance.name
        else:
            instance.row = len(self.names)
            self.names.append(instance.name)
            if instance.row >= len(self.up):
                self._spread(np.concatenate([self._columns, self._columns * 0.0], axis=1))
                self.up = np.concatenate([self.up, np.zeros_like(self.up)])
        if instance.device not in self._devices:
            self._devices.append(instance.device)
        self._columns[:, instance.row] = 0.0
        self._columns[5:7, instance.row] = self._devices.index(instance.device), 1.0
        self.instances[instance.name] = instance
        self.changed(instance)

    def remove(self, instance: Instance) -> None:
        """It is gone."""
        del self.instances[instance.name]
        self._ailing.pop(instance.name, None)
        self.up[instance.row] = False
        self.names[instance.row] = ""
        self._free_rows.append(instance.row)
        self._able.clear()

    def changed(self, instance: Instance) -> None:
        """Its state is another one."""
        self.up[instance.row] = instance.state == "up"
        self._able.clear()

    def told(self, instance: Instance, outlook: Outlook) -> None:
        """It told how it is."""
        instance.told = True
        instance.outlook = outlook
        self._ailing.pop(instance.name, None)
        if outlook.failing:
            self._ailing[instance.name] = outlook.failing
        work, unheard = 0.0, 0
        if instance.sent:
            work, unheard = self._unheard(instance, outlook.heard)
        row = instance.row
        self._work[row] = outlook.backlog + work
        self.live[row] = outlook.live + unheard
        self.waiting[row] = outlook.waiting + unheard
        self._told_at[row] = outlook.sent_at
        self._speed[row] = max(outlook.speed.values(), default=1.0)

    def _unheard(self, instance: Instance, heard: int) -> tuple[float, int]:
        """Seconds of work in requests that an instance had not heard of, and how many they are."""
        for number in [number for number in instance.sent if number <= heard]:
            del instance.sent[number]
        rates, sent = self.rates[instance.device], instance.sent.values()
        return sum([rates.charge(_calls_at(instance, one)) for one in sent]), len(sent)

    def sent(self, instance: Instance, asked: Asked, *, moved: bool = False) -> int:
        """A request is sent or moved there; its number (see `Outlook.heard`)."""
        instance.sends += 1
        instance.sent[instance.sends] = asked
        row = instance.row
        self._work[row] += self.rates[instance.device].charge(_calls_at(instance, asked))
        self.live[row] += 1.0
        self.waiting[row] += 1.0
        self.dispatched[row] += not moved
        return instance.sends


def _calls_at(instance: Instance, asked: Asked) -> Mapping[str, Calls]:
    """Those of a request's calls that an instance serves."""
    return {name: each for name, each in asked.calls.items() if name in instance.stages}


def _leg(asked: Asked, instance: Instance, rates: Rates) -> Asked:
    """The part of a request that an instance serves; the rest needs time too, at least its own."""
    calls = _calls_at(instance, asked)
    if len(calls) == len(asked.calls):
        return asked
    rest = rates.alone({name: each for name, each in asked.calls.items() if name not in calls})
    first_in = asked.first_in - (0.0 if asked.tokens else rest)
    return replace(asked, calls=calls, due_in=asked.due_in - rest, first_in=first_in)


def _with(outlook: Outlook, sent: Sequence[Asked], rates: Rates) -> Outlook:
    """An outlook with requests that were sent there since."""
    lines = {line.stage: line for line in outlook.lines}
    texts = {text.model: text for text in outlook.texts}
    for asked in sent:
        name = next((name for name, each in asked.calls.items() if each.looped), None)
        text = None if name is None else texts.get(name.rpartition(".")[0])
        if text is not None:
            texts[text.model] = replace(
                text,
                prompts=text.prompts + 1,
                prompt_tokens=text.prompt_tokens + asked.tokens,
                waiting_blocks=text.waiting_blocks + -int(-asked.tokens // text.block_size),
            )
        elif name is not None and math.isfinite(asked.due_in):
            lines[name] = _joined(lines.get(name), name, asked, rates)
    return replace(outlook, lines=tuple(lines.values()), texts=tuple(texts.values()))


def _joined(line: LineOutlook | None, name: str, asked: Asked, rates: Rates) -> LineOutlook:
    """A line with one more request."""
    others = {stage: each for stage, each in asked.calls.items() if stage != name}
    behind = rates.alone(others)
    row = float(asked.calls[name].count), asked.due_in - behind, behind, asked.weight
    if line is None:
        return LineOutlook(name, *[(value,) for value in row])
    rows = sorted([*zip(line.left, line.due_in, line.behind, line.weight, strict=True), row])
    return LineOutlook(name, *zip(*rows, strict=True))
