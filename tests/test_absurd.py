"""Sizes and values that no experiment has: an error of one line, or a result, but never anything else."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from toys import command, toy

from neustream import NeustreamError
from neustream.config import load_experiment
from neustream.config.messages import keys_at
from neustream.config.schema import KINDS
from neustream.experiment import prepare
from neustream.experiment.policies import build_policy

LLM = Path(__file__).parent.parent / "configs/paper/opt_13b_a6000.yaml"

SIZES = [
    "workload.requests=1000000000000",
    "workload.requests=1e12",
    "workload.steps=1" + "0" * 30,
    "workload.steps={min: 1, max: 1000000000000}",
    "workload.steps={choices: [1, 1000000000000]}",
    "workload={requests: 10000000, steps: 1000000}",
    "pools={gpu: {workers: 1000000}}",
    "stages.draw.max_batch=1000000000000",
    "workload.rate=1e308",
    "workload.rate=1e-308",
    "workload={load: 1e308}",
    "workload.cv=1e-300",
    "workload.cv=1e308",
    "workload.burst={after: 1, requests: 1, factor: 1e308}",
    "workload.burst={after: 1, requests: 1000000000000, factor: 2}",
    "slo={scale: 1e308}",
    "slo={total_s: 1e308}",
    "slo={total_s: 1e-300}",
    "slo={scale: 3, extra_s: 1e308}",
    "slo={classes: [{share: 1e308}, {share: 1e308}]}",
    "slo={classes: [{weight: 1e308}, {weight: 1e-300}]}",
    "simulation.handover_s=1e308",
    "simulation.latency_scale=1e308",
    "simulation.latency_noise=1e308",
    "simulation.slowdowns=[{start_s: 0, duration_s: 1e308, factor: 2}]",
    "simulation.slowdowns=[{start_s: 0, duration_s: 1, factor: 1e308}]",
    "workload.seed=1" + "0" * 30,
    "workload.rate=1e400",
    "workload.rate=.nan",
    "workload.rate=" + "9" * 5000,
    "workload.rate=" + "[" * 2000,
    "policies.fcfs.max_batch=1" + "0" * 30,
    "about=" + "x" * 100_000 + ": [",
]


@pytest.mark.parametrize("setting", SIZES, ids=[setting[:40] for setting in SIZES])
def test_an_absurd_size_is_one_line(tmp_path, setting):
    done = command("simulate", toy(tmp_path), "--set", setting)
    assert done.status == 2 and done.out == ""
    assert done.err.count("\n") == 1 and len(done.err) < 600 + len(str(tmp_path))


LLM_SIZES = [
    "workload.prompt=1000000000000",
    "workload.output={median: 1e308, sigma: 1}",
    "workload.max_tokens=1000000000000",
    "workload.prompt={median: 5, sigma: 1e308}",
    "workload={requests: 10000000, output: 1000, max_tokens: 1000}",
    "llm.max_batch=1000000000000",
    "llm.memory={tokens: 1e30}",
    "llm.memory={tokens: 100, block: 1000000000000}",
    "llm.step_tokens=1e30",
    "slo={first_s: 1e308, step_s: 1e308}",
]


@pytest.mark.parametrize("setting", LLM_SIZES)
def test_an_absurd_size_of_a_language_model_is_one_line(setting):
    with pytest.raises(NeustreamError) as error:
        prepare(load_experiment(LLM, [setting]))
    assert len(str(error.value)) < 400


@pytest.mark.parametrize(
    "profile",
    [
        {"batch": [1, 10**12], "latency_s": [0.1, 0.2]},
        {"batch": [1, 2], "latency_s": [1e308, 1e308]},
        {"batch": [1, 2], "latency_s": [0.1, float("inf")]},
        {"batch": ["9" * 5000], "latency_s": [0.1]},
        {"batch": [1], "latency_s": [0.1], "device": "x" * 5000},
        {"batch": [1], "latency_s": [0.1], "kind": "x" * 5000},
        {"batch": [1], "latency_s": [0.1], "stage": []},
    ],
    ids=range(7),
)
def test_an_absurd_profile_is_one_line(tmp_path, profile):
    path = toy(tmp_path)
    file = tmp_path / "profiles/draw.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **profile}))
    done = command("simulate", path)
    assert done.status == 2 and "draw.json" in done.err
    assert done.err.count("\n") == 1 and len(done.err) < 600 + len(str(tmp_path))


@pytest.mark.parametrize("text", ["", "[", "[" * 100_000, '{"a":' * 50_000, "9" * 5000, "\0", "null", '"\\ud800"'])
def test_a_profile_that_is_no_profile_is_one_line(tmp_path, text):
    path = toy(tmp_path)
    (tmp_path / "profiles/draw.json").write_text(text)
    done = command("simulate", path)
    assert done.status == 2 and "draw.json" in done.err and done.err.count("\n") == 1


@pytest.mark.parametrize(
    "arguments",
    [
        ["--repeats", "1000000000000"],
        ["--warmup", "1000000000000"],
        ["--warmup", "-1"],
        ["--seconds", "1e308"],
        ["--seconds", "nan"],
        ["--size", "1000000x1000000"],
        ["--size", "9" * 5000 + "x1"],
        ["--size", "x"],
        ["--size", "0x0"],
        ["--size", "²x²"],
    ],
)
def test_an_absurd_option_of_profile(tmp_path, arguments):
    done = command("profile", toy(tmp_path), "--out", tmp_path / "out", *arguments)
    assert done.status == 2 and arguments[0] in done.err and "Traceback" not in done.err


@pytest.mark.parametrize("seconds", ["nan", "inf", "0", "-1", "1e308", "x"])
def test_an_absurd_option_of_simulate(tmp_path, seconds):
    done = command("simulate", toy(tmp_path), "--hindsight", seconds)
    assert done.status == 2 and "--hindsight" in done.err and "Traceback" not in done.err


# -- at random, but the same each time ------------------------------------------------------------------

SECTIONS = (
    (),
    ("workload",),
    ("slo",),
    ("simulation",),
    ("stages", "draw"),
    ("pools", "gpu"),
    ("llm",),
    ("llm", "memory"),
)
KEYS = sorted({".".join((*section, key)) for section in SECTIONS for kind in KINDS for key in keys_at(kind, section)})
NUMBERS = [0, 1, -1, 3, 0.5, 1e-9, 1e9, 1e308, -1e308, 5e-324, 10**12, 10**30, float("inf"), float("nan"), True, None]
TEXTS = ["", " ", "x", "1e3", "nan", "9" * 5000, "x" * 5000, "é\n\u2028", "../..", "/dev/zero", "a:b", "gamma", "trace"]
VALUES = st.recursive(
    st.sampled_from([*NUMBERS, *TEXTS]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                ["min", "max", "choices", "median", "sigma", "scale", "total_s", "share", "factor", "kind", ""]
            ),
            inner,
            max_size=3,
        )
    ),
    max_leaves=4,
)
CONFIG = st.dictionaries(st.sampled_from(KEYS), VALUES, min_size=1, max_size=3)


@settings(
    max_examples=250,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(values=CONFIG, llm=st.booleans())
def test_any_value_at_any_key_is_an_error_of_one_line_or_works(tmp_path, values, llm):
    path = LLM if llm else toy(tmp_path)
    few = [] if "workload" in values or "workload.requests" in values else ["workload.requests=5"]
    overrides = [*few, *(f"{key}={json.dumps(value)}" for key, value in values.items())]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            experiment = load_experiment(path, overrides)
            for policy in experiment.policies:
                build_policy(experiment, policy)
            prepare(experiment)
        except NeustreamError as error:
            text = str(error)
            assert text and "\n" not in text and len(text) < 1200


@settings(
    max_examples=250,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(text=st.text(st.sampled_from("abw.=:[]{}&*!|>%@`\"'-?,# \n\t0159eE+<~"), max_size=30))
def test_any_override_is_an_error_of_one_line_or_works(tmp_path, text):
    try:
        load_experiment(toy(tmp_path), [text])
    except NeustreamError as error:
        assert "\n" not in " ".join(str(error).split()) and len(str(error)) < 1200
