"""Configs: the shipped ones load, and every fault is told with its file, key and nearest valid key."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError
from toys import toy

from neustream import ConfigError
from neustream.config import experiments_of, load_config, load_experiment
from neustream.config.fields import Between, Choices
from neustream.experiment import pipeline_of, prepare
from neustream.experiment.policies import build_policy

CONFIGS = sorted((Path(__file__).parent.parent / "configs").rglob("*.yaml"))


def wrong(path, *overrides):
    """The message that `path` is refused with; it names the file."""
    with pytest.raises(ConfigError) as error:
        load_experiment(path, overrides)
    assert str(path) in str(error.value)
    return str(error.value)


# -- the shipped configs --------------------------------------------------------------------------------


def test_there_are_configs():
    assert len(CONFIGS) >= 7


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_shipped_config_loads_and_prepares(path):
    config = load_config(path)
    assert config.name == path.stem
    experiments, files = experiments_of(config), []
    for experiment in experiments:
        for policy in config.policies:
            build_policy(experiment, policy)
        files += pipeline_of(experiment).profile_files()
    assert files
    if path.parent.name != "paper" and not all(file.exists() for file in files):
        return  # a demo measures its own first
    prepared = prepare(config)
    assert len(prepared.requests) == sum(experiment.workload.requests for experiment in experiments)
    assert set(prepared.profiles) == {stage for pipeline in prepared.pipelines for stage in pipeline.stages}
    arrivals = [request.arrival for request in prepared.requests]
    assert arrivals == sorted(arrivals)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_the_sweeps_of_a_shipped_config_can_be_set(path):
    for over, sweep in load_config(path).sweeps.items():
        held = [f"{key}={value}" for key, value in sweep.at.items()]
        at = load_config(path, [f"{over}={sweep.values[0]}", *held])
        for part in over.split("."):
            at = at[part] if isinstance(at, dict) else getattr(at, part)
        assert at == sweep.values[0]


# -- what is wrong with a file --------------------------------------------------------------------------


def test_a_missing_file(tmp_path):
    assert "No such file or directory" in wrong(tmp_path / "nowhere.yaml")


def test_a_folder_is_no_config(tmp_path):
    assert "directory" in wrong(tmp_path)


@pytest.mark.parametrize(
    ("text", "kind"), [("- a\n- b\n", "list"), ("", "nothing"), ("just words\n", "str"), ("3\n", "int")]
)
def test_a_file_that_is_not_a_mapping(tmp_path, text, kind):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    assert f"expected a mapping at the top, got {kind}" in wrong(path)


def test_a_file_that_is_not_yaml(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("name: [unclosed\n")
    assert "line 2" in wrong(path)


@pytest.mark.parametrize(
    ("before", "after", "key"),
    [
        ("name: toy", "name: toy\nname: other", "name"),
        ("slo:\n", "slo:\n  total_s: 5\n", "total_s"),
        ("stages:\n", "stages:\n  decode: {}\n", "decode"),
    ],
)
def test_a_key_given_twice(tmp_path, before, after, key):
    path = toy(tmp_path)
    text = path.read_text()
    assert before in text
    path.write_text(text.replace(before, after, 1))
    assert f"key {key!r} is given twice" in wrong(path)


UNKNOWN = [
    ("polices", "polices", "policies"),
    ("workload.ratee", "workload.ratee", "rate"),
    ("workload.sede", "workload.sede", "seed"),
    ("slo.total", "slo.total", "total_s"),
    ("simulation.overhead_s", "simulation.overhead_s", "handover_s"),
    ("stages.draw.max_bach", "stages.draw.max_bach", "max_batch"),
    ("stages.draw.time", "stages.draw.time", "times"),
    ("pools.gpu.worker", "pools.gpu.worker", "workers"),
    ("workload.steps.maxx", "workload.steps.maxx", "max"),
]


@pytest.mark.parametrize(("override", "key", "meant"), UNKNOWN, ids=[key for _, key, _ in UNKNOWN])
def test_an_unknown_key_names_the_nearest(tmp_path, override, key, meant):
    message = wrong(toy(tmp_path, pools={"gpu": {"workers": 1}}), f"{override}=1")
    assert f"unknown key {key!r}; did you mean {meant!r}? allowed: " in message


def test_an_unknown_key_of_a_sweep_or_a_class(tmp_path):
    sweeps = {"slo.scale": {"value": [1], "values": [1]}}
    message = wrong(toy(tmp_path, sweeps=sweeps))
    assert "unknown key 'sweeps.slo.scale.value'; did you mean 'values'? allowed: at, values" in message
    classes = [{"scale": 2}, {"scale": 2, "wieght": 3}]
    message = wrong(toy(tmp_path, slo={"classes": classes}))
    assert "unknown key 'slo.classes.1.wieght'; did you mean 'weight'?" in message


def test_an_unknown_key_like_no_other_lists_what_is_allowed(tmp_path):
    message = wrong(toy(tmp_path), "workload.xyzzy=1")
    assert (
        "unknown key 'workload.xyzzy'; allowed: arrivals, burst, columns, cv, duration_s, format, load, "
        "rate, requests, seed, speed, start_s, steps, tokenizer, trace" in message
    )


VALUES = [
    ("workload.rate=fast", "workload.rate", "'fast'"),
    ("workload.rate=0", "workload.rate: Input should be greater than or equal to 0.000001", "got 0"),
    ("workload.rate=-1", "workload.rate: Input should be greater than or equal to 0.000001", "got -1"),
    ("workload.cv=0", "workload.cv", "got 0"),
    ("workload.requests=0", "workload.requests", "got 0"),
    ("workload.requests=2.5", "workload.requests", "got 2.5"),
    ("workload.seed=-1", "workload.seed", "got -1"),
    ("workload.seed=4294967296", "workload.seed", "got 4294967296"),
    ("workload.arrivals=poisson", "workload.arrivals: Input should be 'gamma', 'constant' or 'trace'", "'poisson'"),
    ("workload.steps=-1", "workload.steps: Input should be greater than or equal to 0", "got -1"),
    ("workload.steps=many", "workload.steps", "got 'many'"),
    ("workload.steps=[1, 2]", "workload.steps", "got [1, 2]"),
    ("workload.steps={min: 5, max: 2}", "workload.steps: min 5 is larger than max 2", ""),
    ("workload.steps={min: -1, max: 2}", "workload.steps.min", "got -1"),
    ("workload.steps={min: 1}", "key 'workload.steps.max' is needed", ""),
    ("workload.steps={choices: []}", "workload.steps.choices", "got []"),
    ("workload.steps={choices: [a]}", "workload.steps.choices.0", "got 'a'"),
    ("workload=3", "workload", "got 3"),
    ("workload.arrivals=trace", "workload: arrivals: trace needs a trace: FILE", ""),
    ("workload.speed=2", "workload: speed needs a trace: FILE", ""),
    ("workload={trace: x.csv, speed: 0}", "workload.speed", "got 0"),
    (
        "workload={trace: x.csv, rate: 2, cv: 3}",
        "a trace brings its arrivals: rate, cv do not go with it; drop it",
        "--set workload.rate=null --set workload.cv=null",
    ),
    ("slo.total_s=0", "slo.total_s", "got 0"),
    ("slo.scale=2", "slo: give scale or total_s, not both", ""),
    ("slo={classes: []}", "slo.classes", "got []"),
    ("slo={classes: [{scale: 1, total_s: 1}]}", "slo.classes.0: give scale or total_s, not both", ""),
    ("slo.extra_s=-1", "slo.extra_s", "got -1"),
    ("simulation.latency_scale=0", "simulation.latency_scale", "got 0"),
    ("simulation.latency_noise=-0.1", "simulation.latency_noise", "got -0.1"),
    ("simulation.slowdowns=3", "simulation.slowdowns", "got 3"),
    ("simulation.slowdowns=[{start_s: 1, duration_s: 0, factor: 2}]", "simulation.slowdowns.0.duration_s", "got 0"),
    ("simulation.slowdowns=[{start_s: -1, duration_s: 1, factor: 2}]", "simulation.slowdowns.0.start_s", "got -1"),
    ("simulation.slowdowns=[{start_s: 1, duration_s: 1}]", "key 'simulation.slowdowns.0.factor' is needed", ""),
    ("workload.burst={after: 1, requests: 1, factor: 0}", "workload.burst.factor", "got 0"),
    ("workload.burst={after: -1, requests: 1, factor: 2}", "workload.burst.after", "got -1"),
    ("workload.burst={after: 1, requests: 0, factor: 2}", "workload.burst.requests", "got 0"),
    ("workload.burst={after: 1, factor: 2}", "key 'workload.burst.requests' is needed", ""),
    ("workload.burst={after: 10, requests: 1, factor: 2}", "burst: none comes after 10 of 10 requests", ""),
    ("stages.draw.max_batch=0", "stages.draw.max_batch", "got 0"),
    ("stages.draw.profile=draw", "stages.draw.profile", "got 'draw'"),
    (
        "stages={}",
        "give stages (a pipeline), llm (a language model), agent (calls) or models (several of them)",
        "",
    ),
    ("stages.draw.pool=gpuu", "stage 'draw': unknown pool 'gpuu'; did you mean 'gpu'? allowed: gpu", ""),
    ("pools={gpu: {}, spare: {}}", "pools without a stage: ['spare']", ""),
    ("pools={gpu: {workers: 0}}", "pools.gpu.workers", "got 0"),
    ("sweeps={workload.rat: {values: [1]}}", "cannot sweep 'workload.rat'; did you mean 'workload.rate'?", ""),
    ("sweeps={slo.scale: {values: []}}", "sweeps.slo.scale.values", "got []"),
    ("sweeps={slo.scale: {values: [0]}}", "sweeps.slo.scale.values.0", "got 0"),
    ("policies={fcfs: 3}", "policies.fcfs", "got 3"),
    ("profiles=3", "profiles", "got 3"),
    ("name=[1]", "name", "got [1]"),
    ("backend={}", "key 'backend.kind' is needed", ""),
    ("backend.check_finite=perhaps", "backend.check_finite", "got 'perhaps'"),
]


@pytest.mark.parametrize(("override", "key", "value"), VALUES, ids=[override for override, _, _ in VALUES])
def test_an_impossible_value_is_told_with_its_key(tmp_path, override, key, value):
    message = wrong(toy(tmp_path), override)
    assert key in message
    assert value in message


def test_load_takes_the_place_of_rate(tmp_path):
    path = toy(tmp_path)
    assert "workload: load takes the place of rate" in wrong(path, "workload.load=2")
    alone = toy(tmp_path, workload={"load": 2})
    assert load_experiment(alone).workload.load == 2
    assert "workload: load takes the place of rate" in wrong(alone, "workload.rate=1")


def test_load_does_not_go_with_a_trace(tmp_path):
    load = {"trace": "x.csv", "load": 2}
    assert "a trace brings its arrivals: load do not go with it; drop it: --set workload.load=null" in wrong(
        toy(tmp_path, workload=load)
    )


def test_a_burst_does_not_go_with_a_trace(tmp_path):
    load = {"trace": "x.csv", "burst": {"after": 0, "requests": 1, "factor": 2}}
    assert "a trace brings its arrivals: burst do not go with it; drop it: --set workload.burst=null" in wrong(
        toy(tmp_path, workload=load)
    )


def test_an_unknown_key_of_a_burst_or_a_slowdown(tmp_path):
    message = wrong(toy(tmp_path), "workload.burst={after: 1, requests: 1, factor: 2, factr: 3}")
    assert "unknown key 'workload.burst.factr'; did you mean 'factor'? allowed: after, factor, requests" in message
    slow = {"start_s": 1, "duration_s": 1, "factor": 2, "faktor": 3}
    message = wrong(toy(tmp_path, simulation={"slowdowns": [slow]}))
    assert "unknown key 'simulation.slowdowns.0.faktor'; did you mean 'factor'?" in message


@pytest.mark.parametrize("key", ["name", "profiles"])
def test_a_missing_key(tmp_path, key):
    path = toy(tmp_path)
    raw = yaml.safe_load(path.read_text())
    del raw[key]
    path.write_text(yaml.safe_dump(raw))
    assert f"key {key!r} is needed" in wrong(path)


def test_several_faults_are_told_together(tmp_path):
    message = wrong(toy(tmp_path), "workload.rate=-1", "slo.extra_s=-1", "stages.draw.max_batch=0")
    assert all(key in message for key in ("workload.rate", "slo.extra_s", "stages.draw.max_batch"))


# -- what a file may leave out --------------------------------------------------------------------------


def test_a_minimal_config(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("{name: least, profiles: p, stages: {draw: {}}, slo: {scale: 3}}")
    experiment = load_experiment(path)
    assert list(experiment.pools) == ["gpu"]
    assert list(experiment.policies) == ["default"]
    assert (experiment.workload.arrivals, experiment.workload.requests, experiment.workload.seed) == ("gamma", 500, 0)
    assert experiment.backend is None
    assert experiment.stages["draw"].max_batch == 1


def test_steps_are_what_they_look_like(tmp_path):
    path = toy(tmp_path)
    assert load_experiment(path, ["workload.steps=4"]).workload.steps == 4
    assert load_experiment(path).workload.steps == Between(min=1, max=4)
    assert load_experiment(path, ["workload.steps={choices: [1, 2]}"]).workload.steps == Choices(choices=[1, 2])


def test_options_of_a_backend_are_its_own(tmp_path):
    path = toy(tmp_path, backend={"kind": "toy_backend:make", "anything": {"goes": [1]}, "check_finite": True})
    backend = load_experiment(path).backend
    assert backend.options == {"anything": {"goes": [1]}}
    assert backend.check_finite


def test_a_config_cannot_be_changed(tmp_path):
    experiment = load_experiment(toy(tmp_path))
    with pytest.raises(ValidationError, match="frozen"):
        experiment.name = "other"


# -- overrides ------------------------------------------------------------------------------------------


def test_overrides_are_yaml_and_the_last_one_counts(tmp_path):
    experiment = load_experiment(
        toy(tmp_path),
        [
            "workload.rate=4",
            "workload.rate=8.5",
            "workload.steps={min: 2, max: 3}",
            "about=a = b",
            "policies.serial={}",
            "policies.clockwork.max_batch=7",
            "simulation.handover_s=1e-3",
        ],
    )
    assert experiment.workload.rate == 8.5
    assert experiment.workload.steps == Between(min=2, max=3)
    assert experiment.about == "a = b"
    assert experiment.policies == {"fcfs": {}, "serial": {}, "clockwork": {"max_batch": 7}}
    assert experiment.simulation.handover_s == 0.001


def test_an_override_leaves_its_neighbours(tmp_path):
    path = toy(tmp_path)
    before, after = load_experiment(path), load_experiment(path, ["workload.cv=3"])
    assert after.workload == before.workload.model_copy(update={"cv": 3.0})
    assert after.stages == before.stages


@pytest.mark.parametrize("override", ["workload.rate", "", "=4", "workload.rate:4"])
def test_an_override_needs_a_key_and_a_value(tmp_path, override):
    with pytest.raises(ConfigError) as error:
        load_experiment(toy(tmp_path), [override])
    assert str(error.value) == f"--set {override!r}: expected dotted.key=value"


@pytest.mark.parametrize(("override", "part"), [("name.first=x", "name"), ("workload.rate.max=3", "rate")])
def test_an_override_of_what_is_no_section(tmp_path, override, part):
    with pytest.raises(ConfigError) as error:
        load_experiment(toy(tmp_path), [override])
    assert f"{part!r} is not a section" in str(error.value)
    assert override.partition("=")[0] in str(error.value)


def test_paths_of_a_file_are_relative_to_it_and_those_of_overrides_to_the_working_directory(tmp_path, monkeypatch):
    (tmp_path / "a/b").mkdir(parents=True)
    path = toy(tmp_path / "a", profiles="../p", workload={"trace": "b/t.csv", "tokenizer": "tokenizer.json"})
    monkeypatch.chdir(tmp_path / "a/b")
    assert load_experiment(path).profiles.resolve() == tmp_path / "p"
    assert load_experiment(path).workload.trace == tmp_path / "a/b/t.csv"
    assert load_experiment(path).workload.tokenizer == tmp_path / "a/tokenizer.json"
    assert load_experiment(Path("../toy.yaml")).profiles.resolve() == tmp_path / "p"
    overridden = load_experiment(path, ["profiles=here", "workload.trace=t.csv"])
    assert overridden.profiles == tmp_path / "a/b/here"
    assert overridden.workload.trace == tmp_path / "a/b/t.csv"
    assert load_experiment(path, [f"profiles={tmp_path}/abs"]).profiles == tmp_path / "abs"
