"""What the executors of an instance keep of a request that is to leave it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from neustream.core.batch import StepInput
from neustream.engine.clock import Clock
from neustream.engine.events import Call
from neustream.engine.executor import Mover
from neustream.engine.member import Drive
from neustream.errors import NeustreamError, told

Kept = Mapping[str, Mapping[str, Any]]


class Packing:
    """What executors keep of a request, until all of them have told.

    `packed`: called then, on the loop's thread, with what each pool's keep; or why they cannot part
    with it.
    """

    def __init__(self, clock: Clock, packed: Callable[[Kept, str], None]) -> None:
        self._clock = clock
        self._packed = packed
        self._left = 1
        self._pieces: dict[str, dict[str, Any]] = {}
        self.failed = ""

    def ask_all(self, drive: Drive, input: StepInput) -> None:
        """Ask all workers of an instance."""
        for name, executor in drive.executors.items():
            if not isinstance(executor, Mover):
                self.failed = f"executor of pool {name!r} cannot part with requests"
                continue
            for worker in range(drive.scheduler.pools[name].workers):
                self._ask(name, partial(executor.export, input, worker))
        self._one_less()

    def _ask(self, pool: str, export: Callable[[], Any]) -> None:
        try:
            pieces = export()
        except NeustreamError as error:
            self.failed = told(error)
            return
        self._left += 1
        if pieces.done():
            self._answered(pool, pieces, 0.0)
            return
        clock = self._clock
        pieces.add_done_callback(
            lambda done: clock.post(Call(partial(self._answered, pool, done)), clock.now())
        )

    def _answered(self, pool: str, pieces: Any, now: float) -> None:
        error = pieces.exception()
        if error is not None:
            self.failed = told(error)
        else:
            self._pieces.setdefault(pool, {}).update(pieces.result())
        self._one_less()

    def _one_less(self) -> None:
        self._left -= 1
        if not self._left:
            kept = {pool: pieces for pool, pieces in self._pieces.items() if pieces}
            self._packed(kept, self.failed)
