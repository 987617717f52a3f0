"""What a request wants of its tokens, checked where it is asked."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Any

import torch

from neustream.backends.transformers.said import Said
from neustream.backends.values import flag, number, whole
from neustream.errors import RequestError, shown

MOST_LOGPROBS = 20
"""Tokens that may be told of beside one."""
MOST_STOPS = 64
"""Stop strings of a request."""
LONGEST_STOP = 1024
"""Characters of a stop string."""
GREATEST_BIAS = 1e4

Processor = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""As transformers' `LogitsProcessor`: token ids so far [1, tokens] and logits [1, vocabulary]; the logits
to choose from, of the same shape."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """What a request wants of its tokens.

    Each is what the argument of `generate` of that name does, and in its order: biases, penalties, barred
    tokens, `processors`, temperature, top_k, top_p, min_p, typical_p.

    Args:
        temperature: 0 takes the likeliest token; else logits are divided by it.
        top_p: draw from the likeliest tokens that make up so much of the probability.
        top_k: draw from so many of the likeliest tokens; 0: from all.
        min_p: draw from tokens that have so much of the likeliest one's probability.
        typical_p: draw from the most typical tokens that make up so much of the probability.
        repetition_penalty: logits of tokens of prompt and outputs are divided by it (multiplied, below 0).
        presence_penalty: taken from the logits of tokens that are outputs already.
        frequency_penalty: the same, for each time that they are. Neither is known to `generate`.
        no_repeat_ngram_size: so many tokens in a row never come twice; 0: they may.
        logit_bias: added to the logits of these tokens.
        suppress_tokens: never chosen. begin_suppress_tokens: not as the first output.
        bad_words_ids: sequences of tokens that are not completed.
        processors: of the request alone, called for each of its tokens in turn.
        seed: of the request's own random stream; None: a new one each time. With the same seed,
            tokens are those of `torch.manual_seed(seed); model.generate(do_sample=True, ...)` alone.
        stop: texts at which it ends, beside the model's EOS; they are not in the text that is told.
        stop_token_ids: tokens that end it; the token itself is an output too.
        ignore_eos: go on behind EOS, to `max_tokens`.
        min_tokens: before it has so many outputs, no token that would end it is chosen.
        logprobs: tell how likely the model found each output, and of so many of the likeliest tokens
            beside it; None: of nothing.
        prompt_logprobs: the same of the prompt's own tokens behind its first.
        said: what the model's `generation_config` says beside.
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
    min_p: float = 0.0
    typical_p: float = 1.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    no_repeat_ngram_size: int = 0
    logit_bias: Mapping[int, float] | tuple[tuple[int, float], ...] = ()
    suppress_tokens: tuple[int, ...] = ()
    begin_suppress_tokens: tuple[int, ...] = ()
    bad_words_ids: tuple[tuple[int, ...], ...] = ()
    stop: tuple[str, ...] = ()
    processors: tuple[Processor, ...] = ()
    said: Said = field(default_factory=Said)

    def __post_init__(self) -> None:
        checks: dict[str, Callable[[str, Any], Any]] = {
            "temperature": _at_least_0,
            "top_p": _share,
            "top_k": _count,
            "seed": _seed,
            "stop_token_ids": _tokens,
            "ignore_eos": flag,
            "logprobs": _told_of,
            "prompt_logprobs": _told_of,
            "min_tokens": _count,
            "min_p": _part,
            "typical_p": _share,
            "repetition_penalty": _factor,
            "presence_penalty": _shift,
            "frequency_penalty": _shift,
            "no_repeat_ngram_size": _count,
            "logit_bias": _biases,
            "suppress_tokens": _tokens,
            "begin_suppress_tokens": _tokens,
            "bad_words_ids": _words,
            "stop": _stops,
            "processors": _processors,
        }
        for name, check in checks.items():
            object.__setattr__(self, name, check(name, getattr(self, name)))

    @property
    def filters(self) -> tuple[Any, ...]:
        """What the stock library's filters of draws are made of; requests with the same ones share calls."""
        return (self.temperature, self.top_k, self.top_p, self.min_p, self.typical_p, *self.said.draws)

    @property
    def biases(self) -> tuple[tuple[int, float], ...]:
        """Tokens and what is added to their logits."""
        return tuple(self.logit_bias.items()) if isinstance(self.logit_bias, Mapping) else self.logit_bias

    @property
    def named(self) -> Mapping[str, tuple[int, ...]]:
        """Every token that it names, by argument."""
        words = tuple([token for word in self.bad_words_ids for token in word])
        return {
            "stop_token_ids": self.stop_token_ids,
            "suppress_tokens": self.suppress_tokens,
            "begin_suppress_tokens": self.begin_suppress_tokens,
            "bad_words_ids": words,
            "logit_bias": tuple([token for token, _ in self.biases]),
            **self.said.tokens,
        }


def _at_least_0(name: str, value: Any) -> float:
    return number(name, value, "a finite number >= 0", lambda x: 0 <= x < math.inf)


def _share(name: str, value: Any) -> float:
    return number(name, value, "a number above 0 and up to 1", lambda x: 0 < x <= 1)


def _part(name: str, value: Any) -> float:
    return number(name, value, "a number from 0 to 1", lambda x: 0 <= x <= 1)


def _factor(name: str, value: Any) -> float:
    return number(name, value, "a finite number above 0", lambda x: 0 < x < math.inf)


def _shift(name: str, value: Any) -> float:
    return number(name, value, "a number from -2 to 2", lambda x: -2 <= x <= 2)


def _count(name: str, value: Any) -> int:
    return whole(name, value, 0)


def _seed(name: str, value: Any) -> int | None:
    return None if value is None else whole(name, value, 0, 2**63 - 1)


def _told_of(name: str, value: Any) -> int | None:
    return None if value is None else whole(name, value, 0, MOST_LOGPROBS)


def _tokens(name: str, value: Any) -> tuple[int, ...]:
    if hasattr(value, "tolist"):  # numpy, torch
        value = value.tolist()
    if isinstance(value, str | bytes | bytearray) or not isinstance(value, Sequence | Set):
        raise RequestError(f"{name} must be a list of token ids, got {shown(value)}")
    return tuple([whole(f"{name}: a token id", token, 0) for token in value])


def _words(name: str, value: Any) -> tuple[tuple[int, ...], ...]:
    if isinstance(value, str | bytes | bytearray) or not isinstance(value, Sequence):
        raise RequestError(f"{name} must be a list of lists of token ids, got {shown(value)}")
    words = tuple([_tokens(name, word) for word in value])
    if not all(words):
        raise RequestError(f"{name}: a sequence has no token")
    return words


def _biases(name: str, value: Any) -> tuple[tuple[int, float], ...]:
    if isinstance(value, tuple) and all(isinstance(pair, tuple) and len(pair) == 2 for pair in value):
        value = dict(value)
    if not isinstance(value, Mapping):
        raise RequestError(f"{name} must be a dict of token ids and numbers, got {shown(value)}")
    allowed = f"a number from {-GREATEST_BIAS:g} to {GREATEST_BIAS:g}"
    return tuple(
        [
            (
                whole(f"{name}: a token id", token, 0),
                number(f"{name} of {shown(token)}", bias, allowed, lambda x: -GREATEST_BIAS <= x <= GREATEST_BIAS),
            )
            for token, bias in value.items()
        ]
    )


def _stops(name: str, value: Any) -> tuple[str, ...]:
    strings = (value,) if isinstance(value, str) else value
    if isinstance(strings, bytes | bytearray) or not isinstance(strings, Sequence | Set):
        raise RequestError(f"{name} must be a text or a list of texts, got {shown(value)}")
    if len(strings) > MOST_STOPS:
        raise RequestError(f"{name} may have {MOST_STOPS} texts, got {len(strings)}")
    for one in strings:
        if not isinstance(one, str) or not 0 < len(one) <= LONGEST_STOP:
            raise RequestError(f"{name}: each is a text of 1 to {LONGEST_STOP} characters, got {shown(one)}")
    return tuple(dict.fromkeys(strings))


def _processors(name: str, value: Any) -> tuple[Processor, ...]:
    if not isinstance(value, Sequence) or isinstance(value, str | bytes):
        raise RequestError(f"{name} must be a list of logits processors, got {shown(value)}")
    for one in value:
        if not callable(one):
            raise RequestError(f"{name}: each is called with token ids and logits, got {shown(one)}")
    return tuple(value)
