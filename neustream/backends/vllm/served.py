"""vLLM behind the HTTP front: its own asynchronous engine, with our scheduler class in it.

Its requests are answers like all others: tokens as they come, and what became of the promise.
"""

from __future__ import annotations

import asyncio
import logging
import math
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import Any

from neustream.backends.vllm.slo_args import ALONE, OURS
from neustream.backends.vllm.slo_args import slo as args_of
from neustream.core.events import Emitted, Ended, Submitted
from neustream.core.job import Status
from neustream.core.types import SLO, TICK
from neustream.engine.answers import Result
from neustream.engine.clock import Clock
from neustream.engine.events import Observer
from neustream.errors import RequestError, told
from neustream.service.answer import Answer

log = logging.getLogger("neustream")


@dataclass(frozen=True, slots=True)
class Likelihood:
    """How likely the model found a token; `top`: ids and logprobs of the likeliest ones there."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Token:
    """One output. `finish_reason` is of the last one, `scores` are of the first."""

    index: int
    id: int
    text: str
    at_s: float
    finish_reason: str | None = None
    likelihood: Likelihood | None = None
    scores: tuple[Likelihood, ...] = ()


@dataclass(frozen=True, slots=True)
class Generated:
    """All that came of a request."""

    text: str
    token_ids: tuple[int, ...]


@dataclass(eq=False)
class Request:
    """One under way: what came of it so far. `started_at`: when its first token came."""

    id: str
    answer: Answer[Generated]
    slo: SLO
    arrival: float
    logprobs: int | None
    prompt: Sequence[int]
    count: int = 0
    late: bool = False
    started_at: float | None = None

    def due(self) -> float:
        """When its next token is due, in seconds since it came."""
        slo = self.slo
        if slo.first == math.inf:
            return slo.total
        if slo.step == math.inf:
            return slo.total if self.count else min(slo.first, slo.total)
        return min(slo.total, slo.first + self.count * slo.step)


class VLLMEngine:
    """An `AsyncLLM`, as the front asks it. All of it happens on one event loop.

    Args:
        engine: the AsyncLLM; name: of its model.
        params: makes SamplingParams of their arguments.
        vocabulary, max_len: of the model.
        observer: told of requests as an engine's observers are.
    """

    def __init__(
        self,
        engine: Any,
        name: str,
        params: Callable[..., Any],
        *,
        vocabulary: int,
        max_len: int,
        clock: Clock,
        observer: Observer,
    ) -> None:
        self._engine = engine
        self._name = name
        self._params = params
        self._vocabulary = vocabulary
        self._max_len = max_len
        self._clock = clock
        self._observer = observer
        self._open: dict[str, Request] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def fault(self) -> str:
        """Why it serves nothing any more; empty: it does."""
        return "vLLM's engine has died" if self._engine.errored else ""

    @property
    def jobs(self) -> Mapping[str, Request]:
        """What it has, by id."""
        return dict(self._open)

    def submit(
        self,
        prompt: Sequence[int],
        *,
        max_tokens: int,
        slo: SLO | None = None,
        id: str,
        logprobs: int | None = None,
        prompt_logprobs: int | None = None,
        stop_token_ids: Sequence[int] = (),
        like: str | None = None,
        **sampling: Any,
    ) -> Answer[Generated]:
        """Ask for a text; on the event loop. RequestError for what cannot be served.

        `like`: another request of the same prompt, which vLLM's prefix cache finds by itself.
        """
        self._check(prompt, max_tokens, id)
        promise = SLO() if slo is None else slo
        params = self._params(
            max_tokens=max_tokens,
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
            stop_token_ids=list(stop_token_ids),
            extra_args=_promised(promise),
            **{"temperature": 0.0, **sampling},
        )
        answer: Answer[Generated] = Answer(id, self._name, self._give_up, lambda: _token)
        request = Request(id, answer, promise, self._clock.now(), logprobs, prompt)
        self._open[id] = request
        now, due = request.arrival, request.arrival + promise.total
        self._observer(Submitted(id, self._name, now, due, promise, max_tokens, now))
        task = asyncio.get_running_loop().create_task(self._serve(request, params))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        answer.add_done_callback(lambda _: task.cancel())
        return answer

    async def close(self) -> None:
        """End what is open, and the engine."""
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.get_running_loop().run_in_executor(None, self._engine.shutdown)

    # -- one request ------------------------------------------------------------------------------

    async def _serve(self, request: Request, params: Any) -> None:
        status: Status = "cancelled"
        reason, code = "cancelled", "cancelled"
        try:
            prompt = {"prompt_token_ids": list(request.prompt)}
            async for output in self._engine.generate(prompt, params, request.id):
                best = output.outputs[0]
                if best.finish_reason == "abort":
                    status, reason, code = _given_up(best.stop_reason, request.count)
                    break
                self._push(request, output, best)
            else:
                status, reason, code = "done", "", "done"
        except Exception as error:  # noqa: BLE001 vLLM refuses in many ways, and may have died
            status, reason, code = "failed", told(error), "failed"
        finally:
            self._end(request, status, reason, code)

    def _push(self, request: Request, output: Any, best: Any) -> None:
        """The tokens of one output of vLLM's; its text is that of the last of them."""
        now = self._clock.now()
        if request.started_at is None and best.token_ids:
            request.started_at = now
        for at, id in enumerate(best.token_ids):
            last = at + 1 == len(best.token_ids)
            update: dict[str, Any] = {"token": id, "text": best.text if last else ""}
            update["finish_reason"] = best.finish_reason if last else None
            if request.logprobs is not None and best.logprobs:
                update["likelihood"] = _likelihood(id, best.logprobs[at], request.logprobs)
            if not request.count and output.prompt_logprobs:
                update["scores"] = _scores(request.prompt, output.prompt_logprobs)
            age = now - request.arrival
            late = age > request.due() + TICK
            request.late = request.late or late
            emitted = Emitted(request.id, request.count, update, now, age, late)
            request.count += 1
            self._observer(emitted)
            request.answer.push(emitted)

    def _end(self, request: Request, status: Status, reason: str, code: str) -> None:
        self._open.pop(request.id, None)
        now = self._clock.now()
        age = now - request.arrival
        done = status == "done"
        on_time = done and not request.late and age <= request.slo.total + TICK
        output: Mapping[str, Any] | None = {} if done else None
        began, attainable = request.started_at, code != "unattainable"
        waited_s = None if began is None else began - request.arrival
        given = request.slo, request.count
        self._observer(
            Ended(
                request.id, status, reason, output, on_time, request.arrival, now, *given,
                waited_s=waited_s, attainable=attainable,
            )
        )  # fmt: skip
        result: Future[Result] = Future()
        result.set_result(
            Result(request.id, status, reason, output, age, on_time, None, code, waited_s)
        )
        request.answer.settle(result, _generated)

    def _give_up(self, answer: Answer[Any]) -> None:
        """Its caller cancelled it: the callback on its answer ends the task."""

    def _check(self, prompt: Sequence[int], max_tokens: int, id: str) -> None:
        if id in self._open:
            raise RequestError(f"request id {id!r} is already being served")
        if not prompt:
            raise RequestError(
                "the prompt is empty: there is nothing to go on from", argument="prompt"
            )
        if beyond := [token for token in prompt if not 0 <= token < self._vocabulary]:
            raise RequestError(
                f"{beyond[0]} is no token: the vocabulary of {self._name!r} has {self._vocabulary}",
                argument="prompt",
            )
        room = self._max_len - len(prompt)
        if max_tokens > room:
            raise RequestError(
                f"{len(prompt)} tokens of prompt and max_tokens={max_tokens} make "
                f"{len(prompt) + max_tokens}, but max_len is {self._max_len}: "
                f"at most max_tokens={max(room, 0)}",
                argument="max_tokens" if room > 0 else "prompt",
            )


def _promised(slo: SLO) -> dict[str, float] | None:
    """The promise as our scheduler class reads it; None: nothing is promised."""
    if not slo.promises:
        return None
    named = {"ttft_ms": slo.first, "tpot_ms": slo.step, "total_ms": slo.total}
    budgets = {name: seconds * 1e3 for name, seconds in named.items() if seconds < math.inf}
    return args_of(**budgets, weight=slo.weight, finish=slo.finish)


def _given_up(reason: Any, outputs: int) -> tuple[Status, str, str]:
    """What became of a request that vLLM ended: by our scheduler, with its reason, or otherwise."""
    text = str(reason or "vLLM ended it and did not say why")
    if not text.startswith(OURS):
        return "failed", text, "failed"
    text = text.removeprefix(OURS)
    if text.endswith(ALONE):
        return "dropped", text.removesuffix(ALONE), "unattainable"
    return "dropped", text, "late" if outputs else "crowded"


def _likelihood(id: int, told_of: Mapping[int, Any], count: int) -> Likelihood:
    ranked = sorted(told_of.items(), key=lambda item: item[1].rank or math.inf)
    top = [(token, one.logprob) for token, one in ranked[:count]]
    return Likelihood(id, told_of[id].logprob, tuple(top))


def _scores(
    prompt: Sequence[int], told_of: Sequence[Mapping[int, Any] | None]
) -> tuple[Likelihood, ...]:
    """Of the prompt's tokens behind its first."""
    pairs = zip(prompt[1:], told_of[1:], strict=False)
    return tuple([_likelihood(id, one, len(one) - 1 or 1) for id, one in pairs if one])


def _token(output: Emitted) -> Token:
    update = output.update
    return Token(
        output.index,
        update["token"],
        update["text"],
        output.age,
        update["finish_reason"],
        update.get("likelihood"),
        update.get("scores", ()),
    )


def _generated(result: Result, outputs: Sequence[Emitted]) -> Generated:
    result.unwrap()
    text = "".join([output.update["text"] for output in outputs])
    return Generated(text, tuple([output.update["token"] for output in outputs]))


# -- made of a config -----------------------------------------------------------------------------


def engine_of(
    path: str,
    name: str,
    *,
    policy: Mapping[str, Any],
    clock: Clock,
    observer: Observer,
    options: Mapping[str, Any],
) -> tuple[VLLMEngine, dict[str, int]]:
    """An engine of the model in a folder, and its `max_len`, `vocabulary` and `batch`.

    `options` are vLLM's own engine arguments; `policy` is a name and its parameters.
    """
    os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")  # stdout is the server's own
    from vllm import SamplingParams
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.sampling_params import RequestOutputKind
    from vllm.v1.engine.async_llm import AsyncLLM

    named = dict(policy)
    ours = {"policy": named.pop("name", "default"), "options": named}
    given = {
        "scheduler_cls": "neustream.backends.vllm.SLOScheduler",
        "additional_config": {"neustream": ours},
        "disable_log_stats": True,
        **options,
    }
    engine = AsyncLLM.from_engine_args(AsyncEngineArgs(model=path, **given))
    sizes = {
        "max_len": engine.model_config.max_model_len,
        "vocabulary": engine.model_config.get_vocab_size(),
        "batch": engine.vllm_config.scheduler_config.max_num_seqs,
    }
    served = VLLMEngine(
        engine,
        name,
        partial(SamplingParams, output_kind=RequestOutputKind.DELTA),
        vocabulary=sizes["vocabulary"],
        max_len=sizes["max_len"],
        clock=clock,
        observer=observer,
    )
    return served, sizes
