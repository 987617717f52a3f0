"""Asks a policy what a worker does, now or after the step under way, and starts what it decides."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple, cast

from neustream.core.ahead import Forecast, Plan, forecast
from neustream.core.asked import Asked
from neustream.core.batch import Batch
from neustream.core.decision import (
    check_apart,
    check_drops,
    check_progress,
    check_wake,
    part_of,
    step_label,
    step_sizes,
)
from neustream.core.demand import Recent
from neustream.core.entry import Entry
from neustream.core.graph import Stage
from neustream.core.job import Job
from neustream.core.lives import Lives
from neustream.core.policy import Decision, Policy, View, may_be_hopeless
from neustream.core.pool_state import Again, PoolState, name_of_step, with_blocks
from neustream.core.standing import standing_of
from neustream.core.step_times import Expected, StepTimes
from neustream.core.views import Views
from neustream.errors import NeustreamError, PolicyError


class _Step(NamedTuple):
    """A step that may start.

    `expected`: what it should take, where that is known; `fits`: whether it is known that there are
    blocks for all.
    """

    worker: int
    now: float
    jobs: tuple[Job, ...]
    sizes: tuple[float, ...]
    expected: Expected | None = None
    planned: bool = False
    fits: bool = False


class Dispatch:
    """The side of a scheduler that talks to policies; `asked` counts what they were asked."""

    def __init__(self, lives: Lives, times: StepTimes, recent: Recent) -> None:
        self.asked = Asked()
        self._lives = lives
        self._times = times
        self._recent = recent
        self._views = Views(lives, times, recent)
        self._batches = 0

    def next_batch(
        self, state: PoolState, now: float, worker: int, instead: Policy | None
    ) -> Batch | None:
        """See `Scheduler.next_batch`."""
        batch = self._next_batch(state, now, worker, instead)
        state.freed.pop(worker, None)
        return batch

    def _next_batch(
        self, state: PoolState, now: float, worker: int, instead: Policy | None
    ) -> Batch | None:
        if state.policy is None:
            return self._start_next(state, now, worker)
        state.wake_at = None
        plan = state.plans.pop(worker, None)
        if instead is None:
            batch = self._start_known(state, plan, worker, now)
            if batch is not None:
                return batch
        policy = state.policy if instead is None else instead
        jobs = self._lives.jobs
        live = -1, -1
        # again, if those that were chosen could not run and failed, or go on without a promise
        while live != (len(jobs), self._lives.unpromised):
            live = len(jobs), self._lives.unpromised
            self._lives.pools.catch_up()
            queues = state.waiting(worker)
            if not queues:
                return None
            view = self._views.now(state, now, worker, queues)
            decision, batch = self._ask(state, policy, view)
            if batch is not None:
                return batch
            if not decision.jobs and not _goes_on(decision) and not _freed(decision, state):
                break
        if decision.wake_at is not None:
            check_wake(policy, decision.wake_at, now)
            state.wake_at = decision.wake_at
        elif not state.running and not state.blocks_kept:
            check_progress(policy, view)
        return None

    def _start_known(
        self, state: PoolState, plan: Plan | None, worker: int, now: float
    ) -> Batch | None:
        """The step that was planned, or decided before, if it still stands."""
        batch = None
        if plan is not None:
            batch = self._start_planned(state, plan, worker, now)
        if batch is None and state.again is not None:
            batch = self._start_again(state, now, worker)
        return batch

    def _start_again(self, state: PoolState, now: float, worker: int) -> Batch | None:
        """The step that was decided before, if the policy would decide no other."""
        again, lives, times = state.again, self._lives, self._times
        assert again is not None
        known = again.moves == state.queues.moves and again.unpromised == lives.unpromised
        known = known and again.profiles is times.profiles
        known = known and times.as_fast_as(again.speed, again.slower)
        known = known and now < again.until and again.holds(now)
        if not known or state.out or state.running:
            lives.pools.stand_no_more(state)
            state.again = None
            return None
        batch = self._follow(state, now, again.within is None)
        if batch is not None:
            return batch
        lives.pools.stand_no_more(state)
        if again.within is None and may_be_hopeless(state.queues.jobs(), now):
            return None
        jobs = again.jobs
        sizes = tuple([job.size for job in jobs])
        blocks = state.blocks_at(jobs[0].stage)
        if blocks is not None and not blocks.suffice(jobs, sizes):
            return None
        self.asked = self.asked.more()
        return self._start(state, _Step(worker, now, jobs, sizes, fits=True))

    def _follow(self, state: PoolState, now: float, hopeful: bool) -> Batch | None:
        """The next step of those that stand, if it is certain.

        `hopeful`: only if nobody of the pool can be hopeless.
        """
        standing = state.standing
        if standing is None or not standing.left or (hopeful and not standing.hopeful(now)):
            return None
        self.asked = self.asked.more()
        self._batches += 1
        worker = standing.batch.worker
        batch = standing.follow(self._batches, now, state.freed[worker])
        state.running[batch.id] = batch
        return batch

    def foresee(self, state: PoolState, batch: Batch, steps: float) -> None:
        """See `Scheduler.foresee`."""
        stage = batch.jobs[0].stage
        lengths = None
        if stage is not None and stage.caches and stage.emits:
            lengths = self._recent.lengths_of(stage.model)
        work = self._lives.work
        state.standing = standing_of(state, batch, steps, self._times, work, lengths)

    def _start_next(self, state: PoolState, now: float, worker: int) -> Batch | None:
        """The job that came first to a pool without a policy; who cannot be in time is given up."""
        while (job := state.first()) is not None:
            self._lives.pools.catch_up()
            why = self._lives.work.legs.hopeless(job, now) if job.promised else ""
            if why:
                self._lives.give_up(job, why, now)
            if job.status == "waiting":
                return self._start(state, _Step(worker, now, (job,), (job.size,)))
        return None

    def plan(self, state: PoolState, batch: Batch, now: float, instead: Policy | None) -> None:
        """See `Scheduler.plan`."""
        if state.policy is None:
            return
        state.plans.pop(batch.worker, None)
        if batch.id not in state.running:
            raise PolicyError(f"plan: batch {batch.id} of pool {batch.pool!r} is not running")
        over_at = max(now, self._times.over_at(batch))
        ahead = forecast(state, batch, over_at, self._lives.work)
        ran = {job: None if twin is None else twin.stage for job, twin in ahead.twins.items()}
        plan = Plan(batch.id, over_at, now, ran)
        if ahead.queues:
            policy = state.policy if instead is None else instead
            view = self._views.after(state, batch, ahead, over_at)
            self.asked = self.asked.more(view.jobs)
            self._note(plan, policy, policy.decide(view), view, ahead)
            self._drop_early(state, batch, plan)
        state.plans[batch.worker] = plan

    def _drop_early(self, state: PoolState, batch: Batch, plan: Plan) -> None:
        """End waiting jobs that the plan drops, if no worker that may run them is free before."""
        first = len(state.running) == state.pool.workers
        for other in state.running.values():
            first = first and self._times.over_at(other) >= self._times.over_at(batch)
        for job, reason in list(plan.drop.items()):
            bound = state.pool.sticky and job.worker == batch.worker
            if job not in plan.ran and (first or bound):
                del plan.drop[job]
                if not self._needs_less(job, plan.decided_at):
                    self._lives.give_up(cast(Entry, job), reason, plan.decided_at)

    def _note(
        self, plan: Plan, policy: Policy, decision: Decision, view: View, ahead: Forecast
    ) -> None:
        """Take down what a policy decided of a forecast, in terms of the jobs themselves."""
        real: dict[Job, Entry] = {
            twin: job for job, twin in ahead.twins.items() if twin is not None
        }
        waiting = [job for job in decision.drop if job not in real]
        check_drops(policy, waiting, self._lives.jobs)
        plan.drop = {real.get(job, job): why for job, why in decision.drop.items()}
        jobs = tuple(decision.jobs)
        if not jobs:
            return
        check_apart(policy, jobs, decision.drop)
        live = {**self._lives.jobs, **{twin.id: twin for twin in real}}
        label = step_label(policy, jobs, view, live)
        plan.parts = step_sizes(policy, jobs, decision.sizes, label)
        plan.expected = self._times.expect(jobs, plan.parts)
        plan.sizes = {real.get(job, job): size for job, size in decision.sizes.items()}
        plan.jobs = [(real.get(job, cast(Entry, job)), cast(Stage, job.stage)) for job in jobs]

    def _start_planned(self, state: PoolState, plan: Plan, worker: int, now: float) -> Batch | None:
        """The step that was planned, as far as it holds; None: the policy has to be asked."""
        jobs = plan.left(state.pool, worker, now)
        if not jobs:
            return None
        for job, reason in plan.drop.items():
            if job.status == "waiting" and not self._needs_less(job, now):
                self._lives.give_up(cast(Entry, job), reason, now)
        if plan.drop:
            jobs = tuple([job for job in jobs if not _gone_with_another(job)])
        if not jobs:
            return None
        sizes = tuple([part_of(plan.sizes, job) for job in jobs])
        whole = len(jobs) == len(plan.jobs) and sizes == plan.parts
        expected = plan.expected._replace(step=None) if whole and plan.expected else None
        return self._start(state, _Step(worker, now, jobs, sizes, expected, planned=True))

    def _ask(self, state: PoolState, policy: Policy, view: View) -> tuple[Decision, Batch | None]:
        """What the policy decides, and the step that comes of it, if any."""
        decision = self._decide(policy, view)
        batch = self._start_decided(state, policy, decision, view)
        if decision.until > view.now and policy is state.policy:
            self._note_again(state, decision, batch)
        full: set[str] = set()
        while decision.jobs and batch is None:  # no blocks for any: jobs that hold some go on
            model = _model_of(decision)
            if model in full:
                break
            full.add(model)
            waiting = state.waiting(view.worker)
            view = self._views.now(state, view.now, view.worker, waiting)
            holders = with_blocks(view, full)
            decision = self._decide(policy, holders if holders.queues else view)
            batch = self._start_decided(state, policy, decision, view)
        return decision, batch

    def _note_again(self, state: PoolState, decision: Decision, batch: Batch | None) -> None:
        """Keep a decision that stands for some time, if it was carried out as it is."""
        if batch is None or batch.preempted or state.out or state.pool.workers > 1:
            return
        if len(batch.jobs) == len(decision.jobs):
            moves, unpromised = state.queues.moves, self._lives.unpromised
            known = self._times.profiles, self._times.speed
            in_time = [job for job in batch.jobs if not job.late]
            stands = decision.until, decision.within, decision.slower, decision.later
            state.again = Again(batch.jobs, *stands, in_time, moves, unpromised, *known)

    def _decide(self, policy: Policy, view: View) -> Decision:
        self.asked = self.asked.more(view.jobs)
        decision = policy.decide(view)
        anew: set[Job] = set()
        while not anew.issuperset(decision.drop):
            check_drops(policy, decision.drop, self._lives.jobs)
            less = [
                job for job in decision.drop if job not in anew and self._needs_less(job, view.now)
            ]
            anew.update(decision.drop)
            if less:
                decision = policy.decide(view)
        if decision.drop:
            self._drop(policy, decision.drop, view.now)
        return decision

    def _needs_less(self, job: Job, now: float) -> bool:
        """Whether a job that is to be given up needs less than was kept of it; it is asked anew."""
        entry, before = cast(Entry, job), job.remaining_s
        if not entry.tails:
            return False
        entry.tails = {}
        try:
            self._lives.work.measure(entry)
        except NeustreamError as error:
            self._lives.end(entry, "failed", str(error), now)
        return job.remaining_s < before

    def _drop(self, policy: Policy, drop: Mapping[Job, str], now: float) -> None:
        """Carry out what a policy gives up."""
        check_drops(policy, drop, self._lives.jobs)
        for job, reason in drop.items():
            self._lives.give_up(cast(Entry, job), reason, now)

    def _start_decided(
        self, state: PoolState, policy: Policy, decision: Decision, view: View
    ) -> Batch | None:
        """The step that a decision asks for, if any, checked."""
        jobs = tuple(decision.jobs)
        if any(job.status == "dropped" for job in decision.drop):
            jobs = tuple([job for job in jobs if not _gone_with_another(job)])
        if not jobs:
            return None
        label = step_label(policy, jobs, view, self._lives.jobs)
        sizes = step_sizes(policy, jobs, decision.sizes, label)
        return self._start(state, _Step(view.worker, view.now, jobs, sizes))

    def _start(self, state: PoolState, step: _Step) -> Batch | None:
        """Start a step; None if there are no blocks for any of its jobs."""
        jobs, sizes, expected, now = step.jobs, step.sizes, step.expected, step.now
        preempted: tuple[Job, ...] = ()
        blocks = None if step.fits else state.blocks_at(jobs[0].stage)
        if blocks is not None:
            seats = blocks.allocate(jobs, sizes, state.jobs_of(blocks.model))
            if len(seats.jobs) < len(jobs):
                expected = None
            jobs, sizes, preempted = seats.jobs, seats.sizes, seats.preempted
            for job in seats.too_large:
                self._lives.end(cast(Entry, job), "failed", blocks.misfit(job), now)
            for job in preempted:
                self._lives.preempt(cast(Entry, job), now, aside=True)
            if seats.too_large and any(map(_gone_with_another, jobs)):
                left = [
                    pair for pair in zip(jobs, sizes, strict=True) if pair[0].status == "waiting"
                ]
                jobs, sizes = tuple([job for job, _ in left]), tuple([size for _, size in left])
        if not jobs:
            return None
        if expected is None:
            expected = self._times.expect(jobs, sizes)
        self._batches += 1
        batch = Batch(
            self._batches,
            state.pool.name,
            step.worker,
            name_of_step(jobs),
            jobs,
            sizes,
            now,
            expected.seconds,
            preempted,
            expected.profiled,
            step.planned,
            tuple([job for job in preempted if job.host_blocks]),
            expected.step,
            state.free_since(step.worker, jobs),
        )
        state.run(batch)
        return batch


def _freed(decision: Decision, state: PoolState) -> bool:
    """Whether who was given up may have kept from others what they wait for, and nothing runs."""
    idle = decision.wake_at is None and not state.running and not state.blocks_kept
    return idle and bool(decision.drop)


def _goes_on(decision: Decision) -> bool:
    """Whether one of those that were given up still waits: it wants to be served late."""
    return any(job.status == "waiting" for job in decision.drop)


def _gone_with_another(job: Job) -> bool:
    """Whether a branch has ended because another one of its request did."""
    return bool(cast(Entry, job).branch) and job.status in ("cancelled", "dropped", "failed")


def _model_of(decision: Decision) -> str:
    """The language model of a step; failed jobs are at no stage any more."""
    for job in decision.jobs:
        if job.stage is not None:
            return job.stage.model
    return ""
