"""Requests that are promised nothing wait behind those that are; but not for ever."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from neustream.server.errors import HTTPError


class Patience:
    """Gives up a request of which nothing has come for too long, because others go first.

    Looked at are its beginning, and then the time from one output to the next. How long a step takes
    that is under way is no reason: a long prompt and an image may take their time.

    Args:
        seconds: so long; None: it may wait for ever.
        began: whether it runs, or has run.
        wait_s: when to come again; None: not known.
        give_up: told what its client hears.

    Attributes:
        outputs: how many came; whoever reads them counts.
    """

    def __init__(
        self,
        seconds: float | None,
        began: Callable[[], bool],
        wait_s: Callable[[], float | None],
        give_up: Callable[[HTTPError], None],
    ) -> None:
        self.outputs = 0
        self._seconds = seconds
        self._began = began
        self._wait_s = wait_s
        self._give_up = give_up
        self._seen = 0
        self._timer: asyncio.TimerHandle | None = None
        self._again()

    def end(self) -> None:
        """Nobody waits any more."""
        if self._timer is not None:
            self._timer.cancel()

    def _again(self) -> None:
        if self._seconds is not None:
            self._timer = asyncio.get_running_loop().call_later(self._seconds, self._look)

    def _look(self) -> None:
        assert self._seconds is not None
        if not self.outputs and not self._began():
            text = f"it has waited {self._seconds:g} s, and others were promised something"
            self._give_up(HTTPError(429, text, "crowded", retry_after_s=self._wait_s()))
        elif self.outputs and self.outputs == self._seen:
            text = f"nothing more has come for {self._seconds:g} s: others were promised something"
            self._give_up(HTTPError(504, text, "late"))
        else:
            self._seen = self.outputs
            self._again()
