"""Who is told of what happens in a cluster: of requests, of instances and their steps."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

from neustream.cluster.happenings import Entered, Happening
from neustream.core.events import Emitted, Ended, Submitted
from neustream.engine.events import Decided, Finished, Observer, Record, Started

log = logging.getLogger(__name__)

Watcher = Callable[[Happening], None]
OfSteps = Started | Finished | Decided
"""Records that instances tell of; what becomes of requests the head tells."""


class Telling:
    """Tells observers of records, and watchers of the rest; what they raise is logged, and theirs.

    Args:
        observers: told as those of an engine are, on the cluster's clock; `member`: the instance.
    """

    def __init__(self, observers: Sequence[Observer], watchers: Sequence[Watcher]) -> None:
        self.observers = list(observers)
        self.watchers = list(watchers)

    def tell(self, record: Submitted | Emitted | Ended | OfSteps) -> None:
        """A record."""
        for observer in self.observers:
            try:
                observer(record)
            except Exception:
                log.exception("an observer of a cluster raised")

    def happened(self, event: Happening) -> None:
        """A move, a loss and the like."""
        for watcher in self.watchers:
            try:
                watcher(event)
            except Exception:
                log.exception("a watcher of a cluster raised")


def shifted(records: Iterable[Record], member: str, by_s: float) -> list[OfSteps | Entered]:
    """What an instance tells of its records, on another clock, which says `by_s` more."""
    found: list[OfSteps | Entered] = []
    for record in records:
        if isinstance(record, Started | Finished):
            step = replace(record.step, started_at=record.step.started_at + by_s)
            found.append(replace(record, step=step, at=record.at + by_s, member=member))
        elif isinstance(record, Decided):
            found.append(replace(record, at=record.at + by_s, member=member))
        elif isinstance(record, Submitted):
            found.append(Entered(record.id, member, record.at + by_s))
    return found
