"""An experiment on its real models: the service that `neustream.serve` gives, under the config's load."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from neustream.backends import ConfigModel, Wanted
from neustream.backends.making import make_model, wanted_of
from neustream.backends.measuring import SAMPLE_ROUNDS, sampled
from neustream.backends.replaying import OfService, Replay, Sending, Serving
from neustream.config.schema import Config, Experiment
from neustream.config.several import ModelsConfig
from neustream.core.events import Corrected, Ended
from neustream.core.graph import Graph
from neustream.core.types import Request
from neustream.core.work import Walk
from neustream.engine.events import Finished, Observer, Record, Started
from neustream.engine.report import Report
from neustream.errors import BackendError, ConfigError, ProfileError, told
from neustream.experiment.pipelines import AgentPipeline, Pipeline, StagesPipeline, pipeline_of
from neustream.experiment.policies import policy_faults
from neustream.experiment.prepared import Prepared, policy_for, prepare
from neustream.profiling.measuring import measure
from neustream.service.answer import Answer
from neustream.service.bench import Bench
from neustream.service.mount import Mount
from neustream.service.service import Service


class Gallery:
    """Keeps the images of the first requests."""

    def __init__(self, limit: int = 24) -> None:
        self._limit = limit
        self._images: dict[str, Any] = {}

    def add(self, model: ConfigModel, answer: Answer[Any]) -> None:
        """Look at what came of a request."""
        if len(self._images) < self._limit and not answer.cancelled() and answer.exception() is None:
            image = model.image(answer.result())
            if image is not None:
                self._images.setdefault(answer.id, image)

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


@dataclass(frozen=True)
class Part:
    """One model of an experiment.

    Args:
        name: of its mount; "" where it is alone.
        places: the devices that it is on.
    """

    name: str
    pipeline: Pipeline[Experiment]
    model: ConfigModel
    wanted: Wanted
    places: Sequence[str]

    def mount(self) -> Mount:
        """The model, ready to be scheduled."""
        return self.model.mount(self.wanted)

    def stage(self, stage: str) -> str | None:
        """The config's stage that one of the mount is."""
        return self.model.stage_of(self.wanted, self.name, stage)

    def served_as(self, stages: Collection[str]) -> list[str]:
        """Some of the config's stages, as far as they are of this model, by their names in a service."""
        mine = [stage for stage in self.pipeline.graph.stages if stage in stages]
        return [self.model.served_as(self.wanted, self.name, stage) for stage in mine]

    def check_device(self) -> None:
        """ProfileError unless its profiles are of its devices."""
        config = self.pipeline.experiment.backend
        assert config is not None and self.wanted.profiles is not None
        for name, profile in self.wanted.profiles.items():
            for place in self.places:
                here = self.model.label(place)
                if profile.device != here and not config.allow_other_device:
                    raise ProfileError(
                        f"profile {name!r} is of {profile.device!r}, but {place} is {here!r}: "
                        "measure it here with `neustream profile`, or set backend.allow_other_device=true"
                    )

    def warm_up(self) -> None:
        """Run every stage of a pipeline a few times, so that the first real request finds all loaded."""
        with Bench(self.mount(), self.places[0], self.name) as bench:
            self._warm_up(bench)

    def check(self, requests: Sequence[Request], lengths: Mapping[str, int]) -> None:
        """That the mount takes each request, and through the stages that the config says.

        Raises:
            BackendError: which request it is, and why.
        """
        with Bench(self.mount(), self.places[0], self.name) as bench:
            self._warm_up(bench)
            for request in requests:
                try:
                    self.model.check(request.params)
                    args, named = self.model.arguments(request.params, lengths.get(request.id))
                    call = bench.call(*args, **named)
                except Exception as error:  # whatever the model's library has against it
                    raise BackendError(f"request {request.id!r}: {told(error)}") from error
                self._compare(request, call.graph, call.params)

    def _warm_up(self, bench: Bench) -> None:
        if isinstance(self.pipeline, StagesPipeline):
            graph, params = sampled(bench, self.model, self.pipeline.sample(SAMPLE_ROUNDS))
            modules = {stage: bench.modules[stage] for stage in graph.stages}
            measure(graph, modules, params, batches=[1], repeats=2, warmup=1)

    def _compare(self, request: Request, graph: Graph, params: Mapping[str, Any]) -> None:
        """BackendError unless the mount's graph has the config's stages, as often as that says."""
        if graph is request.graph:
            return
        real = _calls(graph, params, self.stage)
        for stage, count in _calls(request.graph, request.params, lambda stage: stage).items():
            if real.get(stage, 0) != count:
                raise BackendError(
                    f"request {request.id!r}: stage {stage!r} runs {count} times in the config's graph and "
                    f"{real.get(stage, 0)} times on {self.model.model_name}; choose another scheduler or number "
                    "of steps, or serve it from Python"
                )


def _calls(graph: Graph, params: Mapping[str, Any], named: Callable[[str], str | None]) -> dict[str, int]:
    """How often each stage of the config is expected to run."""
    found: dict[str, int] = {}
    for stage, count in Walk(Request("check", graph, params=params)).ahead():
        name = named(stage.name)
        if name is not None:
            found[name] = found.get(name, 0) + count
    return found


class Named:
    """An observer that tells others of a service's records by the names of the config's stages."""

    def __init__(self, parts: Sequence[Part]) -> None:
        self.observers: list[Observer] = []
        self._parts = parts
        self._names: dict[str, str] = {}

    def __call__(self, record: Record) -> None:
        if isinstance(record, Finished | Started):
            record = replace(record, step=replace(record.step, stage=self._name(record.step.stage)))
        elif isinstance(record, Corrected):
            record = replace(record, stage=self._name(record.stage))
        for observer in self.observers:
            observer(record)

    def _name(self, stage: str) -> str:
        if stage not in self._names:
            known = [name for part in self._parts if (name := part.stage(stage)) is not None]
            self._names[stage] = known[0] if known else stage
        return self._names[stage]


def experiments_in(config: Config) -> dict[str, Experiment]:
    """The experiment of each model; "" is the name of one that is alone."""
    if isinstance(config, ModelsConfig):
        return config.experiments()
    assert isinstance(config, Experiment)
    return {"": config}


def _check_pools(pipeline: Pipeline[Experiment]) -> None:
    """What is known before a model is built: a profile that is missing, pools that no device has."""
    if isinstance(pipeline, AgentPipeline):
        raise ConfigError("an agent of a config is simulated alone: serve its models and its graph")
    pipeline.load_profiles()
    if len(pipeline.pools) > 1 or pipeline.pools[0].workers > 1:
        raise ConfigError(
            "pools are of simulations: real devices have one worker each, as in `neustream.serve`; "
            "give `devices` for several"
        )


def _places(config: Config, device: str) -> tuple[list[str], dict[str, list[str]]]:
    """The devices, and those of each model; `device` where the config names none."""
    if not isinstance(config, ModelsConfig):
        places = config.devices if isinstance(config.devices, list) else [device] * config.devices
        return places, {"": places}
    if isinstance(config.devices, int):
        if config.placement:
            raise ConfigError(
                "placement: real devices have names; give devices: ['cuda:0', 'cuda:1'] in place of a number"
            )
        return [device] * config.devices, {name: [device] for name in config.models}
    return config.devices, {name: config.placement.get(name, config.devices) for name in config.models}


class Session:
    """An experiment with its models loaded: the same mounts and requests for each policy in turn.

    Raises:
        ConfigError, BackendError, ProfileError: what of the config its models do not offer.
    """

    def __init__(self, config: Config, device: str) -> None:
        self.config = config
        self._device = device
        experiments = experiments_in(config)
        for experiment in experiments.values():
            _check_pools(pipeline_of(experiment))
        self._devices, placement = _places(config, device)
        self._placement = placement if isinstance(config, ModelsConfig) else None
        models = {name: make_model(one, placement[name][0]) for name, one in experiments.items()}
        self.prepared: Prepared = prepare(config, {name: model.params for name, model in models.items()})
        self.gallery = Gallery()
        self._parts = []
        for (name, model), pipeline in zip(models.items(), self.prepared.pipelines, strict=True):
            model.lengths = self.prepared.lengths
            profiles = {stage: self.prepared.profiles[stage] for stage in pipeline.stages}
            part = Part(name, pipeline, model, wanted_of(pipeline, profiles), placement[name])
            self._parts.append(part)
        self._check_devices()
        for part in self._parts:
            part.check(self._of(part), self.prepared.lengths)
        gc.collect()
        gc.freeze()  # the models' objects stay: no step has to wait while they are searched again

    def close(self) -> None:
        """Nothing is served any more."""

    def _check_devices(self) -> None:
        """ProfileError unless all profiles are of the devices that they are for."""
        for part in self._parts:
            part.check_device()

    def _of(self, part: Part) -> list[Request]:
        return [request for request in self.prepared.requests if request.graph is part.pipeline.graph]

    def serve(
        self,
        policy: str,
        observers: Sequence[Observer],
        ended: Callable[[], None],
        started: Callable[[Replay], None],
    ) -> Report:
        """Serve the workload once; `ended` is called after each request, `started` has the replay.

        Raises:
            PolicyError: the policy raised, or decided what cannot be.
        """

        def tick(record: Record) -> None:
            if isinstance(record, Ended):
                ended()

        heard = Named(self._parts)
        with policy_faults(policy):
            with self._serving(policy, heard) as serving:
                report = self._new_report(serving.now())
                replay = Replay(serving, self.prepared.turns, self.prepared.bound())
                heard.observers += [report, *observers, tick]
                started(replay)
                replay.play(map(self._sending, self.prepared.requests))
            replay.tell([report, *observers])
            report.interrupted = replay.interrupted
            if serving.fault is not None:
                raise serving.fault
        return report

    def _new_report(self, start: float) -> Report:
        return Report(start)

    @contextlib.contextmanager
    def _serving(self, policy: str, heard: Named) -> Iterator[Serving]:
        """What serves the workload; it is closed behind that."""
        with Service(
            {part.name: part.mount() for part in self._parts},
            devices=self._devices,
            placement=self._placement,
            policy=policy_for(self.prepared.pipelines, policy),
            forgiving=False,
            observers=[heard],
        ) as service:
            yield OfService(service)

    def _sending(self, request: Request) -> Sending:
        (part,) = [part for part in self._parts if part.pipeline.graph is request.graph]
        arguments = part.model.arguments(request.params, self.prepared.lengths.get(request.id))
        model = part.name or None
        return Sending(request, arguments, model, lambda answer: self.gallery.add(part.model, answer))
