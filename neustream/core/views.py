"""What policies see of a pool, now or after the step under way."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from neustream.core.ahead import Forecast
from neustream.core.batch import Batch
from neustream.core.demand import Recent
from neustream.core.job import Job
from neustream.core.lives import Lives
from neustream.core.policy import Pool, View
from neustream.core.pool_state import PoolState
from neustream.core.step_times import StepTimes


class Views:
    """Makes the views of a scheduler's pools."""

    def __init__(self, lives: Lives, times: StepTimes, recent: Recent) -> None:
        self._lives = lives
        self._times = times
        self._recent = recent

    def now(
        self, state: PoolState, now: float, worker: int, queues: Mapping[str, Sequence[Job]]
    ) -> View:
        """What the policy of a pool sees of these queues."""
        recent, times = self._recent, self._times
        return View(
            now,
            state.pool,
            worker,
            queues,
            times.profiles,
            tuple(state.running.values()),
            recent.demands,
            times.speed,
            state.free_blocks,
            recent.lengths,
            times.spread,
            state.unpromised,
            live=self._lives.jobs,
            pool_of=self._served_by,
            memo=state.memo,
            missed=recent.missed,
        )

    def after(self, state: PoolState, batch: Batch, ahead: Forecast, over_at: float) -> View:
        """What it should see when `batch` is over."""
        times, recent, unpromised = self._times, self._recent, state.unpromised
        if self._lives.unpromised:
            unpromised = state.unpromised_after(batch, over_at - batch.started_at)
        return View(
            over_at,
            state.pool,
            batch.worker,
            ahead.queues,
            times.profiles,
            tuple([other for other in state.running.values() if other is not batch]),
            recent.demands,
            times.speed,
            {model: free + ahead.freed.get(model, 0) for model, free in state.free_blocks.items()},
            recent.lengths,
            times.spread,
            unpromised,
            live=self._lives.jobs,
            pool_of=self._served_by,
            memo=state.memo,
            missed=recent.missed,
        )

    def _served_by(self, stage: str) -> Pool | None:
        """The pool that serves a stage; None: it is another scheduler's."""
        state = self._lives.pool_of.get(stage)
        return None if state is None else state.pool
