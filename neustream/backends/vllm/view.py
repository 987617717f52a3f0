"""What a policy sees of vLLM's requests: a `View`, built from vLLM's own objects before each step.

What vLLM knows is read from it each time: the tokens of a request, how many of them are computed,
and how many are in flight. Kept by request is only what vLLM does not know: its SLO, when it came
to its stage, how often it was skipped, whether an output was late. This file imports no vLLM.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import count
from operator import attrgetter
from typing import Any, Protocol

from neustream.core.demand import Demand, Recent
from neustream.core.graph import Graph, Stage
from neustream.core.job import Job
from neustream.core.kv_cache import KVCache
from neustream.core.policy import Pool, Unpromised, View
from neustream.core.step_times import StepTimes
from neustream.core.steps import StepLatency
from neustream.core.types import SLO, TICK, Request
from neustream.engine.clock import epoch
from neustream.graphs import llm, llm_profiles

LABEL, POOL = "llm", "vllm"
OLDEST = 86400.0
"""Seconds beyond which a request's age is taken for another clock's reading."""
_NOTHING = SLO()
_NEVER = (-1, -1, -1, -1)


class VllmRequest(Protocol):
    """What is read of a request of vLLM's."""

    request_id: str
    status: Any
    arrival_time: float
    max_tokens: int
    num_prompt_tokens: int
    num_computed_tokens: int
    num_output_placeholders: int
    num_stale_output_tokens: int
    drop_stale_output: bool

    @property
    def num_output_tokens(self) -> int: ...


class Rounds:
    """Steps so far in which some request was at a stage."""

    __slots__ = ("count",)

    def __init__(self) -> None:
        self.count = 0


class RequestJob(Job):
    """One of vLLM's requests, as policies read it.

    Outputs in flight count as there: the next step is decided as if they had come.

    Attributes:
        source: vLLM's request; came_at: its arrival time, another one where a session goes on.
        reading: prompt, outputs, computed tokens and most outputs, as they were read last.
        most: outputs that it may have.
        whole: tokens of its prefill, or the context of its next decode.
        place: its place in the step that it ran in last.
        order: its place among the requests that came to a stage.
        rounds: of its stage; base: those that do not count as skipped.
        round: the one that it ran in last.
        seen: outputs that vLLM has reported.
    """

    __slots__ = (
        "base",
        "came_at",
        "most",
        "order",
        "place",
        "reading",
        "round",
        "rounds",
        "seen",
        "source",
        "whole",
    )

    def __init__(self, source: VllmRequest, request: Request) -> None:
        super().__init__(request)
        self.source = source
        self.came_at = source.arrival_time
        self.reading = _NEVER
        self.most = 0
        self.whole = 0.0
        self.place = -1
        self.order = 0
        self.rounds = Rounds()
        self.base = 0
        self.round = -1
        self.seen = source.num_output_tokens

    @property
    def skipped(self) -> int:
        return self.rounds.count - self.base

    @property
    def ran_last(self) -> bool:
        return self.round == self.rounds.count

    @property
    def size(self) -> float:
        return self.whole - self.computed

    def due_of(self, index: int) -> float:
        """When output `index` (from 0) is due."""
        if index == 0:
            return min(self.due, self.arrival + self.slo.first)
        return min(self.due, self.output_due(index))

    def note_outputs(self, now: float) -> range:
        """Compare the outputs that vLLM has reported since with their deadlines; their numbers."""
        came = range(self.seen, self.source.num_output_tokens)
        for index in came:
            if now > self.due_of(index) + TICK:
                self.late = True
            if index == 0:
                self.first_at = now
        self.seen = self.source.num_output_tokens
        return came


class ViewBuilder:
    """Builds the views of one vLLM engine, which is a pool with one language model.

    Args:
        steps: step latencies.
        runnable: the statuses of requests that vLLM may run.
        num_blocks, block_size: vLLM's KV cache: its blocks, and the tokens of each.
        max_batch, step_tokens: the most requests, and tokens, in one step.
        max_len: tokens that a request may have in all.

    `jobs`: by request id, of all requests that a view was built of and that have not ended.
    """

    def __init__(
        self,
        steps: StepLatency,
        runnable: Iterable[Any],
        *,
        num_blocks: int,
        block_size: int,
        max_batch: int,
        step_tokens: int,
        max_len: int,
    ) -> None:
        self.jobs: dict[str, RequestJob] = {}
        self._graph = Graph(LABEL, llm(LABEL, max_batch=max_batch))
        self._prefill, self._decode = self._graph.stages.values()
        self._rounds = {stage: Rounds() for stage in self._graph.stages.values()}
        self._cache = KVCache(num_blocks, block_size)
        stages = tuple(self._graph.stages)
        self._pool = Pool(POOL, stages, kv_caches={LABEL: self._cache}, step_tokens=step_tokens)
        self._times = StepTimes(llm_profiles(LABEL, steps, max_batch))
        self._recent = Recent()
        self._runnable = tuple(runnable)
        self._max_len = max_len
        self._order = count()
        self._moved: list[RequestJob] = []
        self._unpromised = Unpromised()
        self._some_unpromised = False
        self._memo: dict[Any, Any] = {}

    # -- before a step ----------------------------------------------------------------------------

    def build(
        self, requests: Mapping[str, VllmRequest], slos: Mapping[str, SLO], free: int, now: float
    ) -> View:
        """What a policy sees at `now`, where `free` KV blocks are free.

        Not in it are requests that end with what is in flight, and those that vLLM would not run
        now.
        """
        prefills: list[RequestJob] = []
        decodes: list[RequestJob] = []
        some_unpromised = False
        for id, request in requests.items():
            if request.status not in self._runnable:
                continue
            job = self._job_of(request, slos.get(id, _NOTHING), now)
            some_unpromised = some_unpromised or not job.promised
            if job.calls_left and not _drains(request):
                (decodes if job.stage is self._decode else prefills).append(job)
        if self._moved:
            self._line_up()
        if len(self.jobs) > len(requests):
            self._keep_only(requests)
        self._some_unpromised = some_unpromised
        if not some_unpromised:
            self._unpromised = Unpromised()
        return self._view(prefills, decodes, free, now)

    def _view(
        self, prefills: list[RequestJob], decodes: list[RequestJob], free: int, now: float
    ) -> View:
        queues = {}
        for stage, jobs in ((self._prefill, prefills), (self._decode, decodes)):
            if jobs:
                jobs.sort(key=attrgetter("order"))
                queues[stage.name] = jobs
        return View(
            now,
            self._pool,
            0,
            queues,
            self._times.profiles,
            recent=self._recent.demands,
            speed=self._times.speed,
            free={LABEL: free},
            lengths=self._recent.lengths,
            spread=self._times.spread,
            unpromised=self._unpromised,
            memo=self._memo,
        )

    def _job_of(self, request: VllmRequest, slo: SLO, now: float) -> RequestJob:
        """The job of a request, as far as that is by now."""
        id = request.request_id
        job = self.jobs.get(id)
        if job is None or job.source is not request or job.came_at != request.arrival_time:
            job = self.jobs[id] = self._come(request, slo, now)
        else:
            self._read(job, now)
        return job

    def _come(self, source: VllmRequest, slo: SLO, now: float) -> RequestJob:
        """A request that is seen for the first time, in whatever state it is."""
        age = epoch() - source.arrival_time
        arrival = max(now - age, 0.0) if 0 < age < OLDEST else now
        job = RequestJob(source, Request(source.request_id, self._graph, arrival, slo))
        self._read(job, now)
        job.planned_calls, job.alone_s = dict(job.calls_left), job.remaining_s
        if job.calls_left:
            self._recent.add(Demand.of(job))
        return job

    def _read(self, job: RequestJob, now: float) -> None:
        """Read from vLLM how far a request is."""
        source = job.source
        outputs = source.num_output_tokens + source.num_output_placeholders
        prompt, computed = source.num_prompt_tokens, source.num_computed_tokens
        reading = (prompt, outputs, computed, source.max_tokens)
        if reading == job.reading:
            return
        job.reading = reading
        job.most = min(source.max_tokens, self._max_len - prompt)
        job.params = {"prompt_tokens": prompt, "max_tokens": job.most}
        job.outputs = job.call_outputs = outputs
        job.due_next = job.due_of(outputs)
        job.whole = float(prompt + outputs)
        job.num_blocks = self._cache.blocks_of(computed)
        decodes = outputs > 0 and computed >= prompt + outputs - 1
        job.computed = 0.0 if decodes else float(min(computed, prompt + outputs - 1))
        self._enter(job, self._decode if decodes else self._prefill, now)
        self._measure(job)

    def _enter(self, job: RequestJob, stage: Stage, now: float) -> None:
        """Put a job at the end of a stage's queue, if it was not in it."""
        if job.stage is stage:
            return
        job.stage = stage
        job.joined_at = now
        self._moved.append(job)
        job.rounds = self._rounds[stage]
        job.base, job.round = job.rounds.count, -1

    def _line_up(self) -> None:
        """Who came to a stage since the last view lines up behind the others, as the step ran."""
        for job in sorted(self._moved, key=attrgetter("place")):
            job.order = next(self._order)
        self._moved.clear()

    def _measure(self, job: RequestJob) -> None:
        """What lies ahead of a job, in calls and in seconds alone."""
        after = job.most - job.call_outputs - 1  # outputs behind the next one
        if after < 0:  # it ends with what is in flight
            job.calls_left = {}
            job.remaining_s = job.next_output_s = 0.0
            return
        alone, whole = self._times.alone, job.whole
        decode_s = alone(self._decode, whole)
        if job.stage is self._decode:
            job.unit_s = job.next_output_s = decode_s
            job.calls_left = {self._decode.name: after + 1}
        else:
            job.unit_s = alone(self._prefill, whole)
            job.next_output_s = alone(self._prefill, job.size) if job.computed else job.unit_s
            job.calls_left = {self._prefill.name: 1, self._decode.name: after}
        job.remaining_s = job.next_output_s + after * decode_s

    # -- around a step ----------------------------------------------------------------------------

    def scheduled(self, tokens: Mapping[str, int], now: float) -> float:
        """A step of `tokens` by request id runs; the share of its requests without a promise."""
        ran: list[RequestJob] = []
        for id in tokens:
            job = self.jobs.get(id)
            if job is not None:
                ran.append(job)
        for rounds in {job.rounds for job in ran}:
            rounds.count += 1
        for place, job in enumerate(ran):
            job.place = place
            job.round = job.rounds.count
            job.base += 1
            job.worker = 0
            if job.started_at is None:
                job.started_at = now
        return sum([not job.promised for job in ran]) / len(ran) if ran else 0.0

    def landed(self, ids: Iterable[str], alive: Mapping[str, VllmRequest], now: float) -> None:
        """vLLM took in a step of the requests `ids`; those that are not `alive` ended with it."""
        lengths = self._recent.lengths_of(LABEL)
        for id in ids:
            job = self.jobs.get(id)
            if job is None:
                continue
            for index in job.note_outputs(now):
                lengths.reached(index + 1)
            if id not in alive:
                if job.seen < job.most:
                    lengths.ended(job.seen, job.most)
                else:
                    lengths.full(job.most)
                del self.jobs[id]

    def ran(self, expected: float, seconds: float, unpromised: float, share: float = 0.0) -> None:
        """A step took so many seconds; `unpromised` of its requests had no promise.

        `share`: of the device's time that those are to get.
        """
        if expected > 0:
            self._times.note(self._graph.stages, seconds / expected)
        if self._some_unpromised:
            self._unpromised = self._unpromised.after(seconds, unpromised, share)

    # -- the end of requests ----------------------------------------------------------------------

    def forget(self, id: str) -> None:
        """A request is over, whether it was seen or not."""
        self.jobs.pop(id, None)

    def forget_all(self) -> None:
        """All requests are left to vLLM; what was learnt stays."""
        self.jobs.clear()
        self._some_unpromised = False

    def _keep_only(self, requests: Mapping[str, VllmRequest]) -> None:
        self.jobs = {id: job for id, job in self.jobs.items() if requests.get(id) is job.source}


def _drains(request: VllmRequest) -> bool:
    """Whether outputs of before its preemption are in flight: vLLM waits for them to run it."""
    return request.num_stale_output_tokens > 0 and not request.drop_stale_output
