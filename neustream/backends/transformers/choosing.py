"""How requests' next tokens are chosen: by the stock library's own processors, in its order.

What looks at a request's own tokens is done row by row, but for penalties that nothing else is beside. Filters of
draws work on all rows at once that have the same ones. Seeded rows draw from streams of their own, as the stock
library does.
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

from neustream.backends.transformers.ahead import Stream
from neustream.backends.transformers.draws import Draws, at_random, chosen, first_of_largest
from neustream.backends.transformers.penalised import Costs, Tally, less, penalise
from neustream.backends.transformers.said import Place
from neustream.backends.transformers.sampling import Processor, Sampling
from neustream.backends.transformers.seeded import numbers_of, with_seeds
from neustream.backends.transformers.text import Text
from neustream.errors import told

NOWHERE = Place()
WRONG_LOGITS = "the model's logits are NaN or infinite, or all are masked"


class Chooser:
    """How one request's tokens are chosen, and where its random stream is.

    Args:
        stream: where the random stream is, as `stream` says; empty: at its start.
        place: where its outputs are.

    Attributes:
        costs: what its edits are, if they are penalties alone; `tally`: of its tokens, for these.
    """

    __slots__ = ("_random", "_stream", "costs", "edits", "sampling", "tally")

    def __init__(
        self,
        sampling: Sampling,
        stream: bytes = b"",
        place: Place = NOWHERE,
    ) -> None:
        self.sampling = sampling
        self._stream = stream
        self._random: Stream | None = None
        self.edits = _edits(sampling, place)
        self.costs = _costs(sampling, self.edits)
        self.tally = Tally()

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
        if self._random is not None:
            self._stream = self._random.generator.get_state().numpy().tobytes()
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

    def random(self, device: torch.device) -> Stream:
        """What its tokens are drawn from, where it left off; who draws moves the stream on."""
        if self._random is None:
            self._random = Stream(self._begun(device))
        return self._random

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
        logits[0, outputs] = less(logits[0, outputs], times, self._presence, self._frequency)
        return logits


def _edits(sampling: Sampling, place: Place) -> list[Processor]:
    """What changes a row's logits by its own tokens, in the stock order."""
    said = sampling.said
    edits = [*said.first(place), *_repeated(sampling), *said.between(place), *_words(sampling, place)]
    edits += [*said.last(place), *_barred(sampling, place)]
    if sampling.presence_penalty or sampling.frequency_penalty:
        edits.append(Penalties(sampling.presence_penalty, sampling.frequency_penalty, place.begin))
    return [*edits, *sampling.processors]


def _costs(sampling: Sampling, edits: Sequence[Processor]) -> Costs | None:
    """What the edits of a row are, if they are penalties alone."""
    kinds = {type(edit) for edit in edits}
    if not kinds or sampling.processors or kinds - {RepetitionPenaltyLogitsProcessor, Penalties}:
        return None
    return Costs(sampling.repetition_penalty, sampling.presence_penalty, sampling.frequency_penalty)


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
    drawn = {at: one[0] for at, one in enumerate(asked) if one is not None and one[0].draws and at not in why}
    tokens = torch.zeros(len(logits), dtype=torch.long, device=logits.device)
    rows = [at for at in range(len(asked)) if at not in drawn]
    likeliest = torch.tensor(rows, dtype=torch.long, device=logits.device)
    tokens[likeliest], most = first_of_largest(chosen(logits, likeliest))
    sums = [most]
    with numbers_of(logits, [one.random(logits.device) for one in drawn.values() if one.sampling.seed is not None]):
        for some, draws in _together(logits, drawn, why):
            rows += some
            sums.append(draws.total)
            tokens[some] = draws.tokens
    fine = torch.cat(sums).isfinite().tolist()  # one look at the device for all of them
    for at, well in zip(rows, fine, strict=True):
        if not well:
            why.setdefault(at, _unlikely(logits[at], drawn.get(at)))
    return [why.get(at, token) for at, token in enumerate(tokens.tolist())]


def _unlikely(logits: torch.Tensor, chooser: Chooser | None) -> str:
    """Why no token of a row's `logits` [vocabulary] can be chosen."""
    if chooser is None or not math.isfinite(logits.amax()):  # of NaN and others, NaN is the largest
        return WRONG_LOGITS
    return f"no token has a probability with {chooser}"


def _edited(logits: torch.Tensor, asked: Sequence[tuple[Chooser, Text] | None], why: dict[int, str]) -> torch.Tensor:
    """The logits with the edits of those rows that have some; `why`: of those that cannot be."""
    changed: dict[int, torch.Tensor] = {}
    penalised: dict[Costs, dict[int, dict[int, int]]] = {}
    for at, one in enumerate(asked):
        if one is None or not one[0].edits:
            continue
        chooser, text = one
        if chooser.costs is not None:
            penalised.setdefault(chooser.costs, {})[at] = chooser.tally.of(text)
            continue
        try:
            changed[at] = chooser.edited(logits[at : at + 1], text)[0]
        except Exception as error:  # noqa: BLE001  of this row alone
            why[at] = f"its sampling raised {told(error)}"
    if not changed and not penalised:
        return logits
    logits = logits.clone()
    for at, row in changed.items():
        logits[at] = row
    for costs, tallies in penalised.items():
        penalise(logits, costs, tallies)
    return logits


def _alike(drawn: Mapping[int, Chooser]) -> list[list[int]]:
    """Rows that draw, those that can share calls."""
    alike: dict[tuple[Any, ...], list[int]] = {}
    for at, chooser in drawn.items():
        key = (chooser.sampling.seed is None, *chooser.sampling.filters)
        alike.setdefault(key, []).append(at)
    return list(alike.values())


def _together(
    logits: torch.Tensor, drawn: Mapping[int, Chooser], why: dict[int, str]
) -> Iterator[tuple[list[int], Draws]]:
    """Rows that draw, those of the same filters in few calls, and what they drew.

    If a call raises, each of its rows has calls of its own.
    """
    waiting = _alike(drawn)
    while waiting:
        rows = waiting.pop()
        sampling = drawn[rows[0]].sampling
        some = logits[rows[0] : rows[-1] + 1] if rows[-1] - rows[0] < len(rows) else logits[rows]
        try:
            if sampling.seed is None:
                found = at_random(sampling, some)
            else:
                found = with_seeds(sampling, some, [drawn[at].random(some.device) for at in rows])
        except Exception as error:  # noqa: BLE001  of one of these rows
            if len(rows) > 1:
                waiting += [[at] for at in rows]
            else:
                why[rows[0]] = f"its sampling raised {told(error)}"
            continue
        yield rows, found
