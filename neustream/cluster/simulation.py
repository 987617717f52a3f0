"""A cluster on one virtual clock: the same loop, rules and head as everywhere, and a network.

Each instance is a member of one `FleetLoop`. The member's records go to its `MemberInstance`, whose
messages go over the network to the head or to other instances, the head's orders back. What callers
see (`Submitted`, `Emitted`, `Ended`) is what the head answers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from neustream.cluster import messages as say
from neustream.cluster.head import Head
from neustream.cluster.member_instance import MemberInstance, Reporting
from neustream.cluster.network import Fault, Faults, Network
from neustream.cluster.place import AtPlace, Place
from neustream.core.events import Emitted, Ended, Given, Held, Left, Submitted
from neustream.core.graph import Graph
from neustream.core.scheduler import Scheduler
from neustream.core.types import Request
from neustream.engine.clock import VirtualClock
from neustream.engine.events import Call, Finished, Observer, Record, Started
from neustream.engine.executor import ProfiledExecutor
from neustream.engine.loop import Loop
from neustream.engine.member import Drive, Member
from neustream.engine.places import Places
from neustream.engine.replay import Replay
from neustream.engine.report import Report
from neustream.engine.routing import LeastWork
from neustream.engine.turns import Turn

Watcher = Callable[[say.Happening], None]
"""Told of what happens in the cluster."""
OF_INSTANCES = frozenset((Submitted, Emitted, Ended, Held, Left, Given))
"""Records of a member that are not for callers."""


@dataclass(frozen=True)
class Kind:
    """A kind of instance.

    Args:
        role, device: their names; count: how many there are from the start.
        make: the scheduler and executors of a new one; it is told its place.
        load_s: from being ordered to being there.
        token_bytes: of a token in its KV cache; 0: it is never copied.
    """

    role: str
    device: str
    count: int
    make: Callable[[Place], tuple[Scheduler, Mapping[str, ProfiledExecutor]]]
    load_s: float = 0.0
    token_bytes: float = 0.0


@dataclass
class Running:
    """An instance that runs: what of it is still to be said."""

    instance: MemberInstance
    drive: Drive
    place: Place
    name: str
    since: float


class FleetLoop(Loop):
    """The loop, whose requests go to a head, and whose members' records go to their instances."""

    def __init__(self, members: Sequence[Member], clock: VirtualClock, fleet: Cluster) -> None:
        super().__init__(members, clock, LeastWork())
        self._fleet = fleet
        self._noted: list[Record] = []

    @property
    def open(self) -> int:
        return self._fleet.head.open

    @property
    def busy(self) -> bool:
        return self._fleet.head.open > 0

    def accept(self, request: Request, now: float) -> Submitted:
        return self._fleet.submit(request, now)

    def cancel_all(self, now: float) -> None:
        for id in self._fleet.head.open_ids():
            self._fleet.head.cancel(id, now)
        self._fleet.carry_out(now)

    def tell(self, record: Record) -> None:
        kind = type(record)
        if kind in OF_INSTANCES:
            self._noted.append(record)
            return
        if kind is Started or kind is Finished:
            self._noted.append(record)
        super().tell(record)

    def answer(self, record: Record) -> None:
        """Tell what a caller sees."""
        super().tell(record)

    def publish(self) -> None:
        noted, self._noted = self._noted, []
        for record in noted:
            self._fleet.noted(record)
        self._fleet.post()
        super().publish()


class Cluster:
    """A simulated cluster, made of a head and of instances.

    Args:
        kinds: of instances; faults: by an instance's number, counted as they were started.
        watchers: told of moves, losses and the like.
        call_s: what taking a request in takes of an instance's process.
    """

    def __init__(
        self,
        head: Head,
        kinds: Sequence[Kind],
        graphs: Sequence[Graph],
        network: Network,
        *,
        faults: Sequence[Fault] = (),
        reporting: Reporting | None = None,
        watchers: Sequence[Watcher] = (),
        decision_s: float = 0.0,
        call_s: float = 0.0,
    ) -> None:
        self.head = head
        self.clock = VirtualClock(decision_s)
        self.running: dict[str, Running] = {}
        self.seconds = 0.0
        """Of instances that are gone; see `instance_s`."""
        self._kinds = {kind.role: kind for kind in kinds}
        self._graphs = {graph.name: graph for graph in graphs}
        self._network = network
        self._call_s = call_s
        self._faults = faults
        self._reporting = reporting or Reporting()
        self._watchers = list(watchers)
        self._count = 0
        self._wake = math.inf
        self._outgoing: dict[tuple[str, str], list[Any]] = {}
        first = [self._make(kind) for kind in kinds for _ in range(kind.count)]
        self.loop = FleetLoop([member for member, _, _ in first], self.clock, self)
        for drive, (member, place, kind) in zip(self.loop.drives, first, strict=True):
            self._join(member.name, drive, place, kind, 0.0)
        self.carry_out(0.0)

    def run(
        self,
        requests: Iterable[Request],
        observers: Sequence[Observer] = (),
        report: Report | None = None,
        turns: Mapping[str, Turn] = {},
        places: Places | None = None,
    ) -> Report:
        """Serve a workload; returns when all of it is answered. `turns`, `places`: see `Replay`."""
        report = report or Report(self.clock.now())
        self.loop.observers += [*observers, report]
        replay = Replay(self.loop, requests, turns=turns, places=places)
        self.loop.run(replay)
        return report

    @property
    def instance_s(self) -> float:
        """Seconds that instances were there, added up."""
        now = self.clock.now()
        return self.seconds + sum([now - each.since for each in self.running.values()])

    # -- instances --------------------------------------------------------------------------------

    def _make(self, kind: Kind) -> tuple[Member, Place, Kind]:
        place = Place(self._count, Faults(self._faults, self._count), self._call_s)
        name = f"{kind.role}-{self._count}"
        self._count += 1
        scheduler, executors = kind.make(place)
        there = {pool: AtPlace(one, self.clock, place) for pool, one in executors.items()}
        return Member(scheduler, there, name), place, kind

    def _join(self, name: str, drive: Drive, place: Place, kind: Kind, now: float) -> None:
        instance = MemberInstance(
            name,
            self.loop,
            drive,
            self._graphs,
            self.head.fleet.rates[kind.device],
            partial(self._send, name),
            reporting=self._reporting,
            token_bytes=kind.token_bytes,
        )
        one = self.running[name] = Running(instance, drive, place, name, now)
        stages = [stage for pool in drive.scheduler.pools.values() for stage in pool.stages]
        self.head.joined(
            name,
            now,
            stages=stages,
            role=kind.role,
            device=kind.device,
            token_bytes=kind.token_bytes,
        )
        if place.faults.crash_at < math.inf:
            self.clock.post(Call(partial(self._crash, one)), max(place.faults.crash_at, now))
        self._beat_later(one, now)

    def _beat_later(self, one: Running, now: float) -> None:
        at = one.place.faults.awake(now + self._reporting.beat_s)
        self.clock.post(Call(partial(self._beat, one), rank=4), at)

    def _beat(self, one: Running, now: float) -> None:
        if self.running.get(one.name) is one:
            one.instance.beat(now)
            self._beat_later(one, now)

    def _start(self, role: str, now: float) -> None:
        kind = self._kinds[role]
        self.clock.post(Call(partial(self._started, kind)), now + kind.load_s)

    def _started(self, kind: Kind, now: float) -> None:
        member, place, _ = self._make(kind)
        self._join(member.name, self.loop.add(member), place, kind, now)
        self.carry_out(now)

    def _stop(self, name: str, now: float) -> None:
        one = self.running.pop(name, None)
        if one is not None:
            self.seconds += now - one.since
            self.loop.drop(one.drive)

    def _crash(self, one: Running, now: float) -> None:
        """Its process is gone, with all that it would have said."""
        if self.running.get(one.name) is one:
            self._stop(one.name, now)
            self.head.lost(one.name, "crashed", now)
            self.carry_out(now)

    # -- messages ---------------------------------------------------------------------------------

    def noted(self, record: Record) -> None:
        """A record of an instance."""
        one = self.running.get(record.member)  # type: ignore[union-attr]
        if one is not None:
            one.instance.noted(record)

    def _send(self, source: str, target: str, message: Any) -> None:
        """A message between instances and the head."""
        self._outgoing.setdefault((source, target), []).append(message)

    def post(self) -> None:
        """Messages that came up in the same instant go out together."""
        outgoing, self._outgoing = self._outgoing, {}
        now = self.clock.now()
        for (source, target), messages in outgoing.items():
            size = sum([self._bytes(message) for message in messages])
            ends = map(self.running.get, (source, target))
            sides = [one.place.faults for one in ends if one is not None]
            at = self._network.arrives(source, target, now, size, sides)
            if at < math.inf:
                arrive = self._heard if target == say.HEAD else self._arrived
                self.clock.post(Call(partial(arrive, source, target, messages)), at)

    def _bytes(self, message: Any) -> float:
        """What takes time beside the delay of the network."""
        match message:
            case say.Piece():
                return message.size
            case say.Parcel():
                begun = message.carry.started_ago is not None
                return message.size + begun * self._network.state_bytes
        return 0.0

    def _heard(self, source: str, target: str, messages: list[Any], now: float) -> None:
        for message in messages:
            self.head.heard(source, message, now)
        self.carry_out(now)

    def _arrived(self, source: str, target: str, messages: list[Any], now: float) -> None:
        one = self.running.get(target)
        if one is None:
            return
        for message in messages:
            at = one.place.read(now, calls=isinstance(message, say.Send))
            if at > now:
                self.clock.post(Call(partial(self._read, target, message)), at)
            else:
                one.instance.receive(message, now)

    def _read(self, target: str, message: Any, now: float) -> None:
        """An instance has got round to a message."""
        one = self.running.get(target)
        if one is not None:
            one.instance.receive(message, now)

    def submit(self, request: Request, now: float) -> Submitted:
        """A request of the workload; what is wrong with it is raised."""
        self.head.submit(request, now)
        steps = self.head.steps_of(request.id)
        due = request.arrival + request.slo.total
        record = Submitted(
            request.id, request.graph.name, request.arrival, due, request.slo, steps, now
        )
        self.loop.answer(record)
        self.carry_out(now)
        return record

    def carry_out(self, now: float) -> None:
        """Do what the head orders, and look again when it has to."""
        while orders := self.head.pop_orders():
            for order in orders:
                self._do(order, now)
        for event in self.head.pop_events():
            for watcher in self._watchers:
                watcher(event)
        at = self.head.wake_at()
        if at is not None and not now < self._wake <= at:
            self._wake = at
            self.clock.post(Call(self._tick, rank=3), at)

    def _do(self, order: say.Order, now: float) -> None:
        match order:
            case say.Answer():
                self.loop.answer(order.ended)
            case say.Forward():
                self.loop.answer(order.emitted)
            case say.Start():
                self._start(order.role, now)
            case say.Stop():
                self._stop(order.instance, now)
            case _:
                self._send(say.HEAD, order.instance, order)

    def _tick(self, now: float) -> None:
        self._wake = math.inf
        self.head.tick(now)
        self.carry_out(now)
