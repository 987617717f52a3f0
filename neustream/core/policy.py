"""The seam where rules plug in: a `View` goes in, a `Decision` comes out.

A policy is pure: it keeps nothing between calls and changes nothing it sees, so one object can
serve several pools, be asked again for the same moment, and run inside another policy's lookahead.
What a rule has to remember about a job (how often it was skipped, who ran it) the scheduler keeps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from neustream.core.batch import Batch
from neustream.core.demand import Demand, Missed
from neustream.core.graph import Stage
from neustream.core.job import Job
from neustream.core.kv_cache import KVCache
from neustream.core.lengths import Lengths
from neustream.core.observed import CorrectedProfile, Ratios
from neustream.core.profile import LatencyProfile
from neustream.core.reasons import due, span
from neustream.core.record import record
from neustream.core.reserved import NOTHING, Reserved
from neustream.core.types import TICK

CHANCE = 0.02
"""Share of generations that must have been short enough for a promise not to be hopeless."""


@dataclass(frozen=True, slots=True)
class Pool:
    """Interchangeable workers (one GPU each, usually) that run the same stages.

    `sticky`: once started, a job stays on its worker (its tensors live there). `kv_caches`:
    those of the language models served here, by `Stage.model` (one worker's); without any there is
    no limit. `step_tokens`: the most tokens that a step of a
    language model computes, prompts' and decodes', for policies that prefill in parts.

    `concurrency`: a pool without a policy, for tools and other things that just start. Its jobs do
    so in the order in which they come, each alone, up to so many at once (as on so many workers).
    """

    name: str
    stages: tuple[str, ...]
    workers: int = 1
    sticky: bool = False
    kv_caches: Mapping[str, KVCache] = field(default_factory=dict)
    step_tokens: int = 2048
    concurrency: int | None = None

    @property
    def seats(self) -> int:
        """Steps that may be under way at once."""
        return self.workers if self.concurrency is None else self.concurrency


def nobody(stage: str) -> Pool | None:
    """Of a scheduler without other pools."""
    return None


class Unpromised(NamedTuple):
    """Requests without a promise: device seconds since one of them waits, and those that they got.

    A step counts for them by their share of its jobs. What they get while nothing is owed to them
    is no debt: they are never ahead by more than a step that was owed.
    """

    busy_s: float = 0.0
    served_s: float = 0.0

    def after(self, seconds: float, part: float, share: float) -> Unpromised:
        """The same after a step of which a `part` was theirs.

        `share`: of the device's time that they are to get; 0: nothing is owed to them, all counts.
        """
        busy, served = self.busy_s + seconds, self.served_s + seconds * part
        if share > 0 and share * self.busy_s <= self.served_s:
            served = max(self.served_s, min(served, share * busy))
        return Unpromised(busy, served)


def background_of(policy: object) -> float:
    """The share of the device's time that a policy gives to requests without a promise."""
    share: float = getattr(policy, "background", 0.0)
    return share


@dataclass(slots=True)
class View:
    """What a policy may know when `worker` of `pool` is free.

    Args:
        queues: the runnable jobs by stage, in the order they came to the stage; stages without any
            are absent.
        running: the steps under way on the pool's other workers.
        recent: what the latest requests to any pool asked for, in the order they came.
        missed: the latest requests that were not on time.
        speed: how many times their expected latency the steps of a stage usually take (1 where none
            has run): a phase that ends soon does not count. `spread` has the distribution.
        free: blocks of each KV cache of the pool that nobody holds, by model.
        lengths: what is known of how long generations get, by model.
        unpromised: what requests without a promise got of the device.
        reserved: what jobs that are not in this view have been promised of the device.
        live: all requests of the scheduler by id, those in other pools too.
        pool_of: the pool that serves a stage; None: none of this scheduler's.
        memo: for what a rule computes from a view and would compute again. It lives as long as the
            scheduler; a rule bounds what it keeps there.
    """

    now: float
    pool: Pool
    worker: int
    queues: Mapping[str, Sequence[Job]]
    profiles: Mapping[str, LatencyProfile]
    running: Sequence[Batch] = ()
    recent: tuple[Demand, ...] = ()
    speed: Mapping[str, float] = field(default_factory=dict)
    free: Mapping[str, int] = field(default_factory=dict)
    lengths: Mapping[str, Lengths] = field(default_factory=dict)
    spread: Mapping[str, Ratios] = field(default_factory=dict)
    unpromised: Unpromised = field(default_factory=Unpromised)
    reserved: Reserved = NOTHING
    live: Mapping[str, Job] = field(default_factory=dict)
    pool_of: Callable[[str], Pool | None] = nobody
    memo: MutableMapping[Any, Any] = field(default_factory=dict)
    missed: Sequence[Missed] = ()

    @property
    def jobs(self) -> list[Job]:
        """All runnable jobs of the pool."""
        return [job for queue in self.queues.values() for job in queue]

    def limit(self, stage: str) -> int:
        """The most jobs in one step of `stage`: what the stage allows and the profile covers."""
        declared = self.queues[stage][0].stage
        assert declared is not None
        return min(declared.max_batch, self.profiles[stage].max_batch)

    def work(self, job: Job, batch: int, calls: Mapping[str, int] | None = None) -> float:
        """Seconds of the `calls` of `job` (default: those left) if each ran in a batch of `batch`.

        Where a stage or its profile does not go up to `batch`, its largest batch counts.
        """
        seconds = 0.0
        for name, count in (job.calls_left if calls is None else calls).items():
            stage, profile = job.request.graph.stages[name], self.profiles[name]
            b = min(batch, stage.max_batch, profile.max_batch)
            size = job.size_ahead(stage)
            seconds += count * profile.latency(b, b * size, b * size * size)
        return seconds

    def hopeless(self) -> dict[Job, str]:
        """Jobs that would be late even if they ran alone from now on, with the reason to give.

        A maximum of outputs is no reason: most generations end before it. Where all would be late,
        those are none that would be on time by the profiles as they were given: nobody else needs
        the device, what was learnt may be wrong, and only steps that run correct it.
        """
        late = self._late(1.0)
        if late and not self.running and len(late) == sum(map(len, self.queues.values())):
            hope = min([_given(self.profiles[name]) for name in self.queues])
            if hope < 1:
                late = self._late(hope)
        return late

    def _late(self, hope: float) -> dict[Job, str]:
        """Jobs that would be late even if they needed only `hope` times what is expected."""
        latest = self.now - TICK
        late: dict[Job, str] = {}
        for queue in self.queues.values():
            for job in _doubtful(queue, latest, hope):
                needed = job.remaining_s
                if job.due - hope * needed < latest:
                    needed = self.least_s(job)
                next_s = hope * job.next_output_s
                if job.due - hope * needed < latest or job.due_next - next_s < latest:
                    left = min(job.due, job.due_next) - self.now
                    late[job] = f"hopeless: needs {span(needed)} more, {due(left)}"
        return late

    def least_s(self, job: Job) -> float:
        """Seconds that it needs alone if its generations are as short as any were seen to be.

        `job.remaining_s` counts each of them up to its maximum. Where none was seen, only the next
        output is known to come. Of a branch, what follows the join does not count if there are
        generations: how long these get is not told apart there.
        """
        seconds = job.remaining_s
        if any(stage.phase == "decode" for stage in job.request.graph.stages.values()):
            seconds = min(seconds, self.work(job, 1))
        for name, most in job.calls_left.items():
            stage = job.request.graph.stages[name]
            if stage.phase == "decode":
                outputs = self._least_outputs(job, stage, most)
                seconds -= (most - outputs) * self.work(job, 1, {name: 1})
        return max(seconds, job.next_output_s)

    def _least_outputs(self, job: Job, stage: Stage, most: int) -> float:
        """Of the outputs ahead at a stage: those of its own call, and of one call later."""
        lengths = self.lengths.get(stage.model)
        if lengths is None:
            return 0.0
        here = job.calls_here(stage.name)
        outputs = min(lengths.least(job.call_outputs, CHANCE), here) if here else 0.0
        if here < most:
            outputs += min(lengths.least(0, CHANCE), most - here)
        return outputs

    def first_stage(
        self, key: Callable[[Job], float], without: Mapping[Job, str] = {}
    ) -> str | None:
        """The stage that runs next where one device serves several, for rules that say nothing of
        it.

        Stages that run once (encoders, decoders, prefill) go before looped ones, the nearest to the
        end first: they are short, and finish or feed requests. Among looped stages the job with
        the smallest `key` decides. Jobs in `without` do not count.
        """
        best: tuple[bool, float, str] | None = None
        for name, queue in self.queues.items():
            head = min((key(job) for job in queue if job not in without), default=None)
            if head is None:
                continue
            graph = queue[0].request.graph
            looped = name in graph.looped
            rank = (looped, head if looped else -float(graph.position[name]), name)
            if best is None or rank < best:
                best = rank
        return None if best is None else best[2]


def _doubtful(queue: Sequence[Job], latest: float, hope: float) -> list[Job]:
    """Those that would be late even alone if they needed only `hope` times what is ahead, at most:
    of thousands that wait a few."""
    return [
        job
        for job in queue
        if job.due - hope * job.remaining_s < latest
        or job.due_next - hope * job.next_output_s < latest
    ]


def may_be_hopeless(jobs: Iterable[Job], now: float) -> bool:
    """Whether any of some jobs could be late even alone, were its generations to reach their
    maxima: only then `View.hopeless` may find one."""
    latest = now - TICK
    for job in jobs:
        if job.due - job.remaining_s < latest or job.due_next - job.next_output_s < latest:
            return True
    return False


def _given(profile: LatencyProfile) -> float:
    """What a profile said before it was corrected, by what it says now; at most 1."""
    if not isinstance(profile, CorrectedProfile):
        return 1.0
    return 1 / max(1.0, *profile.factors.values())


@record()
class Decision:
    """What to do with a free worker.

    Args:
        jobs: who runs now, in order of importance. All at one stage, or at stages of one model.
            Empty: stay idle. Where the model's KV cache does not suffice for all, jobs that hold
            none of it are left out, and a job that holds some takes the blocks of the least
            important who do: first those that are not chosen, the latest first, then the chosen
            ones from the end. Who loses its blocks goes back to the stage that filled them.
        drop: who is given up, and why; the caller gets that reason.
        wake_at: with no jobs, when to be asked again if nothing else happens before.
        sizes: at most so much of a job's sized step now (chunked prefill); the rest stays ahead.
        until: by then the same jobs would run again, each its whole step, as long as nobody comes,
            goes, or is `hopeless`, and steps are expected to take what they do now. So the rule
            need not be asked.
        within: in place of `hopeless`: as long as none of them is late who is not late yet, or has
            its next output due within so many seconds.
        slower: they would run again too if steps were expected to take less than they do now, or up
            to so many times that (their order may be another one then); 1: only as long.
        later: seconds by which `until` is later with each such step that ran.
    """

    jobs: Sequence[Job] = ()
    drop: Mapping[Job, str] = field(default_factory=dict)
    wake_at: float | None = None
    sizes: Mapping[Job, float] = field(default_factory=dict)
    until: float = -math.inf
    within: float | None = None
    slower: float = 1.0
    later: float = 0.0


class Policy(Protocol):
    """A rule. Implementations are small frozen dataclasses whose fields are its parameters."""

    def decide(self, view: View) -> Decision:
        """Choose the next step of `view.worker`. Must not change anything it sees."""
        ...
