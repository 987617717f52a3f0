"""The seam between a model and what serves it: a `Mount` is a model, ready to be scheduled."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from neustream.core.events import Emitted, Update
from neustream.core.graph import Graph, Stage
from neustream.core.kv_cache import KVCache
from neustream.core.profile import LatencyProfile
from neustream.engine.answers import Result
from neustream.engine.events import Observer
from neustream.engine.executor import StreamModule, ThreadExecutor

OWN = "~"
"""What ids of the service's own requests begin with."""
REHEARSAL = f"{OWN}rehearsal/"
"""The same of rehearsals."""

Reader = Callable[[Emitted], Any]
"""Makes of each output, in order, what an iteration over an answer gives."""


def nothing() -> None:
    """What there is to do for most calls once they are over."""


def whole(update: Update) -> Update:
    """What most calls read of an output: all of it."""
    return update


@dataclass(frozen=True, slots=True)
class Behind:
    """A request that begins as another does, and waits for the first output of that one.

    Args:
        id: of the other one; if it is not there, or comes to nothing, nobody waits for it.
        known: parameters that hold once it has had an output, and is still there.
    """

    id: str
    known: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Call:
    """A request as the engine is to serve it, and what its caller gets of it.

    Args:
        graph, params: of the request.
        value: what the answer's `result()` gives, from how the request ended and its outputs; it
            raises where there is none.
        reader: makes a new reader of the outputs; None: nothing streams.
        over: called once the request has ended, however, or could not be submitted.
        reads: what `value` and readers read of an output; where a request moves, the rest of those
            that came does not go along.
        behind: another request that goes first.
    """

    graph: Graph
    params: Mapping[str, Any]
    value: Callable[[Result, Sequence[Emitted]], Any]
    reader: Callable[[], Reader] | None = None
    over: Callable[[], None] = nothing
    reads: Callable[[Update], Update] = whole
    behind: Behind | None = None


@dataclass(frozen=True, slots=True)
class Probe:
    """A request of the mount's own that has to be served first: only the device can tell the rest.

    Args:
        graph, params: of that request.
        then: the call itself, from what came of the probe; called on the engine's thread, so it is
            quick. What it raises is the answer.
        over: as of a Call, if `then` is not reached or raises.
        reader: as of the Call.
    """

    graph: Graph
    params: Mapping[str, Any]
    then: Callable[[Result], Call]
    over: Callable[[], None] = nothing
    reader: Callable[[], Reader] | None = None


@dataclass(frozen=True, slots=True)
class Device:
    """One device of a service: `place` as torch calls it, and the thread that runs its steps.

    `name` tells it from others, where a place has several. `stages`: names of those that are served
    there (see `Service`): nothing else has to be loaded; None: all.
    """

    name: str
    place: str
    executor: ThreadExecutor
    stages: Sequence[str] | None = None


@dataclass(frozen=True, slots=True)
class Instance:
    """A mount's stages on one device: a module and a latency profile for each.

    `check_finite`: fail a request of which a step returned NaN or infinity (a device sync a step).
    `tools`: stages that just start, each in a pool of its own. `own`: stages of requests that are
    the mount's own, which never leave. `roles`: names under which more stages may come.
    """

    modules: Mapping[str, StreamModule]
    profiles: Mapping[str, LatencyProfile]
    check_finite: bool = False
    tools: Mapping[str, Stage] = field(default_factory=dict)
    own: frozenset[str] = frozenset()
    roles: frozenset[str] = frozenset()

    def with_(self, more: Instance) -> Instance:
        """Both together."""
        modules, profiles = {**self.modules, **more.modules}, {**self.profiles, **more.profiles}
        return Instance(modules, profiles, own=self.own | more.own, roles=self.roles | more.roles)


@runtime_checkable
class Shaped(Protocol):
    """A mount whose requests have graphs of several shapes: agents say beforehand which they call."""

    def learn(self, like: Mapping[str, Any]) -> Sequence[Instance]:
        """Serve requests like this from now on, until it is closed; before anybody is served.

        What each of its devices serves more comes back.
        """
        ...


@runtime_checkable
class OfSequences(Protocol):
    """A mount of which `n` sequences are asked at once: its requests take a `seed`, and `like`, another one's id."""

    most_sequences: int


@runtime_checkable
class Speaking(Protocol):
    """A mount of a language model: what comes of a request has a `text`, unless `tokenizer` is None."""

    tokenizer: Any


class Host(Protocol):
    """What a service does for its mounts while it serves."""

    def extend(self, instances: Mapping[str, Instance]) -> None:
        """Serve more stages from now on, by the device's name; requests may come right after."""
        ...

    def retire(self, stages: Mapping[str, Sequence[str]]) -> None:
        """Forget stages that no request has ahead, by the device's name."""
        ...

    def make_way(self) -> None:
        """Another service wants the model: close this one, if nobody can miss it.

        If nobody refers to it any more, this waits until it has served what is open. At a prompt or
        in a notebook, where cells run again, it is closed too, and its requests are cancelled.
        """
        ...


class Mount(Protocol):
    """A model, ready to be scheduled; one object, whatever number of devices it is on.

    What `neustream profile` measures, `neustream run` replays and a service serves is this.

    Attributes:
        device: where the model is before it is opened.
        kv_caches: of its language models on each device, by `Stage.model`; known once it is open.
        step_tokens: the most tokens of a step in which prompts are prefilled in parts; None: any.
        observers: told of every record of the engine that serves it.
    """

    kv_caches: Mapping[str, KVCache]
    step_tokens: int | None
    observers: Sequence[Observer]

    @property
    def device(self) -> str: ...

    def check(self, name: str) -> None:
        """BackendError if it cannot be served under `name`; nothing is changed."""
        ...

    def open(self, name: str, devices: Sequence[Device], host: Host) -> Sequence[Instance]:
        """Get ready on `devices`: an instance for each.

        May measure, on the devices' own threads, while nobody is served there yet.

        Raises:
            BackendError: the model cannot be served there, and why.
        """
        ...

    def request(self, *args: Any, **kwargs: Any) -> Call | Probe:
        """Bind and check the arguments of a caller; never waits for a device.

        Raises:
            RequestError, or what the model's own library raises: for what cannot be served.
        """
        ...

    def rehearsal(self) -> Sequence[Call]:
        """Requests without a promise that would teach it something, to be served while it idles.

        They are cancelled as soon as anybody asks for anything.
        """
        ...

    def close(self) -> None:
        """It is served no more; called once, also if `open` raised."""
        ...
