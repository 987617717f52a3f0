"""What goes between a cluster's driver and its instances beside the head's own messages."""

from __future__ import annotations

import importlib.util
import pickle
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from neustream.backends.ray.telling import OfSteps
from neustream.cluster.happenings import Entered
from neustream.cluster.messages import Report
from neustream.core.graph import Graph, Stage
from neustream.core.outlook import Asked
from neustream.core.profile import LatencyProfile
from neustream.core.types import SLO
from neustream.errors import BackendError, NeustreamError, RequestError, RequestFailed, told
from neustream.service.requests import Moved

TOKENS = 64
"""Prompts of no more are alike."""
START_S = 600.0
"""How long instances may take to start."""
MAIN = b"__main__"
"""In bytes of what pickle knows by its name in the main program, which is another one elsewhere."""
ITEM, PRINT = "item", "print"
"""Of an output on its way: what its reader gets, and a hash by which it is known again."""


@dataclass(frozen=True, slots=True)
class Joined:
    """An instance that serves.

    Args:
        device: its kind; `place`: where it is, for people. pid: of its process.
        graphs: those it knows already; profiles: of their stages.
        models: that it has, by name; stages: names of those that it serves (see `Service`); None: all.
    """

    device: str
    place: str
    pid: int
    graphs: tuple[Graph, ...]
    profiles: Mapping[str, LatencyProfile]
    models: tuple[str, ...]
    stages: tuple[str, ...] | None = None


@dataclass(frozen=True, slots=True)
class Described:
    """What a request is, as an instance that looked at its arguments says."""

    graph: Graph
    asked: Asked
    slo: SLO
    profiles: Mapping[str, LatencyProfile]
    streams: bool

    @property
    def steps(self) -> int:
        """Calls of looped stages that it is expected to take; of all, where none is looped."""
        return self.asked.steps(self.graph)


@dataclass(frozen=True, slots=True)
class Guess:
    """What a request was taken for that nobody had looked at before it was routed.

    `sizes`: of its stages' first calls; those of language models are tokens of the prompt.
    """

    graph: str
    steps: int
    sizes: Mapping[str, float]

    @classmethod
    def of(cls, described: Described) -> Guess:
        sizes = {name: calls.size for name, calls in described.asked.calls.items()}
        return cls(described.graph.name, described.steps, sizes)

    def holds(self, found: Guess, graph: Graph) -> bool:
        """Whether it is good enough for what a request, of `graph`, was found to be."""
        if (self.graph, self.steps) != (found.graph, found.steps):
            return False
        stages = graph.stages
        return all(_near(stages[name], size, found.sizes.get(name, size)) for name, size in self.sizes.items())


def _near(stage: Stage, one: float, other: float) -> bool:
    """Whether sizes are as good as the same: prompts of one length have more or fewer tokens."""
    return one == other or (stage.caches and max(one, other) <= max(TOKENS, 2 * min(one, other)))


@dataclass(frozen=True, slots=True)
class News:
    """A report of an instance. `value`: what its caller gets of a request that is over, pickled."""

    report: Report
    value: bytes = b""


@dataclass(frozen=True, slots=True)
class Heard:
    """What an instance has to say. `records`: of its steps and of who came, on the cluster's clock.

    `surprises`: requests that are not what they were taken for.
    """

    news: Sequence[News]
    records: Sequence[OfSteps | Entered] = ()
    surprises: Sequence[str] = ()


@dataclass(frozen=True, slots=True)
class Left:
    """A request that left an instance. `heard`: outputs that the head has for certain.

    `waited_s`: since it left. `asked`: a hash of what was asked.
    """

    moved: Moved
    heard: int
    waited_s: float
    asked: bytes = b""


class EngineDied(BackendError):
    """The engine of an instance serves nothing any more, while its process lives."""


class Superseded(BackendError):
    """Another head has the instances by now."""


class NotMovable(NeustreamError):
    """A request cannot leave its instance."""


def asked_as_bytes(model: str | None, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bytes:
    """A caller's arguments as bytes; RequestError for what cannot leave the process."""
    try:
        return dumps((model, args, dict(kwargs)))
    except Exception as error:  # anybody's objects
        raise RequestError(f"arguments of a request to a cluster go to other processes: {told(error)}") from error


def value_as_bytes(id: str, value: Any, error: BaseException | None) -> bytes:
    """What a caller gets, as bytes: a value, or what is raised."""
    try:
        return dumps((value, error))
    except Exception as fault:  # noqa: BLE001  anybody's objects
        what = "what it returned" if error is None else f"what it raised ({told(error)})"
        reason = f"{what} cannot leave its instance: {told(fault)}"
        return dumps((None, RequestFailed(f"request {id!r}: {reason}", reason=reason)))


def dumps(value: Any) -> bytes:
    """Bytes of any value: functions and classes of a main program too, where Ray is installed."""
    here = importlib.util.find_spec("ray") is not None
    try:
        data = pickle.dumps(value, protocol=5)
        if not (here and MAIN in data):
            return data
    except Exception:  # anybody's objects
        if not here:
            raise
    from ray import cloudpickle

    made: bytes = cloudpickle.dumps(value)
    return made


def loads(data: bytes) -> Any:
    """The value again."""
    return pickle.loads(data)
