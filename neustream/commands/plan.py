"""`neustream plan`."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from neustream.analysis.tables import new_table
from neustream.cluster.planning import Charges, Placement, Plan, Settings
from neustream.commands.options import (
    ConfigArgument,
    JsonOption,
    PolicyOption,
    QuietOption,
    SetOption,
    finite,
)
from neustream.commands.outputs import check_outputs, json_file, json_output
from neustream.commands.printing import (
    console,
    hushed,
    new_progress,
    note,
    say_notes,
    title_of,
    wrote,
)
from neustream.commands.reach import chosen_policies, naming
from neustream.config import load_config
from neustream.config.cluster import ClusterConfig
from neustream.engine.report import Report
from neustream.errors import ConfigError
from neustream.experiment.clusters import parted
from neustream.experiment.placements import Ground, ground_of, last_of, plan_for
from neustream.experiment.prepared import Prepared, prepare
from neustream.experiment.running import simulate


def command(
    config: ConfigArgument,
    policy: PolicyOption = None,
    set_: SetOption = None,
    last: Annotated[
        float,
        typer.Option(min=1, max=1e6, metavar="SECONDS", help="Plan for the arrivals of the last so many seconds."),
    ] = 60.0,
    tries: Annotated[
        int, typer.Option(min=0, max=10_000, help="Placements with one device changed that are simulated.")
    ] = 24,
    json_: JsonOption = None,
    figure: Annotated[Path | None, typer.Option(help="Draw the placement, as a PNG.")] = None,
    quiet: QuietOption = False,
) -> None:
    """Find which stages of a config's models to put on which of its cluster's devices.

    Candidates by what stages cost are simulated on the load; a change has to gain 3 % and what it
    costs. `cluster.instances` names the devices and what they serve at present.
    """
    finite("--last", last)
    with json_output(json_) as write, hushed(quiet), naming(config):
        check_outputs([*json_file(json_), *([("--figure", figure)] if figure else [])])
        loaded = load_config(config, set_ or ())
        if loaded.cluster is None:
            raise ConfigError("cluster: a placement needs a cluster's devices")
        name = chosen_policies(config, loaded, policy)[0]
        prepared = prepare(loaded)
        say_notes(prepared.notes)
        ground = ground_of(prepared, loaded.cluster)
        found, charges = _planned(ground, name, last, Settings(tries=tries))
        console.print(_charges_table(title_of(loaded), charges))
        console.print(_candidates_table(found, charges))
        console.print(found.why, soft_wrap=True)
        write(as_json(ground, found, charges))
        if figure:
            from neustream.analysis.plots import plot_placement

            wrote(plot_placement(as_json(ground, found, charges), title_of(loaded), figure))


def _planned(ground: Ground, name: str, last: float, settings: Settings) -> tuple[Plan, Charges]:
    """Plan for the last arrivals, with a policy and a router by name."""
    requests = last_of(ground.prepared.requests, last)
    router = parted(name)[1] or next(iter(ground.config.router))
    serve = partial(_serve, parted(name)[0], router)
    with new_progress() as progress:
        task = progress.add_task("simulating placements", total=None)

        def seen(placement: Placement) -> None:
            progress.advance(task)
            note(progress, f"simulated {placement}")

        return plan_for(ground, requests, serve, settings, seen)


def _serve(policy: str, router: str, prepared: Prepared, cluster: ClusterConfig) -> Report:
    """Simulate a workload on a cluster."""
    given = {router: cluster.router[router]}
    return simulate(prepared, policy, cluster=cluster.model_copy(update={"router": given}))


def _charges_table(title: str, charges: Charges) -> Table:
    """Milliseconds of each kind of device that a request costs by stage."""
    table = new_table(f"{title}\ndevice ms of a request", "device", ["count", *charges.stages, "all", "req/s each"])
    for name, device in charges.devices.items():
        column = charges.seconds[name]
        whole = sum(column.values())
        cells = [f"{1000 * column[stage]:.3g}" for stage in charges.stages]
        table.add_row(name, str(device.count), *cells, f"{1000 * whole:.3g}", f"{1 / whole:.3g}")
    return table


def _candidates_table(plan: Plan, charges: Charges) -> Table:
    """What was simulated, the best first."""
    title = f"placements at {charges.rate:.3g} req/s"
    table = new_table(title, "placement", ["capacity/s", "goodput/s", "why"])
    for one in sorted(plan.candidates, key=lambda one: (one is not plan.best, -one.goodput)):
        mark = "> " if one is plan.best else "  "
        table.add_row(f"{mark}{one.placement}", f"{one.capacity:.3g}", f"{one.goodput:.3g}", one.about)
    return table


def as_json(ground: Ground, plan: Plan, charges: Charges) -> dict[str, Any]:
    """A plan, as results are written."""
    return {
        "placement": _instances(ground, plan.placement),
        "why": plan.why,
        "rate_rps": charges.rate,
        "capacity_rps": plan.best.capacity,
        "goodput_rps": plan.best.goodput,
        "charges_s": charges.seconds,
        "candidates": [
            {
                "placement": _instances(ground, one.placement),
                "about": one.about,
                "capacity_rps": one.capacity,
                "goodput_rps": one.goodput,
            }
            for one in plan.candidates
        ],
    }


def _instances(ground: Ground, placement: Placement) -> dict[str, Any]:
    """A placement as `cluster.instances` says it, with the kind of device beside."""
    return {
        ground.name(device, stages): {"device": device, "count": count, "stages": list(stages)}
        for (device, stages), count in placement.as_counts().items()
    }
