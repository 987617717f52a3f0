"""The parts of a graph that have promises of their own: when each begins, is due, and ends.

In a graph with several model calls (`Graph.legs`) each call is a leg, and so is each stage outside
of calls. `first` and `step` count from the start of a leg, `total` over the whole request. A leg's
own due moment splits what is left of the total over what is ahead, by what legs took lately: what
one leg saved, those behind it have.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, MutableMapping
from dataclasses import replace

from neustream.core.budget import calls_of, expected_rounds, inside, likely_case
from neustream.core.entry import Ahead, Entry
from neustream.core.events import LegEnded
from neustream.core.frames import Frame
from neustream.core.graph import Call, Loop, Node, Par, Seq, Stage, Switch
from neustream.core.job import Status
from neustream.core.lengths import Lengths
from neustream.core.paths import least_behind, least_left
from neustream.core.policy import CHANCE
from neustream.core.reasons import due, span
from neustream.core.step_times import StepTimes
from neustream.core.stretch import Stretch, Tail, added, parts, tallied
from neustream.core.sums import Sums
from neustream.core.tails import Tails
from neustream.core.types import TICK
from neustream.errors import RequestError


class Legs:
    """Begins and ends the legs of a scheduler's jobs.

    Args:
        times: what steps take.
        lengths: what is known of how long generations get, by model.
    """

    def __init__(self, times: StepTimes, lengths: Mapping[str, Lengths] = {}) -> None:
        self._times = times
        self._lengths = lengths
        self.sums = Sums(times, self._seconds)
        self.tails = Tails(times, self._seconds)

    def begin(self, job: Entry, now: float) -> None:
        """A job is at the start of its graph, or a branch at its own."""
        if job.request.graph.legs and job.cursor is not None and job.cursor.stage is not None:
            self.promise(job, now if job.branch else job.arrival, now)

    def check(self, job: Entry) -> None:
        """RequestError if a request cannot be in time by any way through its graph of legs."""
        graph, cursor, slo = job.request.graph, job.cursor, job.request.slo
        if not graph.legs or cursor is None or slo.total == math.inf or slo.finish:
            return
        least = least_left(job, cursor, self._times)
        if least > slo.total + TICK:
            raise RequestError(
                f"request {job.id!r}: its total of {span(slo.total)} is shorter than the shortest "
                f"way through graph {graph.name!r}, {span(least)}",
                code="unattainable",
            )

    def hopeless(self, job: Entry, now: float) -> str:
        """Why a job that waits can no longer be in time by any way; "" if it can.

        In a graph without legs, where tools are all there is or beside other stages, how long they
        take may be a guess that nobody gave: there only who is late already is hopeless.
        """
        if job.cursor is None or job.due - job.remaining_s >= now:
            return ""
        if not job.leg:
            return f"hopeless: {due(job.due - now)}" if job.due < now - TICK else ""
        needed = least_left(job, job.cursor, self._times)
        joined = job.parent
        while joined is not None and joined.cursor is not None:
            needed += least_behind(joined, joined.cursor, self._times)
            joined = joined.parent
        if job.due - needed >= now - TICK:
            return ""
        return f"hopeless: needs {span(needed)} more, {due(job.due - now)}"

    def over(self, job: Entry, left: Stage) -> bool:
        """Whether a job that left a stage also left its leg."""
        assert job.cursor is not None
        stage = job.cursor.stage
        leg = job.cursor.leg
        if stage is None or (leg.entry if leg else 0) != job.leg_entry:
            return True
        if leg is not None:
            return False
        return stage.leg != left.leg or stage.phase == "prefill"

    def end(self, job: Entry, now: float, status: Status = "done", freed: bool = False) -> LegEnded:
        """A leg is over: learn from it, and tell of it. `status`: how the job ended, if it did."""
        if status == "done":
            graph = job.request.graph
            job.history.leg(graph.print, job.leg).add(now - job.leg_at)
            self.sums.changed(graph, job.leg)
            job.leg_late = job.leg_late or now > min(job.leg_until, job.due) + TICK
        job.late = job.late or job.leg_late
        outputs = job.outputs - job.leg_base
        first_at = job.first_at if outputs else None
        late = job.leg_late or status != "done"
        return LegEnded(
            job.root.id,
            job.leg,
            job.leg_at,
            job.leg_due,
            first_at,
            outputs,
            late,
            status,
            now,
            job.branch,
            job=job.id,
            freed=freed,
        )

    def promise(self, job: Entry, since: float, now: float) -> None:
        """What is promised of the leg that a job begins, from `since` on."""
        cursor = job.cursor
        assert cursor is not None and cursor.stage is not None
        graph, calls = job.request.graph, cursor.calls
        leg = cursor.leg
        job.leg_entry, job.leg_at = leg.entry if leg else 0, now
        job.leg_since, job.leg_base, job.leg_late = since, job.outputs, False
        job.leg = _call(leg).name if leg else cursor.stage.leg
        until = job.outer_until
        asked = job.request.slo
        for frame in calls:
            if math.isnan(frame.since):
                frame.since = since
            own = _call(frame).slo
            if own is not None:
                until = min(until, frame.since + own.total)
                asked = replace(job.request.slo, first=own.first, step=own.step)
        job.asked, job.leg_until = asked, until
        if job.promised:
            job.slo = asked
            first = since + asked.first if graph.legs[job.leg] else math.inf
            job.due_next = min(job.due, until, first)
        self._split(job, now)

    def _split(self, job: Entry, now: float) -> None:
        """By when a leg should be over, so that what is behind it can be in time.

        By when it has to be: a maximum of later generations, also behind a join, is no reason to
        give up who is not there yet.
        """
        own, behind, job.later = self._ahead(job)
        job.leg_latest = min(job.due - behind.least, job.leg_until)
        whole = own.expected + behind.expected
        if job.due == math.inf or not whole > 0:
            job.leg_due = job.leg_latest
            return
        share = max((job.due - now) * own.expected / whole, own.alone)
        job.leg_due = min(now + share, job.leg_latest)

    def after(self, job: Entry) -> Ahead:
        """Seconds of what follows the join that a job has come to."""
        assert job.cursor is not None
        ahead = job.after
        for node, times, _ in job.cursor.rest(job):
            ahead = ahead.plus(self._seconds(node, job).times(max(times, 0)))
        return ahead

    def path_s(self, job: Entry) -> float:
        """Seconds of what a job has ahead, alone: where branches run at once, of the longest."""
        cursor = job.cursor
        assert cursor is not None
        seconds = 0.0
        if cursor.stage is not None:
            seconds = self._stage(cursor.stage, job).alone * cursor.rounds_here
        elif cursor.fork is not None and job.status != "forked":
            seconds = self._seconds(cursor.fork, job).alone
        for node, times, _ in cursor.rest(job):
            seconds += self._seconds(node, job).alone * max(times, 0)
        return seconds

    def _ahead(self, job: Entry) -> tuple[Ahead, Ahead, Mapping[str, int]]:
        """Seconds of the leg that a job is at the start of, and of what is behind it; the calls of
        its stages that are behind it."""
        cursor, stage = job.cursor, job.cursor.stage if job.cursor else None
        assert cursor is not None and stage is not None
        own, behind = self._stage(stage, job).times(cursor.rounds_here), job.after
        leg, mine = cursor.leg, True
        depth = cursor.calls.index(leg) if leg else 0
        counts: MutableMapping[str, int] = {}
        for node, times, around in cursor.rest(job):
            if times <= 0:
                continue
            mine = mine and (around > depth if leg else _goes_on(node, stage))
            ahead = self._seconds(node, job, leg is not None and mine).times(times)
            if mine:
                own = own.plus(ahead)
                continue
            behind = behind.plus(ahead)
            if leg or stage.caches:  # a stage that has no outputs is asked for none
                counts = self._count(node, times, job, counts)
        known = job.history.leg(job.request.graph.print, job.leg)
        return own._replace(expected=known.expected(own.alone)), behind, counts

    def _stage(self, stage: Stage, job: Entry) -> Ahead:
        seconds = self._times.alone(stage, stage.size_of(job))
        return Ahead(seconds, seconds, seconds)

    def _count(
        self, node: Node | Stretch | Tail, times: int, job: Entry, counts: MutableMapping[str, int]
    ) -> MutableMapping[str, int]:
        """`counts` with the expected calls of stages below a node that is ahead."""
        if isinstance(node, Tail):
            return added(counts, self.tails.of(node, job).counts)
        for part, calls in calls_of(node, job):
            counts = tallied(counts, part, times * calls)
        return counts

    def _seconds(self, node: Node | Stretch | Tail, job: Entry, call: bool = False) -> Ahead:
        """Seconds of a node that is ahead; `call`: whether it is in a call that is counted."""
        match node:
            case Stage():
                alone = self._stage(node, job)
                return alone if call else self._as_seen(node.leg, alone, job, begins=starts(node))
            case Stretch() | Tail():
                ahead = self._kept(node, job)
                return ahead._replace(expected=ahead.alone) if call else ahead
            case Seq():
                whole = node.call is not None and node.call.whole
                ahead = Ahead()
                with inside(node.call, job):
                    for child in parts(node):
                        ahead = ahead.plus(self._seconds(child, job, call or whole))
                if node.call is None or call or not whole:
                    return ahead
                return self._as_seen(node.call.name, ahead, job)
            case Loop():
                rounds = expected_rounds(node, job)
                one = self._seconds(node.body, job, call)
                least = min(self._shortest(node.body), rounds)
                return one.times(rounds)._replace(least=one.least * least)
            case Switch():
                return self._seconds(likely_case(node, job), job, call)
            case Par():
                each = [self._seconds(child, job, call) for child in node.branches.values()]
                return Ahead(
                    sorted([ahead.alone for ahead in each])[node.need - 1],
                    sorted([ahead.expected for ahead in each])[node.need - 1],
                    sorted([ahead.least for ahead in each])[node.need - 1],
                )

    def _shortest(self, body: Node) -> float:
        """Rounds of a loop over `body` that nearly all take; inf if that is not learnt."""
        if not isinstance(body, Stage) or body.phase != "decode":
            return math.inf
        lengths = self._lengths.get(body.model)
        return 0.0 if lengths is None else lengths.least(0, CHANCE)

    def _kept(self, node: Stretch | Tail, job: Entry) -> Ahead:
        if isinstance(node, Stretch):
            return self.sums.of(node, job).ahead
        return self.tails.of(node, job).ahead

    def _as_seen(self, leg: str, ahead: Ahead, job: Entry, begins: bool = True) -> Ahead:
        """What a leg is expected to take; nothing for its later stages, which are in that."""
        known = job.history.leg(job.request.graph.print, leg)
        if known.known and not begins:
            return ahead._replace(expected=0.0)
        return ahead._replace(expected=known.expected(ahead.expected))


def starts(stage: Stage) -> bool:
    """Whether a stage outside of calls begins a leg."""
    return stage.phase != "decode"


def _goes_on(node: Node | Stretch | Tail, stage: Stage) -> bool:
    """Whether a node behind `stage`, outside of calls, belongs to the same model call."""
    match node:
        case Stage():
            return node.caches and node.model == stage.model and not starts(node)
        case Seq():
            return node.call is None and all(_goes_on(child, stage) for child in node.nodes)
        case Loop():
            return _goes_on(node.body, stage)
        case Switch():
            return all(_goes_on(child, stage) for child in node.cases.values())
        case Par() | Stretch() | Tail():
            return False


def _call(frame: Frame) -> Call:
    """The call that is open in a frame."""
    assert isinstance(frame.node, Seq) and frame.node.call is not None
    return frame.node.call
