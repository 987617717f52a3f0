"""What the front tells beside the engine's records: all go through one queue, in order."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from neustream.engine.events import Record

Kind = Literal["text", "image", "preview"]
"""A preview is of another request, and no request of a client."""


@dataclass(frozen=True, slots=True)
class Asked:
    """A request is about to be handed to the engine under this id.

    `prompt_tokens`, `max_tokens`: of texts; None: not known.
    """

    id: str
    model: str
    kind: Kind
    prompt_tokens: int | None = None
    max_tokens: int | None = None


@dataclass(frozen=True, slots=True)
class Unasked:
    """The engine would not have it."""

    id: str


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
