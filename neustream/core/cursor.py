"""Where a job stands in its graph: the cursor that walks `seq`, `loop` and `switch`.

It counts calls of stages, and notes what loops and switches do, and when calls begin. A cursor
can leave: `save` gives plain data, `load` finds the same place in a graph that was built by the
same code elsewhere.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from neustream.core.budget import (
    asked_params,
    calls_of,
    likely_case,
    repeated,
)
from neustream.core.frames import Frame, Told, chosen, ends, keep_result, opened, over
from neustream.core.graph import (
    Graph,
    Loop,
    Node,
    Par,
    Seq,
    Stage,
    Switch,
)
from neustream.core.stretch import Stretch, Tail, ahead_of
from neustream.errors import GraphError

if TYPE_CHECKING:
    from neustream.core.job import Job


class Saved(NamedTuple):
    """A cursor's place: its stage, and (number, done, total) of each open node.

    `outer`: the params around each open call; `told`: what each keeps of itself; `around`: the
    state around each that has one of its own.
    """

    frames: tuple[tuple[int, int, int], ...]
    stage: str | None
    outer: tuple[Mapping[str, Any], ...] = ()
    told: tuple[Told | None, ...] = ()
    around: tuple[Mapping[str, Any] | None, ...] = ()


class Cursor:
    """Where one job stands in its graph. `stage` is the next one to run, None at the end.

    `entries` counts the calls that it came to; `now`: when it moves. At a `par`, which is `fork`
    then, it is at no stage.
    """

    __slots__ = ("_frames", "_turned", "entries", "fork", "now", "stage")

    def __init__(self, graph: Graph, job: Job) -> None:
        self._begin()
        self.now = job.arrival
        self.stage: Stage | None = self._descend(graph.root, job)

    def _begin(self) -> None:
        self._frames: list[Frame] = []
        self._turned: list[Frame] = []
        self.entries = 0
        self.now = math.nan
        self.fork: Par | None = None

    @classmethod
    def at(cls, node: Node, job: Job, now: float) -> Cursor:
        """At the start of a branch, which is all that there is to it."""
        cursor = cls.__new__(cls)
        cursor._begin()
        cursor.now = now
        cursor.stage = cursor._descend(node, job)
        return cursor

    def join(self, job: Job, ran: bool, now: float) -> Stage | None:
        """Go on behind a `par`; `ran`: whether anything ran in it."""
        self.fork, self.now = None, now
        self.stage = self._descend(None, job, turned=[] if ran else self._turned)
        return self.stage

    def again(self, job: Job, likely: bool = False) -> bool:
        """Move on by one round if the current stage is alone in a loop with (expected) rounds left.

        This is the common step of a denoising or decoding loop, made cheap. False: nothing has
        changed, and `advance` must be called. `likely`: see there.
        """
        if not self._frames:
            return False
        frame = self._frames[-1]
        node = frame.node
        if node.__class__ is not Loop or node.body is not self.stage:
            return False
        done = frame.done + 1
        if done >= frame.total:
            return False
        if node.until is not None and not likely and over(node.until, job):
            return False
        frame.done = done
        return True

    def advance(self, job: Job, likely: bool = False, now: float = math.nan) -> Stage | None:
        """Move past the current stage; asks `until`, `times` and `on` as they come up.

        `now`: when it does; nan: nobody asks when calls begin. `likely`: where the job will
        probably go, before its step has returned anything: `until` is taken to hold after the
        expected rounds, and switches take their likely branch.
        """
        self.now = now
        self.stage = self._descend(None, job, likely)
        return self.stage

    def copy(self) -> Cursor:
        """Another cursor at the same place."""
        twin = Cursor.__new__(Cursor)
        twin._frames = [
            Frame(f.node, f.done, f.total, f.since, f.outer, f.entry, f.told, f.around)
            for f in self._frames
        ]
        twin.stage = self.stage
        twin.fork = self.fork
        twin._turned = []
        twin.now = self.now
        twin.entries = self.entries
        return twin

    def rewind(self) -> Stage | None:
        """Go back to the prefill that fills the KV cache which the current stage reads.

        That is the nearest stage of the same `model` in front of it, in a sequence around it. None,
        and nothing has changed, if there is no such stage.
        """
        model = self.stage.model if self.stage is not None else ""
        if not model:
            return None
        for depth in range(len(self._frames) - 1, -1, -1):
            frame = self._frames[depth]
            if not isinstance(frame.node, Seq):
                continue
            for index in range(frame.done - 1, -1, -1):
                node = frame.node.nodes[index]
                if isinstance(node, Stage) and node.model == model:
                    del self._frames[depth + 1 :]
                    frame.done = index
                    self.stage = node
                    return node
        return None

    # -- leaving and arriving ---------------------------------------------------------------------

    def save(self, graph: Graph) -> Saved:
        """The place as plain data: nodes by their number in `graph.nodes`."""
        number = {id(node): index for index, node in reversed(list(enumerate(graph.nodes)))}
        frames = tuple((number[id(f.node)], f.done, f.total) for f in self._frames)
        outer = tuple([call.outer or {} for call in self.calls])
        told = tuple([None if call.told is None else call.told.copy() for call in self.calls])
        around = tuple([None if call.around is None else dict(call.around) for call in self.calls])
        return Saved(frames, None if self.stage is None else self.stage.name, outer, told, around)

    @classmethod
    def load(cls, graph: Graph, saved: Saved) -> Cursor:
        """The same place in `graph`; GraphError if it has no such place."""
        cursor = cls.__new__(cls)
        cursor._begin()
        cursor.entries = len(saved.outer)
        for index, done, total in saved.frames:
            node = graph.nodes[index] if 0 <= index < len(graph.nodes) else None
            if not isinstance(node, Seq | Loop) or done < 0 or total < 0:
                raise GraphError(
                    f"graph {graph.name!r} has no sequence or loop {index} at {done} of {total}"
                )
            cursor._frames.append(Frame(node, done, total))
        if saved.stage is not None and saved.stage not in graph.stages:
            raise GraphError(f"graph {graph.name!r} has no stage {saved.stage!r}")
        calls = cursor.calls
        if len(calls) != len(saved.outer):
            raise GraphError(
                f"graph {graph.name!r} has {len(calls)} calls there, not {len(saved.outer)}"
            )
        for entry, (call, outer) in enumerate(zip(calls, saved.outer, strict=True), 1):
            call.outer, call.entry = outer, entry
        for call, told in zip(calls, saved.told, strict=True):
            call.told = None if told is None else told.copy()
        for call, around in zip(calls, saved.around, strict=True):
            call.around = None if around is None else dict(around)
        cursor.stage = None if saved.stage is None else graph.stages[saved.stage]
        return cursor

    @property
    def frames(self) -> Sequence[Frame]:
        """The open nodes, from the outside in."""
        return self._frames

    @property
    def calls(self) -> list[Frame]:
        """The calls that it is in, from the outside in."""
        return [frame for frame in self._frames if type(frame.node) is Seq and frame.node.call]

    @property
    def leg(self) -> Frame | None:
        """The outermost open call that is one leg; None if it is in no such call."""
        for frame in self._frames:
            if type(frame.node) is Seq and frame.node.call and frame.node.call.whole:
                return frame
        return None

    # -- walking ----------------------------------------------------------------------------------

    def _descend(
        self,
        node: Node | None,
        job: Job,
        likely: bool = False,
        turned: list[Frame] | None = None,
    ) -> Stage | None:
        """Open nodes from `node` down to a stage; from None, go on behind what has just ended.

        `turned`: loops that began a round without a stage having run since.
        """
        turned = [] if turned is None else turned
        while True:
            while isinstance(node, Switch):
                node = likely_case(node, job) if likely else chosen(node, job)
            if isinstance(node, Stage):
                return node
            if isinstance(node, Par):
                self._frames.append(Frame(node, 0, 1))
                self.fork, self._turned = node, turned
                return None
            if node is not None:
                self._open(node, job)
            node = None
            while node is None:
                if not self._frames:
                    return None
                node = self._next_child(self._frames[-1], job, turned, likely)
                if node is None:
                    self._close(job, likely)

    def _open(self, node: Seq | Loop, job: Job) -> None:
        frame = opened(node, job)
        self._frames.append(frame)
        if isinstance(node, Seq) and node.call is not None:
            self.entries += 1
            frame.entry = self.entries
            frame.outer = job.params
            frame.since = self.now
            frame.told = None if node.call.result is None else Told()
            if node.call.params is not None:
                job.params = asked_params(node.call, node.call.params, job)
            if node.call.apart:
                frame.around, job.state = job.state, {}

    def tell(self, update: Mapping[str, Any], late: bool, now: float) -> None:
        """Note an output for the calls that keep theirs."""
        for frame in self._frames:
            if frame.told is not None:
                frame.told.outputs.append(update)
                frame.told.ages_s.append(now - frame.since)
                frame.told.late = frame.told.late or late

    def ran(self, since: float) -> None:
        """Note that a step began, for the calls that keep when their first one did."""
        for frame in self._frames:
            if frame.told is not None and frame.told.waited_s is None:
                frame.told.waited_s = max(since - frame.since, 0.0)

    def _close(self, job: Job, likely: bool) -> None:
        frame = self._frames.pop()
        if frame.told is not None and not likely:
            keep_result(frame, frame.told, job, self.now, self._until(frame, job))
        if frame.around is not None:
            job.state = frame.around
        if frame.outer is not None:
            job.params = frame.outer

    def _until(self, frame: Frame, job: Job) -> float:
        """By when a call that was just left had to be over."""
        until = min(job.due, job.leg_until)
        for call in (*self.calls, frame):
            assert isinstance(call.node, Seq) and call.node.call is not None
            if call.node.call.slo is not None:
                until = min(until, call.since + call.node.call.slo.total)
        return until

    @staticmethod
    def _next_child(frame: Frame, job: Job, turned: list[Frame], likely: bool) -> Node | None:
        node = frame.node
        frame.done += 1
        if isinstance(node, Seq):
            return node.nodes[frame.done] if frame.done < frame.total else None
        if isinstance(node, Par):
            return None
        if node.until is None:
            return node.body if frame.done < frame.total else None
        if frame.done > 0 and ends(frame, node, node.until, job, likely):
            return None
        if any(frame is other for other in turned):
            raise GraphError(
                f"request {job.id!r}: a round of a loop ran no stage, so it would never end"
            )
        turned.append(frame)
        return node.body

    def ahead(self, job: Job) -> Iterator[tuple[Stage, int]]:
        """Calls that lie ahead, the current one first, as (stage, count) in order.

        Counts are exact for `times` and expected for `until` and `switch`. A loop over several
        stages is given as one round in order and then the other rounds added up. While one of a
        later call is given, `job.params` are those that are expected there. Of a job that has
        forked they are those behind the join, of one in front of it those of all branches too.
        """
        for part, count in self.calls_ahead(job):
            for stage in (part,) if isinstance(part, Stage) else part.stages():
                yield stage, count

    def calls_ahead(self, job: Job) -> Iterator[tuple[Stage | Stretch, int]]:
        """The same with stretches in one piece: each of its stages is called so often."""
        for part, count in self.parts_ahead(job):
            if not isinstance(part, Tail):
                yield part, count
                continue
            for child in part.children:
                yield from calls_of(child, job)

    def parts_ahead(self, job: Job) -> Iterator[tuple[Stage | Stretch | Tail, int]]:
        """The same with tails in one piece too."""
        if self.stage is not None:
            yield self.stage, self.rounds_here
        elif self.fork is None:
            return
        elif job.status != "forked":
            yield from calls_of(self.fork, job)
        for node, times, _ in self.rest(job):
            if isinstance(node, Tail):
                yield node, times
            else:
                yield from repeated(node, job, times)

    @property
    def turning(self) -> Frame | None:
        """The loop around the current stage alone; None if there is none."""
        frame = self._frames[-1] if self._frames else None
        if frame is None or type(frame.node) is not Loop or frame.node.body is not self.stage:
            return None
        return frame

    @property
    def rounds_here(self) -> int:
        """Expected calls of the current stage, before anything else."""
        turning = self.turning
        return 1 if turning is None else max(1, turning.total - turning.done)

    def rest(self, job: Job) -> Iterator[tuple[Node | Stretch | Tail, int, int]]:
        """What follows the current stage: nodes, how often each, and how many calls are around it.

        `job.params` and `job.state` are those of that place while it is given.
        """
        params, state, depth = job.params, job.state, len(self.calls)
        turning = self.turning
        try:
            for frame in reversed(self._frames):
                node = frame.node
                if isinstance(node, Seq):
                    for child in ahead_of(node, frame.done):
                        yield child, 1, depth
                elif isinstance(node, Loop) and frame is not turning:
                    yield node.body, frame.total - frame.done - 1, depth
                if frame.around is not None:
                    job.state = frame.around
                if frame.outer is not None:
                    job.params = frame.outer
                    depth -= 1
        finally:
            job.params, job.state = params, state
