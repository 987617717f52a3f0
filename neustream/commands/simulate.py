"""`neustream simulate`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from neustream.commands.interrupts import INTERRUPTED, raise_unless_pressed
from neustream.commands.options import (
    BoundOption,
    ConfigArgument,
    JsonOption,
    PolicyOption,
    QuietOption,
    SetOption,
    TraceOption,
    finite,
)
from neustream.commands.outputs import check_outputs, check_traces, json_file, json_output
from neustream.commands.printing import (
    Ticks,
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
from neustream.commands.reach import chosen_policies, naming, reach_of
from neustream.config import Config, load_config
from neustream.engine.clock import stopwatch
from neustream.engine.trace import EventLog
from neustream.errors import NeustreamError
from neustream.experiment.prepared import prepare
from neustream.experiment.running import ByModel, record, simulate


def command(
    config: ConfigArgument,
    policy: PolicyOption = None,
    set_: SetOption = None,
    json_: JsonOption = None,
    trace: TraceOption = None,
    bound: BoundOption = False,
    hindsight: Annotated[
        float | None,
        typer.Option(
            min=1, max=1e6, metavar="SECONDS", help="Also search for a better schedule, with the trace known."
        ),
    ] = None,
    quiet: QuietOption = False,
) -> None:
    """Serve an experiment's workload in virtual time, by its latency profiles."""
    finite("--hindsight", hindsight)
    with json_output(json_) as write, hushed(quiet):
        loaded = load_config(config, set_ or ())
        names = chosen_policies(config, loaded, policy)
        traces = trace_paths(trace, names)
        check_outputs([*json_file(json_), *(("--trace", path) for path in traces.values())])
        done = _Done()
        try:
            with naming(config):
                _simulate(loaded, names, bound, hindsight, traces, done)
        except NeustreamError as error:  # what was simulated before is reported all the same
            if not done.records:
                raise
            done.fault = error
        except KeyboardInterrupt:
            raise_unless_pressed("a policy")
            if not done.records:
                raise
            done.interrupted = True
        show(title_of(loaded), done.records)
        write(done.records)
        for path in done.traces:
            wrote(path)
        if done.fault is not None:
            raise done.fault
        if done.interrupted:
            problems.print(f"interrupted: {len(done.records)} of {len(names)} policies are done")
            raise typer.Exit(INTERRUPTED)


class _Done:
    """What a command has to show so far."""

    def __init__(self) -> None:
        self.records: list[dict[str, Any]] = []
        self.traces: list[Path] = []
        self.fault: NeustreamError | None = None
        self.interrupted = False


def _simulate(
    config: Config,
    names: Sequence[str],
    bound: bool,
    hindsight: float | None,
    traces: dict[str, Path],
    done: _Done,
) -> None:
    with new_progress() as progress:
        task = progress.add_task("drawing requests", total=None)
        prepared = prepare(config)
        say_notes(prepared.notes)
        check_traces(traces.values(), len(prepared.requests))
        reach = reach_of(prepared, bound, hindsight, names, progress, task)
        progress.update(task, total=len(names) * len(prepared.requests))
        ended = Ticks(lambda: progress.advance(task))
        for name in names:
            progress.update(task, description=f"simulating {name}")
            began = stopwatch()
            log = EventLog() if traces else None
            by_model = ByModel(config)
            report = simulate(prepared, name, [ended, by_model, *([log] if log else [])])
            if log:
                log.save(traces[name])
                done.traces.append(traces[name])
            done.records.append({**record(config, name, report, by_model), **reach(report)})
            if stopwatch() - began > 1:
                note(progress, f"simulated {name}")
