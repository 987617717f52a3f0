"""`neustream bench compare`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from neustream.bench.runs import Run, read_runs
from neustream.bench.summary import summary
from neustream.commands.bench_printing import FIGURES, show_runs, write_figures
from neustream.commands.bench_reporting import FoldersArgument, SentOption, since_of
from neustream.commands.options import JsonOption, QuietOption
from neustream.commands.outputs import check_folder, check_outputs, json_file, json_output
from neustream.commands.printing import hushed
from neustream.errors import ConfigError


def command(
    folders: FoldersArgument,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Draw figures into this folder.")] = None,
    sent: SentOption = False,
    json_: JsonOption = None,
    quiet: QuietOption = False,
) -> None:
    """Set results side by side, a row for each load: simulated, embedded or over HTTP."""
    since = since_of(sent)
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
