"""Draws of requests with seeds: what `torch.multinomial` draws of each row from its own generator, many rows at once.

That draws an exponential for each token of the vocabulary; the token with the most `share / exponential` is it. On
a CPU an exponential is `-log1p(-u)` of a `u` in float64, one behind the other from the generator. Here rows draw these
numbers alone, and logarithms are made of tokens that may be it: `u` is never more than its exponential. Filters are
asked of the token that is drawn, or computed of the likeliest ones. Where two tokens are nearly level, or the one
is at the border of a filter, the stock call draws, from the same place of the stream.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from functools import cache, partial

import torch

from neustream.backends.transformers.draws import CLOSE, ROUNDING, Draws, Likeliest, chosen, filtered, likeliest
from neustream.backends.transformers.sampling import Sampling

NEAR = 1e-5
"""Tokens whose scores differ by less, relative to them, are level: rounding is less than a tenth of it."""
PIECE = 1 << 17
"""Numbers that are drawn before tokens are chosen by them: they stay in a CPU's cache."""
BLOCK = 128
"""Columns of which only the best is looked at first."""

Best = Callable[[list[int], torch.Tensor], list[int | None]]
"""The tokens of some rows whose vocabulary has such numbers [rows, vocabulary]; None: it is not clear which."""


def with_seeds(sampling: Sampling, logits: torch.Tensor, generators: Sequence[torch.Generator]) -> Draws:
    """A token of each row of `logits` [rows, vocabulary], drawn from its own generator, which it moves on.

    A row in which no token has a probability draws nothing, and its generator stays where it is.
    """
    drawing = _Drawing(sampling, logits, generators)
    if logits.device.type == "cpu" and logits.dtype == torch.float32 and uniforms_suffice():
        drawing.of_all_tokens()
        drawing.of_what_is_left()
    drawing.by_stock()
    return drawing.drawn


class _Drawing:
    """Rows of the same filters, and what they have drawn so far."""

    def __init__(self, sampling: Sampling, logits: torch.Tensor, generators: Sequence[torch.Generator]) -> None:
        self._sampling, self._logits, self._generators = sampling, logits, generators
        self._tokens: dict[int, int] = {}
        self._most: dict[int, float] = {}
        """The largest share of each row that is known; not finite: none of its tokens has a probability."""

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
            shares = _room.numbers("shares", *logits.shape)
            torch.div(logits, sampling.temperature, out=shares)
            torch.softmax(shares, -1, out=shares)
            self._draw(self._open, shares, lambda at, uniforms: _inside(sampling, _rows(shares, at), uniforms))

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
                self._tokens[row] = int(torch.multinomial(own, 1, generator=self._generators[row]))

    def _draw(self, rows: list[int], shares: torch.Tensor, best: Best) -> None:
        """Let those of `rows` draw whose `shares` [rows, columns] are some; `best` is given their places in `rows`."""
        self._most |= zip(rows, shares.amax(-1).tolist(), strict=True)
        places = [place for place, row in enumerate(rows) if math.isfinite(self._most[row])]
        size = max(PIECE // self._logits.shape[-1], 1)
        for first in range(0, len(places), size):
            some = places[first : first + size]
            self._together([rows[place] for place in some], partial(best, some))

    def _together(self, rows: list[int], best: Callable[[torch.Tensor], list[int | None]]) -> None:
        generators = [self._generators[row] for row in rows]
        before = [generator.get_state() for generator in generators]
        uniforms = _room.numbers("uniforms", len(rows), self._logits.shape[-1], torch.float64)
        for own, generator in zip(uniforms, generators, strict=True):
            own.uniform_(generator=generator)
        for row, generator, state, token in zip(rows, generators, before, best(uniforms), strict=True):
            if token is None:
                generator.set_state(state)
            else:
                self._tokens[row] = token


def _of_what_is_left(
    sampling: Sampling, logits: torch.Tensor, rows: torch.Tensor, some: Likeliest | None
) -> tuple[torch.Tensor, Best]:
    """What `rows` of `logits` draw from, and how the best of it is found."""
    if some is None:
        shares = filtered(sampling, chosen(logits, rows)).softmax(-1)
        return shares, lambda at, uniforms: _best_of_all(_rows(shares, at), uniforms)
    doubtful = some.doubtful(sampling, logits.shape[-1])
    likely = some.shares * (some.left | doubtful)
    return likely, lambda at, uniforms: _best_of_few(some.ids[at], likely[at], doubtful[at], uniforms)


def _rows(shares: torch.Tensor, rows: list[int]) -> torch.Tensor:
    """Some rows, in order; neighbours are not copied."""
    return shares[rows[0] : rows[-1] + 1] if rows[-1] - rows[0] < len(rows) else shares[rows]


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
    ids: torch.Tensor, shares: torch.Tensor, doubtful: torch.Tensor, uniforms: torch.Tensor
) -> list[int | None]:
    """The best of the likeliest tokens `ids` of each row of [rows, columns]; None: two are nearly level, or it is
    `doubtful` whether the filters leave it."""
    scores, places = (shares / _exponential(uniforms.gather(1, ids))).topk(min(2, ids.shape[1]), -1)
    clear = scores[:, 0].isfinite() & ~doubtful.gather(1, places[:, :1])[:, 0]
    if ids.shape[1] > 1:
        clear &= scores[:, 1] < scores[:, 0] * (1 - NEAR)
    if ids.shape[1] < uniforms.shape[1]:
        clear &= ~doubtful[:, -1]  # those behind it may be left too
    tokens = ids.gather(1, places[:, :1])[:, 0].tolist()
    return [token if well else None for token, well in zip(tokens, clear.tolist(), strict=True)]


def _best_of_all(shares: torch.Tensor, uniforms: torch.Tensor) -> list[int | None]:
    """The best columns of each row of [rows, columns]; None: two are nearly level.

    A share over its uniform is as good as a token can be: those are looked at for which this is no less than what
    the best by it has.
    """
    rows, columns = shares.shape
    blocks = -(-columns // BLOCK)
    at_most = _room.numbers("at most", rows, blocks * BLOCK)
    at_most[:, columns:] = -1.0  # no token
    torch.div(shares, at_most[:, :columns].copy_(uniforms), out=at_most[:, :columns])
    at_most = at_most.view(rows, blocks, BLOCK)
    peaks = at_most.amax(-1)
    every, block = torch.arange(rows), peaks.argmax(-1)
    best = block * BLOCK + at_most[every, block].argmax(-1)
    least = shares[every, best] / _exponential(uniforms[every, best]) * (1 - NEAR)
    row, block = (peaks >= least[:, None]).nonzero(as_tuple=True)
    place, within = (at_most[row, block] >= least[row, None]).nonzero(as_tuple=True)
    row, column = row[place], block[place] * BLOCK + within
    scores = shares[row, column] / _exponential(uniforms[row, column])
    found: list[list[tuple[float, int]]] = [[(0.0, 0)] for _ in range(rows)]
    for at, token, score in zip(row.tolist(), column.tolist(), scores.tolist(), strict=True):
        found[at].append((score, token))
    return [_clear(scored) for scored in found]


def _clear(scored: list[tuple[float, int]]) -> int | None:
    """The token with the best score; None: another is nearly level, or it is not finite."""
    (second, _), (score, token) = sorted(scored)[-2:] if len(scored) > 1 else [*scored, (0.0, 0)]
    return token if second < score * (1 - NEAR) and score < float("inf") else None


def _inside(sampling: Sampling, shares: torch.Tensor, uniforms: torch.Tensor) -> list[int | None]:
    """The best of all tokens of each row of [rows, vocabulary], if `top_p` and `min_p` surely leave it; else None."""
    tokens = _best_of_all(shares, uniforms)
    if sampling.top_p == 1 and not sampling.min_p:
        return tokens
    own = shares.gather(1, torch.tensor([[token or 0] for token in tokens]))
    inside = own[:, 0] >= sampling.min_p * shares.amax(-1) * (1 + CLOSE)
    if sampling.top_p < 1:
        before = shares.where(shares >= own, 0.0).sum(-1) - own[:, 0]  # and those that are as likely
        inside &= before < sampling.top_p - 2 * ROUNDING * shares.shape[1] - CLOSE
    return [token if well else None for token, well in zip(tokens, inside.tolist(), strict=True)]
