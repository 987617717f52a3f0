"""Ctrl-C while an engine serves."""

from __future__ import annotations

import signal
from types import FrameType

from neustream.engine.engine import Engine


class Interrupts:
    """Ctrl-C ends the open requests of the engine being watched as cancelled; a second one the program."""

    def __init__(self) -> None:
        self.hit = False
        self._engine: Engine | None = None

    def watch(self, engine: Engine) -> None:
        """Interrupt this engine, and no other before it."""
        self._engine = engine
        if self.hit:
            engine.interrupt()

    def _stop(self, number: int, frame: FrameType | None) -> None:
        self.hit = True
        signal.signal(signal.SIGINT, self._before)
        if self._engine is not None:
            self._engine.interrupt()

    def __enter__(self) -> Interrupts:
        self._before = signal.signal(signal.SIGINT, self._stop)
        return self

    def __exit__(self, *exc: object) -> None:
        signal.signal(signal.SIGINT, self._before)
