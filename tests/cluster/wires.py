"""A head and instances over wires that lose, repeat, delay and reorder every message.

Instances are scripts: they make one output a step, take and give requests, and die when they are told
to. What goes over a wire is a `Letter`; `chaos` says what becomes of each.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable
from dataclasses import dataclass, field

from clusters import STAGES
from letters import Mailbox

from neustream.cluster import messages as say
from neustream.cluster.head import Head
from neustream.core.outlook import Outlook

STEP_S = 0.1


@dataclass
class Job:
    """A stream that is at an instance: outputs made, and how many there will be."""

    id: str
    term: int
    made: int
    of: int
    held: bool = False
    hold: bool = False
    began: bool = False


@dataclass
class Scripted:
    """An instance that makes an output of each of its streams at a time."""

    name: str
    jobs: dict[str, Job] = field(default_factory=dict)
    freed: dict[str, int] = field(default_factory=dict)
    boxes: dict[str, Mailbox] = field(default_factory=dict)
    out: list[tuple[str, object]] = field(default_factory=list)
    alive: bool = True
    heard: int = 0

    def say(self, message: object, to: str = "") -> None:
        self.out.append((to, message))

    def step(self) -> None:
        """All streams that are not held go on by one output."""
        for job in list(self.jobs.values()):
            if job.held:
                continue
            if not job.began:
                job.began = True
                self.say(say.Began(job.id, job.term))
            self.say(say.Made(job.id, job.term, job.made, {"n": job.made}))
            job.made += 1
            if job.made >= job.of:
                del self.jobs[job.id]
                self.say(say.Over(job.id, job.term, "done", "", {"n": job.made - 1}, job.made, True, True))
            elif job.hold:
                job.held = True
                self.say(say.Waits(job.id, job.term))

    def tell(self, now: float) -> None:
        self.say(say.Told(Outlook(self.name, now, self.heard, live=len(self.jobs))))

    def mine(self, order) -> Job | None:
        job = self.jobs.get(order.id)
        return job if job is not None and job.term == order.term else None

    def receive(self, message: object, unheard: Callable[[str], say.Outputs]) -> None:
        if isinstance(message, say.Send | say.Reserve | say.Parcel):
            self._offered(message)
        elif isinstance(message, say.Hold | say.Resume | say.Give | say.Cancel):
            job = self.mine(message)
            if job is not None:
                self._told_of(job, message, unheard)
        elif isinstance(message, say.Free):
            self._free(message)
        elif isinstance(message, say.Fence):
            self.jobs.clear()
            self.say(say.Fenced())
        elif isinstance(message, say.Ask):
            standing = [say.Standing(job.id, job.term) for job in self.jobs.values()]
            self.say(say.Here(tuple(standing)))

    def _offered(self, message: say.Send | say.Reserve | say.Parcel) -> None:
        """A request is to come here; one that was freed since is not taken."""
        if not isinstance(message, say.Parcel):
            self.heard = max(self.heard, message.number)
        if self.freed.get(message.id, 0) >= message.term:
            return
        match message:
            case say.Send():
                self.jobs[message.id] = Job(message.id, message.term, len(message.made), message.params["steps"])
                self.say(say.Took(message.id, message.term))
            case say.Reserve():
                self.say(say.Reserved(message.id, message.term))
            case say.Parcel():
                made, of = message.carry
                self.jobs[message.id] = Job(message.id, message.term, made, of)
                self.say(say.Took(message.id, message.term, message.unheard))

    def _told_of(
        self, job: Job, message: say.Hold | say.Resume | say.Give | say.Cancel, unheard: Callable[[str], say.Outputs]
    ) -> None:
        """An order about a request that is here."""
        match message:
            case say.Hold():
                job.hold = True
            case say.Resume():
                job.hold = job.held = False
            case say.Give():
                if job.held:
                    carry = (job.made, job.of)
                    parcel = say.Parcel(job.id, message.next_term, carry, {}, False, unheard(job.id), 0.0, 0.0)  # type: ignore[arg-type]
                    self.say(parcel, message.target)
            case say.Cancel():
                del self.jobs[job.id]
                self.say(say.Over(job.id, job.term, "cancelled", "", None, job.made, True, True))

    def _free(self, message: say.Free) -> None:
        self.freed[message.id] = max(self.freed.get(message.id, 0), message.term)
        job = self.jobs.get(message.id)
        if job is not None and job.term <= message.term:
            del self.jobs[message.id]


Fate = Callable[[], list[float]]
"""After which delays copies of a letter arrive: none, one or several."""


class World:
    """Everything on one clock."""

    def __init__(self, head: Head, names: list[str], fate: Fate) -> None:
        self.now = 0.0
        self.head = head
        self.instances = {name: Scripted(name) for name in names}
        self.boxes: dict[tuple[str, str], Mailbox] = {}
        self.answers: dict[str, say.Answer] = {}
        self.outputs: dict[str, list[int]] = {}
        self._fate = fate
        self._queue: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()
        for name in names:
            head.joined(name, 0.0, stages=STAGES)
        self.carry_out()
        for name in names:
            self.at(STEP_S, lambda name=name: self._step(name))

    def at(self, when: float, what: Callable[[], None]) -> None:
        heapq.heappush(self._queue, (max(when, self.now), next(self._order), what))

    def run(self, count: int, until: float) -> None:
        """Until so many requests are answered and all letters have come, or for so long."""
        while self._queue and self.now < until:
            if len(self.answers) == count:
                until, count = self.now + 3.0, -1
            at, _, what = heapq.heappop(self._queue)
            self.now = at
            what()
            wake = self.head.wake_at()
            if wake is not None and wake <= self.now:
                self.head.tick(self.now)
            self.carry_out()

    def carry_out(self) -> None:
        for order in self.head.pop_orders():
            if isinstance(order, say.Answer):
                assert order.ended.id not in self.answers, "answered twice"
                self.answers[order.ended.id] = order
            elif isinstance(order, say.Forward):
                self.outputs.setdefault(order.emitted.id, []).append(order.emitted.index)
            elif not isinstance(order, say.Start | say.Stop):
                self._post("", order.instance, [order])

    def kill(self, name: str) -> None:
        """An instance's process dies; the head hears of it."""
        if self.instances[name].alive:
            self.instances[name].alive = False
            self.head.lost(name, "killed", self.now)

    # -- letters ----------------------------------------------------------------------------------

    def box(self, mine: str, other: str) -> Mailbox:
        return self.boxes.setdefault((mine, other), Mailbox())

    def _post(self, source: str, target: str, messages: list[object]) -> None:
        box = self.box(source, target)
        self._carry(source, target, box.send(messages, self.now))
        if messages:
            self.at(box.wake_at, lambda: self._again(source, target))

    def _again(self, source: str, target: str) -> None:
        if source and not self.instances[source].alive:
            return
        box = self.box(source, target)
        letter = box.again(self.now)
        if letter is not None:
            self._carry(source, target, letter)
        if box.wake_at < float("inf") and (not target or self.instances[target].alive):
            self.at(box.wake_at, lambda: self._again(source, target))

    def _carry(self, source: str, target: str, letter) -> None:
        for delay in self._fate():
            self.at(self.now + delay, lambda: self._arrive(source, target, letter))

    def _arrive(self, source: str, target: str, letter) -> None:
        if target and not self.instances[target].alive:
            return
        box = self.box(target, source)
        for message in box.read(letter, self.now):
            if target:
                self.instances[target].receive(message, lambda id: self._unheard(target, id))
            else:
                self.head.heard(source, message, self.now)
        if target:
            self._flush(target)
        if box.owes:
            self._post(target, source, [])

    def _unheard(self, name: str, id: str) -> say.Outputs:
        sent = [*self.box(name, "").unheard, *(message for to, message in self.instances[name].out if not to)]
        return tuple((one.index, one.update) for one in sent if isinstance(one, say.Made) and one.id == id)

    def _flush(self, name: str) -> None:
        out, self.instances[name].out = self.instances[name].out, []
        for to in dict.fromkeys(to for to, _ in out):
            self._post(name, to, [message for other, message in out if other == to])

    def _step(self, name: str) -> None:
        one = self.instances[name]
        if one.alive:
            one.step()
            one.tell(self.now)
            self._flush(name)
            self.at(self.now + STEP_S, lambda: self._step(name))
