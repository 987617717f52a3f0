"""`neustream profile`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from neustream.analysis.tables import new_table
from neustream.backends.measuring import measure_experiment, profile_shapes, profile_steps
from neustream.backends.ray.cluster import check_ray
from neustream.backends.ray.configs import check as check_cluster
from neustream.backends.ray.configs import needs_of
from neustream.backends.ray.costs import cluster_costs
from neustream.commands.interrupts import INTERRUPTED, Interrupts
from neustream.commands.options import ConfigArgument, JsonOption, ModelOption, QuietOption, SetOption, finite
from neustream.commands.outputs import check_folder, check_outputs, json_file, json_output
from neustream.commands.printing import console, hushed, new_progress, note, notes, problems, wrote
from neustream.commands.reach import chosen_policies, naming
from neustream.config.load import load_experiment
from neustream.config.schema import Experiment
from neustream.errors import ConfigError
from neustream.experiment.pipelines import AgentPipeline, LlmPipeline, StagesPipeline, pipeline_of
from neustream.profiling.files import EngineCosts, Measurement, add_costs, save
from neustream.profiling.measuring import default_batches
from neustream.profiling.steps import StepsFile

LARGEST_SIDE = 16384


def command(
    config: ConfigArgument,
    out: Annotated[Path, typer.Option(help="Folder for one JSON file a stage.")],
    device: Annotated[str, typer.Option(help="cpu, cuda:0, ...")] = "cpu",
    repeats: Annotated[int, typer.Option(min=3, max=10_000, help="Timed steps per batch size.")] = 15,
    warmup: Annotated[int, typer.Option(min=0, max=10_000, help="Untimed steps before them.")] = 2,
    size: Annotated[
        list[str] | None,
        typer.Option(help="HEIGHTxWIDTH in pixels, may be repeated: files that serve(pipe, profiles=...) finds."),
    ] = None,
    seconds: Annotated[
        float, typer.Option(min=0.1, max=1e6, help="About how long each stage or --size, or an llm, may take.")
    ] = 120.0,
    cluster: Annotated[
        bool, typer.Option(help="Also serve the workload on the config's cluster, to see what its front adds.")
    ] = False,
    set_: SetOption = None,
    json_: JsonOption = None,
    model: ModelOption = None,
    quiet: QuietOption = False,
) -> None:
    """Measure every stage of an experiment's real model over its batch sizes, and over image sizes if given.

    Of an llm: its steps, over batch sizes, tokens and contexts.
    """
    finite("--seconds", seconds)
    sizes = [_size(text) for text in size or ()]
    with json_output(json_) as write, hushed(quiet):
        experiment = load_experiment(config, set_ or (), model=model)
        pipeline = pipeline_of(experiment)
        check_folder("--out", out, [f"{name}.json" for name in pipeline.measured_names])
        check_outputs(json_file(json_))
        with naming(config):
            if cluster:
                _check_cluster(pipeline, device, sizes)
        policy = chosen_policies(config, experiment, None)[0] if cluster else ""
        with naming(config):
            if sizes:
                paths = profile_shapes(experiment, device, sizes, out, seconds, not quiet)
            else:
                paths = _profile(pipeline, device, out, seconds, repeats, warmup)
            if cluster:
                measured = experiment.model_copy(update={"profiles": out.resolve()})
                _profile_cluster(measured, policy, paths, device)
        write([{"file": str(path), **json.loads(path.read_text("utf-8"))} for path in paths])
        for path in paths:
            wrote(path)


def _profile(
    pipeline: StagesPipeline | LlmPipeline | AgentPipeline,
    device: str,
    out: Path,
    seconds: float,
    repeats: int,
    warmup: int,
) -> list[Path]:
    """Measure what an experiment serves, at its own size."""
    if isinstance(pipeline, LlmPipeline):
        return _profile_llm(pipeline, device, out, seconds)
    if isinstance(pipeline, AgentPipeline):
        raise ConfigError("an agent is simulated alone: measure each of its language models")
    return _profile_stages(pipeline, device, out, seconds, repeats, warmup)


def _profile_llm(pipeline: LlmPipeline, device: str, out: Path, seconds: float) -> list[Path]:
    with notes.status("building the model") as status:

        def tick(stage: str, batch: int, seconds: float) -> None:
            status.update(Text(f"measuring {stage} x{batch}: {seconds * 1e3:.2f} ms"))

        file = profile_steps(pipeline, device, out, seconds, tick)
    console.print(_steps_table(f"{pipeline.name} on {file.device}", file))
    if file.engine is not None:
        _say_costs(file.engine)
    return [out / f"{name}.json" for name in pipeline.measured_names]


def _profile_stages(
    pipeline: StagesPipeline, device: str, out: Path, most_s: float, repeats: int, warmup: int
) -> list[Path]:
    told: list[str] = []

    def tick(stage: str, batch: int, seconds: float) -> None:
        if stage not in told:
            told.append(stage)
            note(progress, f"measuring {stage}")
        progress.update(task, description=f"measuring {stage} x{batch}: {seconds * 1e3:.2f} ms")
        progress.advance(task)

    def limit(stage: str, batch: int, error: BaseException) -> None:
        problems.print(f"{stage!r}: out of memory at batch {batch}, stops at the size before ({error})")

    with new_progress() as progress:
        batches = sum(len(default_batches(stage.max_batch)) for stage in pipeline.configs.values())
        task = progress.add_task("building the model", total=batches * (warmup + repeats))
        measured, about = measure_experiment(pipeline, device, repeats, warmup, most_s, tick, limit)
    console.print(_profile_table(f"{pipeline.name} on {about.device_name}", measured))
    _say_costs(about.engine)
    return save(
        measured, out, model=about.model_name, device=about.device_name, origin=about.origin, engine=about.engine
    )


def _check_cluster(pipeline: StagesPipeline | LlmPipeline | AgentPipeline, device: str, sizes: Sequence[Any]) -> None:
    """ConfigError if there is no cluster that could be served, BackendError if there is no Ray."""
    experiment = pipeline.experiment
    if experiment.cluster is None:
        raise ConfigError("--cluster: the config has no section cluster")
    if sizes:
        raise ConfigError("--cluster and --size: give one of them; the config is served at its own size")
    if isinstance(pipeline, StagesPipeline):
        _check_files(pipeline)
    check_cluster(experiment.cluster)
    needs_of(device, "--device")
    check_ray()


def _check_files(pipeline: StagesPipeline) -> None:
    """ConfigError for a stage whose profile is not the file that measuring it writes."""
    for name, stage in pipeline.configs.items():
        if stage.profile is not None and stage.profile != [name]:
            raise ConfigError(
                f"--cluster: stages.{name}.profile is [{', '.join(stage.profile)}], but measuring the stage writes "
                f"{name}.json, and the cluster is served by what was measured: leave profile out"
            )


def _profile_cluster(experiment: Experiment, policy: str, paths: Sequence[Path], device: str) -> None:
    """Serve the workload under a policy and router, and write what that added to the files."""
    with new_progress() as progress, Interrupts() as interrupts:
        task = progress.add_task(f"serving with {policy}", total=experiment.workload.requests)
        try:
            costs = cluster_costs(experiment, policy, device, partial(progress.advance, task), interrupts.watch)
        finally:
            if interrupts.hit:
                problems.print("interrupted: the files say nothing of the cluster's front")
                raise typer.Exit(INTERRUPTED)
    add_costs(paths, costs.model_dump(include={"there_s", "back_s", "latency_scale"}))
    console.print(
        f"the cluster: {median(costs.there_s) * 1e3:.1f} ms from a call to an instance, "
        f"{median(costs.back_s) * 1e3:.1f} ms back; "
        f"a step takes {costs.latency_scale:.2f} times the above there",
        highlight=False,
    )


def _say_costs(costs: EngineCosts) -> None:
    handover, decision, call = costs.handover_s * 1e6, costs.decision_s * 1e6, costs.call_s * 1e6
    request, new = costs.decision_request_s * 1e6, costs.decision_new_s * 1e6
    console.print(
        f"the engine: {handover:.0f} us from step to step, {call:.0f} us a call, {decision:.0f} us a decision "
        f"and {request:.0f} for each request it is about, {new:.0f} more for a new one; "
        f"a served step takes {costs.latency_scale:.2f} times the above; {costs.load_s:.1f} s to load the model",
        highlight=False,
    )


def _size(text: str) -> tuple[int, int]:
    height, _, width = text.partition("x")
    pixels = [int(side) for side in (height, width) if side.isdecimal() and len(side) <= 5]
    if len(pixels) < 2 or not all(1 <= side <= LARGEST_SIDE for side in pixels):
        raise ConfigError(f"--size {text[:40]!r}: give HEIGHTxWIDTH in pixels from 1 to {LARGEST_SIDE}, as in 512x512")
    return pixels[0], pixels[1]


def _profile_table(title: str, measured: Mapping[str, Sequence[Measurement]]) -> Table:
    table = new_table(title, "stage", ("batch", "median ms", "p90 ms", "spread", "ms per request"))
    for some in measured.values():
        for m in some:
            times = (m.median, m.p90, m.median / m.batch)
            median, p90, each = (f"{seconds * 1e3:.3f}" for seconds in times)
            table.add_row(m.stage, str(m.batch), median, p90, f"{m.spread:.1%}", each)
    return table


def _steps_table(title: str, file: StepsFile) -> Table:
    table = new_table(title, "step", ("requests", "tokens", "median ms"))
    for tokens, seconds in zip(file.prefill.tokens, file.prefill.latency_s, strict=True):
        table.add_row("prefill", "", str(tokens), f"{seconds * 1e3:.3f}")
    for batch, row in zip(file.decode.batch or (), file.decode.latency_s or (), strict=True):
        for context, seconds in zip(file.decode.context or (), row, strict=True):
            table.add_row("decode", str(batch), f"{batch} x {context}", f"{seconds * 1e3:.3f}")
    return table
