"""What other threads and signal handlers hand to one reader."""

from __future__ import annotations

import contextlib
import queue
import threading
from typing import Generic, TypeVar

T = TypeVar("T")


class Inbox(Generic[T]):
    """A queue with one reader, who can wait for no longer than so.

    A `SimpleQueue` alone will not do: its `get(timeout=...)` waits for ever if a signal comes
    meanwhile and is still being handled when the time is up. A `Queue` may not be put to by a
    signal handler.
    """

    def __init__(self) -> None:
        self._items: queue.SimpleQueue[T] = queue.SimpleQueue()
        self._bell = threading.Lock()  # free: something was put since the reader looked
        self._bell.acquire()

    def put(self, item: T) -> None:
        """Add an item; from any thread, and from signal handlers."""
        self._items.put(item)
        self.ring()

    def ring(self) -> None:
        """Have the reader look: now if it listens, or as soon as it does."""
        if self._bell.locked():
            with contextlib.suppress(RuntimeError):  # another rang it in between
                self._bell.release()

    def hush(self) -> None:
        """Forget what has rung: the reader looks now."""
        self._bell.acquire(blocking=False)

    def listen(self, timeout_s: float) -> None:
        """Wait for a ring, for no longer than so."""
        self._bell.acquire(timeout=max(timeout_s, 0.0))

    def empty(self) -> bool:
        return self._items.empty()

    def get_nowait(self) -> T:
        """The oldest item; `queue.Empty` if there is none."""
        return self._items.get_nowait()

    def get(self, timeout_s: float | None) -> T:
        """The oldest item; `queue.Empty` if none comes within `timeout_s` (None: wait for one)."""
        if timeout_s is None:
            return self._items.get()
        self.hush()
        with contextlib.suppress(queue.Empty):
            return self._items.get_nowait()
        self.listen(timeout_s)
        return self._items.get_nowait()
