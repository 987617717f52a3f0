"""Our rule: promise only what fits, charge for device time what the load says it is worth."""

from __future__ import annotations

import math
from bisect import bisect_right
from dataclasses import dataclass, field
from itertools import accumulate, compress

from neustream.core.policies.background import beside
from neustream.core.policies.line_up import LineUp, line_up
from neustream.core.policies.model_queues import split_by_model
from neustream.core.policies.next_step import can_wait, ending, entering, loop_step
from neustream.core.policies.price import price_of
from neustream.core.policies.token_deadlines import TokenDeadlines
from neustream.core.policy import Decision, View
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
            return Decision(ending(view, jobs), drop)
        promised = self._admit(view, jobs)
        if jobs.ending:
            batch = ending(view, jobs)
            others_wait = 0 < len(promised) < len(jobs.jobs)
            if not others_wait or not can_wait(view, jobs, batch, len(promised)):
                return Decision(batch, drop)
        if not promised:
            promised = [max(range(len(jobs.jobs)), key=jobs.density.__getitem__)]
        batch = entering(view, jobs, promised) or loop_step(jobs, promised)
        return Decision(batch, drop)

    # -- which jobs are promised ------------------------------------------------------------------

    def _admit(self, view: View, jobs: LineUp) -> list[int]:
        """The promised jobs, by their place in the plan, rising."""
        everyone = list(range(len(jobs.jobs)))
        promised = everyone
        if not all(jobs.committed):
            promised = list(compress(everyone, jobs.committed))
        if not jobs.plan.fits(promised, jobs.entries(promised)):
            promised = _fitting(jobs, _sparsest_last(jobs, promised))
        outside = [index for index in everyone if not jobs.committed[index]]
        if not outside:
            return promised
        outside = jobs.most_urgent_first(outside)
        price = self.price * price_of(view)
        worth = outside
        if price > 0:
            worth = [index for index in outside if jobs.density[index] >= price]
        promised = self._admit_more(jobs, promised, worth[:WEIGHED])
        if not promised:  # the price is not for an idle device
            promised = _fitting(jobs, outside[:WEIGHED])
        return promised

    def _admit_more(self, jobs: LineUp, promised: list[int], queue: list[int]) -> list[int]:
        """`promised` with those of `queue` that fit, or are worth an exchange."""
        for _ in range(CHANGES):
            if not queue:
                break
            fit = jobs.plan.fits_with(promised, queue)
            if any(fit):  # those that do not fit now will not fit with more
                fitting = list(compress(queue, fit))
                promised, rest = _first_that_fit(jobs, promised, fitting, known=1)
                queue = rest[1:] + [index for index in queue if index not in fitting]
                if len(rest) > 1:
                    continue
            dated = [index for index in queue if jobs.jobs[index].deadline < math.inf]
            exchanged = self._exchange(jobs, promised, dated)
            if exchanged is None:
                break
            promised, queue = exchanged
        return promised

    def _exchange(
        self, jobs: LineUp, promised: list[int], queue: list[int]
    ) -> tuple[list[int], list[int]] | None:
        """The sets after one exchange; None if none is worth it."""
        if not promised or not queue:
            return None
        ranked = sorted(promised, key=jobs.density.__getitem__)
        return self._for_one(jobs, promised, queue, ranked) or self._for_several(
            jobs, promised, queue, ranked
        )

    def _for_one(
        self, jobs: LineUp, promised: list[int], queue: list[int], ranked: list[int]
    ) -> tuple[list[int], list[int]] | None:
        """A promised job makes room for one of a smaller charge."""
        for victim in ranked[:VICTIMS]:
            least = jobs.density[victim] * (1 + self.gain)
            weight = jobs.jobs[victim].weight
            denser = [index for index in queue if jobs.density[index] > least]
            better = [index for index in denser if jobs.jobs[index].weight >= weight]
            others = [index for index in promised if index != victim]
            chosen = next(compress(better, jobs.plan.fits_with(others, better)), None)
            if chosen is not None:
                return _exchanged(others, queue, chosen)
        return None

    def _for_several(
        self, jobs: LineUp, promised: list[int], queue: list[int], ranked: list[int]
    ) -> tuple[list[int], list[int]] | None:
        """Several promised jobs make room for one of more weight than they have together."""
        lightest = min([jobs.jobs[index].weight for index in promised])
        for chosen in queue:
            if jobs.jobs[chosen].weight <= 2 * lightest:
                continue
            victims = self._outweighed(jobs, chosen, ranked)
            for count in range(2, len(victims) + 1):
                gone = set(victims[:count])
                others = [index for index in promised if index not in gone]
                if jobs.plan.fits_with(others, [chosen])[0]:
                    return _exchanged(others, queue, chosen)
        return None

    def _outweighed(self, jobs: LineUp, chosen: int, ranked: list[int]) -> list[int]:
        """Those of `ranked` of a larger charge by weight, as many as have less weight together."""
        density = jobs.density
        more = 1 + self.gain
        victims = [index for index in ranked if density[index] * more < density[chosen]]
        weights = list(accumulate([jobs.jobs[index].weight for index in victims]))
        return victims[: bisect_right(weights, jobs.jobs[chosen].weight / more)]


# -- sets that fit ---------------------------------------------------------------------------------


def _exchanged(others: list[int], queue: list[int], chosen: int) -> tuple[list[int], list[int]]:
    """`others` with the chosen one, and the queue without it."""
    return sorted([*others, chosen]), [index for index in queue if index != chosen]


def _sparsest_last(jobs: LineUp, places: list[int]) -> list[int]:
    """Those of the most weight per charge first."""
    return sorted(places, key=lambda index: -jobs.density[index])


def _fitting(jobs: LineUp, ranked: list[int]) -> list[int]:
    """Those of `ranked` that fit together, each taken if it fits with the ones before it."""
    kept: list[int] = []
    while ranked:
        kept, ranked = _first_that_fit(jobs, kept, ranked)
        ranked = ranked[1:]  # the first one that does not
    return kept


def _first_that_fit(
    jobs: LineUp, promised: list[int], ranked: list[int], known: int = 0
) -> tuple[list[int], list[int]]:
    """`promised` with as many of `ranked`, from the front, as fit all together; and the others.

    By bisection, after a look at all of them; the first `known` are known to fit.
    """
    low = known  # so many fit
    high = len(ranked) + 1  # so many do not
    while high - low > 1:
        middle = (low + high) // 2 if high <= len(ranked) else len(ranked)
        joint = sorted(promised + ranked[:middle])
        if jobs.plan.fits(joint, jobs.entries(joint)):
            low = middle
        else:
            high = middle
    return sorted(promised + ranked[:low]), ranked[low:]
