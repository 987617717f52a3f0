"""An experiment on its real model: measuring its profiles, and serving its workload.

Imports no framework itself: the backend that the config names does.
"""

from __future__ import annotations

import gc
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

from neustream.backends import KINDS, LlmBackend, Make, ModelBackend
from neustream.by_name import load_object
from neustream.config.schema import Experiment, StagesExperiment
from neustream.core.events import Emitted, Ended
from neustream.core.profile import LatencyProfile
from neustream.engine.engine import Engine
from neustream.engine.events import Observer, Record
from neustream.engine.executor import ThreadExecutor
from neustream.engine.report import Report
from neustream.errors import (
    BackendError,
    ConfigError,
    NeustreamError,
    ProfileError,
    nearest,
    shown,
    told,
)
from neustream.experiment.pipelines import LlmPipeline, Pipeline, StagesPipeline, pipeline_of
from neustream.experiment.prepared import Prepared, prepare
from neustream.experiment.running import serve
from neustream.graphs import llm_profiles
from neustream.profiling.costs import TOGETHER, engine_costs
from neustream.profiling.files import EngineCosts, Measurement
from neustream.profiling.measuring import measure, module_faults, profiles_of, versions
from neustream.profiling.steps import StepsFile, save_steps, steps_of

NEEDED = {
    "diffusers": ("diffusion", ("torch", "diffusers", "transformers")),
    "transformers": ("llm", ("torch", "transformers", "platformdirs")),
}
"""What the library's own backends import, and the extra that installs it."""


def make_backend(experiment: Experiment, device: str) -> ModelBackend:
    """Build the model that the config's `backend` section describes, for `device`."""
    config = experiment.backend
    if config is None:
        raise ConfigError(f"config {experiment.name!r} has no backend section, so it can only be simulated")
    path = KINDS.get(config.kind, config.kind)
    if ":" not in path:
        raise ConfigError(f"backend.kind {shown(config.kind)}: {nearest(config.kind, KINDS)}; or module:function")
    extra, needed = NEEDED.get(config.kind, ("", ()))
    if missing := [name for name in needed if find_spec(name) is None]:
        raise BackendError(f"backend {config.kind!r} needs {', '.join(missing)}: pip install 'neustream[{extra}]'")
    make: Make = load_object(path, "backend")
    try:
        backend = make(config.options, device)
    except NeustreamError:
        raise
    except (Exception, SystemExit) as error:
        raise BackendError(f"backend {config.kind!r}: making it for {device!r} raised {told(error)}") from error
    if unserved := set(pipeline_of(experiment).labels) - set(backend.modules):
        raise ConfigError(
            f"backend {config.kind!r} has no module for stage(s) {sorted(unserved)}; it has: {sorted(backend.modules)}"
        )
    return backend


@dataclass(frozen=True)
class Measured:
    """What was measured, where and with what."""

    model_name: str
    device_name: str
    origin: Mapping[str, Any]
    engine: EngineCosts


SAMPLE_ROUNDS = 4
"""Rounds of each loop in the requests that stages outside of loops are measured with."""
LOOPED_ROUNDS = 24
"""The same for stages in loops: what a request's first round has to do more should not weigh more than it does."""


def _sampler(pipeline: Pipeline[Experiment], backend: ModelBackend, count: int) -> Callable[[int], dict[str, Any]]:
    rounds = pipeline.sample(count)
    return lambda at: {**backend.params(at), **rounds}


def measure_experiment(
    pipeline: StagesPipeline,
    device: str,
    repeats: int,
    warmup: int,
    tick: Callable[[str, int, float], None],
    on_limit: Callable[[str, int, BaseException], None],
) -> tuple[dict[str, list[Measurement]], Measured]:
    """Time every stage of a pipeline's real model."""
    experiment = pipeline.experiment
    backend = make_backend(experiment, device)
    measured: dict[str, list[Measurement]] = {}
    for name, stage in pipeline.configs.items():
        measured |= measure(
            pipeline.graph,
            {name: backend.modules[name] for name in pipeline.stages},
            _sampler(pipeline, backend, LOOPED_ROUNDS if stage.times else SAMPLE_ROUNDS),
            device=device,
            repeats=repeats,
            warmup=warmup,
            sync=backend.sync,
            tick=tick,
            out_of_memory=backend.out_of_memory,
            on_limit=on_limit,
            stages=[name],
        )
    origin = {"how": "neustream profile", "config": experiment.name, "dtype": backend.dtype, "versions": versions()}
    costs = _costs(pipeline, backend, profiles_of(measured), device)
    return measured, Measured(backend.model_name, backend.device_name, origin, costs)


def _costs(
    pipeline: Pipeline[Experiment],
    backend: ModelBackend,
    profiles: Mapping[str, LatencyProfile],
    device: str,
) -> EngineCosts:
    """What the engine adds to the steps of a model that was just measured."""
    experiment = pipeline.experiment
    few = experiment.workload.model_copy(update={"requests": TOGETHER, "trace": None})
    sample = pipeline_of(experiment.model_copy(update={"workload": few}))
    drawn = sample.draw(profiles, backend.params)
    _give_lengths(backend, drawn.lengths)
    return engine_costs(pipeline.pools, profiles, backend.modules, drawn.requests, device)


def _give_lengths(backend: ModelBackend, lengths: Mapping[str, int]) -> None:
    """Tell a language model after how many outputs each generation ends."""
    if lengths:
        cast(LlmBackend, backend).lengths = lengths


def profile_shapes(
    experiment: Experiment,
    device: str,
    shapes: Sequence[tuple[int, int]],
    out: Path | str,
    seconds: float,
    progress: bool,
) -> list[Path]:
    """Time a pipeline's stages at some sizes (height, width), into files for `serve(pipe, profiles=out)`."""
    backend = make_backend(experiment, device)
    pipe = getattr(backend, "pipe", None)
    if pipe is None or not isinstance(experiment, StagesExperiment):
        raise ConfigError(f"config {experiment.name!r}: sizes are measured for backend.kind 'diffusers' only")
    from neustream.backends.diffusers import profile

    own = {name: value for name, value in backend.params(0).items() if name not in ("steps", "seed")}
    calls = [{**own, "height": height, "width": width} for height, width in shapes]
    batches = {name: stage.max_batch for name, stage in experiment.stages.items()}
    looped = max((batches[name] for name, stage in experiment.stages.items() if stage.times), default=16)
    return profile(pipe, calls, out, max_batch=looped, measure_s=seconds, progress=progress)


def profile_steps(
    pipeline: LlmPipeline,
    device: str,
    out: Path | str,
    seconds: float,
    tick: Callable[[str, int, float], None],
) -> StepsFile:
    """Time the steps of a language model, into its profile's file under `out`."""
    backend = cast(LlmBackend, make_backend(pipeline.experiment, device))
    file = backend.steps(seconds, tick)
    profiles = llm_profiles(pipeline.label, steps_of(file), pipeline.experiment.llm.max_batch)
    file = file.model_copy(update={"engine": _costs(pipeline, backend, profiles, device)})
    save_steps(file, Path(out) / pipeline.steps_file.name)
    return file


class Gallery:
    """An observer that keeps the images of the first requests."""

    def __init__(self, backend: ModelBackend, limit: int = 24) -> None:
        self._backend = backend
        self._limit = limit
        self._images: dict[str, Any] = {}

    def __call__(self, record: Record) -> None:
        if isinstance(record, Emitted) and len(self._images) < self._limit and record.id not in self._images:
            image = self._backend.image(record.update)
            if image is not None:
                self._images[record.id] = image

    def save(self, path: Path | str) -> bool:
        """Write them as one picture; False if there are none."""
        if not self._images:
            return False
        from PIL import Image

        images = list(self._images.values())
        side, columns = max(128, images[0].width), 6
        rows = -(-len(images) // columns)
        grid = Image.new("RGB", (columns * side, rows * side), "white")
        for at, image in enumerate(images):
            grid.paste(image.resize((side, side)), (at % columns * side, at // columns * side))
        grid.save(path)
        return True


def _all_of(places: Mapping[str, Sequence[str]]) -> list[str]:
    return [place for some in places.values() for place in some]


def _warm_up(pipeline: Pipeline[Experiment], backend: ModelBackend, place: str) -> None:
    if isinstance(pipeline, LlmPipeline):
        cast(LlmBackend, backend).warm_up()
        return
    modules = {name: backend.modules[name] for name in pipeline.stages}
    sample = _sampler(pipeline, backend, SAMPLE_ROUNDS)
    measure(pipeline.graph, modules, sample, device=place, batches=[1], repeats=2, warmup=1)


def _replica(backend: ModelBackend, place: str) -> ModelBackend:
    """The same model once more; BackendError for one that cannot."""
    if not hasattr(backend, "replica"):
        name = type(backend).__name__
        raise BackendError(f"{name} has no `replica`, so {place!r} can have one instance")
    return cast(LlmBackend, backend).replica()


class Session:
    """An experiment with its model loaded: the same modules and requests for each policy in turn."""

    def __init__(self, experiment: Experiment, device: str) -> None:
        pipeline = pipeline_of(experiment)
        instances = pipeline.places(device)
        pipeline.load_profiles()  # a missing one is told before a model is built
        devices = dict.fromkeys(place for places in instances for place in _all_of(places))
        backends = {place: make_backend(experiment, place) for place in devices}
        backend = next(iter(backends.values()))
        self.prepared: Prepared = prepare(experiment, backend.params)
        for places in instances:
            self._check(backends, places)
        self.gallery = Gallery(backend)
        self._backends: list[dict[str, ModelBackend]] = []
        """Of each instance, by device."""
        self._executors: list[dict[str, ThreadExecutor]] = []
        """Of each instance, by pool."""
        taken: set[str] = set()
        for places in instances:
            mine: dict[str, ModelBackend] = {}
            for place in dict.fromkeys(_all_of(places)):
                first = backends[place]
                mine[place] = _replica(first, place) if place in taken else first
                _give_lengths(mine[place], self.prepared.lengths)
            taken |= set(mine)
            self._backends.append(mine)
            self._executors.append({name: self._executor(name, mine, some) for name, some in places.items()})

    def _executor(self, pool: str, backends: Mapping[str, ModelBackend], places: Sequence[str]) -> ThreadExecutor:
        """The workers of a pool, one for each place, with the backend there."""
        pipeline = self.prepared.pipeline
        labels = pipeline.modules_on(pool)
        modules = [{label: backends[place].modules[label] for label in labels} for place in places]
        config = pipeline.experiment.backend
        assert config is not None
        with module_faults(f"pool {pool!r}: loading {', '.join(labels)}"):
            return ThreadExecutor(modules, places, check_finite=config.check_finite)

    def _check(self, backends: Mapping[str, ModelBackend], places: Mapping[str, Sequence[str]]) -> None:
        """That each request can be served, and that profiles are of the devices."""
        backend = next(iter(backends.values()))
        for request in self.prepared.requests:
            try:
                backend.check(request.params)
            except BackendError as error:
                raise BackendError(f"request {request.id!r}: {error}") from None
        config = self.prepared.experiment.backend
        assert config is not None
        for pool in self.prepared.pools:
            for name, place in itertools.product(pool.stages, places[pool.name]):
                profile, here = self.prepared.profiles[name], backends[place].device_name
                if profile.device != here and not config.allow_other_device:
                    raise ProfileError(
                        f"profile {name!r} is of {profile.device!r}, but {place} is {here!r}: "
                        "measure it here with `neustream profile`, or set backend.allow_other_device=true"
                    )

    def warm_up(self) -> None:
        """Run every stage a few times, untimed, so that the first real request finds all loaded."""
        for instance in self._backends:
            for place, backend in instance.items():
                _warm_up(self.prepared.pipeline, backend, place)
        gc.collect()
        gc.freeze()  # the model's objects stay: no step has to wait while they are searched again

    def serve(
        self,
        policy: str,
        observers: Sequence[Observer],
        ended: Callable[[], None],
        started: Callable[[Engine], None],
    ) -> Report:
        """Serve the workload once; `ended` is called after each request."""

        def tick(record: Record) -> None:
            if isinstance(record, Ended):
                ended()

        return serve(self.prepared, policy, self._executors, [*observers, self.gallery, tick], started)

    def close(self) -> None:
        for executors in self._executors:
            for executor in executors.values():
                executor.close()

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
