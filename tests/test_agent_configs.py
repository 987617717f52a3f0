"""Agents as configs: their graph, what is drawn for it, simulated tools, and what is said of mistakes."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from neustream import EventLog
from neustream.analysis.headroom import bound_of
from neustream.config import load_config
from neustream.errors import ConfigError
from neustream.experiment import prepare, simulate

PROFILES = Path(__file__).parents[1] / "profiles/a6000/opt_13b"
AGENT = """
name: agent
llms: {chat: {memory: {tokens: 20800}}}
tools:
  search: {latency_s: 1.0, concurrency: 8}
  code: {latency_s: {min: 0.5, max: 3}}
agent:
  - {llm: chat, name: plan, prompt: 100, output: 8, max_tokens: 16}
  - par: {web: [{tool: search}], run: [{tool: code}]}
  - {llm: chat, name: answer, prompt: 100, output: {min: 4, max: 9}, max_tokens: 16, slo: {first_s: 5, step_s: 1}}
workload: {rate: 0.5, requests: 12, seed: 1}
slo: {total_s: 30, first_s: 2, step_s: 0.5}
policies: {fcfs: {}, priced: {}}
"""


@pytest.fixture
def config(tmp_path):
    def made(*sets, **changes):
        values = yaml.safe_load(AGENT)
        values["profiles"] = str(PROFILES)
        values |= changes
        path = tmp_path / "agent.yaml"
        path.write_text(yaml.safe_dump(values, sort_keys=False))
        return load_config(path, sets)

    return made


def test_an_agent_is_simulated_with_its_tools_and_calls(config):
    prepared = prepare(config())
    log = EventLog()
    report = simulate(prepared, "priced", [log])
    assert report.counts["on_time"] == 12
    legs = report.to_dict()["legs"]
    assert next(iter(legs)) == "plan" and set(legs) == {"plan", "search", "code", "answer"}
    assert legs["search"]["seconds"]["mean"] == pytest.approx(1.0)
    assert 0.5 < legs["code"]["seconds"]["mean"] < 3
    pools = {event["args"]["name"] for event in log.chrome()["traceEvents"] if event["name"] == "process_name"}
    assert {"pool chat", "pool tool search", "pool tool code"} <= pools


def test_the_same_requests_take_as_long_at_their_tools_under_any_policy(config):
    prepared = prepare(config())
    found = []
    for policy in ("fcfs", "priced"):
        log = EventLog()
        simulate(prepared, policy, [log])
        steps = [step for step in log.steps if step["stage"] == "code"]
        found.append({step["jobs"][0]: pytest.approx(step["end"] - step["start"]) for step in steps})
    assert found[0] == found[1] and len(found[0]) == 12


def test_loops_switches_and_calls_are_drawn(config):
    agent = [
        {"call": [{"tool": "search"}, {"tool": "code"}], "name": "look", "slo": {"total_s": 9}},
        {"loop": [{"llm": "chat", "output": 3, "max_tokens": 4}], "times": {"min": 1, "max": 3}},
        {"switch": {"none": {"share": 3}, "more": {"nodes": [{"tool": "search"}]}}},
    ]
    prepared = prepare(config(agent=agent))
    assert prepared.pipeline.drawn == "look(search -> code) -> (chat) x times -> (nothing or search)"
    assert {request.params["node 3"] for request in prepared.requests} == {1, 2, 3}
    report = simulate(prepared, "fcfs")
    assert report.counts["on_time"] == 12
    times = sum(request.params["node 3"] for request in prepared.requests)
    assert report.to_dict()["legs"]["chat"]["ended"] == times


@pytest.mark.parametrize(
    ("latency", "least", "most"),
    [
        (2.0, 2.0, 2.0),
        ({"min": 1.0, "max": 2.0}, 1.0, 2.0),
        ({"median": 2.0, "sigma": 0.5}, 0.3, 12.0),
        ({"samples": "times.txt"}, 1.5, 2.5),
    ],
)
def test_latencies_of_tools(config, tmp_path, latency, least, most):
    (tmp_path / "times.txt").write_text("# measured\n1.5\n2.5\n")
    tools = {"search": {"latency_s": latency}, "code": {"latency_s": 1.0}}
    log = EventLog()
    simulate(prepare(config(tools=tools)), "fcfs", [log])
    seconds = [step["end"] - step["start"] for step in log.steps if step["stage"] == "search"]
    assert least - 1e-9 <= min(seconds) <= max(seconds) <= most + 1e-9
    assert len({round(one, 6) for one in seconds}) > 1 or least == most


def test_tools_that_are_slow_or_fail_are_tried_again(config):
    slow = {"search": {"latency_s": 3.0, "timeout_s": 1.0, "retries": 1}, "code": {"latency_s": 1.0}}
    report = simulate(prepare(config(tools=slow)), "fcfs")
    assert report.counts["failed"] == 12
    assert list(report.reasons) == [
        "branch 'web': stage 'search': it did not return within 1.000 s (2 tries)",
    ]
    flaky = {"search": {"latency_s": 1.0, "fails": 0.5, "retries": 20}, "code": {"latency_s": 1.0}}
    assert simulate(prepare(config(tools=flaky)), "fcfs").counts["on_time"] == 12


def test_a_promise_by_scale_counts_branches_once(config):
    tools = {"search": {"latency_s": 1.0}, "code": {"latency_s": 3.0}}
    one, _ = prepare(config(tools=tools, slo={"scale": 2})).requests[:2]
    calls = prepare(config(agent=[{"llm": "chat", "output": 8, "prompt": 100}], slo={"scale": 2})).requests[0]
    assert 2 * 3.0 < one.slo.total < 2 * 4.0 + 2 * calls.slo.total


def test_there_is_no_bound(config):
    prepared = prepare(config())
    with pytest.raises(ConfigError, match="there is no bound for an agent: agent"):
        bound_of(prepared)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"agent": [{"tool": "serch"}]}, "agent: unknown tool 'serch'; did you mean 'search'"),
        ({"agent": [{"llm": "chta"}]}, "agent: unknown llm 'chta'; did you mean 'chat'"),
        ({"agent": [{"llm": "chat"}, {"llm": "chat"}]}, "agent: two calls are named 'chat'"),
        ({"agent": [{"llm": "chat", "promt": 3}]}, "promt"),
        ({"slo": {"first_scale": 2}}, "an agent's calls are promised first_s and step_s, not scales"),
        ({"workload": {"prompt": 3}}, "an agent's numbers are at the nodes of its graph"),
        ({"tools": {"search": {"latency_s": {"min": 2, "max": 1}}, "code": {"latency_s": 1}}}, "min 2.0 is larger"),
        ({"tools": {"search": {"latency_s": -1}, "code": {"latency_s": 1}}}, "tools.search.latency_s"),
    ],
)
def test_mistakes_are_told(config, changes, message):
    with pytest.raises(ConfigError, match=message):
        config(**changes)


@pytest.mark.parametrize("text", ["", "1.0\nfast\n", "-3"])
def test_samples_that_are_none(config, tmp_path, text):
    (tmp_path / "times.txt").write_text(text)
    tools = {"search": {"latency_s": {"samples": "times.txt"}}, "code": {"latency_s": 1.0}}
    with pytest.raises(ConfigError, match=r"tools.search.latency_s.samples: .*times.txt"):
        prepare(config(tools=tools))
