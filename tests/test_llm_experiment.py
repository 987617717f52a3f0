"""Experiments on language models: their configs, lengths and promises, profiles as files, and what comes out."""

from __future__ import annotations

import json

import numpy as np
import pytest
import yaml
from toys import adds_up, command

from neustream import ConfigError, ProfileError
from neustream.analysis.tables import tokens_table
from neustream.config import load_experiment
from neustream.core.steps import Step
from neustream.engine.events import Finished
from neustream.experiment import prepare, simulate, sweep_points
from neustream.profiling.steps import load_steps, save_steps, steps_file

SETTINGS = ("opt_13b", "opt_30b", "opt_66b")


@pytest.fixture
def path(root):
    return lambda name: root / f"configs/paper/{name}_a6000.yaml"


def prepared(path, *overrides):
    return prepare(load_experiment(path, overrides))


def test_requests_have_drawn_lengths_that_policies_do_not_see(path):
    some = prepared(path("opt_13b"))
    assert len(some.requests) == len(some.lengths) == 1000
    prompts = np.array([request.params["prompt_tokens"] for request in some.requests])
    assert 60 < np.median(prompts) < 80 and prompts.max() <= 400
    assert set(some.requests[0].params) == {"prompt_tokens", "max_tokens"}
    assert {request.params["max_tokens"] for request in some.requests} == {300}
    lengths = np.array(list(some.lengths.values()))
    assert 130 < np.median(lengths) < 170 and lengths.max() == 300
    again = prepared(path("opt_13b"), "workload.seed=1")
    assert [r.params for r in again.requests] != [r.params for r in some.requests]


def test_promises_are_multiples_of_what_the_request_takes_alone(path):
    some = prepared(path("opt_13b"))
    prefill, decode = some.profiles["llm.prefill"], some.profiles["llm.decode"]
    for request in some.requests[:20]:
        tokens = request.params["prompt_tokens"]
        assert request.slo.first == pytest.approx(3 * prefill.latency(1, tokens, tokens**2))
        assert request.slo.step == pytest.approx(1.5 * decode.latency(1, tokens + 150))
        assert request.slo.total == np.inf
    fixed = prepared(path("opt_13b"), "slo={first_s: 0.5, step_s: 0.1, total_s: 9}").requests[0].slo
    assert (fixed.first, fixed.step, fixed.total) == (0.5, 0.1, 9.0)


def test_classes_may_promise_tokens(path):
    classes = "slo={classes: [{name: chat, first_s: 1, step_s: 0.1}, {name: bulk, total_s: 60, weight: 2}]}"
    report = simulate(prepared(path("opt_13b"), classes, "workload.requests=60", "workload.rate=1"), "priced")
    assert set(report.classes) == {"chat", "bulk"} and report.attainment == 1.0


def test_a_trace_may_bring_lengths(path, tmp_path):
    trace = tmp_path / "trace.csv"
    trace.write_text("arrival_s,prompt_tokens,output_tokens,max_tokens\n0,10,5,8\n1,20,9,8\n")
    config = yaml.safe_load(path("opt_13b").read_text())
    config |= {"profiles": str(path("opt_13b").parent / config["profiles"]), "sweeps": {}}
    config["workload"] = {"trace": str(trace)}
    own = tmp_path / "own.yaml"
    own.write_text(yaml.safe_dump(config))
    some = prepared(own)
    assert [(r.arrival, r.params["prompt_tokens"], r.params["max_tokens"]) for r in some.requests] == [
        (0.0, 10, 8),
        (1.0, 20, 8),
    ]
    assert list(some.lengths.values()) == [5, 8]
    assert simulate(some, "priced").tokens.outputs == 13


class Busy:
    """An observer: seconds of steps by member, and the members of each request."""

    def __init__(self):
        self.seconds, self.places = {}, {}

    def __call__(self, record):
        if isinstance(record, Finished):
            seconds = record.at - record.step.started_at
            self.seconds[record.member] = self.seconds.get(record.member, 0.0) + seconds
            for id in record.step.ids:
                self.places.setdefault(id, set()).add(record.member)


@pytest.mark.parametrize("policy", ["priced", "fcfs", "sarathi"])
def test_two_instances_at_twice_the_rate_do_what_one_does(path, policy):
    shared = ["workload.requests=150", "workload.cv=1"]
    one = simulate(prepared(path("opt_13b"), *shared, "workload.rate=3"), policy)
    busy = Busy()
    two = simulate(prepared(path("opt_13b"), *shared, "workload.rate=6", "devices=2"), policy, [busy])
    alone = simulate(prepared(path("opt_13b"), *shared, "workload.rate=6"), policy)
    assert adds_up({"submitted": two.submitted, **two.counts})
    assert len(busy.places) >= 140 and all(len(members) == 1 for members in busy.places.values())
    assert set(busy.seconds) == {"0", "1"} and min(busy.seconds.values()) > 0.7 * max(busy.seconds.values())
    assert two.counts["on_time"] > alone.counts["on_time"]
    assert abs(two.attainment - one.attainment) < 0.15


def test_one_instance_is_what_is_simulated_without_the_key(path):
    reports = [
        simulate(prepared(path("opt_13b"), "workload.requests=80", *more), "priced").to_dict()
        for more in ([], ["devices=1"])
    ]
    for report in reports:
        del report["decision_us"]
    assert reports[0] == reports[1]


def test_there_is_no_bound_for_several_instances(path):
    told = command("simulate", path("opt_13b"), "--bound", "--set", "devices=2")
    assert told.status and "devices are 2, and the bound is for one" in " ".join(told.err.split())


def test_a_sweep_drives_several_instances(path, tmp_path):
    arguments = ["--policy", "fcfs", "--set", "workload.requests=60", "--over", "workload.rate", "--values", "6"]
    on_time = []
    for instances in (1, 3):
        more = ["--set", f"devices={instances}", "--jobs", "1", "--out", tmp_path]
        told = command("sweep", path("opt_13b"), *arguments, *more)
        assert told.status == 0, told.err
        on_time.append(json.loads((tmp_path / "sweep.json").read_text())[0]["counts"]["on_time"])
    assert on_time[0] < on_time[1]


WRONG = [
    ("stages={a: {}}", "give stages or llm, not both"),
    ("slo={scale: 2, total_s: 3}", "give scale or total_s, not both"),
    (
        "slo={step_s: 0.1}",
        "step_s needs first_scale or first_s: output k is due at first + k * step; drop it: --set slo.step_s=null",
    ),
    ("slo={first_s: 1, first_scale: 2}", "give first_scale or first_s, not both"),
    ("slo={classes: [{first_s: 1}], first_s: 2}", "first_s goes into the classes"),
    ("slo.first_scale=-1", "slo.first_scale"),
    ("llm.memory={tokens: 8, block: 16}", "less than one block"),
    ("llm.memory.tokens=0", "llm.memory.tokens"),
    ("llm.max_batch=0", "llm.max_batch"),
    ("llm.max_bach=3", "did you mean 'max_batch'?"),
    (
        "pools={gpu: {workers: 2}}",
        "unknown key 'pools'; did you mean 'profiles'? allowed: about, backend, cluster, devices",
    ),
    ("llm={memory: {tokens: 9, blocks: 3}}", "unknown key 'llm.memory.blocks'; did you mean 'block'?"),
    ("devices=0", "devices: Input should be greater than or equal to 1, got 0"),
    ("devices=1.5", "devices: Input should be a valid integer"),
    ("devices=4096", "devices: Input should be less than or equal to 1024, got 4096"),
    ("devices=[]", "devices: List should have at least 1 item"),
    ("devices=[cpu, 3]", "devices.1: Input should be a valid string, got 3"),
    ("devices=cpu", "devices: Input should be a valid integer"),
    ("workload.steps=3", "workload: steps: numbers of steps are for a pipeline of stages"),
    ("workload.prompt={median: 0, sigma: 1}", "workload.prompt"),
    ("workload.prompt={median: 5, sigma: 1, min: 9, max: 3}", "min 9 is larger than max 3"),
    ("workload.max_tokens=0", "workload.max_tokens"),
    ("workload.output=many", "workload.output"),
]


@pytest.mark.parametrize(("override", "message"), WRONG)
def test_an_impossible_config_is_told(path, override, message):
    with pytest.raises(ConfigError) as wrong:
        load_experiment(path("opt_13b"), [override])
    assert message in str(wrong.value)


def test_tokens_are_for_language_models(root):
    diffusion = root / "configs/paper/sd15_256_rtx4090.yaml"
    for override, message in (
        ("slo={first_s: 1}", "slo: promises"),
        ("workload.prompt=3", "workload: prompt: numbers of tokens are for an llm"),
    ):
        with pytest.raises(ConfigError, match=message):
            load_experiment(diffusion, [override])


def test_prompts_of_no_tokens_are_told(path):
    with pytest.raises(ConfigError, match=r"workload\.prompt: Input should be greater than or equal to 1, got 0"):
        prepared(path("opt_13b"), "workload.prompt=0")


def test_a_prompt_larger_than_the_memory_fails_alone(path):
    some = prepared(path("opt_13b"), "llm.memory.tokens=320", "workload.requests=50", "workload.rate=0.5")
    report = simulate(some, "priced")
    large = sum(request.params["prompt_tokens"] > 320 for request in some.requests)
    assert 0 < large <= report.counts["failed"] < 50
    assert any("needs KV cache for" in reason for reason in report.reasons)


@pytest.mark.parametrize("name", SETTINGS)
def test_ours_is_at_least_as_good_as_every_baseline(path, name):
    experiment = load_experiment(path(name), ["workload.requests=300"])
    values = {"opt_13b": (2, 6.7), "opt_30b": (2, 5), "opt_66b": (1, 4)}[name]
    for rate, variant in sweep_points(experiment, "workload.rate", values):
        some = prepare(variant)
        met = {policy: simulate(some, policy).attainment for policy in experiment.policies}
        assert met["priced"] == max(met.values()), met
        if rate == values[1]:
            assert met["priced"] > 1.2 * met["fcfs"], met


def test_a_simulation_is_the_same_again(path):
    def once():
        return simulate(prepared(path("opt_66b"), "workload.requests=80"), "priced").to_dict()

    first, second = once(), once()
    for run in (first, second):
        del run["decision_us"]
    assert first == second


def test_both_views_and_all_distributions_are_reported(path):
    out = simulate(prepared(path("opt_13b"), "workload.requests=100"), "fcfs").to_dict()
    tokens = out["tokens"]
    for name in ("ttft_s", "tpot_s", "itl_s", "e2el_s"):
        assert list(tokens[name]) == ["mean", "p50", "p90", "p99"] and tokens[name]["p50"] <= tokens[name]["p99"]
    assert tokens["goodput_tps"] <= tokens["throughput_tps"]
    assert 0 < tokens["client_attainment"] <= 1
    json.dumps(out)


def test_no_policy_knows_the_lengths(path):
    """With the same arrivals, prompts and promises, the first decisions do not depend on the true lengths."""
    first = {}
    for output in (30, 300):
        some = prepared(path("opt_13b"), f"workload.output={output}", "workload.requests=20")
        order = []
        simulate(some, "priced", [lambda record, order=order: order.append((type(record).__name__, record.at))])
        first[output] = order[:40]
    assert first[30] == first[300]


# -- profiles ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SETTINGS)
def test_profiles_of_the_artifact_are_as_published(root, name):
    steps = load_steps(root / f"profiles/a6000/{name}/steps.json")
    decode = {"opt_13b": 0.0438634, "opt_30b": 0.0546009, "opt_66b": 0.0709305}[name]
    assert steps.seconds(Step(decodes=1, context=1.0)) == pytest.approx(decode, rel=1e-4)
    assert steps.device.endswith("RTX A6000")
    file = json.loads((root / f"profiles/a6000/{name}/steps.json").read_text())
    assert file["origin"]["commit"] and file["origin"]["notes"]


def timed():
    def seconds(step):
        return 0.01 + 1e-4 * step.tokens + 1e-3 * step.decodes + 1e-6 * step.context

    steps = [Step(1, n, n * n) for n in (8, 64, 256)]
    steps += [Step(decodes=b, context=b * c) for b in (1, 4, 8) for c in (16, 128)]
    steps += [Step(1, 64, 64**2, b, b * 128) for b in (1, 8)]
    return [(step, [seconds(step) * x for x in (0.9, 1.0, 1.3)]) for step in steps], seconds


def test_measured_steps_become_a_profile_and_back(tmp_path):
    measured, seconds = timed()
    file = steps_file(measured, model="m", device="d", origin={"how": "made up"})
    save_steps(file, tmp_path / "deep/steps.json")
    steps = load_steps(tmp_path / "deep/steps.json")
    for step, _ in measured:
        assert steps.seconds(step) == pytest.approx(seconds(step), rel=0.1)
    assert file.error["prefill_fit"] < 1e-6 and "mixed" in file.error


def test_what_is_missing_of_a_measurement_is_told(tmp_path):
    measured, _ = timed()
    with pytest.raises(ProfileError, match="two sizes or more"):
        steps_file(measured[3:], model="m", device="d", origin={})
    with pytest.raises(ProfileError, match="full grid; missing"):
        steps_file(measured[:-3], model="m", device="d", origin={})
    with pytest.raises(ProfileError, match="needs decodes of one batch and one context or more, got none"):
        steps_file([each for each in measured if not each[0].decodes], model="m", device="d", origin={})
    with pytest.raises(ProfileError, match="no step profile at"):
        load_steps(tmp_path / "none.json")
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(ProfileError, match=r"bad.json: .*Field required"):
        load_steps(tmp_path / "bad.json")


def test_a_sweep_over_promises_of_tokens_draws_its_figures(path, tmp_path):
    done = command(
        "sweep", path("opt_66b"), "--over", "slo.step_scale", "--values", "1.2,2", "--out", tmp_path / "out",
        "--set", "workload.requests=30", "-p", "fcfs", "-p", "priced",
    )  # fmt: skip
    assert done.status == 0 and "slo.step_scale" in done.out
    assert {"sweep.json", "goodput.png", "attainment.png"} <= {file.name for file in (tmp_path / "out").iterdir()}


def test_simulate_shows_both_views(path):
    done = command("simulate", path("opt_13b"), "--set", "workload.requests=40", "-p", "fcfs", "-p", "priced")
    assert done.status == 0 and "TTFT 3x solo" in done.out and "client met" in done.out
    assert max(len(line) for line in done.out.splitlines()) <= 80


def test_hindsight_is_for_language_models_too(path):
    done = command("simulate", path("opt_13b"), "--set", "workload.requests=10", "-p", "edf", "--hindsight", "1")
    assert done.status == 0 and "of hindsight" in " ".join(done.out.split())


def test_the_table_of_tokens_has_the_preemptions_of_the_report(path):
    some = prepared(path("opt_13b"), "llm.memory.tokens=3200", "workload.requests=60", "workload.rate=8")
    report = simulate(some, "fcfs")
    assert report.preemptions > 0
    table = tokens_table([{"policy": "fcfs", **report.to_dict()}])
    column = next(column for column in table.columns if column.header == "preempted")
    assert list(column.cells) == [str(report.preemptions)]
