"""What callers in the serving process take of its steps."""

from __future__ import annotations

import pytest
from toys import FCFS, Pool, Scheduler, draw_and_decode, table, toy

from neustream import SLO, Engine, Member, ProfiledExecutor, Request, VirtualClock
from neustream.config import load_experiment
from neustream.experiment import prepare, simulate
from neustream.experiment.calls import Calls


def test_a_step_loses_the_calls_that_fall_into_it():
    calls = Calls([1.0, 5.0], 0.5)
    assert calls.beside(0.0, 1.0) == 0.0
    assert calls.beside(0.0, 2.0) == 0.5
    assert calls.beside(1.25, 1.0) == 0.25
    assert calls.beside(1.5, 3.5) == 0.0
    assert calls.beside(0.0, 9.0) == 1.0


def test_what_a_step_loses_may_make_it_meet_the_next_call():
    assert Calls([1.0, 2.25], 0.5).beside(0.0, 2.0) == 1.0


def test_calls_that_come_together_wait_for_each_other():
    calls = Calls([1.0, 1.0, 1.0], 0.5)
    assert calls.beside(2.0, 1.0) == 0.5
    assert calls.beside(2.5, 1.0) == 0.0


def test_a_request_is_taken_in_after_its_call_and_promised_from_its_arrival():
    graph, taken = draw_and_decode(), []
    scheduler = Scheduler(
        [Pool("gpu", tuple(graph.stages))], FCFS(), {"draw": table("draw", 1), "decode": table("decode", 1)}
    )
    engine = Engine(Member(scheduler, {"gpu": ProfiledExecutor()}), VirtualClock(), [taken.append])
    report = engine.run([Request("a", graph, 1.0, SLO(), {"steps": 2})], call_s=0.25)
    first = taken[0]
    assert (first.arrival, first.at) == (1.0, 1.25)
    assert report.latency.percentile(50) == pytest.approx(3.25)


def test_a_config_says_what_a_call_takes(tmp_path):
    load = {"arrivals": "constant", "rate": 1, "requests": 5, "steps": 3}
    path = toy(tmp_path, workload=load)
    plain = simulate(prepare(load_experiment(path)), "serial").latency.percentile(50)
    slower = simulate(prepare(load_experiment(path, ["simulation.call_s=0.25"])), "serial").latency.percentile(50)
    assert slower == pytest.approx(plain + 0.25)
