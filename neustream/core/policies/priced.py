"""Our rule: promise only what fits, charge for device time what the load says it is worth."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from neustream.core.job import Job
from neustream.core.policies.background import beside
from neustream.core.policies.batching import largest_in_time
from neustream.core.policies.feasibility import Ints
from neustream.core.policies.line_up import LineUp, line_up, seconds_of_step
from neustream.core.policies.model_queues import split_by_model
from neustream.core.policies.price import price_of
from neustream.core.policies.token_deadlines import TokenDeadlines
from neustream.core.policy import Decision, View
from neustream.core.types import TICK
from neustream.errors import ConfigError

WEIGHED = 64
"""Waiting jobs that are weighed in one decision, those with the most time per step first."""
CHANGES = 8
"""Admissions and exchanges in one decision, beyond those that fit all at once."""
VICTIMS = 2
"""Promised jobs that are considered for an exchange, those with the largest charge first."""


@dataclass(frozen=True)
class Priced:
    """Admission by commitment, at a price for device time that follows the load; the default.

    A job's *charge* is the device time that the rest of it costs at least: a step in a batch of b
    takes latency(b) but occupies only 1/b of the device, and how large its batches may be depends
    on the time it has per step. So a charge grows as slack is lost. Then, before each step:

    1. **Promises are kept.** Jobs that have run are promised to be on time as long as all of them
       can be (`feasibility.py`: in turns, or on seats). If they cannot, those of the most weight
       per charge stay promised; the others wait for room.
    2. **What fits is promised.** Waiting jobs are admitted, those with the most time per step
       first, if all promised jobs and they are still on time.
    3. **The price** (a shadow price). From the charges that the last hundred requests had when
       they came follows the weight per second that the device earned if it served the best of
       them: 0 while all fit. A job that brings less than `price` times that per second of charge
       is not admitted: under overload a job that has waited too long needs small batches, and
       keeps fresh ones out.
    4. **Exchange.** Where a job does not fit, it takes the place of a promised one (its work so far
       is lost) of no more weight, if that one's charge, by weight, is larger by more than `gain`;
       or that of several that together have less weight, by as much.
    5. **The step.** In turns, the most efficient batch of at most the line's length; on seats, as
       many as the tightest can afford; least laxity first. Encodings of admitted jobs come first.
       While others wait for room, decodes wait for each other as long as they stay in time.

    A job that is not promised waits until it is promised or hopeless. If none is promised, the
    price is waived; if none fits even so, the job of the most weight per charge runs: no device
    idles while there is hope. Latencies are the profile's times `View.speed`.

    Jobs without a promise get at least the share `background` of the device's time while some of
    them wait (`background.py`; 0: no such share). Promised jobs are decided as if they were absent.

    The steps of a language model follow a rule of their own with the same aims
    (`token_deadlines.py`, whose parameters are `tokens`).

    In a pool of several workers each plans for the jobs that it ran itself; those that have not run
    are taken by the first worker with room.
    """

    price: float = 0.9
    gain: float = 0.1
    tokens: TokenDeadlines = field(default_factory=TokenDeadlines)
    background: float = 0.05

    def __post_init__(self) -> None:
        for name in ("price", "gain"):
            value = getattr(self, name)
            if not 0 <= value < math.inf:
                raise ConfigError(f"priced: {name} must be 0 or more and finite, got {value}")
        if not 0 <= self.background < 1:
            raise ConfigError(
                f"priced: background must be 0 or more and below 1, got {self.background}"
            )

    def decide(self, view: View) -> Decision:
        return beside(view, self.background, self._promised)

    def _promised(self, view: View) -> Decision:
        return split_by_model(view, self.tokens.decide, self._steps)

    def _steps(self, view: View) -> Decision:
        drop = view.hopeless()
        jobs = line_up(view, drop)
        if not jobs.jobs:
            return Decision(_ending(view, jobs), drop)
        promised = self._admit(view, jobs)
        if jobs.ending:
            batch = _ending(view, jobs)
            others_wait = 0 < len(promised) < len(jobs.jobs)
            if not others_wait or not _can_wait(view, jobs, batch, len(promised)):
                return Decision(batch, drop)
        if not promised:
            promised = [int(np.argmax(jobs.density))]
        batch = _entering(view, jobs, promised) or _loop_step(jobs, promised)
        return Decision(batch, drop)

    # -- which jobs are promised ------------------------------------------------------------------

    def _admit(self, view: View, jobs: LineUp) -> Sequence[int]:
        """The promised jobs, by their place in the plan."""
        everyone = list(range(len(jobs.jobs)))
        committed = everyone
        if not all(jobs.committed):
            committed = [index for index in everyone if jobs.committed[index]]
        kept = jobs.plan.fits(committed, jobs.entries(committed))
        if kept and committed is everyone:
            return everyone
        promised = np.array(committed, dtype=np.int64)
        if not kept:
            promised = _fitting(jobs, _ranked(promised, -jobs.density))
        outside = np.flatnonzero(~np.array(jobs.committed))
        if not len(outside):
            return list(promised.tolist())
        outside = _ranked(outside, jobs.urgency)
        worth = jobs.density[outside] >= self.price * price_of(view)
        promised = self._admit_more(jobs, promised, outside[worth][:WEIGHED])
        if not len(promised):  # the price is not for an idle device
            promised = _fitting(jobs, outside[:WEIGHED])
        return list(promised.tolist())

    def _admit_more(self, jobs: LineUp, promised: Ints, queue: Ints) -> Ints:
        """`promised` with those of `queue` that fit, or are worth an exchange."""
        for _ in range(CHANGES):
            if not len(queue):
                break
            fit = jobs.plan.fits_with(promised, queue)
            if fit.any():  # those that do not fit now will not fit with more
                promised, rest = _first_that_fit(jobs, promised, queue[fit], known=1)
                queue = np.concatenate([rest[1:], queue[~fit]])
                if len(rest) > 1:
                    continue
            exchanged = self._exchange(jobs, promised, queue[jobs.urgency[queue] < math.inf])
            if exchanged is None:
                break
            promised, queue = exchanged
        return promised

    def _exchange(self, jobs: LineUp, promised: Ints, queue: Ints) -> tuple[Ints, Ints] | None:
        """The sets after one exchange; None if none is worth it."""
        if not len(promised) or not len(queue):
            return None
        ranked = _ranked(promised, jobs.density)
        one = self._for_one(jobs, promised, queue, ranked)
        return one or self._for_several(jobs, promised, queue, ranked)

    def _for_one(
        self, jobs: LineUp, promised: Ints, queue: Ints, ranked: Ints
    ) -> tuple[Ints, Ints] | None:
        """A promised job makes room for one of a smaller charge."""
        density, weight = jobs.density, jobs.weight
        for victim in ranked[:VICTIMS]:
            denser = density[queue] > density[victim] * (1 + self.gain)
            better = queue[denser & (weight[queue] >= weight[victim])]
            others = promised[promised != victim]
            fit = better[jobs.plan.fits_with(others, better)]
            if len(fit):
                return np.sort(np.append(others, fit[0])), queue[queue != fit[0]]
        return None

    def _for_several(
        self, jobs: LineUp, promised: Ints, queue: Ints, ranked: Ints
    ) -> tuple[Ints, Ints] | None:
        """Several promised jobs make room for one of more weight than they have together."""
        density, weight = jobs.density, jobs.weight
        heavy = weight[queue] > 2 * weight[promised].min()
        for chosen in queue[heavy]:
            victims = ranked[density[ranked] * (1 + self.gain) < density[chosen]]
            weights = np.cumsum(weight[victims])
            most = int(np.searchsorted(weights, weight[chosen] / (1 + self.gain), side="right"))
            for count in range(2, most + 1):
                others = np.setdiff1d(promised, victims[:count])
                if jobs.plan.fits_with(others, np.array([chosen]))[0]:
                    return np.sort(np.append(others, chosen)), queue[queue != chosen]
        return None


# -- sets that fit ---------------------------------------------------------------------------------


def _ranked(jobs: Ints, key: np.ndarray[tuple[int], np.dtype[np.float64]]) -> Ints:
    """`jobs` in the order of `key`."""
    return jobs[np.argsort(key[jobs], kind="stable")]


def _fitting(jobs: LineUp, ranked: Ints) -> Ints:
    """Those of `ranked` that fit together, each taken if it fits with the ones before it."""
    kept = ranked[:0]
    while len(ranked):
        kept, ranked = _first_that_fit(jobs, kept, ranked)
        ranked = ranked[1:]  # the first one that does not
    return kept


def _first_that_fit(
    jobs: LineUp, promised: Ints, ranked: Ints, known: int = 0
) -> tuple[Ints, Ints]:
    """`promised` with as many of `ranked`, from the front, as fit all together; and the others.

    By bisection, after a look at all of them; the first `known` are known to fit.
    """
    low = known  # so many fit
    high = len(ranked) + 1  # so many do not
    while high - low > 1:
        middle = (low + high) // 2 if high <= len(ranked) else len(ranked)
        joint = np.sort(np.concatenate([promised, ranked[:middle]])).tolist()
        if jobs.plan.fits(joint, jobs.entries(joint)):
            low = middle
        else:
            high = middle
    return np.sort(np.concatenate([promised, ranked[:low]])), ranked[low:]


# -- what runs -------------------------------------------------------------------------------------


def _ending(view: View, jobs: LineUp) -> list[Job]:
    """A batch of a stage behind all loops, that of the job that is due first."""
    if not jobs.ending:
        return []
    heads = [min(queue, key=_deadline) for queue in jobs.ending.values()]
    first = min(heads, key=_deadline)
    assert first.stage is not None
    stage = first.stage.name
    return largest_in_time(view, stage, sorted(jobs.ending[stage], key=_deadline))


def _deadline(job: Job) -> float:
    return job.deadline


def _can_wait(view: View, jobs: LineUp, batch: Sequence[Job], promised: int) -> bool:
    """Whether a batch that could be larger stays in time if a step of a loop goes first."""
    stage = batch[0].stage
    assert stage is not None
    limit = view.limit(stage.name)
    if len(batch) >= limit or len(batch) < len(jobs.ending[stage.name]):
        return False
    plan = jobs.plan
    steps = [
        speed * curve.seconds[min(promised, curve.limit)]
        for curve, speed in zip(plan.curves, plan.speeds, strict=True)
    ]
    steps += [seconds_of_step(view, name, queue) for name, queue in jobs.entering.items()]
    larger = min(len(batch) + 1, limit)
    after = view.speed.get(stage.name, 1.0) * view.work(batch[0], larger, {stage.name: 1})
    others = sum(
        seconds_of_step(view, name, queue)
        for name, queue in jobs.ending.items()
        if name != stage.name
    )
    over = view.now + max(steps) + others + after
    return over + TICK < min(job.deadline for job in batch)


def _entering(view: View, jobs: LineUp, promised: Sequence[int]) -> list[Job]:
    """The promised jobs at the first stage in front of a loop that has any."""
    for stage in jobs.entering:
        batch = []
        for index in promised:
            job = jobs.jobs[index]
            if job.stage is not None and job.stage.name == stage:
                batch.append(job)
        if batch:
            return batch[: view.limit(stage)]
    return []


def _loop_step(jobs: LineUp, promised: Sequence[int]) -> list[Job]:
    """The next step of the line with the least laxity, the jobs of the least laxity in it."""
    plan = jobs.plan
    seats = 0 if plan.in_turns(promised) else plan.seats(promised)
    batch: list[int] = []
    least = math.inf
    for line, (curve, speed) in enumerate(zip(plan.curves, plan.speeds, strict=True)):
        members = promised
        if len(plan.curves) > 1:
            members = [index for index in promised if plan.line[index] == line]
        if not members:
            continue
        size = seats or curve.best[min(len(members), curve.limit)]
        step = speed * curve.seconds[size]
        laxity = [plan.due[index] - plan.left[index] * step for index in members]
        ranked = sorted(range(len(members)), key=laxity.__getitem__)
        if not batch or laxity[ranked[0]] < least:
            least = laxity[ranked[0]]
            batch = [members[place] for place in ranked[:size]]
    return [jobs.jobs[index] for index in batch]
