"""The rows of a trace as requests: texts or images, with the arrivals and promises that it has."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from neustream.errors import ConfigError
from neustream.workload.asks import CAPTION, Ask, ImageAsk, Limits
from neustream.workload.row import Notes, Row
from neustream.workload.sources import Asked
from neustream.workload.texts import Texts
from neustream.workload.trace import ALL, Trace, Window, take

BLOCK = 512
"""Tokens of a block of a prompt (`Row.hash_ids`), as Mooncake has them."""
WORD = 2**64
"""Ids of blocks are told apart up to here."""
BLOCKS, OWN = 4, 5
"""Parts of seeds: texts of blocks, which prompts share, and texts of one request."""


@dataclass(frozen=True)
class TraceFile:
    """A window of a trace.

    `output`: tokens of a text where the trace does not say; `steps`: the same of an image.
    """

    trace: Trace
    window: Window = ALL
    output: int = 128
    steps: int | None = None

    def rows(self) -> tuple[list[Ask], Notes]:
        """The requests without prompts, and what reading came across. ConfigError as of `take`."""
        taken = take(self.trace, self.window)
        return [self._ask(at, row, None, 0) for at, row in enumerate(taken.rows)], taken.notes

    def asks(self, asked: Asked) -> list[Ask]:
        """At most so many of its rows, with the arrivals and promises that they have."""
        number = asked.requests
        most = number if self.window.requests is None else min(number, self.window.requests)
        window = Window(self.window.start_s, self.window.duration_s, most, self.window.speed)
        rows = take(self.trace, window).rows
        return [self._ask(at, row, asked.texts, asked.seed) for at, row in enumerate(rows)]

    def _ask(self, at: int, row: Row, texts: Texts | None, seed: int) -> Ask:
        params = dict(row.params)
        said = params.pop("prompt", None)
        image = self._image(row)
        prompt = said if isinstance(said, str) else ""
        if image is None and row.prompt_tokens is None and not isinstance(said, str):
            raise ConfigError(f"trace {self.trace.path}, line {row.line}: neither steps nor tokens")
        if not prompt and texts is not None:
            tokens = CAPTION if image is not None else row.prompt_tokens or 1
            prompt = prompt_of(row.hash_ids or (), tokens, texts, seed, at)
        output = None if image is not None else row.output_tokens or row.max_tokens or self.output
        return Ask(
            str(at),
            row.arrival_s,
            prompt,
            row.prompt_tokens,
            output,
            image=image,
            limits=_limits(row),
            slo_class=row.slo_class or "",
            session=row.session or "",
            model=row.model or "",
            prefix=row.hash_ids or (),
            params=params,
        )

    def _image(self, row: Row) -> ImageAsk | None:
        if row.steps is None and row.width is None:
            return None
        return ImageAsk(row.width, row.height, row.steps or self.steps, row.frames)


def prompt_of(blocks: Sequence[int], tokens: int, texts: Texts, seed: int, at: int) -> str:
    """A prompt that begins as all others with the same blocks do."""
    size = BLOCK
    if blocks and -(-tokens // BLOCK) != len(blocks):
        size = -(-tokens // len(blocks))
    parts, left = [], tokens
    for block in blocks:
        length = min(size, left)
        if length:
            parts.append(texts.text(length, seed, BLOCKS, block % WORD))  # seeds are not negative
        left -= length
    if left:
        parts.append(texts.text(left, seed, OWN, at))
    return "".join(parts)


def _limits(row: Row) -> Limits:
    given = (row.slo_ttft_s, row.slo_tpot_s, row.slo_s)
    return Limits(*(math.inf if seconds is None else seconds for seconds in given))
