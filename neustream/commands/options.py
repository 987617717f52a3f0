"""Arguments and options that several commands take."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

ConfigArgument = Annotated[Path, typer.Argument(metavar="CONFIG", help="The experiment's YAML file.")]
PolicyOption = Annotated[
    list[str] | None,
    typer.Option("--policy", "-p", help="Run only this policy; may be given several times."),
]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", "-s", metavar="KEY=VALUE", help="Override a key, e.g. workload.rate=4."),
]
JsonOption = Annotated[Path | None, typer.Option("--json", help="Write the results to this file.")]
TraceOption = Annotated[
    Path | None,
    typer.Option("--trace", help="Write a Chrome trace for Perfetto; with several policies, one file each."),
]
BoundOption = Annotated[
    bool, typer.Option("--bound", help="Also compute the most that any scheduler could serve on time.")
]
