"""What goes wrong in the middle of agents' graphs: wide forks that end, loops of tools, branches whose engine dies."""

from __future__ import annotations

import threading

import pytest

from neustream import (
    FCFS,
    SLO,
    Engine,
    Graph,
    LinearProfile,
    Member,
    Pool,
    Request,
    Scheduler,
    Stage,
    ThreadExecutor,
    ToolExecutor,
    VirtualClock,
    WallClock,
    loop,
    par,
    seq,
    tool,
)
from neustream.core.events import BranchEnded, Ended
from neustream.engine.executor import ProfiledExecutor

WIDE = 10_000
DRAW = Stage("draw", max_batch=8)
PROFILES = {name: LinearProfile(name, base=1.0, max_batch=8) for name in ("draw", "look", "other")}


def scheduler_of(graph):
    """Tools in a pool of their own, for four calls at once; all other stages on one device."""
    tools = tuple([name for name, stage in graph.stages.items() if stage.tool is not None])
    others = tuple([name for name in graph.stages if name not in tools])
    pools = [Pool("gpu", others)] * bool(others) + [Pool("tools", tools, concurrency=4)] * bool(tools)
    return Scheduler(pools, {"gpu": FCFS(False)} if others else {}, {name: PROFILES[name] for name in graph.stages})


@pytest.mark.parametrize("way", ["cancelled", "too late", "failed"])
def test_a_fan_out_of_ten_thousand_ends_whole(way):
    graph = Graph("wide", seq(par(*[DRAW] * WIDE), DRAW))
    scheduler = scheduler_of(graph)
    scheduler.submit(Request("r", graph, 0.0, SLO(total=1e9)), 0.0)
    batch = scheduler.next_batch("gpu", 0.0)
    scheduler.finish(batch, [{}] * 8, 1.0)
    batch = scheduler.next_batch("gpu", 1.0)
    assert len(scheduler.jobs) == WIDE - 8 + 1
    if way == "cancelled":
        assert scheduler.cancel("r", 1.5)
        assert len(scheduler.jobs) == 8, "those in a step end with it"
        scheduler.finish(batch, [{}] * 8, 2.0)
    elif way == "failed":
        scheduler.fail(batch, RuntimeError("the device is gone"), 2.0)
    else:
        scheduler.finish(batch, [{}] * 8, 2e9)
        assert scheduler.next_batch("gpu", 2e9, instead=FCFS()) is None
    assert not scheduler.jobs and scheduler.next_batch("gpu", 3e9) is None
    events = scheduler.pop_events()
    assert sum(isinstance(event, BranchEnded) for event in events) == WIDE
    [ended] = [event for event in events if isinstance(event, Ended)]
    assert ended.status == {"cancelled": "cancelled", "too late": "dropped", "failed": "failed"}[way]


def test_a_loop_that_never_ends_over_a_tool_names_its_limit():
    graph = Graph("g", loop(tool("look"), until=lambda job: False, most=50))
    told = []
    member = Member(scheduler_of(graph), {"tools": ProfiledExecutor()})
    report = Engine(member, VirtualClock(), [told.append]).run([Request("r", graph)])
    assert list(report.reasons) == ["request 'r': a loop did not end within 50 rounds (most=...)"]
    [ended] = [record for record in told if isinstance(record, Ended)]
    assert ended.latency_s == pytest.approx(50.0) and not member.scheduler.jobs


@pytest.mark.parametrize("behind", [True, False], ids=["a stage behind it", "alone"])
def test_a_loop_that_never_ends_over_a_tool_is_given_up_when_it_is_late(behind):
    turns = loop(tool("look"), until=lambda job: False, expect=1)
    graph = Graph("g", seq(turns, DRAW) if behind else turns)
    scheduler, told = scheduler_of(graph), []
    member = Member(scheduler, dict.fromkeys(scheduler.pools, ProfiledExecutor()))
    Engine(member, VirtualClock(), [told.append]).run([Request("r", graph, 0.0, SLO(total=10.0))])
    [ended] = [record for record in told if isinstance(record, Ended)]
    assert (ended.status, ended.reason) == ("dropped", "hopeless: was due 1.000 s ago")


class Dies:
    """A model whose device is gone."""

    def load(self, device):
        pass

    def step(self, inputs):
        raise RuntimeError("the device fell off the bus")


@pytest.mark.parametrize(("policy", "status"), [(2, "done"), (3, "failed"), ("all", "failed")])
def test_an_engine_that_dies_in_one_branch_of_a_quorum(policy, status):
    """The branch with the model is lost before the two tools come back, which are enough where two are."""
    dead = threading.Event()

    def look(given):
        assert dead.wait(30)
        return {"seen": 1}

    def note(record):
        if isinstance(record, BranchEnded) and record.status == "failed":
            dead.set()

    search = tool("look", look)
    graph = Graph("g", seq(par(a=search, b=seq(DRAW, search), c=search, policy=policy), search))
    executors = {"gpu": ThreadExecutor({"draw": Dies()}), "tools": ToolExecutor({"look": search.tool})}
    scheduler = scheduler_of(graph)
    with Engine(Member(scheduler, executors), WallClock(), [note]) as engine:
        result = engine.submit(graph).result(30)
    assert result.status == status and not scheduler.jobs
    if status == "done":
        assert set(result.output) == {"a", "c", "seen"}
    else:
        assert "branch 'b'" in result.reason and "fell off the bus" in result.reason
