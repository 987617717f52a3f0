"""What the end of a step changes: what it returned is taken in, or it failed, or was lost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

from neustream.core.batch import Batch, no_update
from neustream.core.entry import Entry
from neustream.core.events import Corrected, Update
from neustream.core.lives import Lives, Lost
from neustream.core.pool_state import PoolState
from neustream.core.step_times import StepTimes
from neustream.errors import NeustreamError, StageFailed, told


class StepEnds:
    """The side of a scheduler that takes steps back."""

    def __init__(self, lives: Lives, times: StepTimes) -> None:
        self._lives = lives
        self._times = times

    def finish(
        self,
        state: PoolState,
        batch: Batch,
        updates: Sequence[Update | NeustreamError],
        now: float,
    ) -> None:
        """See `Scheduler.finish`."""
        if len(updates) != len(batch.jobs):
            text = (
                f"stage {batch.stage!r} returned {len(updates)} results for {len(batch.jobs)} jobs"
            )
            self.fail(state, batch, StageFailed(text), now)
            return
        state.freed[batch.worker] = now
        standing = state.standing
        if standing is not None and standing.batch is batch and not any(updates):
            state.over(batch)
            self._observe(state, batch, now)
            standing.over(self._lives.events, now)
            return
        self._lives.pools.stand_no_more(state)
        state.retire(batch)
        self._observe(state, batch, now)
        lives = self._lives
        queue = None
        jobs = cast("tuple[Entry, ...]", batch.jobs)
        for job, update, size in zip(jobs, updates, batch.sizes, strict=True):
            job.status = "waiting"
            if job.queue is not queue:
                queue = job.queue
                queue.change()
            if job.ending is not None:
                lives.end(job, *job.ending, now)
            elif type(update) is dict or isinstance(update, Mapping):
                lives.move(job, update, size, now)
                if job.keep:
                    lives.settle(job, now)
            else:
                lives.end(job, "failed", no_update(batch.stage, update), now)

    def fail(self, state: PoolState, batch: Batch, error: BaseException, now: float) -> None:
        """See `Scheduler.fail`."""
        self._lives.pools.stand_no_more(state)
        state.retire(batch)
        reason = told(error)
        for job in cast("tuple[Entry, ...]", batch.jobs):
            job.status = "waiting"
            job.queue.change()
            status, why = job.ending or ("failed", reason)
            self._lives.end(job, status, why, now)

    def requeue(self, state: PoolState, batch: Batch, now: float, lost: Lost) -> None:
        """See `Scheduler.requeue`."""
        self._lives.pools.stand_no_more(state)
        state.retire(batch)
        state.again = None  # jobs of one stage are at it again, with more steps left
        for job in cast("tuple[Entry, ...]", batch.jobs):
            job.status = "waiting"
            job.queue.change()
            if job.ending is None:
                self._lives.lose(job, lost, now)
            self._lives.settle(job, now)

    def _observe(self, state: PoolState, batch: Batch, now: float) -> None:
        """Learn from a step that ran, and from what passed between it and the one before."""
        seconds = now - batch.begun_at
        if self._lives.unpromised:
            state.unpromised = state.unpromised_after(batch, seconds)
        jobs = cast("tuple[Entry, ...]", batch.jobs)
        if seconds < batch.expected and all(job.ending for job in jobs):
            return  # nobody wanted it any more, and it may have been stopped midway
        corrected = self._times.observe(batch, seconds)
        if corrected is not None:
            self._lives.pools.catch_up()
            self._lives.measure_again(corrected)
            factors = self._times.corrections[corrected]
            self._lives.events.append(Corrected(corrected, factors, now))
