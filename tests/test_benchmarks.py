"""The pure parts of benchmarks/policies.py; benchmarks/diffusion.py once, with next to nothing to do."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
import warnings

import pytest

from neustream.analysis.headroom import true_profiles
from neustream.config import load_experiment
from neustream.core.policies.token_deadlines import TokenDeadlines
from neustream.experiment import pipeline_of


@pytest.fixture(scope="module")
def policies(root):
    spec = importlib.util.spec_from_file_location("benchmark_policies", root / "benchmarks/policies.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look up their annotations
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.fixture
def setting(root):
    return load_experiment(root / "configs/paper/sd15_256_rtx4090.yaml")


def row(policies, on_time, **given):
    about = {"group": policies.LOAD, "config": "c", "seed": 0, "condition": {"load": 1.0}, "requests": 100.0}
    return policies.Row(**{**about, "on_time": on_time, "bound": None, "hindsight": None, "shares": {}, **given})


def test_at_capacity_batches_of_the_best_size_fill_the_device(policies, setting):
    profiles, overhead = pipeline_of(setting).load_profiles(), setting.simulation.handover_s or 0.0
    busy = 0.0
    for name, calls in {"clip": 1, "unet": 40, "vae": 1}.items():
        sizes = range(1, min(setting.stages[name].max_batch, profiles[name].max_batch) + 1)
        busy += policies.capacity(setting) * calls * min((profiles[name].latency(b) + overhead) / b for b in sizes)
    assert busy == pytest.approx(1)


def test_a_point_is_contended_by_its_bound_or_by_what_baselines_leave(policies):
    assert not row(policies, {"edf": 99}).contended
    assert row(policies, {"edf": 98}).contended
    assert not row(policies, {"edf": 99}, bound=99.0).contended
    assert row(policies, {"edf": 98}, bound=98.0).contended
    assert row(policies, {"edf": 97}, bound=100.0).contended


def test_ours_is_no_baseline_and_a_bound_is_not_to_be_exceeded(policies):
    one = row(policies, {"edf": 90, policies.OURS: 99}, bound=95.0)
    assert one.best == 90
    assert one.beaten("edf") is False and one.impossible
    other = row(policies, {"edf": 90, "fcfs": 88.5, policies.OURS: 89}, bound=95.0)
    assert [other.beaten(policy) for policy in other.on_time] == [False, True, False] and not other.impossible


def test_a_device_slower_than_its_profile_makes_steps_longer_and_leaves_promises(policies, setting):
    simulations = {}
    for point in policies.disturbed(setting, [1.0]):
        simulations.setdefault(point.group, []).append(point.experiments[0].simulation)
    assert [s.latency_scale for s in simulations[policies.ERROR]] == [1.1, 1 / 1.1]
    assert [s.latency_noise for s in simulations[policies.NOISE]] == [0.05, 0.15]
    ((slow,),) = (s.slowdowns for s in simulations[policies.SLOW])
    assert (slow.duration_s, slow.factor) == (10, 1.5) and 100 < slow.start_s < 400  # of about 500 s
    plain, slower = (next(policies.disturbed(setting, [1.0])) for _ in range(2))
    slower = policies.changed(slower.experiments[0], {"simulation.latency_scale": 1.1, "simulation.latency_noise": 0.0})
    prepared = policies.prepare(slower)
    seconds = true_profiles(prepared)["unet"].latency(1)
    assert seconds == pytest.approx(1.1 * prepared.profiles["unet"].latency(1) + 0.0005)
    assert not plain.bounded  # noise


def test_keys_follow_what_results_depend_on(policies, setting):
    def keys(experiment):
        point = policies.Point(policies.LOAD, {"load": 1.0}, 0, (experiment,))
        return policies.keys(point, ["fcfs", "neustream", "priced"])

    before = keys(setting)
    assert keys(setting) == before and len(set(before.values())) == 5
    other = setting.model_copy(update={"policies": {**setting.policies, "neustream": {"step_delta": 0.5}}})
    assert {name for name, key in keys(other).items() if key != before[name]} == {"neustream"}
    assert not set(keys(policies.changed(setting, {"workload.seed": 1})).values()) & set(before.values())


def test_parameters_of_a_rule_inside_a_rule_are_told_apart(policies):
    tokens = [TokenDeadlines(), TokenDeadlines(margin=0.1), TokenDeadlines()]
    first, other, again = [policies.digest({"tokens": rule}) for rule in tokens]
    assert first == again != other


def test_code_is_told_apart_by_what_it_does_and_imports(policies, tmp_path, monkeypatch):
    monkeypatch.setattr(policies, "ROOT", tmp_path)
    folder = tmp_path / "neustream"
    folder.mkdir()

    def written(rule, order):
        (folder / "rule.py").write_text(rule)
        (folder / "order.py").write_text(order)
        policies.parsed.cache_clear()
        policies.code.cache_clear()
        return policies.code("neustream.rule")

    rule = "from neustream.order import by\n"
    before = written(rule, "by = 1\n")
    assert written('"""Says more."""\n\n' + rule + "# aside\n", "by = 1\n") == before
    assert written(rule, "by = 2\n") != before


def test_a_line_cut_off_is_no_result(policies, tmp_path):
    path = tmp_path / "work.jsonl"
    assert policies.known_results(path) == {}
    line = json.dumps({"key": "a", "result": {"value": 1.0}})
    path.write_text(f"{line}\n{line[:-9]}\n\n{line.replace('a', 'b', 1)[:5]}")
    assert policies.known_results(path) == {"a": {"value": 1.0}}


def test_quick_is_a_subset_of_all_points(policies):
    every, few = (
        {(p.group, p.config, p.seed, str(p.condition)) for p in policies.all_points(q)} for q in (False, True)
    )
    assert few < every and {group for group, *_ in few} == set(policies.GROUPS) - {policies.SEEDS}


def test_tables_and_the_points_where_ours_is_beaten(policies):
    shares = {name: {"classes": {"1.2": [1, 4], "5": [3, 4]}, "steps": [[4, 8]]} for name in ("edf", policies.OURS)}
    plain = {"group": policies.ARTIFACT, "condition": {"workload.rate": 1.0}}
    noisy = {"group": policies.NOISE, "condition": {"workload.rate": 1.0, "noise": 0.05}}
    rows = [
        row(policies, {"edf": 80, policies.OURS: 90}, bound=100.0, **plain),
        row(policies, {"edf": 60, policies.OURS: 45}, **noisy),
        row(policies, {"edf": 10, policies.OURS: 20}, group=policies.MIX, shares=shares),
    ]
    assert policies.beaten_table(rows)[1:] == [
        [policies.NOISE, "c", "workload.rate 1, noise 0.05", "0", "45 of 100", "edf +15"]
    ]
    assert policies.cliff(rows)[1:] == [["`edf`", "0.750 (0.750)"], [f"`{policies.OURS}`", "0.500 (0.500)"]]
    assert policies.fairness(rows, policies.classes)[:2] == [["", "1.2", "5"], ["`edf`", "0.25", "0.75"]]
    assert f"| `{policies.OURS}` | 0.900 | 0.900 | - | - |" in policies.markdown(rows, "command")


@pytest.fixture(scope="module")
def diffusion(root):
    with pytest.MonkeyPatch.context() as patched, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # diffusers' own imports
        pytest.importorskip("diffusers", reason="needs the extra 'diffusion'")
        patched.syspath_prepend(root / "benchmarks")
        names = ("diffusion", "diffusion_ways", "diffusion_models")
        yield importlib.import_module(names[0])
        for name in names:
            del sys.modules[name]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # numpy 2's about how diffusers calls it
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_pipeline_is_served_in_all_ways_with_stocks_images(diffusion, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(diffusion, "ROOT", tmp_path)
    monkeypatch.setattr(diffusion, "BURST", 6)
    few = "--steps 2,3 --guidance 1,3 --policies fcfs,priced --max-batch 4 --rounds 1 --pairs 1 --lone-steps 2"
    load = (
        f"--requests 4 --rates 0.2 --slo-scale 50 --measure-s 0.5 --out-profiles {tmp_path}/p --out {tmp_path}/o.json"
    )
    diffusion.main(f"--pipeline sd_tiny {few} {load}".split())
    assert "6 requests at once" in capsys.readouterr().out
    assert (tmp_path / "out/diffusion-sd_tiny-cpu.png").exists()
    assert {path.name.partition("@")[0] for path in (tmp_path / "p").iterdir()} == {"encode", "denoise", "decode"}
    found = json.loads((tmp_path / "o.json").read_text())
    ways = [diffusion.STOCK, diffusion.BATCHED, diffusion.BARE, diffusion.ALONE, "ours, fcfs", "ours, priced"]
    assert [line["way"] for line in found["burst"]] == ways
    assert all(line["error"] < 1e-5 for line in found["burst"] if line["way"] != diffusion.ALONE)
    lines = {line["way"]: line for line in found["load"]["lines"]}
    assert set(lines) == set(ways) - {diffusion.BARE, diffusion.ALONE}
    assert lines["ours, fcfs"]["on_time"] == lines["ours, fcfs"]["simulated"]["on_time"] == 4


def test_goodput_counts_images_in_time_over_the_span_of_the_arrivals(diffusion):
    asks = [diffusion.Ask(8, 3.0, seed=at, arrival=at + 1.0, slo=2.0) for at in range(4)]
    found = diffusion.outcome(asks, [2.0, 4.5, 5.0, None])
    assert (found["on_time"], found["goodput_rps"], found["attainment"]) == (2, 0.5, 0.5)
    assert found["latency_s"]["p50"] == 2.0 and found["images_s"] == 3 / 5


def test_without_a_gpu_or_vllm_omni_the_benchmark_says_so(diffusion, root, tmp_path):
    with pytest.raises(diffusion.BackendError, match="vllm-omni"):
        diffusion.main(["--against", "vllm-omni"])
    command = [shutil.which("bash"), str(root / "benchmarks/gpu.sh")]
    told = subprocess.run(command, env={"PATH": str(tmp_path)}, capture_output=True, text=True, check=False)
    assert told.returncode == 1 and "no CUDA device found" in told.stderr
