"""The bound for agents: no schedule of all that there are serves more, nor does a rule."""

from __future__ import annotations

import json
import math
import os
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from exhaustive_agents import GRAPH, draw_agents, optimum_of_agents

from neustream import SLO, ConfigError, EventLog, NeustreamError, Request
from neustream.analysis.agent_ways import Ways
from neustream.analysis.bounds import agent_bound
from neustream.analysis.bounds.agents.ways import Call, Fork, Lengths, Line, Served, Wait, Within
from neustream.analysis.bounds.tokens.costs import Limits, costs_of
from neustream.analysis.headroom import bound_of, true_profiles, weight_on_time
from neustream.config import load_config
from neustream.experiment import prepare, simulate

INSTANCES = int(os.environ.get("NEUSTREAM_AGENT_INSTANCES", "18"))
"""How many random loads to search exhaustively; 1,000 take some minutes."""
PROFILES = Path(__file__).parents[2] / "profiles/a6000/opt_13b"
CALL = {"llm": "a", "prompt": 60, "output": {"min": 4, "max": 12}, "max_tokens": 12}
OTHER = {**CALL, "llm": "b", "name": "other", "prompt": 200}
GRAPHS = {
    "chain": [CALL, {"tool": "look"}, OTHER],
    "loop": [{"loop": [CALL, {"tool": "look"}], "times": {"min": 1, "max": 3}}, OTHER],
    "all": [{"par": {"one": [CALL, {"tool": "look"}], "two": [OTHER]}}, {**CALL, "name": "join"}],
    "first": [{"par": {"one": [CALL], "two": [{"tool": "look"}]}, "policy": "first"}, OTHER],
    "switch": [{"switch": {"short": {"nodes": []}, "long": {"nodes": [CALL, CALL | {"name": "more"}]}}}, OTHER],
    "promise": [{**CALL, "slo": {"total_s": 0.6}}, {"call": [OTHER], "name": "end", "slo": {"total_s": 1.0}}],
}
TIGHT = {"chain": 1.6, "loop": 2.5, "all": 1.8, "first": 1.4, "switch": 1.6, "promise": 2.0}


@pytest.fixture
def agent(tmp_path):
    """An agent that is asked for more than two devices can do."""
    steps = (PROFILES / "steps.json").read_text()
    (tmp_path / "steps.json").write_text(steps)
    see = {"format": "neustream.profile/1", "stage": "see", "kind": "table", "device": json.loads(steps)["device"]}
    see |= {"origin": {"how": "made up"}, "batch": [1, 8], "latency_s": [0.05, 0.3]}
    (tmp_path / "see.json").write_text(json.dumps(see))

    def made(nodes, *sets, **changes):
        values = {
            "name": "agent",
            "profiles": str(tmp_path),
            "llms": {"a": {"memory": {"tokens": 800}}, "b": {"memory": {"tokens": 800}}},
            "tools": {"look": {"latency_s": {"median": 0.1, "sigma": 0.5}}},
            "agent": nodes,
            "workload": {"rate": 100, "requests": 40, "seed": 3},
            "slo": {"total_s": 2.0},
            **changes,
        }
        path = tmp_path / "agent.yaml"
        path.write_text(yaml.safe_dump(values, sort_keys=False))
        return prepare(load_config(path, sets))

    return made


def test_no_schedule_serves_more_than_the_bound():
    exact = 0
    for seed in range(INSTANCES):
        load = draw_agents(seed)
        best = optimum_of_agents(load)
        found = agent_bound(load.requests, load.ways, load.models, time_limit_s=5.0)
        assert best <= found.value + 1e-6, f"seed {seed}: {best} can be served, the bound is {found}"
        assert found.value <= found.relaxed + 1e-6, f"seed {seed}: {found}"
        exact += found.value <= best + 1e-6
    assert exact >= 0.7 * INSTANCES


@pytest.mark.parametrize("graph", GRAPHS)
def test_no_rule_serves_more(agent, graph):
    busy = agent(GRAPHS[graph], f"slo={{total_s: {TIGHT[graph]}}}")
    most = bound_of(busy, 5)
    assert most.value < 40, "and more is asked than can be served"
    for rule in ("fcfs", "edf", "priced"):
        assert 0 < weight_on_time(simulate(busy, rule)) <= most.value + 1e-6, rule


def test_models_of_one_device_share_its_time(agent):
    apart = agent(GRAPHS["chain"])
    together = agent(GRAPHS["chain"], devices=["one"], placement={"a": ["one"], "b": ["one"]})
    most = bound_of(together, 5)
    assert weight_on_time(simulate(together, "priced")) <= most.value < bound_of(apart, 5).value


def test_images_take_time_before_their_prompt(agent):
    """A call of 1 s at most, behind a look of 0.05 s, or of four images."""
    call = {"llm": "a", "prompt": 60, "output": 12, "max_tokens": 12}
    least = {}
    for images in (0, 1, 4):
        busy = agent([{**call, "images": images}])
        ways = Ways(busy.pipeline, true_profiles(busy))
        least[images] = ways.of(busy.requests[0]).parts[0].before_s
        assert weight_on_time(simulate(busy, "priced")) <= bound_of(busy, 3).value
    assert (least[0], least[1]) == (0.0, pytest.approx(0.05)) and least[1] < least[4] < 0.3


def test_the_ways_are_those_that_are_simulated(agent):
    for graph in ("chain", "loop", "all", "switch"):
        easy = agent(GRAPHS[graph], "workload.rate=0.5", "slo={total_s: 60}")
        log = EventLog()
        simulate(easy, "fcfs", [log])
        ways = Ways(easy.pipeline, true_profiles(easy))
        for request in easy.requests:
            ran = [step for step in log.steps if any(_is_of(job, request.id) for job in step["jobs"])]
            looks = [step["end"] - step["start"] for step in ran if step["stage"] == "look"]
            waits = [part.seconds for part in _flat(ways.of(request)) if isinstance(part, Wait)]
            assert looks == pytest.approx(waits), graph
            calls = [part for part in _flat(ways.of(request)) if isinstance(part, Call)]
            outputs = sum(len([job for job in step["jobs"] if _is_of(job, request.id)]) for step in ran) - len(looks)
            assert outputs == sum(call.outputs for call in calls), graph


def _is_of(job, request):
    return job == request or job.startswith(f"{request}/")


def _flat(way):
    """All calls and waits of a way."""
    match way:
        case Line():
            return [one for part in way.parts for one in _flat(part)]
        case Fork():
            return [one for branch in way.branches for one in _flat(branch)]
        case Within():
            return _flat(way.part)
    return [way]


def test_how_long_ways_take_at_least(agent):
    steps = agent([CALL]).profiles["a.decode"].steps
    limits = Limits(max_batch=8, memory=100)
    lengths = Lengths({"a": Served(costs_of(steps, 100, limits), limits)})
    short, long = Call("a", 20, 2), Call("a", 20, 9)
    assert 0 < lengths.least(short) < lengths.least(long)
    assert lengths.least(Call("a", 90, 20)) == math.inf, "no memory for it"
    assert lengths.least(Fork([short, long, Wait(9)], 2)) == lengths.least(long)
    assert lengths.least(Fork([short, Wait(math.inf)], 2)) == math.inf
    assert lengths.least(Within(long, 0.01)) == math.inf
    first, second = lengths.windows(Line([long, Wait(1.0), Within(short, 5.0)]), 10.0, 20.0)
    assert (first.start, second.end) == (10.0, 20.0)
    assert second.start == pytest.approx(11.0 + lengths.least(long))
    assert first.end == pytest.approx(19.0 - lengths.least(short))
    assert not list(lengths.windows(Fork([short, long], 1), 0.0, 9.0)), "either may be left out"


def test_requests_without_a_deadline_count_and_hopeless_ones_do_not(agent):
    mixed = agent([CALL], "slo={classes: [{total_s: 0.001}, {scale: 1000000}, {}]}")
    hopeless = [request for request in mixed.requests if request.slo.total < 1]
    assert 0 < len(hopeless) < 40
    assert bound_of(mixed, 3).value == 40 - len(hopeless)
    late = [replace(request, slo=SLO(0.001)) for request in mixed.requests]
    assert bound_of(replace(mixed, requests=late), 3).value == 0


def test_a_tool_that_fails_ends_its_requests(agent):
    tools = {"look": {"latency_s": 0.1, "fails": 0.5}}
    flaky = agent([{"tool": "look"}, CALL], "workload.rate=1", "slo={total_s: 20}", tools=tools)
    assert bound_of(flaky, 3).value == simulate(flaky, "fcfs").counts["on_time"] < 40


def test_what_has_no_bound(agent):
    with pytest.raises(ConfigError, match="no bound under"):
        bound_of(agent([CALL], "simulation.latency_noise=0.1"))
    with pytest.raises(ConfigError, match="devices are 2, and the bound is for one"):
        bound_of(agent([CALL], "devices=2"))


def test_a_schedule_that_serves_more_is_an_error():
    way, model = {"0": Line([Call("a", 1, 1)])}, draw_agents(0).models
    request = Request("0", GRAPH, 0.0, SLO(1e-3), {})
    with pytest.raises(NeustreamError, match="the bound is wrong"):
        agent_bound([request], way, model, known=[{"0"}]).above(1.0)
