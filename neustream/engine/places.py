"""A bound on how many requests of a workload are under way at once."""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Container

from neustream.core.types import Request


class Places:
    """Who has to wait for a place. It is told what comes and what has ended, on any clock.

    Args:
        most: requests under way at once, 1 or more; None: no bound.
        ahead: ids of requests that get a place before all others that wait for one.
    """

    def __init__(self, most: int | None = None, ahead: Container[str] = ()) -> None:
        self._most = most
        self._ahead = ahead
        self._inside: set[str] = set()
        self._first: deque[Request] = deque()
        self._others: deque[Request] = deque()

    def __bool__(self) -> bool:
        return self._most is not None

    @property
    def waiting(self) -> bool:
        """Whether a request waits for a place."""
        return bool(self._first or self._others)

    def enter(self, request: Request) -> bool:
        """Whether a request has a place; else it waits for one."""
        if self._most is None or request.id in self._inside:
            return True
        if len(self._inside) < self._most:
            self._inside.add(request.id)
            return True
        (self._first if request.id in self._ahead else self._others).append(request)
        return False

    def left(self, id: str, at: float) -> Request | None:
        """A request is over; the one that has its place from then on, and comes at that instant."""
        if id not in self._inside:
            return None
        self._inside.remove(id)
        queue = self._first or self._others
        if not queue:
            return None
        request = queue.popleft()
        self._inside.add(request.id)
        return dataclasses.replace(request, arrival=max(request.arrival, at))
