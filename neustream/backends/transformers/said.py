"""What a model's `generation_config` says of its tokens and no argument of a request does."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from transformers.generation.logits_process import (
    EncoderNoRepeatNGramLogitsProcessor,
    EncoderRepetitionPenaltyLogitsProcessor,
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    ExponentialDecayLengthPenalty,
    ForcedBOSTokenLogitsProcessor,
    ForcedEOSTokenLogitsProcessor,
    InfNanRemoveLogitsProcessor,
    LogitNormalization,
    MinLengthLogitsProcessor,
    SequenceBiasLogitsProcessor,
    TopHLogitsWarper,
)

from neustream.errors import BackendError, shown, told


@dataclass(frozen=True, slots=True)
class Place:
    """Where a request's outputs are, as the stock library's processors are told it.

    Args:
        source: token ids of the prompt.
        begin: tokens before the first output: the prompt's, or those that a decoder begins with.
        last: tokens with the last output; None: not known.
        eos: tokens that end it; none where it goes on behind them.
    """

    source: Sequence[int] = ()
    begin: int = 0
    last: int | None = None
    eos: Sequence[int] = ()
    device: str = "cpu"

    @property
    def ends(self) -> torch.Tensor:
        return torch.tensor(self.eos, device=self.device)

    @property
    def read(self) -> torch.Tensor:
        """The prompt, [1, tokens]."""
        return torch.tensor([list(self.source)], device=self.device)


@dataclass(frozen=True, slots=True)
class Said:
    """Settings of `generation_config`, by their names there; each default says nothing."""

    sequence_bias: Any = None
    encoder_repetition_penalty: Any = None
    encoder_no_repeat_ngram_size: Any = None
    min_length: Any = None
    forced_bos_token_id: Any = None
    forced_eos_token_id: Any = None
    remove_invalid_values: Any = None
    exponential_decay_length_penalty: Any = None
    top_h: Any = None
    epsilon_cutoff: Any = None
    eta_cutoff: Any = None
    renormalize_logits: Any = None

    @property
    def edits(self) -> bool:
        """Whether it changes logits by a request's own tokens."""
        return any(getattr(self, name) is not None for name in EDITS)

    @property
    def draws(self) -> tuple[Any, ...]:
        """What its filters of draws are made of."""
        return tuple([getattr(self, name) for name in DRAWS])

    @property
    def tokens(self) -> Mapping[str, tuple[int, ...]]:
        """Every token that it names, by setting."""
        return {
            "sequence_bias": tuple([token for word in _words(self.sequence_bias) for token in word]),
            "forced_bos_token_id": _ids(self.forced_bos_token_id),
            "forced_eos_token_id": _ids(self.forced_eos_token_id),
        }

    def first(self, place: Place) -> list[Any]:
        """The stock processors before those of penalties."""
        made: list[Any] = []
        if self.sequence_bias is not None:
            made.append(SequenceBiasLogitsProcessor(sequence_bias=self.sequence_bias))
        if self.encoder_repetition_penalty is not None:
            penalty = self.encoder_repetition_penalty
            made.append(EncoderRepetitionPenaltyLogitsProcessor(penalty, place.read))
        return made

    def between(self, place: Place) -> list[Any]:
        """Those between repeated and barred sequences."""
        if self.encoder_no_repeat_ngram_size is None:
            return []
        return [EncoderNoRepeatNGramLogitsProcessor(self.encoder_no_repeat_ngram_size, place.read)]

    def last(self, place: Place) -> list[Any]:
        """Those between barred sequences and barred tokens."""
        made: list[Any] = []
        if self.min_length is not None and place.eos:
            made.append(MinLengthLogitsProcessor(self.min_length, place.ends, device=place.device))
        if self.forced_bos_token_id is not None:
            made.append(ForcedBOSTokenLogitsProcessor(self.forced_bos_token_id))
        if self.forced_eos_token_id is not None and place.last is not None:
            made.append(ForcedEOSTokenLogitsProcessor(place.last, self.forced_eos_token_id, device=place.device))
        if self.remove_invalid_values is not None:
            made.append(InfNanRemoveLogitsProcessor())
        if self.exponential_decay_length_penalty is not None and place.eos:
            decay = tuple(self.exponential_decay_length_penalty)
            made.append(ExponentialDecayLengthPenalty(decay, place.ends, place.begin))
        return made

    def warm(self) -> list[Any]:
        """The filter of draws that comes behind the temperature."""
        return [] if self.top_h is None else [TopHLogitsWarper(self.top_h)]

    def cut(self, device: str) -> list[Any]:
        """The filters that come last."""
        made: list[Any] = []
        if self.epsilon_cutoff is not None:
            made.append(EpsilonLogitsWarper(self.epsilon_cutoff))
        if self.eta_cutoff is not None:
            made.append(EtaLogitsWarper(self.eta_cutoff, device=device))
        if self.renormalize_logits is not None:
            made.append(LogitNormalization())
        return made


DRAWS = ("top_h", "epsilon_cutoff", "eta_cutoff", "renormalize_logits")
EDITS = tuple([field.name for field in fields(Said) if field.name not in DRAWS])
NOTHING: Mapping[str, tuple[Any, ...]] = {
    "encoder_repetition_penalty": (1,),
    "encoder_no_repeat_ngram_size": (0,),
    "min_length": (0,),
    "remove_invalid_values": (False,),
    "epsilon_cutoff": (0,),
    "eta_cutoff": (0,),
    "renormalize_logits": (False,),
}
"""Values that say nothing, beside None."""
TRIAL = Place(source=(0, 1), begin=2, last=4, eos=(0,))


def said_of(name: str, config: Mapping[str, Any]) -> Said:
    """What `generation_config` of model `name` says; BackendError for what the stock library does not take."""
    values = {key: config.get(key) for key in (*EDITS, *DRAWS)}
    meant = {key: value for key, value in values.items() if value not in (None, *NOTHING.get(key, ()))}
    for key, value in meant.items():
        try:
            fine = _fine(Said(**{key: value}))
        except Exception as error:  # whatever the stock processors raise, or what is no number
            raise BackendError(f"generation_config of {name}: {key}={shown(value)}: {told(error)}") from error
        if not fine:
            raise BackendError(f"generation_config of {name}: {key}={shown(value)} is nothing that it can say")
    return Said(**meant)


def _fine(one: Said) -> bool:
    """Whether a setting makes processors, of numbers and tokens that may be; raises what these have against it."""
    made = [*one.first(TRIAL), *one.between(TRIAL), *one.last(TRIAL), *one.warm(), *one.cut("cpu")]
    tokens = [token for some in one.tokens.values() for token in some]
    if not made or not all(_words(one.sequence_bias)) or not _numbers(one):
        return False
    return all(isinstance(token, int) and token >= 0 for token in tokens)


def _numbers(said: Said) -> bool:
    """Whether what is added to logits, or multiplies them, is numbers; a bias of -inf bars its sequence."""
    biases = said.sequence_bias or {}
    values = list(biases.values()) if isinstance(biases, Mapping) else [bias for _, bias in biases]
    if not all(bias < math.inf for bias in values):  # NaN is not
        return False
    start, factor = said.exponential_decay_length_penalty or (0, 1.0)
    return bool(math.isfinite(start) and math.isfinite(factor))


def _words(biases: Any) -> list[Sequence[int]]:
    """The sequences of tokens of a `sequence_bias`, which is a dict, or a list of pairs."""
    if biases is None:
        return []
    return list(biases) if isinstance(biases, Mapping) else [word for word, _ in biases]


def _ids(tokens: Any) -> tuple[int, ...]:
    if tokens is None:
        return ()
    return tuple(tokens) if isinstance(tokens, Sequence) else (tokens,)
