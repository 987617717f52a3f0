"""`neustream bench compare`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from neustream.bench.records import Since
from neustream.bench.runs import Run, read_runs
from neustream.bench.summary import summary
from neustream.commands.bench_printing import FIGURES, show_runs, write_figures
from neustream.commands.options import JsonOption, QuietOption
from neustream.commands.outputs import check_folder, check_outputs, json_file, json_output
from neustream.commands.printing import hushed
from neustream.errors import ConfigError


def command(
    folders: Annotated[list[Path], typer.Argument(metavar="FOLDER...", help="Results of benchmarks.")],
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Draw figures into this folder.")] = None,
    sent: Annotated[bool, typer.Option("--from-sent", help="Latencies from when requests were sent.")] = False,
    json_: JsonOption = None,
    quiet: QuietOption = False,
) -> None:
    """Set results side by side, a row for each load: simulated, embedded or over HTTP."""
    since: Since = "sent" if sent else "scheduled"
    with json_output(json_) as write, hushed(quiet):
        check_outputs(json_file(json_))
        if out is not None:
            check_folder("--out", out, FIGURES)
        named = named_runs(folders)
        labels = [(f"{name} {run.name}".strip(), run) for name, runs in named.items() for run in runs]
        show_runs(labels, since)
        write({name: [summary(run, since) for run in runs] for name, runs in named.items()})
        if out is not None:
            write_figures(named, out, since)


def named_runs(folders: list[Path]) -> dict[str, list[Run]]:
    """The runs by the folder's name, or by its path where two have the same."""
    names = [folder.resolve().name for folder in folders]
    if len(set(folders)) < len(folders):
        raise ConfigError("the same folder twice; expected different ones")
    whole = len(set(names)) < len(names)
    return {str(folder) if whole else name: read_runs(folder)[0] for folder, name in zip(folders, names, strict=True)}
