"""What an engine may do at a moment: run once, take requests while it serves, close."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator

from neustream.engine.clock import Clock
from neustream.engine.snapshot import State
from neustream.errors import RequestError


class Life:
    """The state of an engine, changed under `gate`: between submitting threads and its loop's end.

    Attributes:
        running: whether its loop runs; served: whether that is, or was, for callers.
        accepting: whether they may still submit; closed: whether `close` was called.
        fault: what broke the loop.
    """

    def __init__(self, clock: Clock) -> None:
        self.gate = threading.RLock()
        self.running = self.served = self.accepting = self.closed = False
        self.fault: BaseException | None = None
        self._clock = clock
        self._process = os.getpid()

    @property
    def forked(self) -> bool:
        """Whether this is another process: its threads and locks stayed behind in the parent."""
        return os.getpid() != self._process

    @property
    def state(self) -> State:
        """What `Snapshot` says."""
        if self.fault is not None:
            return "failed"
        if self.running:
            ending = self.closed or (self.served and not self.accepting)
            return "closing" if ending else "serving"
        return "closed" if self.closed or self.served else "new"

    def begin(self, *, serving: bool) -> None:
        """Its loop is to run; RequestError if it does, or has ended."""
        with self.gate:
            if self.running:
                raise RequestError("this engine is running already")
            if self.closed or self.served:
                raise RequestError("this engine was closed, or interrupted: make another one")
            if self.fault is not None:
                raise RequestError("this engine failed: make another one") from self.fault
            self.running = True
            self.served = self.accepting = serving

    @contextlib.contextmanager
    def serving(self, *, closing: bool = False) -> Iterator[float]:
        """The present instant, with the engine kept from closing meanwhile.

        RequestError if it takes no requests: not started, closed, or in another process. With
        `closing`, one that serves what is open takes them too.
        """
        if self.forked:
            raise RequestError(
                f"this engine lives in process {self._process}; make another one after a fork"
            )
        with self.gate:
            if not self.served or not self.running or (self.closed and not closing):
                problem = "this engine is not serving: call start() first, and not after close()"
                raise RequestError(problem, code="closed") from self.fault
            yield self._clock.now()
