"""`neustream bench convert`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from neustream.bench.reports.building import About
from neustream.bench.reports.converting import converted, format_of, read_results
from neustream.bench.reports.stack import read_stack
from neustream.commands.bench_reporting import SentOption, StackOption, since_of
from neustream.commands.options import QuietOption
from neustream.commands.outputs import check_folder, write_text
from neustream.commands.printing import hushed, wrote
from neustream.errors import ConfigError


def command(
    results: Annotated[
        Path,
        typer.Argument(
            metavar="RESULTS",
            help="A folder of neustream bench; JSON of vllm bench serve; inference-perf's per_request "
            "or stage lifecycle metrics; a Benchmark Report 0.2.1.",
        ),
    ],
    to: Annotated[str, typer.Option(help="runs, vllm, lifecycle or report.")],
    out: Annotated[Path, typer.Option("--out", help="The folder that the files are written to.")],
    sent: SentOption = False,
    stack: StackOption = None,
    quiet: QuietOption = False,
) -> None:
    """Convert results of benchmarks from one format to another.

    What has a record for each request becomes any format. A report, and what others have summed up,
    becomes what has no such records; else it is said what lacks.
    """
    with hushed(quiet):
        kind = format_of(to)
        about = About(description=results.name, since=since_of(sent), stack=read_stack(stack))
        found = read_results(results)
        try:
            files = converted(found, kind, about)
        except ConfigError as error:
            raise ConfigError(f"{results} to {kind}: {error}") from None
        check_folder("--out", out, files)
        for name, text in files.items():
            write_text(out / name, text)
            wrote(out / name)
