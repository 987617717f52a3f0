"""`neustream simulate`."""

from __future__ import annotations

from typing import Annotated

import typer

from neustream.commands.options import BoundOption, ConfigArgument, JsonOption, PolicyOption, SetOption, TraceOption
from neustream.commands.printing import new_progress, show, title_of, trace_path, write_json
from neustream.commands.reach import chosen_policies, reach_of
from neustream.config import load_experiment
from neustream.engine.trace import EventLog
from neustream.experiment import prepare, record, simulate


def command(
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
    names = chosen_policies(config, experiment, policy)
    prepared = prepare(experiment)
    records = []
    with new_progress() as progress:
        task = progress.add_task("simulating", total=len(names) + bound + (hindsight is not None))
        reach = reach_of(prepared, bound, hindsight, names, progress, task)
        for name in names:
            progress.update(task, description=f"simulating {name}")
            log = EventLog() if trace else None
            report = simulate(prepared, name, [log] if log else [])
            records.append({**record(experiment, name, report), **reach(report)})
            if log and trace:
                log.save(trace_path(trace, name, len(names) > 1))
            progress.advance(task)
    show(title_of(experiment), records)
    if json_:
        write_json(json_, records)
