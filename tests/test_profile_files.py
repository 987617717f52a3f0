"""Latency profiles as files: saved, loaded, and what is wrong with them."""

from __future__ import annotations

import json
import statistics

import pytest
from toys import toy, write_profile

from neustream import LinearProfile, ProfileError, SumProfile, load_profile
from neustream.config import load_experiment
from neustream.experiment import prepare
from neustream.profiling import Measurement, load_stage, save, versions
from neustream.profiling.files import add_costs, load_costs


def test_a_saved_profile_is_loaded_again(tmp_path):
    out = {"draw": [Measurement("draw", b, (0.1 * b, 0.2 * b, 0.4 * b)) for b in (1, 2, 4)]}
    [path] = save(out, tmp_path / "deep/er", model="toy", device="toy device", origin={"how": "by hand"})
    assert path == tmp_path / "deep/er/draw.json"
    profile = load_profile(path)
    assert (profile.name, profile.device, profile.max_batch) == ("draw", "toy device", 4)
    assert [profile.latency(b) for b in (1, 2, 3, 4)] == pytest.approx([0.2, 0.4, 0.6, 0.8])
    file = json.loads(path.read_text())
    assert file["format"] == "neustream.profile/1"
    assert file["model"] == "toy"
    assert file["latency_s"] == [statistics.median(m.seconds) for m in out["draw"]]
    assert file["p90_s"] == pytest.approx([0.36, 0.72, 1.44])
    assert file["spread"] == pytest.approx([0.75] * 3)
    assert file["origin"]["how"] == "by hand"
    assert file["origin"]["repeats"] == 3
    assert "median" in file["origin"]["statistic"]


@pytest.mark.parametrize(("seconds", "counts"), [((0.1, 0.11, 0.5), 0.11), ((0.1, 0.4, 0.5), 0.125), ((0.3,), 0.3)])
def test_steps_that_others_held_up_count_as_little_more_than_the_least(tmp_path, seconds, counts):
    measured, about = (
        {"draw": [Measurement("draw", 1, seconds)]},
        {"model": "toy", "device": "toy device", "origin": {}},
    )
    [path] = save(measured, tmp_path, **about, beside=True)
    assert load_profile(path).latency(1) == pytest.approx(counts)
    [path] = save(measured, tmp_path, **about)
    assert load_profile(path).latency(1) == pytest.approx(statistics.median(seconds))


@pytest.mark.parametrize("nothing", [[], [Measurement("x", 1, ())]])
def test_what_was_not_measured_is_not_written(tmp_path, nothing):
    measured = {"draw": [Measurement("draw", 1, (0.1,))], "x": nothing}
    with pytest.raises(ProfileError, match=r"^stage 'x': there is nothing to write"):
        save(measured, tmp_path / "out", model="toy", device="toy device", origin={})
    assert not (tmp_path / "out").exists()


def test_a_linear_profile_file(tmp_path):
    path = tmp_path / "decode.json"
    linear = {"base_s": 0.01, "per_job_s": 0.002, "per_size_s": 1e-5, "max_batch": 8}
    head = {"format": "neustream.profile/1", "kind": "linear", "stage": "decode", "device": "toy device", "origin": {}}
    path.write_text(json.dumps({**head, **linear}))
    profile = load_profile(path)
    assert isinstance(profile, LinearProfile)
    assert (profile.name, profile.device, profile.max_batch) == ("decode", "toy device", 8)
    assert profile.latency(4, 100.0) == pytest.approx(0.01 + 0.008 + 0.001)


def test_a_missing_profile_says_how_to_measure_one(tmp_path):
    with pytest.raises(ProfileError, match=r"no profile at .*draw.json; `neustream profile CONFIG --out DIR`"):
        load_profile(tmp_path / "draw.json")


def wrong(path):
    with pytest.raises(ProfileError) as error:
        load_profile(path)
    assert str(path) in str(error.value)
    return str(error.value)


def test_a_profile_that_is_not_json(tmp_path):
    path = tmp_path / "draw.json"
    path.write_text('{"format":')
    assert "Invalid JSON" in wrong(path)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"format": "neustream.profile/9"}, "format"),
        ({"latencies": [1]}, "latencies"),
        ({"batch": ["one", 2]}, "batch.0"),
        ({"latency_s": None}, "latency_s"),
        ({"device": 3}, "device"),
        ({"origin": "measured"}, "origin"),
    ],
)
def test_a_wrong_key_of_a_profile_is_named(tmp_path, change, named):
    path = write_profile(tmp_path / "draw.json", "draw", **{"batch": [1, 2], "latency_s": [0.1, 0.2], **change})
    assert named in wrong(path)


@pytest.mark.parametrize("missing", ["format", "device", "origin", "batch", "latency_s"])
def test_a_missing_key_of_a_profile_is_named(tmp_path, missing):
    path = write_profile(tmp_path / "draw.json", "draw", [1, 2], [0.1, 0.2])
    file = json.loads(path.read_text())
    del file[missing]
    path.write_text(json.dumps(file))
    assert missing in wrong(path)


@pytest.mark.parametrize(
    ("batch", "latency_s", "message"),
    [
        ([1, 2], [0.1], "equally long"),
        ([], [], "not empty"),
        ([2, 1], [0.1, 0.2], "must rise"),
        ([0, 1], [0.1, 0.2], "from 1 or more"),
        ([1, 2], [0.1, 0.0], "greater than 0, got 0.0"),
    ],
)
def test_an_impossible_table_is_an_error(tmp_path, batch, latency_s, message):
    path = write_profile(tmp_path / "draw.json", "draw", batch, latency_s)
    with pytest.raises(ProfileError, match=message):
        load_profile(path)


def test_a_stage_of_several_modules_adds_them_up(tmp_path):
    paths = [
        write_profile(tmp_path / "vae.json", "vae", [1, 2], [0.1, 0.2]),
        write_profile(tmp_path / "safety.json", "safety", [1, 2, 3], [0.01, 0.02, 0.03]),
    ]
    profile = load_stage("vae", paths)
    assert isinstance(profile, SumProfile)
    assert (profile.device, profile.max_batch) == ("toy device", 2)
    assert profile.latency(2) == pytest.approx(0.22)
    assert load_stage("vae", paths[:1]).latency(2) == 0.2


def test_a_stage_of_modules_of_different_devices_is_an_error(tmp_path):
    paths = [
        write_profile(tmp_path / "vae.json", "vae", [1], [0.1]),
        write_profile(tmp_path / "safety.json", "safety", [1], [0.1], device="another"),
    ]
    with pytest.raises(ProfileError, match=r"different devices: \['another', 'toy device'\]"):
        load_stage("vae", paths)


def test_a_pool_of_profiles_of_different_devices_is_an_error(tmp_path):
    path = toy(tmp_path)
    write_profile(tmp_path / "profiles/decode.json", "decode", [1, 2], [0.1, 0.2], device="another")
    with pytest.raises(ProfileError, match="pool 'gpu' mixes profiles of different devices"):
        prepare(load_experiment(path))


def test_pools_may_be_of_different_devices(tmp_path):
    stages = {"draw": {"times": "steps", "max_batch": 4}, "decode": {"max_batch": 2, "pool": "other"}}
    path = toy(tmp_path, stages=stages, pools={"gpu": {}, "other": {}})
    write_profile(tmp_path / "profiles/decode.json", "decode", [1, 2], [0.1, 0.2], device="another")
    profiles = prepare(load_experiment(path)).profiles
    assert {name: profile.device for name, profile in profiles.items()} == {"draw": "toy device", "decode": "another"}


def test_costs_that_are_added_leave_the_rest_of_a_file(tmp_path):
    path = write_profile(tmp_path / "draw.json", "draw", [1, 2], [0.1, 0.2])
    bare = json.loads(path.read_text())
    add_costs([path], {"there_s": [0.25, 0.5]})
    add_costs([path], {"back_s": [0.5], "latency_scale": 2.0})
    engine = json.loads(path.read_text()).pop("engine")
    assert {name: engine[name] for name in ("there_s", "back_s", "latency_scale", "decision_s")} == {
        "there_s": [0.25, 0.5],
        "back_s": [0.5],
        "latency_scale": 2.0,
        "decision_s": 0.0,
    }
    assert {name: value for name, value in json.loads(path.read_text()).items() if name != "engine"} == bare
    assert load_costs([path]).there_s == (0.25, 0.5) and load_profile(path).latency(2) == 0.2


def test_the_origin_names_the_libraries():
    assert {"python", "neustream", "numpy"} <= versions().keys()
