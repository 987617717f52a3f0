"""How far simulations are from what was served: errors by hand, what a run did, and the ladder."""

from __future__ import annotations

import numpy as np
import pytest
from rich.console import Console
from toys import FCFS, Pool, Scheduler, draw_and_decode, table, toy

from neustream import SLO, Engine, Member, ProfiledExecutor, Request, VirtualClock
from neustream.analysis.fidelity import (
    Error,
    Outcome,
    Served,
    Watch,
    error,
    errors_table,
    explained,
    ladder,
    spread_of,
    two,
)
from neustream.config import load_config, load_experiment
from neustream.config.schema import Simulation
from neustream.core.asked import Asked
from neustream.core.batch import StepInfo
from neustream.core.events import Ended, Submitted
from neustream.engine.decision_time import AT_ONCE, DecisionTime
from neustream.engine.events import Decided, Finished, Started
from neustream.experiment import prepare, simulate

PROFILES = {"draw": table("draw", 1.0, 1.0), "decode": table("decode", 0.5)}


def watched(arrivals, *, handover_s=0.0, stretch=None, steps=2, decision=AT_ONCE, alone_s=0.0):
    """What a run on one worker did."""
    graph, watch = draw_and_decode(), Watch()
    scheduler = Scheduler([Pool("gpu", tuple(graph.stages))], FCFS(), PROFILES)
    executor = ProfiledExecutor(handover_s=handover_s, stretch=stretch, alone_s=alone_s)
    requests = [Request(f"r{at}", graph, arrival, SLO(), {"steps": steps}) for at, arrival in enumerate(arrivals)]
    Engine(Member(scheduler, {"gpu": executor}), VirtualClock(decision), [watch]).run(requests)
    return watch.told()


@pytest.mark.parametrize(("alone_s", "planned", "idle"), [(0.0, 2 / 3, 0.0), (2.0, 0.0, 0.5 / 3)])
def test_a_decision_between_two_steps_is_no_handover(alone_s, planned, idle):
    seen = watched([0.0], decision=DecisionTime(0.25), alone_s=alone_s)
    assert seen.gap_us == (0.0, 0.0) and seen.decision_us == (0.25e6, 0.25e6)
    assert seen.mean_gap_us == 0.0 and seen.decision.of(Asked(1, 1)) == pytest.approx(0.25)
    assert seen.planned == pytest.approx(planned)
    assert seen.idle_share == pytest.approx(idle)


def test_the_simulator_is_told_of_decisions_by_what_was_decided():
    """Most take a tenth of the few that choose among prompts: the median would leave these out."""
    watch = Watch()
    for seconds, requests, new in ((0.001, 0, 0), (0.001, 0, 0), (0.003, 4, 0), (0.0065, 3, 2)):
        watch(Decided("gpu", 0.0, seconds, requests=requests, new=new))
    seen = watch.told()
    assert seen.decision_us[0] == pytest.approx(2000)
    assert tuple(seen.decision) == pytest.approx((0.001, 0.0005, 0.002))
    assert seen.costs.decision_s == pytest.approx(0.001)
    assert seen.costs.decision_request_s == pytest.approx(0.0005)
    assert seen.costs.decision_new_s == pytest.approx(0.002)


def test_what_a_simulated_decision_took_is_what_is_seen_of_it():
    given = DecisionTime(0.25, 0.0625, 0.125)
    assert tuple(watched([0.0, 0.5, 0.5, 2.0], decision=given).decision) == pytest.approx(given)


# -- errors -----------------------------------------------------------------------------------------


def test_an_error_is_in_points_and_in_shares_of_what_was_served():
    off = error(Outcome(0.90, 2.0, 4.0), Outcome(0.94, 1.8, 5.0))
    assert off == Error(pytest.approx(-4), pytest.approx(-0.1), pytest.approx(0.25))


def test_a_quantile_that_one_of_the_two_has_not_has_no_error():
    assert error(Outcome(0.0, None, None), Outcome(0.1, 1.0, 1.0)) == Error(-10, None, None)
    assert error(Outcome(0.1, 1.0, 1.0), Outcome(0.0, None, None)) == Error(10, None, None)
    assert error(Outcome(1.0, 0.0, 0.0), Outcome(1.0, 1.0, 1.0)) == Error(0, None, None)


@pytest.mark.parametrize(
    ("off", "close"),
    [
        (Error(3, 0.1, -0.1), True),
        (Error(-3, None, None), True),
        (Error(3.1, 0, 0), False),
        (Error(-3.1, 0, 0), False),
        (Error(0, 0.11, 0), False),
        (Error(0, 0, -0.11), False),
    ],
)
def test_close_is_within_three_points_and_a_tenth(off, close):
    assert off.close is close


def test_an_outcome_is_read_from_a_report(tmp_path):
    report = simulate(prepare(load_experiment(toy(tmp_path))), "fcfs")
    outcome = Outcome.of(report.to_dict())
    assert outcome == Outcome(report.attainment, report.latency.percentile(50), report.latency.percentile(99))


def test_the_table_has_both_and_the_error_of_each():
    console = Console(width=100, record=True)
    rows = [
        ("fcfs", Outcome(0.5, 2.0, 4.0), Outcome(0.75, 1.0, 4.2)),
        ("edf", Outcome(0, None, None), Outcome(0, 1, 1)),
    ]
    console.print(errors_table("title", "policy", rows))
    lines = [line.split() for line in console.export_text().splitlines()]
    assert ["fcfs", "50.0%/75.0%", "-25.0", "2.00/1.00", "-50%", "4.00/4.20", "+5%", "no"] in lines
    assert ["edf", "0.0%/0.0%", "+0.0", "-/1.00", "-", "-/1.00", "-", "yes"] in lines


# -- what a run did -----------------------------------------------------------------------------------


def test_steps_over_their_profile_by_stage():
    seen = watched([0.0], stretch=lambda batch: 1.5 if batch.stage == "draw" else 1.0)
    assert seen.steps == {"draw": pytest.approx(1.5), "decode": pytest.approx(1.0)}
    assert seen.step == pytest.approx(1.25)
    assert seen.spread == 0.0


def test_gaps_count_where_a_request_waited_and_not_where_there_was_none():
    seen = watched([0.0, 10.0])  # each takes 2.5 s
    assert seen.gap_us == (0.0, 0.0) and seen.idle_share == 0.0
    assert seen.decisions >= 6 and seen.late_us == (0.0, 0.0)


def test_a_gap_is_from_an_end_to_the_next_start_of_that_worker():
    def step(worker, started, planned=False):
        return StepInfo(0, "gpu", worker, "s", ("a",), (1.0,), started, 1.0, 1.0, (), planned)

    watch = Watch()
    watch(Submitted("a", "g", 0.0, 9.0, SLO(), 1, 0.25))
    for worker, start, end in ((0, 0.5, 1.5), (0, 2.0, 3.0), (1, 0.5, 4.0)):
        watch(Started(step(worker, start, planned=start == 2.0), start))
        watch(Finished(step(worker, start), end, ""))
    watch(Decided("gpu", 0.5, 0.004))
    watch(Ended("a", "done", "", None, True, 0.0, 4.0, SLO(), 1))
    seen = watch.told()
    assert seen.gap_us == (pytest.approx(0.5e6), pytest.approx(0.5e6))
    assert seen.idle_share == pytest.approx(0.5 / (2.5 + 3.5))
    assert seen.planned == pytest.approx(1 / 3)
    assert seen.decisions == 1 and seen.decision_us == (pytest.approx(4000), pytest.approx(4000))
    assert seen.late_us[0] == pytest.approx(0.25e6)


def told_of(*steps, decided=()):
    """What is seen of steps (pool, ids, start, end) and decisions (pool, at, seconds), of requests "a" and "b"."""
    watch = Watch()
    records = [(0.0, Submitted(id, "g", 0.0, 99.0, SLO(), 1, 0.0)) for id in "ab"]
    for number, (pool, ids, start, end) in enumerate(steps):
        step = StepInfo(number, pool, 0, "s", ids, (1.0,) * len(ids), start, 1.0, 1.0)
        records += [(start, Started(step, start)), (end, Finished(step, end, ""))]
    records += [(at, Decided(pool, at, seconds)) for pool, at, seconds in decided]
    order = {Finished: 0, Decided: 1, Started: 2}
    for _, record in sorted(records, key=lambda each: (each[0], order.get(type(each[1]), 0))):
        watch(record)
    return watch.told()


def test_a_worker_whose_requests_are_elsewhere_hands_nothing_over():
    """An agent's model has nothing to do while its tool runs, and the tool while the model does."""
    seen = told_of(
        ("gpu", ("a", "b"), 0.0, 1.0),
        ("tool", ("a",), 1.0, 4.0),
        ("tool", ("b",), 4.25, 7.0),  # it waited for the only seat
        ("gpu", ("a",), 4.0, 5.0),
        ("gpu", ("b",), 7.0, 8.0),
    )
    assert seen.gap_us == (pytest.approx(0.25e6), pytest.approx(0.25e6))
    assert seen.costs.handover_s == pytest.approx(0.25)


def test_a_branch_waits_since_its_request_does():
    seen = told_of(("gpu", ("a",), 0.0, 1.0), ("gpu", ("a/plan",), 1.5, 2.0), ("gpu", ("a/plan/b", "c"), 2.25, 3.0))
    assert seen.costs.handover_s == pytest.approx((0.5 + 0.25) / 2)


def test_a_simulated_agent_hands_nothing_over_beyond_its_steps(root):
    """With branches, in rounds, that call tools: a simulated handover is a part of its step."""
    watch = Watch()
    runs = prepare(load_config(root / "configs/demo/agent.yaml", ["workload.requests=12"]))
    simulate(runs, "fcfs", [watch], device=Simulation(handover_s=0.25, decision_s=0.001))
    assert watch.told().costs.handover_s == pytest.approx(0.0, abs=1e-9)


def test_a_worker_that_was_to_wait_hands_nothing_over():
    """A rule that lets a request wait for company does so when simulated, too."""
    steps = [("gpu", ("a",), 0.0, 1.0), ("gpu", ("a",), 3.5, 4.0), ("gpu", ("a",), 4.75, 5.0)]
    seen = told_of(*steps, decided=[("gpu", 1.0, 0.25), ("gpu", 3.0, 0.5), ("gpu", 4.0, 0.5)])
    assert seen.costs.handover_s == pytest.approx(0.25)  # the last one, but for its decision


def test_a_step_that_failed_says_nothing_of_how_fast_steps_are():
    watch = Watch()
    for start, end, why in ((0.0, 1.5, ""), (2.0, 2.01, "it broke"), (3.0, 4.5, "")):
        step = StepInfo(0, "gpu", 0, "s", ("a",), (1.0,), start, 1.0, 1.0, (), False)
        watch(Started(step, start))
        watch(Finished(step, end, why))
    assert watch.told().steps == {"s": pytest.approx(1.5)}


def test_a_run_without_steps_has_nothing_to_tell():
    assert Watch().told() == Served({}, 0.0, (0.0, 0.0), 0.0, 0, (0.0, 0.0), 0.0, AT_ONCE, 0.0, (0.0, 0.0))


def test_quantiles_and_spread():
    assert two([1.0, 2.0, 3.0]) == (2e6, pytest.approx(2.98e6)) and two([]) == (0.0, 0.0)
    assert spread_of([1.0] * 9) == 0.0 and spread_of([1.0, 9.0]) == 0.0
    drawn = np.exp(0.2 * np.random.default_rng(0).standard_normal(20_000))
    assert spread_of(drawn) == pytest.approx(0.2, rel=0.05)


# -- what the simulator has to know -------------------------------------------------------------------


def test_each_rung_knows_more(tmp_path):
    prepared = prepare(
        load_experiment(toy(tmp_path, workload={"arrivals": "constant", "rate": 1, "requests": 5, "steps": 3}))
    )
    steps, none = {"draw": 2.0, "decode": 1.0}, (0.0, 0.0)
    seen = Served(steps, 0.0, (1000.0, 1000.0), 0.0, 9, none, 1000.0, AT_ONCE, 0.0, (5000.0, 0.0))
    reports = ladder(prepared, "serial", seen, lambda batch: 3.0 if batch.stage == "draw" else 1.0)
    assert {name: report.latency.percentile(50) for name, report in reports.items()} == {
        "profile": pytest.approx(0.007),
        "speed": pytest.approx(0.013),
        "steps": pytest.approx(0.019),
        "engine": pytest.approx(0.028),  # 4 steps with gaps of 1 ms, and 5 ms until it is taken in
    }


def test_what_explains_an_error_is_the_first_that_is_close():
    far, near = Error(9, 0, 0), Error(1, 0, 0)
    assert explained({"profile": near, "speed": far}) == "profile"
    assert explained({"profile": far, "speed": far, "steps": near, "engine": near}) == "steps"
    assert explained({"profile": far}) == "nothing"
