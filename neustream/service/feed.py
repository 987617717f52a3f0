"""Outputs of answers, read on an event loop: the loop is woken once for all that came since it looked."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import threading
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from neustream.service.answer import Answer


AT_ONCE = 64
"""Calls that are made before an event loop looks at its sockets again."""


class Bell:
    """Calls that other threads want made on an event loop.

    Waking a loop is a system call. A step brings an output to each of its requests: the first
    rings, and the loop makes the calls of all that came until it looks. Where these are many, it
    does other work between some of them and the next: who asks whether a server is well does not
    wait until a thousand streams have had their tokens.
    """

    _bells: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, Bell] = weakref.WeakKeyDictionary()
    _making = threading.Lock()

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = weakref.ref(loop)  # it is a value of the dictionary that must not hold its key
        self._calls: dict[Callable[[], None], None] = {}
        self._lock = threading.Lock()

    @classmethod
    def here(cls) -> Bell:
        """The one of the running loop."""
        loop = asyncio.get_running_loop()
        with cls._making:
            return cls._bells.setdefault(loop, cls(loop))

    def ring(self, call: Callable[[], None]) -> None:
        """Have `call` made on the loop, once, however often it is asked for before that; it must not raise."""
        with self._lock:
            rung = bool(self._calls)
            self._calls[call] = None
        loop = self._loop()
        if rung or loop is None:
            return
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody listens
            loop.call_soon_threadsafe(self._heard)

    def _heard(self) -> None:
        with self._lock:
            calls = list(itertools.islice(self._calls, AT_ONCE))
            for call in calls:
                del self._calls[call]
            more = bool(self._calls)
        if more:
            asyncio.get_running_loop().call_soon(self._heard)
        for call in calls:
            call()


def _nobody() -> None:
    """Nobody is to be woken."""


class Feed:
    """What comes of an answer, taken by one reader on an event loop.

    Args:
        wake: called on the loop when there may be more to take.

    Attributes:
        over: whether all was taken, and no more will come.
        done: whether the next `take` tells how it ended, without waiting for more.
    """

    def __init__(self, answer: Answer[Any], wake: Callable[[], None]) -> None:
        self.over = self.done = False
        self._answer = answer
        self._item_of = answer.reader()
        self._taken = 0
        self._wrong: Exception | None = None
        self._wake = wake
        self._bell = Bell.here()
        answer.tell(self.ring)

    @property
    def waiting(self) -> int:
        """How many outputs came and were not taken."""
        return self._answer.count - self._taken

    def take(self) -> list[Any]:
        """All that came since it was last asked, maybe nothing.

        Once nothing is left, it raises what the request came to, if that is not its result. What goes
        wrong where an output is read is raised behind those before it.
        """
        done = self._answer.done()  # asked first: the last output comes before the end
        found = self._read()
        self.done = done or self._wrong is not None
        if self._wrong is not None and not found:
            self.over = True
            raise self._wrong
        if done and not found:
            self.over = True
            self._answer.result()
        return found

    def _read(self) -> list[Any]:
        """The items of outputs that came, up to one that cannot be read."""
        found: list[Any] = []
        if self._wrong is not None:
            return found
        for output in self._answer.since(self._taken):
            self._taken += 1
            try:
                found.append(self._item_of(output))
            except Exception as wrong:  # noqa: BLE001  it is raised at the next look
                self._wrong = wrong
                break
        return found

    def ring(self) -> None:
        """There may be more; from any thread."""
        self._bell.ring(self._wake)

    def close(self) -> None:
        """Nobody reads any more; it knows its reader no more, so that they end with their last use."""
        self._answer.tell_no_more(self.ring)
        self._wake = _nobody
