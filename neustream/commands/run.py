"""`neustream run`."""

from __future__ import annotations

import contextlib
import importlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from neustream.analysis.fidelity import Watch
from neustream.analysis.took import Took
from neustream.backends.ray.configs import check as check_cluster
from neustream.backends.ray.experiments import ClusterSession
from neustream.backends.serving import Gallery, Session
from neustream.commands.beside import Device, beside, explain, on_time, same_device_table, say_errors
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
from neustream.commands.outputs import (
    check_folder,
    check_outputs,
    check_traces,
    json_file,
    json_output,
    json_text,
    write_text,
)
from neustream.commands.printing import (
    console,
    hushed,
    new_progress,
    note,
    problems,
    say_notes,
    show,
    title_of,
    trace_paths,
    wrote,
)
from neustream.commands.reach import chosen_policies, naming
from neustream.config import Config, load_config, load_experiment
from neustream.engine.trace import EventLog
from neustream.errors import ConfigError, NeustreamError
from neustream.experiment.running import ByModel


def command(
    config: ConfigArgument,
    policy: PolicyOption = None,
    set_: SetOption = None,
    json_: JsonOption = None,
    trace: TraceOption = None,
    device: Annotated[str, typer.Option(help="Where models run, unless the config names devices.")] = "cpu",
    out: Annotated[Path | None, typer.Option(help="Folder for report, figure, images and traces.")] = None,
    same_device: Annotated[
        bool, typer.Option(help="Also simulate each policy on the device as it was while each of them served.")
    ] = False,
    model: ModelOption = None,
    quiet: QuietOption = False,
) -> None:
    """Serve an experiment's workload in real time on its real models, beside the simulator's prediction."""
    with json_output(json_) as write, hushed(quiet):
        chosen = _load(config, set_ or (), model)
        names = chosen_policies(config, chosen, policy)
        trace = trace or (out / "trace.json" if out else None)
        traces = trace_paths(trace, names)
        if out:
            importlib.import_module("neustream.analysis.plots")  # an error of its own where matplotlib is missing
            check_folder("--out", out, ("report.json", "served.png", "images.png"))
        check_outputs([*json_file(json_), *(("--trace", path) for path in traces.values())])
        with naming(config):
            _check_plans(chosen, names)
            if chosen.cluster is not None:
                check_cluster(chosen.cluster)
        served = _Served(chosen, names, traces, same_device)
        with naming(config), _errors_only():
            served.run(device)
        if served.fault is not None and not served.records:
            raise served.fault
        _report(served, out, write)
        if served.fault is not None:
            raise served.fault
        if served.interrupted:
            problems.print("interrupted: open requests ended as cancelled, the report is written", soft_wrap=True)
            raise typer.Exit(INTERRUPTED)


@contextlib.contextmanager
def _errors_only() -> Iterator[None]:
    """No warnings in the log: of profiles that are off the report tells."""
    log = logging.getLogger("neustream")
    before = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(before)


def _load(config: Path, overrides: Sequence[str], model: str | None) -> Config:
    """All models of a config, or the one that is named."""
    return load_config(config, overrides) if model is None else load_experiment(config, overrides, model=model)


def _check_plans(config: Config, names: Sequence[str]) -> None:
    """ConfigError for a policy that plans with profiles of its own: they are of the config's stages."""
    for name in names:
        if "plan" in config.policies.get(name, {}):
            raise ConfigError(
                f"policies.{name}.plan: profiles to plan with are for simulations; "
                "remove it, or choose other policies by --policy"
            )


class _Served:
    """What came of serving an experiment under one policy after the other."""

    def __init__(self, config: Config, names: Sequence[str], traces: Mapping[str, Path], same_device: bool) -> None:
        self.config = config
        self.records: list[dict[str, Any]] = []
        self.written: list[Path] = []
        self.fault: NeustreamError | None = None
        self.interrupted = False
        self.pictures: Gallery | None = None
        self._names, self._traces, self._same_device = names, traces, same_device
        self._devices: dict[str, Device] = {}

    def run(self, device: str) -> None:
        """Serve with each policy, until one of them breaks or Ctrl-C ends it."""
        with new_progress() as progress:
            task = progress.add_task("building the model and warming up", total=None)
            kind = Session if self.config.cluster is None else ClusterSession
            with contextlib.closing(kind(self.config, device)) as session, Interrupts() as interrupts:
                self.pictures = session.gallery
                say_notes(session.prepared.notes)
                check_traces(self._traces.values(), len(session.prepared.requests))
                progress.update(task, total=len(self._names) * len(session.prepared.requests), completed=0)
                for name in self._names:
                    self._try(session, name, partial(progress.update, task), partial(note, progress), interrupts)
                    if self.fault is not None or interrupts.hit:
                        break
                if self._same_device and not interrupts.hit and self.fault is None:
                    self._compare(session, partial(progress.update, task), interrupts)
                self.interrupted = interrupts.hit

    def _try(
        self,
        session: Session,
        name: str,
        update: Callable[..., None],
        tell: Callable[[str], None],
        interrupts: Interrupts,
    ) -> None:
        """Serve with a policy; what was served before it is reported, whatever it raises."""
        update(description=f"serving with {name}")
        ended, simulating = partial(update, advance=1), partial(update, description=f"simulating {name}")
        try:
            self._serve(session, name, ended, simulating, interrupts)
            tell(f"served with {name}")
        except NeustreamError as error:
            self.fault = error

    def _serve(
        self,
        session: Session,
        name: str,
        ended: Callable[[], None],
        simulating: Callable[[], None],
        interrupts: Interrupts,
    ) -> None:
        logs = [EventLog()] if name in self._traces else []
        by_model = ByModel(self.config)
        watch, took = Watch(), Took(called=not isinstance(session, ClusterSession))
        report = session.serve(name, [by_model, watch, took, *logs], ended, interrupts.watch)
        for log in logs:
            log.save(self._traces[name])
            self.written.append(self._traces[name])
        simulating()
        device = self._devices[name] = Device.of(session, report, watch, took)
        self.records.append(beside(session, name, report, by_model, device))

    def _compare(self, session: Session, update: Callable[..., None], interrupts: Interrupts) -> None:
        """Simulate each policy on the device as it was while each served; Ctrl-C leaves the rest out."""
        count = len(self._devices)
        update(description="simulating each on the devices of all", total=count * count, completed=0)
        for entry in self.records:
            kept = entry["on_time_on_device_of"] = {}
            for name, device in self._devices.items():
                kept[name] = on_time(session, entry["policy"], device)
                update(advance=1)
                if interrupts.hit:
                    return


def _report(served: _Served, out: Path | None, write: Callable[[Any], None]) -> None:
    """Print tables, and write what was asked for."""
    title = title_of(served.config)
    show(title, served.records)
    say_errors(served.records)
    if all(len(entry.get("on_time_on_device_of", ())) == len(served.records) for entry in served.records):
        console.print(same_device_table(served.records))
    explain(served.records)
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
