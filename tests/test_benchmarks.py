"""benchmarks/diffusion.py once, with next to nothing to do."""

from __future__ import annotations

import argparse
import importlib
import json
import shutil
import subprocess
import sys
import warnings

import pytest

from neustream import LinearProfile


@pytest.fixture(scope="module")
def diffusion(root):
    with pytest.MonkeyPatch.context() as patched, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # diffusers' own imports
        pytest.importorskip("diffusers", reason="needs the extra 'diffusion'")
        patched.syspath_prepend(root / "benchmarks")
        names = ("diffusion", "diffusion_ways", "diffusion_bare", "diffusion_tables", "diffusion_models")
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


def test_a_pipeline_that_encodes_nothing_has_a_load_too(diffusion):
    ways = importlib.import_module("diffusion_ways")
    settings = argparse.Namespace(max_batch=4, decode_batch=2, guidance=[1.0])
    seconds = {"probe": 9.0, "denoise@4x8x8": 0.1, "decode@4x8x8": 0.2}
    profiles = {stage: LinearProfile(stage, base=base, max_batch=2) for stage, base in seconds.items()}
    bench = ways.Bench(None, None, settings, profiles)
    asks = [diffusion.Ask(8, 1.0, seed=0, slo=1.0), diffusion.Ask(8, 1.0, seed=1, arrival=20.0, slo=0.9)]
    assert bench.solo(asks[0]) == pytest.approx(1.0)
    assert bench.capacity(asks) == pytest.approx(1 / 0.5)
    told = ways.simulated(bench, "fcfs", asks, {})
    assert told["on_time"] == 1 and told["batch"] == 1.0


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
    told = subprocess.run([*command, "--help"], capture_output=True, text=True, check=False)
    assert told.returncode == 0 and told.stdout.startswith("What is measured on a CUDA machine, in one command:")
    assert told.stdout.endswith("and what is measured in it.\n") and told.stderr == ""


def test_on_a_gpu_without_vllm_its_parts_are_left_out_with_the_reason(diffusion, monkeypatch, capsys):
    gpu = importlib.import_module("gpu")
    monkeypatch.setattr(gpu, "find_spec", lambda name: None)
    monkeypatch.setattr(gpu, "gpu_name", lambda: "toy")
    monkeypatch.setattr(gpu.shutil, "which", lambda name: name)
    monkeypatch.setattr(gpu, "IMPORTED", ())
    monkeypatch.setenv("PYTORCH_NVML_BASED_CUDA_CHECK", "")
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--only", "vllm"])
    gpu.main()
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == [
        f"== vllm {what}: left out, the package vllm is not installed here" for what in ("served", "text")
    ]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_what_submits_cost_is_measured_for_each_kind(diffusion, tmp_path, monkeypatch, capsys):
    submitting = importlib.import_module("submitting")
    monkeypatch.setattr(sys, "argv", ["submitting.py", "--rounds", "2", "--json", str(tmp_path / "o.json")])
    submitting.main()
    assert "Mount.request" in capsys.readouterr().out
    rows = {row.pop("what"): row for row in json.loads((tmp_path / "o.json").read_text())}
    assert {what for what, row in rows.items() if "submit_us" in row} == {
        "image, known shape",
        "image, new shape",
        "text",
    }
    assert len(rows) == 4 and all(low > 0 for row in rows.values() for low, _ in row.values())


def test_parts_for_a_gpu_are_in_their_order_and_rates_follow_from_profiles(diffusion, root, tmp_path, monkeypatch):
    gpu = importlib.import_module("gpu")
    names = [part.name for part in gpu.parts("some_gpu")]
    assert names[: len(gpu.ORDER)] == list(gpu.ORDER) and len(set(names)) == len(names)
    assert {"profile sd15_256", "eager dit_s2", "text", "fidelity"} <= set(names) and "run sd15_256" not in names
    assert {part.needs for part in gpu.parts("some_gpu") if part.name in ("vllm served", "vllm text")} == {"vllm"}
    told = json.loads((root / "profiles/nvidia_h200/opt_13b_a6000/steps.json").read_text())
    decode, prefill = told["decode"], told["prefill"]
    tokens_s = max(batch / row[2] for batch, row in zip(decode["batch"], decode["latency_s"], strict=True))
    prompt_s = 110 * min(s / n for n, s in zip(prefill["tokens"], prefill["latency_s"], strict=True))
    assert gpu.capacity("nvidia_h200", "opt_13b") == pytest.approx(1 / (150 / tokens_s + prompt_s))
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    place = tmp_path / "profiles/toy/dit_s2_256_rtx4090"
    place.mkdir(parents=True)
    lines = {"dit": {"base_s": 0.01, "max_batch": 4}, "vae": {"base_s": 0, "per_job_s": 0.1, "max_batch": 2}}
    for name, known in lines.items():
        head = {"format": "neustream.profile/1", "kind": "linear", "stage": name, "device": "toy", "origin": {}}
        (place / f"{name}.json").write_text(json.dumps({**head, **known}))
    assert gpu.capacity("toy", "dit_s2") == pytest.approx(1 / (225 * 0.01 / 4 + 0.1))
