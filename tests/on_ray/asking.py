"""What tests on Ray ask of clusters."""

from __future__ import annotations

import contextlib

import psutil


def said(answer):
    return [update["word"] for update in answer]


def adds_up(cluster):
    counts = cluster.counts
    ends = counts.on_time + counts.late + counts.dropped + counts.failed + counts.cancelled + counts.refused
    return counts.submitted == ends


def gone(pids):
    """Whether processes end; waits for that."""
    there = []
    for pid in pids:
        with contextlib.suppress(psutil.NoSuchProcess):
            there.append(psutil.Process(pid))
    _, left = psutil.wait_procs(there, timeout=30)
    return not left
