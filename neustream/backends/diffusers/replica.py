"""One pipeline on one device: its parts, its runs, and what is asked of it before it serves."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from diffusers import DiffusionPipeline

from neustream.backends.diffusers.calls import Call
from neustream.backends.diffusers.dry_run import check
from neustream.backends.diffusers.measured import ONCE_STEPS, place_of, timed
from neustream.backends.diffusers.modules import RunModule, Runs
from neustream.backends.diffusers.parts import Parts, models_of, parts_of, roles_of
from neustream.backends.diffusers.request import shortened
from neustream.backends.diffusers.run import Run, decode, encode
from neustream.backends.diffusers.signatures import signature_of
from neustream.backends.diffusers.state import State
from neustream.backends.torch import sync
from neustream.core.batch import StepInput
from neustream.core.events import Update
from neustream.core.graph import Graph
from neustream.errors import BackendError, ProfileError, StageFailed, told
from neustream.profiling.files import Measurement

SAMPLE: Mapping[str, Any] = {"prompt": "a lighthouse in a storm", "class_labels": [0]}
"""What pipelines are measured with at the start, as far as they take it."""


@dataclass(frozen=True, slots=True)
class Dimensions:
    """What the first call of a denoiser shows of a request.

    Args:
        key: requests with the same one can share steps; label: a name for it.
        rows: of the request in such a call; elements: of one row.
    """

    key: Hashable
    label: str
    rows: int
    elements: int

    @classmethod
    def of(cls, call: Call) -> Dimensions:
        sides, dtype = call.shape
        label = "x".join(map(str, sides))
        if dtype != call.part.dtype:  # the caller brought latents of another one
            label += f"-{str(dtype).removeprefix('torch.')}"
        return cls(call.shape, label, call.rows, math.prod(sides))


@dataclass(frozen=True, slots=True)
class Sample:
    """A call that stages are timed with.

    Args:
        named: its arguments; whole: those and the defaults of others.
        steps: that it is expected to take; rows, samples: of its shape.
    """

    named: Mapping[str, Any]
    whole: Mapping[str, Any]
    steps: int
    rows: int
    samples: int

    def params(self, steps: int | None) -> dict[str, Any]:
        """Parameters of a request of so many denoising steps; None: of its own."""
        arguments = shortened(self.named, steps, self.whole)
        expected = self.steps if steps is None else steps
        return {"arguments": arguments, "steps": expected, "rows": self.rows, "samples": self.samples}


class Replica:
    """A pipeline where it runs. One module serves all stages, whatever their shapes.

    Args:
        pipe: on its device.
        buckets, compile, graphs: see `parts_of`.
        check_finite: see `PipelineMount`.

    Attributes:
        place: what profiles measured here are labelled with.
        roles: what each stage does, by its name; more may be added.
        states: of what must not change while it serves: this pipeline, and the one that it is a copy of.
        begin: makes a run of the stock call, when a request first gets to a stage.
        changed: says what of the models is not as it was; empty: nothing. `sampled` also looks into
            weights, which waits for the device.

    Nothing in it refers to itself, so a pipeline that is served no more is freed at once.
    """

    def __init__(
        self,
        pipe: DiffusionPipeline,
        *,
        buckets: Sequence[int] = (),
        compile: bool | Mapping[str, Any] = False,
        graphs: bool | None = None,
        check_finite: bool = True,
    ) -> None:
        self.pipe = pipe
        self.parts = parts_of(pipe, buckets=buckets, compile=compile, graphs=graphs)
        self.place = place_of(pipe)
        self.roles: dict[str, str] = {}
        self.states = [State(pipe, models_of, partial(_scaling, self.parts))]
        self.begin = partial(_begin, pipe, self.parts)
        self._tried = partial(_begin, pipe, self.parts.trial)
        self.changed = partial(_changed, self.states)
        runs = Runs(
            self.begin,
            check_finite=check_finite,
            changed=partial(self.changed, sampled=True),
            settled=partial(sync, self.parts.device),
        )
        self.module = RunModule(runs, self.roles)

    def probe(self, arguments: Mapping[str, Any]) -> Dimensions:
        """Run a stock call up to its first call of a denoiser; on the device's thread.

        Raises what the stock call raises; BackendError if it ends without such a call.
        """
        run = Run(self.pipe, self.parts.trial, arguments)
        try:
            encode([run])
            if run.error is not None:
                raise run.error
            if not isinstance(run.parked, Call):
                raise BackendError(f"{type(self.pipe).__name__} ended without a call of a denoiser")
            return Dimensions.of(run.parked)
        finally:
            run.close()

    def time(
        self,
        graph: Graph,
        roles: Mapping[str, str],
        sample: Sample,
        *,
        seconds: float,
        tick: Callable[[str, int, float], None],
    ) -> dict[str, list[Measurement]]:
        """Measure the stages of a graph by sample requests; on the device's thread.

        With fewer steps or more, if the pipeline takes them; else with those of the sample.
        """
        try:
            return self._time(graph, roles, partial(self._legal, sample), seconds, tick)
        except (ProfileError, StageFailed):
            return self._time(graph, roles, lambda _: sample.params(None), seconds, tick)

    def _time(
        self,
        graph: Graph,
        roles: Mapping[str, str],
        params: Callable[[int], Mapping[str, Any]],
        seconds: float,
        tick: Callable[[str, int, float], None],
    ) -> dict[str, list[Measurement]]:
        runs = Runs(self._tried)
        try:
            modules = dict.fromkeys(roles, RunModule(runs, roles))
            lacking = [stage for stage, role in roles.items() if role in self.parts.lacking]
            return timed(graph, modules, params, self.parts.device, lacking, seconds=seconds, tick=tick)
        finally:
            runs.close()

    def _legal(self, sample: Sample, steps: int) -> Mapping[str, Any]:
        """The parameters of a sample request of so many steps; of its own number if that is fewer or no other goes."""
        if sample.steps <= steps:
            return sample.params(None)
        params = sample.params(steps)
        try:
            self.probe(params["arguments"])
        except Exception:  # noqa: BLE001  the stock call may raise anything
            return sample.params(None)
        return params

    def warm(self, sample: Sample) -> None:
        """Serve a sample request once, so that nobody waits for what happens once; on the device's thread."""
        run = self._tried(StepInput("warm", self._legal(sample, ONCE_STEPS), {}, ""))
        try:
            decode([run])
            if run.error is not None:
                raise BackendError(f"samples: {told(run.error)}") from run.error
        finally:
            run.close()

    @property
    def stage_roles(self) -> list[str]:
        """What the stages do that requests go through, in their order."""
        return roles_of(self.parts)


def _begin(pipe: DiffusionPipeline, parts: Parts, given: StepInput) -> Run:
    params = given.params
    return Run(
        pipe,
        parts,
        params["arguments"],
        expected=params["steps"],
        on_step=params.get("on_step"),
        stepped=params.get("stepped"),
    )


def _changed(states: Sequence[State], *, sampled: bool = False) -> str:
    return next(filter(None, (state.changed(sampled=sampled) for state in states)), "")


def _scaling(parts: Parts) -> bool:
    return any(part.scaling for methods in parts.values() for part in methods.values())


class ProbeModule:
    """The stage at which requests of an unknown kind show their dimensions."""

    def __init__(self, replica: Replica) -> None:
        self._replica = replica

    def load(self, device: str) -> None:
        """Nothing to do: models stay on the device that they are on."""

    def step(self, inputs: Sequence[StepInput]) -> Sequence[Update | StageFailed]:
        return [self._one(given) for given in inputs]

    def _one(self, given: StepInput) -> Update | StageFailed:
        try:
            return {"dimensions": self._replica.probe(given.params["arguments"])}
        except Exception as error:  # noqa: BLE001  the stock call may raise anything
            return failure(error)


def failure(error: BaseException) -> StageFailed:
    """What a stock call raised, as the failure of its stage."""
    if isinstance(error, StageFailed):
        return error
    failed = StageFailed(told(error))
    failed.__cause__ = error
    return failed


def default_sample(pipe: DiffusionPipeline, device: Any) -> dict[str, Any] | None:
    """A call with the pipeline's defaults; None if it needs more than a prompt or a class."""
    parameters = signature_of(pipe).signature.parameters.values()
    sample = {p.name: SAMPLE[p.name] for p in parameters if p.name in SAMPLE}
    needed = [
        p.name
        for p in parameters
        if p.default is p.empty and p.kind is not p.VAR_KEYWORD and p.kind is not p.VAR_POSITIONAL
    ]
    if not sample or set(needed) - set(sample) or any(p.name == "image" for p in parameters):
        return None
    try:
        check(pipe, sample, device)
    except Exception:  # noqa: BLE001  it wants other arguments: the first request brings them
        return None
    return sample
