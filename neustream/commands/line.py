"""What stands on the command line, also where the shell asks what may follow. Imports nothing."""

from __future__ import annotations

import os
import shlex

COMPLETING = "_NEUSTREAM_COMPLETE"
"""The variable by which the shell asks."""


def typed(arguments: list[str]) -> list[str]:
    """The arguments, which a shell that asks gives in variables of its own instead."""
    if COMPLETING not in os.environ:
        return arguments
    line = os.environ.get("COMP_WORDS") or os.environ.get("_TYPER_COMPLETE_ARGS") or ""
    try:
        return shlex.split(line)[1:]
    except ValueError:  # a quote that is still open
        return line.split()[1:]
