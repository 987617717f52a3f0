"""What a report adds up in: means, distributions, shares by number of steps, pace of tokens.

Memory does not grow with the number of requests: distributions are exact up to `KEEP` values and a
uniform sample of all values beyond (reservoir sampling, seeded), and steps are counted in at most
`BINS` bins.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Mapping
from typing import Any

import numpy as np

from neustream.core.events import Emitted, Ended
from neustream.core.types import TICK

KEEP = 100_000
LATEST = 1000
BINS = 4096
RANGES = 5


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


class Steps(Mean):
    """The steps of a stage: how many jobs ran in each, and seconds of all of them."""

    def __init__(self) -> None:
        super().__init__()
        self.expected_s = self.observed_s = 0.0

    def took(self, jobs: int, expected_s: float, observed_s: float) -> None:
        """One more."""
        self.count += 1
        self.sum += jobs
        self.expected_s += expected_s
        self.observed_s += observed_s


class Distribution(Mean):
    """Values seen: their number, exact mean, and quantiles from at most `KEEP` of them."""

    def __init__(self) -> None:
        super().__init__()
        self._values: list[float] = []
        self._random = random.Random(0)

    def add(self, value: float) -> None:
        self.count += 1  # as `Mean` does; it is called for each output
        self.sum += value
        if self.count <= KEEP:
            self._values.append(value)
        elif (at := int(self._random.random() * self.count)) < KEEP:
            self._values[at] = value

    def percentile(self, q: float) -> float | None:
        return float(np.percentile(self._values, q)) if self._values else None


class Latest(Mean):
    """Values seen: their number and exact mean, and quantiles of the latest `LATEST`."""

    def __init__(self) -> None:
        super().__init__()
        self._values: deque[float] = deque(maxlen=LATEST)

    def add(self, value: float) -> None:
        super().add(value)
        self._values.append(value)

    def percentile(self, q: float) -> float | None:
        values = list(self._values)
        return float(np.percentile(values, q)) if values else None


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


class Part:
    """What one member of several did: requests that ended there, steps, seconds in steps."""

    def __init__(self) -> None:
        self.ended = self.on_time = self.steps = 0
        self.busy_s = 0.0


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
        self._parted: set[str] = set()

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

    def __contains__(self, id: str) -> bool:
        """Whether a request has made outputs, and is not over."""
        return id in self._open

    def parted(self, id: str) -> None:
        """It has several calls: its TTFT and TPOT are those of its legs (see `ByLeg`)."""
        self._parted.add(id)
        self._open.pop(id, None)

    def gone(self, id: str) -> None:
        """It ends elsewhere."""
        self._open.pop(id, None)
        self._parted.discard(id)

    def ended(self, record: Ended) -> None:
        seen = self._open.pop(record.id, None)
        if record.id in self._parted:
            self._parted.discard(record.id)
            if record.status == "done":
                self.e2el.add(record.latency_s)
                self.good += record.on_time
            return
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
