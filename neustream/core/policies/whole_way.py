"""Language models on the way of requests through several pools, where only the end is promised.

What a request has ahead elsewhere is not idle time: others are there too. And what is begun here is
wasted if there is no room for it further on.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from neustream.core.job import Job
from neustream.core.policies.model_queues import (
    ModelQueues,
    at_decode,
    has_progress,
    one_model,
)
from neustream.core.policies.newcomers import WORTH
from neustream.core.policies.on_time import DOOMED
from neustream.core.policies.way_ahead import Leg, applies, go_on, likely
from neustream.core.policies.way_forecast import Forecast, Way, turns_of, way_of
from neustream.core.policies.way_rooms import (
    AGAIN,
    Ahead,
    KnownLegs,
    Looked,
    Room,
    ScarcePrice,
    begun_first,
    planned,
    tight,
)
from neustream.core.policies.way_run import OTHERS, Row, Run, row_of
from neustream.core.policy import Decision, Policy, View
from neustream.core.steps import Step
from neustream.core.types import TICK

Floats = NDArray[np.float64]
SPARE = 0.95
"""Share of a pool's memory up to which those join that will probably not be in time in the end."""
SPARE_SCARCE = 0.5
"""The same where that pool is the scarcest, of those of which it is not known how long they get."""
BEHIND = 0.05
"""Share of what one of these has to spare for its call by which it may be behind an even way."""
TRIES = 8
"""Waiting prompts that do not fit before no more are tried in a decision."""


@dataclass(frozen=True, slots=True)
class WholeWay:
    """For a language model whose requests go on to other pools, or came from some.

    1. Who cannot be in time even alone is given up.
    2. Each of the others has a *chance* to be in time, by how long generations have been getting
       here and further on (`way_run.py`). While some wait, those who run and cost the
       others more than that are given up; where it is known how long they get, also those with
       hardly any. Branches of a request that needs them all have one
       chance, the least of theirs, and cost the others what all of them do.
    3. All who run decode. A prompt joins them if all of it and of them is expected to have memory
       to the end, and the number in time is expected to rise by two fifths of its own chance, where
       half of the time that each has to spare is for others further on.
    4. Requests that have begun come first, those that have to start first in front. A new one
       begins only if each pool on its way has room for it when it comes there, beside all that have
       begun, and if it brings what the scarcest pool's time is worth by what was asked for lately.
       A branch has begun with the first branch of its request: one is worth nothing without the
       others. What follows their join takes time that each has to spare, and is charged to none.
    5. What all these leave of the memory is for others, the latest first: outputs that come soon
       are worth something even of a request that will probably not be in time in the end. Where it
       is known how long generations get, one joins only if it is not behind an even way, on which
       each part takes as many times what it takes alone, and if more are on such a way with it.

    Where requests go on to other models of the same device, their ends depend on the
    others' steps. There the whole device is foreseen (`way_forecast.py`): a new request begins, the
    latest first, if more are in time with it; who has begun is given up if more are in time
    without it, and else joins as soon as there is memory.

    Where all is in one pool, or outputs have deadlines of their own, `tokens` decides.

    Args:
        tokens: see above.
        price: times what the scarcest pool's time is worth that a new request has to bring.
    """

    tokens: Policy
    price: float = 1.0

    def decide(self, view: View) -> Decision:
        if not applies(view):
            return self.tokens.decide(view)
        return _Step(view, one_model(view), self.price).decision()


@dataclass(slots=True)
class _Step:
    """One decision in the making."""

    view: View
    model: ModelQueues
    price: float
    drop: dict[Job, str] = field(default_factory=dict)
    ahead: dict[Job, Ahead] = field(default_factory=dict)
    rows: dict[Job, Row] = field(default_factory=dict)
    run: Run = field(init=False)
    waiting: list[Job] = field(default_factory=list)
    short: bool = False
    rooms: dict[str, Room] = field(default_factory=dict)
    forecast: Forecast | None = None

    def __post_init__(self) -> None:
        self.run = Run(self.model)

    def decision(self) -> Decision:
        view, model = self.view, self.model
        self.drop = view.hopeless()
        under_way = [job for job in model.prefills if has_progress(job)]
        waiting = [job for job in model.prefills if not has_progress(job)]
        looked = view.memo.setdefault((Looked, view.pool.name, model.label), Looked())
        if waiting and looked.again(view.now, model.decodes, model.prefills):
            self._look(under_way, waiting)
        running = [job for job in (*model.decodes, *under_way) if job not in self.drop]
        sizes = self._sizes([job for job in under_way if job not in self.drop])
        new = self._admit(self.waiting, sizes)
        if waiting and not new and not self.drop:
            looked.in_vain(view.now, self._again_at(), model.decodes, model.prefills)
        jobs = [job for job in running if job in sizes or at_decode(job)] + new
        if not jobs and waiting:
            return Decision(drop=self.drop, wake_at=self._again_at())
        lasts = not (self.drop or sizes) and len(jobs) == len(model.decodes)
        until = math.inf if not waiting else looked.until
        return Decision(jobs, self.drop, sizes=sizes, until=until if lasts else -math.inf)

    def _again_at(self) -> float:
        """When to look again if nobody comes or goes."""
        decodes = self.model.decodes
        context = sum([job.size for job in decodes])
        step = Step(decodes=max(len(decodes), 1), context=max(context, 1.0))
        return self.view.now + AGAIN * self.model.seconds(step)

    def _look(self, under_way: Sequence[Job], waiting: Sequence[Job]) -> None:
        """See who can be in time yet, and who of those that wait may be tried."""
        running = [job for job in (*self.model.decodes, *under_way) if job not in self.drop]
        self.run = Run(self.model, [self._row(job) for job in running])
        if go_on(self.view):
            self._foresee(waiting)
        else:
            self._give_up_late()
        self.waiting = [job for job in waiting if job not in self.drop]

    # -- those who run ----------------------------------------------------------------------------

    def _row(self, job: Job) -> Row:
        """What is known of one."""
        known = self.rows.get(job)
        if known is None:
            known = self.rows[job] = row_of(self.model, job, self._ahead(job))
        return known

    def _ahead(self, job: Job) -> Ahead:
        known = self.ahead.get(job)
        if known is None:
            cache = self.view.memo.setdefault(KnownLegs, KnownLegs())
            known = self.ahead[job] = cache.of(self.view, job)
        return known

    def _legs(self, job: Job) -> list[Leg]:
        return self._ahead(job).legs

    def _give_up_late(self) -> None:
        """Those who cost the others more than their own chance; the least first.

        And those with hardly any, if it is known how long they get. Else who costs nobody stays:
        what looks hopeless may rest on maxima that nobody comes to.
        """
        while len(self.run.rows) > 1:
            chances = self.run.chances(self.run.hard)
            if float(chances.min()) == 1.0:
                return
            worths = self.run.worths(chances)
            worst = int(np.argmin(worths))
            rows = self.run.rows_of(worst)
            if len(rows) == len(self.run.rows):
                return
            least = min(rows, key=chances.__getitem__)
            row = self.run.rows[least]
            doomed = row.known and worths[worst] < DOOMED * row.job.weight
            others = self.run.without(rows)
            rest = others.worths(others.chances(others.hard))
            if not doomed and float(rest.sum()) <= float(worths.sum()) + TICK:
                return
            job = row.job
            self.drop[job] = "shed: it cannot be in time beside the others, and some wait"
            self.run = others

    # -- those who wait ---------------------------------------------------------------------------

    def _sizes(self, under_way: Sequence[Job]) -> dict[Job, float]:
        """Parts of the prompts that are under way, of as many as have seats."""
        left = self._tokens()
        seats = self.model.seats - len(self.model.decodes)
        sizes: dict[Job, float] = {}
        for job in under_way:
            size = min(job.size, left)
            if size >= 1 and len(sizes) < seats:
                sizes[job] = size
                left -= size
        return sizes

    def _tokens(self) -> float:
        """Tokens of prompts that a step may have."""
        return float(self.view.pool.step_tokens - len(self.model.decodes))

    def _admit(self, waiting: Sequence[Job], sizes: dict[Job, float]) -> list[Job]:
        """Those whose prompts join this step; notes how much of each."""
        new: list[Job] = []
        misses = 0
        ahead = 0.0
        tokens = self._tokens() - sum(sizes.values())
        for job, share in self._in_order(waiting):
            if misses >= TRIES or tokens < 1:
                break
            seconds = ahead + self.model.prompt_speed * job.unit_s
            if len(self.run.rows) >= self.model.seats or not self._fits(job, seconds, share):
                misses += 1
                self.short = self.short or share == 1.0
                continue
            self._take(job, seconds)
            sizes[job] = min(job.size, tokens)
            tokens -= sizes[job]
            ahead = seconds
            new.append(job)
        return new

    def _in_order(self, waiting: Sequence[Job]) -> Iterator[tuple[Job, float]]:
        """Who is tried, and up to which share of the memory."""
        if not waiting:
            return
        if self.forecast is not None:
            for job in sorted(waiting, key=begun_first):
                yield job, 1.0
            return
        price = self.view.memo.setdefault(ScarcePrice, ScarcePrice())
        price.learn(self.view, waiting)
        least = self.price * price.price
        worth = {job: price.density(self._legs(job), planned(job), job) for job in waiting}
        chosen = [
            job
            for job in waiting
            if worth[job] >= least and not tight(self._legs(job), job, self.view.now)
        ]
        begun = [job for job in chosen if job.begun]
        tried = set()
        for job in sorted(begun, key=lambda job: job.due - job.remaining_s):
            tried.add(job)
            yield job, 1.0
        fresh = [job for job in chosen if not job.begun]
        for job in sorted(fresh, key=lambda job: -worth[job]):
            if self._has_room(job):
                tried.add(job)
                yield job, 1.0
        if self.short:
            return
        for job in sorted(waiting, key=lambda job: -job.arrival):
            if job not in tried:
                half = price.scarce(self.view) and not self._row(job).known
                yield job, SPARE_SCARCE if half else SPARE

    def _fits(self, job: Job, seconds: float, share: float) -> bool:
        """Whether it has memory to its end beside the others, and adds to who is in time."""
        run = self.run
        if not run.may_take(job, share):
            return False
        row = self._row(job)
        if not run.may_keep(row, share):
            return False
        beside = run.plus(row, seconds)
        if not beside.has_memory(share):
            return False
        if not run.rows:  # nobody else needs the device, and it may end early
            return True
        if self.forecast is not None:
            return job.begun or self._adds(job, self.forecast)
        by, before = beside.soft, run.soft_worths
        if share < 1.0 and row.known:
            if row.behind(self.view.now + seconds) > BEHIND * row.spare:
                return False
            by, before = beside.even, run.even_worths
        elif job.begun:
            by[-1] = row.hard
        after = beside.chances(by)
        own = float(after[-1])
        return own >= DOOMED and run.gain(before, beside, after) >= WORTH * own * job.weight

    def _take(self, job: Job, seconds: float) -> None:
        if job.started_at is None:
            self._begin(job)
            if self.forecast is not None:
                self.forecast = self.forecast.plus(self._way(job))
        self.run = self.run.plus(self._row(job), seconds)

    # -- several models of a device ---------------------------------------------------------------

    def _foresee(self, waiting: Sequence[Job]) -> None:
        """When those end that have begun; of those here, who keeps more from it is given up."""
        begun = [job for job in self._begun() if job not in self.drop]
        turns: dict[str, tuple[float, float]] = {}
        for job in (*begun, *waiting):
            turns |= turns_of(self.view, self._legs(job))
        forecast = Forecast(turns, [self._way(job) for job in begun])
        here = {*self.model.decodes, *self.model.prefills}
        while (worst := forecast.less(here)) is not None:
            self.drop[worst] = "shed: more of the others are in time without it"
            forecast = forecast.only([way for way in forecast.ways if way.job is not worst])
        self.run = Run(self.model, [row for row in self.run.rows if row.job not in self.drop])
        self.forecast = forecast

    def _way(self, job: Job) -> Way:
        legs = self._legs(job)
        return way_of(self.view, job, legs, self._left(job, legs))

    def _adds(self, job: Job, forecast: Forecast) -> bool:
        """Whether more are in time with a new request."""
        return forecast.plus(self._way(job)).value > forecast.value + TICK

    # -- further on -------------------------------------------------------------------------------

    def _has_room(self, job: Job) -> bool:
        """Whether each pool further on has room for a new request when it comes there."""
        if not self.rooms:
            self._survey()
        return all(
            self.rooms[pool].has(*stay) if pool in self.rooms else True
            for pool, stay in self._stays(job)
        )

    def _survey(self) -> None:
        """Who has begun, and when they are in which pool."""
        for job in self._begun():
            self._begin(job)
        self.rooms.setdefault("", Room())

    def _begun(self) -> list[Job]:
        """Who has begun, here or elsewhere, and is promised something yet."""
        live = self.view.live.values()
        begun = [job for job in live if job.started_at is not None and not job.late]
        return [job for job in begun if job.due < math.inf]

    def _begin(self, job: Job) -> None:
        for pool, stay in self._stays(job):
            self.rooms.setdefault(pool, Room()).add(*stay)

    def _stays(self, job: Job) -> Iterator[tuple[str, tuple[float, float, float]]]:
        """Each pool that charges for it: from when it may be there, until when, and the charge."""
        legs, now = self._legs(job), self.view.now
        alone = [leg.alone for leg in legs]
        share = self._left(job, legs)
        if legs:
            alone[0] *= share
        stretch = max((job.due - now) / max(sum(alone), TICK), 1.0)
        pace = 1 + OTHERS * (stretch - 1)
        before, behind = 0.0, sum(alone)
        for at, leg in enumerate(legs):
            behind -= alone[at]
            left = share if at == 0 else 1.0
            charge = leg.charge(stretch, left)
            if charge > 0:
                start = now + pace * before
                end = job.due - behind - leg.stay(stretch, left) + charge
                yield leg.pool, (start, max(end, start + charge), charge)
            before += alone[at]

    def _left(self, job: Job, legs: Sequence[Leg]) -> float:
        """The share of its present leg that is still ahead."""
        if not legs or not legs[0].outputs or job.stage is None:
            return 1.0
        most = float(max(job.calls_here(f"{job.stage.model}.decode"), 1))
        left = likely(self.view.lengths.get(job.stage.model), job.call_outputs, most)
        return min(float(left.mean()) / legs[0].decodes, 1.0)
