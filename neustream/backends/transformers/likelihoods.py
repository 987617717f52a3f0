"""How likely a model found tokens: log-probabilities of its own logits, before temperature and filters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from neustream.backends.transformers.text import Text

ROWS = 256
"""Tokens of a prompt whose logarithms are in memory at once."""


@dataclass(frozen=True, slots=True)
class Likelihood:
    """How likely the model found a token at its place.

    Args:
        token: its id.
        logprob: natural logarithm of its probability; -inf where it has none.
        top: ids and logprobs of the likeliest tokens there, the likeliest first.
    """

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


def likelihoods(
    logits: torch.Tensor,
    tokens: Sequence[int | str],
    counts: Sequence[int | None],
) -> Mapping[int, Likelihood]:
    """Of rows of `logits` [rows, vocabulary], by row: how likely its token was.

    Args:
        tokens: of each row; a text in place of one says why it has none.
        counts: tokens to be told of beside it; None: nothing is computed for that row.
    """
    asked = [at for at, count in enumerate(counts) if count is not None and not isinstance(tokens[at], str)]
    if not asked:
        return {}
    most = max(counts[at] or 0 for at in asked)
    found = _of(logits[asked], [int(tokens[at]) for at in asked], most)
    return {at: replace(one, top=one.top[: counts[at] or 0]) for at, one in zip(asked, found, strict=True)}


def scored(text: Text, start: int, logits: torch.Tensor) -> Text:
    """The text with scores of its prompt's tokens, as far as `logits` [tokens, vocabulary] tell.

    `start`: the place of the token that the first row is behind of. Scores that are there stay.
    """
    prompt = text.ask.prompt
    first = len(text.scores) + 1  # the next token that has none
    last = min(start + len(logits) + 1, len(prompt))
    if start + 1 > first:
        raise ValueError(f"logits from token {start} on, but the next score is that of token {first}")
    scores = list(text.scores)
    for low in range(first, last, ROWS):
        high = min(low + ROWS, last)
        rows = logits[low - 1 - start : high - 1 - start]
        scores += _of(rows, prompt[low:high], text.ask.sampling.prompt_logprobs or 0)
    return replace(text, scores=tuple(scores))


def _of(logits: torch.Tensor, tokens: Sequence[int], count: int) -> list[Likelihood]:
    logs = logits.float().log_softmax(-1)
    own = logs.gather(1, torch.tensor(tokens, device=logs.device)[:, None])[:, 0].tolist()
    best = logs.topk(min(count, logs.shape[1]), -1)
    tops = zip(best.indices.tolist(), best.values.tolist(), strict=True)
    return [
        Likelihood(token, logprob, tuple(zip(ids, values, strict=True)))
        for token, logprob, (ids, values) in zip(tokens, own, tops, strict=True)
    ]
