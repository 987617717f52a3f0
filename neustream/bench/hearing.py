"""What all who hear an answer have in common: its end, its failure, its tokens."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from neustream.bench.records import Outcome, Record
from neustream.errors import cut

_DECODE = json.JSONDecoder().decode
"""`json.loads` of bytes guesses at their encoding, which takes longer than all the rest."""
LONGEST = 300
"""Characters of an error that are kept."""
MOST = 10**12
"""The largest count that is believed: what is more is no number of tokens."""
Counter = Callable[[str], int]
"""The number of tokens of a text."""


class Hearing(Protocol):
    """The answer of one request, as it comes in."""

    @property
    def text(self) -> str:
        """What was generated so far."""
        ...

    def feed(self, at: float, chunk: bytes) -> None:
        """Bytes of the body, which came at an instant."""
        ...

    def end(self, at: float, *, whole: bool) -> None:
        """The body is over; `whole`: it came to its end, and was not cut."""
        ...


def fail(record: Record, outcome: Outcome, error: str) -> None:
    """Say that a request failed; what was first said of it stays."""
    if record.outcome == "done":
        record.outcome = outcome
        record.error = line(error, LONGEST)


def told_error(record: Record, said: Mapping[str, Any]) -> None:
    """Keep the message and code of an error, unless another one was told before it."""
    if record.outcome != "done":
        return
    error = said.get("error", said)
    if isinstance(error, dict):
        record.code = line(error.get("code") or error.get("type") or "", 60)
        error = error.get("message") or error.get("detail") or ""
    record.error = line(error, LONGEST)


def line(said: Any, most: int) -> str:
    """What a server says as a line that any terminal can show."""
    text = " ".join(str(said).split())
    return cut("".join(each if each.isprintable() else "?" for each in text), most)


def count_tokens(
    record: Record, usage: Mapping[str, Any], text: str, count: Counter | None
) -> None:
    """The tokens of a request, as the server says, else as the tokenizer does, else by events."""
    prompt = number(usage.get("prompt_tokens"))
    if prompt is not None:
        record.input_tokens = prompt
    told = number(usage.get("completion_tokens"))
    if told is not None:
        record.output_tokens, record.counted_by = told, "usage"
    elif count is not None and text:
        record.output_tokens, record.counted_by = count(text), "tokenizer"
    elif record.token_times_s:
        record.output_tokens, record.counted_by = len(record.token_times_s), "chunks"
    ours = usage.get("neustream")
    if isinstance(ours, dict) and _can_be_written(ours):
        record.server = ours


def judge_length(record: Record, exact: bool) -> None:
    """Fewer tokens than were asked for are a failure where exactly so many were."""
    asked, got = record.asked_tokens, record.output_tokens
    if exact and asked is not None and got is not None and got < asked:
        fail(record, "short", f"{got} of {asked} tokens")


def number(value: Any) -> int | None:
    """A count that a server tells; None for what is none."""
    return value if type(value) is int and 0 <= value <= MOST else None


def _can_be_written(said: dict[str, Any]) -> bool:
    """Whether it is JSON: Python reads infinities and NaN, which are none."""
    try:
        json.dumps(said, allow_nan=False)
    except (ValueError, RecursionError):
        return False
    return True


def object_of(data: bytes) -> dict[str, Any] | None:
    """A JSON object in UTF-8; None for anything else."""
    try:
        found = _DECODE(data.decode())
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None
