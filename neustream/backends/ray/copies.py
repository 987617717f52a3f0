"""Copies of other instances' requests, kept for when those are gone (see `cluster/snapshots.py`)."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace

from neustream.backends.ray.wire import Left, NotMovable
from neustream.cluster.messages import Kept
from neustream.engine.clock import stopwatch


class Copies:
    """Each by the id of its request and its term. `tell`: tells the head. On any thread."""

    def __init__(self, name: str, tell: Callable[[Kept], None]) -> None:
        self._name = name
        self._tell = tell
        self._lock = threading.Lock()
        self._kept: dict[tuple[str, int], tuple[Left, float]] = {}

    def keep(self, id: str, term: int, left: Left) -> None:
        """A copy comes."""
        with self._lock:
            self._kept[id, term] = left, stopwatch()
        self._tell(Kept(id, term))

    def get(self, id: str, term: int) -> Left:
        """A copy as old as it is; NotMovable if it is not here."""
        with self._lock:
            found = self._kept.get((id, term))
        if found is None:
            raise NotMovable(f"instance {self._name!r} has no copy of request {id!r}")
        left, since = found
        return replace(left, waited_s=left.waited_s + stopwatch() - since)

    def free(self, id: str, term: int) -> None:
        """Nobody needs that copy any more."""
        with self._lock:
            self._kept.pop((id, term), None)

    def clear(self) -> None:
        """Nor any."""
        with self._lock:
            self._kept.clear()

    def __len__(self) -> int:
        return len(self._kept)
