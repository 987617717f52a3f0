"""`neustream bench validate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from neustream.bench.reports.checking import problems as problems_of
from neustream.bench.reports.checking import read_content, remarks
from neustream.commands.options import JsonOption, QuietOption
from neustream.commands.outputs import check_outputs, json_file, json_output
from neustream.commands.printing import console, hushed, notes, problems
from neustream.errors import ConfigError, NeustreamError


def command(
    files: Annotated[list[Path], typer.Argument(metavar="REPORT...", help="Reports as YAML or JSON.")],
    schema: Annotated[
        Path | None, typer.Option(help="A JSON schema that they are held against too, as llm-d's.")
    ] = None,
    json_: JsonOption = None,
    quiet: QuietOption = False,
) -> None:
    """Say whether files are Benchmark Reports 0.2.1, and what is wrong with them.

    Exit code 2 if one of them is not.
    """
    with json_output(json_) as write, hushed(quiet):
        check_outputs(json_file(json_))
        held = None if schema is None else read_content(schema)
        found: dict[str, list[str]] = {}
        for file in files:
            try:
                content = read_content(file)
                found[str(file)] = problems_of(content, held)
            except ConfigError as error:
                found[str(file)] = [str(error).removeprefix(f"{file}: ")]
                continue
            for text in remarks(content):
                notes.print(f"{file}: note: {text}", soft_wrap=True)
        for name, wrong in found.items():
            for text in wrong:
                problems.print(f"{name}: {text}", soft_wrap=True)
            if not wrong:
                console.print(f"{name}: a Benchmark Report 0.2.1", soft_wrap=True)
        write(found)
    bad = [name for name, wrong in found.items() if wrong]
    if bad:
        raise NeustreamError(f"{len(bad)} of {len(found)} files are no Benchmark Report 0.2.1")
