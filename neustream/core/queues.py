"""Where jobs wait: the queue of each stage of a pool."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from heapq import heappop, heappush
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from neustream.core.entry import Entry


class Queue:
    """The jobs that are at one stage, in the order they came; `rounds` counts the stage's steps.

    `pool`: all of its pool; `place`: where its stage is among those. `head`: the first that waited
    when it was looked for last.
    """

    __slots__ = ("_pool", "head", "jobs", "place", "rounds", "stage")

    def __init__(self, stage: str, place: int, pool: Queues) -> None:
        self.stage = stage
        self.place = place
        self._pool = pool
        self.head: Head | None = None
        self.jobs: dict[str, Entry] = {}
        self.rounds = 0

    def add(self, job: Entry) -> None:
        """A job comes, as the last one."""
        self.jobs[job.id] = job
        pool = self._pool
        pool.moves += 1
        pool.with_jobs.add(self)
        pool.changed.add(self)

    def drop(self, job: Entry) -> None:
        """A job is not here any more, if it was."""
        if self.jobs.pop(job.id, None) is None:
            return
        pool = self._pool
        pool.moves += 1
        pool.changed.add(self)
        if not self.jobs:
            pool.with_jobs.discard(self)

    def change(self) -> None:
        """A job of it waits now, or waits no more."""
        self._pool.changed.add(self)

    def look(self) -> Head | None:
        """Find its head anew."""
        job = next((job for job in self.jobs.values() if job.status == "waiting"), None)
        self.head = None if job is None else Head(job.joined_at, job.arrival, self.place, job)
        return self.head


class Head(NamedTuple):
    """The first waiting job of a queue, with what says whose turn it is."""

    joined_at: float
    arrival: float
    place: int
    job: Entry

    def __lt__(self, other: tuple[object, ...]) -> bool:
        return self[:3] < other[:3]


class Queues:
    """The queues of a pool, by stage.

    Attributes:
        moves: how often a job came or went; with_jobs: the queues where some are; changed: those
            where other jobs wait than before.
    """

    __slots__ = ("_all", "_heads", "_opened", "changed", "moves", "with_jobs")

    def __init__(self) -> None:
        self.moves = 0
        self.with_jobs: set[Queue] = set()
        self.changed: set[Queue] = set()
        self._all: dict[str, Queue] = {}
        self._heads: list[Head] = []  # a heap: those of now, and older ones
        self._opened = 0

    def open(self, stage: str) -> None:
        """One more stage, behind the others."""
        self._all[stage] = Queue(stage, self._opened, self)
        self._opened += 1

    def close(self, stage: str) -> None:
        """One stage less; nobody is at it."""
        self.changed.discard(self._all.pop(stage))

    def get(self, stage: str) -> Queue | None:
        return self._all.get(stage)

    def __getitem__(self, stage: str) -> Queue:
        return self._all[stage]

    @property
    def empty(self) -> bool:
        """Whether no job is at any of the stages."""
        return not self.with_jobs

    def jobs(self) -> Iterator[Entry]:
        """All jobs, those of a stage in the order they came."""
        for queue in self.with_jobs:
            yield from queue.jobs.values()

    def busy(self, others: Collection[Queue] = ()) -> list[Queue]:
        """Those with jobs, and the `others`, in the order of their stages."""
        queues = self.with_jobs.union(others) if others else self.with_jobs
        if len(queues) > 1:
            return sorted(queues, key=lambda queue: queue.place)
        return list(queues)

    def first(self) -> Entry | None:
        """The waiting job that came first, of the heads of the queues."""
        heads = self._heads
        for queue in self.changed:
            head = queue.look()
            if head is not None:
                heappush(heads, head)
        self.changed.clear()
        while heads:
            head = heads[0]
            if head.job.queue.head is head:
                return head.job
            heappop(heads)
        return None


NOWHERE = Queue("", -1, Queues())
