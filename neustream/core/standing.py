"""A step that stands: the same jobs run again and again, and nothing comes of it but one more.

What its steps change of their jobs is certain beforehand, so it is worked out once somebody looks
(`catch_up`), for all of them together. Only what is told of each output, and whether that was late,
is done step by step.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple, cast

from neustream.core.batch import Batch
from neustream.core.entry import Entry
from neustream.core.events import Emitted, Event, Update
from neustream.core.frames import Frame
from neustream.core.graph import Loop, Stage
from neustream.core.lengths import Lengths
from neustream.core.step_times import StepTimes
from neustream.core.steps import PhaseProfile, Step, StepLatency
from neustream.core.types import TICK
from neustream.core.work import Work

if TYPE_CHECKING:
    from neustream.core.pool_state import PoolState

NOTHING: Update = {}
LONGEST = 256
"""Steps that are looked ahead at most."""
SHORTEST = 2
"""Fewer are not worth it."""


class _Row(NamedTuple):
    """A job of the step, and what its outputs are told and judged by.

    `root`: its request's job, where it is a branch; `due`: when an output is due at the latest;
    `first`, `pace`: when output 0 of its leg is, and seconds from one to the next.
    """

    job: Entry
    root: Entry | None
    id: str
    arrival: float
    branch: str
    leg: str
    leg_base: int
    due: float
    first: float
    pace: float


class Standing:
    """The step of a pool that stands, its jobs as they were when they were looked at last.

    Attributes:
        batch: the one under way, or the last that was.
        left: of the steps from that on, those that are certain.
    """

    __slots__ = (
        "_alone",
        "_context",
        "_ended",
        "_frames",
        "_hopeful_until",
        "_learns",
        "_longest",
        "_rows",
        "_stage",
        "_state",
        "_times",
        "_under_way",
        "_work",
        "batch",
        "left",
    )

    def __init__(
        self,
        state: PoolState,
        batch: Batch,
        frames: Sequence[Frame],
        left: int,
        times: StepTimes,
        work: Work,
        learns: Lengths | None,
    ) -> None:
        stage = batch.jobs[0].stage
        assert stage is not None
        self.batch = batch
        self.left = left
        self._state, self._stage, self._frames = state, stage, frames
        self._times, self._work, self._learns = times, work, learns
        self._rows = [_row_of(cast(Entry, job)) for job in batch.jobs]
        self._context = sum(batch.sizes)
        self._ended = 0  # steps since its jobs were looked at
        self._under_way = True
        self._longest = max(batch.sizes) + self.left
        self._alone = self._lengths_alone()
        self._hopeful_until = self._all_until()

    @property
    def _steps(self) -> StepLatency:
        """What steps of its language model take."""
        profile = self._times.profiles[self._stage.name]
        assert isinstance(profile, PhaseProfile)
        return profile.steps

    def hopeful(self, now: float) -> bool:
        """Whether it is certain that nobody of its pool is hopeless."""
        return now <= self._hopeful_until and self._alone == self._lengths_alone()

    def _lengths_alone(self) -> tuple[float, float] | None:
        """Seconds of a decode alone, a short and a long one: what is learnt changes both, or one;
        None: nothing is."""
        stage = self._stage
        if stage.size is None or not self._steps.learns:
            return None
        return self._times.alone(stage, 1.0), self._times.alone(stage, self._longest)

    def _all_until(self) -> float:
        """Until when nobody is hopeless, if decodes take longest at one of both ends of the way."""
        stage, at_end = self._stage, set(self.batch.jobs)
        until = math.inf
        for job in self._state.queues.jobs():
            remaining_s, output_s = job.remaining_s, job.next_output_s
            if stage.size is not None and job in at_end:
                longest = self._times.alone(stage, job.unit_size + self.left)
                more = max(longest - job.unit_s, 0.0)
                remaining_s += more * job.calls_left[stage.name]
                output_s += more
            until = min(until, job.due - remaining_s, job.due_next - output_s)
        return until

    def over(self, events: list[Event], now: float) -> None:
        """The step under way is over, and returned nothing."""
        self.left -= 1
        self._ended += 1
        self._under_way = False
        if self._stage.emits:
            for job, root, id, arrival, branch, leg, leg_base, due, first, pace in self._rows:
                late = now > job.due_next + TICK
                if late:
                    job.late = job.leg_late = True
                count = job.outputs = job.outputs + 1
                index = count - 1
                if root is not None:
                    index = root.outputs
                    root.outputs = index + 1
                place = count - leg_base
                job.due_next = due if pace == math.inf else min(due, first + place * pace)
                age = now - arrival
                events.append(
                    Emitted(id, index, NOTHING, now, age, late, "", branch, leg, place - 1)
                )

    def follow(self, number: int, now: float, since: float) -> Batch:
        """The step after the one that is over, as batch `number`; `since`: see `Batch`."""
        before, sizes = self.batch, self.batch.sizes
        self._under_way = True
        seconds, profiled, step = before.expected, before.profiled, None
        if self._stage.size is not None:
            sizes = tuple([size + 1.0 for size in sizes])
            self._context += len(sizes)
            step = Step(decodes=len(sizes), context=self._context)
            seconds, profiled, _ = self._times.of_step(self._steps, step)
        self.batch = Batch(
            number,
            before.pool,
            before.worker,
            before.stage,
            before.jobs,
            sizes,
            now,
            seconds,
            (),
            profiled,
            False,
            (),
            step,
            since,
            True,
        )
        return self.batch

    def catch_up(self) -> None:
        """Let its jobs be where they are by now."""
        ended, self._ended = self._ended, 0
        if not ended:
            return
        under_way = self._under_way
        queue = self._rows[0].job.queue
        queue.rounds += ended if under_way else ended - 1
        for row, frame in zip(self._rows, self._frames, strict=True):
            job = row.job
            job.base += ended
            job.round = queue.rounds
            frame.done += ended
            if self._stage.emits:
                self._came(job, ended)
            self._come_nearer(job, ended, under_way)
        if not under_way:
            self._wait()

    def _came(self, job: Entry, outputs: int) -> None:
        """Outputs of it that were told already."""
        before = job.call_outputs
        job.call_outputs = before + outputs
        job.output = NOTHING
        if self._learns is not None:
            self._learns.passed(before, job.call_outputs)

    def _come_nearer(self, job: Entry, steps: int, under_way: bool) -> None:
        """So much less is ahead of it, and its tokens are so many more."""
        stage = self._stage
        if stage.size is None:
            self._work.calls_done(job, stage, steps)
            return
        size = job.unit_size + steps
        self._work.longer_context(job, stage, steps, size)
        if stage.caches:
            self._state.set_tokens(job, size if under_way else size - 1)

    def _wait(self) -> None:
        """It is between two steps: its jobs wait, and whoever asks next says what follows."""
        for row in self._rows:
            row.job.status = "waiting"
        self._rows[0].job.queue.change()
        self._state.standing = None


def standing_of(
    state: PoolState,
    batch: Batch,
    quiet: float,
    times: StepTimes,
    work: Work,
    learns: Lengths | None,
) -> Standing | None:
    """The step under way as one that stands, if all is certain of it for some time; else None.

    `quiet`: steps that return nothing, from this one on; `learns`: how long its generations get.
    """
    again, first = state.again, batch.jobs[0].stage
    if again is None or again.jobs is not batch.jobs or first is None:
        return None
    left = min(quiet, LONGEST)
    frames: list[Frame] = []
    for job in cast("tuple[Entry, ...]", batch.jobs):
        frame = None if job.cursor is None or job.stage is not first else job.cursor.turning
        if frame is None or not _certain(job, first, cast(Loop, frame.node)):
            return None
        frames.append(frame)
        left = min(left, frame.total - frame.done - 1)
    blocks = state.blocks_at(first)
    if blocks is not None and first.caches:
        left = min(left, blocks.free // len(frames) * blocks.cache.block_size + 1)
    if left < SHORTEST:
        return None
    return Standing(state, batch, frames, int(left), times, work, learns)


def _certain(job: Entry, stage: Stage, loop: Loop) -> bool:
    """Whether a step of a job that returns nothing leads to the next one, one token longer."""
    if job.ending is not None or job.keep or job.released:
        return False
    if not loop.steady and (loop.until is not None or stage.size is not None):
        return False
    if stage.size is not None and stage.phase != "decode":
        return False
    return not stage.emits or (job.call_outputs > 0 and not job.request.graph.collects)


def _row_of(job: Entry) -> _Row:
    slo, root = job.slo, job.root
    return _Row(
        job,
        None if root is job else root,
        root.id,
        job.arrival,
        job.branch,
        job.leg,
        job.leg_base,
        min(job.due, job.leg_until),
        job.leg_since + slo.first,
        slo.step,
    )
