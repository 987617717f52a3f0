"""Drawing tokens: the stock library's filters, and draws of requests without a seed, many rows at once."""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import torch
from torch.nn.functional import pad
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from neustream.backends.transformers.sampling import Sampling

LIKELIEST = 1024
"""Of so many tokens of a row the filters are computed, where those they leave are among them."""
BLOCK = 128
"""Columns whose shares are added up before one of them is drawn."""


class Draws(NamedTuple):
    """Tokens [rows] that were drawn, and what their shares added up to; not finite where there are none."""

    tokens: torch.Tensor
    total: torch.Tensor


def filtered(sampling: Sampling, logits: torch.Tensor) -> torch.Tensor:
    """Logits [rows, vocabulary] behind the filters of draws, in the stock order."""
    filters: list[Any] = []
    if sampling.temperature != 1:
        filters.append(TemperatureLogitsWarper(sampling.temperature))
    filters += sampling.said.warm()
    if sampling.top_k:
        filters.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        filters.append(TopPLogitsWarper(sampling.top_p))
    if sampling.min_p:
        filters.append(MinPLogitsWarper(sampling.min_p))
    if sampling.typical_p < 1:
        filters.append(TypicalLogitsWarper(sampling.typical_p))
    filters += sampling.said.cut(str(logits.device))
    for filter in filters:
        logits = filter(None, logits)
    return logits


def at_random(sampling: Sampling, logits: torch.Tensor) -> Draws:
    """A token of each row of `logits` [rows, vocabulary], from randomness that nobody else uses.

    They are drawn as the stock filters say. Where those leave few tokens, only the likeliest are looked at.
    """
    filters = sampling.top_k or sampling.top_p < 1 or sampling.min_p
    if not filters or sampling.typical_p < 1 or any(sampling.said.draws):
        return _drawn(filtered(sampling, logits).softmax(-1))
    some = _of_the_likeliest(sampling, logits)
    return _drawn(filtered(sampling, logits).softmax(-1)) if some is None else some


def _of_the_likeliest(sampling: Sampling, logits: torch.Tensor) -> Draws | None:
    """The same, from the likeliest tokens alone; None: a filter leaves more of them in some row."""
    size = logits.shape[-1]
    count = min(sampling.top_k or LIKELIEST, size)
    scaled = logits if sampling.temperature == 1 else logits / sampling.temperature
    values, ids = scaled.topk(count, -1)
    beyond = values if sampling.top_k else scaled
    shares = (values - beyond.logsumexp(-1, keepdim=True)).exp()
    before = shares.cumsum(-1) - shares
    kept = before < sampling.top_p
    if sampling.min_p:
        kept &= shares >= sampling.min_p * shares[:, :1]
    kept[:, 0] = True
    if not sampling.top_k and count < size and bool(kept[:, -1].any()):
        return None
    drawn = _drawn(shares * kept)
    return Draws(ids.gather(1, drawn.tokens[:, None])[:, 0], drawn.total)


def _drawn(shares: torch.Tensor) -> Draws:
    """A column [rows] of each row of `shares` [rows, columns], as often as its share says.

    First a block of columns is drawn, then one of its columns: sums up to each column are made of that block alone.
    """
    blocks = -(-shares.shape[-1] // BLOCK)
    parts = pad(shares, (0, blocks * BLOCK - shares.shape[-1])).unflatten(-1, (blocks, BLOCK))
    ends = pad(parts.sum(-1).double().cumsum(-1), (1, 0))
    total = ends[:, -1:]
    random = torch.rand(len(shares), 1, dtype=ends.dtype, device=ends.device, generator=_randomness(ends.device))
    places = _below(random * total, total)
    block = (torch.searchsorted(ends, places, right=True) - 1).clamp(max=blocks - 1)  # NaN: behind the last
    own = parts.gather(1, block[:, :, None].expand(-1, 1, BLOCK))[:, 0].double().cumsum(-1)
    column = torch.searchsorted(own, _below(places - ends.gather(1, block), own[:, -1:]), right=True)
    found = (block * BLOCK + column)[:, 0]
    return Draws(found.clamp(max=shares.shape[-1] - 1), total[:, 0].float())


def _below(places: torch.Tensor, end: torch.Tensor) -> torch.Tensor:
    """Places, none of them at the end or behind it."""
    return places.minimum(end.nextafter(torch.zeros_like(end)))


@cache
def _randomness(device: torch.device) -> torch.Generator:
    """What requests without a seed draw from: nobody else's draws are moved by it."""
    generator = torch.Generator(device)
    generator.seed()
    return generator
