"""How requests' next tokens are chosen: by the stock library's own processors, in its order.

What looks at a request's own tokens is done row by row. Filters of draws work on all rows at once that
have the same ones. Seeded rows draw from streams of their own, as the stock library does.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from functools import cache
from typing import Any

import torch
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    NoBadWordsLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    SuppressTokensAtBeginLogitsProcessor,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from neustream.backends.transformers.sampling import Processor, Sampling
from neustream.backends.transformers.text import Text
from neustream.errors import told

WRONG_LOGITS = "the model's logits are NaN or infinite, or all are masked"


class Chooser:
    """How one request's tokens are chosen, and where its random stream is.

    Args:
        stream: where the random stream is, as `stream` says; empty: at its start.
        prompt: tokens of the prompt; eos: those that end it.
    """

    __slots__ = ("_generator", "_stream", "edits", "sampling")

    def __init__(
        self,
        sampling: Sampling,
        stream: bytes = b"",
        *,
        prompt: int = 0,
        eos: Collection[int] = (),
        device: torch.device | str = "cpu",
    ) -> None:
        self.sampling = sampling
        self._stream = stream
        self._generator: torch.Generator | None = None
        self.edits = _edits(sampling, prompt, eos, str(device))

    def __repr__(self) -> str:
        given = self.sampling
        return f"temperature={given.temperature}, top_p={given.top_p}, top_k={given.top_k}"

    @property
    def draws(self) -> bool:
        """Whether tokens are drawn; else each is the likeliest."""
        return self.sampling.temperature > 0

    @property
    def stream(self) -> bytes:
        """Where the random stream is: the state of torch's generator on its kind of device.

        Empty while nothing was drawn, and without a seed: what is drawn next is as good anywhere.
        """
        if self._generator is not None:
            self._stream = self._generator.get_state().numpy().tobytes()
        return self._stream

    def edited(self, logits: torch.Tensor, text: Text) -> torch.Tensor:
        """`logits` [1, vocabulary] as the request's own processors change them, behind its tokens so far.

        ValueError if one of them gives anything else.
        """
        if not self.edits:
            return logits
        ids = torch.tensor([text.tokens(0, len(text))], device=logits.device)
        for edit in self.edits:
            found = edit(ids, logits.clone())
            if not isinstance(found, torch.Tensor) or found.shape != logits.shape:
                what = tuple(found.shape) if isinstance(found, torch.Tensor) else type(found).__name__
                raise ValueError(f"{type(edit).__name__} gave {what}, not logits of shape {tuple(logits.shape)}")
            logits = found.to(logits.dtype)
        return logits

    def token(self, shares: torch.Tensor) -> torch.Tensor:
        """A token id [] drawn from `shares` [1, vocabulary]; moves the stream on."""
        if self._generator is None:
            self._generator = self._begun(shares.device)
        return torch.multinomial(shares, 1, generator=self._generator)[0, 0]

    def _begun(self, device: torch.device) -> torch.Generator:
        generator = torch.Generator(device)
        if self._stream:
            generator.set_state(torch.frombuffer(bytearray(self._stream), dtype=torch.uint8))
        elif self.sampling.seed is not None:
            generator.manual_seed(self.sampling.seed)
        return generator


class Penalties:
    """Logits less what a token's earlier outputs cost it."""

    def __init__(self, presence: float, frequency: float, prompt: int) -> None:
        self._presence, self._frequency, self._prompt = presence, frequency, prompt

    def __call__(self, ids: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """`ids`: [1, tokens] of prompt and outputs; `logits`: [1, vocabulary]."""
        outputs, times = ids[0, self._prompt :].unique(return_counts=True)
        logits[0, outputs] -= self._presence + self._frequency * times.to(logits.dtype)
        return logits


def _edits(sampling: Sampling, prompt: int, eos: Collection[int], device: str) -> list[Processor]:
    """What changes a row's logits by its own tokens, in the stock order."""
    edits: list[Any] = []
    if sampling.biases:
        biases = {(token,): bias for token, bias in sampling.biases}
        edits.append(SequenceBiasLogitsProcessor(sequence_bias=biases))
    if sampling.repetition_penalty != 1:
        edits.append(RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty))
    if sampling.no_repeat_ngram_size:
        edits.append(NoRepeatNGramLogitsProcessor(sampling.no_repeat_ngram_size))
    if sampling.bad_words_ids:
        ends = torch.tensor(sorted(eos), device=device) if eos else None
        words = [list(word) for word in sampling.bad_words_ids]
        edits.append(NoBadWordsLogitsProcessor(words, ends))
    if sampling.suppress_tokens:
        edits.append(SuppressTokensLogitsProcessor(list(sampling.suppress_tokens), device=device))
    if sampling.begin_suppress_tokens:
        first = list(sampling.begin_suppress_tokens)
        edits.append(SuppressTokensAtBeginLogitsProcessor(first, prompt, device=device))
    if sampling.presence_penalty or sampling.frequency_penalty:
        edits.append(Penalties(sampling.presence_penalty, sampling.frequency_penalty, prompt))
    return [*edits, *sampling.processors]


def filtered(sampling: Sampling, logits: torch.Tensor) -> torch.Tensor:
    """Logits [rows, vocabulary] behind the filters of draws, in the stock order."""
    filters: list[Any] = []
    if sampling.temperature != 1:
        filters.append(TemperatureLogitsWarper(sampling.temperature))
    if sampling.top_k:
        filters.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        filters.append(TopPLogitsWarper(sampling.top_p))
    if sampling.min_p:
        filters.append(MinPLogitsWarper(sampling.min_p))
    if sampling.typical_p < 1:
        filters.append(TypicalLogitsWarper(sampling.typical_p))
    for filter in filters:
        logits = filter(None, logits)
    return logits


def without(logits: torch.Tensor, barred: Sequence[Collection[int]]) -> torch.Tensor:
    """`logits` [rows, vocabulary] where each row's barred tokens cannot be chosen; a copy, if there are some."""
    rows = {at: [token for token in tokens if token < logits.shape[-1]] for at, tokens in enumerate(barred) if tokens}
    if rows:
        logits = logits.clone()
    for at, tokens in rows.items():
        logits[at, tokens] = -math.inf
    return logits


def choose(logits: torch.Tensor, asked: Sequence[tuple[Chooser, Text] | None]) -> list[int | str]:
    """The next token of each row of `logits` [rows, vocabulary] (None: the likeliest), or why it has none.

    What is wrong with one row does no harm to others.
    """
    why: dict[int, str] = {}
    logits = _edited(logits, asked, why)
    most, tokens = logits.max(-1)  # of NaN and others, NaN is the largest
    drawn = {at: one[0] for at, one in enumerate(asked) if one is not None and one[0].draws and at not in why}
    shares = _shares(logits, drawn, why)
    known = [most, *[one.amax(-1) for one in shares.values()]]
    fine: list[bool] = torch.cat(known).isfinite().tolist()  # one look at the device for all of them
    for at in range(len(asked)):
        if not fine[at]:
            why.setdefault(at, WRONG_LOGITS)
    well = dict(zip(shares, fine[len(asked) :], strict=True))
    for at in shares:
        if at not in why and not well[at]:
            why[at] = f"no token has a probability with {drawn[at]}"
    _draw(tokens, {at: (drawn[at], one) for at, one in shares.items() if at not in why})
    return [why.get(at, token) for at, token in enumerate(tokens.tolist())]


def _edited(logits: torch.Tensor, asked: Sequence[tuple[Chooser, Text] | None], why: dict[int, str]) -> torch.Tensor:
    """The logits with the edits of those rows that have some; `why`: of those that cannot be."""
    changed: dict[int, torch.Tensor] = {}
    for at, one in enumerate(asked):
        if one is None or not one[0].edits:
            continue
        try:
            changed[at] = one[0].edited(logits[at : at + 1], one[1])[0]
        except Exception as error:  # of this row alone
            why[at] = f"its sampling raised {told(error)}"
    if not changed:
        return logits
    logits = logits.clone()
    for at, row in changed.items():
        logits[at] = row
    return logits


def _shares(logits: torch.Tensor, drawn: Mapping[int, Chooser], why: dict[int, str]) -> dict[int, torch.Tensor]:
    """Probabilities [1, vocabulary] of the rows that draw; NaN where there are none.

    Rows with the same filters share their calls. If one raises, each has calls of its own.
    """
    alike: dict[tuple[float, ...], list[int]] = {}
    for at, chooser in drawn.items():
        alike.setdefault(chooser.sampling.filters, []).append(at)
    shares: dict[int, torch.Tensor] = {}
    waiting = list(alike.values())
    while waiting:
        rows = waiting.pop()
        try:
            some = filtered(drawn[rows[0]].sampling, logits[rows]).softmax(-1)
        except Exception as error:
            if len(rows) > 1:
                waiting += [[at] for at in rows]
            else:
                why[rows[0]] = f"its sampling raised {told(error)}"
            continue
        shares |= zip(rows, some.split(1), strict=True)
    return shares


def _draw(tokens: torch.Tensor, drawn: Mapping[int, tuple[Chooser, torch.Tensor]]) -> None:
    """Draw a token for each of these rows into `tokens` [rows]: with a seed, from its own stream."""
    plain = [at for at, (chooser, _) in drawn.items() if chooser.sampling.seed is None]
    if plain:
        shares = torch.cat([drawn[at][1] for at in plain])
        tokens[plain] = _at_random(shares)
    for at, (chooser, one) in drawn.items():
        if chooser.sampling.seed is not None:
            tokens[at] = chooser.token(one)


def _at_random(shares: torch.Tensor) -> torch.Tensor:
    """A token [rows] of each row of `shares` [rows, vocabulary]."""
    ends = shares.double().cumsum(-1)
    total = ends[:, -1:]
    random = torch.rand(len(shares), 1, dtype=ends.dtype, device=ends.device, generator=_randomness(ends.device))
    places = (random * total).minimum(total.nextafter(torch.zeros_like(total)))  # below the end
    return torch.searchsorted(ends, places, right=True)[:, 0]


@cache
def _randomness(device: torch.device) -> torch.Generator:
    """What requests without a seed draw from: nobody else's draws are moved by it."""
    generator = torch.Generator(device)
    generator.seed()
    return generator
