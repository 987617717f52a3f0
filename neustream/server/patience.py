"""Requests that are promised nothing wait behind those that are; but not for ever."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import NamedTuple

from neustream.server.errors import HTTPError

LOOKS = 10
"""How often it is looked while a request may wait: by so much of that time one may wait longer."""


def _nobody(why: HTTPError) -> None:
    """Nobody is to hear of it any more."""


class Progress(NamedTuple):
    """How far requests have come: their steps and outputs so far, and whether a step is under way."""

    done: int = 0
    under_way: bool = False


class Patience:
    """Gives up a request that does not go on for too long, because others go first.

    Looked at are its beginning, and then the time without a step of it and without an output. How long
    a step takes that is under way is no reason: a long prompt and an image may take their time.

    Args:
        seconds: so long; None: it may wait for ever.
        began: whether it runs, or has run.
        progress: how far it has come.
        wait_s: when to come again; None: not known.
        give_up: told what its client hears.

    Attributes:
        outputs: how many came; whoever reads them counts.
    """

    def __init__(
        self,
        seconds: float | None,
        began: Callable[[], bool],
        progress: Callable[[], Progress],
        wait_s: Callable[[], float | None],
        give_up: Callable[[HTTPError], None],
    ) -> None:
        self.outputs = 0
        self._seconds = seconds
        self._began = began
        self._progress = progress
        self._wait_s = wait_s
        self._give_up = give_up
        self._seen = (0, 0)
        self._loop = asyncio.get_running_loop()
        self._since = self._loop.time()
        self._timer: asyncio.TimerHandle | None = None
        self._again()

    def end(self) -> None:
        """Nobody waits any more."""
        if self._timer is not None:
            self._timer.cancel()
        self._give_up = _nobody  # who waits here, and this, end with their last use

    def _again(self) -> None:
        if self._seconds is not None:
            self._timer = self._loop.call_later(self._seconds / LOOKS, self._look)

    def _look(self) -> None:
        assert self._seconds is not None
        now, progress = self._loop.time(), self._progress()
        seen = progress.done, self.outputs
        if progress.under_way or seen != self._seen:
            self._seen, self._since = seen, now
        if now - self._since < self._seconds:
            self._again()
        elif self.outputs or self._began():
            text = f"it has not gone on for {self._seconds:g} s: others were promised something"
            self._give_up(HTTPError(504, text, "late"))
        else:
            text = f"it has waited {self._seconds:g} s, and others were promised something"
            self._give_up(HTTPError(429, text, "crowded", retry_after_s=self._wait_s()))
