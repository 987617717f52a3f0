"""Where jobs wait: the queue of each stage of a pool."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from neustream.core.job import Entry


class Queue:
    """The jobs that are at one stage, in the order they came; `rounds` counts the stage's steps.

    `place`: where its stage is among those of the pool. `busy`: the queues of the pool with jobs.
    """

    __slots__ = ("_busy", "jobs", "place", "rounds", "stage")

    def __init__(self, stage: str, place: int, busy: set[Queue]) -> None:
        self.stage = stage
        self.place = place
        self._busy = busy
        self.jobs: dict[str, Entry] = {}
        self.rounds = 0

    def add(self, job: Entry) -> None:
        """A job comes, as the last one."""
        self.jobs[job.id] = job
        self._busy.add(self)

    def drop(self, job: Entry) -> None:
        """A job is not here any more, if it was."""
        if self.jobs.pop(job.id, None) is not None and not self.jobs:
            self._busy.discard(self)


NOWHERE = Queue("", -1, set())


class Queues:
    """The queues of a pool, by stage."""

    __slots__ = ("_all", "_busy", "_opened")

    def __init__(self) -> None:
        self._all: dict[str, Queue] = {}
        self._busy: set[Queue] = set()
        self._opened = 0

    def open(self, stage: str) -> None:
        """One more stage, behind the others."""
        self._all[stage] = Queue(stage, self._opened, self._busy)
        self._opened += 1

    def close(self, stage: str) -> None:
        """One stage less; nobody is at it."""
        del self._all[stage]

    def get(self, stage: str) -> Queue | None:
        return self._all.get(stage)

    def __getitem__(self, stage: str) -> Queue:
        return self._all[stage]

    def busy(self, others: Collection[Queue] = ()) -> list[Queue]:
        """Those with jobs, and the `others`, in the order of their stages."""
        queues = self._busy.union(others) if others else self._busy
        if len(queues) > 1:
            return sorted(queues, key=lambda queue: queue.place)
        return list(queues)
