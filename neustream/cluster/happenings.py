"""What happens in a cluster, for observers: frozen values, on the head's clock."""

from __future__ import annotations

from dataclasses import dataclass

from neustream.core.forecasts import Forecast


@dataclass(frozen=True, slots=True)
class Routed:
    """A request was sent to an instance (again, if `term` is not 1).

    `seconds`: that it took to choose it; `forecast`: what the router says will become of it there.
    """

    id: str
    term: int
    instance: str
    reason: str
    at: float
    seconds: float = 0.0
    forecast: Forecast | None = None


@dataclass(frozen=True, slots=True)
class Entered:
    """A request is in the queues of an instance. Told where instances tell of their steps."""

    id: str
    instance: str
    at: float


@dataclass(frozen=True, slots=True)
class Moved:
    """A request went on elsewhere. `held_at`: since when it had waited there."""

    id: str
    source: str
    target: str
    reason: str
    held_at: float
    at: float


@dataclass(frozen=True, slots=True)
class Unmoved:
    """A move came to nothing; the request goes on where it is, or is over."""

    id: str
    source: str
    target: str
    reason: str
    at: float


@dataclass(frozen=True, slots=True)
class Lost:
    """An instance is gone, with so many requests."""

    instance: str
    why: str
    requests: int
    at: float


@dataclass(frozen=True, slots=True)
class Saved:
    """A copy of a request is kept at another instance. `held_at`: since when it had waited."""

    id: str
    instance: str
    keeper: str
    held_at: float
    at: float


@dataclass(frozen=True, slots=True)
class Restarted:
    """A request begins anew, since the instance it was at is gone. `saved`: from its copy."""

    id: str
    term: int
    why: str
    at: float
    saved: bool = False


@dataclass(frozen=True, slots=True)
class Scaled:
    """There are, or will be, `count` instances of a role that take requests."""

    role: str
    count: int
    at: float


@dataclass(frozen=True, slots=True)
class Succeeded:
    """A head began anew after one that is gone, while so many requests were open."""

    epoch: int
    requests: int
    at: float


Happening = Routed | Entered | Moved | Unmoved | Saved | Lost | Restarted | Scaled | Succeeded
