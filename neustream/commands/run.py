"""`neustream run`."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from neustream.backends.serving import Session
from neustream.commands.interrupts import Interrupts
from neustream.commands.options import ConfigArgument, JsonOption, PolicyOption, SetOption, TraceOption
from neustream.commands.printing import console, new_progress, problems, show, title_of, trace_path, write_json, wrote
from neustream.commands.reach import chosen_policies
from neustream.config import load_experiment
from neustream.engine.report import Report
from neustream.engine.trace import EventLog
from neustream.errors import NeustreamError
from neustream.experiment import record, simulate


def command(
    config: ConfigArgument,
    policy: PolicyOption = None,
    set_: SetOption = None,
    json_: JsonOption = None,
    trace: TraceOption = None,
    device: Annotated[str, typer.Option(help="Where the model runs; pools may name their own devices.")] = "cpu",
    out: Annotated[Path | None, typer.Option(help="Folder for report, figure, images and traces.")] = None,
) -> None:
    """Serve an experiment's workload in real time on its real model, beside the simulator's prediction."""
    experiment = load_experiment(config, set_ or ())
    names = chosen_policies(config, experiment, policy)
    if out:
        from neustream.analysis.plots import plot_served

        out.mkdir(parents=True, exist_ok=True)
    trace = trace or (out / "trace.json" if out else None)
    records: list[dict[str, Any]] = []
    fault: NeustreamError | None = None
    with new_progress() as progress:
        task = progress.add_task("building the model", total=None)
        with Session(experiment, device) as session:
            progress.update(task, description="warming up")
            session.warm_up()
            progress.update(task, total=len(names) * len(session.prepared.requests), completed=0)
            with Interrupts() as interrupts:
                for name in names:
                    progress.update(task, description=f"serving with {name}")
                    logs = [EventLog()] if trace else []
                    try:
                        report = session.serve(name, logs, lambda: progress.advance(task), interrupts.watch)
                    except NeustreamError as error:  # what was served before is reported all the same
                        fault = error
                        break
                    records.append(_beside(session, name, report))
                    for log in logs:
                        log.save(trace_path(trace or Path(), name, len(names) > 1))
                    if interrupts.hit:
                        problems.print("interrupted: open requests ended as cancelled, the report is written")
                        break
            pictures = session.gallery
    if fault is not None and not records:
        raise fault
    show(title_of(experiment), records)
    _explain(records)
    if json_:
        write_json(json_, records)
    if out:
        write_json(out / "report.json", records)
        if pictures.save(out / "images.png"):
            wrote(out / "images.png")
        wrote(plot_served(records, title_of(experiment), out / "served.png"))
        wrote(out / "report.json")
    if trace:
        wrote(trace_path(trace, "*", len(names) > 1))
    if fault is not None:
        raise fault


def _beside(session: Session, policy: str, report: Report) -> dict[str, Any]:
    """A served report with what the simulator says, by the profiles and at the speed that was observed."""
    experiment, observed = session.prepared.experiment, report.profile_error()
    same = dataclasses.replace(session.prepared, requests=session.prepared.requests[: report.submitted])
    return {
        **record(experiment, policy, report),
        "simulated": record(experiment, policy, simulate(same, policy)),
        "simulated_as_observed": record(experiment, policy, simulate(same, policy, speed=observed)),
    }


def _explain(records: Sequence[dict[str, Any]]) -> None:
    """Say where the device was not as fast as its profile, and what the simulator makes of that."""
    for entry in records:
        busy = sum(entry["busy_s"].values())
        profiled = sum(seconds / entry["profile_error"][stage] for stage, seconds in entry["busy_s"].items())
        if busy and abs(busy / profiled - 1) > 0.05:
            again = entry["simulated_as_observed"]["goodput_rps"]
            console.print(
                f"{entry['policy']}: steps took {busy / profiled:.2f} times what the profiles say; "
                f"simulated at that speed: {again:.2f}/s",
                highlight=False,
            )
