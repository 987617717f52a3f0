"""Options that several commands of `neustream bench` take."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

SentOption = Annotated[
    bool, typer.Option("--from-sent", help="Latencies from when requests were sent, as vLLM has them.")
]
StackOption = Annotated[
    Path | None,
    typer.Option(help="Who served, as a list of a report's scenario.stack in YAML, for the reports."),
]
