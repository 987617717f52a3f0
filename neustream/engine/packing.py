"""Requests made ready to move: what the executors keep of them, asked for and waited for."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from neustream.core.batch import StepInput
from neustream.core.entry import Entry
from neustream.engine.events import Packed, Unpacked
from neustream.engine.executor import Mover
from neustream.engine.worker import Pieces
from neustream.errors import NeustreamError, told

if TYPE_CHECKING:
    from neustream.engine.loop import Loop
    from neustream.engine.member import Drive

log = logging.getLogger(__name__)

Places = Mapping[str, Pieces]
"""What executors keep of a request, by pool."""


@dataclass(eq=False)
class Parcel:
    """A request that is about to leave `source`; `pieces` come from its executors.

    `then` is called once all are there, or with `failed`, which says why they are not.
    """

    source: Drive
    id: str
    then: Callable[[Parcel, float], None]
    left: int = 0
    failed: str = ""
    pieces: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def kept(self) -> dict[str, dict[str, Any]]:
        """The pieces, of the pools that have any."""
        return {name: pieces for name, pieces in self.pieces.items() if pieces}


class Packing:
    """Asks the workers of members for what they keep of requests that are held."""

    def __init__(self, loop: Loop) -> None:
        self._loop = loop
        self._parcels: dict[tuple[Drive, str], Parcel] = {}
        loop.handlers |= {Packed: self._packed, Unpacked: self._unpacked}

    def begin(self, parcel: Parcel, given: StepInput, now: float) -> None:
        """Ask all workers of the parcel's member, each of which can be asked (`movable`)."""
        drive = parcel.source
        self._parcels[drive, given.id] = parcel
        asked: list[tuple[str, Future[Pieces]]] = []
        for name, executor in drive.executors.items():
            assert isinstance(executor, Mover)
            for worker in range(drive.scheduler.pools[name].workers):
                try:
                    asked.append((name, executor.export(given, worker)))
                except NeustreamError as error:
                    parcel.failed = told(error)
        parcel.left = len(asked)
        for name, pieces in asked:
            pieces.add_done_callback(partial(self._post, parcel, name))
        if not asked:
            parcel.failed = parcel.failed or "nobody can be asked what is kept of it"
            self._over(parcel, now)
        elif drive.patience_s < math.inf and not all(pieces.done() for _, pieces in asked):
            self._loop.clock.post(Unpacked(parcel), now + drive.patience_s)

    def give_up(self, drive: Drive, now: float) -> None:
        """A worker is lost, with what it would have handed over."""
        for parcel in list(self._parcels.values()):
            if parcel.source is drive:
                parcel.failed = parcel.failed or "a worker that keeps something of it is lost"
                self._over(parcel, now)

    def _post(self, parcel: Parcel, pool: str, pieces: Future[Pieces]) -> None:
        """On whatever thread: hand a worker's answer to the loop."""
        clock = self._loop.clock
        clock.post(Packed(parcel, pool, pieces), clock.now())

    def _packed(self, event: Packed, now: float) -> None:
        parcel = event.parcel
        error = event.pieces.exception()
        if error is not None:
            parcel.failed = told(error)
        else:
            parcel.pieces.setdefault(event.pool, {}).update(event.pieces.result())
        parcel.left -= 1
        if not parcel.left:
            self._over(parcel, now)

    def _unpacked(self, event: Unpacked, now: float) -> None:
        """A module's `export` does not come back: the request goes on without it."""
        parcel = event.parcel
        if self._parcels.get((parcel.source, parcel.id)) is parcel:
            parcel.failed = "nobody told in time what is kept of it"
            log.error("request %r stays: %s", parcel.id, parcel.failed)
            self._over(parcel, now)

    def _over(self, parcel: Parcel, now: float) -> None:
        """All that was asked is known, or will not be."""
        place = parcel.source, parcel.id
        if self._parcels.get(place) is parcel:
            del self._parcels[place]
            parcel.then(parcel, now)


def held(drive: Drive, id: str) -> Entry | None:
    """The request, if it waits to be given: it is held, or its next stage is served elsewhere."""
    job = drive.scheduler.jobs.get(id)
    return job if isinstance(job, Entry) and job.status in ("held", "away") else None


def movable(drive: Drive) -> bool:
    """Whether all workers can be asked for what they keep, and will answer."""
    able = all(isinstance(executor, Mover) for executor in drive.executors.values())
    return able and not any(drive.lost(pool) for pool in drive.executors)


def has_room(drive: Drive, pieces: Places) -> bool:
    """Whether what was kept of a request finds the worker that will ask for it: the only one."""
    pools = drive.scheduler.pools
    return all(
        name in pools and pools[name].workers == 1 and isinstance(drive.executors[name], Mover)
        for name in pieces
    )
