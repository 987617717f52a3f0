"""`neustream profile`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from neustream.analysis.tables import new_table
from neustream.backends.serving import measure_experiment, profile_shapes, profile_steps
from neustream.commands.options import ConfigArgument, SetOption
from neustream.commands.printing import console, new_progress, problems, wrote
from neustream.config import load_experiment
from neustream.errors import ConfigError
from neustream.profiling import Measurement, default_batches, save
from neustream.stepfile import StepsFile


def command(
    config: ConfigArgument,
    out: Annotated[Path, typer.Option(help="Folder for one JSON file a stage.")],
    device: Annotated[str, typer.Option(help="cpu, cuda:0, ...")] = "cpu",
    repeats: Annotated[int, typer.Option(min=3, help="Timed steps per batch size.")] = 15,
    warmup: Annotated[int, typer.Option(min=0, help="Untimed steps before them.")] = 2,
    size: Annotated[
        list[str] | None,
        typer.Option(help="HEIGHTxWIDTH in pixels, may be repeated: files that serve(pipe, profiles=...) finds."),
    ] = None,
    seconds: Annotated[float, typer.Option(help="About how long each --size, or an llm, may take.")] = 120.0,
    set_: SetOption = None,
) -> None:
    """Measure every stage of an experiment's real model over its batch sizes, and over image sizes if given.

    Of an llm: its steps, over batch sizes, tokens and contexts.
    """
    experiment = load_experiment(config, set_ or ())
    if size:
        for path in profile_shapes(experiment, device, [_size(text) for text in size], out, seconds, True):
            wrote(path)
        return

    def tick(stage: str, batch: int, seconds: float) -> None:
        progress.update(task, description=f"measuring {stage} x{batch}: {seconds * 1e3:.2f} ms")
        progress.advance(task)

    def limit(stage: str, batch: int, error: BaseException) -> None:
        problems.print(f"{stage!r}: out of memory at batch {batch}, stops at the size before ({error})", markup=False)

    if experiment.llm is not None:
        with console.status("building the model") as status:
            file = profile_steps(
                experiment,
                device,
                out,
                seconds,
                lambda stage, batch, seconds: status.update(f"measuring {stage} x{batch}: {seconds * 1e3:.2f} ms"),
            )
        console.print(_steps_table(f"{experiment.name} on {file.device}", file))
        wrote(out / f"{experiment.llm.profile}.json")
        return

    with new_progress() as progress:
        sizes = sum(len(default_batches(stage.max_batch)) for stage in experiment.stages.values())
        task = progress.add_task("building the model", total=sizes * (warmup + repeats))
        measured, about = measure_experiment(experiment, device, repeats, warmup, tick, limit)
    console.print(_profile_table(f"{experiment.name} on {about.device_name}", measured))
    for path in save(measured, out, model=about.model_name, device=about.device_name, origin=about.origin):
        wrote(path)


def _size(text: str) -> tuple[int, int]:
    height, _, width = text.partition("x")
    if not (height.isdecimal() and width.isdecimal() and int(height) and int(width)):
        raise ConfigError(f"--size {text!r}: give HEIGHTxWIDTH in pixels, as in 512x512")
    return int(height), int(width)


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
