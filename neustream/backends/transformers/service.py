"""A stock language model behind an engine: `serve(model)`, then `submit(prompt, max_tokens=...)`."""

from __future__ import annotations

import contextlib
import logging
import sys
import uuid
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from neustream.backends.options import measuring, slo_of
from neustream.backends.transformers.measured import steps_for
from neustream.backends.transformers.model import LanguageModel
from neustream.backends.transformers.modules import Ask, Texts, modules_of
from neustream.backends.transformers.replicas import Replica, places_of, replicate
from neustream.backends.transformers.request import ask_of
from neustream.backends.transformers.sampling import Sampling
from neustream.backends.transformers.stream import Answer, Completion
from neustream.by_name import make_policy
from neustream.core.batch import StepInput
from neustream.core.events import Emitted
from neustream.core.graph import Graph
from neustream.core.kv_cache import KVCache
from neustream.core.policy import Policy, Pool
from neustream.core.profile import LatencyProfile
from neustream.core.scheduler import Scheduler
from neustream.core.steps import LearntSteps, StepLatency
from neustream.core.types import SLO
from neustream.engine.answers import Result
from neustream.engine.clock import WallClock
from neustream.engine.engine import Engine
from neustream.engine.events import Observer, Record
from neustream.engine.executor import ThreadExecutor
from neustream.engine.member import Member
from neustream.engine.report import Report
from neustream.errors import BackendError, RequestError
from neustream.graphs import llm, llm_profiles
from neustream.profiling.steps import load_steps

log = logging.getLogger("neustream")

POOL = "device"
NODE = "llm"


class TextEngine:
    """A stock causal language model, served token by token, by one replica or several.

    Args:
        model: any `AutoModelForCausalLM` in eval mode, on the device and in the dtype that it is to run
            in; it is not changed. Its sampling defaults (`generation_config`) are not read, but for EOS.
        tokenizer: for prompts and completions of text; None: token ids only.
        slo: what requests are promised that bring no promise of their own (`SLO(first=..., step=...)`
            for time to the first token and per further one); a number is `SLO(total=...)`.
        policy: an object or the name of one.
        profile: how long steps take: a step profile, or its file (`neustream profile` writes one).
            None: the one in the user's cache; what is not there is measured first and kept. It is
            corrected by the steps that run.
        slots: requests that can hold keys and values at once, on each replica.
        max_len: tokens of one request, prompt and outputs; default: the model's positions. Keys and
            values take memory for `slots * max_len` tokens, on each replica.
        kv_cache: what the scheduler shares out; default: the slots. A smaller one in blocks of tokens
            makes it take slots away, and compute their tokens again.
        device: move the model there first.
        devices: in its place, a replica on each of them; ["cpu", "cpu"]: two there, on the same weights.
            Each has a KV cache and a thread of its own. A request goes to the one with the least work
            left (`LeastWork`), and stays there.
        measure_s: seconds that measuring may take, about.
        cache: the folder of the cache; default: the user's.
        observers: told of every Record.
        progress: show what is measured; default: if stderr is a terminal.

    Raises:
        BackendError: the model cannot be served, and why.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: Any = None,
        *,
        slo: SLO | float | None = None,
        policy: Policy | str | None = None,
        profile: StepLatency | Path | str | None = None,
        slots: int = 16,
        max_len: int | None = None,
        kv_cache: KVCache | None = None,
        device: str | None = None,
        devices: Sequence[str] | None = None,
        measure_s: float = 20.0,
        cache: Path | str | None = None,
        observers: Sequence[Observer] = (),
        progress: bool | None = None,
    ) -> None:
        self.slo = slo_of(slo)
        self.tokenizer = tokenizer
        rule = make_policy(policy)
        places = places_of(device, devices)
        models = [model]
        if places is not None and isinstance(model, PreTrainedModel):
            models = replicate(model, places)
        served = [LanguageModel(one, slots=slots, max_len=max_len) for one in models]
        self.model = served[0]
        self.kv_cache = kv_cache or KVCache(slots, self.model.max_len)
        self.graph = Graph("chat", llm(NODE, max_batch=slots))
        self.report = Report()
        self._answers: dict[str, Answer] = {}
        self._replicas = [_replica(one) for one in served]
        try:
            steps = [self._steps(replica, profile, cache, measure_s, progress) for replica in self._replicas]
            members = self._members(rule, steps, slots)
            told: list[Observer] = [self.report, self._watch, *observers]
            self.engine = Engine(members, WallClock(), told).start()
        except BaseException:
            for replica in self._replicas:
                replica.executor.close()
            raise

    # -- requests -------------------------------------------------------------------------------------

    def submit(
        self,
        prompt: str | Sequence[int],
        *,
        max_tokens: int,
        temperature: float = 0.0,
        top_p: float = 1.0,
        top_k: int = 0,
        seed: int | None = None,
        stop_token_ids: Sequence[int] = (),
        ignore_eos: bool = False,
        slo: SLO | float | None = None,
        id: str | None = None,
    ) -> Answer:
        """Ask for a completion; safe from any thread. RequestError, at once, for what cannot be served.

        Args:
            prompt: text (needs the engine's tokenizer) or token ids.
            max_tokens: the most new tokens; together with the prompt they must fit the model.
            temperature, top_p, top_k, seed, stop_token_ids, ignore_eos: see `Sampling`.
            slo: what it is promised; a number is `SLO(total=...)`. Default: the engine's.
            id: its name, default: a random one.
        """
        self.engine.ready()
        sampling = Sampling(temperature, top_p, top_k, seed, stop_token_ids, ignore_eos)  # type: ignore[arg-type]
        ask = ask_of(self.model, self.tokenizer, prompt, max_tokens, sampling, self.kv_cache.capacity)
        promise = self.slo if slo is None else slo_of(slo)
        name = id or uuid.uuid4().hex
        answer = Answer(name, max_tokens, self.tokenizer, self._give_up)
        if self._answers.setdefault(name, answer) is not answer:
            raise RequestError(f"request id {name!r} is already being served")
        params = {"prompt_tokens": len(ask.prompt), "max_tokens": max_tokens, "ask": ask}
        try:
            inner = self.engine.submit(self.graph, params, slo=promise, id=name)
        except BaseException:
            del self._answers[name]
            raise
        inner.add_done_callback(lambda done: self._answered(answer, done, len(ask.prompt)))
        return answer

    def __call__(self, prompt: str | Sequence[int], **options: Any) -> Any:
        """Ask and wait: the Completion."""
        return self.submit(prompt, **options).result()

    def close(self, *, cancel: bool = False) -> None:
        """Serve what is open (or cancel it), then stop."""
        self.engine.close(cancel=cancel)

    def __enter__(self) -> TextEngine:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close(cancel=exc[0] is not None)

    @property
    def profiles(self) -> Mapping[str, LatencyProfile]:
        """The profiles that decisions are made by now, of the first replica; what was learnt included."""
        return self.engine.members[0].scheduler.times.profiles

    @property
    def used(self) -> int:
        """Slots in use, of all replicas."""
        return sum([_used(replica) for replica in self._replicas])

    # -- inside ---------------------------------------------------------------------------------------

    def _members(self, policy: Policy, steps: Sequence[StepLatency], slots: int) -> list[Member]:
        """A member for each replica, with the latencies of its steps."""
        names = [str(number) for number in range(len(steps))] if len(steps) > 1 else [""]
        pool = Pool(POOL, tuple(self.graph.stages), kv_caches={NODE: self.kv_cache})
        members = []
        for name, replica, taken in zip(names, self._replicas, steps, strict=True):
            profiles = llm_profiles(NODE, LearntSteps(taken), max_batch=slots)
            members.append(Member(Scheduler([pool], policy, profiles), {POOL: replica.executor}, name))
        return members

    def _steps(
        self,
        replica: Replica,
        profile: StepLatency | Path | str | None,
        cache: Path | str | None,
        seconds: float,
        progress: bool | None,
    ) -> StepLatency:
        """How long the steps of a replica take: as given, or as measured on its own thread."""
        if isinstance(profile, str | Path):
            return load_steps(profile)
        if profile is not None:
            return profile
        show = sys.stderr.isatty() if progress is None else progress
        model = replica.model
        with measuring(f"measuring {model.name}", show) as tick:
            steps: StepLatency = replica.executor.call(lambda: steps_for(model, cache, seconds, tick)).result()
            return steps

    def _watch(self, record: Record) -> None:
        """Hand tokens out, on the engine's thread."""
        if isinstance(record, Emitted) and (answer := self._answers.get(record.id)) is not None:
            update = record.update
            last = update["ended"] or record.index + 1 == answer.max_tokens
            answer.push(update["token"], record.age, last)

    def _answered(self, answer: Answer, done: Future[Result], prompt: int) -> None:
        del self._answers[answer.id]
        answer.settle(done, partial(_completion, answer, prompt))

    def _give_up(self, name: str) -> None:
        with contextlib.suppress(RequestError):  # the engine is closed: it is over anyway
            self.engine.cancel(name)


def serve(model: PreTrainedModel, tokenizer: Any = None, **options: Any) -> TextEngine:
    """A running `TextEngine` for `model`; `options` are its own."""
    return TextEngine(model, tokenizer, **options)


def _completion(answer: Answer, prompt: int, result: Result) -> Completion:
    """What came of a prompt of so many tokens; RequestError if nothing did."""
    ended = result.unwrap()["ended"]
    return answer.complete(prompt, result, "stop" if ended else "length")


def _replica(model: LanguageModel) -> Replica:
    texts = Texts(model, _ask, name=NODE)
    return Replica(model, texts, ThreadExecutor(modules_of(texts)))


def _used(replica: Replica) -> int:
    """Slots of a replica that are in use."""
    with contextlib.suppress(BackendError):  # closed: nobody else counts
        used: int = replica.executor.call(lambda: len(replica.texts)).result()
        return used
    return len(replica.texts)


def _ask(given: StepInput) -> Ask:
    ask: Ask = given.params["ask"]
    return ask
