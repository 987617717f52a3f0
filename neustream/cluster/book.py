"""What a head knows: the fleet, the open requests, and what is still to be carried out."""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from neustream.cluster.fleet import Fleet, Instance, Place
from neustream.cluster.happenings import Happening
from neustream.cluster.messages import Free, Order
from neustream.core.demand import Calls
from neustream.core.events import Update
from neustream.core.outlook import Asked
from neustream.core.types import Request
from neustream.core.work import Walk
from neustream.errors import ConfigError

Phase = Literal["waiting", "sent", "there"]
Again = Literal["replay", "repeat", "fail"]
"""What becomes of a stream whose instance is gone, once outputs went out: it goes on behind them,
it is made anew and what was sent is left out, or the request fails."""


POSITIVE = (
    "suspect_s",
    "dead_s",
    "send_s",
    "move_timeout_s",
    "move_s",
    "scale_s",
    "snapshot_s",
)


@dataclass(frozen=True, slots=True)
class Settings:
    """Seconds, unless said otherwise.

    Args:
        suspect_s: an instance that has not been heard of for so long gets nothing new.
        dead_s: after so long it counts as gone.
        send_s: a request whose instance does not say that it took it goes elsewhere.
        move_timeout_s: a move that takes longer is called off.
        restarts: how often a request begins anew; deaths: a request that was in a step on so many
            instances that died is not tried again.
        drain_s: an instance that is to go ends after so long, whatever is there.
        patience_s: how long requests without a promise wait for an instance, and any for one that
            takes it for its next stage.
        move_s, scale_s: how often movers and scalers are asked.
        delay_s: of a message; promises are shorter by as much at instances.
        bandwidth: bytes per second between instances. most_moves: of one instance at once.
        snapshot_s: so often a request that runs is copied to another instance, and goes on from
            there if its own dies; inf: never.
    """

    suspect_s: float = 1.5
    dead_s: float = 5.0
    send_s: float = 2.0
    move_timeout_s: float = 5.0
    restarts: int = 2
    deaths: int = 2
    drain_s: float = 60.0
    patience_s: float = 60.0
    move_s: float = 0.1
    scale_s: float = 1.0
    delay_s: float = 0.0
    bandwidth: float = math.inf
    most_moves: int = 1
    snapshot_s: float = math.inf

    def __post_init__(self) -> None:
        for name in POSITIVE:
            value = getattr(self, name)
            if not value > 0:
                raise ConfigError(f"{name} must be greater than 0, got {value!r}")
        if self.dead_s < self.suspect_s:
            raise ConfigError(
                f"dead_s must be suspect_s ({self.suspect_s:g}) or more, got {self.dead_s!r}"
            )


@dataclass(slots=True, eq=False)
class Moving:
    """A move under way. `step`: what is waited for. `keep`: a copy is made, nothing leaves.

    `left`: calls ahead of it by stage, as it waited.
    """

    target: str
    term: int
    reason: str
    step: Literal["room", "copy", "hold", "take"]
    until: float
    held_at: float = math.inf
    copied: float | None = None
    keep: bool = False
    left: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A copy of a request in the middle of its steps: at which instance, and as which term.

    `asked`: what is left of it.
    """

    keeper: str
    term: int
    asked: Asked


@dataclass(slots=True, eq=False)
class Open:
    """A request without an answer.

    Attributes:
        term: of its present placement; issued: the latest that was given out.
        number: of its placement among those of its instance.
        delivered: outputs that its caller has; made: those, where the stream can go on from them.
        began: whether it was in a step where it is; waited_s: from its arrival until it was in
            one anywhere, None: it never was.
        due_next: when the next output is due; late: whether one was.
        away: its next stage, if that is served elsewhere, since `away_at`. fixed: why it cannot
            move; untaken: why it was not taken there the last time.
        uncopied: copies in a row that came to nothing.
        snapshot: the latest copy of it; restoring: whether it is to go on from there, and no
            instance has said yet that it does.
        tries: a timer is valid for one number of them.
    """

    request: Request
    asked: Asked
    arrival: float
    due: float
    due_next: float
    steps: int
    again: Again
    phase: Phase = "waiting"
    where: str = ""
    term: int = 0
    issued: int = 0
    number: int = 0
    delivered: int = 0
    made: list[Update] = field(default_factory=list)
    began: bool = False
    waited_s: float | None = None
    late: bool = False
    restarts: int = 0
    deaths: int = 0
    moved_at: float = -math.inf
    moving: Moving | None = None
    away: str = ""
    away_at: float = math.inf
    fixed: str = ""
    untaken: str = ""
    uncopied: int = 0
    snapshot: Snapshot | None = None
    restoring: bool = False
    tries: int = 0
    cancelled: bool = False

    @property
    def id(self) -> str:
        return self.request.id

    def begin(self, now: float) -> None:
        """It is in a step where it is."""
        self.began = True
        self.ran(now - self.arrival)

    def ran(self, waited_s: float | None) -> None:
        """It was in a step, so long after its arrival; the first time counts."""
        if self.waited_s is None:
            self.waited_s = waited_s

    def had(self, made: Sequence[Update]) -> None:
        """Its caller has so many outputs (more)."""
        slo = self.request.slo
        self.delivered += len(made)
        if self.again == "replay":
            self.made += made
        pace = self.arrival + slo.first
        if self.delivered:
            pace = math.inf if slo.step == math.inf else pace + self.delivered * slo.step
        self.due_next = min(self.due, pace)

    def moves_to(self, instance: str, term: int) -> bool:
        """Whether it is on its way to an instance, where it is to have a term."""
        moving = self.moving
        return moving is not None and (moving.target, moving.term) == (instance, term)

    def ask(self, now: float) -> Asked:
        """What a router is to know of it at `now`."""
        return self.ahead.aged(now - self.arrival)

    @property
    def ahead(self) -> Asked:
        """What is ahead of it, where it begins anew: from its copy, if there is one."""
        return self.asked if self.snapshot is None else self.snapshot.asked

    def place(self) -> Place:
        """What a mover is to know of it."""
        return Place(
            self.id,
            self.where,
            self.asked,
            self.arrival,
            self.began,
            self.delivered,
            self.moved_at,
            self.moving is None and self.phase == "there" and not self.fixed,
        )


def asked_of(request: Request) -> Asked:
    """What a request asks for. GraphError if its graph cannot be asked."""
    walk = Walk(request)
    job, slo, graph = walk.job, request.slo, request.graph
    calls: dict[str, Calls] = {}
    tokens = 0.0
    for stage, count in walk.ahead():
        before = calls.get(stage.name)
        size = stage.size_of(job)
        if stage.caches:
            tokens = max(tokens, size)
        count += 0 if before is None else before.count
        calls[stage.name] = Calls(count, stage.name in graph.looped, stage.max_batch, size)
    first = "" if walk.stage is None else walk.stage.name
    first_in = min(slo.total, slo.first)
    step, weight, params = slo.step, slo.weight, request.params
    return Asked(request.id, calls, first, slo.total, first_in, step, weight, tokens, slo, params)


class Book:
    """State that the parts of a head share.

    Attributes:
        requests: by id. waiting: those that no instance has, by id, in the order they came.
        at: requests by instance. orders, events: until they are fetched.
        begun_anew: ids of requests that began anew, and to which something happened since that was
            told.
    """

    def __init__(self, fleet: Fleet, settings: Settings) -> None:
        self.fleet = fleet
        self.settings = settings
        self.requests: dict[str, Open] = {}
        self.waiting: dict[str, Open] = {}
        self.at: dict[str, dict[str, Open]] = {}
        self.orders: list[Order] = []
        self.events: list[Happening] = []
        self.begun_anew: dict[str, None] = {}
        self._timers: list[tuple[float, int, str, int]] = []
        self._order = itertools.count()

    def instance(self, name: str) -> Instance | None:
        """The instance of a name, if it is there."""
        return self.fleet.instances.get(name)

    # -- timers -----------------------------------------------------------------------------------

    def wake(self, one: Open, at: float) -> None:
        """Look at a request again at `at`, unless something else happened to it before."""
        one.tries += 1
        if at < math.inf:
            heapq.heappush(self._timers, (at, next(self._order), one.id, one.tries))

    def due(self, now: float) -> list[Open]:
        """The requests whose time has come."""
        found = []
        while self._timers and self._timers[0][0] <= now:
            _, _, id, tries = heapq.heappop(self._timers)
            one = self.requests.get(id)
            if one is not None and one.tries == tries:
                found.append(one)
        return found

    @property
    def next_timer(self) -> float:
        """When the next of them comes; inf: never."""
        while self._timers:
            at, _, id, tries = self._timers[0]
            one = self.requests.get(id)
            if one is not None and one.tries == tries:
                return at
            heapq.heappop(self._timers)
        return math.inf

    # -- where requests are -----------------------------------------------------------------------

    def put(self, one: Open, instance: str) -> None:
        """A request is with an instance from now on; "": with the head."""
        self.waiting.pop(one.id, None)
        if one.where:
            self.at.get(one.where, {}).pop(one.id, None)
        one.where = instance
        if instance:
            self.at[instance][one.id] = one
        else:
            self.waiting[one.id] = one
        if one.restarts:
            self.changed(one)

    def forget_copy(self, one: Open) -> None:
        """Nobody needs the copy of a request any more."""
        copy, one.snapshot = one.snapshot, None
        if copy is not None and copy.keeper in self.fleet.instances:
            self.orders.append(Free(copy.keeper, one.id, copy.term))

    def changed(self, one: Open) -> None:
        """Something happened to a request that began anew."""
        self.begun_anew[one.id] = None

    def places(self, instance: str) -> list[Place]:
        """The requests of an instance, for movers."""
        return [one.place() for one in self.at.get(instance, {}).values()]
