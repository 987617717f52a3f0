"""Requests of a service's own: what its mounts learn from while callers ask for nothing."""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Mapping

from neustream.engine.engine import Engine
from neustream.errors import RequestError
from neustream.service.mount import REHEARSAL, Call, Mount


class Rehearsing:
    """Has an engine serve what mounts would learn from, until somebody asks for something.

    It knows nothing of its service, which nobody may refer to any more while one of these runs.

    Args:
        open: what callers wait for; nothing is begun while there is any.
    """

    def __init__(self, engine: Engine, mounts: Mapping[str, Mount], open: Mapping[str, object]) -> None:
        self._engine = engine
        self._mounts = mounts
        self._open = open
        self._ids: set[str] = set()  # under way
        self._over = False

    def begin(self) -> None:
        """Nobody wants anything: let a mount serve some requests that teach it what steps take."""
        if self._open or self._over or self._ids:
            return
        for mount in self._mounts.values():
            for call in mount.rehearsal():
                self._one(call)
            if self._ids:
                return

    def stop(self) -> None:
        """Somebody asks for something: what is under way is given up."""
        for id in list(self._ids):
            self._cancel(id)

    def end(self) -> None:
        """Begin no more, and give up what is under way."""
        self._over = True
        self.stop()

    def _one(self, call: Call) -> None:
        id = f"{REHEARSAL}{uuid.uuid4().hex}"
        try:
            done = self._engine.submit(call.graph, call.params, id=id)
        except RequestError:  # it is being closed
            call.over()
            return
        self._ids.add(id)
        done.add_done_callback(lambda _: self._ended(call, id))
        if self._open:  # since a moment ago: who asked may not have seen this one
            self._cancel(id)

    def _ended(self, call: Call, id: str) -> None:
        self._ids.discard(id)
        call.over()
        self.begin()

    def _cancel(self, id: str) -> None:
        with contextlib.suppress(RequestError):  # the engine is closed: it is over anyway
            self._engine.cancel(id)
