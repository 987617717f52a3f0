"""benchmarks/agent_demo.py: its tool, its figure, and one run of its agent."""

from __future__ import annotations

import importlib
import json
import sys
import warnings
from types import SimpleNamespace

import pytest
from toys import Flat

pytest.importorskip("torch", reason="needs the extra 'llm'")
pytest.importorskip("PIL", reason="needs the extra 'diffusion'")


@pytest.fixture(scope="module")
def demo(root):
    with pytest.MonkeyPatch.context() as patched, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # transformers' own imports
        patched.syspath_prepend(root / "benchmarks")
        yield importlib.import_module("agent_demo")
        del sys.modules["agent_demo"]


def planned(text):
    return SimpleNamespace(state={"plan": SimpleNamespace(text=text)})


def test_the_tool_draws_the_chart_of_a_plan(demo):
    charts = {demo.draw(planned(text))["chart"].tobytes() for text in ("a", "b", "c", "d", "e", "f")}
    assert 1 < len(charts) <= 3, "plans choose among three programs"


def test_a_program_may_not_do_everything(demo, monkeypatch):
    wrong = ["pen.nothing()", "open('large', 'wb').write(b'x' * (1 << 22))", "b = bytearray(1 << 31)"]
    monkeypatch.setattr(demo, "BODIES", [None])
    for body in wrong:
        monkeypatch.setattr(demo, "BODIES", [body])
        with pytest.raises(RuntimeError, match="the program ended with"):
            demo.draw(planned("a"))


def test_a_run_goes_through_both_models_and_the_tool(demo, tmp_path, monkeypatch):
    mount = demo.TextMount
    monkeypatch.setattr(demo, "TextMount", lambda *args, **more: mount(*args, profile=Flat(), **more))
    with demo.served("priced", tmp_path) as service:
        state = service.submit(question=demo.QUESTIONS[0], model="agent").result(120)
    assert [len(state[name].token_ids) for name in ("plan", "look", "write")] == [demo.PLAN, demo.LOOK, demo.WRITE]
    assert state["chart"].size == (64, 64)
    legs = service.report.to_dict()["legs"]
    assert list(legs) == ["plan", "draw", "look", "write"]
    report = service.report.to_dict()
    demo.figure({"priced": demo.Played(report, report, report, [], {})}, tmp_path / "path.png")
    assert (tmp_path / "path.png").stat().st_size > 1000


def measure(demo, folder, lengths):
    """Write what the config reads."""
    (folder / "profiles").mkdir()
    steps = (demo.CONFIG.parents[2] / "profiles/a6000/opt_13b/steps.json").read_text()
    for name in ("chat", "llava"):
        (folder / f"profiles/{name}.json").write_text(steps)
    table = {"kind": "table", "batch": [1, 8], "latency_s": [0.1, 0.2], "origin": {}, "stage": "see"}
    see = {"format": "neustream.profile/1", "device": json.loads(steps)["device"], **table}
    (folder / "profiles/llava-see.json").write_text(json.dumps(see))
    (folder / "draw.txt").write_text("0.2\n")
    (folder / "lengths.json").write_text(json.dumps(lengths))


def test_policies_are_compared_on_the_device_as_it_was_under_each(demo, tmp_path):
    measure(demo, tmp_path, {"plan": [30], "look": [40], "write": [50]})
    runs = demo.prepared(tmp_path, ["workload.requests=12"])
    reports = {policy: demo.simulate(runs, policy).to_dict() for policy in ("fcfs", "edf")}
    slow = {"fcfs": {"took": lambda batch: 6.0}, "edf": {}}
    played = {policy: demo.Played(report, report, report, [], slow[policy]) for policy, report in reports.items()}
    demo.compare(played, runs)
    for policy, one in played.items():
        kept = one.told(policy)["on_time_on_device_of"]
        assert kept["edf"] == reports[policy]["counts"]["on_time"] > kept["fcfs"]
    table = demo.same_device_table([one.told(policy) for policy, one in played.items()])
    assert table.row_count == len(played)


def test_what_is_served_is_what_the_config_says(demo, tmp_path, monkeypatch):
    """Its graph, stage by stage, on the pools that the service has."""
    mount = demo.TextMount
    monkeypatch.setattr(demo, "TextMount", lambda *args, **more: mount(*args, profile=Flat(), **more))
    with demo.served("priced", tmp_path) as service:
        graph = service.models["agent"].graph
        device, tool = service.engine.members[0].scheduler.pools.values()
        state = service.submit(question=demo.QUESTIONS[0], model="agent").result(120)
    lengths = {name: [state[name].prompt_tokens] for name in ("plan", "look", "write")}
    measure(demo, tmp_path, lengths)
    runs = demo.prepared(tmp_path, [])
    assert list(runs.graph.stages) == list(graph.stages)
    assert {pool.name: set(pool.stages) for pool in runs.pools} == {
        "cpu": set(device.stages),
        "tool draw": set(tool.stages),
    }
    assert runs.pools[0].kv_caches == device.kv_caches and runs.pools[1].concurrency == tool.concurrency
    assert {name: runs.requests[0].params[name]["ends"] for name in lengths} == {
        name: len(state[name].token_ids) for name in lengths
    }
    assert sum(demo.simulate(runs, "fcfs").counts.values()) == len(runs.requests)
