"""Drawing tokens: the stock library's filters, and draws of requests without a seed, many rows at once.

Where filters leave few tokens of a row, only the likeliest are looked at.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any, NamedTuple

import torch
from torch import threshold_
from torch.nn.functional import pad
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from neustream.backends.transformers.said import Said
from neustream.backends.transformers.sampling import Sampling

LIKELIEST = (128, 256, 1024)
"""Of so many tokens of a row the filters are computed, of the least that has all those they leave."""
CLOSE = 1e-5
"""Shares that differ by less, relative to them, may be equal in float32."""
ROUNDING = 1.5e-8
"""What a float32 sum of shares may be off for each of its parts, relative to it: they are added up in four lanes."""
LEVEL = 14
"""Tokens that are as likely as the last of `top_k` are left too: so many are looked at."""
SIDE = 16
"""Columns that lie evenly apart, of which the largest is looked at first."""
SPARSE = 4
"""The largest of rows are looked for by blocks where these are so many times as many."""
TOGETHER = 1 << 19
"""Logits of rows that share calls on a CPU, at most: what is made of them then stays in its cache."""
MOSTLY = 0.5
"""Of what a `top_p` of no less leaves, draws begin with one of all tokens."""
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

    They are drawn as the stock filters say. Where these leave most of the probability, one of all tokens is drawn
    first: it counts if they leave it.
    """
    if sampling.top_p >= MOSTLY and sampling.filters == (sampling.temperature, 0, sampling.top_p, 0, 1, *Said().draws):
        return _of_all(sampling, logits)
    return _of_rows(partial(_of_those_left, sampling), logits)


def _of_rows(drawn: Callable[[torch.Tensor], Draws], logits: torch.Tensor) -> Draws:
    """What is drawn of all rows; on a CPU of some at a time."""
    size = max(TOGETHER // logits.shape[-1], 1) if logits.device.type == "cpu" else len(logits)
    parts = [drawn(some) for some in logits.split(size)]
    return Draws(*map(torch.cat, zip(*parts, strict=True)))


def _of_those_left(sampling: Sampling, logits: torch.Tensor) -> Draws:
    tokens = torch.empty(len(logits), dtype=torch.long, device=logits.device)
    total = torch.empty(len(logits), device=logits.device)
    for rows, some in likeliest(sampling, logits):
        tokens[rows], total[rows] = _of_what_is_left(sampling, chosen(logits, rows), some)
    return Draws(tokens, total)


def _of_what_is_left(sampling: Sampling, logits: torch.Tensor, some: Likeliest | None) -> Draws:
    """A token of each row, of those that the filters leave: `some` of the likeliest; None: of all."""
    if some is None:
        return _drawn(filtered(sampling, logits).softmax(-1))
    drawn = _drawn(some.kept)
    return Draws(some.ids.gather(1, drawn.tokens[:, None])[:, 0], drawn.total)


def _of_all(sampling: Sampling, logits: torch.Tensor) -> Draws:
    """The same where `top_p` is the only filter, or there is none."""
    surely: list[torch.Tensor] = []

    def drawn(some: torch.Tensor) -> Draws:
        shares = some / sampling.temperature
        found = _drawn(shares.sub_(shares.amax(-1, keepdim=True)).exp_())
        if sampling.top_p < 1:
            surely.append(_surely_left(sampling.top_p, shares, found))
        return found

    found = _of_rows(drawn, logits)
    open = (~torch.cat(surely)).nonzero()[:, 0] if surely else ()
    if not len(open):
        return found
    for rows, some in likeliest(sampling, logits[open]):
        at = open[rows]
        other = _of_what_is_left(sampling, logits[at], some)
        kept = _left(sampling, logits[at], some, found.tokens[at])
        found.tokens[at] = torch.where(kept, found.tokens[at], other.tokens)
        found.total[at] = other.total
    return found


def _surely_left(top_p: float, shares: torch.Tensor, found: Draws) -> torch.Tensor:
    """Whether `top_p` surely leaves what was found of each row of `shares` [rows, columns], which are lost.

    What is likelier, or as likely, has less than so much without it.
    """
    own = shares.gather(1, found.tokens[:, None])
    likelier = threshold_(shares.div_(own), 1 - CLOSE, 0.0).sum(-1) - 1
    part = top_p - 2 * ROUNDING * shares.shape[1] - CLOSE
    return likelier < part * found.total / own[:, 0]


def _left(sampling: Sampling, logits: torch.Tensor, some: Likeliest | None, tokens: torch.Tensor) -> torch.Tensor:
    """Whether the filters leave one of `tokens` [rows] of each row."""
    if some is None:
        return filtered(sampling, logits).gather(1, tokens[:, None])[:, 0].isfinite()
    return ((some.ids == tokens[:, None]) & some.left).any(-1)


class Likeliest(NamedTuple):
    """The likeliest tokens of some rows, in order, and which of them the filters leave: the first ones.

    Args:
        values: [rows, columns] logits over the temperature; ids: [rows, columns] their tokens.
        shares: [rows, columns] of the probability, behind `top_k`.
        before: [rows, columns] the shares of all likelier tokens together.
        left: [rows, columns] whether the filters leave it.
    """

    values: torch.Tensor
    ids: torch.Tensor
    shares: torch.Tensor
    before: torch.Tensor
    left: torch.Tensor

    @property
    def kept(self) -> torch.Tensor:
        """Shares [rows, columns] of those that are left, in relation to each other; 0 of others."""
        return self.shares * self.left

    def doubtful(self, sampling: Sampling, size: int) -> torch.Tensor:
        """Which tokens the stock filters may leave or not [rows, columns]: those at their borders, and equal ones.

        `size`: of the vocabulary. Where the last one is, tokens behind it may be too.
        """
        values, border = self.values, torch.zeros_like(self.left)
        if sampling.top_p < 1:
            parts = min(sampling.top_k, size) if sampling.top_k else size
            many = torch.arange(1, values.shape[1] + 1, device=values.device)
            off = ROUNDING * (parts * (1 - sampling.top_p) + many) + CLOSE / 5  # small ones come first in such a sum
            border |= (self.before - sampling.top_p).abs() < off
            level = values[:, 1:] == values[:, :-1]  # which of equal ones are left goes by their order
            border[:, 1:] |= level & (self.left[:, 1:] != self.left[:, :-1])
        if sampling.min_p:
            least = sampling.min_p * self.shares[:, :1]
            border |= (self.shares - least).abs() < CLOSE * least
        if 0 < sampling.top_k < size:  # equal ones are all left
            border[:, -1] |= values[:, -1] == values[:, min(sampling.top_k, values.shape[1]) - 1]
        least = values.where(border, torch.inf).amin(-1, keepdim=True)
        return (values >= least) & (values <= values.where(border, -torch.inf).amax(-1, keepdim=True))


def likeliest(sampling: Sampling, logits: torch.Tensor) -> Iterator[tuple[torch.Tensor, Likeliest | None]]:
    """Which tokens of `logits` [rows, vocabulary] the filters leave, by rows; None: not all are among the likeliest."""
    rows = torch.arange(len(logits), device=logits.device)
    filters = sampling.top_k or sampling.top_p < 1 or sampling.min_p
    if not filters or sampling.typical_p < 1 or any(sampling.said.draws):
        yield rows, None
        return
    if sampling.top_k:
        yield rows, _among(sampling, logits, sampling.top_k + LEVEL, None)
        return
    scaled = logits / sampling.temperature
    total = scaled.sub_(scaled.amax(-1, keepdim=True)).exp_().sum(-1, keepdim=True)
    for count in LIKELIEST:
        found = _among(sampling, chosen(logits, rows), count, total[rows])
        more = found.left[:, -1] if count < logits.shape[-1] else torch.zeros_like(found.left[:, -1])
        few = ~more
        if bool(few.all()):
            yield rows, found
            return
        yield rows[few], Likeliest(*[part[few] for part in found])
        rows = rows[more]
    yield rows, None


def apart(values: torch.Tensor) -> torch.Tensor:
    """Values [rows, columns] as [rows, SIDE, blocks]: of SIDE columns that lie evenly apart each; without the rest."""
    blocks = values.shape[1] // SIDE
    return values[:, : blocks * SIDE].unflatten(1, (SIDE, blocks))


def largest(values: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The `count` largest of each row of [rows, columns] and their columns, in order.

    On a CPU they are looked for in those blocks of SIDE columns, `count` of them, whose largest are the largest.
    """
    blocks = values.shape[-1] // SIDE
    if values.device.type != "cpu" or count * SPARSE > blocks:
        found = values.topk(count, -1)
        return found.values, found.indices
    within = blocks * SIDE
    few = apart(values).amax(1).topk(count, -1).indices
    columns = (few[:, :, None] + torch.arange(SIDE) * blocks).flatten(1)
    columns = torch.cat([columns, torch.arange(within, values.shape[-1]).expand(len(values), -1)], 1)
    found = values.gather(1, columns).topk(count, -1)
    return found.values, columns.gather(1, found.indices)


def first_of_largest(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The column of the largest of each row of [rows, columns], the first of equal ones, as `argmax`; and the largest.

    Of NaN and others, NaN is the largest. On a CPU the largest of each block of BLOCK columns comes first: `amax` is 20
    times as fast as `argmax`.
    """
    blocks = logits.shape[-1] // BLOCK if logits.device.type == "cpu" else 0
    if blocks == 0:
        columns = logits.argmax(-1, keepdim=True)
        return columns[:, 0], logits.gather(1, columns)[:, 0]
    within = blocks * BLOCK
    parts = logits[:, :within].unflatten(1, (blocks, BLOCK))
    first = torch.cat([parts.amax(-1), logits[:, within:]], 1).argmax(-1, keepdim=True)
    block = first.clamp(max=blocks - 1)
    inside = parts.gather(1, block[:, :, None].expand(-1, 1, BLOCK))[:, 0].argmax(-1, keepdim=True)
    columns = torch.where(first < blocks, block * BLOCK + inside, within + first - blocks)
    return columns[:, 0], logits.gather(1, columns)[:, 0]


def chosen(logits: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Some of its rows, in order; itself, if these are all."""
    return logits if len(rows) == len(logits) else logits[rows]


def _among(sampling: Sampling, logits: torch.Tensor, count: int, total: torch.Tensor | None) -> Likeliest:
    """The same among so many; `total` [rows, 1]: weights of all, in relation to the largest. None: of `top_k`."""
    values, ids = largest(logits, min(count, logits.shape[-1]))
    values = values / sampling.temperature
    weights = (values - values[:, :1]).exp()
    left = torch.ones_like(ids, dtype=torch.bool)
    if total is None:
        top_k = min(sampling.top_k, values.shape[1])
        left = values >= values[:, top_k - 1 : top_k]  # equal ones are left
        weights = weights * left
        total = weights.sum(-1, keepdim=True)
    shares = weights / total
    before = shares.cumsum(-1) - shares
    left &= before < sampling.top_p
    if sampling.min_p:
        left &= shares >= sampling.min_p * shares[:, :1]
    left[:, 0] = True
    return Likeliest(values, ids, shares, before, left)


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
