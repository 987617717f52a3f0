"""The command `neustream`: simulate, sweep, profile and run experiments described by YAML files."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)
from rich.table import Table

from neustream.analysis.tables import new_table, policies_table, tokens_table
from neustream.backends.serving import Session, measure_experiment, profile_shapes, profile_steps
from neustream.config import SWEEPABLE, Experiment, load_experiment
from neustream.engine.engine import Engine
from neustream.engine.report import Report
from neustream.engine.trace import EventLog
from neustream.errors import ConfigError, NeustreamError, nearest
from neustream.experiment import Prepared, build_policy, prepare, record, simulate, sweep_points
from neustream.explain import one_line
from neustream.profiling import Measurement, default_batches, save
from neustream.stepfile import StepsFile

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="SLO-aware serving of models that run in steps.",
)
console = Console()
problems = Console(stderr=True)

ConfigArgument = Annotated[Path, typer.Argument(metavar="CONFIG", help="The experiment's YAML file.")]
PolicyOption = Annotated[
    list[str] | None, typer.Option("--policy", "-p", help="Run only this policy; may be given several times.")
]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", "-s", metavar="KEY=VALUE", help="Override a key, e.g. workload.rate=4.")
]
JsonOption = Annotated[Path | None, typer.Option("--json", help="Write the results to this file.")]
TraceOption = Annotated[
    Path | None,
    typer.Option("--trace", help="Write a Chrome trace for Perfetto; with several policies, one file each."),
]
BoundOption = Annotated[
    bool, typer.Option("--bound", help="Also compute the most that any scheduler could serve on time.")
]


def main() -> None:
    """The entry point: errors of ours are one line and exit status 2."""
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.insert(0, here)  # where --policy module:Class and kind: module:function are looked for
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # it advises to install what is not needed
    try:
        app()
    except NeustreamError as error:
        problems.print(f"[bold red]{type(error).__name__}[/]: ", end="")
        problems.print(one_line(error), markup=False, highlight=False, soft_wrap=True)
        raise SystemExit(2) from None
    except OSError as error:
        problems.print(f"[bold red]cannot read or write[/] {error.filename}: {error.strerror}", soft_wrap=True)
        raise SystemExit(2) from None


def _progress() -> Progress:
    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=problems,
        refresh_per_second=2,  # drawing takes time from the steps of `run`
    )


def _policies(config: Path, experiment: Experiment, chosen: list[str] | None) -> list[str]:
    """The policies to run; all that the config names are checked."""
    names = list(dict.fromkeys(chosen or experiment.policies))
    for name in dict.fromkeys([*names, *experiment.policies]):
        try:
            build_policy(experiment, name)
        except ConfigError as error:
            raise ConfigError(f"{config}: {error}") from None
    return names


def _trace_path(trace: Path, policy: str, several: bool) -> Path:
    return trace.with_name(f"{trace.stem}-{policy.replace(':', '.')}{trace.suffix}") if several else trace


def _write(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n")


def _wrote(path: Path) -> None:
    console.print(f"wrote {path}", highlight=False, soft_wrap=True)


@app.command("simulate")
def simulate_command(
    config: ConfigArgument,
    policy: PolicyOption = None,
    set_: SetOption = None,
    json_: JsonOption = None,
    trace: TraceOption = None,
    bound: BoundOption = False,
    hindsight: Annotated[
        float | None,
        typer.Option(min=1, metavar="SECONDS", help="Also search for a better schedule, with the trace known."),
    ] = None,
) -> None:
    """Serve an experiment's workload in virtual time, by its latency profiles."""
    experiment = load_experiment(config, set_ or ())
    names = _policies(config, experiment, policy)
    prepared = prepare(experiment)
    records = []
    with _progress() as progress:
        task = progress.add_task("simulating", total=len(names) + bound + (hindsight is not None))
        reach = _reach(prepared, bound, hindsight, names, progress, task)
        for name in names:
            progress.update(task, description=f"simulating {name}")
            log = EventLog() if trace else None
            report = simulate(prepared, name, [log] if log else [])
            records.append({**record(experiment, name, report), **reach(report)})
            if log and trace:
                log.save(_trace_path(trace, name, len(names) > 1))
            progress.advance(task)
    _show(_title(experiment), records)
    if json_:
        _write(json_, records)


def _reach(
    prepared: Prepared,
    bound: bool,
    hindsight: float | None,
    policies: Sequence[str],
    progress: Progress,
    task: TaskID,
) -> Callable[[Report], dict[str, Any]]:
    """What to add to each policy's record: how far it is from the bound and from hindsight, if asked for."""
    if not bound and hindsight is None:
        return lambda report: {}
    if hindsight is not None and any(experiment.llm is not None for experiment in prepared.experiments):
        raise ConfigError("--hindsight searches schedules of pipelines; for an llm there is --bound")
    from neustream.analysis.headroom import bound_of, headroom
    from neustream.analysis.hindsight import STARTS
    from neustream.analysis.hindsight import hindsight as search

    most = best = None
    if bound:
        progress.update(task, description="computing the bound")
        most = bound_of(prepared)
        progress.advance(task)
    if hindsight is not None:
        progress.update(task, description="searching in hindsight")
        best = search(prepared, hindsight, policies=[*STARTS, *policies])
        progress.advance(task)
    return lambda report: headroom(prepared, report, most, best)


def _show(title: str, records: Sequence[dict[str, Any]]) -> None:
    console.print(policies_table(title, records))
    if any("tokens" in entry for entry in records):
        console.print(tokens_table(records))


def _title(experiment: Experiment) -> str:
    load, slo = experiment.workload, experiment.slo
    rate = f"{load.rate:g} req/s" if load.load is None else f"{load.load:g}x solo load"
    arrivals = load.arrivals if load.arrivals == "trace" else f"{load.arrivals} {rate}"
    burst = f", cv {load.cv:g}" if load.arrivals == "gamma" else ""
    promises = [f"{slo.scale:g}x solo"] if slo.scale else [f"{slo.total_s:g} s"] if slo.total_s else []
    for name, scale, seconds in (("TTFT", slo.first_scale, slo.first_s), ("TPOT", slo.step_scale, slo.step_s)):
        if scale or seconds:
            promises.append(f"{name} {scale:g}x solo" if scale else f"{name} {seconds:g} s")
    promise = f"SLO {', '.join(promises)}" if promises else "SLO classes"
    return f"{experiment.name}: {arrivals}{burst}, {promise}, seed {load.seed}"


@app.command()
def sweep(
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
    names = _policies(config, experiment, policy)
    records: list[dict[str, Any]] = []
    logs: dict[str, EventLog] = {}
    with _progress() as progress:
        task = progress.add_task(f"sweeping {over}", total=len(points) * (len(names) + bound))
        for at, (value, variant) in enumerate(points):
            prepared = prepare(variant)
            reach = _reach(prepared, bound, None, names, progress, task)
            for name in names:
                progress.update(task, description=f"{over}={value:g} {name}")
                observers = []
                if at == len(points) - 1:
                    observers.append(logs.setdefault(name, EventLog()))
                report = simulate(prepared, name, observers)
                records.append({"over": over, "value": value, **record(variant, name, report), **reach(report)})
                progress.advance(task)
    _write(out / "sweep.json", records)
    console.print(_sweep_table(experiment, over, names, records))
    paths = plot_sweep(records, over, names, experiment.name, out)
    stage = next((name for name, stage in experiment.stages.items() if stage.times), list(experiment.stages)[-1])
    title = f"{experiment.name}, {over}={points[-1][0]:g}"
    paths.append(plot_batches(logs, stage, title, out / "batches.png"))
    for path in [out / "sweep.json", *paths]:
        _wrote(path)


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


@app.command()
def profile(
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
            _wrote(path)
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
        _wrote(out / f"{experiment.llm.profile}.json")
        return

    with _progress() as progress:
        sizes = sum(len(default_batches(stage.max_batch)) for stage in experiment.stages.values())
        task = progress.add_task("building the model", total=sizes * (warmup + repeats))
        measured, about = measure_experiment(experiment, device, repeats, warmup, tick, limit)
    console.print(_profile_table(f"{experiment.name} on {about.device_name}", measured))
    for path in save(measured, out, model=about.model_name, device=about.device_name, origin=about.origin):
        _wrote(path)


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


@app.command()
def run(
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
    names = _policies(config, experiment, policy)
    if out:
        from neustream.analysis.plots import plot_served

        out.mkdir(parents=True, exist_ok=True)
    trace = trace or (out / "trace.json" if out else None)
    records: list[dict[str, Any]] = []
    fault: NeustreamError | None = None
    with _progress() as progress:
        task = progress.add_task("building the model", total=None)
        with Session(experiment, device) as session:
            progress.update(task, description="warming up")
            session.warm_up()
            progress.update(task, total=len(names) * len(session.prepared.requests), completed=0)
            with _Interrupts() as interrupts:
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
                        log.save(_trace_path(trace or Path(), name, len(names) > 1))
                    if interrupts.hit:
                        problems.print("interrupted: open requests ended as cancelled, the report is written")
                        break
            pictures = session.gallery
    if fault is not None and not records:
        raise fault
    _show(_title(experiment), records)
    _explain(records)
    if json_:
        _write(json_, records)
    if out:
        _write(out / "report.json", records)
        if pictures.save(out / "images.png"):
            _wrote(out / "images.png")
        _wrote(plot_served(records, _title(experiment), out / "served.png"))
        _wrote(out / "report.json")
    if trace:
        _wrote(_trace_path(trace, "*", len(names) > 1))
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


class _Interrupts:
    """Ctrl-C ends the open requests of the engine being watched as cancelled; a second one the program."""

    def __init__(self) -> None:
        self.hit = False
        self._engine: Engine | None = None

    def watch(self, engine: Engine) -> None:
        self._engine = engine
        if self.hit:
            engine.interrupt()

    def _stop(self, number: int, frame: FrameType | None) -> None:
        self.hit = True
        signal.signal(signal.SIGINT, self._before)
        if self._engine is not None:
            self._engine.interrupt()

    def __enter__(self) -> _Interrupts:
        self._before = signal.signal(signal.SIGINT, self._stop)
        return self

    def __exit__(self, *exc: object) -> None:
        signal.signal(signal.SIGINT, self._before)


if __name__ == "__main__":
    main()
