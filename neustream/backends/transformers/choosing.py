"""How requests' next tokens are chosen: by the stock library's own processors, in its order.

What looks at a request's own tokens is done row by row. Filters of draws work on all rows at once that
have the same ones. Seeded rows draw from streams of their own, as the stock library does.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from transformers.generation.logits_process import (
    NoBadWordsLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    SuppressTokensAtBeginLogitsProcessor,
    SuppressTokensLogitsProcessor,
)

from neustream.backends.transformers.draws import Draws, at_random
from neustream.backends.transformers.said import Place
from neustream.backends.transformers.sampling import Processor, Sampling
from neustream.backends.transformers.seeded import with_seeds
from neustream.backends.transformers.text import Text
from neustream.errors import told

NOWHERE = Place()
TOGETHER = 1 << 19
"""Logits of rows that share calls on a CPU, at most: what is made of them then stays in its cache."""
WRONG_LOGITS = "the model's logits are NaN or infinite, or all are masked"


class Chooser:
    """How one request's tokens are chosen, and where its random stream is.

    Args:
        stream: where the random stream is, as `stream` says; empty: at its start.
        place: where its outputs are.
    """

    __slots__ = ("_generator", "_stream", "edits", "sampling")

    def __init__(
        self,
        sampling: Sampling,
        stream: bytes = b"",
        place: Place = NOWHERE,
    ) -> None:
        self.sampling = sampling
        self._stream = stream
        self._generator: torch.Generator | None = None
        self.edits = _edits(sampling, place)

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

    def generator(self, device: torch.device) -> torch.Generator:
        """What its tokens are drawn from, where it left off; who draws moves the stream on."""
        if self._generator is None:
            self._generator = self._begun(device)
        return self._generator

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


def _edits(sampling: Sampling, place: Place) -> list[Processor]:
    """What changes a row's logits by its own tokens, in the stock order."""
    said = sampling.said
    edits = [*said.first(place), *_repeated(sampling), *said.between(place), *_words(sampling, place)]
    edits += [*said.last(place), *_barred(sampling, place)]
    if sampling.presence_penalty or sampling.frequency_penalty:
        edits.append(Penalties(sampling.presence_penalty, sampling.frequency_penalty, place.begin))
    return [*edits, *sampling.processors]


def _repeated(sampling: Sampling) -> list[Any]:
    """Biases, and what is against tokens that come again."""
    edits: list[Any] = []
    if sampling.biases:
        biases = {(token,): bias for token, bias in sampling.biases}
        edits.append(SequenceBiasLogitsProcessor(sequence_bias=biases))
    if sampling.repetition_penalty != 1:
        edits.append(RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty))
    if sampling.no_repeat_ngram_size:
        edits.append(NoRepeatNGramLogitsProcessor(sampling.no_repeat_ngram_size))
    return edits


def _words(sampling: Sampling, place: Place) -> list[Any]:
    """What bars sequences of tokens."""
    if not sampling.bad_words_ids:
        return []
    words = [list(word) for word in sampling.bad_words_ids]
    return [NoBadWordsLogitsProcessor(words, place.ends if place.eos else None)]


def _barred(sampling: Sampling, place: Place) -> list[Any]:
    """What bars single tokens."""
    edits: list[Any] = []
    if sampling.suppress_tokens:
        edits.append(SuppressTokensLogitsProcessor(list(sampling.suppress_tokens), device=place.device))
    if sampling.begin_suppress_tokens:
        forced = sampling.said.forced_bos_token_id is not None and place.begin <= 1
        first = list(sampling.begin_suppress_tokens)
        edits.append(SuppressTokensAtBeginLogitsProcessor(first, place.begin + forced, device=place.device))
    return edits


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
    most = logits.amax(-1)  # of NaN and others, NaN is the largest
    drawn = {at: one[0] for at, one in enumerate(asked) if one is not None and one[0].draws and at not in why}
    tokens = _likeliest(logits, [at for at in range(len(asked)) if at not in drawn])
    sums = [most]
    rows = list(range(len(asked)))
    for some, draws in _together(logits, drawn, why):
        rows += some
        sums.append(draws.total)
        tokens[some] = draws.tokens
    fine = list(map(math.isfinite, torch.cat(sums).tolist()))  # one look at the device for all of them
    for at, well in zip(rows, fine, strict=True):
        if not well:
            why.setdefault(at, f"no token has a probability with {drawn[at]}" if fine[at] else WRONG_LOGITS)
    return [why.get(at, token) for at, token in enumerate(tokens.tolist())]


def _likeliest(logits: torch.Tensor, rows: list[int]) -> torch.Tensor:
    """The likeliest token of each of `rows`; of others, any."""
    if len(rows) == len(logits):
        return logits.argmax(-1)
    tokens = torch.zeros(len(logits), dtype=torch.long, device=logits.device)
    if rows:
        tokens[rows] = logits[rows].argmax(-1)
    return tokens


def _edited(logits: torch.Tensor, asked: Sequence[tuple[Chooser, Text] | None], why: dict[int, str]) -> torch.Tensor:
    """The logits with the edits of those rows that have some; `why`: of those that cannot be."""
    changed: dict[int, torch.Tensor] = {}
    for at, one in enumerate(asked):
        if one is None or not one[0].edits:
            continue
        try:
            changed[at] = one[0].edited(logits[at : at + 1], one[1])[0]
        except Exception as error:  # noqa: BLE001  of this row alone
            why[at] = f"its sampling raised {told(error)}"
    if not changed:
        return logits
    logits = logits.clone()
    for at, row in changed.items():
        logits[at] = row
    return logits


def _alike(logits: torch.Tensor, drawn: Mapping[int, Chooser]) -> list[list[int]]:
    """Rows that draw, those that can share calls."""
    alike: dict[tuple[Any, ...], list[int]] = {}
    for at, chooser in drawn.items():
        key = (chooser.sampling.seed is None, *chooser.sampling.filters)
        alike.setdefault(key, []).append(at)
    most = max(TOGETHER // logits.shape[-1], 1) if logits.device.type == "cpu" else len(logits)
    found: list[list[int]] = []
    for (unseeded, *_), rows in alike.items():
        size = most if unseeded else len(rows)  # those with seeds go by pieces themselves
        found += [rows[first : first + size] for first in range(0, len(rows), size)]
    return found


def _together(
    logits: torch.Tensor, drawn: Mapping[int, Chooser], why: dict[int, str]
) -> Iterator[tuple[list[int], Draws]]:
    """Rows that draw, those of the same filters in few calls, and what they drew.

    If a call raises, each of its rows has calls of its own.
    """
    waiting = _alike(logits, drawn)
    while waiting:
        rows = waiting.pop()
        sampling = drawn[rows[0]].sampling
        some = logits[rows[0] : rows[-1] + 1] if rows[-1] - rows[0] < len(rows) else logits[rows]
        try:
            if sampling.seed is None:
                found = at_random(sampling, some)
            else:
                found = with_seeds(sampling, some, [drawn[at].generator(some.device) for at in rows])
        except Exception as error:  # noqa: BLE001  of one of these rows
            if len(rows) > 1:
                waiting += [[at] for at in rows]
            else:
                why[rows[0]] = f"its sampling raised {told(error)}"
            continue
        yield rows, found
