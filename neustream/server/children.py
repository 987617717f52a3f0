"""Processes that this one started, and those that they did; ended before it ends at once."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

from neustream.engine.clock import stopwatch

POLITE_S = 1.0
"""So long they may take to end by themselves, before they are killed."""
MOST_S = 5.0
"""So long it is tried: threads that are left may start others meanwhile."""
LOOK_S = 0.02


def end_children() -> None:
    """End all of them, whatever they do: who has lost its parent may take a minute to notice."""
    since = stopwatch()
    told: set[int] = set()
    while (left := _descendants(os.getpid()) | _there(told)) and stopwatch() - since < MOST_S:
        polite = stopwatch() - since < POLITE_S
        for pid in left if not polite else left - told:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM if polite else signal.SIGKILL)
        told |= left
        threading.Event().wait(LOOK_S)


def _descendants(pid: int) -> set[int]:
    """The processes below one that run."""
    children: dict[int, list[int]] = {}
    for child, parent, ended in _processes():
        if not ended:
            children.setdefault(parent, []).append(child)
    found: set[int] = set()
    todo = [pid]
    while todo:
        below = children.get(todo.pop(), [])
        found.update(below)
        todo += below
    return found


def _there(pids: set[int]) -> set[int]:
    """Those that still run: who was below one that ended is nobody's by now."""
    return pids & {pid for pid, _, ended in _processes() if not ended} if pids else set()


def _processes() -> Iterator[tuple[int, int, bool]]:
    """All processes: number, parent, whether it has ended and only waits to be noticed."""
    if not Path("/proc/self/stat").exists():
        with subprocess.Popen(["ps", "-A", "-o", "pid=,ppid=,stat="], stdout=subprocess.PIPE, text=True) as listing:
            lines = listing.communicate()[0].splitlines()
        for line in lines:
            pid, parent, state = line.split(None, 2)
            yield int(pid), int(parent), state.startswith("Z") or int(pid) == listing.pid
        return
    for name in os.listdir("/proc"):
        with contextlib.suppress(OSError):  # it ended just now
            if name.isdigit():
                state, parent = Path(f"/proc/{name}/stat").read_text().rpartition(")")[2].split()[:2]
                yield int(name), int(parent), state in "ZX"
