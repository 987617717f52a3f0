"""A stock causal language model, ready to be scheduled."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from neustream.backends.claims import claim, free
from neustream.backends.copies import copies
from neustream.backends.memory import free_bytes
from neustream.backends.transformers.adapted import stock_of
from neustream.backends.transformers.apart import owners
from neustream.backends.transformers.completion import Tokens, completion, read
from neustream.backends.transformers.defaults import defaults_of
from neustream.backends.transformers.images import Reader, tokenizer_of
from neustream.backends.transformers.measured import file_of, measure_steps
from neustream.backends.transformers.model import MOST_SLOTS, LanguageModel
from neustream.backends.transformers.modules import Texts, modules_of
from neustream.backends.transformers.own import Own
from neustream.backends.transformers.prefixes import Prefixes, kept_tokens
from neustream.backends.transformers.replayed import as_at_first
from neustream.backends.transformers.request import Room, ask_of
from neustream.backends.transformers.sampling import Processor, Sampling
from neustream.backends.transformers.see import looks
from neustream.backends.transformers.settings import OfTexts
from neustream.backends.transformers.sighted import sighted_of
from neustream.backends.transformers.slots import Slots
from neustream.backends.transformers.stops import lead_of
from neustream.backends.transformers.text import Ask
from neustream.backends.transformers.timings import Timings
from neustream.backends.transformers.unchanged import Unchanged
from neustream.backends.values import check_option, whole
from neustream.core.batch import StepInput
from neustream.core.graph import Graph
from neustream.core.kv_cache import KVCache
from neustream.core.learnt_steps import LearntSteps
from neustream.core.profile import LatencyProfile
from neustream.core.steps import StepLatency
from neustream.engine.events import Observer
from neustream.errors import BackendError, RequestError, shown
from neustream.graphs import llm, llm_profiles, with_eyes
from neustream.profiling.steps import StepsFile
from neustream.service.mount import Behind, Call, Device, Host, Instance

MOST_SEQUENCES = 128
"""Of one prompt."""
NODE = "llm"
"""What the model's stages are called where it is alone; else by its name."""


class TextMount:
    """A stock causal language model, served token by token.

    Args:
        model: any `AutoModelForCausalLM` in eval mode, in the dtype that it is to run in, or PEFT's
            wrapper of one, with the adapters that are active; it is not changed. What its
            `generation_config` says is what requests get that do not say otherwise.
        tokenizer: for prompts and completions of text; None: token ids only. The processor of a
            vision-language model: for prompts with images too.
        profile: how long steps take: a step profile (`name`, `device` and `seconds(step)` will do), or
            its file (`neustream profile` writes one). None: the one in the user's cache; what is not
            there is measured first and kept. It is corrected by the steps that run.
        see_profile: how long the vision tower takes, over requests of one image of 336 x 336 pixels.
            None: as of `profile`; beside a given one, a guess, which steps correct.
        slots: requests that can hold keys and values at once, on each device.
        max_batch: the most requests in one step; default: the slots.
        max_len: tokens of one request, prompt and outputs; default: the model's positions, where an
            encoder reads the prompt, those of both. Keys and values take memory for `slots * max_len`
            tokens, on each device; under Linux, on a CPU, for those that are there.
        buckets: lengths, as `[128, 512]`. With some, all calls have fixed shapes: a request's results
            do not depend on its company to the last bit, in any dtype, at a cost.
        kv_cache: what the scheduler shares out; default: the slots. A smaller one in blocks of
            tokens makes it take slots away, and compute their tokens again. Slots that grow take no
            more memory than it has tokens.
        prefix_tokens: tokens of earlier texts whose keys and values are kept for prompts that begin
            alike, at most, on one device; default: a quarter of the slots', or fewer where half of the
            memory that is free on a GPU has no room for them. 0: none.
        step_tokens: the most tokens of a step in which prompts are prefilled in parts; default: the
            pool's.
        prepack: whether linear layers read copies of their weights in oneDNN's own layout: faster on
            a CPU, for the memory of the weights once more. None: in float32, if that takes at most a quarter
            of the memory that is free.
        graphs: whether decodes are CUDA graphs, captured when it is served; on CUDA. None: where they can
            be, else calls as ever, which is logged. True: BackendError where they cannot.
        measure_s: seconds that measuring may take, about.
        cache: the folder of the cache; default: the user's.
        progress: show what is measured; default: if stderr is a terminal.

    On several devices, the first has the model itself, moved there; others have copies. Two on one
    device share their weights.
    """

    observers: Sequence[Observer] = ()
    most_sequences = MOST_SEQUENCES
    model: LanguageModel
    """On the first device, once it is opened."""
    reader: Reader
    """Makes tokens of prompts, once it is opened."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: Any = None,
        *,
        profile: StepLatency | Path | str | None = None,
        see_profile: LatencyProfile | None = None,
        slots: int = 16,
        max_batch: int | None = None,
        max_len: int | None = None,
        buckets: Sequence[int] = (),
        kv_cache: KVCache | None = None,
        prefix_tokens: int | None = None,
        step_tokens: int | None = None,
        prepack: bool | None = None,
        graphs: bool | None = None,
        measure_s: float = 20.0,
        cache: Path | str | None = None,
        progress: bool | None = None,
    ) -> None:
        model = stock_of(model)
        if not isinstance(model, PreTrainedModel):
            raise BackendError(f"a language model is a transformers model, got {shown(model)}")
        if not (tokenizer is None or callable(tokenizer)):
            raise BackendError(f"a tokenizer is an object that is called with text, got {shown(tokenizer)}")
        check_option("kv_cache", kv_cache, KVCache | None, "a KVCache")
        check_option("prepack", prepack, bool | None, "True, False or None")
        check_option("graphs", graphs, bool | None, "True, False or None")
        self.processor = tokenizer
        self.tokenizer = tokenizer_of(tokenizer)
        self.kv_caches: Mapping[str, KVCache] = {}
        self._kv_cache = kv_cache
        self._stock = model
        self._slots = whole("slots", slots, 1, MOST_SLOTS, error=BackendError)
        most = slots if max_batch is None else max_batch
        self._max_batch = whole("max_batch", most, 1, error=BackendError)
        if step_tokens is not None:
            step_tokens = whole("step_tokens", step_tokens, 1, error=BackendError)
        self.step_tokens = step_tokens
        if prefix_tokens is not None:
            prefix_tokens = whole("prefix_tokens", prefix_tokens, 0, error=BackendError)
        self._prefix_tokens = prefix_tokens
        self._prefixes: Prefixes | None = None
        self._max_len = max_len
        self._buckets = buckets
        self._prepack = prepack
        self._graphs = graphs
        self._timings = Timings(profile, see_profile, measure_s, cache, progress)
        self._host: Host | None = None
        self._graph: Graph | None = None
        self._devices: list[tuple[Device, Texts]] = []
        self._proof: Unchanged | None = None  # of the model, for the next time that it is opened

    @property
    def device(self) -> str:
        return str(self._stock.device)

    @property
    def used(self) -> int:
        """Slots in use, on all devices."""
        return sum([_used(device, texts) for device, texts in self._devices])

    def check(self, name: str) -> None:
        if self._host is not None and not self.make_way():
            raise BackendError("this mount is served already: close that service first")

    def open(self, name: str, devices: Sequence[Device], host: Host) -> Sequence[Instance]:
        defaults = defaults_of(type(self._stock).__name__, self._stock.generation_config)
        claim(self, type(self._stock).__name__, [("its weights", self._stock)])
        self._host = host
        self._devices.clear()
        node, most = name or NODE, self._max_batch
        root = llm(node, max_batch=most)
        instances: list[Instance] = []
        self._graph = Graph(node, root)
        stocks = copies(self._stock, [device.place for device in devices])
        for device, stock in zip(devices, stocks, strict=True):
            model = self._with_slots(stock, self.model if instances else None)
            sighted = sighted_of(model, self.processor, proven=model.unchanged is self._proof)
            steps = LearntSteps(self._timings.steps(model, device))
            as_at_first(model)  # measuring has filled slots
            self._prefixes = self._prefixes_of(model) if len(devices) == 1 else None
            texts = Texts(model, _ask, name=node, tokenizer=self.tokenizer, prefixes=self._prefixes)
            self._devices.append((device, texts))
            instance = Instance(modules_of(texts), llm_profiles(node, steps, max_batch=most))
            if sighted.sample is not None:
                stage = sighted.stage(node, most)
                self._graph = Graph(node, with_eyes(stage, root, looks))
                instance = instance.with_(sighted.instance(stage, _ask, partial(self._timings.looks, device)))
            instances.append(instance)
            if len(instances) == 1:
                self.model, self.reader = model, sighted.reader
        if self._kv_cache is not None and self._kv_cache.host_blocks:
            _check_aside(self.model, self._kv_cache)
        self.defaults, self._said = defaults, OfTexts(self._stock)
        self._proof = self.model.unchanged
        self.kv_caches = {node: self._kv_cache or KVCache(self._slots, self.model.max_len)}
        return instances

    def _prefixes_of(self, model: LanguageModel) -> Prefixes | None:
        cache = model.cache
        if not isinstance(cache, Slots) or not cache.plain:
            return None
        tokens = kept_tokens(model, cache, self._prefix_tokens)
        return Prefixes(model, cache, tokens) if tokens else None

    def _with_slots(self, stock: PreTrainedModel, beside: LanguageModel | None = None) -> LanguageModel:
        return LanguageModel(
            stock,
            slots=self._slots,
            max_len=self._max_len,
            buckets=self._buckets,
            proof=self._proof,
            prepack=self._prepack,
            graphs=self._graphs,
            beside=beside,
            kv_tokens=None if self._kv_cache is None else self._kv_cache.capacity,
        )

    def request(
        self,
        prompt: str | Sequence[int],
        *,
        images: Sequence[Any] | None = None,
        max_tokens: int | None = None,
        temperature: float | None = None,
        top_p: float | None = None,
        top_k: int | None = None,
        min_p: float | None = None,
        typical_p: float | None = None,
        repetition_penalty: float | None = None,
        presence_penalty: float | None = None,
        frequency_penalty: float | None = None,
        no_repeat_ngram_size: int | None = None,
        logit_bias: Mapping[int, float] | None = None,
        suppress_tokens: Sequence[int] | None = None,
        bad_words_ids: Sequence[Sequence[int]] | None = None,
        processors: Sequence[Processor] | None = None,
        seed: int | None = None,
        stop: str | Sequence[str] | None = None,
        stop_token_ids: Sequence[int] | None = None,
        ignore_eos: bool = False,
        min_tokens: int | None = None,
        logprobs: int | None = None,
        prompt_logprobs: int | None = None,
        tools: Sequence[Any] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        ends_after: int | None = None,
        n: int | None = None,
        like: str | None = None,
        adapter: str | None = None,
    ) -> Call:
        """A completion; RequestError for what cannot be served.

        Args:
            prompt: text (needs the tokenizer), token ids, or messages (needs its chat template).
            images: PIL images or arrays, one for each of their places in a prompt of text or messages.
            max_tokens: the most new tokens; together with the prompt they must fit the model. None: as
                many as `generation_config` says, else to the end of the context.
            temperature, ..., prompt_logprobs: see `Sampling`. None: as `generation_config` says.
            tools, chat_template_kwargs: for the chat template, beside the messages.
            ends_after: outputs after which it ends as if the model had said so, for workloads that
                are replayed; no policy sees it.
            n: refused: several sequences are asked of a service.
            like: the id of another request of the same prompt: this one waits for its first output, and
                goes on from its keys and values. `n` is made of these.
            adapter: of PEFT, by its name; None: those that are active.
        """
        assert self._graph is not None
        if n not in (None, 1):
            raise RequestError(f"n={shown(n)}: several sequences are asked of a service, not here: ask for each")
        self.model.unchanged.check()
        self._said.check()
        asked = {
            "temperature": temperature,
            "top_p": top_p,
            "top_k": top_k,
            "min_p": min_p,
            "typical_p": typical_p,
            "repetition_penalty": repetition_penalty,
            "presence_penalty": presence_penalty,
            "frequency_penalty": frequency_penalty,
            "no_repeat_ngram_size": no_repeat_ngram_size,
            "logit_bias": logit_bias,
            "suppress_tokens": suppress_tokens,
            "bad_words_ids": bad_words_ids,
            "processors": processors,
            "stop": stop,
            "stop_token_ids": stop_token_ids,
            "min_tokens": min_tokens,
        }
        sampling = Sampling(
            **self.defaults.filled(asked),
            seed=seed,
            ignore_eos=ignore_eos,
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
        )
        room = self.room
        tokens, sight = self.reader.read(prompt, images, tools, chat_template_kwargs)
        most = room.outputs(len(tokens)) if max_tokens is None else max_tokens
        ask = ask_of(self.model, self.tokenizer, tokens, most, sampling, room, sight, adapter)
        if ends_after is not None:
            ask = replace(ask, end=whole("ends_after", ends_after, 1))
        count, most = len(tokens), int(most)
        lead = lead_of(tokens if self.model.begins is None else self.model.begins, sampling.stop)
        own, over = owners.take(sampling.processors, several=like is not None)
        ask = replace(ask, sampling=replace(sampling, processors=own))
        told = {"prompt": ask.names, "prompt_tokens": count, "max_tokens": most}  # routers compare prompts
        return Call(
            self._graph,
            {**told, "ask": ask, "cached_tokens": self._cached(ask), "like": like},
            partial(completion, self.tokenizer, count, sampling.stop, lead),
            partial(Tokens, self.tokenizer, most, sampling.stop, lead),
            over=over,
            reads=read,
            behind=self._behind(like, ask),
        )

    @property
    def room(self) -> Room:
        """How long texts may be."""
        assert self._graph is not None
        model, memory = self.model, self.kv_caches[self._graph.name].capacity
        limit = model.max_len if memory is None else min(model.max_len, memory)
        begins = None if model.begins is None else len(model.begins)
        return Room(model.name, limit, model.max_len, model.positions, model.read, begins, self.defaults)

    def _behind(self, like: str | None, ask: Ask) -> Behind | None:
        """The request that computes the prompt; what of it need not be computed then."""
        if like is None:
            return None
        if not isinstance(like, str):
            raise RequestError(f"like is the id of another request, got {shown(like)}")
        shares = isinstance(self.model.cache, Slots) and ask.sampling.prompt_logprobs is None
        there = shares and len(self._devices) == 1
        return Behind(like, {"cached_tokens": self.model.alike(len(ask.prompt))} if there else {})

    def _cached(self, ask: Ask) -> int:
        """Tokens of a prompt that need not be computed: all are where they are told of, or hold images."""
        if self._prefixes is None or ask.sight is not None or ask.sampling.prompt_logprobs is not None:
            return 0
        return self._prefixes.match(ask)

    def rehearsal(self) -> Sequence[Call]:
        return ()  # its steps are learnt as they run

    def steps(self, seconds: float, tick: Callable[[str, int, float], None]) -> StepsFile:
        """Measure how long steps take, in about `seconds`; not while it is served."""
        model = self._with_slots(self._stock)
        return file_of(model, measure_steps(model, seconds=seconds, tick=tick), "neustream profile")

    def make_way(self) -> bool:
        host = self._host
        if host is not None:
            host.make_way()
        return self._host is None

    def close(self) -> None:
        self._devices.clear()  # whoever holds this keeps no slots
        self._prefixes = None
        for name in ("model", "reader"):
            self.__dict__.pop(name, None)
        free(self, [self._stock])
        self._host = None  # at last: whoever wants the model waits for its host until then


def _check_aside(model: LanguageModel, cache: KVCache) -> None:
    """BackendError if what preempted requests have computed cannot be kept in the host's memory."""
    slots = model.cache
    if isinstance(slots, Own):
        raise BackendError(
            f"{model.name}: kv_cache has host_blocks={cache.host_blocks}, but its requests have caches of their own, "
            "which are not kept aside: give host_blocks=0"
        )
    size, free = cache.host_blocks * cache.block_size * slots.token_bytes * len(slots.used), free_bytes()
    if free is not None and size > free:
        raise BackendError(
            f"{model.name}: host_blocks={cache.host_blocks} of kv_cache may take {size:,} bytes, {free:,} are free"
        )


def _used(device: Device, texts: Texts) -> int:
    """Slots of a device that are in use."""
    with contextlib.suppress(BackendError):  # closed: nobody else counts
        used: int = device.executor.call(lambda: len(texts)).result()
        return used
    return len(texts)


def _ask(given: StepInput) -> Ask:
    ask: Ask = given.params["ask"]
    return ask
