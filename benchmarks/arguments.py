"""What the options of the scripts here have in common."""

from __future__ import annotations

import argparse


def at_least_one(text: str) -> int:
    """A number of things, of which there must be one at least."""
    try:
        found = int(text)
    except ValueError:
        found = 0
    if found < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a whole number, at least 1")
    return found
