"""`neustream sweep`."""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from neustream.analysis.tables import counts_requests, new_table
from neustream.commands.completing import sweepable
from neustream.commands.interrupts import INTERRUPTED, raise_unless_pressed
from neustream.commands.options import (
    BoundOption,
    ConfigArgument,
    JsonOption,
    PolicyOption,
    QuietOption,
    SetOption,
)
from neustream.commands.outputs import check_folder, check_outputs, json_file, json_output, json_text, write_text
from neustream.commands.printing import console, hushed, new_progress, note, notes, problems, wrote
from neustream.commands.reach import chosen_policies, naming
from neustream.config import SWEEPABLE, Config, ModelsConfig, experiments_of, load_config
from neustream.cores import cores
from neustream.errors import ConfigError, nearest, shown
from neustream.experiment.pipelines import pipeline_of
from neustream.experiment.running import sweep_points
from neustream.experiment.sweeping import Batches, Kept, Point, Unit, fingerprint, run_units

Points = dict[tuple[float, str], Point]
"""By value and policy."""
KEPT = "points.jsonl"
UNITS = {"workload.rate": ", requests/s", "workload.speed": ", times as fast"}
"""Of those keys that have one."""


def command(
    config: ConfigArgument,
    over: Annotated[str, typer.Option(help=f"What to vary: {', '.join(SWEEPABLE)}.", autocompletion=sweepable)],
    out: Annotated[Path, typer.Option(help=f"Folder for sweep.json, the figures, and {KEPT} to go on from.")],
    values: Annotated[str | None, typer.Option(help="Comma-separated; default: the config's own sweep.")] = None,
    policy: PolicyOption = None,
    set_: SetOption = None,
    bound: BoundOption = False,
    jobs: Annotated[int | None, typer.Option(min=1, max=1024, help="Processes; default: one a core.")] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Simulate again what an earlier sweep has finished.")] = False,
    json_: JsonOption = None,
    quiet: QuietOption = False,
) -> None:
    """Simulate an experiment at several rates, burstinesses or SLOs, and draw what comes out.

    Points run on all cores, and are kept as they finish: after Ctrl-C the same command goes on from there.
    What was kept is used only where config, profiles, traces, policy and code are still the same.
    """
    with json_output(json_) as write, hushed(quiet):
        loaded, numbers = _loaded(config, over, values, set_ or [])
        with naming(config):
            points = list(sweep_points(loaded, over, numbers))
        names = chosen_policies(config, loaded, policy)
        check_folder("--out", out, ("sweep.json", KEPT, "goodput.png", "attainment.png", "batches.png"))
        check_outputs(json_file(json_))
        importlib.import_module("neustream.analysis.plots")  # an error of its own where matplotlib is missing
        stage = _main_stage(loaded)
        units = _units(points, over, names, bound, stage)
        with naming(config):
            done = _simulated(units, out / KEPT, jobs or cores(), fresh)
        records = [dict(done[value, name].entry) for (value, _), name in itertools.product(points, names)]
        write(records)
        write_text(out / "sweep.json", json_text(records))
        console.print(_sweep_table(loaded.name, over, names, records))
        last = points[-1][0]
        batches = {name: some for name in names if (some := done[last, name].batches) is not None}
        with notes.status("drawing figures"):
            paths = _figures(loaded.name, over, records, batches, stage, last, out)
        for path in [out / "sweep.json", *paths]:
            wrote(path)


def _figures(
    name: str,
    over: str,
    records: Sequence[dict[str, Any]],
    batches: Mapping[str, Batches],
    stage: str,
    last: float,
    out: Path,
) -> list[Path]:
    """Draw goodput and attainment over the values, and batch sizes over time at the last."""
    from neustream.analysis.plots import plot_batches, plot_sweep

    paths = plot_sweep(records, over, list(batches), name, out)
    title = f"{name}, {over}={last:g}"
    return [*paths, plot_batches(batches, stage, title, out / "batches.png")]


def _loaded(config: Path, over: str, values: str | None, settings: list[str]) -> tuple[Config, list[float]]:
    """The config with what its sweep holds meanwhile, and the values to try."""
    loaded = load_config(config, settings)
    if over not in loaded.sweepable:
        raise ConfigError(f"cannot sweep {shown(over)}; {nearest(over, loaded.sweepable)}")
    default = loaded.sweeps.get(over)
    if values is None and default is None:
        raise ConfigError(f"{config} has no sweep over {over}; give --values")
    held = [f"{key}={json_text(value)}" for key, value in default.at.items()] if default else []
    numbers = _numbers(values) if values is not None else default.values if default else []
    return load_config(config, [*held, *settings]), list(dict.fromkeys(numbers))


def _main_stage(config: Config) -> str:
    """The stage whose batches are drawn: that of the first model."""
    prefix = f"{next(iter(config.models))}." if isinstance(config, ModelsConfig) else ""
    return pipeline_of(experiments_of(config)[0], prefix).main_stage


def _units(
    points: Sequence[tuple[float, Config]], over: str, names: Sequence[str], bound: bool, stage: str
) -> list[Unit]:
    """A unit for each point and policy; with a bound, which is computed once, for each point."""
    groups = [tuple(names)] if bound else [(name,) for name in names]
    last = points[-1][0]
    return [
        Unit(variant, over, value, group, bound, stage if value == last else None)
        for (value, variant), group in itertools.product(points, groups)
    ]


def _simulated(units: Sequence[Unit], path: Path, jobs: int, fresh: bool) -> Points:
    """The points of all units: those that are kept, and the others as they are simulated, which are kept then."""
    kept, done, left = Kept(path), Points(), list[Unit]()
    keys = {(unit.value, name): fingerprint(unit, name) for unit in units for name in unit.policies}
    for unit in units:
        found = {name: kept.find(keys[unit.value, name], unit.stage is not None) for name in unit.policies}
        if fresh or None in found.values():
            left.append(unit)
        else:
            done |= {(unit.value, name): point for name, point in found.items() if point is not None}
    if len(kept) and not fresh:
        notes.print(
            f"{len(done)} of {len(keys)} points are reused from {path}; "
            f"{len(kept) - len(done)} of another value, config, policy, profile or code are not",
            soft_wrap=True,
        )

    def finished(unit: Unit, points: list[Point]) -> None:
        for name, point in zip(unit.policies, points, strict=True):
            kept.add(keys[unit.value, name], point)
            done[unit.value, name] = point

    try:
        _run(left, jobs, len(keys), lambda: len(done), finished)
    except KeyboardInterrupt:
        raise_unless_pressed("a policy")
        what = f"interrupted: {len(done)} of {len(keys)} points are kept in {path}; the same command goes on from there"
        problems.print(what, soft_wrap=True)
        raise typer.Exit(INTERRUPTED) from None
    return done


def _run(
    units: Sequence[Unit],
    jobs: int,
    total: int,
    count: Callable[[], int],
    finished: Callable[[Unit, list[Point]], None],
) -> None:
    with new_progress() as progress:
        task = progress.add_task(f"simulating on {max(1, min(jobs, len(units)))} process(es)", total=total)
        progress.update(task, completed=count())
        for unit, points in run_units(units, jobs):
            finished(unit, points)
            progress.update(task, completed=count())
            note(progress, f"{count()} of {total}: {unit.over}={unit.value:g} {' '.join(unit.policies)}")


def _numbers(values: str) -> list[float]:
    try:
        return [float(value) for value in values.split(",")]
    except ValueError:
        raise ConfigError(f"--values {shown(values)}: expected numbers separated by commas") from None


def _sweep_table(name: str, over: str, names: Sequence[str], records: Sequence[dict[str, Any]]) -> Table:
    submitted = max(entry["counts"]["submitted"] for entry in records)
    bounded = "bound" in records[0]
    title = f"{name}: requests on time of {submitted}"
    heading = "bound" if bounded and all(map(counts_requests, records)) else "bound (weight)"
    columns = [*names, *([heading] if bounded else [])]
    table = new_table(title, f"{over}{UNITS.get(over, '')}", columns)
    for value in dict.fromkeys(entry["value"] for entry in records):
        some = [entry for entry in records if entry["value"] == value]
        row = [str(entry["counts"]["on_time"]) for entry in some]
        table.add_row(f"{value:g}", *row, *([f"{some[0]['bound']['value']:g}"] if bounded else []))
    return table
