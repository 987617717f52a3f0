"""The profiles of an experiment, measured on the mount that serves it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from neustream.backends import ConfigModel
from neustream.backends.making import make_model, wanted_of
from neustream.config.schema import Experiment, StagesExperiment
from neustream.core.graph import Graph
from neustream.core.profile import LatencyProfile, units_of
from neustream.core.types import Request
from neustream.engine.clock import stopwatch
from neustream.errors import ConfigError
from neustream.experiment.pipelines import LlmPipeline, Pipeline, StagesPipeline, pipeline_of
from neustream.graphs import llm_profiles
from neustream.profiling.costs import TOGETHER, engine_costs
from neustream.profiling.files import EngineCosts, Measurement, save
from neustream.profiling.measuring import go_through, measure, profiles_of, versions
from neustream.profiling.steps import StepsFile, save_steps, steps_of
from neustream.service.bench import Bench
from neustream.service.mount import Call

SAMPLE_ROUNDS = 4
"""Rounds of each loop in the requests that stages outside of loops are measured with."""
LOOPED_ROUNDS = 24
"""The same for stages in loops: what a request's first round has to do more should not weigh more than it does."""

Tick = Callable[[str, int, float], None]
"""Told of each step that is measured: stage, batch and seconds."""


@dataclass(frozen=True)
class Measured:
    """What was measured, where and with what."""

    model_name: str
    device_name: str
    origin: Mapping[str, Any]
    engine: EngineCosts


def measure_experiment(
    pipeline: StagesPipeline,
    device: str,
    repeats: int,
    warmup: int,
    seconds: float,
    tick: Tick,
    on_limit: Callable[[str, int, BaseException], None],
) -> tuple[dict[str, list[Measurement]], Measured]:
    """Time every stage of a pipeline's real model, each in about `seconds`."""
    experiment = pipeline.experiment
    began = stopwatch()
    model, wanted = make_model(experiment, device), wanted_of(pipeline)
    measured: dict[str, list[Measurement]] = {}
    own: dict[str, str] = {}

    def told(mine: str, batch: int, seconds: float) -> None:
        tick(own[mine], batch, seconds)

    def limited(mine: str, batch: int, error: BaseException) -> None:
        on_limit(own[mine], batch, error)

    with Bench(model.mount(wanted), device) as bench:
        load_s = stopwatch() - began
        graph, params = sampled(bench, model, pipeline.sample(SAMPLE_ROUNDS))
        mine = {stage: bench.modules[stage] for stage in graph.stages}
        go_through(graph, mine, params(0), device=device, out_of_memory=model.out_of_memory)
        for name, stage in pipeline.configs.items():
            rounds = pipeline.sample(LOOPED_ROUNDS if stage.times else SAMPLE_ROUNDS)
            graph, params = sampled(bench, model, rounds)
            own.update({mine: model.stage_of(wanted, "", mine) or mine for mine in graph.stages})
            measured |= measure(
                graph,
                {mine: bench.modules[mine] for mine in graph.stages},
                params,
                device=device,
                repeats=repeats,
                warmup=warmup,
                seconds=seconds,
                sync=model.sync,
                tick=told,
                out_of_memory=model.out_of_memory,
                on_limit=limited,
                stages=[mine for mine in graph.stages if own[mine] == name],
            )
        costs = _costs(bench, model, pipeline, profiles_of(measured), device, load_s)
    named = {own[mine]: [replace(one, stage=own[mine]) for one in some] for mine, some in measured.items()}
    origin = {"how": "neustream profile", "config": experiment.name, "dtype": model.dtype, "versions": versions()}
    return named, Measured(model.model_name, model.label(device), origin, costs)


def sampled(
    bench: Bench, model: ConfigModel, rounds: Mapping[str, Any]
) -> tuple[Graph, Callable[[int], Mapping[str, Any]]]:
    """The graph of sample requests with so many rounds of each loop, and their parameters by number."""

    def call(at: int) -> Call:
        args, named = model.arguments({**model.params(at), **rounds})
        return bench.call(*args, **named)

    return call(0).graph, lambda at: call(at).params


def _costs(
    bench: Bench,
    model: ConfigModel,
    pipeline: Pipeline[Experiment],
    profiles: Mapping[str, LatencyProfile],
    device: str,
    load_s: float,
) -> EngineCosts:
    """What the engine adds to the steps of a model that was just measured.

    `profiles`: of the stages of the mount; `load_s`: what it took until the model was there.
    """
    experiment, wanted = pipeline.experiment, wanted_of(pipeline)
    named = {model.stage_of(wanted, "", stage) or stage: profile for stage, profile in profiles.items()}
    few = experiment.workload.model_copy(update={"requests": TOGETHER, "trace": None})
    drawn = pipeline_of(experiment.model_copy(update={"workload": few})).draw(named, model.params)
    model.lengths = drawn.lengths

    def called(request: Request) -> Request:
        args, arguments = model.arguments(request.params, drawn.lengths.get(request.id))
        call = bench.call(*args, **arguments)
        return Request(request.id, call.graph, params=call.params)

    for request in drawn.requests:
        called(request)  # a first call of its kind makes its stages known
    pool = replace(bench.pool, stages=tuple(profiles))
    calls = [partial(called, request) for request in drawn.requests]
    costs = engine_costs([pool], profiles, bench.modules, calls, device)
    return costs.model_copy(update={"load_s": load_s})


def profile_shapes(
    experiment: Experiment,
    device: str,
    shapes: Sequence[tuple[int, int]],
    out: Path | str,
    seconds: float,
    progress: bool,
) -> list[Path]:
    """Time a pipeline's stages at some sizes (height, width), into files for `serve(pipe, profiles=out)`."""
    model = make_model(experiment, device)
    pipe = getattr(model, "pipe", None)
    if pipe is None or not isinstance(experiment, StagesExperiment):
        raise ConfigError(f"config {experiment.name!r}: sizes are measured for backend.kind 'diffusers' only")
    from neustream.backends.diffusers import profile

    own = {name: value for name, value in model.params(0).items() if name not in ("steps", "seed")}
    calls = [{**own, "height": height, "width": width} for height, width in shapes]
    batches = {name: stage.max_batch for name, stage in experiment.stages.items()}
    looped = max((batches[name] for name, stage in experiment.stages.items() if stage.times), default=16)
    return profile(pipe, calls, out, max_batch=looped, measure_s=seconds, progress=progress)


def profile_steps(pipeline: LlmPipeline, device: str, out: Path | str, seconds: float, tick: Tick) -> StepsFile:
    """Time the steps of a language model, into its profile's file under `out`."""
    began = stopwatch()
    model = make_model(pipeline.experiment, device)
    load_s = stopwatch() - began
    file = model.steps(seconds, tick)
    profiles = llm_profiles(pipeline.label, steps_of(file), pipeline.experiment.llm.max_batch)
    if pipeline.sees:
        looks = model.see(pipeline.experiment.llm.max_batch)
        profiles[f"{pipeline.label}.see"] = units_of(*profiles_of({"see": looks}, file.device).values())
        save({pipeline.see_file.stem: looks}, out, model=file.model, device=file.device, origin=file.origin)
    began = stopwatch()
    with Bench(model.mount(wanted_of(pipeline, profiles)), device) as bench:
        load_s += stopwatch() - began
        file = file.model_copy(update={"engine": _costs(bench, model, pipeline, profiles, device, load_s)})
    save_steps(file, Path(out) / pipeline.steps_file.name)
    return file
