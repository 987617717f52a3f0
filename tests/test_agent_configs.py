"""Agents as configs: their graph, what is drawn for it, simulated tools, and what is said of mistakes."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from toys import command

from neustream import EventLog
from neustream.analysis.headroom import bound_of
from neustream.commands.models import describe
from neustream.config import load_config
from neustream.core.steps import Step
from neustream.errors import ConfigError
from neustream.experiment import prepare, simulate, sweep_points
from neustream.experiment.pipelines import pipeline_of
from neustream.experiment.sweeping import Unit, _digest, fingerprint
from neustream.profiling.steps import load_steps

ROOT = Path(__file__).parents[1]
PROFILES = ROOT / "profiles/a6000/opt_13b"
PAPER = ROOT / "configs/paper/matplotagent_rtx4090.yaml"
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


def test_an_agent_may_call_tools_alone(config):
    prepared = prepare(config(llms={}, agent=[{"tool": "search"}], slo={"total_s": 30}))
    report = simulate(prepared, "fcfs")
    assert report.counts["on_time"] == 12 and report.to_dict()["latency_s"]["p50"] == pytest.approx(1.0)


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


def test_points_are_kept_by_what_a_tools_file_says(config, tmp_path):
    (tmp_path / "times.txt").write_text("1.5\n")
    unit = Unit(
        config(tools={**yaml.safe_load(AGENT)["tools"], "code": {"latency_s": {"samples": "times.txt"}}}), "", 1, ()
    )
    first = fingerprint(unit, "fcfs")
    _digest.cache_clear()
    assert fingerprint(unit, "fcfs") == first
    (tmp_path / "times.txt").write_text("2.5\n")
    _digest.cache_clear()
    assert fingerprint(unit, "fcfs") != first


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


def test_requests_take_replicas_in_turns(config):
    llms = {"chat": {"memory": {"tokens": 20800}}, "eye": {"replicas": 3}}
    agent = [{"llm": "chat", "output": 3}, {"llm": "eye", "output": 3}]
    prepared = prepare(config(llms=llms, agent=agent))
    assert [pool.name for pool in prepared.pools] == ["chat", "eye.0", "eye.1", "eye.2"]
    log = EventLog()
    assert simulate(prepared, "fcfs", [log]).counts["on_time"] == 12
    for number in range(3):
        ids = {id for step in log.steps if step["stage"].startswith(f"eye.{number}") for id in step["jobs"]}
        assert ids == {f"agent-{at}" for at in range(number, 12, 3)}


def test_what_models_tells_of_an_agent(config):
    llms = {"chat": {}, "eye": {"replicas": 2}}
    see = {"llm": "eye", "prompt": 40, "output": 20, "reads": ["chat"]}
    agent = [{"llm": "chat", "prompt": 100, "output": 10}, {"tool": "search"}, see]
    told = describe(prepare(config(llms=llms, agent=agent)).pipeline)["stages"]
    each = {stage["stage"]: (stage["pool"], stage["size"], list(stage["latency_s"])) for stage in told}
    assert each == {
        "chat.prefill": ("chat", 100, ["1"]),
        "chat.decode": ("chat", 105, ["1", "256"]),
        "search": ("tool search", 0, ["1"]),
        **{f"eye.{number}.prefill": (f"eye.{number}", 50, ["1"]) for number in (0, 1)},
        **{f"eye.{number}.decode": (f"eye.{number}", 60, ["1", "256"]) for number in (0, 1)},
    }


def test_an_agent_of_a_config_is_not_run():
    done = command("run", PAPER)
    assert done.status == 2 and "an agent of a config is simulated alone" in done.err


def listed(**keys):
    return {
        "llm": "chat",
        "name": "answer",
        "prompt": {"lengths": "prompt"},
        "output": {"lengths": "of.answer"},
        **keys,
    }


LENGTHS = (
    '{"prompt": [5, 6, 7], "of": {"plan": [20, 30], "answer": [4, 5], "none": [], "words": ["a"], "zero": [3, 0]}}'
)


def test_lengths_of_a_file(config, tmp_path):
    (tmp_path / "lengths.json").write_text(LENGTHS)
    plan = {"llm": "chat", "name": "plan", "output": {"lengths": "of.plan"}, "max_tokens": 25}
    agent = [plan, listed(reads=["plan"], extra_tokens=100, max_tokens="output")]
    prepared = prepare(config(agent=agent, workload={"requests": 4, "lengths": "lengths.json"}))
    plans = [request.params["plan"] for request in prepared.requests]
    assert [(some["max_tokens"], some["ends"]) for some in plans] == [(25, 20), (25, 25), (25, 20), (25, 25)]
    answers = [request.params["answer"] for request in prepared.requests]
    assert [some["prompt_tokens"] for some in answers] == [125, 131, 127, 130]
    assert [(some["max_tokens"], some["ends"]) for some in answers] == [(4, 4), (5, 5), (4, 4), (5, 5)]
    assert simulate(prepared, "fcfs").to_dict()["tokens"]["outputs"] == 90 + 18


@pytest.mark.parametrize(
    ("text", "place", "message"),
    [
        (LENGTHS, "of.anser", "there is no 'of.anser'; did you mean 'answer'"),
        (LENGTHS, "prompt.x", "there is no 'prompt.x'"),
        (LENGTHS, "of", "'of' must be a list"),
        (LENGTHS, "of.none", "'of.none' must be a list"),
        (LENGTHS, "of.words", "'of.words': whole numbers from 1 to 16777216, got 'a'"),
        (LENGTHS, "of.zero", "got 0"),
        ("{", "prompt", "lengths.json"),
        (None, "prompt", "lengths.json"),
    ],
)
def test_files_of_lengths_that_are_none(config, tmp_path, text, place, message):
    if text is not None:
        (tmp_path / "lengths.json").write_text(text)
    loaded = config(agent=[listed(output={"lengths": place})], workload={"lengths": "lengths.json"})
    with pytest.raises(ConfigError, match=rf"^workload\.lengths: .*{message}"):
        prepare(loaded)


def test_a_tool_may_add_the_same_to_every_promise_by_scale(config):
    tools = {"search": {"latency_s": 1.0}, "code": {"latency_s": 3.0, "slo_s": 4.0}}
    two, three = (prepare(config(tools=tools, slo={"scale": scale})).requests[0].slo.total for scale in (2, 3))
    assert (two - 4.0) / 2 == pytest.approx((three - 4.0) / 3)
    given = {"scale": 2, "extra_s": 0.5}
    assert prepare(config(tools=tools, slo=given)).requests[0].slo.total == pytest.approx(two + 1.0)


def test_seeds_by_cv(config):
    def seed(**keys):
        return config(workload={"seeds": {1: 4, 2.5: 6}, **keys}).workload.seed

    assert (seed(), seed(cv=2.5), seed(cv=3, seed=9)) == (4, 6, 9)
    with pytest.raises(ConfigError, match=r"seeds: there is none for cv 3, only for 1, 2.5; give a seed"):
        seed(cv=3)
    found = [
        point.workload.seed
        for _, point in sweep_points(config(workload={"seeds": {1: 4, 2: 6}}), "workload.cv", [1, 2])
    ]
    assert found == [4, 6]


def test_the_papers_agent_is_promised_what_the_artifact_promises():
    prepared = prepare(load_config(PAPER, ["workload.requests=2"]))
    coder, seer = (
        load_steps(ROOT / f"profiles/rtx4090/matplotagent/{name}_7b.json") for name in ("codellama", "llava")
    )
    for request in prepared.requests:
        total = 0.0
        for name, steps in (("codellama_1", coder), ("llava", seer), ("codellama_2", coder)):
            prompt, outputs = request.params[name]["prompt_tokens"], request.params[name]["ends"]
            total += 1.8 * steps.seconds(Step(1, prompt, prompt**2))
            total += sum(1.8 * steps.seconds(Step(decodes=1, context=prompt + at)) for at in range(1, outputs))
        assert request.slo.total == pytest.approx(total + 2 * 2.5)
    assert simulate(prepared, "edf").counts["on_time"] == 2


def test_there_is_a_bound_of_one_instance(config):
    assert bound_of(prepare(config())).value == 12
    with pytest.raises(ConfigError, match="there is no bound for language models on several instances"):
        bound_of(prepare(config(cluster={"instances": 2})))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"agent": [{"tool": "serch"}]}, "agent: unknown tool 'serch'; did you mean 'search'"),
        ({"agent": [{"llm": "chta"}]}, "agent: unknown llm 'chta'; did you mean 'chat'"),
        ({"agent": [{"llm": "chat"}, {"llm": "chat"}]}, "agent: two calls are named 'chat'"),
        ({"agent": [{"llm": "chat", "promt": 3}]}, "promt"),
        ({"slo": {"first_scale": 2}}, "an agent's calls are promised first_s and step_s, not scales"),
        ({"workload": {"prompt": 3}}, "an agent's numbers are at the nodes of its graph"),
        ({"agent": [listed()]}, "agent: lengths 'prompt' needs workload.lengths: FILE"),
        ({"workload": {"lengths": "lengths.json"}}, "no node of the agent takes its numbers from there"),
        ({"agent": [{"llm": "chat", "reads": ["chat"]}]}, "call 'chat' reads 'chat', which is no call before it"),
        (
            {"agent": [{"par": {"a": [{"llm": "chat"}], "b": [{"llm": "chat", "name": "two", "reads": ["chat"]}]}}]},
            "call 'two' reads 'chat', which is no call before it; allowed: none",
        ),
        ({"agent": [{"llm": "chat", "max_tokens": "outputs"}]}, "max_tokens: Input should be 'output', got 'outputs'"),
        ({"agent": [{"llm": "chat", "prompt": {"lengths": ""}}]}, "prompt.lengths"),
        ({"llms": {"chat": {"replicas": 0}}}, "llms.chat.replicas"),
        ({"llms": {"chat": {"replicas": 2}}, "cluster": {"instances": 2}}, "'chat' has replicas; a cluster has"),
        ({"workload": {"seeds": {}}}, "workload.seeds"),
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


def test_the_profile_files_of_an_agent_are_told_before_its_tool_was_measured(config):
    loaded = config(tools={"search": {"latency_s": {"samples": "times.txt"}}, "code": {"latency_s": 1.0}})
    assert pipeline_of(loaded).profile_files() == [PROFILES / "steps.json"]
    with pytest.raises(ConfigError, match=r"tools.search.latency_s.samples: .*times.txt cannot be read"):
        prepare(loaded)
