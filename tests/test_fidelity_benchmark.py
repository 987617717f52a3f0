"""benchmarks/fidelity.py: its points, what it keeps, and once for real on a toy."""

from __future__ import annotations

import importlib
import json
import shutil
import sys

import pytest
from toys import results, toy

from neustream.analysis.fidelity import Outcome


@pytest.fixture
def fidelity(root, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(root / "benchmarks")
    module = importlib.import_module("fidelity")
    monkeypatch.setattr(module, "ROOT", tmp_path)
    monkeypatch.setattr(module, "WORK", tmp_path / "out/fidelity")
    yield module
    del sys.modules["fidelity"]


def test_all_policies_at_all_loads_and_each_begins_in_turn(fidelity):
    model = fidelity.Model("m", "c", ("a", "b", "c"), (1.0, 2.0, 3.0, 4.0))
    points = fidelity.points(model, fidelity.arguments([]))
    assert len(set(points)) == 12 and {point.requests for point in points} == {100}
    assert ["".join(p.policy for p in points if p.load == load) for load in model.loads] == ["abc", "bca", "cab", "abc"]


def test_quick_is_a_part_of_it(fidelity):
    args = fidelity.arguments(["--quick", "--requests", "100"])
    for model in fidelity.MODELS:
        few, every = fidelity.points(model, args), fidelity.points(model, fidelity.arguments([]))
        assert set(few) < set(every) and len({point.load for point in few}) == 2 == len({p.policy for p in few})


def test_loads_policies_and_seeds_of_ones_own(fidelity):
    args = fidelity.arguments(["--loads", "0.7", "--policies", "edf", "serial", "--seed", "3", "--requests", "9"])
    points = fidelity.points(fidelity.MODELS[0], args)
    assert points == [fidelity.Point("dit", 0.7, policy, 3, 9) for policy in ("edf", "serial")]


def test_a_key_tells_points_and_profiles_apart(fidelity, tmp_path):
    point = fidelity.Point("dit", 1.0, "fcfs", 0, 9)
    others = [fidelity.Point("dit", 1.0, "fcfs", 1, 9), fidelity.Point("sd", 1.0, "fcfs", 0, 9)]
    assert len({point.key("a"), point.key("b"), *(other.key("a") for other in others)}) == 4
    (tmp_path / "one.json").write_text("1")
    first = fidelity.digest(tmp_path)
    assert fidelity.digest(tmp_path) == first
    (tmp_path / "one.json").write_text("2")
    assert fidelity.digest(tmp_path) != first


def test_a_line_that_was_cut_off_is_served_again(fidelity, tmp_path):
    line = json.dumps({"key": "a", "result": {"x": 1}})
    (tmp_path / "points.jsonl").write_text(f"\n{line}\n{line[:-5]}\n\n")
    assert fidelity.kept(tmp_path / "points.jsonl") == {"a": {"x": 1}}
    assert fidelity.kept(tmp_path / "nowhere.jsonl") == {}


def test_a_row_pairs_what_was_served_with_each_simulation(fidelity):
    simulated = {"profile": Outcome(0.9, 1.0, 2.0), "engine": Outcome(0.5, 2.0, 4.2)}
    row = fidelity.row_of(fidelity.Point("m", 1.0, "p", 0, 9), Outcome(0.5, 2.0, 4.0), {"decisions": 3}, simulated)
    assert row["error"]["profile"] == {"points": pytest.approx(-40), "p50": -0.5, "p99": -0.5}
    assert row["error"]["engine"] == {"points": 0, "p50": 0, "p99": pytest.approx(0.05)}
    assert row["explained_by"] == "engine" and row["load"] == 1.0 and row["seen"] == {"decisions": 3}
    assert fidelity.summary([row]) == (
        "by the profile, 0 of 1 points are close, the largest error is 40.0 points; "
        "of the device as it was, 1 of 1 points are close, the largest error is 0.0 points"
    )


@pytest.fixture
def served(fidelity, tmp_path, monkeypatch):
    """A toy that is served for real at a low load, with profiles that are there."""
    monkeypatch.setattr(fidelity, "MODELS", (fidelity.Model("toy", "toy", ("fcfs", "serial"), (0.2, 0.3)),))
    folder = tmp_path / "configs/demo"
    toy(folder, slo={"scale": 1000}, workload={"load": 1, "steps": 3})
    for load in ("0.2", "0.3"):
        shutil.copytree(folder / "profiles", tmp_path / "out/fidelity/profiles/toy-cpu" / load)
    return lambda *more: fidelity.main(
        ["--requests", "6", "--loads", "0.2", "--out", str(tmp_path / "results/f.json"), *more]
    )


def test_a_toy_is_served_and_simulated(served, tmp_path, capsys):
    served()
    said = capsys.readouterr().out
    assert "toy: served beside simulated" in said and "toy: what the runs did" in said and "of 2 points" in said
    found = results(tmp_path / "results/f.json")
    assert [(row["policy"], row["load"]) for row in found["rows"]] == [("fcfs", 0.2), ("serial", 0.2)]
    for row in found["rows"]:
        assert row["served"]["attainment"] == row["simulated"]["profile"]["attainment"] == 1.0
        assert set(row["simulated"]) == set(row["error"]) == {"profile", "speed", "steps", "engine"}
        assert set(row["seen"]["steps"]) == {"draw", "decode"} and row["seen"]["decisions"] > 0
    assert found["origin"]["toy"]["command"].startswith("OMP_NUM_THREADS=1 python benchmarks/fidelity.py --requests 6")
    assert "toy: served beside simulated" in (tmp_path / "results/f.md").read_text()


def test_what_was_served_is_not_served_again(served, fidelity, tmp_path, monkeypatch):
    served()
    before = results(tmp_path / "results/f.json")["rows"]
    serve = fidelity.serve_config

    def again(model, point, folder, device):
        assert point.policy == "edf", "only what is new"
        return serve(model, point, folder, device)

    monkeypatch.setattr(fidelity, "serve_config", again)
    served("--policies", "fcfs", "edf")
    after = results(tmp_path / "results/f.json")["rows"]
    assert [row["policy"] for row in after] == ["fcfs", "edf"] and after[0] == before[0]


def test_results_of_other_models_stay_and_quick_writes_none(served, tmp_path):
    out = tmp_path / "results/f.json"
    served("--quick")
    assert not out.exists()
    served()
    kept = json.loads(out.read_text())
    out.write_text(json.dumps({"origin": {"other": {}}, "rows": [{**kept["rows"][0], "model": "other"}]}))
    served()
    found = results(out)
    assert [row["model"] for row in found["rows"]] == ["other", "toy", "toy"] and set(found["origin"]) == {
        "other",
        "toy",
    }
    assert "other: served beside simulated" in (tmp_path / "results/f.md").read_text()


def test_vllm_is_skipped_by_name_where_it_is_not_installed(fidelity, monkeypatch, capsys):
    monkeypatch.setattr(fidelity, "find_spec", lambda name: None)
    fidelity.main(["--only", "vllm"])
    said = capsys.readouterr().out
    assert "vllm: skipped, since the package vllm is not installed here" in said
