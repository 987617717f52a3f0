"""Instances that are to start: the first ones, and those that take the places of others."""

from __future__ import annotations

import itertools
import logging
import threading
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial

from neustream.backends.ray.callers import Machines
from neustream.backends.ray.wire import Joined, Superseded
from neustream.cluster.head import Head
from neustream.errors import told

log = logging.getLogger(__name__)

MOST_BACKOFF_S = 30.0
"""The longest time between two tries to start an instance."""


class Starting:
    """Has instances started; on the driver's thread.

    Args:
        first: instances that are there before anybody is served. Where an earlier head left some
            these suffice: callers ask again for what they have, before its lease ends.
        post: has work done on the driver's thread.
        entered: an instance of a role serves from now on; raises why it cannot.
        superseded: another head has one of them.

    Attributes:
        up: set once the first instances serve, or with why one of them does not.
    """

    def __init__(
        self,
        head: Head,
        machines: Machines,
        first: int,
        post: Callable[[Callable[[float], None]], None],
        entered: Callable[[str, str, Joined, float], None],
        superseded: Callable[[Superseded], None],
    ) -> None:
        self.up: Future[None] = Future()
        self._head = head
        self._machines = machines
        self._left = min(first, len(machines.found)) or first
        self._post = post
        self._entered = entered
        self._superseded = superseded
        self._numbers = itertools.count(1)
        self._failures = 0

    def adopt(self) -> None:
        """Have those that an earlier head left."""
        for name, role in self._machines.found.items():
            starting = self._head.fleet.starting
            starting[role] = starting.get(role, 0) + 1
            joined = self._machines.adopt(name)
            joined.add_done_callback(partial(self._came, name, role))

    def _came(self, name: str, role: str, joined: Future[Joined]) -> None:
        self._post(partial(self._adopted, name, role, joined))

    def _adopted(self, name: str, role: str, joined: Future[Joined], now: float) -> None:
        """One that was left serves this head, or another one takes its place."""
        try:
            self._enter(name, role, joined.result(), now)
        except Superseded as error:
            self._superseded(error)
        except Exception as error:  # noqa: BLE001  it is told
            log.error("instance %r of an earlier head does not serve: %s", name, told(error))
            self._machines.stop(name, "it does not serve", kill=True)
            self._head.not_started(role, told(error), now)

    def start(self, role: str) -> None:
        """Start one more."""
        names = (f"{role}-{number}" for number in self._numbers)
        name = next(name for name in names if name not in self._machines.taken)
        joined = self._machines.start(name, role)
        joined.add_done_callback(lambda joined: self._post(partial(self._joined, name, role, joined)))

    def _joined(self, name: str, role: str, joined: Future[Joined], now: float) -> None:
        """An instance serves, or cannot."""
        try:
            self._enter(name, role, joined.result(), now)
        except Superseded as error:
            self._superseded(error)
        except Exception as error:  # noqa: BLE001  it is told, and another one is tried later
            self._machines.stop(name, "it does not serve", kill=True)
            if self.up.done():
                self._try_later(role, told(error))
            else:
                self.up.set_exception(error)

    def give_way(self, error: Superseded) -> None:
        """Nothing is started any more."""
        if not self.up.done():
            self.up.set_exception(error)

    def _enter(self, name: str, role: str, joined: Joined, now: float) -> None:
        """An instance serves from now on; raises why it does not."""
        self._entered(name, role, joined, now)
        self._failures = 0
        self._left -= 1
        if self._left <= 0 and not self.up.done():
            self.up.set_result(None)

    def _try_later(self, role: str, why: str) -> None:
        """An instance that was ordered does not serve; the next try comes later each time."""
        self._failures += 1
        wait_s = min(2.0**self._failures / 2, MOST_BACKOFF_S)
        log.error("an instance could not be started (next try in %.0f s): %s", wait_s, why)
        work = partial(self._head.not_started, role, why)
        timer = threading.Timer(wait_s, lambda: self._post(work))
        timer.daemon = True
        timer.start()
