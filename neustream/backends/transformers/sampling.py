"""How a request's next token is chosen: greedy, or drawn from its own stream as the stock library draws."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence, Set
from dataclasses import dataclass
from typing import Any

import torch
from transformers.generation.logits_process import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from neustream.backends.transformers.arguments import flag, number, whole
from neustream.errors import RequestError, shown, told

MOST_LOGPROBS = 20
"""Tokens that may be told of beside one."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """What a request wants of its tokens.

    Args:
        temperature: 0 takes the likeliest token; else logits are divided by it.
        top_p: draw from the likeliest tokens that make up so much of the probability.
        top_k: draw from so many of the likeliest tokens; 0: from all.
        seed: of the request's own random stream; None: a new one each time. With the same seed,
            tokens are those of `torch.manual_seed(seed); model.generate(do_sample=True, ...)` alone.
        stop_token_ids: tokens that end it, beside the model's EOS; the token itself is an output too.
        ignore_eos: go on behind EOS, to `max_tokens`.
        min_tokens: before it has so many outputs, no token that would end it is chosen.
        logprobs: tell how likely the model found each output, and of so many of the likeliest tokens
            beside it; None: of nothing.
        prompt_logprobs: the same of the prompt's own tokens behind its first.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    min_tokens: int = 0

    def __post_init__(self) -> None:
        ids: Any = self.stop_token_ids
        if hasattr(ids, "tolist"):  # numpy, torch
            ids = ids.tolist()
        if isinstance(ids, str | bytes | bytearray) or not isinstance(ids, Sequence | Set):
            raise RequestError(f"stop_token_ids must be a list of token ids, got {shown(ids)}")
        checked = {
            "temperature": number("temperature", self.temperature, "a finite number >= 0", lambda x: 0 <= x < math.inf),
            "top_p": number("top_p", self.top_p, "a number above 0 and up to 1", lambda x: 0 < x <= 1),
            "top_k": whole("top_k", self.top_k, 0),
            "seed": None if self.seed is None else whole("seed", self.seed, 0, 2**63 - 1),
            "stop_token_ids": tuple([whole("stop_token_ids: a token id", token, 0) for token in ids]),
            "ignore_eos": flag("ignore_eos", self.ignore_eos),
            "logprobs": _count("logprobs", self.logprobs),
            "prompt_logprobs": _count("prompt_logprobs", self.prompt_logprobs),
            "min_tokens": whole("min_tokens", self.min_tokens, 0),
        }
        for name, value in checked.items():
            object.__setattr__(self, name, value)


def _count(name: str, value: object) -> int | None:
    return None if value is None else whole(name, value, 0, MOST_LOGPROBS)


class Draw:
    """One request's random stream, and the stock library's filters in the stock order.

    Args:
        stream: where the random stream is, as `stream` says; empty: at its start.
    """

    __slots__ = ("_filters", "_generator", "_sampling", "_stream")

    def __init__(self, sampling: Sampling, stream: bytes = b"") -> None:
        self._sampling = sampling
        self._stream = stream
        self._generator: torch.Generator | None = None
        self._filters: list[Any] = []
        if sampling.temperature != 1:
            self._filters.append(TemperatureLogitsWarper(sampling.temperature))
        if sampling.top_k:
            self._filters.append(TopKLogitsWarper(sampling.top_k))
        if sampling.top_p < 1:
            self._filters.append(TopPLogitsWarper(sampling.top_p))

    def __repr__(self) -> str:
        given = self._sampling
        return f"temperature={given.temperature}, top_p={given.top_p}, top_k={given.top_k}"

    @property
    def stream(self) -> bytes:
        """Where the random stream is: the state of torch's generator on its kind of device."""
        if self._generator is not None:
            self._stream = self._generator.get_state().numpy().tobytes()
        return self._stream

    def shares(self, logits: torch.Tensor) -> torch.Tensor:
        """Probabilities of all tokens, from `logits` [1, vocabulary]; NaN where there are none."""
        for filter in self._filters:
            logits = filter(None, logits)
        return logits.softmax(-1)

    def token(self, shares: torch.Tensor) -> torch.Tensor:
        """A token id [] drawn from `shares`; moves the stream on."""
        if self._generator is None:
            self._generator = self._begun(shares.device)
        return torch.multinomial(shares, 1, generator=self._generator)[0, 0]

    def _begun(self, device: torch.device) -> torch.Generator:
        generator = torch.Generator(device)
        if self._stream:
            generator.set_state(torch.frombuffer(bytearray(self._stream), dtype=torch.uint8))
        elif self._sampling.seed is None:
            generator.seed()
        else:
            generator.manual_seed(self._sampling.seed)
        return generator


def without(logits: torch.Tensor, barred: Sequence[Collection[int]]) -> torch.Tensor:
    """`logits` [rows, vocabulary] where each row's barred tokens cannot be chosen; a copy, if there are some."""
    rows = {at: [token for token in tokens if token < logits.shape[-1]] for at, tokens in enumerate(barred) if tokens}
    if rows:
        logits = logits.clone()
    for at, tokens in rows.items():
        logits[at, tokens] = -math.inf
    return logits


def choose(logits: torch.Tensor, draws: Sequence[Draw | None]) -> list[int | str]:
    """The next token of each row of `logits` [rows, vocabulary] (None: the likeliest), or why it has none.

    What is wrong with one row does no harm to others.
    """
    most, tokens = logits.max(-1)  # of NaN and others, NaN is the largest
    shares: dict[int, tuple[Draw, torch.Tensor]] = {}
    why: dict[int, str] = {}
    for at, draw in enumerate(draws):
        if draw is not None:
            try:
                shares[at] = draw, draw.shares(logits[at : at + 1])
            except Exception as error:  # of this row alone
                why[at] = f"its sampling raised {told(error)}"
    known = [most, *[one.amax(-1) for _, one in shares.values()]]
    fine: list[bool] = torch.cat(known).isfinite().tolist()  # one look at the device for all of them
    for at in range(len(draws)):
        if not fine[at]:
            why[at] = "the model's logits are NaN or infinite, or all are masked"
    for at, well in zip(list(shares), fine[len(draws) :], strict=True):
        draw, one = shares[at]
        if at not in why and well:
            tokens[at] = draw.token(one)
        elif at not in why:
            why[at] = f"no token has a probability with {draw}"
    return [why.get(at, token) for at, token in enumerate(tokens.tolist())]
