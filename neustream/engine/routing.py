"""Which member a new request goes to, where several can serve it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from neustream.core.types import Request


@dataclass(frozen=True, slots=True)
class Load:
    """What a router knows of a member: its open requests, and the seconds of work left in them."""

    name: str
    jobs: int
    work_s: float


class Router(Protocol):
    """A pure rule."""

    def choose(self, loads: Sequence[Load], request: Request) -> int:
        """The place, in `loads`, of the member that is to serve `request`."""
        ...


@dataclass(frozen=True)
class LeastWork:
    """The member with the least work left, each request counted alone; of several the first."""

    def choose(self, loads: Sequence[Load], request: Request) -> int:
        return min(range(len(loads)), key=lambda index: loads[index].work_s)
