"""A job as the scheduler keeps it: its place in the graph, its queue, its branches, its status."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

from neustream.core.cursor import Cursor
from neustream.core.job import Job, Status
from neustream.core.queues import NOWHERE, Queue
from neustream.core.types import Request
from neustream.errors import PolicyError

if TYPE_CHECKING:
    from neustream.core.forks import Fork
    from neustream.core.tails import Kept

TRANSITIONS: Mapping[str, frozenset[str]] = {
    "waiting": frozenset(
        ("running", "held", "away", "forked", "gone", "done", "dropped", "failed", "cancelled")
    ),
    "running": frozenset(("waiting",)),
    "held": frozenset(("waiting", "away", "gone", "failed", "cancelled")),
    "away": frozenset(("waiting", "gone", "failed", "cancelled")),
    "forked": frozenset(("waiting", "dropped", "failed", "cancelled")),
    "done": frozenset(),
    "dropped": frozenset(),
    "failed": frozenset(),
    "cancelled": frozenset(),
    "gone": frozenset(),
}
"""Where a status may lead. A running job waits again before anything else becomes of it. `held`:
out of all views until it is given or freed; `away`: its next stage is served elsewhere;
`forked`: its branches run, and it is at no stage itself; `gone`: given to another scheduler."""


class Ahead(NamedTuple):
    """Seconds of some nodes: alone, and as legs took lately.

    `least`: alone, if generations are as short as the shortest that were seen.
    """

    alone: float = 0.0
    expected: float = 0.0
    least: float = 0.0

    def plus(self, other: Ahead) -> Ahead:
        return Ahead(
            self.alone + other.alone, self.expected + other.expected, self.least + other.least
        )

    def times(self, count: float) -> Ahead:
        return Ahead(self.alone * count, self.expected * count, self.least * count)


class Entry(Job):
    """A job with what only the scheduler needs of it.

    Attributes:
        cursor: its place in the graph; queue: where it waits.
        ending: how it ends once the step under way is over.
        behind_s, behind_output_s: seconds to the end, and to the next output, less calls of its
            stage; nan: not asked since they were measured.
        base: rounds of the queue that do not count as skipped; round: the one it last ran in.
        unit_size: the size that `unit_s` is for; -1: not asked yet.
        keep: whether it is to be held once the step under way is over.
        leg_entry: the number of the call that is its leg, 0 in none; leg_at: when it got there.
        fork: its branches, while they run.
        origin: the request's own job, of a branch; None of that itself.
        branch: the name of a branch, "a/b" of one in another; "": it is none.
        parent: whose branch it is, None from the moment that nobody waits for it.
        after: what follows the join; outer_until: `leg_until` of the calls around the par.
        ran: whether any of its branches has run, of a request's own job.
        tails: what it asked of what is far ahead (see `tails.py`).
    """

    __slots__ = (
        "after",
        "base",
        "behind_output_s",
        "behind_s",
        "branch",
        "cursor",
        "ending",
        "fork",
        "keep",
        "leg_at",
        "leg_entry",
        "origin",
        "outer_until",
        "parent",
        "queue",
        "ran",
        "round",
        "tails",
        "unit_size",
    )

    def __init__(self, request: Request) -> None:
        super().__init__(request)
        self.cursor: Cursor | None = None
        self.queue: Queue = NOWHERE
        self.ending: tuple[Status, str] | None = None
        self.base = 0
        self.behind_s = self.behind_output_s = math.nan
        self.round = -1
        self.unit_size = -1.0  # not asked yet
        self.keep = False
        self.leg_entry = 0
        self.leg_at = request.arrival
        self.fork: Fork | None = None
        self.origin: Entry | None = None
        self.parent: Entry | None = None
        self.branch = ""
        self.ran = False
        self.after = Ahead()
        self.outer_until = math.inf
        self.tails: Kept = {}

    @property
    def root(self) -> Entry:
        """The request's own job."""
        return self if self.origin is None else self.origin

    @property
    def begun(self) -> bool:
        return self.started_at is not None or self.root.ran

    @property
    def joins(self) -> Entry | None:
        return self.parent

    @property
    def needed_by(self) -> Entry:
        one = self
        while (parent := one.parent) is not None:
            fork = parent.fork
            if fork is None or fork.par.need < len(fork.par.branches):
                break
            one = parent
        return one

    @property
    def skipped(self) -> int:
        return self.queue.rounds - self.base

    @property
    def ran_last(self) -> bool:
        return self.round == self.queue.rounds

    @property
    def size(self) -> float:
        stage = self.stage
        if stage is None or stage.size is None:
            return 0.0
        whole = self.unit_size if self.unit_size >= 0 else stage.size_of(self)
        return whole - self.computed

    def become(self, status: Status) -> None:
        """Change the status along `TRANSITIONS`."""
        if status not in TRANSITIONS[self.status]:
            raise PolicyError(f"request {self.id!r} is {self.status} and cannot become {status}")
        self.status = status
        self.queue.change()

    def restart(self) -> None:
        """Its state is lost: back to the start of its graph. What it was promised stays."""
        self.state = {}
        self.output = None
        self.outputs = self.call_outputs = 0
        self.computed = 0.0
        self.first_at = -math.inf
        self.worker = -1
        self.params = self.request.params
        self.leg = ""
        self.leg_since, self.leg_base, self.leg_entry = self.arrival, 0, 0
        self.leg_due = self.leg_latest = self.due
        self.leg_until, self.leg_late, self.later = math.inf, False, {}
        self.due_next = min(self.due, self.arrival + self.slo.first)
        self.cursor = Cursor(self.request.graph, self)
