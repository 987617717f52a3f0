"""Several models in one pool, sweeps, and backends of one's own."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from toys import Newest, Plain, adds_up, policy_in, toy, write_profile

from neustream import (
    POLICIES,
    BackendError,
    Clockwork,
    ConfigError,
    EventLog,
    NeuStream,
    Pool,
    ProfileError,
)
from neustream.backends.making import make_model
from neustream.backends.serving import Session
from neustream.config import load_experiment
from neustream.experiment import merge, prepare, simulate, sweep_points

# -- several models in one pool -------------------------------------------------------------------------

EVERY = [*POLICIES]
ONE = {"load": 1.2, "requests": 40, "steps": {"min": 1, "max": 4}, "cv": 2}
TWO = {"load": 0.9, "requests": 30, "steps": 6, "seed": 3}
ROUGH = {"latency_noise": 0.2, "handover_s": 0.0002, "latency_scale": 1.1}


def two(tmp_path, one={}, other={}):
    """A toy experiment, and another whose device is simulated otherwise."""
    for name in "ab":
        (tmp_path / name).mkdir(exist_ok=True)
    first = toy(tmp_path / "a", **{"slo": {"scale": 3}, "workload": ONE, **one})
    second = toy(tmp_path / "b", **{"slo": {"scale": 4}, "workload": TWO, "simulation": ROUGH, **other})
    return load_experiment(first), load_experiment(second)


def merged(tmp_path, one={}, other={}):
    first, second = two(tmp_path, one, other)
    return merge([prepare(first, prefix="a."), prepare(second, prefix="b.")])


def test_a_prefix_tells_stages_and_requests_apart(tmp_path):
    experiment, _ = two(tmp_path)
    plain, named = prepare(experiment), prepare(experiment, prefix="a.")
    assert list(named.graph.stages) == list(named.profiles) == ["a.draw", "a.decode"]
    assert named.pools == [Pool("gpu", ("a.draw", "a.decode"))]
    assert [request.id for request in named.requests] == [f"a.{request.id}" for request in plain.requests]
    assert [r.slo for r in named.requests] == [r.slo for r in plain.requests]
    assert [r.arrival for r in named.requests] == [r.arrival for r in plain.requests]
    assert experiment.stages.keys() == {"draw", "decode"}


def test_merged_requests_come_in_order_of_arrival_on_one_pool(tmp_path):
    both = merged(tmp_path)
    arrivals = [request.arrival for request in both.requests]
    assert arrivals == sorted(arrivals)
    assert len({request.id for request in both.requests}) == 70
    assert both.pools == [Pool("gpu", ("a.draw", "a.decode", "b.draw", "b.decode"))]
    assert both.profiles.keys() == {"a.draw", "a.decode", "b.draw", "b.decode"}
    assert [graph.name for graph in both.graphs] == ["a.toy", "b.toy"]


@pytest.mark.parametrize("policy", EVERY)
def test_every_policy_serves_two_models(tmp_path, policy):
    report = simulate(merged(tmp_path), policy).to_dict()
    assert report["counts"]["submitted"] == 70
    assert adds_up(report["counts"])
    assert report["batch_size"].keys() == {"a.draw", "a.decode", "b.draw", "b.decode"}


@pytest.mark.parametrize("policy", EVERY)
def test_a_model_alone_in_a_merged_pool_does_as_it_does_alone(tmp_path, policy):
    same = {"slo": {"scale": 3}}  # so that the merged policy is given the scale too
    both = merged(tmp_path, other=same)
    for at, (prefix, experiment) in enumerate(zip("ab", two(tmp_path, other=same), strict=True)):
        logs = [EventLog(), EventLog()]
        mine = [request for request in both.requests if request.graph is both.graphs[at]]
        simulate(prepare(experiment, prefix=f"{prefix}."), policy, [logs[0]])
        simulate(dataclasses.replace(both, requests=mine), policy, [logs[1]])
        assert logs[0].steps == logs[1].steps
        assert len(logs[0].steps) > 30


def test_models_of_one_seed_have_noise_of_their_own(tmp_path):
    load = {"arrivals": "constant", "rate": 1, "requests": 400, "steps": 1, "seed": 7}
    rough = {"workload": load, "simulation": {"latency_noise": 0.3}}
    both = merged(tmp_path, rough, {**rough, "slo": {"scale": 3}})
    drawn = {}
    for at, prefix in enumerate("ab"):
        log = EventLog()
        mine = [request for request in both.requests if request.graph is both.graphs[at]]
        simulate(dataclasses.replace(both, requests=mine), "serial", [log])
        drawn[prefix] = np.log([(step["end"] - step["start"]) / step["expected_s"] for step in log.steps])
    assert abs(np.corrcoef(drawn["a"], drawn["b"])[0, 1]) < 0.15


def test_a_merged_policy_has_what_all_agree_on(tmp_path):
    one = {"neustream": {"step_delta": 0.5, "margin_s": 0.1}, "clockwork": {"max_batch": 3}}
    other = {"neustream": {"step_delta": 0.5, "margin_s": 0.2}}
    both = merged(tmp_path, {"policies": one}, {"policies": other})
    assert policy_in(both.scheduler("neustream")) == NeuStream(slo_scale=None, step_delta=0.5)
    assert policy_in(both.scheduler("clockwork")) == Clockwork()
    alike = merged(tmp_path, {"policies": one}, {"policies": one, "slo": {"scale": 3}})
    assert policy_in(alike.scheduler("neustream")) == NeuStream(slo_scale=3.0, step_delta=0.5, margin_s=0.1)
    plans = [{"clockwork": {"plan": {"draw": ["decode"]}}}, {"clockwork": {"plan": {"decode": ["draw"]}}}]
    both = merged(tmp_path, {"policies": plans[0]}, {"policies": plans[1]})
    assert policy_in(both.scheduler("clockwork")).plan.keys() == {"a.draw", "b.decode"}


def test_a_merged_policy_of_ones_own(tmp_path):
    both = merged(tmp_path)
    assert policy_in(both.scheduler("toys:Newest")) == Newest()
    assert isinstance(policy_in(both.scheduler("toys:Plain")), Plain)
    differ = merged(tmp_path, {"policies": {"toys:Plain": {}}})
    with pytest.raises(ConfigError, match=r"policies\.toys:Plain: the merged experiments do not agree"):
        differ.scheduler("toys:Plain")


def test_a_parameter_that_must_be_given_and_differs_is_told_of_its_policy(tmp_path, monkeypatch):
    (tmp_path / "needy_rule.py").write_text(
        "from dataclasses import dataclass\nfrom toys import Plain\n\n\n"
        "@dataclass\nclass Needy(Plain):\n    most: int\n    least: int = 0\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    differ = merged(tmp_path, *({"policies": {"needy_rule:Needy": {"most": most}}} for most in (1, 2)))
    with pytest.raises(ConfigError, match=r"policies\.needy_rule:Needy: the merged .* do not agree .*'most'"):
        differ.scheduler("needy_rule:Needy")


def test_what_cannot_be_merged_is_told(tmp_path):
    first, second = two(tmp_path)
    with pytest.raises(ConfigError, match="two stages named 'draw': prepare the experiments to merge with prefixes"):
        merge([prepare(first), prepare(second)])
    twins = {"stages": {"sketch": {"profile": ["draw"]}}}
    _, other = two(tmp_path, other=twins)
    with pytest.raises(ConfigError, match="two requests named 'toy-0'"):
        merge([prepare(first), prepare(other)])
    _, wide = two(tmp_path, other={"pools": {"gpu": {"workers": 2}}})
    with pytest.raises(ConfigError, match=r"need one pool each, all alike; got .*'gpu', 1, False.*'gpu', 2, False"):
        merge([prepare(first, prefix="a."), prepare(wide, prefix="b.")])
    write_profile(tmp_path / "b/profiles/draw.json", "draw", [1], [0.1], device="another")
    write_profile(tmp_path / "b/profiles/decode.json", "decode", [1], [0.1], device="another")
    with pytest.raises(ProfileError, match="mixes profiles of different devices"):
        merge([prepare(first, prefix="a."), prepare(second, prefix="b.")])


# -- sweeps ---------------------------------------------------------------------------------------------


def test_the_points_of_a_sweep(tmp_path):
    experiment = load_experiment(toy(tmp_path, slo={"scale": 3}))
    for over in ("workload.rate", "workload.cv", "slo.scale"):
        section, _, key = over.partition(".")
        points = list(sweep_points(experiment, over, [1, 2.5]))
        assert [value for value, _ in points] == [1, 2.5]
        assert [getattr(getattr(variant, section), key) for _, variant in points] == [1, 2.5]
    load = load_experiment(toy(tmp_path, workload={"load": 1}))
    assert [variant.workload.load for _, variant in sweep_points(load, "workload.load", [3.0])] == [3.0]


@pytest.mark.parametrize(
    ("over", "message"),
    [
        ("workload.seed", "cannot sweep 'workload.seed'"),
        ("workload.speed", "cannot sweep workload.speed: config 'toy' does not use it"),
        ("workload.load", "cannot sweep workload.load: config 'toy' does not use it"),
        ("slo.scale", "cannot sweep slo.scale: config 'toy' does not use it"),
    ],
)
def test_what_a_config_does_not_use_cannot_be_swept(tmp_path, over, message):
    with pytest.raises(ConfigError) as error:
        list(sweep_points(load_experiment(toy(tmp_path)), over, [1.0]))
    assert message in str(error.value)


def test_a_trace_cannot_be_swept_over_its_rate(tmp_path):
    (tmp_path / "t.csv").write_text("arrival_s\n1\n")
    experiment = load_experiment(toy(tmp_path, workload={"trace": "t.csv"}))
    with pytest.raises(ConfigError, match="does not use it"):
        list(sweep_points(experiment, "workload.rate", [1.0]))
    assert [variant.workload.speed for _, variant in sweep_points(experiment, "workload.speed", [0.5, 2])] == [0.5, 2]


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan")])
def test_values_of_a_sweep_are_positive(tmp_path, value):
    with pytest.raises(ConfigError, match=r"cannot sweep workload\.rate: rate: Input should be"):
        list(sweep_points(load_experiment(toy(tmp_path)), "workload.rate", [1.0, value]))


# -- backends of ones own -------------------------------------------------------------------------------


def test_a_backend_of_ones_own(tmp_path):
    model = make_model(load_experiment(toy(tmp_path)), "cpu")
    assert model.backend.modules.keys() == {"draw", "decode"}
    assert model.params(3) == {"number": 3}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"backend": {"kind": "difusers"}}, "backend.kind 'difusers': did you mean 'diffusers'? allowed: "),
        ({"backend": {"kind": "toy_backend:made"}}, "backend 'toy_backend:made': module 'toy_backend' has no"),
        ({"backend": {"kind": "no_backend:make"}}, "backend 'no_backend:make': No module named 'no_backend'"),
        ({"backend": None}, "config 'toy' has no backend section, so it can only be simulated"),
    ],
)
def test_a_backend_that_is_not_there(tmp_path, change, message):
    with pytest.raises(ConfigError) as error:
        make_model(load_experiment(toy(tmp_path, **change)), "cpu")
    assert message in str(error.value)


@pytest.mark.parametrize(
    "change",
    [
        {"pools": {"gpu": {"workers": 3}}},
        {"pools": {"gpu": {}, "b": {}}, "stages": {"draw": {"times": "steps"}, "decode": {"pool": "b"}}},
    ],
)
def test_pools_are_of_simulations(tmp_path, change):
    with pytest.raises(ConfigError, match=r"real devices have one worker each, .* give `devices` for several"):
        Session(load_experiment(toy(tmp_path, **change)), "cpu")


def test_a_session_asks_the_backend_about_every_request(tmp_path):
    experiment = load_experiment(toy(tmp_path, backend={"kind": "toy_backend:make", "reject": 7}))
    with pytest.raises(BackendError, match="request 'toy-7': number must not be 7"):
        Session(experiment, "cpu")
