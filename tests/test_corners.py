"""Corner cases of everything around the core that once went wrong."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass

import numpy as np
import pytest
from toys import Gate, Step, batches, command, engine, live, one_stage, request, table, toy

from neustream import (
    ConfigError,
    Decision,
    EventLog,
    ProfileError,
    Report,
    RequestError,
    Static,
    load_profile,
)
from neustream.config import load_experiment
from neustream.experiment import prepare, sweep_points
from neustream.experiment.policies import build_policy

ONE = {"s": table("s", 1.0)}
SOON = 5


def test_futures_posted_while_a_policy_breaks_are_answered_too():
    graph, lost = one_stage(), []

    @dataclass(frozen=True)
    class Bad:
        def decide(self, view):
            if len(lost) < 10:
                lost.append(tested.submit(graph))
                lost.append(tested.cancel("nobody"))
            return Decision()

    tested = live(graph, {"s": Step()}, ONE, policy=Bad())
    tested.start()
    assert tested.submit(graph).result(SOON).status == "done"
    for at in range(0, 10, 2):  # each of them was asked for before the one in front of it ran
        assert lost[at].result(SOON).status == "done"
        assert lost[at + 1].result(SOON) is False
    tested.close()


def test_an_interrupt_does_not_wait_for_the_next_arrival():
    graph = one_stage()
    tested = engine(graph, ONE, observers=[lambda record: type(record).__name__ == "Finished" and tested.interrupt()])
    tested.run([request("a", graph), request("b", graph, 3600.0)])
    assert tested.clock.now() == 1.0


def test_nothing_is_accepted_after_an_interrupt():
    graph, module = one_stage(), Gate()
    tested = live(graph, {"s": module}, ONE).start()
    first, second = tested.submit(graph), tested.submit(graph)
    assert module.began.wait(SOON)
    tested.interrupt()
    assert second.result(SOON).status == "cancelled"  # the Stop was handled
    late = tested.submit(graph)  # a step is under way, so the loop still hears of it
    with pytest.raises(RequestError, match="this engine was interrupted"):
        late.result(SOON)
    module.go.set()
    assert first.result(SOON).status == "cancelled"
    with pytest.raises(RequestError, match=r"interrupted|is not serving"):
        tested.submit(graph).result(SOON)  # its thread may not be over yet: the last answer is out before
    tested._thread.join(SOON)
    with pytest.raises(RequestError, match="is not serving"):
        tested.cancel("nobody").result(SOON)
    tested.close()


def test_requests_of_one_instant_are_decided_on_together():
    graph, log = one_stage(max_batch=4), EventLog()
    engine(graph, {"s": table("s", 1.0, 1.0, 1.0, 1.0)}, Static(), observers=[log]).run(
        request(i, graph) for i in "abcd"
    )
    assert batches(log) == [("s", ["a", "b", "c", "d"])]


def test_arrivals_count_from_now_whatever_report_is_given():
    graph, log = one_stage(), EventLog()
    tested = engine(graph, ONE, observers=[log])
    tested.run([request("a", graph, 9.0)])
    tested.run([request("b", graph, 5.0)], Report())
    assert log.requests["b"]["arrival"] == 15.0


def test_a_module_may_return_any_iterable():
    class Lazy(Step):
        def step(self, inputs):
            return ({"out": one.id} for one in inputs)

    graph = one_stage()
    with live(graph, {"s": Lazy()}, ONE) as tested:
        result = tested.submit(graph, id="a").result(SOON)
    assert (result.status, result.reason, result.output) == ("done", "", {"out": "a"})


@pytest.mark.parametrize("text", ["my key: 1\n", '"": {a: 1}\nmy other key: 2\n'])
def test_an_unknown_key_with_a_space(tmp_path, text):
    path = toy(tmp_path)
    path.write_text(path.read_text() + text)
    with pytest.raises(ConfigError, match="unknown key 'my"):
        load_experiment(path)


def test_an_unknown_deep_key_with_a_space(tmp_path):
    stages = {"draw": {"max batch": 3, "times": "steps"}, "decode": {}}
    with pytest.raises(ConfigError, match=r"unknown key 'stages\.draw\.max batch'; did you mean 'max_batch'"):
        load_experiment(toy(tmp_path, stages=stages))


def test_a_value_of_set_that_is_not_yaml(tmp_path):
    with pytest.raises(ConfigError, match=r"--set"):
        load_experiment(toy(tmp_path), ["workload.rate=[1"])


def test_a_config_that_is_not_text(tmp_path):
    path = tmp_path / "x.yaml"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError):
        load_experiment(path)


def test_a_misspelt_choices(tmp_path):
    with pytest.raises(ConfigError, match="did you mean 'choices'"):
        load_experiment(toy(tmp_path), ["workload.steps={choises: [1]}"])


def test_negative_choices_are_a_config_error(tmp_path):
    with pytest.raises(ConfigError, match=r"workload.steps.choices"):
        load_experiment(toy(tmp_path), ["workload.steps={choices: [-1]}"])


def test_promises_follow_each_requests_own_loops(tmp_path):
    (tmp_path / "t.jsonl").write_text(
        '{"arrival_s": 1, "params": {"rounds": 1}}\n{"arrival_s": 2, "params": {"rounds": 100}}\n'
    )
    stages = {"draw": {"times": "rounds", "max_batch": 4}, "decode": {"max_batch": 2}}
    path = toy(tmp_path, stages=stages, workload={"trace": "t.jsonl"}, slo={"scale": 3})
    totals = [r.slo.total for r in prepare(load_experiment(path)).requests]
    assert totals == pytest.approx([3 * 0.003, 3 * 0.201])


def test_load_without_any_work_is_an_error_of_ours(tmp_path):
    path = toy(tmp_path, stages={"draw": {"times": "steps"}}, workload={"load": 1, "steps": 0})
    with pytest.raises(ConfigError):
        prepare(load_experiment(path))


def test_classes_do_not_depend_on_the_gaps(tmp_path):
    classes = [{"name": "gold", "share": 1, "total_s": 1}, {"name": "plain", "share": 3, "total_s": 9}]
    load = {"rate": 10, "cv": 1, "requests": 2000, "steps": 5}
    requests = prepare(load_experiment(toy(tmp_path, slo={"classes": classes}, workload=load))).requests
    gaps = np.diff([0.0, *(r.arrival for r in requests)])
    gold = np.array([r.slo.name == "gold" for r in requests])
    assert abs(np.corrcoef(gaps, gold)[0, 1]) < 0.1
    assert gaps[gold].max() > gaps[~gold].min()


def write(path, **file):
    head = {"format": "neustream.profile/1", "stage": "s", "device": "x", "origin": {}}
    path.write_text(json.dumps({**head, **file}))
    return path


def test_a_wrong_linear_profile_is_told_of_its_own_keys(tmp_path):
    with pytest.raises(ProfileError, match="max_batch"):
        load_profile(write(tmp_path / "p.json", kind="linear", base_s=1.0))


def test_an_impossible_table_names_its_file(tmp_path):
    path = write(tmp_path / "p.json", kind="table", batch=[2, 1], latency_s=[1, 1])
    with pytest.raises(ProfileError, match=r"p\.json"):
        load_profile(path)


def test_a_profile_that_is_a_folder(tmp_path):
    with pytest.raises(ProfileError):
        load_profile(tmp_path)


def test_parameters_of_a_plain_policy(tmp_path):
    with pytest.raises(ConfigError):
        build_policy(load_experiment(toy(tmp_path, policies={"toys:Plain": {"x": 1}})), "toys:Plain")


@pytest.mark.parametrize("files", [3, {"draw": 3}, {"draw": "draw"}])
def test_a_plan_of_the_wrong_type(tmp_path, files):
    with pytest.raises(ConfigError, match="plan"):
        build_policy(load_experiment(toy(tmp_path, policies={"clockwork": {"plan": files}})), "clockwork")


def test_a_policy_of_an_empty_module(tmp_path):
    with pytest.raises(ConfigError):
        build_policy(load_experiment(toy(tmp_path)), ":Policy")


def test_the_burstiness_of_constant_arrivals_cannot_be_swept(tmp_path):
    experiment = load_experiment(toy(tmp_path, workload={"arrivals": "constant", "rate": 3}))
    with pytest.raises(ConfigError, match="does not use it"):
        list(sweep_points(experiment, "workload.cv", [1.0, 2.0]))


def test_a_long_error_is_one_line(tmp_path):
    path = toy(tmp_path)
    done = subprocess.run(
        [sys.executable, "-m", "neustream.cli", "simulate", str(path), "-p", "bogus"], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1


def test_the_folder_of_a_trace_is_made(tmp_path):
    done = command("simulate", toy(tmp_path), "--trace", tmp_path / "new/t.json")
    assert done.status == 0
    assert (tmp_path / "new/t.json").exists()


def test_values_of_a_sweep_that_are_empty(tmp_path):
    done = command("sweep", toy(tmp_path), "--over", "workload.cv", "--values", "", "--out", tmp_path / "o")
    assert done.status == 2


def test_results_are_json_whatever_the_device(tmp_path):
    done = command("simulate", toy(tmp_path), "-s", "simulation.latency_scale=.inf", "--json", tmp_path / "o.json")
    assert done.status == 2 or json.loads(
        (tmp_path / "o.json").read_text(), parse_constant=lambda name: pytest.fail(f"{name} in the JSON")
    )


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ("workload.rate=true", "rate cannot be true"),
        ("workload.steps={choices: [true, 3]}", "steps.choices.0"),
        ("workload.cv=1e200", "workload.cv"),
        ("stages.draw.profile=[]", "stages.draw.profile"),
        ("policies={}", "policies"),
    ],
)
def test_values_that_mean_nothing(tmp_path, change, named):
    with pytest.raises(ConfigError, match=named):
        load_experiment(toy(tmp_path), [change])


@pytest.mark.parametrize(
    ("policy", "parameter", "named"),
    [
        ("static", "max_batch=0", "static: max_batch must be 1 or more, got 0"),
        ("clockwork", "lead_s=-1", "clockwork: lead_s must be a time >= 0, got -1"),
        ("neustream", "step_delta=-1", "neustream: step_delta must be greater than 0"),
        ("neustream", "slo_scale=.nan", "neustream: slo_scale must be greater than 0"),
    ],
)
def test_policy_parameters_have_bounds_even_if_another_policy_runs(tmp_path, policy, parameter, named):
    path = toy(tmp_path)
    done = command("simulate", path, "-p", "fcfs", "--set", f"policies.{policy}.{parameter}")
    assert done.status == 2 and named in done.err.replace("\n", " ")


def test_results_that_cannot_be_written_are_one_line(tmp_path):
    done = command("simulate", toy(tmp_path), "--json", tmp_path)
    assert done.status == 2 and f"--json {tmp_path}: is a directory" in done.err
