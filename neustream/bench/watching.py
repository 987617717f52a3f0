"""Records of requests that an engine of this process serves, in virtual time or for real."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from neustream.bench.hearing import fail
from neustream.bench.plan import Plan
from neustream.bench.playing import Tick, record_of
from neustream.bench.records import Outcome, Record
from neustream.bench.runs import Run
from neustream.core.events import Emitted, Ended, Submitted
from neustream.core.types import SLO
from neustream.engine.events import Record as Told
from neustream.engine.events import Refused
from neustream.workload.asks import Ask, Limits

OUTCOMES: Mapping[str, Outcome] = {
    "dropped": "dropped",
    "failed": "failed",
    "cancelled": "interrupted",
}


class Watch:
    """An observer of an engine that plays a plan.

    Args:
        ids: of the plan's requests, as the engine knows them.

    Attributes:
        origin: the instant of the engine's clock that the plan's arrivals count from.
    """

    def __init__(self, plan: Plan, ids: Sequence[str], tick: Tick = lambda record: None) -> None:
        self.origin = 0.0
        self._plan = plan
        self._asks: dict[str, Ask] = dict(zip(ids, plan.asks, strict=True))
        self._ids = {ask.id: id for id, ask in self._asks.items() if ask.session}
        self._records: dict[str, Record] = {}
        self._tick = tick

    def __call__(self, told: Told) -> None:
        if isinstance(told, Emitted):
            record = self._records.get(told.id)
            if record is not None and record.kind == "text":
                record.token_times_s.append(told.at - self.origin)
        elif isinstance(told, Submitted):
            record = self._came(told.id, told.slo, told.arrival)
            record.sent_s = told.arrival - self.origin
            if self._plan.concurrency is not None:
                record.waited_s = record.sent_s - record.scheduled_s
        elif isinstance(told, Ended):
            self._ended(told)
        elif isinstance(told, Refused):
            record = self._came(told.id, told.slo, told.arrival)
            if self._blocked(told.id):
                fail(
                    record,
                    "blocked",
                    f"the turn before it, {self._asks[told.id].follows!r}, failed",
                )
            else:
                record.end_s = told.at - self.origin
                fail(record, "failed", told.reason)
            self._tick(record)

    def _came(self, id: str, slo: SLO, arrival: float) -> Record:
        ask = self._asks[id]
        due = self._due(ask) if self._plan.scheduled else arrival - self.origin
        record = self._records[id] = record_of(ask, due)
        if not record.limits.promises:  # it is the experiment that promises
            record.limits = Limits(slo.first, slo.step, slo.total, slo.weight)
            record.slo_class = record.slo_class or slo.name
        return record

    def _before(self, ask: Ask) -> Record | None:
        """Of the turn before it."""
        return self._records.get(self._ids.get(ask.follows, ""))

    def _due(self, ask: Ask) -> float:
        """When it was to be sent: a turn once the one before it is over, and thought about."""
        due, before = ask.arrival_s or 0.0, self._before(ask)
        if before is None or before.end_s is None:
            return due
        return max(due, before.end_s + (ask.think_s if before.done else 0.0))

    def _blocked(self, id: str) -> bool:
        """Whether the turn before it came to nothing."""
        before = self._before(self._asks[id])
        return before is not None and not before.done

    def _ended(self, told: Ended) -> None:
        record = self._records.get(told.id)
        if record is None:
            return
        record.end_s = told.at - self.origin
        if record.kind == "text":
            record.output_tokens = told.outputs or len(record.token_times_s)
            record.counted_by = "usage" if record.output_tokens else ""
        if told.status == "done":
            record.images = record.image.get("number", 0)
        else:
            fail(record, OUTCOMES[told.status], told.reason)
        self._tick(record)

    def run(self, target: Mapping[str, Any], started: float, *, interrupted: bool) -> Run:
        """What came of it, once the engine has ended."""
        records = sorted(self._records.values(), key=lambda record: record.scheduled_s)
        for record in records:
            if record.end_s is None:  # a blocked one stays so
                fail(record, "interrupted", "interrupted")
        return Run(
            self._plan.name,
            records,
            self._plan.about(),
            dict(target),
            started,
            max((record.end_s or 0.0 for record in records), default=0.0),
            interrupted,
        )
