"""Replaying a workload in virtual time and in real time takes the same steps."""

from __future__ import annotations

import threading
import time

import pytest
from started import ONE
from toys import Step, batches, draw_and_decode, engine, live, one_stage, request, table

from neustream import (
    EDF,
    FCFS,
    SLO,
    Engine,
    EventLog,
    Graph,
    Member,
    NeuStream,
    Pool,
    ProfiledExecutor,
    Report,
    Request,
    Scheduler,
    Serial,
    Stage,
    Static,
    TableProfile,
    WallClock,
    seq,
)

DRAW, DECODE = 0.04, 0.02  # seconds of a step, whatever its batch


def clumps(graph, slower=1.0):
    """Requests in two clumps; each is served to its end before the next comes.

    They arrive in the middle of steps, so that it does not matter if real steps take a little longer.
    """
    out = []
    for clump, steps in enumerate([(3, 1, 2, 2, 1), (2, 1, 1, 4, 0)]):
        for at, (offset, count) in enumerate(zip((0.0, 0.5, 0.5, 1.5, 1.5), steps, strict=True)):
            slo = SLO((1.2 * DRAW if at == 3 else 100.0) * slower)  # the fourth is hopeless
            came = (0.6 * clump + offset * DRAW) * slower
            out.append(Request(f"r{clump}{at}", graph, came, slo, {"steps": count}))
    return out


def both(policy, slower):
    """Batches, statuses and number of requests on each clock."""
    graph = draw_and_decode(max_batch=2, decode_batch=2)
    draw, decode = DRAW * slower, DECODE * slower
    profiles = {"draw": table("draw", draw, draw), "decode": table("decode", decode, decode)}
    modules = {"draw": Slow(draw), "decode": Slow(decode)}
    simulated, served = EventLog(), EventLog()
    expected = engine(graph, profiles, policy, observers=[simulated]).run(clumps(graph, slower))
    real = live(graph, modules, profiles, policy=policy, observers=[served])
    report = real.run(clumps(graph, slower))
    real.close()
    return [(batches(log), statuses(log), of.submitted) for log, of in ((simulated, expected), (served, report))]


@pytest.mark.parametrize(
    "policy", [FCFS(), EDF(), Static(), Serial(), NeuStream(slo_scale=3.0)], ids=lambda policy: type(policy).__name__
)
def test_both_clocks_give_the_same_steps(policy):
    """Half a step is what a machine may stall for: where it stalled for longer, with longer steps again."""
    for slower in (1, 3, 10):
        simulated, served = both(policy, slower)
        if served == simulated:
            break
    assert served == simulated
    assert served[2] == 10


def statuses(log):
    return {id: entry["status"] for id, entry in log.requests.items()}


class Slow(Step):
    def __init__(self, seconds):
        super().__init__()
        self.seconds = seconds

    def step(self, jobs):
        time.sleep(self.seconds)
        return super().step(jobs)


def test_a_report_of_the_callers_own_is_filled():
    graph, mine = one_stage(), Report()
    assert engine(graph, ONE).run([request("a", graph)], mine) is mine
    assert mine.submitted == mine.counts["on_time"] == 1


def test_a_graph_of_one_seq_is_served():
    graph = Graph("two", seq(Stage("a"), Stage("b", emits=True)))
    report = engine(graph, {"a": table("a", 1.0), "b": table("b", 2.0)}).run([request("r", graph)])
    assert report.duration == 3.0


def test_an_interrupt_does_not_wait_for_arrivals_to_come():
    """The next request is an hour away; the engine can then serve another workload."""
    graph = Graph("g", Stage("a"))
    profiles = {"a": TableProfile("a", [1], [0.001])}
    scheduler = Scheduler([Pool("gpu", ("a",))], FCFS(), profiles)
    engine = Engine(Member(scheduler, {"gpu": ProfiledExecutor()}), WallClock())
    stop = threading.Timer(0.05, engine.interrupt)
    stop.start()
    report = engine.run([Request("now", graph), Request("later", graph, 3600.0)])
    stop.join()
    assert report.interrupted and report.counts["on_time"] == 1 and report.submitted == 1
    again = engine.run([Request("another", graph)])
    assert not again.interrupted and again.counts["on_time"] == 1
