"""A profile, run: its loads one after another, and those that a sweep finds."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from neustream.bench.load import Load as Playing
from neustream.bench.load import Options
from neustream.bench.plan import Plan, Target
from neustream.bench.playing import Tick
from neustream.bench.profiles.profile import Load, Profile, Sweep
from neustream.bench.reports.building import SCRAPED
from neustream.bench.reports.scraping import Scraper
from neustream.bench.runs import Run, Size, expected_size
from neustream.errors import BackendError
from neustream.workload.texts import Texts

SAMPLES = 20
"""Requests of a load by which it is told what the others ask for."""
SAMPLE_S = 0.5
"""Seconds between two looks at how many requests of a burst are left."""


def expected_bytes(profile: Profile, texts: Texts) -> Size:
    """About how many bytes the records take of the loads that are known beforehand.

    What requests ask for is told by a few of each load. Where a duration may end a load before all
    its requests are sent, only those count that come in it; of a closed loop nobody knows how many.
    """
    size = Size(0, 0)
    for number, load in enumerate(profile.played_first):
        count = load.expected
        if load.duration_s is not None:
            count = min(count, dataclasses.replace(load, requests=None).expected)
        if few := min(round(count), SAMPLES):
            asks = list(profile.plan(at_once(load, few), number, texts).asks)
            each = expected_size(asks, profile.target.ignore_eos).times(1 / max(len(asks), 1))
            size = size.plus(each.times(count))
    return size


def at_once(load: Load, requests: int) -> Load:
    """A load of so many requests, without instants and without an end."""
    return dataclasses.replace(
        load,
        law="closed",
        requests=requests,
        rate=None,
        ramp=None,
        rampup_s=0.0,
        duration_s=None,
    )


class Running:
    """Runs a profile once.

    Args:
        target: its server, with a URL and a model.
        options: how the client works.
        scrape_s: how often the server's metrics are read meanwhile; 0: never.
        begins: told the number of each load and the load, before it is played.
        tick: called for each request that is over, if the client is one process.
    """

    def __init__(
        self,
        profile: Profile,
        target: Target,
        texts: Texts,
        *,
        options: Options | None = None,
        scrape_s: float = 0.0,
        begins: Callable[[int, Plan], None] = lambda number, plan: None,
        tick: Tick = lambda record: None,
    ) -> None:
        self._profile = profile
        self._target = target
        self._texts = texts
        self._options = options or Options()
        self._scrape_s = scrape_s
        self._begins = begins
        self._tick = tick
        self._stop = threading.Event()
        self._playing: Playing | None = None
        self._kept: list[Run] = []

    def interrupt(self) -> None:
        """End it early, from any thread or a signal handler."""
        self._stop.set()
        if self._playing is not None:
            self._playing.interrupt()

    @property
    def interrupted(self) -> bool:
        return self._stop.is_set()

    def runs(self) -> Iterator[Run]:
        """What came of each load, as soon as it is over; none after an interruption.

        Raises:
            BackendError: a process of the client died, or a sweep found no rates.
        """
        if self._profile.warmups:
            self._warm_up()
        for number, load in enumerate(self._loads()):
            if number and self._stop.wait(self._profile.pause_s):
                return
            self._kept.append(self._run(number, load))
            yield self._kept[-1]
            if self._stop.is_set():
                return

    def _loads(self) -> Iterator[Load]:
        sweep = self._profile.sweep
        if sweep is None:
            yield from self._profile.loads
            return
        if sweep.kind == "between":  # its probes are results too
            yield from sweep.probes
        else:
            self._kept += [self._run(-1, load) for load in sweep.probes]
        if not self._stop.is_set():
            yield from loads_after(sweep, self._kept)

    def _run(self, number: int, load: Load) -> Run:
        profile = self._profile
        if profile.source is None:
            raise BackendError(f"{profile.path}: a profile of {profile.dialect} has no load")
        plan = profile.plan(load, max(0, number), self._texts)
        self._begins(number, plan)
        run = self._scraped(plan)
        if load.open_ended and not run.interrupted and len(run.records) == len(plan.asks):
            run.meta["note"] = f"ended by its {len(plan.asks)} requests, before its time"
        return run

    def _scraped(self, plan: Plan) -> Run:
        if not self._scrape_s:
            return self._play(plan)
        with Scraper(self._target, self._scrape_s) as scraper:
            run = self._play(plan)
        run.meta[SCRAPED] = scraper.samples
        return run

    def _play(self, plan: Plan) -> Run:
        self._playing = Playing(plan, self._target, self._options, self._tick)
        if self._stop.is_set():
            self._playing.interrupt()
        return self._playing.run()

    def _warm_up(self) -> None:
        """Requests that nothing is kept of, one at a time."""
        few = at_once(self._profile.loads[0], self._profile.warmups)
        first = dataclasses.replace(few, concurrency=1)
        self._play(self._profile.plan(first, 0, self._texts))


def loads_after(sweep: Sweep, probes: Sequence[Run]) -> list[Load]:
    """The loads of a sweep, by what its probes were like.

    Raises:
        BackendError: the probes tell no rates.
    """
    if sweep.kind == "saturation":
        rates = _up_to(saturation(probes[0], sweep.percentile), sweep)
    else:
        slow, fast = (_throughput(run) for run in probes[:2])
        rates = [float(rate) for rate in np.linspace(slow, fast, sweep.count + 1)[1:]]
    return [_at(sweep.load, rate) for rate in rates if rate > 0]


def _at(load: Load, rate: float) -> Load:
    if load.requests is not None or load.duration_s is None or load.law in ("even", "poisson"):
        return dataclasses.replace(load, rate=rate)
    return dataclasses.replace(load, rate=rate, requests=max(1, int(rate * load.duration_s)))


def _up_to(top: float, sweep: Sweep) -> list[float]:
    if sweep.spacing == "linear":
        rates = np.linspace(1, top, sweep.count)
    else:
        rates = 1 + top - np.geomspace(top, 1, sweep.count)
    return [float(rate) for rate in np.round(rates, 2)]


def saturation(burst: Run, percentile: float) -> float:
    """The rate at which the requests of a burst ended: a percentile of how fast they became fewer.

    Raises:
        BackendError: they ended too fast for that.
    """
    ended = [record for record in burst.records if record.done and record.end_s is not None]
    sent = np.sort([record.sent_s or 0.0 for record in ended])
    ends = np.sort([record.end_s or 0.0 for record in ended])
    last = float(ends[-1]) if len(ends) else 0.0
    looks = np.arange(0.0, last + SAMPLE_S, SAMPLE_S)
    left = np.searchsorted(sent, looks, "right") - np.searchsorted(ends, looks, "right")
    fewer = -np.diff(left) / SAMPLE_S
    falling = fewer[fewer > 0]
    if len(falling) < 2:
        raise BackendError(
            f"load.sweep: of the burst, {len(ended)} of {len(burst.records)} requests ended within "
            f"{last:.1f} s: too few to tell the rate at which they are served; raise num_requests"
        )
    return float(np.percentile(falling, percentile))


def _throughput(run: Run) -> float:
    done = sum(record.done for record in run.records)
    if not done or not run.duration_s:
        raise BackendError(
            "profile.kind sweep: no request of a load was done, so that there are no rates"
        )
    return done / run.duration_s
