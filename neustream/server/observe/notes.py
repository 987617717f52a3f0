"""What the front tells beside the engine's records: all go through one queue, in order."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from neustream.core.types import SLO
from neustream.engine.events import Record

Kind = Literal["text", "image", "agent", "preview"]
"""A preview is of another request, and no request of a client."""
Over = Literal["", "dropped", "failed", "cancelled"]


@dataclass(frozen=True, slots=True)
class Asked:
    """A request is about to be handed to the engine under this id.

    `prompt_tokens`, `max_tokens`: of texts; None: not known.
    """

    id: str
    model: str
    kind: Kind
    slo: SLO
    prompt_tokens: int | None = None
    max_tokens: int | None = None


@dataclass(frozen=True, slots=True)
class Unasked:
    """Its answer is there, or the engine would not have it.

    Of a request that the engine never had under this id, `outcome` says what became of it (it was
    given up while what it needs was looked at); "": it was refused. "cancelled": by its client; the
    engine may hear of the request itself a moment later.
    """

    id: str
    outcome: Over = ""
    code: str = ""


@dataclass(frozen=True, slots=True)
class Stopped:
    """The front ends a request that is whole for its client: a stop string was met."""

    id: str


@dataclass(frozen=True, slots=True)
class Arrived:
    """An HTTP request came; ids of the engine's are `id`, or `id` and a number.

    `carrier`: the headers that a trace goes on by; `at`: seconds since 1970.
    """

    id: str
    route: str
    carrier: dict[str, str]
    at: float


@dataclass(frozen=True, slots=True)
class Answered:
    """An HTTP request is over. `status`: 499 if its client went away; `code`: of an error."""

    id: str
    status: int
    code: str
    at: float


Note = Asked | Unasked | Stopped | Arrived | Answered
Told = Record | Note
