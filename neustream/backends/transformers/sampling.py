"""How a request's next token is chosen: greedy, or drawn from its own stream as the stock library draws."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

import torch
from transformers.generation.logits_process import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from neustream.errors import RequestError


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
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        _number("temperature", self.temperature, "a finite number >= 0", lambda x: 0 <= x < math.inf)
        _number("top_p", self.top_p, "a number above 0 and up to 1", lambda x: 0 < x <= 1)
        _whole("top_k", self.top_k, 0)
        if self.seed is not None:
            _whole("seed", self.seed, 0, 2**63 - 1)
        ids = self.stop_token_ids
        if isinstance(ids, str) or not isinstance(ids, Sequence):
            raise RequestError(f"stop_token_ids must be a list of token ids, got {ids!r}")
        for token in ids:
            _whole("stop_token_ids: a token id", token, 0)
        object.__setattr__(self, "stop_token_ids", tuple(ids))
        if not isinstance(self.ignore_eos, bool):
            raise RequestError(f"ignore_eos must be True or False, got {self.ignore_eos!r}")


def _number(name: str, value: Any, allowed: str, fits: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, Real) or not fits(value):
        raise RequestError(f"{name} must be {allowed}, got {value!r}")


def _whole(name: str, value: Any, low: int, high: float = math.inf) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        most = "" if high == math.inf else f" to {high}"
        raise RequestError(f"{name} must be a whole number from {low}{most or ' on'}, got {value!r}")


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
            self._filters.append(TemperatureLogitsWarper(float(sampling.temperature)))
        if sampling.top_k:
            self._filters.append(TopKLogitsWarper(sampling.top_k))
        if sampling.top_p < 1:
            self._filters.append(TopPLogitsWarper(float(sampling.top_p)))

    @property
    def stream(self) -> bytes:
        """Where the random stream is: the state of torch's generator on its kind of device."""
        if self._generator is not None:
            self._stream = self._generator.get_state().numpy().tobytes()
        return self._stream

    def __call__(self, logits: torch.Tensor) -> torch.Tensor:
        """A token id [1] from `logits` [1, vocabulary]; moves the stream on."""
        if self._generator is None:
            self._generator = self._begun(logits.device)
        for filter in self._filters:
            logits = filter(None, logits)
        return torch.multinomial(logits.softmax(-1), 1, generator=self._generator)[0]

    def _begun(self, device: torch.device) -> torch.Generator:
        generator = torch.Generator(device)
        if self._stream:
            generator.set_state(torch.frombuffer(bytearray(self._stream), dtype=torch.uint8))
        elif self._sampling.seed is None:
            generator.seed()
        else:
            generator.manual_seed(self._sampling.seed)
        return generator


def choose(logits: torch.Tensor, draws: Sequence[Draw | None]) -> list[int | None]:
    """The next token of each row of `logits` [rows, vocabulary] (None: greedy); None where they are NaN or infinite."""
    most, tokens = logits.max(-1)  # of NaN and others, NaN is the largest
    fine: list[bool] = most.isfinite().tolist()
    drawn = {at: draw(logits[at : at + 1]) for at, draw in enumerate(draws) if draw is not None and fine[at]}
    if drawn:
        tokens[list(drawn)] = torch.cat(list(drawn.values()))
    return [token if ok else None for token, ok in zip(tokens.tolist(), fine, strict=True)]
