"""Options that several commands of `neustream bench` take."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from neustream.bench.records import Since

FoldersArgument = Annotated[
    list[Path], typer.Argument(metavar="FOLDER...", help="Results, one folder for each system or mode of serving.")
]
SentOption = Annotated[
    bool, typer.Option("--from-sent", help="Latencies from when requests were sent, as vLLM has them.")
]
StackOption = Annotated[
    Path | None,
    typer.Option(help="Who served, as a list of a report's scenario.stack in YAML, for the reports."),
]


def since_of(sent: bool) -> Since:
    """What latencies count from: when requests were sent, or when they were to be."""
    return "sent" if sent else "scheduled"
