"""What the readers of dialects put together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from neustream.bench.plan import Target
from neustream.bench.profiles.marks import Unrunnable
from neustream.bench.profiles.profile import Left, Load, Sweep
from neustream.bench.profiles.sources import Source
from neustream.errors import ConfigError
from neustream.workload.asks import NO_LIMITS, Limits


@dataclass
class Parts:
    """All of a `Profile` that its dialect tells."""

    target: Target
    source: Source | None = None
    loads: tuple[Load, ...] = ()
    sweep: Sweep | None = None
    pause_s: float = 0.0
    warmups: int = 0
    seed: int = 0
    tokenizer: str = ""
    limits: Limits = NO_LIMITS
    constraints: Mapping[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    left: list[Left] = field(default_factory=list)

    def leave(self, key: str, why: str) -> None:
        """Say that a key changes nothing."""
        self.left.append(Left(key, why))


def base_url(key: str, given: str) -> str:
    """A server's URL without the route's version, "" if it is not known yet.

    Raises:
        ConfigError: it is no URL of a server.
    """
    url = given.strip().rstrip("/").removesuffix("/v1")
    if not url:
        return ""
    try:
        split = urlsplit(url)
        whole = split.scheme in ("http", "https") and bool(split.hostname) and split.port != 0
    except ValueError:
        whole = False
    if not whole:
        raise ConfigError(f"{key}: {given!r} is no URL as http://HOST:PORT")
    return url


def each_or_last(values: list[float], number: int, many: int, key: str) -> float:
    """The value of a load: one for all, or one each."""
    if len(values) not in (1, many):
        raise ConfigError(
            f"{key}: {len(values)} values for {many} loads; allowed: one, or one each"
        )
    return values[0] if len(values) == 1 else values[number]


def refuse_media(kind: str) -> Unrunnable:
    """What is said of data with pictures or sound."""
    return Unrunnable(f"{kind}: prompts are texts alone")
