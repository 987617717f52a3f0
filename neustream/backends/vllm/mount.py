"""A vLLM engine as a model of a service, and so of each instance of a cluster.

    def make(device):
        return neustream.serve({"chat": VLLMMount(LLM("path/to/model"))})

    with neustream.Cluster(make, instances=2) as cluster:
        print(cluster.submit("Once upon a time", model="chat", max_tokens=16).result().text)

The service's policy says who is in a step. What is in the engine is batched by vLLM.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from vllm import LLM, SamplingParams
from vllm.sampling_params import RequestOutputKind

from neustream.backends.values import whole
from neustream.backends.vllm.generations import NOTHING, Generations
from neustream.backends.vllm.served import Generated, Token
from neustream.core.events import Emitted, Update
from neustream.core.graph import Graph
from neustream.core.kv_cache import KVCache
from neustream.core.learnt_steps import LearntSteps
from neustream.core.steps import StepLatency
from neustream.engine.answers import Result
from neustream.engine.events import Observer
from neustream.errors import BackendError, RequestError, shown, told
from neustream.graphs import llm, llm_profiles
from neustream.service.mount import Call, Device, Host, Instance

NODE = "llm"
"""What the model's stages are called where it is alone; else by its name."""
REFUSED = (
    "n",
    "stop",
    "logprobs",
    "prompt_logprobs",
    "structured_outputs",
    "output_kind",
    "extra_args",
)
"""Of SamplingParams: what a token a step does not tell of."""


class VLLMMount:
    """An `LLM` of vLLM's, served token by token.

    A text can go on at another instance: it is computed anew there behind its own tokens. That is
    the same text if it is greedy and has no penalties and no `min_tokens`; any other one moves
    before its first token only.

    Args:
        llm: the engine; nobody else may ask it anything meanwhile. Its own scheduler may be any.
        profile: how long steps take; None: that is learnt from the steps that run.

    Attributes:
        most: requests that vLLM runs at once.
    """

    observers: Sequence[Observer] = ()
    step_tokens: int | None = None

    def __init__(self, llm: LLM, *, profile: StepLatency | None = None) -> None:
        config = getattr(getattr(llm, "llm_engine", None), "vllm_config", None)
        if config is None:
            raise BackendError(f"a vLLM engine is a vllm.LLM, got {shown(llm)}")
        self._engine = llm.llm_engine
        self._profile = profile
        self._graph: Graph | None = None
        self.kv_caches: Mapping[str, KVCache] = {}
        self.device = str(config.device_config.device_type)
        self.max_len = int(config.model_config.max_model_len)
        self.most = int(config.scheduler_config.max_num_seqs)
        self.vocabulary = int(config.model_config.get_vocab_size())
        self.tokenizer = None if config.model_config.skip_tokenizer_init else llm.get_tokenizer()

    def check(self, name: str) -> None:
        if self._graph is not None:
            raise BackendError("this mount is served already: close that service first")

    def open(self, name: str, devices: Sequence[Device], host: Host) -> Sequence[Instance]:
        if len(devices) > 1:
            places = [device.place for device in devices]
            raise BackendError(
                f"model {name!r}: one vLLM engine is on one device of a service, got {places}"
            )
        node = name or NODE
        self._graph = Graph(node, llm(node, max_batch=self.most))
        params = partial(
            SamplingParams,
            output_kind=RequestOutputKind.DELTA,
            detokenize=self.tokenizer is not None,
        )
        module = Generations(self._engine, params, node)
        steps = LearntSteps(self._profile)
        modules = dict.fromkeys((node, f"{node}.prefill", f"{node}.decode"), module)
        return [Instance(modules, llm_profiles(node, steps, max_batch=self.most))]

    def request(
        self, prompt: str | Sequence[int], *, max_tokens: int = 16, **sampling: Any
    ) -> Call:
        """A text.

        Args:
            prompt: text, or token ids.
            max_tokens: the most new tokens.
            sampling: arguments of vLLM's SamplingParams, greedy by default; not `REFUSED`.

        Raises:
            RequestError: what cannot be served, and why.
        """
        assert self._graph is not None
        tokens = self._tokens(prompt)
        most = whole("max_tokens", max_tokens, 1)
        if len(tokens) + most > self.max_len:
            raise RequestError(
                f"{len(tokens)} tokens of prompt and max_tokens={most} make {len(tokens) + most}, "
                f"but max_len is {self.max_len}",
                argument="max_tokens",
            )
        asked = {"temperature": NOTHING["temperature"], **sampling}
        self._check_sampling(asked)
        return Call(
            self._graph,
            {"prompt": tokens, "prompt_tokens": len(tokens), "max_tokens": most, "sampling": asked},
            _generated,
            lambda: _token,
            reads=_read,
        )

    def _check_sampling(self, asked: Mapping[str, Any]) -> None:
        for name in asked:
            if name in REFUSED:
                raise RequestError(
                    f"{name} is not supported by a vLLM model of a service", argument=name
                )
        try:
            SamplingParams(**asked)
        except Exception as error:  # vLLM refuses in many ways
            raise RequestError(f"vLLM's SamplingParams: {told(error)}") from error

    def _tokens(self, prompt: Any) -> list[int]:
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise RequestError(
                    "a prompt of text needs a tokenizer: give token ids", argument="prompt"
                )
            prompt = self.tokenizer.encode(prompt)
        if not isinstance(prompt, Sequence) or isinstance(prompt, bytes | bytearray):
            raise RequestError(
                f"a prompt is text or a list of token ids, got {shown(prompt)}", argument="prompt"
            )
        if not prompt:
            raise RequestError(
                "the prompt is empty: there is nothing to go on from", argument="prompt"
            )
        for token in prompt:
            if type(token) is not int or not 0 <= token < self.vocabulary:
                why = f"{shown(token)} is no token: the vocabulary has {self.vocabulary}"
                raise RequestError(why, argument="prompt")
        return list(prompt)

    def rehearsal(self) -> Sequence[Call]:
        return ()  # its steps are learnt as they run

    def close(self) -> None:
        self._graph = None


def _read(update: Update) -> Update:
    """What readers see of an output; the tokens before it are in it too."""
    return {name: update[name] for name in ("token", "text", "finish_reason")}


def _token(output: Emitted) -> Token:
    told = output.update
    return Token(output.index, told["token"], told["text"], output.age, told["finish_reason"])


def _generated(result: Result, outputs: Sequence[Emitted]) -> Generated:
    result.unwrap()
    text = "".join([output.update["text"] for output in outputs])
    return Generated(text, tuple([output.update["token"] for output in outputs]))
