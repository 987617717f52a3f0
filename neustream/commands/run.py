"""`neustream run`."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from neustream.backends.serving import Gallery, Session
from neustream.commands.interrupts import INTERRUPTED, Interrupts
from neustream.commands.options import (
    ConfigArgument,
    JsonOption,
    ModelOption,
    PolicyOption,
    QuietOption,
    SetOption,
    TraceOption,
)
from neustream.commands.outputs import check_folder, check_outputs, json_file, json_output, json_text, write_text
from neustream.commands.printing import (
    console,
    hushed,
    new_progress,
    note,
    problems,
    say_notes,
    show,
    title_of,
    trace_path,
    wrote,
)
from neustream.commands.reach import chosen_policies, naming
from neustream.config.load import load_experiment
from neustream.config.schema import Experiment
from neustream.engine.report import Report
from neustream.engine.trace import EventLog
from neustream.errors import NeustreamError
from neustream.experiment.running import record, simulate


def command(
    config: ConfigArgument,
    policy: PolicyOption = None,
    set_: SetOption = None,
    json_: JsonOption = None,
    trace: TraceOption = None,
    device: Annotated[str, typer.Option(help="Where the model runs; pools may name their own devices.")] = "cpu",
    out: Annotated[Path | None, typer.Option(help="Folder for report, figure, images and traces.")] = None,
    model: ModelOption = None,
    quiet: QuietOption = False,
) -> None:
    """Serve an experiment's workload in real time on its real model, beside the simulator's prediction."""
    with json_output(json_) as write, hushed(quiet):
        experiment = load_experiment(config, set_ or (), model=model)
        names = chosen_policies(config, experiment, policy)
        trace = trace or (out / "trace.json" if out else None)
        traces = {name: trace_path(trace, name, len(names) > 1) for name in names} if trace else {}
        if out:
            importlib.import_module("neustream.analysis.plots")  # an error of its own where matplotlib is missing
            check_folder("--out", out, ("report.json", "served.png", "images.png"))
        check_outputs([*json_file(json_), *(("--trace", path) for path in traces.values())])
        served = _Served(experiment, names, traces)
        with naming(config):
            served.run(device)
        if served.fault is not None and not served.records:
            raise served.fault
        _report(served, out, write)
        if served.fault is not None:
            raise served.fault
        if served.interrupted:
            problems.print("interrupted: open requests ended as cancelled, the report is written", soft_wrap=True)
            raise typer.Exit(INTERRUPTED)


class _Served:
    """What came of serving an experiment under one policy after the other."""

    def __init__(self, experiment: Experiment, names: Sequence[str], traces: Mapping[str, Path]) -> None:
        self.experiment = experiment
        self.records: list[dict[str, Any]] = []
        self.written: list[Path] = []
        self.fault: NeustreamError | None = None
        self.interrupted = False
        self.pictures: Gallery | None = None
        self._names, self._traces = names, traces

    def run(self, device: str) -> None:
        """Serve with each policy, until one of them breaks or Ctrl-C ends it."""
        with new_progress() as progress:
            task = progress.add_task("building the model", total=None)
            with Session(self.experiment, device) as session:
                self.pictures = session.gallery
                say_notes(session.prepared.notes)
                progress.update(task, description="warming up")
                session.warm_up()
                progress.update(task, total=len(self._names) * len(session.prepared.requests), completed=0)
                with Interrupts() as interrupts:
                    for name in self._names:
                        say = partial(progress.update, task, description=f"serving with {name}")
                        say()
                        ended = partial(progress.advance, task)
                        simulating = partial(say, description=f"simulating {name}")
                        try:
                            self._serve(session, name, ended, simulating, interrupts)
                            note(progress, f"served with {name}")
                        except NeustreamError as error:  # what was served before is reported all the same
                            self.fault = error
                        if self.fault is not None or interrupts.hit:
                            break
                    self.interrupted = interrupts.hit

    def _serve(
        self,
        session: Session,
        name: str,
        ended: Callable[[], None],
        simulating: Callable[[], None],
        interrupts: Interrupts,
    ) -> None:
        logs = [EventLog()] if name in self._traces else []
        report = session.serve(name, logs, ended, interrupts.watch)
        for log in logs:
            log.save(self._traces[name])
            self.written.append(self._traces[name])
        simulating()
        self.records.append(_beside(session, name, report))


def _report(served: _Served, out: Path | None, write: Callable[[Any], None]) -> None:
    """Print tables, and write what was asked for."""
    title = title_of(served.experiment)
    show(title, served.records)
    _explain(served.records)
    write(served.records)
    if out:
        from neustream.analysis.plots import plot_served

        write_text(out / "report.json", json_text(served.records))
        if served.pictures is not None and served.pictures.save(out / "images.png"):
            wrote(out / "images.png")
        wrote(plot_served(served.records, title, out / "served.png"))
        wrote(out / "report.json")
    for path in served.written:
        wrote(path)


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
            )
