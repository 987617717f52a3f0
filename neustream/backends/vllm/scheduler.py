"""vLLM's own scheduler with our policy in front of it: who runs, in what order, who is given up.

`SLOMixin` decides before vLLM's `schedule` and tells the core afterwards what came of it. It touches
`running`, `waiting` and `max_num_scheduled_tokens`, around one call of the original, and copies none
of its code. While no live request has an SLO it leaves everything to vLLM.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterable, Sequence
from typing import Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs, FinishReason
from vllm.v1.request import Request, RequestStatus

from neustream.backends.vllm import contract
from neustream.backends.vllm.books import POOL, Books, Flight, Learner, step_of_batch, step_of_tokens
from neustream.backends.vllm.settings import build_policy, load
from neustream.backends.vllm.slo_args import promised, read
from neustream.backends.vllm.stats import Stats
from neustream.core.batch import Batch
from neustream.core.types import SLO
from neustream.engine.clock import stopwatch
from neustream.errors import NeustreamError
from neustream.profiling.steps import load_steps

log = logging.getLogger("vllm.neustream")  # below vLLM's own, so that it is shown where vLLM's is
SAMPLED = 16
"""Of the steps that are left to vLLM, one in so many is timed for the step latency."""
SOON = 0.005
"""A turn that begins within so many seconds of the last one's end belongs to the same busy time."""
SCHEDULABLE = (RequestStatus.WAITING, RequestStatus.RUNNING, RequestStatus.PREEMPTED)


class SLOMixin(Scheduler):
    """In front of vLLM's Scheduler or AsyncScheduler; `stats` counts what it does."""

    max_num_scheduled_tokens: int

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        contract.check_classes()
        super().__init__(*args, **kwargs)
        contract.check_scheduler(self)
        contract.check_setup(self.vllm_config)
        settings = load(self.vllm_config.additional_config)
        self.stats = Stats()
        base = None if settings.profile is None else load_steps(settings.profile)
        if base is None:
            log.warning("neustream: no profile was given; step latencies are learnt from nothing")
        self.books = Books(
            build_policy(settings),
            Learner(base),
            blocks=self.kv_cache_manager.block_pool.num_gpu_blocks - 1,  # one is vLLM's null block
            block=self.block_size,
            max_batch=self.max_num_running_reqs,
            step_tokens=self.max_num_scheduled_tokens,
            longest=self.max_model_len,
        )
        self._default = settings.slo.slo()
        self._log_every_s = settings.log_every_s
        self._logged_at = self._turned_at = stopwatch()
        self._full = self.max_num_scheduled_tokens
        self._depth = int(getattr(self.vllm_config, "max_concurrent_batches", 1))
        self._slos: dict[str, SLO] = {}
        self._promised: set[str] = set()
        self._flights: deque[Flight] = deque()
        self._given_up: list[tuple[str, int, str]] = []
        self._open = False
        log.info("neustream: %s schedules with %r", type(self).__name__, self.books.policy)

    # -- requests ---------------------------------------------------------------------------------

    def add_request(self, request: Request) -> None:
        """Take a request in, with what its `extra_args` say that it was promised."""
        if request.request_id not in self.requests:
            params = request.sampling_params
            slo, faults = read(None if params is None else params.extra_args, self._default)
            for kind, story in faults.items():
                if not self.stats.ignored[kind]:
                    log.warning("neustream: request %s: %s; ignored, from now on silently", request.request_id, story)
                self.stats.ignored[kind] += 1
            if slo != SLO():
                self._slos[request.request_id] = slo
            if promised(slo):
                self._promised.add(request.request_id)
                self.stats.promised += 1
        super().add_request(request)

    def finish_requests(self, request_ids: str | Iterable[str] | None, finished_status: RequestStatus) -> list[Request]:
        """vLLM ends requests from outside: a client is gone, the engine stops, a grammar is broken."""
        ended: list[Request] = super().finish_requests(request_ids, finished_status)
        now = stopwatch()
        for request in ended:
            self.books.core.cancel(request.request_id, now)
            self._forget(request.request_id)
        return ended

    def _forget(self, id: str) -> None:
        self._promised.discard(id)
        self._slos.pop(id, None)

    # -- a step -----------------------------------------------------------------------------------

    def schedule(self, *args: Any, **kwargs: Any) -> Any:
        """One step: vLLM's own while nobody was promised anything, else what the policy decides."""
        began = stopwatch()
        self.stats.steps += 1
        while len(self._flights) >= self._depth:  # vLLM would not ask: that step failed, nobody will report it
            self.books.lost(self._flights.popleft(), began)
        if not self._promised:
            return self._stock(began, args, kwargs)
        self.stats.steered += 1
        now = began
        for flight in self._flights:
            now = self.books.predicted(flight, now)
        batch = self._decide(now)
        before, held, output = list(self.waiting), set[Request](), None
        try:
            self._arrange(batch, held)
            asked = stopwatch()
            output = super().schedule(*args, **kwargs)
            answered = stopwatch()
        finally:
            self.max_num_scheduled_tokens = self._full
            self._put_back(before, held)
            if output is None and batch is not None:
                self.books.core.admit(batch, [], now)
        batch = self._tell(batch, output, now)
        self._flights.append(Flight(output, batch, None if batch is None else step_of_batch(batch), began))
        self.stats.overhead_s += stopwatch() - began - (answered - asked)
        return output

    def _stock(self, began: float, args: Any, kwargs: Any) -> Any:
        """A step that is left to vLLM; some of them are timed."""
        if self.books.core.jobs:
            self.books.leave(began)
        output = super().schedule(*args, **kwargs)
        observed = self.books.learner.observed
        if output.num_scheduled_tokens and (observed < SAMPLED or not self.stats.steps % SAMPLED):
            step = step_of_tokens(self.requests, output.num_scheduled_tokens)
            self._flights.append(Flight(output, None, step, began))
        return output

    def _decide(self, now: float) -> Batch | None:
        """The policy's next step; whom it gives up is ended."""
        books, core = self.books, self.books.core
        asked, began = core.decisions, stopwatch()
        for r in self.waiting:
            if r.status == RequestStatus.PREEMPTED and not r.num_computed_tokens:  # between two steps, if it is news
                dropped = getattr(r, "drop_stale_output", False)
                books.taken(r, 0 if dropped else getattr(r, "num_stale_output_tokens", 0), now)
        new = [r for id, r in self.requests.items() if id not in core.jobs and r.status in SCHEDULABLE]
        reasons = books.enter(new, self._slos, now)
        core.set_free_blocks(POOL, self.kv_cache_manager.block_pool.get_num_free_blocks())
        batch = None
        try:
            batch = core.next_batch(POOL, now)
        except NeustreamError as error:  # a policy's fault must not stop the engine: this step runs as stock
            self._open = True
            if not self.stats.errors:
                log.error("neustream: %s; such steps run as stock", error)
            self.stats.errors += 1
        self.stats.decisions += core.decisions - asked
        self.stats.decision_s += stopwatch() - began
        reasons |= books.given_up()
        if reasons:
            self._give_up(reasons)
        return batch

    def _give_up(self, reasons: dict[str, str]) -> None:
        """End requests for good; their clients hear why with the outputs of this step."""
        some = [(id, self.requests[id].client_index, why) for id, why in reasons.items() if id in self.requests]
        super().finish_requests([id for id, _, _ in some], RequestStatus.FINISHED_ABORTED)
        self._given_up += some
        self.stats.dropped += len(some)
        for id, _, _ in some:
            self._forget(id)

    def _arrange(self, batch: Batch | None, held: set[Request]) -> None:
        """Order `running`, leave only the chosen in `waiting`, set the step's tokens; `held` gets the others."""
        rank: dict[str, int] = {}
        tokens: dict[str, int] = {}
        partial: set[str] = set()
        for at, (job, size) in enumerate(zip(batch.jobs, batch.sizes, strict=True) if batch else ()):
            assert job.stage is not None
            rank[job.id] = at
            tokens[job.id] = 1 if job.stage.phase == "decode" else max(int(size), 1)
            if job.stage.phase != "decode" and size < job.size:
                partial.add(job.id)
        last = len(rank)
        # Whoever gets only a part of its prompt would take all tokens that are left: it comes behind the others.
        self.running.sort(
            key=lambda r: (r.request_id not in rank, r.request_id in partial, rank.get(r.request_id, last))
        )
        ready = [r for r in self.waiting if r.status in (RequestStatus.WAITING, RequestStatus.PREEMPTED)]
        blocked = [r for r in self.waiting if r.status not in (RequestStatus.WAITING, RequestStatus.PREEMPTED)]
        chosen = sorted((r for r in ready if r.request_id in rank), key=lambda r: rank[r.request_id])
        moving = any(r.request_id in rank for r in self.running)
        full = len(self.running) >= self.max_num_running_reqs
        if self._open or (not moving and full and self.running):
            self._open = False  # anyone may run: what the policy chose cannot
            return
        for request in self.running:
            if request.request_id not in rank and request.request_id in self.books.core.jobs:
                # schedule() counts current_step up before it looks at this
                request.next_decode_eligible_step = max(request.next_decode_eligible_step, self.current_step + 2)
        chosen.sort(key=lambda r: r.request_id in partial)
        held.update(r for r in ready if r.request_id not in rank)
        self.waiting.clear()
        self.waiting.extend([*chosen, *blocked])
        # One more for requests that vLLM has to look at before they can run (grammars, sessions).
        self.max_num_scheduled_tokens = min(sum(tokens.values()) + bool(blocked), self._full)

    def _put_back(self, before: Sequence[Request], held: set[Request]) -> None:
        """The waiting queue as it was, but for those who left it; in front whom vLLM preempted just now."""
        known = set(before)
        new = [r for r in self.waiting if r not in known]
        held.update(self.waiting)
        rest = [r for r in before if r in held]
        self.waiting.clear()
        self.waiting.extend([*new, *rest])

    def _tell(self, batch: Batch | None, output: Any, now: float) -> Batch | None:
        """Tell the core what vLLM made of the step."""
        core = self.books.core
        if batch is not None:
            batch = self.books.runs(batch, self.requests, output.num_scheduled_tokens, now)
            self._open = not output.num_scheduled_tokens
        else:  # whoever ran without the core's knowledge comes in anew
            for id in output.num_scheduled_tokens:
                core.cancel(id, now)
        for id in output.preempted_req_ids or ():
            if id not in output.num_scheduled_tokens and core.preempt(id, now):
                self.stats.preempted += 1
        return batch

    def update_from_output(self, scheduler_output: Any, model_runner_output: Any) -> dict[int, EngineCoreOutputs]:
        """What a step brought: vLLM's outputs, and word to those who were given up."""
        outputs: dict[int, EngineCoreOutputs] = super().update_from_output(scheduler_output, model_runner_output)
        now = stopwatch()
        since, self._turned_at = self._turned_at, now
        if self._flights or self._slos:
            self._landed(scheduler_output, since, now)
        if self._given_up:
            self._report(outputs)
        if now - self._logged_at > self._log_every_s:
            self._logged_at = now
            log.info("neustream: %s", self.stats.to_dict())
        self.stats.overhead_s += stopwatch() - now
        return outputs

    def _landed(self, output: Any, since: float, now: float) -> None:
        """A step came back: the core moves its jobs on, the learner hears how long it took."""
        books = self.books
        if any(flight.output is output for flight in self._flights):
            while (flight := self._flights.popleft()).output is not output:
                books.lost(flight, now)
            if flight.step is not None:
                began = since if flight.at - since < SOON else flight.at
                if books.learner.learn(flight.step, now - began):
                    self.stats.step_error = books.learner.error
            books.done(flight, self.requests, now)
        ended = [id for id in output.num_scheduled_tokens if id not in self.requests]
        books.over(ended, now)
        for id in ended:
            self._forget(id)

    def _report(self, outputs: dict[int, EngineCoreOutputs]) -> None:
        for id, client, reason in self._given_up:
            mine = outputs.setdefault(client, EngineCoreOutputs())
            said = EngineCoreOutput(
                request_id=id, new_token_ids=[], finish_reason=FinishReason.ABORT, stop_reason=f"slo: {reason}"
            )
            mine.outputs = [*mine.outputs, said]
        self._given_up = []


class SLOScheduler(SLOMixin):
    """For engines that run one step at a time."""


class AsyncSLOScheduler(SLOMixin, AsyncScheduler):
    """For engines that schedule a step while the one before it runs (vLLM's default on GPUs)."""
