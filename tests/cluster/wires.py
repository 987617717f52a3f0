"""Heads and instances over wires that lose, repeat, delay and reorder every message.

Instances are scripts: they make one output a step, take and give requests, and die when they are told
to. A head may die, too: those who asked it ask the next. What goes over a wire is a `Letter`; `Fate` says what
becomes of each.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from clusters import STAGES
from letters import Mailbox

from neustream.cluster import messages as say
from neustream.cluster.head import Head
from neustream.cluster.keeping import Keeping
from neustream.cluster.served import Served
from neustream.core.outlook import Outlook
from neustream.core.types import Request

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
    epoch: int = 0
    served: Served = field(default_factory=Served)

    def __post_init__(self) -> None:
        self.keeping = Keeping(self.name, lambda to, message: self.say(message, to), lambda it, _: self._offered(it))

    def say(self, message: object, to: str = "") -> None:
        self.out.append((to, message))

    def step(self) -> None:
        """All streams that are not held go on by one output."""
        for job in list(self.jobs.values()):
            if job.held:
                continue
            if not job.began:
                job.began = True
                self._tell(say.Began(job.id, job.term))
            self.served.made.setdefault(job.id, []).append((job.made, {"n": job.made}))
            self._tell(say.Made(job.id, job.term, job.made, {"n": job.made}))
            job.made += 1
            if job.made >= job.of:
                self._over(job, "done")
            elif job.hold:
                job.held = True
                self._tell(say.Waits(job.id, job.term))

    def _tell(self, report) -> None:
        """The head that wants to hear of a request does."""
        if report.id not in self.served.orphans:
            self.say(report)

    def _over(self, job: Job, status) -> None:
        over = say.Over(job.id, job.term, status, "", {"n": job.made - 1}, job.made, 0.0, True)
        del self.jobs[job.id]
        if job.id in self.served.orphans:
            self.served.orphans[job.id] = over
        else:
            self.served.drop(job.id)
            self.say(over)

    def tell(self, now: float) -> None:
        self.say(say.Told(Outlook(self.name, now, self.heard, live=len(self.jobs))))

    def mine(self, order) -> Job | None:
        job = self.jobs.get(order.id)
        return job if job is not None and job.term == order.term else None

    def receive(self, message: object, unheard: Callable[[str], say.Outputs]) -> None:
        if getattr(message, "term", math.inf) < self.epoch * say.TERMS:
            return
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
            self.keeping.clear()
            for id in list(self.served.terms):
                self.served.drop(id)
            self.say(say.Fenced())
        elif isinstance(message, say.Ask):
            self._ask(message)
        elif isinstance(message, say.Remember):
            self.served.pasts.hear(message)
        elif isinstance(message, say.Restore):
            self.keeping.restore(message, 0.0)

    def _ask(self, message: say.Ask) -> None:
        """Tell what is here. Another head begins: what was held goes on."""
        if message.epoch > self.epoch:
            self.epoch, self.heard = message.epoch, 0
            self.served.lose_head()
            self.keeping.clear()
            for job in self.jobs.values():
                job.hold = job.held = False
        standing = [say.Standing(id, term) for id, term in self.served.terms.items()]
        self.say(say.Here(tuple(standing), self.served.pasts.all))

    def _take(self, job: Job) -> None:
        self.jobs[job.id] = job
        if job.id in self.served.terms:
            self.served.drop(job.id)
        self.served.terms[job.id] = job.term

    def _go_on(self, id: str, term: int) -> None:
        """The next head asks for what is here, or was."""
        over = self.served.orphans.pop(id)
        self.served.terms[id] = term
        self.say(say.Took(id, term, tuple(self.served.made.get(id, ()))))
        if over is not None:
            self.served.drop(id)
            self.say(replace(over, term=term))
        else:
            self.jobs[id].term, self.jobs[id].began = term, False

    def _offered(self, message: say.Send | say.Reserve | say.Parcel) -> None:
        """A request is to come here; one that was freed since is not taken."""
        if not isinstance(message, say.Parcel):
            self.heard = max(self.heard, message.number)
        if self.freed.get(message.id, 0) >= message.term:
            return
        match message:
            case say.Send() if message.id in self.served.orphans:
                self._go_on(message.id, message.term)
            case say.Send():
                self._take(Job(message.id, message.term, len(message.made), message.params["steps"]))
                self.say(say.Took(message.id, message.term))
            case say.Reserve():
                self.say(say.Reserved(message.id, message.term))
            case say.Parcel() if message.keep:
                self.keeping.keep(message)
            case say.Parcel():
                made, of = message.carry
                self._take(Job(message.id, message.term, made, of))
                self.served.made[message.id] = list(message.unheard)
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
                    told, keep = unheard(job.id), message.keep
                    parcel = say.Parcel(job.id, message.next_term, carry, {}, False, told, 0.0, 0.0, keep)  # type: ignore[arg-type]
                    self.say(parcel, message.target)
            case say.Cancel():
                self._over(job, "cancelled")

    def _free(self, message: say.Free) -> None:
        self.keeping.free(message.id, message.term)
        self.freed[message.id] = max(self.freed.get(message.id, 0), message.term)
        if self.served.terms.get(message.id, math.inf) <= message.term:
            self.jobs.pop(message.id, None)
            self.served.drop(message.id)


Fate = Callable[[], list[float]]
"""After which delays copies of a letter arrive: none, one or several."""


class World:
    """Everything on one clock. `begin`: makes the head of an epoch, which may die."""

    def __init__(self, begin: Callable[[int], Head], names: list[str], fate: Fate) -> None:
        self.now = 0.0
        self.begin, self.epoch = begin, 0
        self.head: Head | None = begin(0)
        self.asked: dict[str, Request] = {}
        self.given_up: set[str] = set()
        self.poison: set[str] = set()  # requests whose steps kill their instance
        self.instances = {name: Scripted(name) for name in names}
        self.boxes: dict[tuple[str, str], Mailbox] = {}
        self.answers: dict[str, say.Answer] = {}
        self.outputs: dict[str, list[int]] = {}
        self._fate = fate
        self._queue: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()
        self._introduce()
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
            wake = None if self.head is None else self.head.wake_at()
            if wake is not None and wake <= self.now:
                self.head.tick(self.now)
            self.carry_out()

    def submit(self, request: Request) -> None:
        """A caller asks, and asks again where no head is, or it dies."""
        self.asked[request.id] = request
        if self.head is not None:
            made = [{"n": n} for n in self.outputs.get(request.id, [])]
            self.head.submit(request, self.now, made=made)
            if request.id in self.given_up:
                self.head.cancel(request.id, self.now)

    def cancel(self, id: str) -> None:
        """A caller gives up."""
        self.given_up.add(id)
        if self.head is not None:
            self.head.cancel(id, self.now)

    def kill_head(self, gap: float) -> None:
        """The head is gone, with all it knew; after so long another one begins."""
        if self.head is not None:
            self.head = None
            self.at(self.now + gap, self._succeed)

    def _succeed(self) -> None:
        self.epoch += 1
        self.boxes = {(mine, other): box for (mine, other), box in self.boxes.items() if mine}
        self.head = self.begin(self.epoch)
        self._introduce()
        for id, request in self.asked.items():
            if id not in self.answers:
                self.submit(request)

    def _introduce(self) -> None:
        for name, one in self.instances.items():
            if one.alive:
                self.head.joined(name, self.now, stages=STAGES)

    def carry_out(self) -> None:
        if self.head is None:
            return
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
            if self.head is not None:
                self.head.lost(name, "killed", self.now)

    # -- letters ----------------------------------------------------------------------------------

    def box(self, mine: str, other: str) -> Mailbox:
        epoch = 0 if mine else self.epoch
        return self.boxes.setdefault((mine, other), Mailbox(epoch=epoch))

    def _connect(self, name: str, epoch: int) -> None:
        """An instance reads the first letter of a head: what the one before did not hear, it has."""
        one = self.instances[name]
        unheard = [*self.box(name, "").unheard, *(message for to, message in one.out if not to)]
        one.out = [(to, message) for to, message in one.out if to]
        one.served.not_heard(unheard)
        self.boxes[name, ""] = Mailbox(epoch=epoch)

    def _post(self, source: str, target: str, messages: list[object]) -> None:
        box = self.box(source, target)
        self._carry(source, target, box.send(messages, self.now))
        if messages:
            self.at(box.wake_at, lambda: self._again(source, target))

    def _again(self, source: str, target: str) -> None:
        if source and not self.instances[source].alive:
            return
        if not source and self.head is None:
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
        if not target and self.head is None:
            return
        if target and not source and letter.epoch > self.box(target, "").epoch:
            self._connect(target, letter.epoch)
        box = self.box(target, source)
        for message in box.read(letter, self.now):
            if target:
                self.instances[target].receive(message, lambda id: self._unheard(target, id))
            else:
                self.head.heard(source, message, self.now)
        if target:
            self._flush(target)
        if box.owes and (source or self.head is not None):
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
        if any(job.id in self.poison and not job.held for job in one.jobs.values()):
            self.kill(name)
        if one.alive:
            one.step()
            one.tell(self.now)
            self._flush(name)
            self.at(self.now + STEP_S, lambda: self._step(name))
