"""Branches of jobs that run at the same time: they fork, join, fail, and are cancelled together.

A branch is a job like any other to policies: it waits for its own stages, with the promise of its
request, and what follows the join counts as ahead of it. The request's job waits in no queue
meanwhile. It goes on once as many branches as its `par` needs are done; the others are given up.
"""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from neustream.core.cursor import Cursor
from neustream.core.entry import Entry
from neustream.core.events import BranchEnded, Emitted, Update
from neustream.core.graph import Par, Stage
from neustream.core.job import Status
from neustream.core.queues import NOWHERE
from neustream.errors import NeustreamError

if TYPE_CHECKING:
    from neustream.core.lives import Lives


@dataclass(slots=True, eq=False)
class Fork:
    """The branches of a job: those that live, and the results of those that are done.

    `opening`: while its branches are being made nothing is decided. `ran`: whether a step ran.
    """

    par: Par
    live: dict[str, Entry] = field(default_factory=dict)
    done: dict[str, Mapping[str, Any]] = field(default_factory=dict)
    failed: int = 0
    opening: bool = True
    ran: bool = False
    late: bool = False
    why: tuple[Status, str] = ("failed", "")

    @property
    def joined(self) -> bool:
        """Whether enough branches are done."""
        return len(self.done) >= self.par.need

    @property
    def lost(self) -> bool:
        """Whether too many have failed."""
        return len(self.par.branches) - self.failed < self.par.need


def tell(job: Entry, update: Update, late: bool, now: float) -> None:
    """Note an output for the calls around it that keep theirs."""
    one: Entry | None = job
    while one is not None:
        assert one.cursor is not None
        one.cursor.tell(update, late, now)
        one = one.parent


def tell_ran(job: Entry, since: float) -> None:
    """Note that a step of a job began, for the same."""
    one: Entry | None = job
    while one is not None and one.cursor is not None:
        one.cursor.ran(since)
        one = one.parent


def _ran(job: Entry, first: float | None) -> None:
    """A job ran first when a branch of it did, if that was before."""
    if first is not None:
        job.started_at = first if job.started_at is None else min(job.started_at, first)


def emitted(job: Entry, update: Update, late: bool, now: float) -> Emitted:
    """What is told of an output of a request, or of a branch of it."""
    root = job if job.origin is None else job.origin
    if root is not job:
        root.outputs += 1
    return Emitted(
        root.id,
        root.outputs - 1,
        update,
        now,
        now - job.arrival,
        late,
        "",
        job.branch,
        job.leg,
        job.outputs - 1 - job.leg_base,
    )


class Forks:
    """The forks of a scheduler's jobs; `begin` gives a branch its first stage, `go_on` a job what
    follows its join."""

    def __init__(
        self,
        lives: Lives,
        begin: Callable[[Entry, float], None],
        go_on: Callable[[Entry, Stage | None, float], None],
    ) -> None:
        self._lives = lives
        self._begin = begin
        self._go_on = go_on

    def open(self, job: Entry, now: float) -> None:
        """A job has come to a par: its branches begin."""
        cursor, lives = job.cursor, self._lives
        assert cursor is not None and cursor.fork is not None
        fork = job.fork = Fork(cursor.fork)
        self._leave_queue(job)
        job.become("forked")
        lives.work.measure(job)
        after, state = lives.work.legs.after(job), dict(job.state)
        for name in fork.par.branches:
            branch = self._branch(job, name)
            branch.after = after
            branch.state = ChainMap({}, state)
            fork.live[name] = branch
            lives.enlist(branch)
        for name, branch in list(fork.live.items()):
            try:
                branch.cursor = Cursor.at(fork.par.branches[name], branch, now)
                self._begin(branch, now)
            except NeustreamError as error:
                lives.end(branch, "failed", str(error), now)
        fork.opening = False
        self._settle(job, now)

    def _leave_queue(self, job: Entry) -> None:
        state = None if job.stage is None else self._lives.pool_of.get(job.stage.name)
        if state is not None:
            state.note(job)
        job.queue.drop(job)
        job.queue, job.stage, job.worker = NOWHERE, None, -1

    def _branch(self, job: Entry, name: str) -> Entry:
        """A new job for a branch of `job`, at no stage yet."""
        path = f"{job.branch}/{name}" if job.branch else name
        plain = f"{job.root.id}/{path}"
        id, number = plain, 1
        while id in self._lives.jobs:  # of the round before, still in its step
            number += 1
            id = f"{plain}~{number}"
        branch = Entry(replace(job.request, id=id, slo=job.asked))
        branch.history, branch.params = job.history, job.params
        branch.arrival, branch.due = job.arrival, job.due
        branch.due_next = min(job.due, job.due_next)
        branch.leg_due, branch.leg_latest = job.leg_due, job.leg_latest
        branch.weight, branch.promised = job.weight, job.promised
        branch.alone_s, branch.planned_calls = job.alone_s, job.planned_calls
        branch.started_at = job.started_at
        branch.origin, branch.parent, branch.branch = job.root, job, path
        branch.outer_until = job.leg_until
        if job.released:
            branch.release()
            branch.late = False
        return branch

    def ended(self, branch: Entry, status: Status, own: Mapping[str, Any], now: float) -> None:
        """A branch is over; `own`: what its steps returned."""
        job = branch.parent
        branch.parent = None
        decided = False
        fork = None if job is None else job.fork
        if fork is not None and job is not None:
            fork.live.pop(branch.branch.rpartition("/")[2], None)
            self._count(fork, branch, status, own)
            decided = fork.joined or fork.lost
            if branch.started_at is not None:
                fork.ran = True
            _ran(job, branch.started_at)
        self._lives.events.append(
            BranchEnded(
                branch.root.id,
                branch.branch,
                branch.id,
                status,
                branch.reason,
                branch.late,
                decided,
                now,
            )
        )
        if job is not None:
            self._settle(job, now)

    def _count(self, fork: Fork, branch: Entry, status: Status, own: Mapping[str, Any]) -> None:
        name = branch.branch.rpartition("/")[2]
        if status == "done":
            fork.done[name] = own
            fork.late = fork.late or branch.late
            return
        fork.failed += 1
        fork.why = status, f"branch {name!r}: {branch.reason}"

    def _settle(self, job: Entry, now: float) -> None:
        """Go on with a job whose par is decided."""
        fork = job.fork
        if fork is None or fork.opening or not (fork.joined or fork.lost):
            return
        job.fork = None
        self._give_up(job, fork, now)
        if not fork.joined:
            status, reason = fork.why
            self._lives.end(job, "failed" if status == "cancelled" else status, reason, now)
            return
        job.late = job.late or fork.late
        job.state.update({name: fork.done[name] for name in fork.par.branches if name in fork.done})
        job.become("waiting")
        assert job.cursor is not None
        try:
            self._go_on(job, job.cursor.join(job, fork.ran, now), now)
        except NeustreamError as error:
            self._lives.end(job, "failed", str(error), now)
            return
        self._lives.settle(job, now)

    def close(self, job: Entry, now: float) -> None:
        """A job ends, or begins anew: nobody waits for its branches any more."""
        if job.fork is not None:
            fork, job.fork = job.fork, None
            self._give_up(job, fork, now)

    def _give_up(self, job: Entry, fork: Fork, now: float) -> None:
        """End the branches that are left, those in a step after that."""
        live = list(fork.live.values())
        fork.live.clear()
        for branch in live:
            branch.parent = None
        for branch in live:
            self._lives.end_soon(branch.id, "cancelled", "its par was over", now)
            _ran(job, self._first_ran(branch))

    def _first_ran(self, branch: Entry) -> float | None:
        """When a branch first ran, also one that is in its first step; None: it did not."""
        if branch.started_at is not None or branch.stage is None:
            return branch.started_at
        state = self._lives.pool_of.get(branch.stage.name)
        steps = () if state is None else state.running.values()
        return next((step.started_at for step in steps if branch in step.jobs), None)

    def family(self, job: Entry) -> Iterator[Entry]:
        """The job of the same request, and all of its live branches."""
        stack = [job.root]
        while stack:
            one = stack.pop()
            yield one
            if one.fork is not None:
                stack.extend(one.fork.live.values())
