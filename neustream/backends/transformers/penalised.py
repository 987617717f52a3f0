"""Penalties on tokens that come again, of many rows at once: only logits of tokens that a row has are looked at.

They are what the stock library's `RepetitionPenaltyLogitsProcessor` does, and behind it presence and frequency
penalties, of which it has none.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import NamedTuple

import numpy as np
import torch

from neustream.backends.transformers.text import Text


class Costs(NamedTuple):
    """What tokens cost that come again: `repetition` those of prompt and outputs, the others those of outputs."""

    repetition: float
    presence: float
    frequency: float


class Tally:
    """How often each token of a text is one of its outputs, kept up as the text grows."""

    def __init__(self) -> None:
        self._prompt: Sequence[int] = ()
        self._outputs: tuple[int, ...] = ()
        self._times: dict[int, int] = {}

    def of(self, text: Text) -> dict[int, int]:
        """Each token of prompt and outputs, and how often it is an output."""
        known, times = len(self._outputs), self._times
        if text.ask.prompt is not self._prompt or text.outputs[:known] != self._outputs:
            known, times = 0, dict.fromkeys(text.ask.prompt, 0)
        for token in text.outputs[known:]:
            times[token] = times.get(token, 0) + 1
        self._prompt, self._outputs, self._times = text.ask.prompt, text.outputs, times
        return times


def penalise(logits: torch.Tensor, costs: Costs, tallies: dict[int, dict[int, int]]) -> None:
    """Change some rows of `logits` [rows, vocabulary] by what the tokens cost that `tallies` of these rows have.

    Tokens without a logit cost nothing.
    """
    sizes = [len(times) for times in tallies.values()]
    rows = np.repeat(np.fromiter(tallies, np.int64), sizes)
    tokens = np.fromiter(chain.from_iterable(tallies.values()), np.int64, sum(sizes))
    times = np.fromiter(chain.from_iterable([each.values() for each in tallies.values()]), np.int64, sum(sizes))
    some = tokens < logits.shape[-1]
    row, token, often = (torch.from_numpy(part[some]).to(logits.device) for part in (rows, tokens, times))
    scores = logits[row, token]
    if costs.repetition != 1:
        scores = torch.where(scores < 0, scores * costs.repetition, scores / costs.repetition)
    logits[row, token] = torch.where(often > 0, less(scores, often, costs.presence, costs.frequency), scores)


def less(scores: torch.Tensor, times: torch.Tensor, presence: float, frequency: float) -> torch.Tensor:
    """Logits less what it costs their tokens to be outputs so many `times`."""
    return scores - (presence + frequency * times.to(scores.dtype))
