"""What came of a run: counts, goodput, attainment, latencies, batch sizes, the cost of deciding.

Attainment and goodput keep every submitted request in the denominator. `by_steps` tells whether
long and short requests were treated alike: counts by the work that was asked for (refused requests,
of which nobody knows that, are in none of its ranges). Memory does not grow with the number of
requests: distributions are exact up to `KEEP` values and a uniform sample of all values beyond
(reservoir sampling, seeded), and steps are counted in at most `BINS` bins.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import numpy as np

from neustream.core.events import Corrected, Emitted, Ended, Submitted
from neustream.core.types import TICK
from neustream.engine.events import Decided, Finished, Record, Refused

KEEP = 100_000
BINS = 4096
RANGES = 5
OUTCOMES = ("on_time", "late", "dropped", "failed", "cancelled")


class Mean:
    """The number and mean of values."""

    def __init__(self) -> None:
        self.count = 0
        self.sum = 0.0

    def add(self, value: float) -> None:
        self.count += 1
        self.sum += value

    @property
    def mean(self) -> float | None:
        return self.sum / self.count if self.count else None


class Distribution(Mean):
    """Values seen: their number, exact mean, and quantiles from at most `KEEP` of them."""

    def __init__(self) -> None:
        super().__init__()
        self._values: list[float] = []
        self._random = random.Random(0)

    def add(self, value: float) -> None:
        super().add(value)
        if self.count <= KEEP:
            self._values.append(value)
        elif (at := self._random.randrange(self.count)) < KEEP:
            self._values[at] = value

    def percentile(self, q: float) -> float | None:
        return float(np.percentile(self._values, q)) if self._values else None


class Share:
    """Requests and weight on time of those submitted, for one SLO class or range of steps."""

    def __init__(self) -> None:
        self.submitted = self.on_time = 0
        self.weight = self.weight_on_time = 0.0

    def add(self, other: Share) -> None:
        self.submitted += other.submitted
        self.on_time += other.on_time
        self.weight += other.weight
        self.weight_on_time += other.weight_on_time


class Shares:
    """A share for each number of steps; for bins of equal width where there are over `BINS`."""

    def __init__(self) -> None:
        self._width = 1
        self._bins: dict[int, Share] = {}

    def of(self, steps: int) -> Share:
        """The share that requests of `steps` are counted in, until more bins are needed."""
        share = self._bins.get(steps // self._width)
        if share is None:
            share = self._bins[steps // self._width] = Share()
            while len(self._bins) > BINS:
                self._width *= 2
                self._bins = _joined(self._bins, 2, 0)
                share = self._bins[steps // self._width]
        return share

    def ranges(self) -> list[dict[str, Any]]:
        """At most `RANGES` ranges of equal width, from the fewest steps on, without empty ones."""
        if not self._bins:
            return []
        first = min(self._bins)
        each = -(-(max(self._bins) - first + 1) // RANGES)
        width = each * self._width
        return [
            {"from": start, "to": start + width - 1, **vars(share)}
            for at, share in sorted(_joined(self._bins, each, first).items())
            for start in [first * self._width + at * width]
        ]


def _joined(bins: Mapping[int, Share], each: int, first: int) -> dict[int, Share]:
    """Every `each` bins in one, counted from the bin `first`."""
    joined: dict[int, Share] = {}
    for at, share in bins.items():
        joined.setdefault((at - first) // each, Share()).add(share)
    return joined


class Tokens:
    """What requests whose outputs come one by one were like: LLM calls, and others that stream.

    TTFT is from arrival to the first output, TPOT the mean time per further output of a request,
    ITL each single gap, E2EL from arrival to the end; of requests that ended with an output and are
    done. `good` counts those that a client-side harness calls good (`vllm bench serve --goodput`:
    TTFT, mean TPOT and E2EL within their SLO), whether or not each token was in time.
    """

    def __init__(self) -> None:
        self.ttft, self.tpot, self.itl, self.e2el = (Distribution() for _ in range(4))
        self.outputs = 0
        self.in_time = 0
        self.good = 0
        self._open: dict[
            str, list[float]
        ] = {}  # by request: first output at, latest output at, outputs

    def emitted(self, record: Emitted) -> None:
        self.outputs += 1
        self.in_time += not record.late
        seen = self._open.get(record.id)
        if seen is None:
            self._open[record.id] = [record.at, record.at, 1.0]
            return
        self.itl.add(record.at - seen[1])
        seen[1] = record.at
        seen[2] += 1

    def ended(self, record: Ended) -> None:
        seen = self._open.pop(record.id, None)
        if record.status != "done":
            return
        first, last, outputs = seen or (record.at, record.at, 1.0)
        slo, ttft, e2el = record.slo, first - record.arrival, record.latency_s
        tpot = (last - first) / (outputs - 1) if outputs > 1 else 0.0
        self.ttft.add(ttft)
        self.e2el.add(e2el)
        if outputs > 1:
            self.tpot.add(tpot)
        self.good += (
            ttft <= slo.first + TICK and tpot <= slo.step + TICK and e2el <= slo.total + TICK
        )

    def to_dict(self, span: float, submitted: int) -> dict[str, Any]:
        """Seconds; `goodput_tps` are outputs in time per second of `span`."""
        out: dict[str, Any] = {
            f"{name}_s": {"mean": some.mean, **{f"p{q}": some.percentile(q) for q in (50, 90, 99)}}
            for name, some in (
                ("ttft", self.ttft),
                ("tpot", self.tpot),
                ("itl", self.itl),
                ("e2el", self.e2el),
            )
        }
        out["outputs"] = self.outputs
        out["goodput_tps"] = self.in_time / span if span > 0 else 0.0
        out["throughput_tps"] = self.outputs / span if span > 0 else 0.0
        out["client_goodput_rps"] = self.good / span if span > 0 else 0.0
        out["client_attainment"] = self.good / submitted if submitted else 0.0
        return out


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
        self.batch_size: dict[str, Mean] = {}
        self.classes: dict[str, Share] = {}
        self.by_steps = Shares()
        self.reasons: dict[str, int] = {}
        self.interrupted = False
        self.tokens = Tokens()
        self.preemptions = 0
        """Times that a request lost its KV blocks and had to compute them again."""
        self.corrections: dict[str, dict[float, float]] = {}
        """Observed over profiled seconds by stage and batch size, of corrected profiles."""
        self._expected: dict[str, float] = {}
        self._observed: dict[str, float] = {}
        self._last_arrival = start
        self._last_end = start

    def __call__(self, record: Record) -> None:
        if isinstance(record, Finished):
            self._finished(record)
        elif isinstance(record, Emitted):
            self.tokens.emitted(record)
        elif isinstance(record, Decided):
            self.decision.add(record.seconds * 1e6)
        elif isinstance(record, Ended):
            self._ended(record)
        elif isinstance(record, Submitted):
            self.submitted += 1
            self._last_arrival = max(self._last_arrival, record.arrival)
            for share in self._shares(record):
                share.submitted += 1
                share.weight += record.slo.weight
        elif isinstance(record, Refused):
            self._refused(record)
        elif isinstance(record, Corrected):
            self.corrections[record.stage] = {2**k: factor for k, factor in record.factors.items()}

    def _finished(self, record: Finished) -> None:
        step = record.step
        sizes = self.batch_size.get(step.stage)
        if sizes is None:
            sizes = self.batch_size[step.stage] = Mean()
            self._expected[step.stage] = self._observed[step.stage] = 0.0
        sizes.add(len(step.ids))
        self._expected[step.stage] += step.profiled_s
        self._observed[step.stage] += record.at - step.started_at
        self.preemptions += len(step.preempted)

    def _shares(self, record: Submitted | Ended) -> tuple[Share, Share]:
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
        self.tokens.ended(record)
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
        return {s: self._observed[s] / x for s, x in self._expected.items() if x > 0}

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
            "busy_s": dict(self._observed),
            "profile_error": self.profile_error(),
            "by_steps": self.by_steps.ranges(),
        }
        return out | {name: value for name, value in self._where_it_applies().items() if value}

    def _where_it_applies(self) -> dict[str, Any]:
        """What only some runs have; falsy where this one has not."""
        ended = self.counts["on_time"] + self.counts["late"]
        one_by_one = self.tokens.outputs > ended
        named = set(self.classes) - {""}
        return {
            "tokens": self.tokens.to_dict(self.span, self.submitted) if one_by_one else None,
            "preemptions": self.preemptions,
            "classes": {n: dict(vars(of)) for n, of in self.classes.items()} if named else None,
            "corrections": {stage: dict(of) for stage, of in self.corrections.items()},
            "failures": dict(self.reasons),
            "interrupted": self.interrupted,
        }
