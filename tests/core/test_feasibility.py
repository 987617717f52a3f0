"""Which sets fit: the arrays of `plan.py` against plain loops, and its promises against real steps."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest
from curves import TABLES, shape, table, turn

from neustream import SLO, Graph, Pool, Priced, Request, Scheduler, Stage, loop, seq
from neustream.core.policies import feasibility
from neustream.core.policies.feasibility import Line
from neustream.core.policies.seats import Columns, Taken, may_fit
from neustream.core.policies.several import Lines
from neustream.core.types import TICK

# -- random sets ------------------------------------------------------------------------------------


def one_line(draw, jobs, *, behind=True, entry=0.0, start=3.0, ease=None):
    """Jobs of a line: some tight, some loose, so that about half of their sets fit."""
    seconds = draw.choice(list(TABLES.values()))
    speed = draw.choice([1.0, 0.5, 1.25])
    left = np.sort([draw.randint(1, 20) + draw.random() / 8 for _ in range(jobs)])  # no two alike
    ease = ease or jobs * draw.choice([0.5, 1.0, 2.0])
    spare = [1.0 + ease * draw.choice([0.05, 0.4, 1.0, 3.0]) * draw.random() for _ in range(jobs)]
    due = start + left * speed * seconds[0] * np.array(spare)
    after = np.array([draw.choice([0.0, 0.25]) * behind for _ in range(jobs)])
    return Line(start, shape(seconds), speed, left, due, after, np.full(jobs, entry)), seconds


def several(draw, count, jobs, *, entry=0.0):
    """Jobs of several lines, and some that are behind all loops."""
    sizes = [draw.randint(1, jobs) for _ in range(count)]
    some = [one_line(draw, size, entry=entry, ease=2.0 * sum(sizes)) for size in sizes]
    elsewhere = sorted((3.0 + 20 * draw.random(), 0.25) for _ in range(draw.randint(0, 2)))
    return Lines(3.0, [line for line, _ in some], elsewhere), [seconds for _, seconds in some]


def subset(draw, jobs, least=1):
    return np.array(sorted(draw.sample(range(jobs), draw.randint(least, jobs))), dtype=np.int64)


def slow_ends(line, seconds, some, now):
    """When each of `some` is over, its decode too: one common turn after the other."""
    ends, done = [], 0.0
    for at, job in enumerate(some):
        now += (line.left[job] - done) * line.speed * turn(seconds, len(some) - at) + line.behind[job]
        done = line.left[job]
        ends.append(now)
    return ends


def slow_turns(line, seconds, some, entry):
    ends = slow_ends(line, seconds, some, line.start + entry)
    return all(end <= line.due[job] + line.behind[job] + TICK for job, end in zip(some, ends, strict=True))


def slow_together(plan, tables, some, entry):
    """Whether at each deadline all lines have had what those of their jobs need that are due by then."""
    needs, first = [], 0
    for line, seconds in zip(plan.lines, tables, strict=True):
        mine = [job - first for job in some if first <= job < first + len(line.left)]
        ends = slow_ends(line, seconds, mine, 0.0)
        needs.append([(line.due[job] + line.behind[job], end) for job, end in zip(mine, ends, strict=True)])
        first += len(line.left)
    for due in sorted([due for need in needs for due, _ in need] + [due for due, _ in plan.elsewhere]):
        needed = sum(max([end for other, end in need if other <= due], default=0.0) for need in needs)
        needed += sum(seconds for other, seconds in plan.elsewhere if other <= due)
        if plan.start + entry + needed > due + TICK:
            return False
    return True


def slow_seats(plan, seconds, some, entry):
    """The cuts, one by one, at every instant where they can be violated."""
    if len(some) < 2:
        return 0
    start, speed = plan.start + entry, plan.speed
    pace = min((plan.due[job] - start) / (plan.left[job] + 2) for job in some)
    most = max((b for b in range(1, len(seconds) + 1) if seconds[b - 1] * speed <= pace), default=0)
    most = min(most, len(some) - 1)
    if not most:
        return 0
    size = min(range(1, most + 1), key=lambda b: (seconds[b - 1] / b, -b))
    step = seconds[size - 1] * speed
    jobs = [(plan.left[job] * step, plan.due[job] - start - 2 * step, plan.behind[job]) for job in some]
    if any(work > time for work, time, _ in jobs):
        return 0
    for x in [point for work, time, _ in jobs for point in (time, time - work)]:
        must = sum(min(max(x - (time - work), 0.0), work) for work, time, _ in jobs)
        gone = sum(behind for _, time, behind in jobs if time <= x)
        if must > size * max(0.0, x - gone) + TICK:
            return 0
    return size


def test_taking_turns_is_what_it_says_it_is():
    draw, found = random.Random(1), []
    for _ in range(300):
        plan, seconds = one_line(draw, draw.randint(1, 9))
        some, entry = subset(draw, len(plan.left)), draw.choice([0.0, 0.5])
        found.append(plan.in_turns(some, entry))
        assert found[-1] == slow_turns(plan, seconds, some.tolist(), entry)
    assert 60 < sum(found) < 240  # neither answer is rare


@pytest.mark.parametrize("count", [2, 3])
def test_several_lines_fit_if_each_has_what_is_due_by_each_deadline(count):
    draw, found = random.Random(count), []
    for _ in range(300):
        plan, tables = several(draw, count, 4)
        some, entry = subset(draw, sum(len(line.left) for line in plan.lines)), draw.choice([0.0, 0.5])
        found.append(plan.fits(some, entry))
        assert found[-1] == slow_together(plan, tables, some.tolist(), entry)
    assert 60 < sum(found) < 240


def test_seats_are_what_they_say_they_are():
    draw, found, only = random.Random(1), [], 0
    for _ in range(300):
        plan, seconds = one_line(draw, draw.randint(1, 9))
        some, entry = subset(draw, len(plan.left)), draw.choice([0.0, 0.5])
        found.append(plan.seats(some, entry))
        assert found[-1] == slow_seats(plan, seconds, some.tolist(), entry)
        assert plan.fits(some, entry) == (plan.in_turns(some, entry) or found[-1] > 0)
        only += plan.fits(some, entry) and not plan.in_turns(some, entry)
    assert 60 < sum(size > 0 for size in found) < 240
    assert sum(size > 1 for size in found) > 20
    assert only > 10  # where turns would be too late


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("entry", [0.0, 0.5])
@pytest.mark.parametrize("sizes", [0, feasibility.FEW_SIZES])
def test_one_more_fits_if_the_set_with_it_does(monkeypatch, count, entry, sizes):
    monkeypatch.setattr(feasibility, "FEW_SIZES", sizes)  # 0: some are always refused first
    draw, found, seated = random.Random(10 * count + int(2 * entry)), [], 0
    for _ in range(400):
        if count == 1:
            plan, _ = one_line(draw, draw.randint(2, 12), entry=entry)
        else:
            plan, _ = several(draw, count, 5, entry=entry)
        everyone = set(range(len(plan.entry)))
        some = subset(draw, len(everyone) - 1)
        others = np.array(sorted(everyone - set(some.tolist())), dtype=np.int64)
        joint = [np.sort(np.append(some, other)) for other in others]
        fit = plan.fits_with(some, others)
        assert fit == [plan.fits(them, entry) for them in joint]
        found += fit
        if count == 1:
            seated += sum(plan.fits(them, entry) and not plan.in_turns(them, entry) for them in joint)
    assert 0.05 < sum(found) / len(found) < 0.95
    assert (seated > 5) == (count == 1)


def test_nobody_is_refused_first_who_has_a_seat_and_most_of_the_others_are():
    draw, seated, without, refused = np.random.RandomState(3), 0, 0, 0
    for _ in range(300):
        size, step = int(draw.randint(1, 5)), 0.25
        left = draw.randint(1, 20, 12).astype(float)
        due = (left + 2) * step * (1 + draw.rand(12))
        behind = draw.choice([0.0, 0.25], 12)
        old, new = [Columns(left[some], due[some], behind[some]) for some in (slice(3), slice(3, 12))]
        taken = Taken(old.due - 2 * step, old.left * step, old.behind)
        fit = taken.fit_with(size, new.due - 2 * step, new.left * step, new.behind)
        steps = np.full(9, step)
        may = may_fit(old, new, np.full(9, size), steps, 2 * steps)
        assert not (fit & ~may).any()
        seated += fit.sum()
        without += (~fit & taken.fit_on(size)).sum()
        refused += (~may & taken.fit_on(size)).sum()
    assert seated > 300 and without > 300
    assert refused > 0.7 * without


def test_seats_must_bring_what_their_small_batches_cost_the_device():
    due = np.array([15.25, 90.0, 90.0, 90.0, 90.0, 90.0])  # the first needs batches of two
    ten, zero, everyone = np.full(6, 10.0), np.zeros(6), np.arange(6)
    plan = Line(0.0, shape(TABLES["rising"]), 1.0, ten, due, zero, zero)
    lost = 10 * (1.25 - 2 * 2.25 / 6)  # of ten steps: of two jobs alone, less what they are of six

    def fit(value, weight):
        worth = replace(plan, weight=np.array([weight, 1, 1, 1, 1, 1]), value=lambda: value)
        last = worth.fits_with(everyone[1:], everyone[:1])[0]
        assert worth.fits(everyone) == last == (worth.batch(everyone) == 2)
        return last

    assert not plan.in_turns(everyone)
    assert fit(0.0, 1.0)
    assert fit(0.99 / lost, 1.0)
    assert not fit(1.01 / lost, 1.0)
    assert fit(1.01 / lost, 2.0)
    assert plan.fits(everyone[1:])


@pytest.mark.parametrize("value", [0.1, 1.0])
def test_one_more_fits_if_the_set_with_it_is_worth_its_seats(value):
    draw, found, wasteful = random.Random(1), [], 0
    for _ in range(300):
        free, _ = one_line(draw, draw.randint(2, 20), entry=0.5)
        weight = np.array([draw.choice([0.5, 1.0, 3.0]) for _ in free.left])
        plan = replace(free, weight=weight, value=lambda: value)
        some = subset(draw, len(plan.left) - 1)
        others = np.setdiff1d(np.arange(len(plan.left)), some)
        joint = [np.sort(np.append(some, other)) for other in others]
        found.append(plan.fits_with(some, others))
        assert found[-1] == [plan.fits(them, 0.5) for them in joint]
        wasteful += sum(free.fits(them, 0.5) for them in joint) - sum(found[-1])
    assert wasteful > 5
    assert sum(sum(fit) for fit in found) > 100


def test_jobs_that_end_together_decode_together():
    """Both end at 1.25; decodes of 4 s are over at 9.25 one by one, at 6.25 if two cost three quarters."""
    one, zero, both = np.ones(2), np.zeros(2), np.arange(2)
    behind = np.full(2, 4.0)

    def fit(due, left=one, seconds=TABLES["rising"]):
        at = np.full(2, due) - behind
        plan = Line(0.0, shape(seconds), 1.0, left, at, behind, zero, shared=lambda count: 0.75 if count == 2 else 1.0)
        together = plan.fits(both)
        assert plan.fits_with(both[:1], both[1:]) == [together]
        return together

    assert fit(1.25 + 6.0)
    assert not fit(1.25 + 6.0 - 0.01)
    assert not fit(1.25 + 6.0, left=np.array([1.0, 2.0]))  # they end one after the other
    assert not fit(2.0 + 6.0, seconds=[1.0, 2.125])  # they run one after the other
    assert fit(2.0 + 8.0, seconds=[1.0, 2.125])


def test_one_more_fits_among_equals():
    draw, found = random.Random(7), []
    for _ in range(100):
        plan, _ = one_line(draw, draw.randint(2, 8), behind=False)
        plan.left[:] = plan.left.round() // 4 + 1
        plan.due[:] = np.minimum.accumulate(plan.due[::-1])[::-1]
        for other in range(len(plan.left)):
            some = np.delete(np.arange(len(plan.left)), other)
            found.append(plan.fits_with(some, np.array([other]))[0])
            assert found[-1] == plan.fits(np.arange(len(plan.left)))
    assert 0.05 < sum(found) / len(found) < 0.95


def test_one_alone_fits_with_nobody():
    draw = random.Random(3)
    for plan in (one_line(draw, 20)[0], several(draw, 2, 20)[0]):
        nobody, everyone = np.array([], dtype=np.int64), np.arange(len(plan.entry))
        assert plan.fits_with(nobody, everyone) == [plan.fits(np.array([at])) for at in everyone]
        assert plan.fits(nobody)


def test_without_lines_only_what_is_elsewhere_needs_time():
    plan = Lines(1.0, [], [(2.0, 0.5)])
    assert plan.parts == [] and plan.fits([]) and plan.demand([]) == [(2.0, 1.5)]
    assert not Lines(1.0, [], [(2.0, 1.5)]).fits([])


def test_an_encoding_of_one_delays_all_but_is_paid_once():
    four, due, zero = np.array([4.0, 4.0]), np.array([5.5, 5.5]), np.zeros(2)
    entry = np.array([0.0, 0.5])
    plan = Line(0.0, shape(TABLES["rising"]), 1.0, four, due, zero, entry)
    one, other = np.array([0]), np.array([1])
    assert plan.fits_with(one, other) == [True]  # 0.5 + 4 * 1.25
    assert plan.fits_with(other, one) == [True]
    plan.entry[:] = 0.75
    assert plan.fits_with(one, other) == [False]
    plan.entry[:] = 0.0
    assert plan.fits_with(one, other) == [True]


# -- promises and real steps ------------------------------------------------------------------------

# Where a batch is faster than one alone, jobs are given up that could only have made it in a batch.
SOLID = [name for name in TABLES if name not in ("one", "falling")]


def steps_of(job):
    return job.params["steps"]


def after_steps(names, seconds, graphs, asked):
    """Which of the jobs (graph, steps, due) are on time if Priced runs them all from 0 on."""
    profiles = {name: table(*seconds[name]) for name in names}
    some, now = Scheduler([Pool("gpu", tuple(names))], Priced(price=0.0), profiles), 0.0
    jobs = [
        some.submit(Request(str(at), graphs[graph], 0.0, SLO(due), {"steps": steps}), 0.0)
        for at, (graph, steps, due) in enumerate(asked)
    ]
    while batch := some.next_batch("gpu", now):
        now += batch.expected
        some.finish(batch, [{}] * len(batch), now)
    assert not some.jobs
    return [job.on_time for job in jobs]


def least_extra(plan, due, answer):
    """The least time by which all deadlines must be later for `answer(plan)` to be yes, to 0.01; None above 60."""
    low, high = -10.0, 60.0
    if not answer(replace(plan, due=due + high)):
        return None
    while high - low > 0.01:
        middle = (low + high) / 2
        fits = answer(replace(plan, due=due + middle))
        low, high = (low, middle) if fits else (middle, high)
    return high


@pytest.mark.parametrize("name", SOLID)
@pytest.mark.parametrize("how", ["in turns", "on seats"])
def test_who_is_said_to_fit_is_on_time_in_real_steps(name, how):
    seconds, draw, tried = TABLES[name], random.Random(f"{name} {how}"), 0
    unet, vae = Stage("unet", max_batch=len(seconds)), Stage("vae", emits=True)
    graph = Graph("image", seq(loop(unet, times=steps_of), vae))
    for _ in range(12):
        jobs = draw.randint(2, 9)
        steps = sorted(draw.randint(1, 12) for _ in range(jobs))
        loose = [draw.choice([1.0, 1.2, 4.0, 9.0]) if how == "on seats" else draw.choice([1.0, 2.0]) for _ in steps]
        due = np.array([x * seconds[0] * ease for x, ease in zip(steps, loose, strict=True)])
        zero = np.zeros(jobs)
        plan = Line(0.0, shape(seconds), 1.0, np.array(steps, float), due, zero + 0.25, zero)
        everyone = np.arange(jobs)

        def fit(some, everyone=everyone):
            return some.in_turns(everyone) if how == "in turns" else some.seats(everyone) > 0

        extra = least_extra(plan, due, fit)
        if extra is None:
            continue
        tried += 1
        margin = 3 * max(seconds[b - 1] for b in plan.curve.best[1 : jobs + 1]) + 0.25
        asked = [(0, x, float(d) + extra + margin) for x, d in zip(steps, due, strict=True)]
        on_time = after_steps(["unet", "vae"], {"unet": seconds, "vae": [0.25]}, [graph], asked)
        assert all(on_time), f"{asked}: {on_time}"
    assert tried > 5


def test_who_is_said_to_fit_on_two_lines_is_on_time_in_real_steps():
    draw, tried = random.Random(5), 0
    for _ in range(25):
        seconds = {name: TABLES[draw.choice(SOLID)] for name in ("unet", "refine")}
        graphs = [Graph(name, loop(Stage(name, max_batch=len(seconds[name])), times=steps_of)) for name in seconds]
        jobs = draw.randint(2, 8)
        line = np.array([draw.randrange(2) for _ in range(jobs)], dtype=np.int64)
        if not 0 < line.sum() < jobs:
            continue
        alone = np.array([seconds["unet"][0], seconds["refine"][0]])[line]
        left = np.array([float(draw.randint(1, 12)) for _ in range(jobs)])
        due = left * alone * np.array([draw.choice([1.0, 2.0, 4.0]) for _ in range(jobs)])
        everyone = np.arange(jobs)
        margin = 3 * sum(max(seconds[name]) for name in seconds)

        def fit(extra, line=line, left=left, due=due, everyone=everyone, seconds=seconds):
            some = []
            for at, name in enumerate(seconds):
                order = np.lexsort((due[line == at], left[line == at]))
                zero = np.zeros(len(order))
                steps, later = left[line == at][order], due[line == at][order] + extra
                some.append(Line(0.0, shape(seconds[name]), 1.0, steps, later, zero, zero))
            return Lines(0.0, some, []).fits(everyone)

        extra = next((float(x) for x in np.arange(0.0, 60.0, 0.25) if fit(x)), None)
        if extra is None:
            continue
        tried += 1
        asked = list(zip(line.tolist(), left.astype(int).tolist(), (due + extra + margin).tolist(), strict=True))
        on_time = after_steps(list(seconds), seconds, graphs, asked)
        assert all(on_time), f"{seconds} {asked}: {on_time}"
    assert tried > 10
