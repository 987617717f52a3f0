"""Latencies of batches of every kind of shape, as tables and as curves."""

from __future__ import annotations

from neustream import TableProfile
from neustream.core.policies.curve import Curve

TABLES = {
    "rising": [1.0, 1.25, 1.5, 1.75, 2.0, 2.25],
    "flat": [1.0, 1.0, 1.0, 1.0],
    "no gain": [1.0, 2.0, 3.0, 4.5],
    "knee": [1.0, 1.25, 1.5, 4.0, 4.25],
    "bump": [1.0, 3.0, 2.0, 2.25, 5.0, 4.0],
    "falling": [3.0, 2.0, 1.0],
    "one": [1.0],
}


def table(*seconds):
    return TableProfile("s", range(1, len(seconds) + 1), seconds)


def shape(seconds, limit=None):
    return Curve(table(*seconds), limit or len(seconds), 0.0)


def turn(seconds, n):
    """One step for each of n jobs, by trying all batches."""
    return min((n * seconds[b - 1] / b for b in range(1, min(n, len(seconds)) + 1)), default=0.0)
