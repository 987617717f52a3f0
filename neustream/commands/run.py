"""`neustream run`."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from neustream.analysis.fidelity import Outcome, Watch, error, errors_table
from neustream.analysis.took import Took
from neustream.backends.ray.configs import check as check_cluster
from neustream.backends.ray.experiments import ClusterSession
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
    trace_paths,
    wrote,
)
from neustream.commands.reach import chosen_policies, naming
from neustream.config import Config, load_config, load_experiment
from neustream.engine.report import Report
from neustream.engine.trace import EventLog
from neustream.errors import ConfigError, NeustreamError
from neustream.experiment.running import ByModel, record, simulate


def command(
    config: ConfigArgument,
    policy: PolicyOption = None,
    set_: SetOption = None,
    json_: JsonOption = None,
    trace: TraceOption = None,
    device: Annotated[str, typer.Option(help="Where models run, unless the config names devices.")] = "cpu",
    out: Annotated[Path | None, typer.Option(help="Folder for report, figure, images and traces.")] = None,
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
        served = _Served(chosen, names, traces)
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

    def __init__(self, config: Config, names: Sequence[str], traces: Mapping[str, Path]) -> None:
        self.config = config
        self.records: list[dict[str, Any]] = []
        self.written: list[Path] = []
        self.fault: NeustreamError | None = None
        self.interrupted = False
        self.pictures: Gallery | None = None
        self._names, self._traces = names, traces

    def run(self, device: str) -> None:
        """Serve with each policy, until one of them breaks or Ctrl-C ends it."""
        with new_progress() as progress:
            task = progress.add_task("building the model and warming up", total=None)
            kind = Session if self.config.cluster is None else ClusterSession
            with contextlib.closing(kind(self.config, device)) as session, Interrupts() as interrupts:
                self.pictures = session.gallery
                say_notes(session.prepared.notes)
                progress.update(task, total=len(self._names) * len(session.prepared.requests), completed=0)
                for name in self._names:
                    self._try(session, name, partial(progress.update, task), partial(note, progress), interrupts)
                    if self.fault is not None or interrupts.hit:
                        break
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
        self.records.append(_beside(session, name, report, by_model, watch, took))


def _report(served: _Served, out: Path | None, write: Callable[[Any], None]) -> None:
    """Print tables, and write what was asked for."""
    title = title_of(served.config)
    show(title, served.records)
    _say_errors(served.records)
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


def _beside(
    session: Session, policy: str, report: Report, by_model: ByModel, watch: Watch, took: Took
) -> dict[str, Any]:
    """A served report with what the simulator says, by the profiles and of the device as it was meanwhile."""
    config = session.config
    same = dataclasses.replace(session.prepared, requests=session.prepared.requests[: report.submitted])

    def simulated(**observed: Any) -> dict[str, Any]:
        parts = ByModel(config)
        return record(config, policy, simulate(same, policy, [parts], **observed), parts)

    real, plain = record(config, policy, report, by_model), simulated()
    costs, ways = watch.told().costs, None
    if isinstance(session, ClusterSession):
        costs, ways = costs.model_copy(update={"call_s": 0.0}), session.ways.told(report.start)
        real["cluster"]["ways_s"] = ways.to_dict()
    as_observed = simulated(took=took.stretch(report.start), device=costs, ways=ways)
    return {
        **real,
        "simulated": plain,
        "simulated_as_observed": as_observed,
        "error": dataclasses.asdict(error(Outcome.of(real), Outcome.of(plain))),
        "error_as_observed": dataclasses.asdict(error(Outcome.of(real), Outcome.of(as_observed))),
    }


def _say_errors(records: Sequence[dict[str, Any]]) -> None:
    """Say how far the simulator was off, and how far where it knows how fast the device was."""
    rows = []
    for entry in records:
        served, policy = Outcome.of(entry), entry["policy"]
        rows.append((policy, served, Outcome.of(entry["simulated"])))
        rows.append((f"{policy}, as observed", served, Outcome.of(entry["simulated_as_observed"])))
    console.print(errors_table("how far the simulator was off", "policy", rows))


def _explain(records: Sequence[dict[str, Any]]) -> None:
    """Say where the device was not as fast as its profile, and what ways to instances and back took."""
    for entry in records:
        busy = sum(entry["busy_s"].values())
        profiled = sum(seconds / entry["profile_error"][stage] for stage, seconds in entry["busy_s"].items())
        if busy and abs(busy / profiled - 1) > 0.05:
            again = entry["simulated_as_observed"]["goodput_rps"]
            console.print(
                f"{entry['policy']}: steps took {busy / profiled:.2f} times what the profiles say; "
                f"simulated as observed: {again:.2f}/s",
            )
        ways = entry.get("cluster", {}).get("ways_s", {})
        told = [
            f"{seconds['p50'] * 1e3:.1f} ms {way} (p99 {seconds['p99'] * 1e3:.0f})" for way, seconds in ways.items()
        ]
        if told:
            console.print(f"{entry['policy']}: a request's ways took {', '.join(told)}")
