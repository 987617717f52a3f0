"""The formats of traces that can be read, by name; each has a file that says what its columns mean.

A format is told by its columns, not by the file's name; of two that fit, the one that needs more of
the columns is meant.
"""

from __future__ import annotations

from collections.abc import Sequence
from difflib import SequenceMatcher

from neustream.errors import nearest
from neustream.workload.cells import shown
from neustream.workload.formats.columns import Column, Format, rows_of
from neustream.workload.formats.diffusion import DIFFUSIONDB, VLLM_OMNI
from neustream.workload.formats.language import AZURE_LLM, AZURE_LMM, BURSTGPT, GUIDELLM, MOONCAKE, VIDUR
from neustream.workload.formats.normal import NEUSTREAM
from neustream.workload.formats.sharegpt import SHAREGPT
from neustream.workload.records import Fault, Records, RequestLines

FORMATS: dict[str, Format] = {
    known.name: known
    for known in (
        NEUSTREAM,
        AZURE_LLM,
        AZURE_LMM,
        BURSTGPT,
        MOONCAKE,
        GUIDELLM,
        VIDUR,
        VLLM_OMNI,
        DIFFUSIONDB,
        SHAREGPT,
    )
}

__all__ = ["FORMATS", "Column", "Format", "choose", "rows_of"]


def choose(records: Records, name: str) -> Format:
    """The format of that name, or for "auto" the one whose columns these are; Fault if none is."""
    if name != "auto":
        if name not in FORMATS:
            raise Fault(f"unknown format {name!r}; {nearest(name, ['auto', *FORMATS])}")
        return FORMATS[name]
    if isinstance(records, RequestLines):
        return VLLM_OMNI
    columns = records.columns()
    fitting = [known for known in FORMATS.values() if set(known.needs) <= set(columns)]
    if fitting:
        return max(fitting, key=lambda known: len(known.needs))
    raise Fault(_nearest_format(columns), records.line)


def _nearest_format(columns: Sequence[str]) -> str:
    """Why no format fits: what the nearest one needs, and what the file has in its place."""
    few = list(columns)[:40]
    closest = max(FORMATS.values(), key=lambda known: _likeness(known, few))
    missing = [name for name in closest.needs if name not in columns]
    place = max(few, key=lambda column: _closeness(missing[0], [column]), default="")
    instead = f" (the file has {shown(place)})" if _closeness(missing[0], [place]) > 0.5 else ""
    listed = ", ".join(map(shown, few[:12])) + (", ..." if len(columns) > 12 else "")
    split = _separator(columns)
    return (
        f"columns of no known format: {listed}{split}; the nearest is {closest.name!r}, which needs "
        f"{missing[0]!r}{instead}; allowed: {', '.join(FORMATS)}"
    )


def _likeness(known: Format, columns: Sequence[str]) -> float:
    """How much of what the format needs is nearly there, and how much of what is there it knows."""
    names = {column.name for column in known.columns}
    needed = sum(_closeness(name, columns) for name in known.needs) / len(known.needs)
    return needed + sum(column in names for column in columns) / max(1, len(columns))


def _separator(columns: Sequence[str]) -> str:
    for character, name in ((";", "semicolons"), ("\t", "tabs"), ("|", "bars")):
        if len(columns) == 1 and character in columns[0]:
            return f" (cells are separated by {name}; allowed: commas)"
    return ""


def _closeness(name: str, columns: Sequence[str]) -> float:
    plain = name.strip().lower()
    return max((SequenceMatcher(None, plain, column[:80].strip().lower()).ratio() for column in columns), default=0.0)
