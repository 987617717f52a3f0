"""What reports and traces tell of the calls and tools of agents."""

from __future__ import annotations

import pytest

from neustream import (
    FCFS,
    SLO,
    Engine,
    EventLog,
    Graph,
    LinearProfile,
    Member,
    Pool,
    ProfiledExecutor,
    Report,
    Request,
    Scheduler,
    VirtualClock,
    par,
    seq,
    tool,
)
from neustream.core.steps import StepProfile
from neustream.graphs import llm, llm_profiles

SEARCH, CODE = tool("search"), tool("code")
AGENT = Graph("agent", seq(llm("plan"), par(SEARCH, CODE), llm("write")))
PARAMS = {"prompt_tokens": 8, "max_tokens": 5}


def run(slo, count=3):
    """A report and a log: calls of 0.5 s (a TTFT of 0.25 s), a search of 1 s beside code of 3 s."""
    steps = StepProfile("llm", LinearProfile("p", base=0.25, max_batch=8), LinearProfile("d", base=0.0625, max_batch=8))
    seconds = {"search": 1.0, "code": 3.0}
    profiles = {name: LinearProfile(name, base=base, max_batch=1) for name, base in seconds.items()}
    profiles |= llm_profiles("plan", steps) | llm_profiles("write", steps)
    pools = [
        Pool("gpu", tuple(name for name in AGENT.stages if name not in seconds)),
        Pool("tools", tuple(seconds), concurrency=4),
    ]
    scheduler = Scheduler(pools, {"gpu": FCFS(False)}, profiles)
    log = EventLog()
    member = Member(scheduler, {name: ProfiledExecutor() for name in ("gpu", "tools")})
    requests = [Request(f"r{index}", AGENT, index * 10.0, slo, PARAMS) for index in range(count)]
    return Engine(member, VirtualClock(), [log]).run(requests), log


def test_a_report_tells_of_each_leg():
    report, _ = run(SLO(first=0.25, step=0.0625, total=8.0))
    assert report.counts["on_time"] == 3
    legs = report.to_dict()["legs"]
    assert list(legs) == ["plan", "search", "code", "write"]
    assert legs["write"]["ttft_s"]["mean"] == pytest.approx(0.25)
    assert legs["write"]["tpot_s"]["mean"] == pytest.approx(0.0625)
    assert legs["plan"]["seconds"]["mean"] == pytest.approx(0.5)
    assert {name: leg["attainment"] for name, leg in legs.items()} == dict.fromkeys(legs, 1.0)
    tokens = report.to_dict()["tokens"]
    assert tokens["client_attainment"] == 1.0
    assert tokens["e2el_s"]["mean"] == pytest.approx(4.0)


def test_the_critical_path_has_the_branch_that_decided_the_join():
    report, _ = run(SLO(total=8.0))
    legs = report.to_dict()["legs"]
    assert {name: leg["on_critical_path"] for name, leg in legs.items()} == {
        "plan": 1.0,
        "search": 0.0,
        "code": 1.0,
        "write": 1.0,
    }
    assert sum(leg["critical_path_s"] for leg in legs.values()) == pytest.approx(report.latency.mean)


def test_slack_is_given_downstream_by_who_is_sooner_than_its_share():
    legs = run(SLO(total=8.0), count=1)[0].to_dict()["legs"]
    assert legs["plan"]["slack_given_s"] == pytest.approx(8.0 * 0.5 / 4.0 - 0.5)
    assert legs["search"]["slack_given_s"] > legs["code"]["slack_given_s"]
    late = run(SLO(total=2.0, finish=True), count=1)[0].to_dict()["legs"]
    assert late["plan"]["slack_given_s"] == 0.0


def test_legs_that_did_not_come_to_their_end_count():
    report, _ = run(SLO(first=0.25, step=0.0625, total=4.0 - 1e-3, finish=True))
    assert report.counts["late"] == 3
    assert report.to_dict()["legs"]["write"]["attainment"] == 0.0


def test_a_trace_has_legs_as_spans():
    _, log = run(SLO(total=8.0), count=1)
    spans = [event for event in log.chrome()["traceEvents"] if event.get("cat") == "request"]
    begun = {(event["id"], event["name"]): event["ts"] for event in spans if event["ph"] == "b"}
    assert begun["r0", "plan"] == 0.0
    assert begun["r0/search", "search"] == begun["r0/code", "code"] == 0.5e6
    assert begun["r0", "write"] == 3.5e6
    assert len([event for event in spans if event["ph"] == "e"]) == len(begun)


def test_no_legs_no_part():
    assert "legs" not in Report().to_dict()
