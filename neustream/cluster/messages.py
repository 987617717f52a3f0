"""What head and instances tell each other: frozen values.

A request's *term* grows with each placement. Whoever speaks of an old one is not heard, and what
is meant for an old one changes nothing. A head that begins anew has the next *epoch*, whose terms
are above all of the one before. Seconds are relative to when the message was sent.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from neustream.core.carry import Carry
from neustream.core.events import Emitted, Ended, Update
from neustream.core.job import Status
from neustream.core.outlook import Outlook
from neustream.core.record import record
from neustream.core.types import SLO

HEAD = ""
"""The address of the head; those of instances are their names."""
TERMS = 2**32
"""Terms of an epoch: those of epoch e are above `e * TERMS`."""
Outputs = tuple[tuple[int, Update], ...]
"""Outputs with their numbers, from 0."""

# -- from the head to an instance ------------------------------------------------------------------


@record()
class Send:
    """Serve a request from its start. `age`: since it came. `number`: see `Outlook.heard`.

    `made`: outputs that its caller has. A stream that can go on behind them does; another one makes
    them again. One that is there since before this head began goes on where it is. Answer: `Took`
    or `Refused`.
    """

    instance: str
    id: str
    term: int
    graph: str
    slo: SLO
    params: Mapping[str, Any]
    age: float
    sent_at: float
    number: int
    made: tuple[Update, ...] = ()


@dataclass(frozen=True, slots=True)
class Reserve:
    """Keep room for a request that may come, with so many tokens in the KV cache.

    Answer: `Reserved` or `Refused`.
    """

    instance: str
    id: str
    term: int
    number: int
    tokens: float


@dataclass(frozen=True, slots=True)
class Copy:
    """Copy what is kept of a request to `target` while it goes on. The target answers `Copied`."""

    instance: str
    id: str
    term: int
    target: str
    next_term: int


@dataclass(frozen=True, slots=True)
class Hold:
    """Hold a request at the end of its step. Answer: `Waits`, or `Over` if it ended before."""

    instance: str
    id: str
    term: int


@dataclass(frozen=True, slots=True)
class Give:
    """Pass a held request on to `target`, as a `Parcel`, and keep it held.

    `copied`: tokens that are there already; None: its KV cache is not to be copied at all.
    The target answers `Took` or `Refused`; the source keeps it until `Free` or `Resume`. With
    `keep` the target only keeps a copy, and answers `Kept`.
    """

    instance: str
    id: str
    term: int
    target: str
    next_term: int
    copied: float | None = None
    keep: bool = False


@dataclass(frozen=True, slots=True)
class Restore:
    """Pass the copy of a request that is kept here (as `term`) on to `target`, as a `Parcel`.

    The target answers `Took` or `Refused`; nobody does if it is not here any more.
    """

    instance: str
    id: str
    term: int
    target: str
    next_term: int


@dataclass(frozen=True, slots=True)
class Resume:
    """The move is off: the request goes on where it is."""

    instance: str
    id: str
    term: int


@dataclass(frozen=True, slots=True)
class Free:
    """Forget a request of this term or an older one, what is reserved for it, and a copy of it.

    A copy only if it is of this very term. No answer.
    """

    instance: str
    id: str
    term: int


@dataclass(frozen=True, slots=True)
class Cancel:
    """Its caller gave a request up. Answer: `Over`."""

    instance: str
    id: str
    term: int


@dataclass(frozen=True, slots=True)
class Ask:
    """Tell what is there. Answer: `Here`.

    If `epoch` is newer than the one known, another head begins: nothing is told of what is there
    until that one sends it (`Send`), and older orders are not heard.
    """

    instance: str
    epoch: int = 0


@dataclass(frozen=True, slots=True)
class Past:
    """A request that began anew so often, and where it is; "": nowhere.

    `deaths`: of instances that had it in a step. `term`: of its latest placement. `asked`: a hash
    of what it asks for, where requests of one id can differ in that.
    """

    id: str
    term: int
    where: str
    restarts: int
    deaths: int
    asked: bytes = b""


@dataclass(frozen=True, slots=True)
class Remember:
    """Keep the pasts of requests for the next head, but not of those that are over. No answer.

    `term`: all of the head's are above it.
    """

    instance: str
    term: int
    pasts: tuple[Past, ...] = ()
    over: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Fence:
    """Forget everything: the head counted this instance as gone. Answer: `Fenced`."""

    instance: str


ToInstance = (
    Send | Reserve | Copy | Hold | Give | Resume | Free | Cancel | Ask | Remember | Restore | Fence
)

# -- from the head to whoever runs it --------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Start:
    """Start an instance of `role`; then `Head.joined`, or `Head.not_started`."""

    role: str


@dataclass(frozen=True, slots=True)
class Stop:
    """End an instance, whatever it does; nothing of it counts any more."""

    instance: str
    why: str


@record()
class Answer:
    """The one answer of a request."""

    ended: Ended


@record()
class Forward:
    """An output for the caller; they come in order, each once."""

    emitted: Emitted


Order = ToInstance | Start | Stop | Answer | Forward

# -- from an instance to the head ------------------------------------------------------------------


@record()
class Told:
    """How it is there, now and then."""

    outlook: Outlook


@record()
class Took:
    """A request is there. `unheard`: outputs made before that the head may lack."""

    id: str
    term: int
    unheard: Outputs = ()


@dataclass(frozen=True, slots=True)
class Refused:
    """A request, or room for it, cannot be had; nothing is kept of it."""

    id: str
    term: int
    reason: str


@dataclass(frozen=True, slots=True)
class Reserved:
    """Room is kept."""

    id: str
    term: int


@dataclass(frozen=True, slots=True)
class Copied:
    """So many tokens of a request are here, in advance."""

    id: str
    term: int
    tokens: float


@dataclass(frozen=True, slots=True)
class Kept:
    """A copy of a request is kept."""

    id: str
    term: int


@record()
class Began:
    """A request is in a step for the first time here."""

    id: str
    term: int


@dataclass(frozen=True, slots=True)
class Waits:
    """A request is held, or its next stage (`away`) is served elsewhere: it can be given.

    `tokens`: that it keeps in the KV cache. `left`: calls ahead by stage, where that is known.
    """

    id: str
    term: int
    tokens: float = 0.0
    away: str = ""
    left: Mapping[str, int] = field(default_factory=dict)


@record()
class Made:
    """An output of a request."""

    id: str
    term: int
    index: int
    update: Update


@record()
class Over:
    """A request is over. `waited_s`: from its arrival until it first ran, None: not known here."""

    id: str
    term: int
    status: Status
    reason: str
    output: Update | None
    outputs: int
    waited_s: float | None
    attainable: bool


@dataclass(frozen=True, slots=True)
class Standing:
    """A request that is at an instance, and of which term."""

    id: str
    term: int


@dataclass(frozen=True, slots=True)
class Here:
    """All requests that are there, and what is kept of the pasts of any."""

    standing: tuple[Standing, ...]
    pasts: tuple[Past, ...] = ()


@dataclass(frozen=True, slots=True)
class Fenced:
    """Nothing is there any more."""


OfRequest = Took | Refused | Reserved | Copied | Kept | Began | Waits | Made | Over
Report = Told | OfRequest | Here | Fenced

# -- from an instance to another -------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Piece:
    """State of a request, in advance. `size`: bytes."""

    id: str
    term: int
    tokens: float
    size: float


@dataclass(frozen=True, slots=True)
class Parcel:
    """A request on the move. `term`: the one that it gets.

    `pieces`: what executors keep of it, by pool; `copied`: whether its KV cache comes along.
    `unheard`: outputs that the head may not have heard of; `size`: bytes. `sent_at`: on the
    cluster's clock. `keep`: it is a copy, for when the instance that it comes from is gone.
    """

    id: str
    term: int
    carry: Carry
    pieces: Mapping[str, Mapping[str, Any]]
    copied: bool
    unheard: Outputs
    size: float
    sent_at: float
    keep: bool = False


BetweenInstances = Piece | Parcel
Message = ToInstance | Report | BetweenInstances
