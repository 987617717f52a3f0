"""The callers of a cluster: what they are to get; and the machines that a driver needs."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Protocol

from neustream.backends.ray.alike import Likeness
from neustream.backends.ray.wire import ITEM, PRINT, Described, Heard, Joined, loads
from neustream.cluster import messages as to
from neustream.core.events import Emitted
from neustream.core.types import SLO
from neustream.engine.answers import Result
from neustream.errors import RequestError, RequestFailed
from neustream.service.answer import Answer
from neustream.service.service import Service


class Machines(Protocol):
    """Where instances run. All futures are answered on any thread.

    Attributes:
        found: instances of an earlier head, each with its kind; taken: all names that it had used.
        epoch: of this head (see `cluster/epochs.py`); 0: instances end with it.
    """

    found: Mapping[str, str]
    taken: Collection[str]
    epoch: int

    def adopt(self, name: str) -> Future[Joined]:
        """Have an instance that was found listen to this head."""
        ...

    def start(self, name: str, kind: str) -> Future[Joined]:
        """Start an instance of a kind."""
        ...

    def listen(self, name: str, now: float) -> Future[Heard]:
        """What an instance has to report, once there is something; an error: it is dead."""
        ...

    def describe(self, name: str, id: str, payload: bytes, slo: SLO | None) -> Future[Described]: ...

    def inspect(self, name: str, question: Callable[[Service], Any]) -> Future[Any]:
        """What `question` says of the service of an instance; what it raises comes back."""
        ...

    def order(self, name: str, orders: Sequence[to.ToInstance]) -> None: ...

    def pass_on(self, give: to.Give) -> Future[None]:
        """Have a request go from one instance to another; NotMovable if it cannot leave.

        With `keep` a copy of it.
        """
        ...

    def restore(self, order: to.Restore) -> Future[None]:
        """Have a request go on from a copy; NotMovable if it is not kept any more."""
        ...

    def stop(self, name: str, why: str, *, kill: bool) -> None:
        """End an instance; with `kill` whatever it does."""
        ...

    def check_room(self, counts: Mapping[str, int]) -> None:
        """BackendError if there is no room for so many instances of each kind, with those that run."""
        ...

    def leave(self) -> None:
        """Another head has them: nothing goes to any instance any more."""
        ...

    def close(self) -> None:
        """End all instances."""
        ...


@dataclass(eq=False)
class Caller:
    """A request of a caller. `model`: by its name; None: the only one. `values`: what instances said that
    comes of it, by term.

    `prints`: of the outputs that it got; `fault`: why it fails, whatever comes of it. `likeness`: of
    its arguments (see `alike.py`); `guessed`: by that it was routed, nobody looked at it before;
    `refused`: who did then does not take it.
    """

    answer: Answer[Any]
    payload: bytes
    slo: SLO | None
    arrival: float
    model: str | None = None
    likeness: Likeness | None = None
    guessed: bool = False
    refused: bool = False
    described: bool = False
    tries: int = 0
    value: bytes = b""
    prints: list[bytes] = field(default_factory=list)
    fault: RequestError | None = None


@dataclass(eq=False)
class Counts:
    """What became of requests and instances, for people."""

    submitted: int = 0
    on_time: int = 0
    late: int = 0
    dropped: int = 0
    failed: int = 0
    cancelled: int = 0
    refused: int = 0
    moved: int = 0
    unmoved: int = 0
    restarted: int = 0
    lost: int = 0
    downtimes_s: list[float] = field(default_factory=list)


def came_out_different(caller: Caller, made: to.Made) -> bool:
    """Whether an output that is made again is not the one that its caller has."""
    known = caller.prints[made.index : made.index + 1]
    return caller.fault is None and known not in ([], [made.update[PRINT]])


def reader() -> Callable[[Emitted], Any]:
    return item


def item(output: Emitted) -> Any:
    return output.update[ITEM]


def value_of(caller: Caller, result: Result, outputs: Sequence[Emitted]) -> Any:
    """What a caller gets, as it was at the instance; raises what was raised there."""
    if caller.fault is not None:
        raise caller.fault
    value, error = loads(caller.value) if caller.value else (None, None)
    if result.status == "done":
        if not caller.value:
            raise RequestFailed(f"request {result.id!r}: its instance did not say what came of it")
        if error is None:
            return value
    if error is not None:
        raise error
    return result.unwrap()


def of_the_way(error: BaseException) -> bool:
    """Whether an error is of the way to an instance, and not of the request."""
    return type(error).__module__.startswith("ray.")
