"""What a scheduler does for a request grows at most in line with the nodes of its graph."""

from __future__ import annotations

import sys
from collections import Counter

import pytest

from neustream import (
    FCFS,
    SLO,
    Engine,
    Graph,
    LinearProfile,
    Member,
    Pool,
    ProfiledExecutor,
    Request,
    Scheduler,
    Stage,
    VirtualClock,
    call,
    loop,
    par,
    seq,
    tool,
)
from neustream.core.cursor import Cursor
from neustream.core.entry import Entry
from neustream.core.legs import Legs
from neustream.core.seen import ENOUGH, Seen
from neustream.core.step_times import StepTimes
from neustream.core.stretch import Stretch
from neustream.core.sums import Sums
from neustream.core.work import Work

START = Stage("start", emits=True)


def tools(count):
    return [tool(f"t{index}") for index in range(count)]


SIZED = Stage("sized", size=lambda job: job.params["tokens"])


def asked(index):
    """A call with params of its own, of a stage that reads them."""
    return call(SIZED, f"c{index}", params=lambda job: {"tokens": 1.0 + index})


def nested(count):
    """Sequences of five in sequences of five, and so on."""
    nodes = tools(count)
    while len(nodes) > 1:
        nodes = [seq(*nodes[at : at + 5]) for at in range(0, len(nodes), 5)]
    return nodes[0]


SHAPES = {
    "stages": lambda count: seq(START, *tools(count)),
    "outputs": lambda count: seq(START, *[Stage(f"s{index}", emits=True) for index in range(count)]),
    "nested": lambda count: seq(START, nested(count)),
    "rounds": lambda count: loop(seq(START, *tools(count)), times=2),
    "behind a loop": lambda count: seq(loop(START, times=3), *tools(count)),
    "legs": lambda count: seq(call(START, "model", slo=SLO(total=1e6)), *tools(count)),
    "calls": lambda count: seq(START, *[call(node, node.name, slo=SLO(total=1e6)) for node in tools(count)]),
    "calls that are asked": lambda count: seq(START, *[asked(index) for index in range(count)]),
    "fan-out": lambda count: seq(START, par(*tools(count))),
    "in front of a fan-out": lambda count: seq(
        START, *tools(count // 2), par(*[tool(f"b{at}") for at in range(count // 2)])
    ),
    "in a branch": lambda count: seq(START, par(seq(*tools(count)), Stage("other"))),
}


def operations(shape, count):
    """Function calls, Python's and C's, that serving some requests takes: five where they learn."""
    graph = Graph("g", SHAPES[shape](count))
    profiles = {name: LinearProfile(name, base=0.01, max_batch=1) for name in graph.stages}
    others = tuple(name for name in graph.stages if name != "start")
    pools = [Pool("gpu", ("start",)), Pool("tools", others, concurrency=64)]
    scheduler = Scheduler(pools, {"gpu": FCFS()}, profiles)
    executors = {"gpu": ProfiledExecutor(), "tools": ProfiledExecutor()}
    engine = Engine(Member(scheduler, executors), VirtualClock())
    requests = [Request(f"r{index}", graph, index * 1.0, SLO(total=1e5)) for index in range(5 if graph.legs else 2)]
    calls = 0

    def seen(frame, event, arg):
        nonlocal calls
        calls += event in ("call", "c_call")

    before = sys.getprofile()
    sys.setprofile(seen)
    try:
        report = engine.run(requests)
    finally:
        sys.setprofile(before)
    assert report.counts["on_time"] == len(requests)
    return calls


@pytest.mark.parametrize("shape", SHAPES)
def test_work_grows_with_the_nodes_and_not_with_their_square(shape):
    assert operations(shape, 200) < 5 * operations(shape, 50)


def chain(count):
    """A job of a graph of legs: a model, then tools, one of them twice, some in calls and branches."""
    nodes = tools(count)
    nodes[3] = call(nodes[3], "named", slo=SLO(total=1e6))
    nodes[5] = seq(nodes[5], Stage("output", emits=True), nodes[2])
    nodes[7] = par(Stage("left"), seq(Stage("right"), nodes[2]))
    graph = Graph("g", seq(call(START, "model", slo=SLO(total=1e6)), *nodes))
    job = Entry(Request("r", graph, slo=SLO(total=1e5)))
    job.history, job.cursor = Seen(), Cursor(graph, job)
    job.stage = job.cursor.stage
    return job, {
        name: LinearProfile(name, base=0.01 * index, max_batch=1) for index, name in enumerate(graph.stages, 1)
    }


def test_what_is_ahead_is_the_sum_of_its_calls_at_every_move():
    job, profiles = chain(20)
    work = Work(StepTimes(profiles))
    while job.cursor.stage is not None:
        work.measure(job)
        calls = Counter()
        for stage, count in job.cursor.ahead(job):
            calls[stage.name] += count
        assert dict(job.calls_left) == calls and list(job.calls_left) == list(calls)
        branches = profiles["right"].latency(1) + profiles["t2"].latency(1)
        either = 0.0 if "left" not in calls else min(profiles["left"].latency(1), branches)
        alone = sum(profiles[name].latency(1) * count for name, count in calls.items())
        assert job.remaining_s == pytest.approx(alone - either)
        job.stage = job.cursor.advance(job)
        if job.cursor.fork is not None:
            return
    raise AssertionError("it never came to its branches")


def test_sums_are_those_of_what_was_learnt_last():
    job, profiles = chain(20)
    times = StepTimes(profiles)
    legs = Legs(times)
    whole = Stretch(job.request.graph.root, 1, len(job.request.graph.root.nodes))
    for leg in ("t9", "t2", "named", "left", "t19") * ENOUGH:
        before = legs.sums.of(whole, job)
        job.leg, job.leg_at = leg, 0.0
        legs.end(job, 50.0)
        after = legs.sums.of(whole, job)
        assert after == Sums(times, Legs(times)._seconds).of(whole, job)
        known = job.history.leg(job.request.graph.print, leg).known
        assert known or after == before
    assert after.ahead.alone == before.ahead.alone < after.ahead.expected


def test_sums_follow_profiles():
    job, profiles = chain(20)
    times = StepTimes(profiles)
    work = Work(times)
    work.measure(job)
    before = job.remaining_s
    times.remove(["t11"])
    times.add({"t11": LinearProfile("t11", base=100.0, max_batch=1)})
    work.measure(job)
    assert job.remaining_s == pytest.approx(before + 100.0 - profiles["t11"].latency(1))
