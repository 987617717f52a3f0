"""Full-size models on a CUDA device: measured, served beside the simulator, and compared with stock libraries.

    python benchmarks/gpu.py                       # all parts, in their order; benchmarks/gpu.sh installs and calls it
    python benchmarks/gpu.py --budget-s 400        # a part is begun only while it fits
    python benchmarks/gpu.py --only sd15_512 text

The models are those of `configs/paper/`, with random weights in float16. Profiles go to `profiles/<gpu>/<config>/`,
those without CUDA graphs to `<config>_eager/`, results to `benchmarks/results/gpu/<gpu>/`. A served part first takes
the rate from the profile: `load` times what the device can serve at its best batch. What needs vLLM is left out where
it is not installed. What fails is named at the end.
"""

from __future__ import annotations

import argparse
import importlib
import json
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import torch

from neustream import cli
from neustream.profiling.files import load_profile

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "gpu"
IMPORTED = (
    "diffusers",
    "neustream.backends.diffusers.from_config",
    "neustream.backends.transformers.from_config",
    "text",
)
"""Once, before the processes of parts are begun."""
FORKED = 77
"""The exit code of a process that cannot use CUDA since its parent has begun it."""
PATIENCE = 2
"""A part is ended when it takes so many times as long as is expected."""
CONTEXT, PROMPT = 256, 110
"""Tokens of a text in its middle, and of its prompt, in the mean, for the capacity of a device."""
TIMES = ("--repeats", "9", "--warmup", "2", "--seconds", "12")


@dataclass(frozen=True)
class Model:
    """A config that is measured and served here.

    Args:
        requests: of each policy's run; 0: it is only measured.
        steps: denoising steps of a request, or outputs of a text, in the mean.
        compared: whether it is measured without CUDA graphs too.
        serving_s: about how long its runs take.
        sets: overrides of the config.
        load: offered, as a share of what the device can serve by the profile, unless `rate` says requests a second.
    """

    config: str
    requests: int
    steps: float
    policies: tuple[str, ...] = ("fcfs", "neustream", "priced")
    compared: bool = True
    sets: tuple[str, ...] = ()
    load: float = 0.9
    rate: float | None = None
    serving_s: float = 70


MODELS = {
    "opt_13b": Model(
        "opt_13b_a6000",
        rate=24.0,
        requests=240,
        steps=150,
        serving_s=130,
        policies=("fcfs", "neustream_llm", "priced"),
        sets=("llm.max_batch=64", "llm.memory.tokens=65536", "slo={first_s: 1.0, step_s: 0.05}"),
    ),
    "sd15_512": Model("sd15_512_h100", requests=80, steps=40, load=0.8),
    "dit_s2": Model("dit_s2_256_rtx4090", requests=150, steps=225),
    "dit_xl2": Model("dit_xl2_256_rtx4090", requests=60, steps=225),
    "sd15_256": Model("sd15_256_rtx4090", requests=0, steps=40, compared=False),
}


ORDER = (
    *("profile opt_13b", "profile sd15_512", "run sd15_512", "run opt_13b", "text", "eager sd15_512"),
    *("profile dit_xl2", "eager dit_xl2", "profile dit_s2", "run dit_s2", "run dit_xl2"),
)
"""The parts that tell most come first: time may be short."""


@dataclass(frozen=True)
class Part:
    """Something to run: about how many `seconds` it takes, what does it, and the package that it `needs`."""

    name: str
    seconds: float
    run: Callable[[], None]
    needs: str = ""

    @property
    def lacking(self) -> bool:
        """Whether the package that it needs is not installed here."""
        return bool(self.needs) and find_spec(self.needs) is None


def gpu_name() -> str:
    """nvidia_h200, as folders are called. CUDA is not begun here: processes of the parts could not use it then."""
    asked = subprocess.run(
        ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"], capture_output=True, text=True, check=True
    )
    return re.sub(r"[^a-z0-9]+", "_", asked.stdout.splitlines()[0].lower()).strip("_")


def parts(gpu: str) -> list[Part]:
    """All parts: those of `ORDER`, then the others."""
    found = []
    for name, model in MODELS.items():
        found.append(Part(f"profile {name}", 40, partial(profile, gpu, name)))
        if model.requests:
            found.append(Part(f"run {name}", model.serving_s, partial(serve, gpu, name)))
        if model.compared:
            found.append(Part(f"eager {name}", 25, partial(profile, gpu, name, eager=True)))
    found += [Part("text", 60, partial(text, gpu)), *others(gpu)]
    known = {part.name: part for part in found}
    return [*(known.pop(name) for name in ORDER), *known.values()]


def folder(gpu: str, name: str, *, eager: bool = False) -> Path:
    return ROOT / "profiles" / gpu / (MODELS[name].config + ("_eager" if eager else ""))


def command(*words: object) -> None:
    """A command of neustream, in this process."""
    before = sys.argv
    sys.argv = ["neustream", *map(str, words)]
    try:
        cli.main()
    except SystemExit as end:
        if end.code not in (None, 0):
            raise RuntimeError(f"{' '.join(sys.argv)} ended with {end.code}") from end
    finally:
        sys.argv = before


def profile(gpu: str, name: str, *, eager: bool = False) -> None:
    """Measure a model's stages over their batch sizes."""
    model = MODELS[name]
    sets = [word for one in (*model.sets, *(["backend.graphs=false"] if eager else [])) for word in ("--set", one)]
    out = folder(gpu, name, eager=eager)
    command("profile", config_of(model), "--device", "cuda", "--out", out, *TIMES, *sets)


def serve(gpu: str, name: str) -> None:
    """Serve a model's workload under each policy, beside the simulator, by the profile that was measured."""
    model = MODELS[name]
    sets = [f"profiles={folder(gpu, name)}", f"workload.requests={model.requests}", *model.sets]
    rate = model.load * capacity(gpu, name) if model.rate is None else model.rate
    sets.append(f"workload.rate={rate:.3g}")
    words = [word for one in sets for word in ("--set", one)]
    words += [word for policy in model.policies for word in ("-p", policy)]
    RESULTS.joinpath(gpu).mkdir(parents=True, exist_ok=True)
    out = ROOT / "out" / "gpu" / name
    command(
        *("run", config_of(model), "--device", "cuda", "--same-device", *words),
        *("--out", out, "--json", RESULTS / gpu / f"{name}.json"),
    )


def capacity(gpu: str, name: str) -> float:
    """Requests a second that a device serves at the best batches, by the profile."""
    model = MODELS[name]
    place = folder(gpu, name)
    if (place / "steps.json").exists():
        told = json.loads((place / "steps.json").read_text())
        decode, prefill = told["decode"], told["prefill"]
        column = decode["context"].index(CONTEXT)
        best = min(row[column] / batch for batch, row in zip(decode["batch"], decode["latency_s"], strict=True))
        many = zip(prefill["tokens"], prefill["latency_s"], strict=True)
        prompts = min(seconds / tokens for tokens, seconds in many)
        return 1.0 / float(best * model.steps + prompts * PROMPT)
    each = 0.0
    for path in sorted(place.glob("*.json")):
        known = load_profile(path)
        best = min(known.latency(batch) / batch for batch in range(1, known.max_batch + 1))
        each += best * (model.steps if path.stem in ("unet", "dit") else 1.0)
    return 1.0 / each


def config_of(model: Model) -> Path:
    return ROOT / "configs" / "paper" / f"{model.config}.yaml"


def text(gpu: str) -> None:
    """Texts side by side with the stock library; see benchmarks/text.py."""
    import text as script

    before = sys.argv
    out = RESULTS / gpu / "text.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    sys.argv = ["text.py", *("--device", "cuda", "--dtype", "float16", "--models", "opt-13b", "--each", "2")]
    sys.argv += ["--rounds", "1", "--seconds", "55", "--concurrent", "1", "32", "--out", str(out)]
    try:
        script.main()
    finally:
        sys.argv = before


def done(part: Part, most_s: float) -> bool:
    """Whether it went well. It has a process of its own: a fault on the device spoils all behind it in its process."""
    for kind in (multiprocessing.get_context("fork").Process, multiprocessing.get_context("spawn").Process):
        process = kind(target=alone, args=[part])
        process.start()
        process.join(most_s)
        if process.exitcode is None:
            print(f"{part.name}: not over after {most_s:g} s, and ended", flush=True)
            process.kill()
            process.join()
        if process.exitcode != FORKED:
            break
    return process.exitcode == 0


def alone(part: Part) -> None:
    """A part, in its process."""
    if torch.cuda._is_in_bad_fork():
        os._exit(FORKED)
    part.run()


def script(*words: str) -> None:
    """Another of the benchmarks."""
    subprocess.run([sys.executable, str(ROOT / "benchmarks" / words[0]), *words[1:]], check=True)


def others(gpu: str) -> list[Part]:
    """What other benchmarks have to say: pipelines by stock calls and ours, and how far the simulator is off."""
    out = RESULTS / gpu
    short = ("--device", "cuda", "--dtype", "float16", "--guidance", "7.5", "--max-batch", "20", "--measure-s", "120")
    parts = [
        Part(
            f"stock {name}",
            300,
            partial(
                script,
                *("diffusion.py", "--pipeline", name, *short, "--parts", "burst,lone", "--steps", "30-50"),
                *("--out", str(out / f"diffusion-{name}.json")),
            ),
        )
        for name in ("sd15_512", "sdxl", "sd3")
    ]
    fidelity = partial(
        script, "fidelity.py", "--device", "cuda:0", "--only", "dit", "sd", "opt", "--out", str(out / "fidelity")
    )
    return [*parts, Part("fidelity", 900, fidelity), *with_vllm(gpu)]


def with_vllm(gpu: str) -> list[Part]:
    """Our policies inside vLLM beside their simulation; vLLM's tokens a second beside ours."""
    out = RESULTS / gpu
    served = partial(
        script,
        *("fidelity.py", "--device", "cuda:0", "--only", "vllm", "--loads", "0.75", "1.5", "--requests", "200"),
        *("--out", str(out / "fidelity_vllm.json")),
    )
    beside = partial(
        script,
        *("text.py", "--device", "cuda:0", "--dtype", "float16", "--models", "opt-1.3b", "--vllm", sys.executable),
        *("--beside", "generate", "--each", "2", "--rounds", "2", "--concurrent", "1", "32"),
        *("--out", str(out / "text_vllm.json")),
    )
    return [Part("vllm served", 120, served, "vllm"), Part("vllm text", 150, beside, "vllm")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[], metavar="WORD", help="parts whose name has one of these words")
    parser.add_argument("--budget-s", type=float, default=float("inf"), help="seconds that all parts may take")
    given = parser.parse_args()
    if shutil.which("nvidia-smi") is None:
        parser.error("there is no nvidia-smi here; this measures GPUs only")
    began, failed = time.monotonic(), list[str]()
    gpu = gpu_name()
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # else looking for a device is enough to begin CUDA
    for name in IMPORTED:
        importlib.import_module(name)
    for part in parts(gpu):
        if given.only and not any(word in part.name.split() for word in given.only):
            continue
        if part.lacking:
            print(f"== {part.name}: left out, the package {part.needs} is not installed here", flush=True)
            continue
        spent = time.monotonic() - began
        if spent + part.seconds > given.budget_s:
            print(f"== {part.name}: left out, {spent:.0f} s of {given.budget_s:g} are over", flush=True)
            continue
        print(f"== {part.name} ({spent:.0f} s)", flush=True)
        if not done(part, min(PATIENCE * part.seconds, given.budget_s - spent)):
            failed.append(part.name)
    print(f"{time.monotonic() - began:.0f} s in all")
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
