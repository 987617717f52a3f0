"""Where jobs wait: the queue of each stage of a pool."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from heapq import heappop, heappush
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from neustream.core.entry import Entry


class Queue:
    """The jobs that are at one stage, in the order they came; `rounds` counts the stage's steps.

    `place`: where its stage is among those of the pool; `moves` counts who came and went. `busy`:
    the queues of the pool with jobs; `changed`: those where other jobs wait than before. `head`:
    the first that waited when it was looked for last.
    """

    __slots__ = ("_busy", "_changed", "head", "jobs", "moves", "place", "rounds", "stage")

    def __init__(self, stage: str, place: int, busy: set[Queue], changed: set[Queue]) -> None:
        self.stage = stage
        self.place = place
        self._busy = busy
        self._changed = changed
        self.head: Head | None = None
        self.jobs: dict[str, Entry] = {}
        self.rounds = 0
        self.moves = 0

    def add(self, job: Entry) -> None:
        """A job comes, as the last one."""
        self.jobs[job.id] = job
        self.moves += 1
        self._busy.add(self)
        self._changed.add(self)

    def drop(self, job: Entry) -> None:
        """A job is not here any more, if it was."""
        if self.jobs.pop(job.id, None) is None:
            return
        self.moves += 1
        self._changed.add(self)
        if not self.jobs:
            self._busy.discard(self)

    def change(self) -> None:
        """A job of it waits now, or waits no more."""
        self._changed.add(self)

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


NOWHERE = Queue("", -1, set(), set())


class Queues:
    """The queues of a pool, by stage."""

    __slots__ = ("_all", "_busy", "_changed", "_heads", "_opened")

    def __init__(self) -> None:
        self._all: dict[str, Queue] = {}
        self._busy: set[Queue] = set()
        self._changed: set[Queue] = set()
        self._heads: list[Head] = []  # a heap: those of now, and older ones
        self._opened = 0

    def open(self, stage: str) -> None:
        """One more stage, behind the others."""
        self._all[stage] = Queue(stage, self._opened, self._busy, self._changed)
        self._opened += 1

    def close(self, stage: str) -> None:
        """One stage less; nobody is at it."""
        self._changed.discard(self._all.pop(stage))

    def get(self, stage: str) -> Queue | None:
        return self._all.get(stage)

    def __getitem__(self, stage: str) -> Queue:
        return self._all[stage]

    @property
    def moves(self) -> int:
        """How often a job came or went."""
        return sum([queue.moves for queue in self._all.values()])

    @property
    def empty(self) -> bool:
        """Whether no job is at any of the stages."""
        return not self._busy

    def jobs(self) -> Iterator[Entry]:
        """All jobs, those of a stage in the order they came."""
        for queue in self._busy:
            yield from queue.jobs.values()

    def busy(self, others: Collection[Queue] = ()) -> list[Queue]:
        """Those with jobs, and the `others`, in the order of their stages."""
        queues = self._busy.union(others) if others else self._busy
        if len(queues) > 1:
            return sorted(queues, key=lambda queue: queue.place)
        return list(queues)

    def first(self) -> Entry | None:
        """The waiting job that came first, of the heads of the queues."""
        heads = self._heads
        for queue in self._changed:
            head = queue.look()
            if head is not None:
                heappush(heads, head)
        self._changed.clear()
        while heads:
            head = heads[0]
            if head.job.queue.head is head:
                return head.job
            heappop(heads)
        return None
