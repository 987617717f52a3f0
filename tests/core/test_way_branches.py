"""Branches of a request on their way through several pools: none is worth anything without the others."""

from __future__ import annotations

from random import Random

import numpy as np
import pytest

from neustream import (
    SLO,
    Engine,
    Graph,
    LinearProfile,
    Member,
    Pool,
    ProfiledExecutor,
    Request,
    Scheduler,
    call,
    par,
    seq,
)
from neustream.core.kv_cache import KVCache
from neustream.core.policies import EDF, FCFS, Priced
from neustream.core.policies.way_ahead import legs_of_job
from neustream.core.policies.way_run import Row, Run
from neustream.core.policy import Decision
from neustream.core.steps import StepProfile
from neustream.engine.clock import VirtualClock
from neustream.graphs import llm, llm_profiles

STEPS = StepProfile(
    "steps",
    LinearProfile("prefill", base=0.01, per_size=1e-4, max_batch=64),
    LinearProfile("decode", base=0.01, per_size=1e-6, max_batch=64),
)
PARAMS = {"tokens": 50, "most": 40}


PART = llm("part", prompt="tokens", max_tokens="most")
JOIN = llm("join", prompt="tokens", max_tokens="most")


def part(name, most):
    """A call of the model that all branches share."""
    return call(PART, name, params=lambda job: {**job.params, "most": most})


def scheduler_of(policy, blocks=1000):
    pools = [
        Pool(model, (f"{model}.prefill", f"{model}.decode"), kv_caches={model: KVCache(blocks, 16)})
        for model in ("part", "join")
    ]
    return Scheduler(pools, policy, {**llm_profiles("part", STEPS), **llm_profiles("join", STEPS)})


def requests(graph, count=1, gap=0.0, total=5.0):
    return [Request(f"r{at}", graph, at * gap, SLO(total), PARAMS) for at in range(count)]


class Seen:
    """FCFS, and the legs of each job that it saw."""

    def __init__(self):
        self.legs = {}

    def decide(self, view):
        for job in view.jobs:
            self.legs.setdefault(job.id, legs_of_job(view, job))
        return FCFS(drop_hopeless=False).decide(view)


class First:
    """The first job alone."""

    def decide(self, view):
        return Decision(view.jobs[:1])


def test_what_follows_the_join_takes_time_and_is_charged_to_no_branch():
    graph = Graph("fan", seq(par(short=part("short", 20), long=part("long", 60)), JOIN))
    seen = Seen()
    executor = ProfiledExecutor()
    Engine(Member(scheduler_of(seen), {"part": executor, "join": executor}), VirtualClock()).run(requests(graph))
    short, long = seen.legs["r0/short"], seen.legs["r0/long"]
    assert [leg.pool for leg in short] == [leg.pool for leg in long] == ["part", ""]
    (join,) = seen.legs["r0"]
    assert join.pool == "join" and join.charge(2.0) > 0 and short[-1].charge(2.0) == 0
    assert short[-1].alone == pytest.approx(join.alone) and join.alone > 0.2


def test_of_branches_in_branches_all_joins_count():
    inner = seq(par(short=part("short", 20), long=part("long", 60)), JOIN)
    graph = Graph("fan", seq(par(deep=inner, flat=part("flat", 10)), JOIN))
    seen = Seen()
    executor = ProfiledExecutor()
    Engine(Member(scheduler_of(seen), {"part": executor, "join": executor}), VirtualClock()).run(requests(graph))
    assert [leg.pool for leg in seen.legs["r0/flat"]] == ["part", ""]
    assert [leg.pool for leg in seen.legs["r0/deep/short"]] == ["part", "", ""]


def test_a_branch_has_begun_as_soon_as_another_of_its_request_has():
    graph = Graph("fan", seq(par(short=part("short", 20), long=part("long", 60)), JOIN))
    scheduler = scheduler_of(First())
    for request in requests(graph, count=2):
        scheduler.submit(request, 0.0)
    assert not any(job.begun for job in scheduler.jobs.values())
    batch = scheduler.next_batch("part", 0.0, 0)
    scheduler.finish(batch, [{}], 0.1)
    (ran,) = batch.jobs
    assert ran.id == "r0/short"
    begun = {job.id for job in scheduler.jobs.values() if job.begun}
    assert begun >= {"r0/short", "r0/long"} and not any(id.startswith("r1") for id in begun)
    assert scheduler.jobs["r0/long"].started_at is None


@pytest.mark.parametrize("gap", [0.25, 0.1])
def test_whose_branches_run_goes_on_before_others_begin(gap):
    """By branches alone, and without what follows the join, 29 and 2 of 40 were in time; `edf` has 40 and 23."""
    graph = Graph("fan", seq(par(**{f"p{at}": part(f"p{at}", 20 + 10 * at) for at in range(6)}), JOIN))

    def in_time(policy):
        executor = ProfiledExecutor()
        member = Member(scheduler_of(policy, blocks=60), {"part": executor, "join": executor})
        return Engine(member, VirtualClock()).run(requests(graph, 40, gap, 6.0)).counts["on_time"]

    assert in_time(Priced()) >= in_time(EDF()) > 0


def rows_of(graph, *names):
    """A row for each of some branches, of two requests that have just come."""
    scheduler = scheduler_of(First())
    for request in requests(graph, count=2):
        scheduler.submit(request, 0.0)
    some = np.array([10.0, 20.0, 30.0, 40.0])
    return [Row(scheduler.jobs[name], some, 40.0, 0.0, 50.0, 0.0, some, some) for name in names]


@pytest.mark.parametrize(("policy", "worths"), [("all", [0.2, 0.9]), ("first", [0.5, 0.2, 0.9])])
def test_branches_that_need_each_other_are_worth_what_the_least_of_them_is(policy, worths):
    graph = Graph("fan", seq(par(short=part("short", 20), long=part("long", 60), policy=policy), JOIN))
    run = Run(None, rows_of(graph, "r0/short", "r0/long", "r1/short"))
    assert run.worths(np.array([0.5, 0.2, 0.9])).tolist() == worths
    assert run.rows_of(0) == ([0, 1] if policy == "all" else [0])
    assert [row.job.id for row in run.without(run.rows_of(0)).rows][-1] == "r1/short"


def test_a_branch_costs_those_of_its_request_nothing():
    """Without it they would be in vain."""
    graph = Graph("fan", seq(par(short=part("short", 20), long=part("long", 60)), JOIN))
    first, second, other = rows_of(graph, "r0/short", "r0/long", "r1/short")
    run, before = Run(None, [first, other]), np.array([0.5, 0.9])
    assert run.gain(before, run.plus(second, 0.1), np.array([0.1, 0.8, 0.75])) == pytest.approx(0.75 - 0.1)
    run, before = Run(None, [first, second]), np.array([0.5])
    assert run.gain(before, run.plus(other, 0.1), np.array([0.4, 0.3, 0.75])) == pytest.approx(0.75 - 0.2)


def test_who_is_behind_an_even_way_is_told_from_who_is_not():
    """A request with twice the time that it takes alone, when nothing of it is done, and when half is."""
    graph = Graph("fan", seq(part("first", 30), JOIN))
    scheduler = scheduler_of(First())
    [request] = requests(graph, count=1)
    job = scheduler.submit(request, 0.0)
    total = job.due - job.arrival
    some = [5.0] * 4
    row = Row(job, [30.0] * 4, 30.0, 0.0, 50.0, 1.0, some, some)
    assert row.known and not row._replace(most=40.0).known and not row._replace(hard=[1.0, 2.0, 3.0, 4.0]).known
    unit = total * job.unit_s / job.alone_s
    assert row.behind(unit) == pytest.approx(0.0), "its first output, were each part stretched alike"
    assert row.behind(unit + 1.5) == pytest.approx(1.5)
    job.remaining_s = job.alone_s / 2 + job.unit_s
    assert row.behind(total / 2) == pytest.approx(0.0)


def test_what_one_more_lets_a_run_keep_at_least_is_never_more_than_it_does():
    graph = Graph("fan", seq(par(short=part("short", 20), long=part("long", 60)), JOIN))
    plain, more = rows_of(graph, "r0/short", "r1/short")
    random = Random(7)

    def drawn(row):
        left = sorted(float(random.randint(1, 90)) for _ in range(4))
        return row._replace(left=left, context=float(random.randint(1, 200)))

    exact = 0
    for _ in range(200):
        run, one = Run(None, [drawn(plain) for _ in range(random.randint(1, 4))]), drawn(more)
        most = run.plus(one, 0.0).kept.max()
        assert run.least_kept(one) <= most + 1e-9
        exact += run.least_kept(one) > most - 1e-9
    assert exact > 50, "and often that is it"
