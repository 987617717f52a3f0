"""`neustream sweep`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from neustream.analysis.tables import new_table
from neustream.commands.options import BoundOption, ConfigArgument, PolicyOption, SetOption
from neustream.commands.printing import console, new_progress, write_json, wrote
from neustream.commands.reach import chosen_policies, reach_of
from neustream.config import SWEEPABLE, Experiment, load_experiment
from neustream.engine.trace import EventLog
from neustream.errors import ConfigError, nearest
from neustream.experiment import prepare, record, simulate, sweep_points


def command(
    config: ConfigArgument,
    over: Annotated[str, typer.Option(help=f"What to vary: {', '.join(SWEEPABLE)}.")],
    out: Annotated[Path, typer.Option(help="Folder for sweep.json and the figures.")],
    values: Annotated[str | None, typer.Option(help="Comma-separated; default: the config's own sweep.")] = None,
    policy: PolicyOption = None,
    set_: SetOption = None,
    bound: BoundOption = False,
) -> None:
    """Simulate an experiment at several rates, burstinesses or SLOs, and draw what comes out."""
    from neustream.analysis.plots import plot_batches, plot_sweep

    if over not in SWEEPABLE:
        raise ConfigError(f"cannot sweep {over!r}; {nearest(over, SWEEPABLE)}")
    default = load_experiment(config, set_ or ()).sweeps.get(over)
    if values is None and default is None:
        raise ConfigError(f"{config} has no sweep over {over}; give --values")
    held = [f"{key}={value}" for key, value in default.at.items()] if default else []
    experiment = load_experiment(config, [*held, *(set_ or ())])
    points = list(
        sweep_points(experiment, over, _numbers(values) if values is not None else default.values if default else [])
    )
    names = chosen_policies(config, experiment, policy)
    records: list[dict[str, Any]] = []
    logs: dict[str, EventLog] = {}
    with new_progress() as progress:
        task = progress.add_task(f"sweeping {over}", total=len(points) * (len(names) + bound))
        for at, (value, variant) in enumerate(points):
            prepared = prepare(variant)
            reach = reach_of(prepared, bound, None, names, progress, task)
            for name in names:
                progress.update(task, description=f"{over}={value:g} {name}")
                observers = []
                if at == len(points) - 1:
                    observers.append(logs.setdefault(name, EventLog()))
                report = simulate(prepared, name, observers)
                records.append({"over": over, "value": value, **record(variant, name, report), **reach(report)})
                progress.advance(task)
    write_json(out / "sweep.json", records)
    console.print(_sweep_table(experiment, over, names, records))
    paths = plot_sweep(records, over, names, experiment.name, out)
    stage = next((name for name, stage in experiment.stages.items() if stage.times), list(experiment.stages)[-1])
    title = f"{experiment.name}, {over}={points[-1][0]:g}"
    paths.append(plot_batches(logs, stage, title, out / "batches.png"))
    for path in [out / "sweep.json", *paths]:
        wrote(path)


def _numbers(values: str) -> list[float]:
    try:
        return [float(value) for value in values.split(",")]
    except ValueError:
        raise ConfigError(f"--values {values!r}: expected numbers separated by commas") from None


def _sweep_table(experiment: Experiment, over: str, names: Sequence[str], records: Sequence[dict[str, Any]]) -> Table:
    submitted = max(entry["counts"]["submitted"] for entry in records)
    bounded = "bound" in records[0]
    table = new_table(
        f"{experiment.name}: requests on time of {submitted}", over, [*names, *(["bound"] if bounded else [])]
    )
    for value in dict.fromkeys(entry["value"] for entry in records):
        some = [entry for entry in records if entry["value"] == value]
        row = [str(entry["counts"]["on_time"]) for entry in some]
        table.add_row(f"{value:g}", *row, *([f"{some[0]['bound']['value']:g}"] if bounded else []))
    return table
