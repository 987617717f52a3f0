"""The rule of `priced` for stages: promise only what fits, at a price for device time."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate, compress

from neustream.core.job import Job
from neustream.core.policies.chances import EVEN, with_riders
from neustream.core.policies.edf import EDF
from neustream.core.policies.feasibility import Line
from neustream.core.policies.fitting import committed, first_that_fit, fitting, kept
from neustream.core.policies.lasting import lasting
from neustream.core.policies.line_up import WEIGHED, LineUp, blocking, line_up
from neustream.core.policies.model_queues import ModelQueues, out_of_time, split_by_model
from neustream.core.policies.next_step import (
    can_encode_later,
    can_wait,
    ending,
    entering,
    loop_step,
    running,
    steps_come_first,
)
from neustream.core.policies.price import price_of
from neustream.core.policies.several import Lines
from neustream.core.policy import Decision, View
from neustream.core.reserved import NOTHING

CHANGES = 8
"""Admissions and exchanges in one decision, beyond those that fit all at once."""
LOOKS = 32
"""How often in one decision jobs that wait are held against the promised ones: what is best by then
stands, and the next decision looks again."""
SLOWER = 1.05
"""Times what steps are expected to take now up to which a decision is to stand: what is expected
moves with each block of steps, and mostly by less."""
VICTIMS = 8
"""Promised jobs that are considered for an exchange, those with the largest charge first."""


@dataclass(frozen=True)
class PricedSteps:
    """`Priced` (which says how) for all stages but those of language models.

    As a rule of its own it serves language models too, in order of deadline (`edf`), when one of
    their jobs is the most urgent, and plans as if they were not there. `PerModel` has one account
    of both.
    """

    price: float = 0.9
    gain: float = 0.1

    def decide(self, view: View) -> Decision:
        return split_by_model(view, _by_deadline, self._of_stages)

    def _of_stages(self, view: View) -> Decision:
        drop = view.hopeless()
        aside = blocking(view, drop)
        out = drop.keys() | aside.keys()
        jobs = line_up(view, out, partial(self._least, view))
        if not jobs.jobs:
            waits = [min(until, out_of_time(view, job)) for job, until in aside.items()]
            return Decision(ending(view, jobs), drop, min(waits, default=None))
        started = committed(jobs)
        if view.reserved and not jobs.plan.fits(started, jobs.entries(started)):
            jobs = line_up(replace(view, reserved=NOTHING), out, partial(self._least, view))
            promised = kept(jobs, committed(jobs))
        else:
            promised = self._admit(view, jobs, started)
        if jobs.ending and not steps_come_first(jobs, promised):
            batch = ending(view, jobs)
            others_wait = 0 < len(promised) < len(jobs.jobs)
            if not others_wait or not can_wait(view, jobs, batch, len(promised)):
                return Decision(batch, drop)
        if not promised and view.reserved:  # nobody starts on hope beside those who were promised
            return Decision(drop=drop)
        if not promised:
            promised = [max(range(len(jobs.jobs)), key=jobs.density.__getitem__)]
        batch = _step(view, jobs, promised)
        return Decision(batch, drop) if out else _standing(view, jobs, batch, drop)

    def _least(self, view: View) -> float:
        """Weight per second of charge that a waiting job has to bring."""
        return self.price * price_of(view)

    # -- which jobs are promised ------------------------------------------------------------------

    def _admit(self, view: View, jobs: LineUp, started: list[int]) -> list[int]:
        """The promised jobs, by their place in the plan, rising."""
        promised = kept(jobs, started)
        outside = [index for index, began in enumerate(jobs.committed) if not began]
        if not outside:
            return promised
        outside = jobs.most_urgent_first(outside)
        price = self._least(view)
        worth = outside
        if price > 0:
            worth = [index for index in outside if jobs.density[index] >= price]
        worth = lasting(view, jobs, promised, worth[:WEIGHED])
        promised = self._admit_more(jobs, promised, worth, not view.reserved)
        if not promised:  # the price is not for an idle device
            promised = fitting(jobs, outside[:WEIGHED])
        return promised

    def _admit_more(
        self, jobs: LineUp, promised: list[int], queue: list[int], exchange: bool
    ) -> list[int]:
        """`promised` with those of `queue` that fit, or are worth an exchange."""
        everyone = queue
        apart: list[int] = []
        looks = iter(range(LOOKS))
        for _ in zip(range(CHANGES), looks, strict=False):
            fit = jobs.plan.fits_with(promised, queue)
            if any(fit):  # those that do not fit now will not fit with more
                able = list(compress(queue, fit))
                unable = [index for index, fits in zip(queue, fit, strict=True) if not fits]
                promised, rest = first_that_fit(jobs, promised, able, known=1)
                queue, apart = rest[1:], unable + apart
                if queue:
                    continue
            if not exchange:  # beside others no started job is given up
                break
            outside = queue + apart
            dated = [index for index in outside if jobs.jobs[index].deadline < math.inf]
            exchanged = self._exchange(jobs, promised, dated, looks)
            if exchanged is None:
                break
            promised = exchanged
            taken = set(promised)
            queue, apart = [index for index in everyone if index not in taken], []
        return promised

    def _exchange(
        self, jobs: LineUp, promised: list[int], queue: list[int], looks: Iterator[int]
    ) -> list[int] | None:
        """The promised jobs after one exchange; None if none is worth it. It takes of `looks`."""
        if not promised or not queue:
            return None
        ranked = sorted(promised, key=jobs.density.__getitem__)
        return (
            self._for_one(jobs, promised, queue, ranked, looks)
            or self._for_several(jobs, promised, queue, ranked, looks)
            or _for_many(jobs, promised, queue, looks)
            or self._for_many_of_others(jobs, promised, queue, ranked, looks)
        )

    def _for_one(
        self,
        jobs: LineUp,
        promised: list[int],
        queue: list[int],
        ranked: list[int],
        looks: Iterator[int],
    ) -> list[int] | None:
        """A promised job makes room for one of a smaller charge.

        One that has not begun and does not run next takes nothing yet. It can make room later, and
        does so now only for more weight.
        """
        runs = running(jobs, promised)
        density, begun = jobs.density, jobs.committed
        weights = [job.weight for job in jobs.jobs]
        heaviest = max([weights[index] for index in queue])
        most = max([density[index] for index in queue])
        asked = 0
        for victim in ranked:
            least = density[victim] * (1 + self.gain)
            if most <= least:  # nor does anyone bring more than those behind it
                break
            weight = weights[victim]
            if begun[victim] or runs[victim]:
                better = [index for index in queue if weights[index] >= weight]
            elif heaviest > weight:
                better = [index for index in queue if weights[index] > weight]
            else:
                continue
            better = [index for index in better if density[index] > least]
            if not better:
                continue
            if asked == VICTIMS or next(looks, None) is None:
                break
            asked += 1
            others = [index for index in promised if index != victim]
            chosen = next(compress(better, jobs.plan.fits_with(others, better)), None)
            if chosen is not None:
                return sorted([*others, chosen])
        return None

    def _for_several(
        self,
        jobs: LineUp,
        promised: list[int],
        queue: list[int],
        ranked: list[int],
        looks: Iterator[int],
    ) -> list[int] | None:
        """Several promised jobs make room for one of more weight than they have together."""
        lightest = min([jobs.jobs[index].weight for index in promised])
        for chosen in queue:
            if jobs.jobs[chosen].weight <= 2 * lightest:
                continue
            victims = self._outweighed(jobs, chosen, ranked)
            for count, _ in zip(range(2, len(victims) + 1), looks, strict=False):
                gone = set(victims[:count])
                others = [index for index in promised if index not in gone]
                if jobs.plan.fits_with(others, [chosen])[0]:
                    return sorted([*others, chosen])
        return None

    def _for_many_of_others(
        self,
        jobs: LineUp,
        promised: list[int],
        queue: list[int],
        ranked: list[int],
        looks: Iterator[int],
    ) -> list[int] | None:
        """Promised jobs make room for many that cost less, where several models share the device.

        One job of a line costs as much time alone as many of it together, so that one of those who
        wait may not fit in the place of one promised job, where many do in the place of a few.
        Those count that cannot wait for the end of all that is promised; they have to weigh more by
        more than the heaviest. Of 1, 2, 4 and so on up to all that go, those of the smallest weight
        by charge first, the number that brings most.
        """
        lines = jobs.plan
        if not isinstance(lines, Lines):
            return None
        queue = lines.cannot_wait(queue, promised)
        density, weights = jobs.density, [job.weight for job in jobs.jobs]
        best, most = None, max([weights[index] for index in promised])
        before = sum([weights[index] for index in promised])
        highest = max([density[index] for index in queue], default=0.0)
        victims = [index for index in ranked if density[index] * (1 + self.gain) < highest]
        for count in _doubled(len(victims)):
            least = density[victims[count - 1]] * (1 + self.gain)
            able = [index for index in queue if density[index] > least]
            lost = sum([weights[index] for index in victims[:count]])
            if sum([weights[index] for index in able]) <= lost + most:
                continue
            if next(looks, None) is None:
                break
            gone = set(victims[:count])
            others = [index for index in promised if index not in gone]
            found, _ = first_that_fit(jobs, others, able)
            gained = sum([weights[index] for index in found]) - before
            if gained > most + EVEN:
                best, most = found, gained
        return best

    def _outweighed(self, jobs: LineUp, chosen: int, ranked: list[int]) -> list[int]:
        """Those of `ranked` of a larger charge by weight, as many as have less weight together."""
        density = jobs.density
        more = 1 + self.gain
        victims = [index for index in ranked if density[index] * more < density[chosen]]
        weights = list(accumulate([jobs.jobs[index].weight for index in victims]))
        return victims[: bisect_right(weights, jobs.jobs[chosen].weight / more)]


def _by_deadline(view: View, model: ModelQueues) -> Decision:
    return EDF().decide(view)


def _doubled(most: int) -> list[int]:
    """1, 2, 4 and so on below `most`, and `most`."""
    counts = [1 << power for power in range(most.bit_length()) if 1 << power < most]
    return [*counts, most] if most else []


def _for_many(
    jobs: LineUp, promised: list[int], queue: list[int], looks: Iterator[int]
) -> list[int] | None:
    """The promised job with the least time per step makes room for all that fit in its place.

    One that has hardly any time left keeps the batch small, and others out. It goes if small
    batches cost more than its weight until it ends, and the batch grows without it. Those who
    cannot wait for its end have to weigh more than it by more than the heaviest: what does not fit
    now may fit a step later.
    """
    line = jobs.plan
    if not isinstance(line, Line):
        return None
    victim = min(promised, key=line.pace)
    size = line.batch(promised)
    steps, weight = line.left[victim], jobs.jobs[victim].weight
    if line.lost(size) * steps <= weight:
        return None
    waiting = float(steps * line.speed * line.curve.seconds[size])
    enough = line.speed * line.curve.enough
    queue = [index for index in queue if line.pace(index, waiting) < enough]
    weights = list(accumulate([jobs.jobs[index].weight for index in queue]))
    heaviest = max([jobs.jobs[index].weight for index in promised])
    count = bisect_right(weights, weight + heaviest) + 1
    if count > len(queue) or next(looks, None) is None:
        return None
    others = [index for index in promised if index != victim]
    least = sorted(others + queue[:count])
    if not line.fits(least, jobs.entries(least)):
        return None
    found, _ = first_that_fit(jobs, others, queue, known=count)
    return found if line.batch(found) > size else None


def _step(view: View, jobs: LineUp, promised: list[int]) -> list[Job]:
    """The next step of the promised jobs in front of a loop or in one."""
    batch = entering(view, jobs, promised)
    if not batch:
        return loop_step(jobs, _with_riders(view, jobs, promised))
    inside = can_encode_later(view, jobs, promised, batch)
    return loop_step(jobs, inside) if inside else batch


def _standing(view: View, jobs: LineUp, batch: list[Job], drop: Mapping[Job, str]) -> Decision:
    """The decision for a step, and by when the same would be decided, if nobody comes or goes.

    It stands where all are promised, in one loop, in time in turns, and in each step. They then
    are for as long as nobody has less time than the turns need, which may take `SLOWER` times as
    long: each step is one of these turns, after which they need less by as much.
    """
    plan = jobs.plan
    if jobs.entering or jobs.ending or view.reserved or not isinstance(plan, Line):
        return Decision(batch, drop)
    everyone = range(len(jobs.jobs))
    if len(batch) < len(everyone) or not all(map(_stays_as_it_is, jobs.jobs, jobs.committed)):
        return Decision(batch, drop)
    start, ends = plan.start, plan.turn_ends(everyone, 0.0)
    spare = min([due - start - SLOWER * (end - start) for due, end in ends])
    if spare <= 0:
        return Decision(batch, drop)
    step = plan.step(len(batch))
    return Decision(batch, drop, until=view.now + spare, slower=SLOWER, later=step)


def _stays_as_it_is(job: Job, began: bool) -> bool:
    """Whether a job at a loop is promised, and neither its deadline nor its size will change."""
    by_outputs = job.due_next < job.due or job.slo.step < math.inf
    sized = job.stage is None or job.stage.size is not None
    return began and not by_outputs and not sized


def _with_riders(view: View, jobs: LineUp, promised: list[int]) -> list[int]:
    """The promised jobs and those that ride: nobody does beside other promises."""
    return promised if view.reserved else with_riders(jobs, promised)
