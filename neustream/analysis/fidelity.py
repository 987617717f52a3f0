"""How far what was simulated is from what was served.

The error of a share on time is served minus simulated, in points (hundredths of the requests). That of
a quantile of the latency is simulated over served, minus 1: above 0 the simulator is too slow. `Watch`
sees what a served run did that a simulation may leave out, and `ladder` lets the simulator know of one
after the other.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from rich.table import Table

from neustream.analysis.tables import new_table
from neustream.config.schema import Simulation
from neustream.core.batch import Batch
from neustream.core.events import BranchEnded, Submitted
from neustream.engine.decision_time import DecisionTime, decision_time
from neustream.engine.events import Decided, Finished, Record, Started
from neustream.engine.report import Report
from neustream.experiment.prepared import Prepared
from neustream.experiment.running import simulate

POINTS, SHARE = 3.0, 0.10
"""The errors that are called close: of a share on time in points, of a quantile as a share of it."""


@dataclass(frozen=True)
class Outcome:
    """What is compared: the share on time, and quantiles of the latency in seconds (None: nobody ended)."""

    attainment: float
    p50_s: float | None
    p99_s: float | None

    @classmethod
    def of(cls, entry: Mapping[str, Any]) -> Outcome:
        """That of a report as JSON types."""
        latency = entry["latency_s"]
        return cls(entry["attainment"], latency["p50"], latency["p99"])


@dataclass(frozen=True)
class Error:
    """How far a simulation is off: points, and shares of the served quantiles (None: not known of both)."""

    points: float
    p50: float | None
    p99: float | None

    @property
    def close(self) -> bool:
        """Whether it is within `POINTS` and `SHARE`."""
        quantiles = [abs(off) for off in (self.p50, self.p99) if off is not None]
        return abs(self.points) <= POINTS + 1e-9 and all(off <= SHARE + 1e-9 for off in quantiles)


def error(served: Outcome, simulated: Outcome) -> Error:
    """How far `simulated` is from `served`."""
    points = 100 * (served.attainment - simulated.attainment)
    return Error(points, _off(served.p50_s, simulated.p50_s), _off(served.p99_s, simulated.p99_s))


def _off(served: float | None, simulated: float | None) -> float | None:
    """By what share of it a simulated quantile exceeds the served one."""
    return simulated / served - 1 if served and simulated is not None else None


def errors_table(title: str, first: str, rows: Sequence[tuple[str, Outcome, Outcome]]) -> Table:
    """Served beside simulated, a row for each of (name, served, simulated); `first` heads the names."""
    headings = ("on time", "points", "p50 s", "off", "p99 s", "off", "close")
    table = new_table(title, first, headings)
    for name, served, simulated in rows:
        off = error(served, simulated)
        table.add_row(
            name,
            f"{served.attainment:.1%}/{simulated.attainment:.1%}",
            f"{off.points:+.1f}",
            f"{_seconds(served.p50_s)}/{_seconds(simulated.p50_s)}",
            _percent(off.p50),
            f"{_seconds(served.p99_s)}/{_seconds(simulated.p99_s)}",
            _percent(off.p99),
            "yes" if off.close else "no",
        )
    table.caption = f"a/b: served/simulated; close: within {POINTS:g} points and {SHARE:.0%}"
    table.caption_justify = "left"
    return table


def _seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:+.0%}"


# -- what a served run did ------------------------------------------------------------------------


@dataclass(frozen=True)
class Served:
    """What a run on real devices did beside its steps.

    `steps`: seconds over those of the profile, by kind of step that did not fail. `spread`: the sigma of its
    logarithm from step to step, of the kind with the most steps. `gap_us`: from the end of a step to the
    start of the next on the same worker, but for a decision in between, where a request of the next waited for
    that worker already and no decision had it wait on purpose; median and 99th percentile; `idle_share`: of
    these with their decisions in the time between the first step and the last.
    `decisions`, `decision_us` (median, 99th percentile); `mean_gap_us`: of a gap; `decision`: what a decision took
    by what was decided; `planned`: share of steps decided beside the one before. `late_us`: from the arrival of a
    request to when it was taken in; median and 99th percentile.
    """

    steps: Mapping[str, float]
    spread: float
    gap_us: tuple[float, float]
    idle_share: float
    decisions: int
    decision_us: tuple[float, float]
    mean_gap_us: float
    decision: DecisionTime
    planned: float
    late_us: tuple[float, float]

    @property
    def costs(self) -> Simulation:
        """What the simulator has to know of the engine: the mean of gaps, of which a few are long, decisions
        by what was decided, and the median of calls, which often wait for others."""
        gap_s, call_s = self.mean_gap_us / 1e6, self.late_us[0] / 1e6
        return Simulation(handover_s=gap_s, call_s=call_s, **self.decision._asdict())

    @property
    def step(self) -> float:
        """The mean over kinds of steps that `steps` has, weighted alike."""
        return statistics.fmean(self.steps.values()) if self.steps else 1.0


class Watch:
    """An observer of one run that tells what `Served` has."""

    def __init__(self) -> None:
        self._began: dict[tuple[str, str, int], list[_Begin]] = {}
        self._ended: dict[tuple[str, str, int], list[float]] = {}
        self._ready: dict[str, float] = {}  # when each request came, or its last step or `par` ended
        self._asked: dict[tuple[str, str], list[Decided]] = {}  # by pool: since its last step began
        self._ratios: dict[str, list[float]] = {}
        self._spent: dict[str, list[float]] = {}
        self._planned: list[bool] = []
        self._decided: list[Decided] = []
        self._late: list[float] = []

    def __call__(self, record: Record) -> None:
        if isinstance(record, Started):
            self._started(record)
        elif isinstance(record, Finished):
            self._finished(record)
        elif isinstance(record, Decided):
            self._decided.append(record)
            if not record.ahead:
                self._asked.setdefault((record.member, record.pool), []).append(record)
        elif isinstance(record, Submitted):
            self._late.append(record.at - record.arrival)
            self._ready[record.id] = record.at
        elif isinstance(record, BranchEnded) and record.decided:
            self._ready[record.job.rpartition("/")[0]] = record.at

    def _started(self, record: Started) -> None:
        step = record.step
        asked = self._asked.pop((record.member, step.pool), [])
        decided = asked.pop().seconds if asked and not step.planned else 0.0
        ready = min(map(self._ready_at, step.ids), default=math.inf)
        vain = max([each.at for each in asked], default=-math.inf)
        self._began.setdefault(_worker(record), []).append(_Begin(record.at, decided, ready, vain))
        self._planned.append(step.planned)

    def _ready_at(self, id: str) -> float:
        """Since when a request waits; of a branch, not before what it is a branch of came to it."""
        names = itertools.accumulate(id.split("/"), "{}/{}".format)
        return max([self._ready[name] for name in names if name in self._ready], default=math.inf)

    def _finished(self, record: Finished) -> None:
        step = record.step
        seconds = record.at - step.started_at
        self._ended.setdefault(_worker(record), []).append(record.at)
        self._ready.update(dict.fromkeys(step.ids, record.at))
        if record.error:  # how long it would have taken nobody knows
            return
        self._ratios.setdefault(step.stage, []).append(seconds / step.profiled_s)
        spent = self._spent.setdefault(step.stage, [0.0, 0.0])
        spent[0] += seconds
        spent[1] += step.profiled_s

    def told(self) -> Served:
        """What was seen, once the run is over."""
        gaps, waited = self._gaps()
        busy = [max(some) - self._began[key][0].at for key, some in self._ended.items()]
        decided = [record.seconds for record in self._decided]
        most = max(self._ratios.values(), key=len, default=[])
        return Served(
            steps={stage: real / profiled for stage, (real, profiled) in self._spent.items()},
            spread=spread_of(most),
            gap_us=two(gaps),
            idle_share=(sum(gaps) + sum(waited)) / sum(busy) if sum(busy) > 0 else 0.0,
            decisions=len(self._decided),
            decision_us=two(decided),
            mean_gap_us=mean_us(gaps),
            decision=decision_time(self._decided),
            planned=statistics.fmean(self._planned) if self._planned else 0.0,
            late_us=two(self._late),
        )

    def _gaps(self) -> tuple[list[float], list[float]]:
        """Seconds between two steps of a worker while a request of the later one waited for it, but for
        the decision in between; and seconds of that."""
        gaps, waited = [], []
        for key, ended in self._ended.items():
            for end, begin in zip(ended, self._began[key][1:], strict=False):
                if begin.ready <= end and begin.vain < end:
                    gaps.append(begin.at - end - begin.decided)
                    waited.append(begin.decided)
        return gaps, waited


class _Begin(NamedTuple):
    """A step began `at`, after a decision of `decided` seconds; the first of its requests was `ready`, and
    a decision before that one was in `vain` at the latest."""

    at: float
    decided: float
    ready: float
    vain: float


def _worker(record: Started | Finished) -> tuple[str, str, int]:
    return record.member, record.step.pool, record.step.worker


def two(seconds: Sequence[float]) -> tuple[float, float]:
    """Median and 99th percentile in microseconds; zeros of nothing."""
    if not seconds:
        return 0.0, 0.0
    median, high = np.percentile(seconds, (50, 99)) * 1e6
    return float(median), float(high)


def mean_us(seconds: Sequence[float]) -> float:
    """The mean in microseconds; 0 of nothing, or where an end was told after what came of it."""
    return max(1e6 * statistics.fmean(seconds), 0.0) if seconds else 0.0


def spread_of(ratios: Sequence[float]) -> float:
    """The sigma of a log-normal distribution with these quartiles; 0 of fewer than four."""
    if len(ratios) < 4:
        return 0.0
    low, high = np.percentile(np.log(ratios), (25, 75))
    return float(high - low) / 1.349


# -- what the simulator has to know ---------------------------------------------------------------


def ladder(prepared: Prepared, policy: str, seen: Served, took: Callable[[Batch], float]) -> dict[str, Report]:
    """Simulations that know more and more of a served run, by what they know.

    `profile`: what the profiles say. `speed`: what each kind of step took over its profile, in the mean.
    `steps`: what steps took when (`Took`). `engine`: what the engine took beside them, too.
    """
    return {
        "profile": simulate(prepared, policy),
        "speed": simulate(prepared, policy, speed=seen.steps),
        "steps": simulate(prepared, policy, took=took),
        "engine": simulate(prepared, policy, took=took, device=seen.costs),
    }


def explained(errors: Mapping[str, Error]) -> str:
    """The first of the simulations of a `ladder` that is close; "nothing" if none is."""
    return next((name for name, off in errors.items() if off.close), "nothing")
