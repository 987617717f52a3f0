"""Arguments and options that several commands take."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated

import typer

from neustream.commands.completing import configs, keys, policies
from neustream.errors import ConfigError

ConfigArgument = Annotated[
    Path,
    typer.Argument(metavar="CONFIG", help="The experiment's YAML file.", autocompletion=configs),
]
PolicyOption = Annotated[
    list[str] | None,
    typer.Option(
        "--policy",
        "-p",
        help="Run only this policy; may be given several times.",
        autocompletion=policies,
    ),
]
SetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        "-s",
        metavar="KEY=VALUE",
        help="Override a key, e.g. workload.rate=4.",
        autocompletion=keys,
    ),
]
JsonOption = Annotated[
    Path | None,
    typer.Option("--json", help="Write the results to this file; - is stdout, and the table goes to stderr."),
]
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors; files are written.")]
ModelOption = Annotated[
    str | None,
    typer.Option("--model", "-m", help="Which model, of a config with several."),
]
TraceOption = Annotated[
    Path | None,
    typer.Option("--trace", help="Write a Chrome trace for Perfetto; with several policies, one file each."),
]
BoundOption = Annotated[
    bool, typer.Option("--bound", help="Also compute the most that any scheduler could serve on time.")
]


def finite(option: str, value: float | None) -> None:
    """ConfigError for NaN, which the bounds of an option let through."""
    if value is not None and not math.isfinite(value):
        raise ConfigError(f"{option}: expected a finite number, got {value}")
