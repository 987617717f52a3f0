"""What came of a run: counts, goodput, attainment, latencies, batch sizes, the cost of deciding.

Attainment and goodput keep every submitted request in the denominator. `by_steps` tells whether
long and short requests were treated alike: counts by the work that was asked for (refused requests,
of which nobody knows that, are in none of its ranges). Memory does not grow with the number of
requests (see `tally`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from neustream.core.events import BranchEnded, Corrected, Emitted, Ended, LegEnded, Submitted
from neustream.engine.by_leg import ByLeg
from neustream.engine.events import Decided, Finished, Gone, Record, Refused
from neustream.engine.tally import Distribution, Part, Share, Shares, Steps, Tokens

OUTCOMES = ("on_time", "late", "dropped", "failed", "cancelled")


class Report:
    """An observer that adds up a run.

    `start` is the instant that the trace began at; spans count from there.
    """

    def __init__(self, start: float = 0.0) -> None:
        self.start = start
        self.submitted = 0
        self.counts = dict.fromkeys(OUTCOMES, 0)
        self.latency = Distribution()
        self.decision = Distribution()
        self.batch_size: dict[str, Steps] = {}
        self.classes: dict[str, Share] = {}
        self.by_steps = Shares()
        self.reasons: dict[str, int] = {}
        self.interrupted = False
        self.tokens = Tokens()
        self.by_leg = ByLeg()
        """Calls and tools, where parts of requests have promises of their own."""
        self.preemptions = 0
        """Times that a request lost its KV blocks."""
        self.put_aside = 0
        """Of these, those whose blocks were kept in the host's memory, not computed again."""
        self.members: dict[str, Part] = {}
        """What each member of several did."""
        self.corrections: dict[str, dict[float, float]] = {}
        """Observed over profiled seconds by stage and batch size, of corrected profiles."""
        self._last_arrival = start
        self._last_end = start
        self._adds_up: dict[type[Any], Callable[[Any], None]] = {
            Finished: self._finished,
            Emitted: self.tokens.emitted,
            LegEnded: self._part,
            BranchEnded: self._part,
            Decided: self._decided,
            Ended: self._ended,
            Submitted: self._submitted,
            Gone: self._gone,
            Refused: self._refused,
            Corrected: self._corrected,
        }

    def __call__(self, record: Record) -> None:
        adds_up = self._adds_up.get(type(record))
        if adds_up is not None:
            adds_up(record)

    def _decided(self, record: Decided) -> None:
        self.decision.add(record.seconds * 1e6)

    def _submitted(self, record: Submitted) -> None:
        self.submitted += 1
        self._last_arrival = max(self._last_arrival, record.arrival)
        for share in self._shares(record):
            share.submitted += 1
            share.weight += record.slo.weight

    def _gone(self, record: Gone) -> None:
        self.submitted -= 1
        self.tokens.gone(record.id)
        self.by_leg.gone(record.id)
        for share in self._shares(record):
            share.submitted -= 1
            share.weight -= record.slo.weight

    def _corrected(self, record: Corrected) -> None:
        self.corrections[record.stage] = {2**k: factor for k, factor in record.factors.items()}

    def _part(self, record: LegEnded | BranchEnded) -> None:
        if isinstance(record, BranchEnded):
            self.by_leg.branch(record)
            return
        self.by_leg.leg(record)
        if not record.branch or record.id in self.tokens:  # branches may outlive their request
            self.tokens.parted(record.id)

    def _finished(self, record: Finished) -> None:
        step = record.step
        seconds = record.at - step.started_at
        steps = self.batch_size.get(step.stage)
        if steps is None:
            steps = self.batch_size[step.stage] = Steps()
        steps.took(len(step.ids), step.profiled_s, seconds)
        if step.preempted:
            self.preemptions += len(step.preempted)
            self.put_aside += len(step.aside)
        if record.member:
            part = self._part_of(record.member)
            part.steps += 1
            part.busy_s += seconds

    def _part_of(self, member: str) -> Part:
        part = self.members.get(member)
        if part is None:
            part = self.members[member] = Part()
        return part

    def _shares(self, record: Submitted | Ended | Gone) -> tuple[Share, Share]:
        """Those that a request counts in: of its SLO class, and of its number of steps."""
        classes = self.classes.setdefault(record.slo.name, Share())
        return classes, self.by_steps.of(record.steps)

    def _refused(self, record: Refused) -> None:
        self.submitted += 1
        self.counts["failed"] += 1
        self._last_arrival = max(self._last_arrival, record.arrival)
        self._last_end = max(self._last_end, record.at)
        share = self.classes.setdefault(record.slo.name, Share())
        share.submitted += 1
        share.weight += record.slo.weight
        self._failed(record.reason)

    def _failed(self, reason: str) -> None:
        if reason in self.reasons or len(self.reasons) < 20:
            self.reasons[reason] = self.reasons.get(reason, 0) + 1

    def _ended(self, record: Ended) -> None:
        outcome: str = record.status
        if outcome == "done":
            outcome = "on_time" if record.on_time else "late"
        self.counts[outcome] += 1
        if record.member:
            part = self._part_of(record.member)
            part.ended += 1
            part.on_time += outcome == "on_time"
        self.tokens.ended(record)
        self.by_leg.ended(record)
        self._last_end = max(self._last_end, record.at)
        if outcome == "on_time":
            for share in self._shares(record):
                share.on_time += 1
                share.weight_on_time += record.slo.weight
        if record.status == "done":
            self.latency.add(record.latency_s)
        elif record.status == "failed":
            self._failed(record.reason)

    @property
    def duration(self) -> float:
        """Seconds from the start of the trace to the last end."""
        return self._last_end - self.start

    @property
    def goodput(self) -> float:
        """Requests on time per second of the span of the arrivals (of the run, if that is 0)."""
        return self.counts["on_time"] / self.span if self.span > 0 else 0.0

    @property
    def span(self) -> float:
        """Seconds that goodput is counted over."""
        return self._last_arrival - self.start or self.duration

    @property
    def attainment(self) -> float:
        """Share of the submitted requests that kept every promise."""
        return self.counts["on_time"] / self.submitted if self.submitted else 0.0

    def profile_error(self) -> dict[str, float]:
        """Observed over profiled seconds of steps, by stage: 1.1 is 10 percent slower."""
        return {
            stage: steps.observed_s / steps.expected_s
            for stage, steps in self.batch_size.items()
            if steps.expected_s > 0
        }

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON types; seconds, but `decision_us` in microseconds."""
        quantiles = {f"p{q}": self.latency.percentile(q) for q in (50, 90, 99)}
        out: dict[str, Any] = {
            "duration_s": self.duration,
            "counts": {"submitted": self.submitted, **self.counts},
            "goodput_rps": self.goodput,
            "attainment": self.attainment,
            "latency_s": {"mean": self.latency.mean, **quantiles},
            "batch_size": {stage: sizes.mean for stage, sizes in self.batch_size.items()},
            "decisions": self.decision.count,
            "decision_us": {f"p{q}": self.decision.percentile(q) for q in (50, 99)},
            "busy_s": {stage: steps.observed_s for stage, steps in self.batch_size.items()},
            "profile_error": self.profile_error(),
            "by_steps": self.by_steps.ranges(),
        }
        return out | {name: value for name, value in self._where_it_applies().items() if value}

    def _where_it_applies(self) -> dict[str, Any]:
        """What only some runs have; falsy where this one has not."""
        ended = self.counts["on_time"] + self.counts["late"]
        one_by_one = self.tokens.outputs > ended
        named = set(self.classes) - {""}
        parts = {name: dict(vars(part)) for name, part in sorted(self.members.items())}
        return {
            "tokens": self.tokens.to_dict(self.span, self.submitted) if one_by_one else None,
            "legs": self.by_leg.to_dict(),
            "preemptions": self.preemptions,
            "put_aside": self.put_aside,
            "classes": {n: dict(vars(of)) for n, of in self.classes.items()} if named else None,
            "corrections": {stage: dict(of) for stage, of in self.corrections.items()},
            "failures": dict(self.reasons),
            "interrupted": self.interrupted,
            "members": parts if len(parts) > 1 else None,
        }
