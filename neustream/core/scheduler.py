"""The sans-I/O state machine around a policy: who is where, what may run, what each step changed.

Every method takes `now`; nothing here reads a clock, starts a thread or touches a tensor. Any loop
can drive it: the engine's, a simulator's, or a serving system's that owns its own queues:

    submit -> next_batch -> (admit) -> finish | fail -> pop_events -> next_batch -> ...

`cancel` may come at any moment. A job ends exactly once and is then forgotten.
"""

from __future__ import annotations

import math
import weakref
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from neustream.core.correction import Watch
from neustream.core.graph import Cursor, Graph, Stage
from neustream.core.lengths import Lengths
from neustream.core.memory import Memory
from neustream.core.policy import Decision, Policy, Pool, View
from neustream.core.profile import LatencyProfile
from neustream.core.steps import LearntSteps, Part, Step
from neustream.core.types import TICK, Asked, Batch, Job, Queue, Request, Status
from neustream.errors import GraphError, NeustreamError, PolicyError, ProfileError, RequestError, StageFailed

Update = Mapping[str, Any]
RECENT = 100
"""Requests that are remembered for policies to see the load by."""
FORGET = 0.05
"""Weight of the latest step in the running mean of how long steps take."""


@dataclass(frozen=True, slots=True)
class Emitted:
    """A job produced output number `index` (from 0); `late`: after that one's deadline."""

    job: Job
    index: int
    update: Update
    at: float
    late: bool = False


@dataclass(frozen=True, slots=True)
class Ended:
    """A job is over; `job.status`, `job.reason` and `job.output` say how."""

    job: Job
    at: float


@dataclass(frozen=True, slots=True)
class Corrected:
    """A stage's profile was corrected: observed over profiled seconds at batch sizes near 2**key."""

    stage: str
    factors: Mapping[int, float]
    at: float


def step_latency(profiles: Mapping[str, LatencyProfile], jobs: Sequence[Job], sizes: Sequence[float]) -> float:
    """Profiled seconds of one step.

    Stages of one label have a step profile in common (`Part.steps`); where they have none, a step that
    they share counts as the sum of their parts.
    """
    first = jobs[0].stage
    assert first is not None
    profile = profiles[first.name]
    if first.size is None and not first.fuse:
        return profile.latency(len(jobs))
    if isinstance(profile, Part):
        return profile.steps.seconds(step_of(jobs, sizes))
    parts: dict[str, list[float]] = {}
    for job, size in zip(jobs, sizes, strict=True):
        assert job.stage is not None
        parts.setdefault(job.stage.name, []).append(size)
    return sum(profiles[name].latency(len(some), sum(some), sum(x * x for x in some)) for name, some in parts.items())


def step_of(jobs: Sequence[Job], sizes: Sequence[float]) -> Step:
    """What jobs at the stages of one LLM compute in a step of these sizes."""
    prefills = decodes = 0
    tokens = square = context = 0.0
    for job, size in zip(jobs, sizes, strict=True):
        assert job.stage is not None
        if job.stage.reads:
            decodes += 1
            context += size
        else:
            prefills += 1
            tokens += size
            square += (2 * job.progress + size) * size
    return Step(prefills, tokens, square, decodes, context)


def solo_latency(graph: Graph, params: Mapping[str, Any], profiles: Mapping[str, LatencyProfile]) -> float:
    """Seconds that a request with `params` takes alone: the profiled sum of the calls ahead of it."""
    job = Job(Request("solo", graph, params=params))
    job.cursor = Cursor(graph, job)
    seconds = 0.0
    for stage, calls in job.cursor.ahead(job):
        if stage.name not in profiles:
            raise ProfileError(f"stage {stage.name!r} of graph {graph.name!r} has no profile")
        size = stage.size_of(job)
        seconds += calls * profiles[stage.name].latency(1, size, size * size)
    return seconds


def _part(sizes: Mapping[Job, float], job: Job) -> float:
    """What a decision gives a job of its step; all of it where the step cannot be parted."""
    return job.size if job.stage is None or job.stage.reads else sizes.get(job, job.size)


def _kept(job: Job) -> float:
    """Units that a waiting job keeps in its pool's memory."""
    if job.stage is None or not job.stage.keeps:
        return 0.0
    return job.size - 1 if job.stage.reads else job.progress


def _holders(view: View) -> View:
    """The view without the jobs that hold no memory and would need some."""
    queues = {
        name: jobs
        for name, queue in view.queues.items()
        if (jobs := [job for job in queue if job.held or not (job.stage and job.stage.keeps)])
    }
    return replace(view, queues=queues)


class Scheduler:
    """Holds the live jobs of some pools and asks `policy` what each free worker does next.

    Args:
        pools: their stage names must not overlap.
        policy: one rule for all pools.
        profiles: a latency profile for each stage of each pool.
        correct: whether steps that keep taking other times than their profile says correct it
            (`core/correction.py`); `profiles` then holds the corrected ones, `corrections` the factors.
    """

    def __init__(
        self,
        pools: Sequence[Pool],
        policy: Policy,
        profiles: Mapping[str, LatencyProfile],
        *,
        correct: bool = False,
    ) -> None:
        self.pools = {pool.name: pool for pool in pools}
        if len(self.pools) != len(pools):
            raise GraphError(f"pools need different names, got {[pool.name for pool in pools]}")
        self.policy = policy
        self.profiles = dict(profiles)
        self.jobs: dict[str, Job] = {}
        self.decisions = 0  # times the policy was asked
        self._pool_of: dict[str, str] = {}
        self._queues: dict[str, dict[str, Queue]] = {pool.name: {} for pool in pools}
        self._running: dict[str, dict[int, Batch]] = {pool.name: {} for pool in pools}
        self._wake: dict[str, float | None] = {pool.name: None for pool in pools}
        self._events: list[Emitted | Ended | Corrected] = []
        self._stages: dict[str, Stage] = {}
        self._solo: dict[str, float] = {}
        self._checked: weakref.WeakSet[Graph] = weakref.WeakSet()
        self._batches = 0
        self._asked: deque[Asked] = deque(maxlen=RECENT)
        self._recent: tuple[Asked, ...] | None = ()  # the same as a tuple; None: to be made anew
        self._speed: dict[str, float] = {}
        self._observed: dict[str, int] = {}
        self._watches: dict[str, Watch] | None = {} if correct else None
        self._used = dict.fromkeys(self.pools, 0)  # blocks held, by pool
        self._told: dict[str, int] = {}  # free blocks as a foreign memory's owner says
        self._lengths: dict[str, Lengths] = {}
        for pool in pools:
            if pool.workers < 1:
                raise GraphError(f"pool {pool.name!r}: workers must be 1 or more, got {pool.workers}")
            if pool.memory is not None and pool.workers > 1:
                raise GraphError(f"pool {pool.name!r}: a memory is one worker's; {pool.workers} need a pool each")
            for stage in pool.stages:
                self._open(stage, pool.name)

    def _open(self, stage: str, pool: str) -> None:
        if stage in self._pool_of:
            raise GraphError(f"stage {stage!r} is in two pools: {self._pool_of[stage]!r} and {pool!r}")
        if stage not in self.profiles:
            raise ProfileError(f"stage {stage!r} of pool {pool!r} has no profile")
        self._pool_of[stage] = pool
        self._queues[pool][stage] = Queue()

    def add(self, pool: str, profiles: Mapping[str, LatencyProfile]) -> None:
        """Serve more stages on `pool` from now on (another resolution, another model)."""
        for stage in profiles:
            if stage in self._pool_of:
                raise GraphError(f"stage {stage!r} is served already, by pool {self._pool_of[stage]!r}")
        self.profiles = {**self.profiles, **profiles}
        for stage in profiles:
            self._open(stage, pool)
        known = self.pools[pool]
        self.pools[pool] = replace(known, stages=(*known.stages, *profiles))

    @property
    def corrections(self) -> dict[str, dict[int, float]]:
        """Observed over profiled seconds by stage, at batch sizes near 2**key, where they are off."""
        return {stage: dict(watch.factors) for stage, watch in (self._watches or {}).items() if watch.factors}

    # -- requests ---------------------------------------------------------------------------------

    def submit(self, request: Request, now: float) -> Job:
        """Accept `request`; its job waits at its first stage. A live duplicate id is an error."""
        if request.id in self.jobs:
            raise RequestError(f"request id {request.id!r} is already being served")
        self._check(request.graph)
        job = Job(request)
        job.cursor = Cursor(request.graph, job)
        self._place(job, now)
        job.solo, job.total = job.work, dict(job.left)
        stages = request.graph.stages
        sizes = {name: stages[name].size_of(job) for name in job.total if stages[name].size is not None}
        budget = job.deadline - job.arrival
        asked = Asked(job.arrival, budget, job.weight, request.graph, job.total, sizes, request.slo.first)
        self._asked.append(asked)
        self._recent = None
        if job.stage is not None:
            self.jobs[job.id] = job
        return job

    def cancel(self, id: str, now: float) -> bool:
        """End a request on the caller's wish: at once if it waits, after its step if it runs.

        False if no such request is being served (unknown, or ended already).
        """
        return self._finally(self.jobs.get(id), "cancelled", "cancelled by the caller", now)

    def complete(self, id: str, now: float) -> bool:
        """End a request as done, because the loop around knows that it is; as `cancel` otherwise."""
        return self._finally(self.jobs.get(id), "done", "", now)

    def _finally(self, job: Job | None, status: Status, reason: str, now: float) -> bool:
        if job is None or job.ending is not None:
            return False
        if job.status == "running":
            job.ending = (status, reason)
        else:
            self._end(job, status, reason, now)
        return True

    def reach(self, id: str, units: float) -> bool:
        """So much of a request's sized step is done without having been run here (a prefix cache).

        For loops whose engine knows, before they `admit` the step that it is in, if it is in one; less than
        what is done already changes nothing. False if no such request is being served, or its step cannot
        be done in parts.
        """
        job = self.jobs.get(id)
        if job is None or job.stage is None or job.stage.reads or job.stage.size is None:
            return False
        if units > job.progress:
            job.progress = min(units, job.progress + job.size)
            self._measure(job)
        return True

    def rewind(self, id: str, now: float) -> bool:
        """The memory of a request was taken from it: it goes back to the stage that fills it again.

        For loops whose engine hands out the memory itself; a pool with a memory of its own does this
        alone. False if no such request is being served; GraphError if its graph has no such stage.
        """
        job = self.jobs.get(id)
        if job is None:
            return False
        if job.status == "running":
            raise PolicyError(f"rewind: request {id!r} is in a step; admit that step without it first")
        self._lose(job, now)
        return True

    def free(self, pool: str, blocks: int) -> None:
        """What the owner of a foreign memory says is free."""
        self._told[pool] = blocks

    # -- steps ------------------------------------------------------------------------------------

    def next_batch(self, pool: str, now: float, worker: int = 0) -> Batch | None:
        """Ask the policy about a free worker; carry out its drops; return the step to run, if any.

        With None, `wake_at(pool)` says when to ask again if nothing else happens before. A policy
        that neither runs nor drops anything, nor names such a time, while jobs wait and nothing
        runs, would wait for ever: that is a PolicyError.
        """
        self._wake[pool] = None
        view = self._view(pool, now, worker)
        if not view.queues:
            return None
        decision = self._decide(view)
        if decision.jobs:
            batch = self._start(decision, view)
            if batch is None:  # no memory for any of them: those who have some go on
                view = self._view(pool, now, worker)
                holders = _holders(view)
                decision = self._decide(holders if holders.queues else view)
                batch = self._start(decision, view) if decision.jobs else None
            if batch is not None:
                return batch
        self._wake[pool] = decision.wake_at
        if decision.wake_at is not None:
            if not now < decision.wake_at < math.inf:
                raise PolicyError(f"{self._named} asked to be woken at {decision.wake_at}, which is not after {now}")
        elif not self._running[pool]:
            mine = (-1, worker)  # who ran on another worker may be waiting for that one to be asked
            waiting = sum(1 for job in view.jobs if job.status == "waiting" and job.worker in mine)
            if waiting:
                raise PolicyError(f"{self._named} left {waiting} job(s) of pool {pool!r} waiting for ever")
        return None

    def _decide(self, view: View) -> Decision:
        self.decisions += 1
        decision = self.policy.decide(view)
        for job, reason in decision.drop.items():
            if job.status != "waiting":
                raise PolicyError(f"{self._named} dropped {job!r}, which is not waiting")
            self._end(job, "dropped", reason, view.now)
        return decision

    def wake_at(self, pool: str) -> float | None:
        """When the policy asked to be asked again, after a `next_batch` that gave None."""
        return self._wake[pool]

    def admit(self, batch: Batch, sizes: Mapping[Job, float] | Sequence[Job], now: float) -> Batch | None:
        """Tell who of `batch` really runs, where an executor refuses some (no memory left).

        A mapping also says how much of a sized step each gets, and may name jobs that the policy did
        not choose: the loop knows better. The others go back to waiting, and count as skipped.
        Returns the batch that runs, None if it is empty.
        """
        given = dict(zip(batch.jobs, batch.sizes, strict=True))
        more = [job for job in sizes if job not in given]
        if more and not isinstance(sizes, Mapping):
            raise PolicyError(f"admit: {len(more)} job(s) are not in batch {batch.id}, and come without sizes")
        chosen = {job: sizes[job] if isinstance(sizes, Mapping) else given[job] for job in sizes}
        if any(job.stage and job.stage.size and size <= 0 for job, size in chosen.items()):
            raise PolicyError(f"admit: a job of batch {batch.id} got a share of 0 of its step")
        for job in more:
            if job.status != "waiting" or job.stage is None or self._pool_of[job.stage.name] != batch.pool:
                raise PolicyError(f"admit: {job!r} is not runnable in pool {batch.pool!r}")
        self._take_off(batch)
        for job in batch.jobs:
            if job not in chosen:
                job.status, job.round = "waiting", -1
                self._hold(job, _kept(job))
                if job.ending is not None:
                    self._end(job, *job.ending, now)
        if not chosen:
            return None
        for queue in {id(job.queue): job.queue for job in more}.values():
            if not any(job.queue is queue for job in batch.jobs):
                queue.rounds += 1
        return self._run(batch, tuple(chosen), tuple(chosen.values()))

    def _run(self, batch: Batch, jobs: tuple[Job, ...], sizes: tuple[float, ...]) -> Batch:
        """Note that `jobs` run, with the pool, worker and time of `batch`."""
        for job, size in zip(jobs, sizes, strict=True):
            job.status, job.round, job.share = "running", job.queue.rounds, size
            if job.stage is not None and job.stage.keeps:
                self._hold(job, size if job.stage.reads else job.progress + size)
        seconds = profiled = step_latency(self.profiles, jobs, sizes)
        first = jobs[0].stage
        assert first is not None
        profile = self.profiles[first.name]
        if isinstance(profile, Part) and isinstance(profile.steps, LearntSteps) and profile.steps.base is not None:
            profiled = profile.steps.base.seconds(step_of(jobs, sizes))
        stages = {job.stage.name: job.stage for job in jobs if job.stage is not None}
        label = next(iter(stages)) if len(stages) == 1 else next(iter(stages.values())).fuse
        batch = replace(batch, stage=label, jobs=jobs, sizes=sizes, expected=seconds, profiled=profiled)
        self._running[batch.pool][batch.id] = batch
        return batch

    def finish(self, batch: Batch, updates: Sequence[Update | NeustreamError], now: float) -> None:
        """Take the results of a step, one per job in the same order, and move the jobs on.

        An error in place of an update fails that job alone. A wrong number of results fails all.
        """
        if len(updates) != len(batch.jobs):
            self.fail(
                batch,
                StageFailed(f"stage {batch.stage!r} returned {len(updates)} results for {len(batch.jobs)} jobs"),
                now,
            )
            return
        self._retire(batch)
        self._observe(batch, now)
        for job, update, size in zip(batch.jobs, updates, batch.sizes, strict=True):
            job.status = "waiting"
            if job.ending is not None:
                self._end(job, *job.ending, now)
            elif isinstance(update, NeustreamError):
                self._end(job, "failed", str(update), now)
            else:
                self._move(job, update, size, now)

    def fail(self, batch: Batch, error: BaseException, now: float) -> None:
        """A step failed as a whole: all of its jobs end, with the error as the reason."""
        self._retire(batch)
        for job in batch.jobs:
            job.status = "waiting"
            if job.ending is not None:
                self._end(job, *job.ending, now)
            else:
                known = isinstance(error, NeustreamError)
                self._end(job, "failed", str(error) if known else f"{type(error).__name__}: {error}", now)

    def pop_events(self) -> list[Emitted | Ended | Corrected]:
        """Outputs, ends and corrections of profiles since the last call, in order."""
        events, self._events = self._events, []
        return events

    # -- inside -----------------------------------------------------------------------------------

    @property
    def _named(self) -> str:
        return f"policy {type(self.policy).__name__!r}"

    def _check(self, graph: Graph) -> None:
        if graph in self._checked:
            return
        for stage in graph.stages.values():
            if stage.name not in self._pool_of:
                raise GraphError(
                    f"graph {graph.name!r}: stage {stage.name!r} is in no pool; stages served: {sorted(self._pool_of)}"
                )
            if self._stages.get(stage.name, stage) is not stage:
                raise GraphError(f"graph {graph.name!r}: another graph already has a stage named {stage.name!r}")
        for stage in graph.stages.values():
            if stage.size is None:
                self._solo[stage.name] = self.profiles[stage.name].latency(1)
        self._stages.update(graph.stages)
        self._checked.add(graph)

    def _view(self, pool: str, now: float, worker: int) -> View:
        running = self._running[pool]
        sticky = self.pools[pool].sticky
        queues: dict[str, Sequence[Job]] = {}
        for stage, queue in self._queues[pool].items():
            if not queue.jobs:
                continue
            jobs = list(queue.jobs.values())
            if running:
                jobs = [job for job in jobs if job.status == "waiting"]
            if sticky:
                jobs = [job for job in jobs if job.worker in (-1, worker)]
            if jobs:
                queues[stage] = jobs
        if self._recent is None:
            self._recent = tuple(self._asked)
        steps = tuple(running.values())
        memory = self.pools[pool].memory
        free = 0 if memory is None else max(self._told.get(pool, memory.blocks - self._used[pool]), 0)
        return View(
            now,
            self.pools[pool],
            worker,
            queues,
            self.profiles,
            steps,
            self._recent,
            self._speed,
            free,
            self._lengths,
        )

    def _start(self, decision: Decision, view: View) -> Batch | None:
        """The step that a decision asks for; None if there is no memory for any of its jobs."""
        jobs = tuple(decision.jobs)
        label = self._label(jobs, view)
        if decision.sizes:
            sizes = tuple(min(_part(decision.sizes, job), job.size) for job in jobs)
            if any(job.stage and job.stage.size and size <= 0 for job, size in zip(jobs, sizes, strict=True)):
                raise PolicyError(f"{self._named} gave a job of stage {label!r} a share of 0 of its step")
        else:
            sizes = tuple([job.size for job in jobs])
        evicted: tuple[Job, ...] = ()
        memory = view.pool.memory
        if memory is not None and not memory.foreign:
            jobs, sizes, evicted = self._seat(memory, jobs, sizes, view)
            if not jobs:
                return None
        for queue in {id(job.queue): job.queue for job in jobs}.values():
            queue.rounds += 1
        self._batches += 1
        batch = Batch(self._batches, view.pool.name, view.worker, label, (), (), view.now, 0.0, evicted)
        return self._run(batch, jobs, sizes)

    # -- memory -----------------------------------------------------------------------------------

    def _seat(
        self, memory: Memory, jobs: tuple[Job, ...], sizes: tuple[float, ...], view: View
    ) -> tuple[tuple[Job, ...], tuple[float, ...], tuple[Job, ...]]:
        """Who of `jobs`, in order of importance, has memory for its step, and who lost theirs for it.

        Jobs that hold none never take any from others. One that holds some takes it from the least
        important holders; where it is that itself, it loses its own.
        """
        pool = view.pool.name
        fits = [job.stage is None or not job.stage.keeps or job.size <= memory.units for job in jobs]
        for job in [job for job, fit in zip(jobs, fits, strict=True) if not fit]:
            try:
                self._check_memory(job)
            except RequestError as error:
                self._end(job, "failed", str(error), view.now)
        if not all(fits):
            sizes = tuple(size for size, fit in zip(sizes, fits, strict=True) if fit)
            jobs = tuple(job for job, fit in zip(jobs, fits, strict=True) if fit)
        free = memory.blocks - self._used[pool]
        wanted = [
            memory.blocks_of(size if job.stage.reads else job.progress + size) - job.held
            if job.stage is not None and job.stage.keeps
            else 0
            for job, size in zip(jobs, sizes, strict=True)
        ]
        if sum(wanted) <= free:
            return jobs, sizes, ()
        chosen = set(jobs)
        others = [job for queue in self._queues[pool].values() for job in queue.jobs.values()]
        victims = [job for job in jobs if job.held]  # the last one goes first
        victims += sorted(
            (job for job in others if job.held and job not in chosen and job.status == "waiting"),
            key=lambda job: job.joined_at,
        )
        seated: dict[Job, float] = {}
        lost: list[Job] = []
        for job, size, need in zip(jobs, sizes, wanted, strict=True):
            if job in lost:
                continue
            while need > free and job.held:
                victim = victims.pop()
                lost.append(victim)
                free += victim.held
                self._lose(victim, view.now)
            if job in lost:
                continue
            if need <= free:
                free -= need
                seated[job] = size
        return tuple(seated), tuple(seated.values()), tuple(lost)

    def _hold(self, job: Job, units: float) -> None:
        """Let `job` hold the blocks of so many units."""
        stage = job.stage
        assert stage is not None
        pool = self._pool_of[stage.name]
        memory = self.pools[pool].memory
        if memory is not None:
            blocks = memory.blocks_of(units)
            self._used[pool] += blocks - job.held
            job.held = blocks

    def _lose(self, job: Job, now: float) -> None:
        """Take the memory of a waiting job: it goes back to the stage that fills it."""
        assert job.cursor is not None and job.stage is not None
        self._hold(job, 0)
        job.progress = 0.0
        left = job.stage
        stage = job.cursor.rewind() if left.reads else left
        if stage is None:
            raise GraphError(f"request {job.id!r}: no stage in front of {left.name!r} fills its memory again")
        try:
            self._enter(job, stage, now)
        except NeustreamError as error:
            self._end(job, "failed", str(error), now)

    def _label(self, jobs: tuple[Job, ...], view: View) -> str:
        """The name of the step; PolicyError if these jobs cannot share one."""
        if len(set(jobs)) != len(jobs):
            raise PolicyError(f"{self._named} chose a job twice for one step")
        counts: dict[Stage, int] = {}
        pool = view.pool.name
        for job in jobs:
            stage = job.stage
            served = self.jobs.get(job.id) is job and job.status == "waiting"
            if not served or stage is None or self._pool_of[stage.name] != pool:
                raise PolicyError(f"{self._named} chose {job!r}, which is not runnable in pool {pool!r}")
            counts[stage] = counts.get(stage, 0) + 1
        for stage, count in counts.items():
            most = min(stage.max_batch, self.profiles[stage.name].max_batch)
            if count > most:
                raise PolicyError(f"{self._named} chose {count} jobs for a step of {stage.name!r} (max_batch {most})")
        if len(counts) == 1:
            return next(iter(counts)).name
        labels = {stage.fuse for stage in counts}
        if len(labels) != 1 or "" in labels:
            raise PolicyError(f"{self._named} mixed stages that cannot share a step: {[s.name for s in counts]}")
        return labels.pop()

    def _retire(self, batch: Batch) -> None:
        """Take a batch off its worker; steps of its stage since it began skipped none of its jobs."""
        self._take_off(batch)
        for job in batch.jobs:
            job.base += job.queue.rounds - job.round + 1
            job.worker = batch.worker
            if job.started_at is None:
                job.started_at = batch.started_at

    def _observe(self, batch: Batch, now: float) -> None:
        """Learn from a step how long its stage takes, as a multiple of what the profile says.

        The mean of the first steps, later an exponentially weighted one. A single step counts as at
        most twice and at least half of the mean so far, so that an outlier (a first call that
        compiles, a stall) does not make everything look hopeless.
        """
        if not batch.expected > 0:
            return
        fused = batch.stage not in self._pool_of
        first = batch.jobs[0].stage
        assert first is not None
        profile = self.profiles[first.name]
        if isinstance(profile, Part):
            if isinstance(profile.steps, LearntSteps):
                profile.steps.observe(step_of(batch.jobs, batch.sizes), now - batch.started_at)
                return
        elif self._watches is not None and not fused:
            self._watch(batch, now)
        ratio = (now - batch.started_at) / batch.expected
        names = {job.stage.name for job in batch.jobs if job.stage is not None} if fused else {batch.stage}
        speed = dict(self._speed)  # views hold the one before
        for name in names:
            seen, mean = self._observed.get(name, 0), speed.get(name, 1.0)
            step = min(max(ratio, mean / 2), mean * 2) - mean
            speed[name] = mean + step * max(FORGET, 1 / (seen + 2))
            self._observed[name] = seen + 1
        self._speed = speed

    def _watch(self, batch: Batch, now: float) -> None:
        """Compare a step with its stage's profile, and go on with a corrected one if they disagree."""
        assert self._watches is not None
        stage = batch.stage
        watch = self._watches.setdefault(stage, Watch(self.profiles[stage]))
        square = sum(size * size for size in batch.sizes)
        corrected = watch.observe(len(batch), sum(batch.sizes), square, now - batch.started_at)
        if corrected is None:
            return
        self.profiles = {**self.profiles, stage: corrected}
        if stage in self._solo:
            self._solo[stage] = corrected.latency(1)
        self._speed = {name: speed for name, speed in self._speed.items() if name != stage}
        self._observed.pop(stage, None)
        for job in self.jobs.values():
            if stage in job.left:
                self._measure(job)
        self._events.append(Corrected(stage, dict(watch.factors), now))

    def _take_off(self, batch: Batch) -> None:
        if self._running[batch.pool].pop(batch.id, None) is None:
            raise PolicyError(f"batch {batch.id} of pool {batch.pool!r} is not running")

    def _move(self, job: Job, update: Update, size: float, now: float) -> None:
        try:
            self._move_on(job, update, size, now)
        except NeustreamError as error:  # the user's own size, times, until and on are asked here
            self._end(job, "failed", str(error), now)

    def _move_on(self, job: Job, update: Update, size: float, now: float) -> None:
        stage, cursor = job.stage, job.cursor
        assert stage is not None and cursor is not None
        whole = job.size if stage.size is not None else 0.0  # before the update, which may change it
        job.state.update(update)
        if stage.size is not None:
            if size < whole:
                job.progress += size
                self._measure(job)
                return
            job.progress = 0.0
        if stage.emits:
            self._emit(job, update, now)
        if cursor.again(job):
            if stage.size is not None and (size := stage.size_of(job)) != job.unit_size:
                if stage.reads:
                    self._longer(job, stage, size)
                else:
                    self._measure(job)
                return
            job.left[stage.name] -= 1
            job.work -= job.unit
            if not stage.emits:
                job.work_next -= job.unit
            return
        cursor.advance(job)
        self._place(job, now)

    def _longer(self, job: Job, stage: Stage, size: float) -> None:
        """After one round of a loop whose steps read ever more: the rest at the present size."""
        left = job.left[stage.name] = job.left[stage.name] - 1
        unit = self.profiles[stage.name].latency(1, size, size * size)
        job.work += left * unit - (left + 1) * job.unit
        job.work_next += unit - job.unit if stage.emits else left * unit - (left + 1) * job.unit
        job.unit, job.unit_size = unit, size

    def _emit(self, job: Job, update: Update, now: float) -> None:
        slo, stage = job.slo, job.stage
        late = now > job.due_next + TICK
        job.late = job.late or late
        job.output = update
        self._events.append(Emitted(job, job.outputs, update, now, late))
        job.outputs += 1
        if not job.run:
            job.first_at = now
        job.run += 1
        if stage is not None and stage.keeps:
            self._lengths_of(stage.fuse).reached(job.run)
        tokens_due = job.arrival + slo.first + job.outputs * slo.step if slo.step < math.inf else math.inf
        job.due_next = min(job.due, tokens_due)

    def _place(self, job: Job, now: float) -> None:
        """Put a job into the queue of the stage its cursor points at, or end it there."""
        assert job.cursor is not None
        stage = job.cursor.stage
        if stage is None:
            if job.stage is not None and job.stage.keeps:
                self._over(job, job.stage)
            if job.output is None:
                job.output = dict(job.state)
                job.late = job.late or now > job.due_next + TICK
            job.late = job.late or now > job.due + TICK
            self._end(job, "done", "", now)
            return
        left = job.stage
        if left is not None and left.keeps:
            position = job.request.graph.position
            back = position[stage.name] < position[left.name] or (stage is left and not stage.reads)
            if stage.fuse != left.fuse or back:  # that call is over
                self._over(job, left)
        self._enter(job, stage, now)

    def _check_memory(self, job: Job) -> None:
        """RequestError if the job's next step needs more memory than there is."""
        stage = job.stage
        assert stage is not None
        memory = self.pools[self._pool_of[stage.name]].memory
        if stage.keeps and memory is not None and job.size > memory.units:
            pool = self._pool_of[stage.name]
            raise RequestError(
                f"request {job.id!r}: stage {stage.name!r} needs memory for {job.size:.0f} units at once, "
                f"pool {pool!r} has {memory.units} ({memory.blocks} blocks of {memory.block})"
            )

    def _over(self, job: Job, stage: Stage) -> None:
        """A model call ended: learn how long it got, and take its memory back."""
        if job.left.get(stage.name, 0) > 1:
            self._lengths_of(stage.fuse).ended(job.run)
        self._hold(job, 0)
        job.run = 0

    def _lengths_of(self, label: str) -> Lengths:
        lengths = self._lengths.get(label)
        if lengths is None:
            lengths = self._lengths[label] = Lengths()
        return lengths

    def _enter(self, job: Job, stage: Stage, now: float) -> None:
        """Make `stage` the job's own, at the end of its queue if it was at another one."""
        left, job.stage = job.stage, stage
        self._measure(job)
        self._check_memory(job)
        if stage is left:
            return
        pool = self._pool_of[stage.name]
        if left is not None and self._pool_of[left.name] != pool:
            job.worker = -1
        queue = self._queues[pool][stage.name]
        job.queue.jobs.pop(job.id, None)
        queue.jobs[job.id] = job
        job.queue, job.joined_at = queue, now
        job.base, job.round = queue.rounds, -1

    def _measure(self, job: Job) -> None:
        """Set `left`, `work` and `work_next` from the calls that lie ahead."""
        assert job.cursor is not None
        total, to_output = 0.0, None
        left: dict[str, int] = {}
        for stage, calls in job.cursor.ahead(job):
            solo = whole = self._solo_latency(job, stage, 0.0)
            if not left:
                job.unit, job.unit_size = whole, stage.size_of(job)
                if job.progress:
                    solo = self._solo_latency(job, stage, job.progress)  # the rest of a step in chunks
            left[stage.name] = left.get(stage.name, 0) + calls
            if stage.emits and to_output is None:
                to_output = total + solo
            total += solo + whole * (calls - 1)
        job.left = left
        job.work = total
        job.work_next = total if to_output is None else to_output

    def _solo_latency(self, job: Job, stage: Stage, done: float) -> float:
        if stage.size is None:
            return self._solo[stage.name]
        size = stage.size_of(job) - done
        return self.profiles[stage.name].latency(1, size, size * size)

    def _end(self, job: Job, status: Status, reason: str, now: float) -> None:
        job.status, job.reason, job.ended_at = status, reason, now
        if job.held:
            self._hold(job, 0)
        if status == "done" and job.due < now - TICK:
            job.late = True
        job.queue.jobs.pop(job.id, None)
        job.stage = job.cursor = None
        job.state = {}
        job.left = {}
        self.jobs.pop(job.id, None)
        self._events.append(Ended(job, now))
