"""Draws of requests with seeds: what `torch.multinomial` draws of each row from its own generator, many rows at once.

That draws an exponential for each token of the vocabulary; the token with the most `share / exponential` is it. On
a CPU an exponential is `-log1p(-u)` of a `u` in float64, one behind the other from the generator. Here rows draw these
numbers alone. `u` is never more than its exponential, so no token of a few has more than the largest share of theirs
over the smallest `u`: exponentials are made of those few that may have the one. Filters are asked of the token that is
drawn, or computed of the likeliest ones. Where two tokens are nearly level, or the one is at the border of a filter,
the stock call draws, from the same place of the stream. Uniforms that were drawn while the model computed are taken
where there are some (`ahead.py`).
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache, partial
from typing import Any

import torch

from neustream.backends.transformers.ahead import Stream, Uniforms, draw_ahead, draw_at_once
from neustream.backends.transformers.draws import (
    CLOSE,
    ROUNDING,
    SIDE,
    Draws,
    Likeliest,
    apart,
    chosen,
    filtered,
    likeliest,
)
from neustream.backends.transformers.sampling import Sampling

NEAR = 1e-5
"""Tokens whose scores differ by less, relative to them, are level: rounding is less than a tenth of it."""
PIECE = 1 << 19
"""Numbers that are drawn before tokens are chosen by them: few calls for many rows, and 4 MiB at once."""
FIRST = 4
"""Blocks of each row, those that may have most, of which scores are computed before others are left out."""
LIKELY = 128
"""Blocks of each row, at most, of which all shares are computed before those of its whole vocabulary are."""
Best = Callable[[list[int], Uniforms], list[int | None]]
"""The tokens of some rows whose vocabulary has such numbers; None: it is not clear which."""


def with_seeds(sampling: Sampling, logits: torch.Tensor, streams: Sequence[Stream]) -> Draws:
    """A token of each row of `logits` [rows, vocabulary], drawn from its own stream, which it moves on.

    A row in which no token has a probability draws nothing, and its stream stays where it is.
    """
    drawing = _Drawing(sampling, logits, streams)
    if _by_uniforms(logits):
        drawing.of_all_tokens()
        drawing.of_what_is_left()
    drawing.by_stock()
    return drawing.drawn


@contextmanager
def numbers_of(logits: torch.Tensor, streams: Sequence[Stream]) -> Iterator[None]:
    """While tokens of `logits` are chosen, what streams draw for these is drawn, and then what they will draw next."""
    if suits := _by_uniforms(logits):
        draw_at_once(streams, logits.shape[-1])
    yield
    if suits:
        draw_ahead(streams, logits.shape[-1])


def _by_uniforms(logits: torch.Tensor) -> bool:
    return logits.device.type == "cpu" and logits.dtype == torch.float32 and uniforms_suffice()


class _Drawing:
    """Rows of the same filters, and what they have drawn so far."""

    def __init__(self, sampling: Sampling, logits: torch.Tensor, streams: Sequence[Stream]) -> None:
        self._sampling, self._logits, self._streams = sampling, logits, streams
        self._tokens: dict[int, int] = {}
        self._most: dict[int, float] = {}
        """The largest share or logit of each row that is known; not finite: none of its tokens has a probability."""

    @property
    def drawn(self) -> Draws:
        rows, of = range(len(self._logits)), self._logits
        tokens = torch.tensor([self._tokens.get(row, 0) for row in rows], device=of.device)
        return Draws(tokens, torch.tensor([self._most[row] for row in rows], device=of.device))

    @property
    def _open(self) -> list[int]:
        rows = range(len(self._logits))
        return [row for row in rows if row not in self._tokens and math.isfinite(self._most.get(row, 0.0))]

    def of_all_tokens(self) -> None:
        """Rows draw one of all tokens, where filters leave the likelier ones, if any: it counts if they leave it."""
        sampling, logits = self._sampling, self._logits
        if not (sampling.top_k or sampling.typical_p < 1 or any(sampling.said.draws)):
            every = _Blocks(logits, sampling.temperature)
            self._draw(self._open, every.top[:, 0], lambda at, uniforms: _inside(sampling, every, at, uniforms))

    def of_what_is_left(self) -> None:
        """Rows draw of what the filters leave."""
        if not (open := self._open):
            return
        rows = torch.tensor(open)
        logits = chosen(self._logits, rows)
        for own, some in likeliest(self._sampling, logits):
            self._draw(rows[own].tolist(), *_of_what_is_left(self._sampling, logits, own, some))

    def by_stock(self) -> None:
        """The rows that have not drawn do, by the stock call."""
        if not (open := self._open):
            return
        shares = filtered(self._sampling, chosen(self._logits, torch.tensor(open))).softmax(-1)
        for row, most, own in zip(open, shares.amax(-1).tolist(), shares.split(1), strict=True):
            self._most[row] = most
            if math.isfinite(most):
                self._tokens[row] = int(torch.multinomial(own, 1, generator=self._streams[row].own()))

    def _draw(self, rows: list[int], most: torch.Tensor, best: Best) -> None:
        """Let those of `rows` draw whose `most` [rows] is finite; `best` is given their places in `rows`."""
        self._most |= zip(rows, most.tolist(), strict=True)
        places = [place for place, row in enumerate(rows) if math.isfinite(self._most[row])]
        columns = self._logits.shape[-1]
        apart: list[int] = []
        ahead: dict[Any, list[int]] = {}
        for place in places:
            batch = self._streams[rows[place]].batch(columns)
            (apart if batch is None else ahead.setdefault(batch, [])).append(place)
        for batch, some in ahead.items():
            own = {rows[place]: self._streams[rows[place]] for place in some}
            tokens = best(some, batch.uniforms([stream.place for stream in own.values()]))
            self._taken(own, tokens)
        size = max(PIECE // columns, 1)
        for first in range(0, len(apart), size):
            some = apart[first : first + size]
            self._together([rows[place] for place in some], partial(best, some))

    def _taken(self, streams: Mapping[int, Stream], tokens: Sequence[int | None]) -> None:
        """Rows that drew a token by what was drawn ahead go on behind it."""
        for (row, stream), token in zip(streams.items(), tokens, strict=True):
            if token is not None:
                stream.take()
                self._tokens[row] = token

    def _together(self, rows: list[int], best: Callable[[Uniforms], list[int | None]]) -> None:
        generators = [self._streams[row].own() for row in rows]
        before = [generator.get_state() for generator in generators]
        numbers = _room.numbers("uniforms", len(rows), self._logits.shape[-1], torch.float64)
        for own, generator in zip(numbers, generators, strict=True):
            own.uniform_(generator=generator)
        for row, generator, state, token in zip(rows, generators, before, best(Uniforms(numbers)), strict=True):
            if token is None:
                generator.set_state(state)
            else:
                self._tokens[row] = token


def _of_what_is_left(
    sampling: Sampling, logits: torch.Tensor, rows: torch.Tensor, some: Likeliest | None
) -> tuple[torch.Tensor, Best]:
    """The most of what `rows` of `logits` draw from, [rows], and how the best of it is found."""
    if some is None:
        left = _Blocks(filtered(sampling, chosen(logits, rows)), 1.0)
        return left.top[:, 0], lambda at, uniforms: _best_of_all(left, at, uniforms)
    doubtful = some.doubtful(sampling, logits.shape[-1])
    likely = some.shares * (some.left | doubtful)
    return likely.amax(-1), lambda at, uniforms: _best_of_few(some.ids[at], likely[at], doubtful[at], uniforms)


class _Blocks:
    """Shares of tokens in relation to the likeliest of their row, SIDE of them that lie evenly apart as a block.

    Args:
        logits: [rows, columns]; those over the temperature count.

    Attributes:
        top: [rows, 1] the largest of them.
        most: [rows, blocks] the largest share of each block.
        inside: [SIDE] where a block's columns are behind its first, which has the block's own number.
        rest: the columns that are in no block.
    """

    def __init__(self, logits: torch.Tensor, temperature: float) -> None:
        self.logits, self._temperature = logits, temperature
        blocks, columns = logits.shape[1] // SIDE, logits.shape[1]
        high = apart(logits).amax(1)
        behind = logits[:, blocks * SIDE :]
        self.top = torch.cat([high, behind], 1).amax(-1, keepdim=True) / temperature
        self.most = (high / temperature - self.top).exp_()
        self.inside = torch.arange(SIDE) * blocks
        self.rest = torch.arange(blocks * SIDE, columns)

    def shares(self, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
        """The shares of some tokens."""
        return (self.logits[rows, columns] / self._temperature - self.top[rows, 0]).exp_()

    def all_shares(self, rows: list[int]) -> torch.Tensor:
        """The shares of all tokens of some rows, [rows, columns], in memory that is used again."""
        some = self.logits[rows[0] : rows[-1] + 1] if rows[-1] - rows[0] < len(rows) else self.logits[rows]
        shares = torch.div(some, self._temperature, out=_room.numbers("shares", *some.shape))
        return shares.sub_(self.top[rows]).exp_()


class _Room(threading.local):
    """Memory of a thread for numbers that it needs at once: new memory costs more than to draw them."""

    def __init__(self) -> None:
        self._known: dict[str, torch.Tensor] = {}

    def numbers(self, what: str, rows: int, columns: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Memory [rows, columns] for some numbers, the same each time."""
        count = rows * columns
        if what not in self._known or len(self._known[what]) < count:
            with torch.inference_mode(False):  # else nobody may write to it who is not in that mode
                self._known[what] = torch.empty(max(count, PIECE), dtype=dtype)
        return self._known[what][:count].view(rows, columns)


_room = _Room()


@cache
def uniforms_suffice() -> bool:
    """Whether this torch makes exponentials of its generators' uniforms, on a CPU."""
    one, other = (torch.Generator().manual_seed(20) for _ in range(2))
    uniforms = torch.rand(4099, dtype=torch.float64, generator=one)
    drawn = torch.empty(4099).exponential_(generator=other)
    same = torch.allclose(drawn, _exponential(uniforms).float(), rtol=NEAR / 10, atol=0)
    return bool(same and torch.equal(one.get_state(), other.get_state()))


def _exponential(uniforms: torch.Tensor) -> torch.Tensor:
    return -torch.log1p(-uniforms)


def _best_of_few(
    ids: torch.Tensor, shares: torch.Tensor, doubtful: torch.Tensor, uniforms: Uniforms
) -> list[int | None]:
    """The best of the likeliest tokens `ids` of each row of [rows, columns]; None: two are nearly level, or it is
    `doubtful` whether the filters leave it."""
    numbers = uniforms.of(torch.arange(len(ids))[:, None], ids)
    scores, places = (shares / _exponential(numbers)).topk(min(2, ids.shape[1]), -1)
    clear = scores[:, 0].isfinite() & ~doubtful.gather(1, places[:, :1])[:, 0]
    if ids.shape[1] > 1:
        clear &= scores[:, 1] < scores[:, 0] * (1 - NEAR)
    if ids.shape[1] < uniforms.columns:
        clear &= ~doubtful[:, -1]  # those behind it may be left too
    tokens = ids.gather(1, places[:, :1])[:, 0].tolist()
    return [token if well else None for token, well in zip(tokens, clear.tolist(), strict=True)]


def _best_of_all(all: _Blocks, rows: list[int], uniforms: Uniforms) -> list[int | None]:
    """The best columns of some rows whose numbers are `uniforms`; None: two are nearly level.

    Those blocks are looked at whose largest share over their smallest uniform is no less than what the best of some
    blocks has.
    """
    own = torch.tensor(rows)
    at_most = all.most[own] / uniforms.least

    def scores(row: torch.Tensor, column: torch.Tensor) -> torch.Tensor:
        return all.shares(own[row], column) / _exponential(uniforms.of(row, column))

    every, rest = torch.arange(len(rows))[:, None], all.rest.expand(len(rows), -1)
    first = at_most.topk(min(FIRST, at_most.shape[1]), -1).indices
    known = torch.cat([(first[:, :, None] + all.inside).flatten(1), rest], 1)
    least = scores(every, known).amax(-1) * (1 - NEAR)
    row, block = (at_most >= least[:, None]).nonzero(as_tuple=True)
    row = torch.cat([row.repeat_interleave(SIDE), every.expand_as(rest).flatten()])
    column = torch.cat([(block[:, None] + all.inside).flatten(), rest.flatten()])
    scored = scores(row, column)
    good = scored >= least[row]
    found: list[list[tuple[float, int]]] = [[(0.0, 0)] for _ in rows]
    for at, token, score in zip(row[good].tolist(), column[good].tolist(), scored[good].tolist(), strict=True):
        found[at].append((score, token))
    return [_clear(some) for some in found]


def _clear(scored: list[tuple[float, int]]) -> int | None:
    """The token with the best score; None: another is nearly level, or it is not finite."""
    (second, _), (score, token) = sorted(scored)[-2:] if len(scored) > 1 else [*scored, (0.0, 0)]
    return token if second < score * (1 - NEAR) and score < float("inf") else None


def _inside(sampling: Sampling, all: _Blocks, rows: list[int], uniforms: Uniforms) -> list[int | None]:
    """The best of all tokens of some rows, if `top_p` and `min_p` surely leave it; else None."""
    tokens = _best_of_all(all, rows, uniforms)
    if sampling.top_p == 1 and not sampling.min_p:
        return tokens
    own = all.shares(torch.tensor(rows), torch.tensor([token or 0 for token in tokens]))
    inside = own >= sampling.min_p * (1 + CLOSE)
    if sampling.top_p < 1:
        inside &= _likely(all, rows, own, sampling.top_p - 2 * ROUNDING * uniforms.columns - CLOSE)
    return [token if well else None for token, well in zip(tokens, inside.tolist(), strict=True)]


def _likely(all: _Blocks, rows: list[int], own: torch.Tensor, part: float) -> torch.Tensor:
    """Whether what is likelier than shares `own` [rows], or as likely, is surely below `part` of all, [rows].

    It is in the blocks whose largest share is no less. Where these are few, of others no more than their largest shares
    is looked at first, which suffices for nearly all rows.
    """
    level, most = own * (1 - CLOSE), all.most[rows]
    near = most >= level[:, None]
    few = near.sum(-1) <= LIKELY
    row, block = (near & few[:, None]).nonzero(as_tuple=True)
    shares = all.shares(torch.tensor(rows)[row, None], block[:, None] + all.inside)
    total = most.sum(-1).index_add_(0, row, shares.sum(-1) - most[row, block])
    above = (-own).index_add_(0, row, _above(shares, level[row]))
    if len(all.rest):
        rest = all.shares(torch.tensor(rows)[:, None], all.rest.expand(len(rows), -1))
        total += rest.sum(-1)
        above += _above(rest, level)
    sure = few & (above < part * total)
    if open := (~sure).nonzero()[:, 0].tolist():
        shares = all.all_shares([rows[place] for place in open])
        total = shares.sum(-1)
        sure[open] = _above(shares, level[open]) - own[open] < part * total
    return sure


def _above(shares: torch.Tensor, least: torch.Tensor) -> torch.Tensor:
    """Of each row of `shares` [rows, columns] the sum of those that are no less than its `least` [rows]."""
    return torch.where(shares >= least[:, None], shares, 0.0).sum(-1)
