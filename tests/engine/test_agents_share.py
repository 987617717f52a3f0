"""Agents beside plain chats on one language model: nobody starves, and what dies takes only its own."""

from __future__ import annotations

import pytest

from neustream import (
    SLO,
    Engine,
    Graph,
    LinearProfile,
    Member,
    Pool,
    ProfiledExecutor,
    Report,
    Request,
    Scheduler,
    ThreadExecutor,
    ToolExecutor,
    VirtualClock,
    WallClock,
    call,
    par,
    seq,
    tool,
)
from neustream.by_name import make_policy
from neustream.core.steps import StepProfile
from neustream.graphs import llm, llm_profiles

STEPS = StepProfile(
    "chat",
    LinearProfile("p", base=0.02, per_size=1e-4, max_batch=64),
    LinearProfile("d", base=0.01, per_job=1e-3, max_batch=64),
)
CHAT = llm("chat", max_batch=16)
SEARCH = tool("search")
PLAIN = Graph("plain", CHAT)
CHAIN = Graph("chain", seq(call(CHAT, "plan"), SEARCH, call(CHAT, "write")))
WIDE = Graph("wide", seq(par(a=call(CHAT, "a"), b=call(CHAT, "b"), c=SEARCH), call(CHAT, "sum")))
LATE = Graph("late", seq(call(CHAT, "plan"), par(a=call(CHAT, "a"), b=seq(SEARCH, call(CHAT, "b"))), call(CHAT, "sum")))
PARAMS = {"prompt_tokens": 40, "max_tokens": 12}


def simulated(policy, slo):
    """On time, of each kind, at a load of more than the device serves."""
    pools = [Pool("gpu", tuple(PLAIN.stages)), Pool("tools", ("search",), concurrency=64)]
    profiles = llm_profiles("chat", STEPS, 16) | {"search": LinearProfile("search", base=0.3, max_batch=1)}
    scheduler = Scheduler(pools, {"gpu": make_policy(policy)}, profiles)
    reports = {graph.name: Report() for graph in (PLAIN, CHAIN, WIDE)}

    def observe(record):
        kind = getattr(record, "id", "").partition("-")[0]
        if kind in reports:
            reports[kind](record)

    member = Member(scheduler, {"gpu": ProfiledExecutor(), "tools": ProfiledExecutor()})
    requests = [
        Request(f"{graph.name}-{index}", graph, index * 0.1 + offset, slo, PARAMS)
        for index in range(60)
        for offset, graph in ((0.0, PLAIN), (0.03, CHAIN), (0.06, WIDE))
    ]
    Engine(member, VirtualClock(), [observe]).run(requests)
    return {name: report.counts for name, report in reports.items()}


@pytest.mark.parametrize("policy", ["priced", "edf", "fcfs"])
def test_none_of_two_agents_and_plain_chats_starves(policy):
    counts = simulated(policy, SLO(total=3.0, first=1.0, step=0.2))
    for name, of in counts.items():
        assert of["on_time"] >= 6, (name, counts)


def ends_early(batch):
    """Each generation ends at its eighth output, far below its maximum."""
    return [{"ended": True} if job.call_outputs + 1 >= 8 else {} for job in batch.jobs]


@pytest.mark.parametrize("policy", ["priced", "edf"])
@pytest.mark.parametrize("agent", [CHAIN, LATE, WIDE], ids=["a chain", "a par in the middle", "a par first"])
def test_the_maximum_of_a_later_call_gives_up_no_agent_beside_chats_that_are_promised_a_pace(agent, policy):
    pools = [Pool("gpu", tuple(PLAIN.stages)), Pool("tools", ("search",), concurrency=64)]
    profiles = llm_profiles("chat", STEPS, 16) | {"search": LinearProfile("search", base=0.3, max_batch=1)}
    scheduler = Scheduler(pools, {"gpu": make_policy(policy)}, profiles)
    member = Member(scheduler, {"gpu": ProfiledExecutor(outcome=ends_early), "tools": ProfiledExecutor()})
    params = {"prompt_tokens": 40, "max_tokens": 400}  # two calls of so many would take twice the total
    requests = [
        Request(f"{graph.name}-{index}", graph, index + offset, slo, params)
        for index in range(20)
        for offset, graph, slo in ((0.0, PLAIN, SLO(first=1.0, step=0.2)), (0.03, agent, SLO(total=4.0)))
    ]
    assert Engine(member, VirtualClock(), []).run(requests).counts["on_time"] == len(requests)


class Dies:
    """A model that answers so many steps, and then raises each time."""

    def __init__(self, steps):
        self.left = steps

    def load(self, device):
        pass

    def step(self, inputs):
        self.left -= 1
        if self.left < 0:
            raise RuntimeError("the device fell off the bus")
        return [{"token": 1} for _ in inputs]


@pytest.mark.parametrize("steps", [0, 3, 12, 14])
def test_an_engine_that_dies_midway_fails_its_requests_and_leaves_nothing(steps):
    module = Dies(steps)
    profiles = llm_profiles("chat", STEPS, 16) | {"search": LinearProfile("search", base=0.01, max_batch=1)}
    pools = [Pool("gpu", tuple(PLAIN.stages)), Pool("tools", ("search",), concurrency=4)]
    scheduler = Scheduler(pools, {"gpu": make_policy("priced")}, profiles)
    executors = {
        "gpu": ThreadExecutor({"chat.prefill": module, "chat.decode": module, "chat": module}),
        "tools": ToolExecutor({"search": lambda given: {"found": 1}}),
    }
    with Engine(Member(scheduler, executors), WallClock()) as engine:
        results = [engine.submit(graph, PARAMS).result(60) for graph in (CHAIN, WIDE)]
    assert {result.status for result in results} == {"failed"}
    assert all("the device fell off the bus" in result.reason for result in results)
    assert not scheduler.jobs
