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
from neustream.cluster.book import asked_of
from neustream.cluster.callers import Callers
from neustream.cluster.fleet_loop import FleetLoop
from neustream.cluster.happenings import Happening, Succeeded
from neustream.cluster.head import Head
from neustream.cluster.member_instance import MemberInstance
from neustream.cluster.network import Fault, Faults, Network
from neustream.cluster.place import AtPlace, Place
from neustream.cluster.reporting import Reporting
from neustream.cluster.under_way import UnderWay
from neustream.core.events import Submitted
from neustream.core.graph import Graph
from neustream.core.scheduler import Scheduler
from neustream.core.types import Request
from neustream.engine.clock import VirtualClock
from neustream.engine.decision_time import AT_ONCE, DecisionTime
from neustream.engine.events import Call, Observer, Record
from neustream.engine.executor import ProfiledExecutor
from neustream.engine.member import Drive, Member
from neustream.engine.places import Places
from neustream.engine.replay import Replay
from neustream.engine.report import Report
from neustream.engine.turns import Turn
from neustream.errors import ConfigError, nearest

Watcher = Callable[[Happening], None]
"""Told of what happens in the cluster."""


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
    kind: Kind
    name: str
    since: float


class Cluster:
    """A simulated cluster, made of a head and of instances.

    Args:
        kinds: of instances; faults: by an instance's number, counted as they were started.
        successor: makes the head that comes after one that is gone, of an epoch.
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
        successor: Callable[[int], Head] | None = None,
        reporting: Reporting | None = None,
        watchers: Sequence[Watcher] = (),
        decision: DecisionTime = AT_ONCE,
        call_s: float = 0.0,
    ) -> None:
        self.head = head
        self.clock = VirtualClock(decision)
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
        self._callers = Callers()
        self._successor = successor
        self._epoch = 0
        self._gone_until = -math.inf
        """When the next head begins, if there is none."""
        self._outgoing: dict[tuple[str, str], list[Any]] = {}
        self._under_way = UnderWay()
        first = [self._make(kind) for kind in kinds for _ in range(kind.count)]
        self.loop = FleetLoop([member for member, _, _ in first], self.clock, self)
        for drive, (member, place, kind) in zip(self.loop.drives, first, strict=True):
            self._join(member.name, drive, place, kind, 0.0)
        self.carry_out(0.0)
        for fault in faults:
            if fault.kind == "head":
                self.clock.post(Call(partial(self._head_dies, fault.until)), fault.at_s)

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
    def open(self) -> int:
        """Requests without an answer."""
        return len(self._callers)

    def cancel_all(self, now: float) -> None:
        """All callers give up."""
        if not self._has_head:
            self._callers.give_up()
            return
        for id in self._callers:
            self.head.cancel(id, now)
        self.carry_out(now)

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
        one = self.running[name] = Running(instance, drive, place, kind, name, now)
        if self._has_head:
            self._introduce(one, now)
        if place.faults.crash_at < math.inf:
            self.clock.post(Call(partial(self._crash, one)), max(place.faults.crash_at, now))
        self._beat_later(one, now)

    def _introduce(self, one: Running, now: float) -> None:
        """The head is to know an instance."""
        kind = one.kind
        stages = [stage for pool in one.drive.scheduler.pools.values() for stage in pool.stages]
        self.head.joined(
            one.name,
            now,
            stages=stages,
            role=kind.role,
            device=kind.device,
            token_bytes=kind.token_bytes,
        )

    def _beat_later(self, one: Running, now: float) -> None:
        at = one.place.faults.awake(now + self._reporting.beat_s)
        self.clock.post(Call(partial(self._beat, one), rank=4), at)

    def _beat(self, one: Running, now: float) -> None:
        if self.running.get(one.name) is one:
            one.instance.beat(now)
            self._beat_later(one, now)

    def _start(self, role: str, now: float) -> None:
        kind = self._kinds.get(role)
        if kind is None:
            raise ConfigError(f"scaler wants role {role!r}; {nearest(role, self._kinds)}")
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
            if self._has_head:
                self.head.lost(one.name, "crashed", now)
                self.carry_out(now)

    # -- the head ---------------------------------------------------------------------------------

    @property
    def _has_head(self) -> bool:
        return self._gone_until == -math.inf

    def _head_dies(self, until: float, now: float) -> None:
        """The head is gone, with all it knew; another one begins then."""
        self._gone_until = max(self._gone_until, until)
        for source, messages in self._under_way.lost().items():
            self._not_heard(source, messages)
        self.clock.post(Call(self._succeed), until)

    def _succeed(self, now: float) -> None:
        """A head begins anew: instances join it, callers ask again."""
        if self._has_head or now < self._gone_until:
            return
        if self._successor is None:
            raise ConfigError("a fault of the head needs one that comes after it: give successor")
        self._epoch += 1
        self._gone_until = -math.inf
        self._wake = math.inf
        self.head = self._successor(self._epoch)
        for one in self.running.values():
            self._introduce(one, now)
        for watcher in self._watchers:
            watcher(Succeeded(self._epoch, len(self._callers), now))
        self._callers.ask_again(self.head, now)
        self.carry_out(now)

    # -- messages ---------------------------------------------------------------------------------

    def noted(self, records: Sequence[Record]) -> None:
        """Records of instances."""
        running = self.running
        for record in records:
            one = running.get(record.member)  # type: ignore[union-attr]
            if one is not None:
                one.instance.noted(record)

    def _send(self, source: str, target: str, message: Any) -> None:
        """A message between instances and the head."""
        self._outgoing.setdefault((source, target), []).append(message)

    def post(self) -> None:
        """Messages that came up in the same instant go out together."""
        if not self._outgoing:
            return
        outgoing, self._outgoing = self._outgoing, {}
        now = self.clock.now()
        for (source, target), messages in outgoing.items():
            size = self._network.size_of(messages)
            sides = self._sides(source, target) if self._faults else ()
            at = self._network.arrives(source, target, now, size, sides)
            if target != say.HEAD:
                arrive = partial(self._arrived, target, messages)
            elif self._listens(source):
                number = self._under_way.sent(source, messages)
                arrive = partial(self._heard, source, messages, number)
            else:
                self._not_heard(source, messages)
                continue
            if at < math.inf:
                self.clock.post(Call(arrive), at)

    def _sides(self, source: str, target: str) -> list[Faults]:
        """What breaks on a way."""
        ends = map(self.running.get, (source, target))
        return [one.place.faults for one in ends if one is not None]

    def _listens(self, source: str) -> bool:
        """Whether there is a head, and an instance knows of it."""
        one = self.running.get(source)
        return self._has_head and (one is None or one.instance.epoch == self._epoch)

    def _not_heard(self, source: str, messages: list[Any]) -> None:
        """There is no head to hear it."""
        one = self.running.get(source)
        if one is not None:
            one.instance.not_heard(messages)

    def _heard(self, source: str, messages: list[Any], number: int, now: float) -> None:
        if not self._under_way.arrived(number):
            return
        for message in messages:
            self.head.heard(source, message, now)
        if len(messages) > 1 or type(messages[0]) is not say.Told or self.head.wants:
            self.carry_out(now)  # how an instance is brings nothing about by itself

    def _arrived(self, target: str, messages: list[Any], now: float) -> None:
        one = self.running.get(target)
        if one is None:
            return
        for message in messages:
            at = one.place.read(now, calls=isinstance(message, say.Send))
            if at > now:
                self.clock.post(Call(partial(self._read, target, message)), at)
            else:
                self._receive(one, message, now)

    def _read(self, target: str, message: Any, now: float) -> None:
        """An instance has got round to a message."""
        one = self.running.get(target)
        if one is not None:
            self._receive(one, message, now)

    def _receive(self, one: Running, message: Any, now: float) -> None:
        """An instance reads a message. What it says before it hears of a head goes to none."""
        self.loop.note()
        if isinstance(message, say.Ask) and message.epoch > one.instance.epoch:
            one.instance.not_heard(self._outgoing.pop((one.name, say.HEAD), []))
        one.instance.receive(message, now)

    def submit(self, request: Request, now: float) -> Submitted:
        """A request of the workload; what is wrong with it is raised."""
        if self._has_head:
            self.head.submit(request, now)
            steps = self.head.steps_of(request.id)
        else:
            steps = asked_of(request).steps(request.graph)
        record = self._callers.ask(request, steps, now)
        self.loop.answer(record)
        self.carry_out(now)
        return record

    def carry_out(self, now: float) -> None:
        """Do what the head orders, and look again when it has to."""
        if not self._has_head:
            return
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
                self._callers.answered(order.ended)
                self.loop.answer(order.ended)
            case say.Forward():
                self._callers.got(order.emitted)
                self.loop.answer(order.emitted)
            case say.Start():
                self._start(order.role, now)
            case say.Stop():
                self._stop(order.instance, now)
            case _:
                self._send(say.HEAD, order.instance, order)

    def _tick(self, now: float) -> None:
        self._wake = math.inf
        if self._has_head:
            self.head.tick(now)
            self.carry_out(now)
