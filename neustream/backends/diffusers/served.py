"""One pipeline of a service: its parts, the shapes of calls that it was asked for, its generators."""

from __future__ import annotations

import inspect
import math
import threading
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Any

from diffusers import DiffusionPipeline

from neustream.backends.diffusers.calls import Call
from neustream.backends.diffusers.journal import generators_of
from neustream.backends.diffusers.measured import ProfileCache
from neustream.backends.diffusers.parts import Parts, state_of
from neustream.backends.diffusers.request import StepCounts, check
from neustream.backends.diffusers.run import Run, encode
from neustream.core.batch import StepInput
from neustream.core.graph import Graph
from neustream.core.job import Job
from neustream.core.profile import LatencyProfile, TableProfile, UnitProfile
from neustream.engine.answers import Result
from neustream.errors import BackendError, RequestError

SAMPLE: Mapping[str, Any] = {"prompt": "a lighthouse in a storm", "class_labels": [0]}
"""What pipelines are measured with at the start, as far as they take it."""


@dataclass(frozen=True, eq=False)
class Shape:
    """Calls whose steps can share batches.

    Args:
        graph: what they go through.
        rows, samples: of a request that counts as one unit of the profiles; elements: of one row.
        profiles: by role, as they were when the shape was first asked for.
    """

    label: str
    graph: Graph
    rows: int
    samples: int
    elements: int
    profiles: Mapping[str, LatencyProfile]


class Served:
    """One pipeline of an engine: its parts, its runs, and the shapes that it has been asked for."""

    def __init__(self, name: str, pipe: DiffusionPipeline, parts: Parts, profile_cache: ProfileCache) -> None:
        self.name = name
        self.pipe = pipe
        self.parts = parts
        self.profile_cache = profile_cache
        self.state = state_of(pipe)
        self.steps = StepCounts(pipe)
        self.shapes: dict[Hashable, Shape] = {}
        self.kinds: dict[Hashable, tuple[Shape, int]] = {}
        self.lock = threading.Lock()

    @property
    def roles(self) -> list[str]:
        """The stages that its requests go through: those without a decoder end with their last step."""
        roles = {part.role for methods in self.parts.values() for part in methods.values()}
        return ["encode", "denoise", *(["decode"] if "decode" in roles else [])]

    def nearest(self, call: Call) -> Shape | None:
        """The known shape whose steps cost most nearly as much as those of `call`; None: there is none."""
        wanted = math.prod(call.shape[0]) * call.rows

        def distance(shape: Shape) -> float:
            return abs(math.log(wanted / (shape.elements * shape.rows)))

        return min(self.shapes.values(), key=distance, default=None)

    def begin(self, given: StepInput) -> Run:
        return Run(
            self.pipe,
            self.parts,
            given.params["arguments"],
            expected=given.params["steps"],
            on_step=given.params.get("on_step"),
        )

    def probe(self, arguments: Mapping[str, Any]) -> Call:
        """The first call of a denoiser that a call of the pipeline makes."""
        run = Run(self.pipe, self.parts, arguments)
        encode([run])
        call = run.parked
        if run.error is not None:
            raise run.error
        if not isinstance(call, Call):
            raise BackendError(f"{type(self.pipe).__name__} ended without a call of a denoiser")
        run.close()
        return call

    def unchanged(self) -> None:
        """RequestError if somebody moved or changed the pipeline since it was served."""
        now = state_of(self.pipe)
        for name, known in self.state.items():
            if now.get(name) == known:
                continue
            what = "replaced or removed" if name not in now or now[name][0] != known[0] else "moved or changed"
            detail = "" if name not in now else f": {known[1:]} before, {now[name][1:]} now"
            raise RequestError(
                f"{name} of {type(self.pipe).__name__} was {what} while it is served{detail}; "
                "close the engine first, then serve the pipeline again"
            )


def label_of(call: Call) -> str:
    """What the shape of a call is named by: a row of the denoiser's first tensor."""
    return "x".join(map(str, call.shape[0]))


def predicted(near: Shape, call: Call, samples: int) -> dict[str, LatencyProfile]:
    """Profiles by role of a new shape, from those of a known one.

    Steps and decodes are taken to cost as much for each element of a row as they do there, encodings
    as much for each sample. Attention costs more than that, overheads less: what is wrong is
    corrected while steps run.
    """
    elements = math.prod(call.shape[0]) / near.elements
    ratios = {
        "encode": samples / near.samples,
        "denoise": elements * call.rows / near.rows,
        "decode": elements * samples / near.samples,
    }
    return {role: _scaled(profile, ratios[role]) for role, profile in near.profiles.items()}


def _scaled(profile: LatencyProfile, ratio: float) -> LatencyProfile:
    """A table whose latencies are so many times those of another one."""
    table = profile.table if isinstance(profile, UnitProfile) else profile
    assert isinstance(table, TableProfile)
    seconds = [latency * ratio for latency in table.latency_s]
    return UnitProfile(TableProfile(table.name, table.batch, seconds, device=table.device))


class Generators:
    """Which request each torch.Generator draws for: one at a time, or results would depend on their order."""

    def __init__(self) -> None:
        self._users: dict[int, str] = {}
        self._lock = threading.Lock()

    def take(self, named: Mapping[str, Any], request: str) -> None:
        mine = [id(generator) for generator in generators_of(named)]
        with self._lock:
            for generator in mine:
                if generator in self._users:
                    raise RequestError(
                        f"the generator of request {request!r} is in use by request {self._users[generator]!r}: "
                        "give each request its own"
                    )
            self._users.update(dict.fromkeys(mine, request))

    def free(self, named: Mapping[str, Any]) -> None:
        with self._lock:
            for generator in generators_of(named):
                self._users.pop(id(generator), None)


def default_sample(served: Served) -> dict[str, Any] | None:
    """A call with the pipeline's defaults; None if it needs more than a prompt or a class."""
    pipe = served.pipe
    parameters = inspect.signature(pipe.__call__).parameters.values()
    sample = {p.name: SAMPLE[p.name] for p in parameters if p.name in SAMPLE}
    needed = [
        p.name
        for p in parameters
        if p.default is p.empty and p.kind is not p.VAR_KEYWORD and p.kind is not p.VAR_POSITIONAL
    ]
    if not sample or set(needed) - set(sample) or any(p.name == "image" for p in parameters):
        return None
    try:
        check(pipe, sample, served.parts.device)
    except Exception:  # it wants other arguments: the first request brings them
        return None
    return sample


def share_of(of: str, usual: int, job: Job) -> float:
    """How many times as many samples or rows as usual a request has: the size of its steps."""
    count: int = job.params[of]
    return count / usual


def output_of(result: Result) -> Any:
    """What the pipeline returned; RequestError if the request has none, and why."""
    output = result.unwrap()
    if "output" not in output:
        raise RequestError(f"request {result.id!r}: the pipeline's call did not end with its last stage")
    return output["output"]
