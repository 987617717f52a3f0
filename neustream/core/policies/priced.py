"""Our rule: promise only what fits, charge for device time what the load says it is worth."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np

from neustream.core.demand import Demand
from neustream.core.job import Job
from neustream.core.policies.batching import largest_in_time
from neustream.core.policies.feasibility import Curve, Floats, Ints, Lines, curve
from neustream.core.policies.model_queues import split_by_model
from neustream.core.policies.token_deadlines import TokenDeadlines
from neustream.core.policy import Decision, View
from neustream.core.profile import LatencyProfile
from neustream.core.types import TICK
from neustream.errors import ConfigError

WEIGHED = 64
"""Waiting jobs that are weighed in one decision, those with the most time per step first."""
CHANGES = 8
"""Admissions and exchanges in one decision, beyond those that fit all at once."""
FOREVER = 1e6
"""Seconds in which a job without a deadline is planned to be done."""
ENOUGH = 10
"""Recent requests from which on there is a price."""
VICTIMS = 2
"""Promised jobs that are considered for an exchange, those with the largest charge first."""


@dataclass(frozen=True)
class Priced:
    """Admission by commitment, at a price for device time that follows the load; the library's default.

    A job's *charge* is the device time that the rest of it costs at least: a step in a batch of b
    takes latency(b) but occupies only 1/b of the device, and how large its batches may be depends
    on the time it has per step. So a charge grows as slack is lost. Then, before each step:

    1. **Promises are kept.** Jobs that have run are promised to be on time as long as all of them can
       be (`plan.py`: in turns, or on seats). If they cannot, those of the most weight per charge
       stay promised; the others wait for room.
    2. **What fits is promised.** Waiting jobs are admitted, those with the most time per step first,
       if everyone promised and they are still on time.
    3. **The price.** From the charges that the last hundred requests had when they came follows the
       weight per second that the device earned if it served the best of them: 0 while all fit.
       Who brings less than `price` times that per second of charge is not admitted: under overload
       a job that has waited too long needs small batches, and keeps fresh ones out.
    4. **Exchange.** Where a job does not fit, it takes the place of a promised one (its work so far is
       lost) of no more weight, if that one's charge, by weight, is larger by more than `gain`; or
       that of several who together have less weight, by as much.
    5. **The step.** In turns, the most efficient batch of at most the line's length; on seats, as many
       as the tightest can afford; least laxity first. Encodings of admitted jobs come first. While
       others wait for room, decodes wait for each other as long as they stay in time.

    Whoever is not promised waits until it is promised or hopeless. If nobody is promised, the price is
    waived; if nobody fits even so, the job of the most weight per charge runs: no device idles while
    there is hope. Jobs without a deadline fill what is left. Latencies are the profile's times
    `View.speed`.

    The steps of a language model follow a rule of their own with the same aims (`tokens.py`, whose
    parameters are `tokens`).

    In a pool of several workers each plans for the jobs that it ran itself; those that have not run
    are taken by the first worker with room.
    """

    price: float = 0.9
    gain: float = 0.1
    tokens: TokenDeadlines = field(default_factory=TokenDeadlines)

    def __post_init__(self) -> None:
        for name in ("price", "gain"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ConfigError(f"priced: {name} must be 0 or more and finite, got {getattr(self, name)}")

    def decide(self, view: View) -> Decision:
        return split_by_model(view, self.tokens.decide, self._steps)

    def _steps(self, view: View) -> Decision:
        drop = view.hopeless()
        table = _table(view, drop)
        if not table.jobs:
            return Decision(self._ending(view, table), drop)
        promised, waiting = self._admit(view, table)
        if table.ending:
            batch = self._ending(view, table)
            if not (waiting and len(promised)) or not self._can_wait(view, table, batch, len(promised)):
                return Decision(batch, drop)
        if not len(promised):
            promised = np.array([int(np.argmax(table.density))])
        if batch := self._entering(view, table, promised):
            return Decision(batch, drop)
        return Decision(self._step(view, table, promised), drop)

    # -- who is promised ----------------------------------------------------------------------------

    def _admit(self, view: View, table: _Table) -> tuple[Ints, bool]:
        """The promised jobs, and whether others wait for room."""
        plan = table.plan
        promised = np.flatnonzero(table.committed)
        if not plan.fits(promised, table.entries(promised)):
            promised = _fitting(table, promised[np.argsort(-table.density[promised], kind="stable")])
        outside = np.flatnonzero(~table.committed)
        outside = outside[np.argsort(table.urgency[outside], kind="stable")]
        queue = outside[:0]
        if len(outside):
            queue = outside[table.density[outside] >= self.price * _price(view)][:WEIGHED]
        for _ in range(CHANGES):
            if not len(queue):
                break
            fit = plan.fits_with(promised, queue)
            if fit.any():  # those that do not fit now will not fit with more
                promised, rest = _first_that_fit(table, promised, queue[fit], known=1)
                queue = np.concatenate([rest[1:], queue[~fit]])
                if len(rest) > 1:
                    continue
            exchanged = self._exchange(table, promised, queue[table.urgency[queue] < math.inf])
            if exchanged is None:
                break
            promised, queue = exchanged
        if not len(promised):  # the price is not for an idle device
            promised = _fitting(table, outside[:WEIGHED])
        return promised, len(promised) < len(table.jobs)

    def _exchange(self, table: _Table, promised: Ints, queue: Ints) -> tuple[Ints, Ints] | None:
        """The sets after one exchange, of a promised job for a cheaper one or of several for a weightier one."""
        if not len(promised) or not len(queue):
            return None
        density, weight = table.density, table.weight
        ranked = promised[np.argsort(density[promised], kind="stable")]
        for victim in ranked[:VICTIMS]:
            better = (density[queue] > density[victim] * (1 + self.gain)) & (weight[queue] >= weight[victim])
            fit = queue[better][table.plan.fits_with(promised[promised != victim], queue[better])]
            if len(fit):
                return np.sort(np.append(promised[promised != victim], fit[0])), queue[queue != fit[0]]
        for chosen in queue[weight[queue] > 2 * weight[promised].min()]:
            victims = ranked[density[ranked] * (1 + self.gain) < density[chosen]]
            affordable = int(
                np.searchsorted(np.cumsum(weight[victims]), weight[chosen] / (1 + self.gain), side="right")
            )
            for count in range(2, affordable + 1):
                rest = np.setdiff1d(promised, victims[:count])
                if table.plan.fits_with(rest, np.array([chosen]))[0]:
                    return np.sort(np.append(rest, chosen)), queue[queue != chosen]
        return None

    # -- what runs ------------------------------------------------------------------------------------

    def _ending(self, view: View, table: _Table) -> list[Job]:
        """A batch of a stage behind all loops, that of the job that is due first."""
        if not table.ending:
            return []
        first = min((job for jobs in table.ending.values() for job in jobs), key=lambda job: job.deadline)
        assert first.stage is not None
        stage = first.stage.name
        return largest_in_time(view, stage, sorted(table.ending[stage], key=lambda job: job.deadline))

    def _can_wait(self, view: View, table: _Table, batch: Sequence[Job], promised: int) -> bool:
        """Whether a batch that could be larger stays in time if a step of a loop goes first."""
        stage = batch[0].stage
        assert stage is not None
        limit = view.limit(stage.name)
        if len(batch) >= limit or len(batch) < len(table.ending[stage.name]):
            return False
        step = max(
            speed * float(line.latency[min(promised, line.limit)])
            for line, speed in zip(table.plan.curves, table.plan.speeds, strict=True)
        )
        step = max([step, *(_once(view, name, jobs) for name, jobs in table.entering.items())])
        after = view.speed.get(stage.name, 1.0) * view.work(batch[0], min(len(batch) + 1, limit))
        others = sum(_once(view, name, jobs) for name, jobs in table.ending.items() if name != stage.name)
        return view.now + step + others + after + TICK < min(job.deadline for job in batch)

    def _entering(self, view: View, table: _Table, promised: Ints) -> list[Job]:
        """The promised jobs at the first stage in front of a loop that has any."""
        jobs = [table.jobs[at] for at in promised]
        for stage in table.entering:
            if batch := [job for job in jobs if job.stage is not None and job.stage.name == stage]:
                return batch[: view.limit(stage)]
        return []

    def _step(self, view: View, table: _Table, promised: Ints) -> list[Job]:
        """The next step of the line with the least laxity, the jobs of the least laxity in it."""
        plan = table.plan
        in_turns = plan.in_turns(promised)
        best: tuple[float, Ints] | None = None
        for at, (line, speed) in enumerate(zip(plan.curves, plan.speeds, strict=True)):
            mine = promised[plan.line[promised] == at]
            if not len(mine):
                continue
            size = 0 if in_turns else plan.seats(promised)
            size = size or line.best[min(len(mine), line.limit)]
            laxity = plan.due[mine] - plan.left[mine] * (speed * line.latency[size])
            order = np.argsort(laxity, kind="stable")
            if best is None or laxity[order[0]] < best[0]:
                best = float(laxity[order[0]]), mine[order[:size]]
        assert best is not None
        return [table.jobs[at] for at in best[1]]


@dataclass(slots=True)
class _Table:
    """The worker's jobs in front of or in a loop, in the order of the plan; those behind all loops aside.

    `committed`: it has run here and has a deadline. `density`: weight per second of charge.
    `urgency`: in the order of admission: minus the time per step, by weight; inf without a deadline.
    """

    plan: Lines
    jobs: list[Job]
    committed: np.ndarray[tuple[int], np.dtype[np.bool_]]
    weight: Floats
    density: Floats
    urgency: Floats
    entering: dict[str, list[Job]] = field(default_factory=dict)
    ending: dict[str, list[Job]] = field(default_factory=dict)

    def entries(self, some: Ints) -> float:
        """Seconds of encodings (one batch a stage) before the loops of `some` can all run."""
        return float(self.plan.entry[some].max(initial=0.0)) if self.entering else 0.0


def _table(view: View, drop: Mapping[Job, str]) -> _Table:
    lines: dict[str, list[Job]] = {}
    entering: dict[str, list[Job]] = {}
    ending: dict[str, list[Job]] = {}
    for stage, queue in view.queues.items():
        mine = [job for job in queue if job.worker in (-1, view.worker) and job not in drop]
        if not mine:
            continue
        for job in mine:
            looped = job.request.graph.looped
            line = next((name for name in job.calls_left if name in looped), None)
            if line is None:
                ending.setdefault(stage, []).append(job)
                continue
            lines.setdefault(line, []).append(job)
            if line != stage:
                entering.setdefault(stage, []).append(job)
    return _arranged(view, lines, entering, ending)


def _arranged(
    view: View, lines: dict[str, list[Job]], entering: dict[str, list[Job]], ending: dict[str, list[Job]]
) -> _Table:
    jobs = [job for some in lines.values() for job in some]
    curves = [_curve(view, name, some) for name, some in lines.items()]
    speeds = [view.speed.get(name, 1.0) for name in lines]
    line = np.repeat(np.arange(len(lines)), [len(some) for some in lines.values()])
    left = np.array([float(job.calls_left[name]) for name, some in lines.items() for job in some])
    alone = np.array([shape.latency[1] for shape in curves])
    work = np.array([job.remaining_s for job in jobs])
    entry = np.zeros(len(jobs))
    if entering:
        place = {job: at for at, job in enumerate(jobs)}
        for stage, some in entering.items():
            first = _once(view, stage, some)
            for job in some:
                entry[place[job]] = first
                work[place[job]] -= view.work(job, 1, {stage: 1})
    once = [speed for name, speed in view.speed.items() if name not in lines]
    slower = sum(once) / len(once) if once else 1.0
    behind = np.maximum(0.0, work - left * alone[line]) * slower if jobs else work
    deadline = np.array([job.deadline for job in jobs])
    due = np.minimum(deadline, view.now + FOREVER) - behind
    weight = np.array([job.weight for job in jobs])
    start = view.now + sum(_once(view, stage, some) for stage, some in ending.items())
    spare = np.maximum(due - view.now, TICK)
    charge = behind + TICK
    for at, (shape, speed) in enumerate(zip(curves, speeds, strict=True)):
        mine = line == at
        charge[mine] += left[mine] * shape.charge(spare[mine] / left[mine] / speed) * speed
    paces = [float((left / spare)[line == at].mean()) for at in range(len(curves))] if len(curves) > 1 else [1.0]
    order = np.lexsort((due, left / np.array(paces)[line] if len(curves) > 1 else left))
    plan = Lines(start, curves, speeds, paces, line[order], left[order], due[order], behind[order], entry[order])
    committed = np.array([job.worker >= 0 for job in jobs], dtype=bool) & (deadline < math.inf)
    urgency = np.where(np.isinf(deadline), math.inf, -spare / left * weight)
    return _Table(
        plan,
        [jobs[at] for at in order],
        committed[order],
        weight[order],
        (weight / charge)[order],
        urgency[order],
        entering,
        ending,
    )


def _once(view: View, stage: str, jobs: Sequence[Job]) -> float:
    """Seconds of one step of a stage with as many of `jobs` as it takes."""
    return view.speed.get(stage, 1.0) * view.work(jobs[0], min(len(jobs), view.limit(stage)), {stage: 1})


def _curve(view: View, stage: str, jobs: Sequence[Job]) -> Curve:
    declared, profile = jobs[0].request.graph.stages[stage], view.profiles[stage]
    size = 0.0
    if declared.size is not None:  # sized steps: at the mean size, to two digits
        size = float(f"{sum(declared.size_of(job) for job in jobs) / len(jobs):.2g}")
    return curve(profile, min(declared.max_batch, profile.max_batch), size)


def _fitting(table: _Table, ranked: Ints) -> Ints:
    """Those of `ranked` that fit together, each taken if it fits with the ones before it."""
    kept = ranked[:0]
    while len(ranked):
        kept, ranked = _first_that_fit(table, kept, ranked)
        ranked = ranked[1:]  # the first one that does not
    return kept


def _first_that_fit(table: _Table, some: Ints, ranked: Ints, known: int = 0) -> tuple[Ints, Ints]:
    """`some` with as many of `ranked`, from the front, as fit all together; and the rest.

    By bisection, after a look at all of them; the first `known` are known to fit.
    """
    low, high = known, len(ranked) + 1  # low fit, high do not
    while high - low > 1:
        middle = (low + high) // 2 if high <= len(ranked) else len(ranked)
        joint = np.sort(np.concatenate([some, ranked[:middle]]))
        low, high = (middle, high) if table.plan.fits(joint, table.entries(joint)) else (low, middle)
    return np.sort(np.concatenate([some, ranked[:low]])), ranked[low:]


def _price(view: View) -> float:
    """What `_price_of` says of this view; it changes only with arrivals and, slightly, with speeds."""
    stages = view.pool.stages
    profiles = tuple(view.profiles[name] for name in stages)
    speeds = tuple(round(view.speed.get(name, 1.0), 2) for name in stages)
    return _price_of(view.recent, stages, profiles, speeds, view.pool.workers)


@lru_cache(maxsize=16)
def _price_of(
    recent: tuple[Demand, ...],
    stages: tuple[str, ...],
    profiles: tuple[LatencyProfile, ...],
    speeds: tuple[float, ...],
    workers: int,
) -> float:
    """Weight per second of charge of the best recent request that the device had no time for.

    The recent requests at the charges that they came with, the most weight per charge first, fill
    the time between the first and the last of them; 0 if it suffices for all, and as long as that
    time is shorter than their mean budget: a first burst is no load yet. Requests without a deadline
    pay nothing.
    """
    offers, budgets = [], []
    for demand in recent[1:]:
        charge = _charge_of(demand, stages, profiles, speeds)
        if charge > 0:
            offers.append((demand.weight / charge, charge))
            budgets.append(demand.budget)
    span = recent[-1].at - recent[0].at if recent else 0.0
    if len(offers) + 1 < ENOUGH or span * len(budgets) < sum(budgets):
        return 0.0
    room = span * workers
    for density, charge in sorted(offers, reverse=True):
        room -= charge
        if room < 0:
            return density
    return 0.0


def _charge_of(
    demand: Demand, stages: tuple[str, ...], profiles: tuple[LatencyProfile, ...], speeds: tuple[float, ...]
) -> float:
    """Seconds of this pool that a request costs at least, were all of its budget used; 0 if unknown.

    Loops share the budget in proportion to the time that they take alone.
    """
    if math.isinf(demand.budget):
        return 0.0
    known = dict(zip(stages, zip(profiles, speeds, strict=True), strict=True))
    mine = {name: calls for name, calls in demand.calls.items() if name in known}
    sizes = {name: float(f"{calls.size:.2g}") for name, calls in mine.items()}
    step = {name: known[name][0].latency(1, size, size * size) for name, size in sizes.items()}
    alone = {name: calls.count * step[name] for name, calls in mine.items()}
    once = sum(seconds for name, seconds in alone.items() if not mine[name].looped)
    loops = sum(alone.values()) - once
    if not loops:
        return once
    stretch = max(demand.budget - once, 0.0) / loops
    charge = once
    for name, calls in mine.items():
        if calls.looped:
            profile, speed = known[name]
            shape = curve(profile, min(calls.max_batch, profile.max_batch), sizes[name])
            pace = stretch * step[name] / speed
            charge += calls.count * shape.charge_of(pace) * speed
    return charge
