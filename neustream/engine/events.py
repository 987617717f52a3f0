"""What the engine's loop is told (events), and what it tells its observers (records)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from neustream.core import events
from neustream.core.batch import Batch, StepInfo
from neustream.core.events import Update
from neustream.core.graph import Graph
from neustream.core.profile import LatencyProfile
from neustream.core.record import record
from neustream.core.types import SLO, Request
from neustream.errors import NeustreamError

if TYPE_CHECKING:
    from neustream.engine.crossing import Moved
    from neustream.engine.member import Drive
    from neustream.engine.packing import Parcel

Listener = Callable[[events.Emitted], None]
"""Told of a request's outputs as they come."""


@record()
class Done:
    """A step ended: one update (or error) per job, or one error for the whole batch."""

    rank: ClassVar[int] = 0
    batch: Batch
    results: Sequence[Update | NeustreamError] | BaseException


@dataclass(frozen=True, slots=True)
class Cancel:
    """The caller gives request `id` up; `answer` gets whether there was one to end.

    With `request`, the future of a submitted request, only that one is meant: another may have its
    id by then.
    """

    rank: ClassVar[int] = 1
    id: str
    answer: Future[bool]
    request: Future[Any] | None = None


@dataclass(frozen=True, slots=True)
class Submit:
    """A caller's request arrives; `answer` gets its Result."""

    rank: ClassVar[int] = 2
    request: Request
    answer: Future[Any]
    listener: Listener | None = None


@record()
class Arrival:
    """A request of a workload arrives; `source` posted it."""

    rank: ClassVar[int] = 2
    request: Request
    source: object


@dataclass(frozen=True, slots=True)
class Overdue:
    """Some step of a member may have been under way for too long."""

    rank: ClassVar[int] = 3
    drive: Drive


@dataclass(frozen=True, slots=True)
class Extend:
    """More stages for a pool, with their profiles; `answer` is set once they are served.

    `away`: of stages that are served elsewhere.
    """

    rank: ClassVar[int] = 1
    pool: str
    profiles: Mapping[str, LatencyProfile]
    answer: Future[None]
    member: str | None
    away: Mapping[str, LatencyProfile]


@dataclass(frozen=True, slots=True)
class Retire:
    """Stages of a pool that nobody asks for any more; `answer` is set once they are forgotten."""

    rank: ClassVar[int] = 1
    pool: str
    stages: Sequence[str]
    answer: Future[None]
    member: str | None = None


@record()
class Wake:
    """A pool's policy asked to be asked again."""

    rank: ClassVar[int] = 3
    drive: Drive
    pool: str


@record()
class Look:
    """What follows some step of a member is to be planned, at `at`."""

    rank: ClassVar[int] = 3
    drive: Drive
    at: float


@dataclass(frozen=True, slots=True)
class Leave:
    """A member is to go; `answer` is set once it has."""

    rank: ClassVar[int] = 1
    member: str
    answer: Future[None]


@dataclass(frozen=True, slots=True)
class Packed:
    """A worker told what it keeps of a request that is to move."""

    rank: ClassVar[int] = 1
    parcel: Parcel
    pool: str
    pieces: Future[Mapping[str, Any]]


@dataclass(frozen=True, slots=True)
class Unpacked:
    """Workers may take too long to tell what they keep of a request."""

    rank: ClassVar[int] = 3
    parcel: Parcel


@dataclass(frozen=True, slots=True)
class Unfit:
    """A member cannot go on with a request that moved there."""

    rank: ClassVar[int] = 1
    drive: Drive
    id: str
    reason: str


@dataclass(frozen=True, slots=True)
class Give:
    """Request `id` is to leave for another engine; `answer` gets it, as data.

    `cached`: whether what the KV cache holds of it goes along.
    """

    rank: ClassVar[int] = 1
    id: str
    answer: Future[Moved]
    cached: bool = True


@dataclass(frozen=True, slots=True)
class Take:
    """A request of another engine goes on here; `answer` gets the future of its Result."""

    rank: ClassVar[int] = 2
    moved: Moved
    graph: Graph
    answer: Future[Future[Any]]
    listener: Listener | None = None


@dataclass(frozen=True, slots=True)
class Adopted:
    """Workers made what was kept of a request their own, or said why they cannot (`failed`)."""

    rank: ClassVar[int] = 1
    take: Take
    drive: Drive
    failed: str


@record()
class Call:
    """`what(now)` is to be called on the loop's thread."""

    what: Callable[[float], None]
    rank: int = 1


@dataclass(frozen=True, slots=True)
class Stop:
    """No more requests. With `cancel`, open ones end as cancelled; without, they are served."""

    rank: ClassVar[int] = 4
    cancel: bool


Event = (
    Done
    | Cancel
    | Extend
    | Retire
    | Leave
    | Packed
    | Unpacked
    | Unfit
    | Give
    | Take
    | Adopted
    | Submit
    | Arrival
    | Overdue
    | Wake
    | Look
    | Call
    | Stop
)


@dataclass(frozen=True, slots=True)
class Refused:
    """A workload's request could not be accepted (a duplicate id, a graph that is not served)."""

    id: str
    reason: str
    arrival: float
    slo: SLO
    at: float


@record()
class Decided:
    """A policy was asked, in `seconds`; `ahead`: for the step after the one under way.

    `requests`: about so many, of which `new` had not run; about none where the step before stands.
    """

    pool: str
    at: float
    seconds: float
    ahead: bool = False
    member: str = ""
    requests: int = 0
    new: int = 0


@record()
class Started:
    """A step started."""

    step: StepInfo
    at: float
    member: str = ""


@record()
class Finished:
    """A step ended; `error` if it failed as a whole."""

    step: StepInfo
    at: float
    error: str
    member: str = ""


@dataclass(frozen=True, slots=True)
class Gone:
    """A request left for another engine, which accounts for it from now on.

    `steps`: see `Submitted`.
    """

    id: str
    slo: SLO
    steps: int
    at: float
    member: str = ""


Record = events.Event | Refused | Gone | Decided | Started | Finished
Observer = Callable[[Record], None]
