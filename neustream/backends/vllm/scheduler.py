"""vLLM's own scheduler with our policy in front of it: who runs, in what order, who is given up.

`SLOScheduler` decides before vLLM's `schedule` what that may see. It changes `running`, `waiting`,
`max_num_scheduled_tokens` and the limit of running requests for one call of the original, and
copies none of its code. While no live request has an SLO it leaves everything to vLLM.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterable, Mapping
from typing import Any

from vllm.sampling_params import RequestOutputKind
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs, FinishReason
from vllm.v1.request import Request, RequestStatus

from neustream.backends.vllm import contract
from neustream.backends.vllm.choice import Arrangement, Choice, Room, arrange, ask, put_back
from neustream.backends.vllm.settings import build_policy, load
from neustream.backends.vllm.slo_args import ALONE, OURS, promised, read
from neustream.backends.vllm.stats import Stats
from neustream.backends.vllm.steps import StepInFlight, TurnSteps, step_of_tokens
from neustream.backends.vllm.trial import check_meaning
from neustream.backends.vllm.view import ViewBuilder
from neustream.core.events import attainable
from neustream.core.policy import background_of
from neustream.core.types import SLO
from neustream.engine.clock import stopwatch
from neustream.errors import NeustreamError
from neustream.profiling.steps import load_steps

log = logging.getLogger("vllm.neustream")  # below vLLM's own, so that it is shown where vLLM's is
SAMPLED = 16
"""Of the steps that are left to vLLM, one in so many is timed for the step latency."""
SOON = 0.005
"""A turn that begins within so many seconds of the last one's end belongs to the same busy time."""
READY = (RequestStatus.WAITING, RequestStatus.PREEMPTED)
"""Statuses of waiting requests that may begin at once."""


class SLOScheduler(Scheduler):
    """In front of vLLM's Scheduler, or of its AsyncScheduler where that is what the engine needs.

    Engines that schedule a step while the one before it runs (vLLM's default on GPUs) make an
    `AsyncSLOScheduler` of it. `stats` counts what it does.
    """

    max_num_scheduled_tokens: int

    def __new__(cls, vllm_config: Any, *_: Any, **__: Any) -> SLOScheduler:
        fits: type[SLOScheduler] = cls
        if cls is SLOScheduler and vllm_config.scheduler_config.async_scheduling:
            fits = AsyncSLOScheduler
        return object.__new__(fits)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        contract.check_classes()
        super().__init__(*args, **kwargs)
        contract.check_scheduler(self)
        contract.check_setup(self.vllm_config)
        contract.check_pipeline(self)
        check_meaning(
            AsyncScheduler if isinstance(self, AsyncScheduler) else Scheduler, args, kwargs
        )
        settings = load(self.vllm_config.additional_config)
        self.stats = Stats()
        base = None if settings.profile is None else load_steps(settings.profile)
        if base is None:
            log.warning("neustream: no profile was given; step latencies are learnt from nothing")
        self.slo_policy = build_policy(settings)
        self._background = background_of(self.slo_policy)
        self.step_times = TurnSteps(base)
        self.views = ViewBuilder(
            self.step_times,
            (*READY, RequestStatus.RUNNING),
            num_blocks=self.kv_cache_manager.block_pool.num_gpu_blocks - 1,  # one is a null block
            block_size=self.block_size,
            max_batch=self.max_num_running_reqs,
            step_tokens=self.max_num_scheduled_tokens,
            max_len=self.max_model_len,
        )
        self._default = settings.slo.slo()
        self._eos = contract.eos_of(self.vllm_config)
        self._log_every_s = settings.log_every_s
        self._logged_at = self._turned_at = stopwatch()
        self._step_tokens = self.max_num_scheduled_tokens
        self._depth = int(getattr(self.vllm_config, "max_concurrent_batches", 1))
        self._limit = contract.limit_name(self)
        self._slos: dict[str, SLO] = {}
        self._promised: set[str] = set()
        self._in_flight: deque[StepInFlight] = deque()
        self._given_up: list[tuple[str, int, str, list[int]]] = []
        self._stuck = False
        log.info("neustream: %s schedules with %r", type(self).__name__, self.slo_policy)

    # -- requests ---------------------------------------------------------------------------------

    def add_request(self, request: Request) -> None:
        """Take a request in, with what its `extra_args` say that it was promised."""
        if request.request_id not in self.requests:
            params = request.sampling_params
            slo, faults = read(None if params is None else params.extra_args, self._default)
            self._note_faults(request.request_id, faults)
            if slo != SLO():
                self._slos[request.request_id] = slo
            if promised(slo):
                self._promised.add(request.request_id)
                self.stats.promised += 1
        super().add_request(request)

    def _note_faults(self, id: str, faults: dict[str, str]) -> None:
        """Count SLO values that make no sense; the first of a kind is logged."""
        for kind, story in faults.items():
            if not self.stats.ignored[kind]:
                log.warning("neustream: request %s: %s; ignored, from now on silently", id, story)
            self.stats.ignored[kind] += 1

    def finish_requests(
        self, request_ids: str | Iterable[str] | None, finished_status: RequestStatus
    ) -> list[Request]:
        """vLLM ends requests from outside: a client is gone, the engine stops, a grammar broke."""
        ended: list[Request] = super().finish_requests(request_ids, finished_status)
        for request in ended:
            self._forget(request.request_id)
        return ended

    def _forget(self, id: str) -> None:
        self._promised.discard(id)
        self._slos.pop(id, None)
        self.views.forget(id)

    # -- a step -----------------------------------------------------------------------------------

    def schedule(self, *args: Any, **kwargs: Any) -> Any:
        """One step: vLLM's own while nobody was promised anything, else what the policy decides."""
        began = stopwatch()
        self.stats.steps += 1
        while len(self._in_flight) >= self._depth:  # that step failed: it is never reported
            self._in_flight.popleft()
        if not self._promised:
            return self._stock(began, args, kwargs)
        self.stats.steered += 1
        starts_at = max([began, *[step.ends_at for step in self._in_flight]])
        plan = self._plan(self._choose(starts_at))
        output, vllm_s = self._run(plan, args, kwargs)
        self._note(plan, output, began, starts_at)
        self.stats.overhead_s += stopwatch() - began - vllm_s
        return output

    def _stock(self, began: float, args: Any, kwargs: Any) -> Any:
        """A step that is left to vLLM; some of them are timed."""
        self.views.forget_all()
        output = super().schedule(*args, **kwargs)
        observed = self.step_times.observed
        if output.num_scheduled_tokens and (observed < SAMPLED or not self.stats.steps % SAMPLED):
            step = step_of_tokens(self.requests, output.num_scheduled_tokens)
            self._in_flight.append(StepInFlight(output, step, began))
        return output

    def _choose(self, now: float) -> Choice | None:
        """What the policy decides; None if it fails, which must not stop the engine."""
        began = stopwatch()
        free = self.kv_cache_manager.block_pool.get_num_free_blocks()
        choice = None
        try:
            view = self.views.build(self.requests, self._slos, free, now)
            self.stats.decisions += bool(view.queues)
            choice = ask(self.slo_policy, view, in_flight=bool(self._in_flight))
        except NeustreamError as error:
            if not self.stats.errors:
                log.error("neustream: %s; such steps run as stock", error)
            self.stats.errors += 1
        self.stats.decision_s += stopwatch() - began
        if choice is not None and choice.drop:
            self._give_up(choice.drop)
        return choice

    def _give_up(self, reasons: Mapping[str, str]) -> None:
        """End requests for good; their clients hear why with the outputs of this step.

        Those that are to be served late go on without their promise.
        """
        ended = {id: why for id, why in reasons.items() if not self._slos[id].finish}
        for id in reasons.keys() - ended.keys():
            self._release(id)
        for id, reason in ended.items():
            request = self.requests[id]
            if not attainable(self.views.jobs[id]):
                reason += ALONE
            self._given_up.append((id, request.client_index, reason, self._last_words(request)))
        self.stats.dropped += len(ended)
        self.finish_requests(list(ended), RequestStatus.FINISHED_ABORTED)

    def _release(self, id: str) -> None:
        job = self.views.jobs[id]
        job.release()
        self._slos[id] = job.slo
        self._promised.discard(id)

    def _last_words(self, request: Request) -> list[int]:
        """The tokens that a request is ended with, so that its client hears why.

        vLLM's HTTP server leaves out the last chunk of a stream that has no token, and with it the
        reason. A stream that has none is ended with the model's EOS, which has no text; where
        likelihoods are asked, which there are none of, with nothing.
        """
        params = request.sampling_params
        if params is None or request.num_output_tokens:
            return []
        if params.output_kind != RequestOutputKind.DELTA or params.logprobs is not None:
            return []
        return self._eos

    def _plan(self, choice: Choice | None) -> Arrangement[Request] | None:
        """What vLLM's queues hold during this step; None: all that they hold, anyone may run."""
        if choice is None or self._stuck:
            self._stuck = False
            return None
        ready: list[Request] = []
        blocked: list[Request] = []
        for request in self.waiting:
            (ready if request.status in READY else blocked).append(request)
        room = Room(
            getattr(self, self._limit) - len(self.running),
            self.kv_cache_manager.block_pool.get_num_free_blocks(),
            self.block_size,
            self._step_tokens,
        )
        return arrange(choice, self.running, ready, blocked, room)

    def _run(self, plan: Arrangement[Request] | None, args: Any, kwargs: Any) -> tuple[Any, float]:
        """vLLM's `schedule` on the arranged queues, and the seconds that it took.

        Who is kept out of the step is in no queue during the call, and back in its place after it.
        """
        if plan is None:
            began = stopwatch()
            output = super().schedule(*args, **kwargs)
            return output, stopwatch() - began
        before, limit = list(self.waiting), getattr(self, self._limit)
        self.running[:] = plan.running
        self.waiting.clear()
        self.waiting.extend(plan.waiting)
        self.max_num_scheduled_tokens = plan.tokens
        setattr(self, self._limit, limit - len(plan.apart))  # they keep their seats
        began = stopwatch()
        try:
            output = super().schedule(*args, **kwargs)
            seconds = stopwatch() - began
        finally:
            setattr(self, self._limit, limit)
            self.max_num_scheduled_tokens = self._step_tokens
            self.running.extend(plan.apart)
            waiting = put_back(before, plan.waiting, list(self.waiting))
            self.waiting.clear()
            self.waiting.extend(waiting)
        return output, seconds

    def _note(
        self, plan: Arrangement[Request] | None, output: Any, began: float, starts_at: float
    ) -> None:
        """Keep what is to be known of a step when it comes back."""
        tokens = output.num_scheduled_tokens
        unpromised = self.views.scheduled(tokens, starts_at)
        step, expected = None, 0.0
        if tokens:
            step = step_of_tokens(self.requests, tokens)
            expected = self.step_times.seconds(step)
        ends_at = starts_at + expected
        self._in_flight.append(StepInFlight(output, step, began, expected, ends_at, unpromised))
        self._stuck = not tokens and plan is not None and plan.chosen
        for id in output.preempted_req_ids or ():
            self.stats.preempted += id not in tokens

    def update_from_output(
        self, scheduler_output: Any, model_runner_output: Any
    ) -> dict[int, EngineCoreOutputs]:
        """What a step brought: vLLM's outputs, and word to those who were given up."""
        outputs: dict[int, EngineCoreOutputs] = super().update_from_output(
            scheduler_output, model_runner_output
        )
        now = stopwatch()
        since, self._turned_at = self._turned_at, now
        if self._in_flight or self._slos:
            self._landed(scheduler_output, since, now)
        if self._given_up:
            self._report(outputs)
        if now - self._logged_at > self._log_every_s:
            self._logged_at = now
            log.info("neustream: %s", self.stats.to_dict())
        self.stats.overhead_s += stopwatch() - now
        return outputs

    def _landed(self, output: Any, since: float, now: float) -> None:
        """A step came back: learn how long it took, and what became of its requests."""
        if any(step.output is output for step in self._in_flight):
            while (flight := self._in_flight.popleft()).output is not output:
                pass  # a step that failed: it is never reported
            self._learn(flight, now - (since if flight.began - since < SOON else flight.began))
        tokens = output.num_scheduled_tokens
        self.views.landed(tokens, self.requests, now)
        for id in tokens:
            if id not in self.requests:
                self._forget(id)

    def _learn(self, flight: StepInFlight, seconds: float) -> None:
        if flight.step is None:
            return
        self.views.ran(flight.expected, seconds, flight.unpromised, self._background)
        if self.step_times.learn(flight.step, seconds):
            self.stats.step_error = self.step_times.error

    def _report(self, outputs: dict[int, EngineCoreOutputs]) -> None:
        for id, client, reason, tokens in self._given_up:
            mine = outputs.setdefault(client, EngineCoreOutputs())
            said = EngineCoreOutput(
                request_id=id,
                new_token_ids=tokens,
                finish_reason=FinishReason.ABORT,
                stop_reason=f"{OURS}{reason}",
            )
            mine.outputs = [*mine.outputs, said]
        self._given_up = []


class AsyncSLOScheduler(SLOScheduler, AsyncScheduler):
    """With a step always in flight; on engines that run one at a time it does as those do."""
