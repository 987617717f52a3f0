"""An LLM engine of vLLM as one stage of a larger graph: a step is a whole generation.

    writer = Stage("write")
    graph = Graph("rag", seq(search, writer, image))
    pool = Pool("llm", ("write",), workers=16)   # 16 generations at once, batched inside of vLLM
    Engine(Member(scheduler, {"llm": VLLMExecutor(llm), ...}), WallClock())

The pool's workers are seats in the one engine: its own scheduler (ours, `SLOScheduler`) batches
them token by token. Each request is given the time that its job has left, less what comes after
this stage.
"""

from __future__ import annotations

import math
import queue
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from neustream.backends.vllm.slo_args import LARGEST_MS, LARGEST_WEIGHT, slo
from neustream.core.batch import Batch
from neustream.core.events import Update
from neustream.core.job import Job
from neustream.core.reasons import due
from neustream.engine.clock import Clock
from neustream.engine.events import Done
from neustream.errors import BackendError, NeustreamError, StageFailed

if TYPE_CHECKING:
    from vllm import LLM, SamplingParams
    from vllm.outputs import RequestOutput

Asks = Callable[[Job], tuple[Any, Any]]
"""What a job asks of the model: a prompt, as vLLM takes it, and SamplingParams."""


@dataclass(slots=True)
class _Open:
    """A batch under way: results so far, by the job's place in it."""

    batch: Batch
    clock: Clock
    results: list[Update | NeustreamError | None] = field(default_factory=list)


class VLLMExecutor:
    """Runs the generations of one stage on one vLLM engine.

    Args:
        llm: the engine; made with `scheduler_cls="neustream.backends.vllm.SLOScheduler"`, or it
            would ignore what its requests have left.
        asks: prompt and SamplingParams of a job; by default `params["prompt"]` (text, or a mapping
            as vLLM takes it) and `params["sampling"]` (SamplingParams or its arguments).

    The update of a job is `{"text": str, "tokens": tuple of ids, "finish_reason": str}`. A
    generation that the inner scheduler gives up fails its job with that reason.

    Attributes:
        alone_s: 0: what follows whole generations is decided beside them.
    """

    alone_s = 0.0

    def __init__(self, llm: LLM, asks: Asks | None = None) -> None:
        self._engine = llm.llm_engine
        self._asks = _from_params if asks is None else asks
        self._inbox: queue.SimpleQueue[tuple[Batch, Clock, list[float]] | str | None] = (
            queue.SimpleQueue()
        )
        self._places: dict[str, tuple[_Open, int]] = {}
        self._count = 0
        self._thread = threading.Thread(target=self._work, name="neustream-vllm", daemon=True)
        self._thread.start()

    def start(self, batch: Batch, clock: Clock) -> None:
        now = clock.now()
        # What is left at this moment, read on the engine's own thread.
        self._inbox.put((batch, clock, [_budget(job, now) for job in batch.jobs]))

    def stop(self, id: str) -> None:
        """Abort the generations of a request that is over."""
        self._inbox.put(id)

    def release(self, id: str) -> None:
        """Generations keep nothing once they are over."""

    def close(self, *, wait: bool = True) -> None:
        """Let the generations under way end; the LLM itself stays the caller's."""
        self._inbox.put(None)
        if wait:
            self._thread.join()

    def here(self) -> bool:
        return threading.current_thread() is self._thread

    def _work(self) -> None:
        closing = False
        while not closing or self._places:
            while not closing and (not self._places or not self._inbox.empty()):
                item = self._inbox.get()
                if item is None:
                    closing = True
                elif isinstance(item, str):
                    self._abort(item)
                else:
                    self._begin(*item)
            if self._places:
                self._turn()

    def _begin(self, batch: Batch, clock: Clock, budgets: list[float]) -> None:
        opened = _Open(batch, clock, [None] * len(batch))
        for at, (job, budget) in enumerate(zip(batch.jobs, budgets, strict=True)):
            self._count += 1
            id = f"{job.id}-{self._count}"
            try:
                prompt, sampling = self._asks(job)
                self._engine.add_request(id, prompt, _promised(sampling, budget, job.weight))
                self._places[id] = opened, at
            except Exception as error:  # noqa: BLE001 vLLM refuses a prompt in many ways
                opened.results[at] = StageFailed(
                    f"stage {batch.stage!r}: {type(error).__name__}: {error}"
                )
        self._post_if_whole(opened)

    def _turn(self) -> None:
        """One step of vLLM's loop."""
        try:
            outputs = self._engine.step()
        except Exception as error:  # noqa: BLE001 all that were in the step fail, others may come
            self._fail_all(error)
            return
        for output in outputs:
            if output.finished and output.request_id in self._places:
                opened, at = self._places.pop(output.request_id)
                opened.results[at] = _update(opened.batch.stage, output)
                self._post_if_whole(opened)

    def _abort(self, id: str) -> None:
        """End what runs for a request: nobody reads what would come of it."""
        places = {
            own: place
            for own, place in self._places.items()
            if place[0].batch.jobs[place[1]].id == id
        }
        if not places:
            return  # it has just ended by itself
        try:
            self._engine.abort_request(list(places))
        except Exception as error:  # noqa: BLE001  the engine is not as it should be: all of it fails
            self._fail_all(error)
            return
        for own, (opened, at) in places.items():
            del self._places[own]
            opened.results[at] = {}
            self._post_if_whole(opened)

    def _fail_all(self, error: Exception) -> None:
        places, self._places = self._places, {}
        try:
            self._engine.abort_request(list(places))
        except Exception as dead:  # noqa: BLE001 its process may be gone
            error.add_note(f"and its requests could not be aborted: {dead}")
        for opened, at in places.values():
            failed = StageFailed(
                f"stage {opened.batch.stage!r}: vLLM: {type(error).__name__}: {error}"
            )
            failed.__cause__ = error
            opened.results[at] = failed
            self._post_if_whole(opened)

    def _post_if_whole(self, opened: _Open) -> None:
        results = [result for result in opened.results if result is not None]
        if len(results) == len(opened.results):
            opened.clock.post(Done(opened.batch, results), opened.clock.now())


def _budget(job: Job, now: float) -> float:
    """Seconds that a job has for this stage: until it is due, less its other work ahead."""
    return job.due - now - max(job.remaining_s - job.unit_s, 0.0)


def _promised(sampling: SamplingParams, budget: float, weight: float) -> SamplingParams:
    """Sampling parameters with the budget as their SLO."""
    if math.isinf(budget):
        return sampling
    if budget <= 0:
        raise StageFailed(f"its time was over before it began: {due(budget)}")
    args = slo(total_ms=min(budget * 1e3, LARGEST_MS), weight=min(weight, LARGEST_WEIGHT))
    given = sampling.clone()
    given.extra_args = {**(given.extra_args or {}), **args}
    return given


def _from_params(job: Job) -> tuple[Any, SamplingParams]:
    from vllm import SamplingParams

    if "prompt" not in job.params:
        raise BackendError(
            f"request {job.id!r} has no parameter 'prompt'; it has {sorted(job.params)}"
        )
    sampling = job.params.get("sampling", {})
    return job.params["prompt"], SamplingParams(**sampling) if isinstance(
        sampling, Mapping
    ) else sampling


def _update(stage: str, output: RequestOutput) -> Update | NeustreamError:
    best = output.outputs[0]
    if best.finish_reason not in ("stop", "length"):
        reason = best.stop_reason or "no reason given"
        return StageFailed(f"stage {stage!r}: ended with {best.finish_reason!r}: {reason}")
    return {"text": best.text, "tokens": tuple(best.token_ids), "finish_reason": best.finish_reason}
