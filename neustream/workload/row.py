"""The normal form of a trace: one request a row, whatever file it came from. Times are seconds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, NamedTuple

NO_PARAMS: Mapping[str, Any] = MappingProxyType({})


class Row(NamedTuple):
    """One request of a trace; None where the file does not say.

    `arrival_s` counts from the file's own zero until the rows are taken (`take`), then from the
    first of them. `slo_s` is for the whole request, `slo_ttft_s` for the first token, `slo_tpot_s`
    for each further one, all from its arrival; `slo_class` names a class of the config's `slo`.
    `images` go into a prompt, `frames` come out. `hash_ids` name the blocks of a prompt, so that
    equal beginnings can be seen. `params` are other parameters of the request. `line` is where the
    row stood in its file.
    """

    arrival_s: float | None = None
    steps: int | None = None
    width: int | None = None
    height: int | None = None
    frames: int | None = None
    images: int | None = None
    prompt_tokens: int | None = None
    output_tokens: int | None = None
    max_tokens: int | None = None
    slo_s: float | None = None
    slo_ttft_s: float | None = None
    slo_tpot_s: float | None = None
    slo_class: str | None = None
    session: str | None = None
    model: str | None = None
    hash_ids: tuple[int, ...] | None = None
    params: Mapping[str, Any] = NO_PARAMS
    line: int = 0


@dataclass
class Notes:
    """What reading a trace came across that its user should know."""

    skipped: Counter[str] = field(default_factory=Counter)
    """Why rows were left out -> how many."""
    unused: set[str] = field(default_factory=set)
    """Columns that the normal form has no place for."""
    origin: str = ""
    """What the first row said, where arrivals are dates."""
    disordered: int = 0
    """Rows that came earlier than one before them in the file."""

    def lines(self) -> list[str]:
        """One sentence each."""
        out = [f"{_rows(count)} skipped: {why}" for why, count in sorted(self.skipped.items())]
        if self.disordered:
            out.append(f"{_rows(self.disordered)} out of order, sorted by arrival")
        if self.unused:
            out.append(f"columns not used: {', '.join(sorted(self.unused))}")
        return out


def _rows(count: int) -> str:
    return f"{count:,} row" + ("s" if count != 1 else "")
