"""A tiny real Stable Diffusion and a tiny real OPT behind one service, on one CPU thread.

    OMP_NUM_THREADS=1 python benchmarks/mixed_served.py [--seconds 20] [--load 0.6] [--scale 5] [--seed 0]

Images and texts come at `load` times what each could be served at alone, one request after the other; so
twice that together. Each is promised `scale` times its time alone (a text: its first token and the pace
of the others). The same arrivals are served under each policy in turn. Printed are requests of each kind with
every promise kept, and those that ran and were given up or late.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusion_models import model

import neustream
from neustream import SLO
from neustream.backends.demo import TEXT
from neustream.backends.diffusers import PipelineMount
from neustream.backends.transformers import TextMount
from neustream.backends.transformers.from_config import Options, build, byte_tokenizer
from neustream.core.events import Ended
from neustream.engine.events import Record
from neustream.service.service import Service

POLICIES = ("priced", "edf", "fcfs")
STEPS, TOKENS = 10, 32


class Counts:
    """An observer: what became of requests, by kind."""

    def __init__(self) -> None:
        self.kept = {"images": 0, "texts": 0}
        self.lost = {"images": 0, "texts": 0}

    def __call__(self, record: Record) -> None:
        if isinstance(record, Ended) and record.slo.promises:
            kind = record.id.partition("-")[0]
            self.kept[kind] += record.on_time
            self.lost[kind] += record.started and not record.on_time


def served(pipe: Any, text: Any, cache: Path, policy: str, counts: Counts) -> Service:
    """Both models on one device."""
    sample = {"prompt": "x", "num_inference_steps": STEPS}
    mounts = {
        "images": PipelineMount(pipe, samples=[sample], cache=cache, measure_s=15.0, progress=False),
        "texts": TextMount(text, byte_tokenizer(), slots=8, cache=cache, measure_s=10.0, progress=False),
    }
    return neustream.serve(mounts, policy=policy, observers=[counts])


def ask(service: Service, kind: str, number: int, slo: SLO) -> Any:
    """One request of a kind."""
    id = f"{kind}-{number}"
    if kind == "images":
        prompt = f"a lighthouse, {number}"
        return service.submit(prompt=prompt, num_inference_steps=STEPS, model=kind, slo=slo, id=id)
    prompt = f"Once upon a time there were {number} foxes"
    return service.submit(prompt, max_tokens=TOKENS, ignore_eos=True, model=kind, slo=slo, id=id)


def alone(service: Service) -> tuple[float, float, float]:
    """Seconds alone: of an image, of a text, of a text's first token."""
    images, texts, firsts = [], [], []
    for number in range(7):
        began = time.perf_counter()
        ask(service, "images", -number - 1, SLO()).result()
        images.append(time.perf_counter() - began)
        done = ask(service, "texts", -number - 1, SLO()).result()
        texts.append(done.latency_s)
        firsts.append(done.ttft_s)
    return statistics.median(images), statistics.median(texts), statistics.median(firsts)


def play(service: Service, args: argparse.Namespace, solo: tuple[float, float, float]) -> int:
    """Ask for everything at its time; how many requests there were."""
    image_s, text_s, first_s = solo
    draw = np.random.RandomState(args.seed)
    pace = args.scale * (text_s - first_s) / (TOKENS - 1)
    slos = {
        "images": SLO(total=args.scale * image_s),
        "texts": SLO(first=args.scale * first_s + image_s / STEPS, step=pace),
    }
    due: list[tuple[float, str]] = []
    for kind, seconds in (("images", image_s), ("texts", text_s)):
        gaps = draw.exponential(seconds / args.load, int(3 * args.seconds * args.load / seconds) + 1)
        due += [(at, kind) for at in np.cumsum(gaps) if at < args.seconds]
    answers, start = [], time.perf_counter()
    for number, (at, kind) in enumerate(sorted(due)):
        time.sleep(max(0.0, start + at - time.perf_counter()))
        answers.append(ask(service, kind, number, slos[kind]))
    for answer in answers:
        answer.outcome(120)
    return len(answers)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--load", type=float, default=0.6)
    parser.add_argument("--scale", type=float, default=5.0)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("neustream").setLevel(logging.ERROR)
    pipe = model("sd_tiny", "cpu", "float32").pipe
    text = build(Options(**TEXT), torch.device("cpu"))
    solo: tuple[float, float, float] | None = None
    with tempfile.TemporaryDirectory() as folder:
        for policy in POLICIES:
            counts = Counts()
            with served(pipe, text, Path(folder), policy, counts) as service:
                solo = solo or alone(service)
                asked = play(service, args, solo)
            kept, lost = counts.kept, counts.lost
            print(
                f"{policy:8} {sum(kept.values())} of {asked} kept: "
                f"{kept['images']} images, {kept['texts']} texts; "
                f"begun and lost: {lost['images']} images, {lost['texts']} texts",
                flush=True,
            )


if __name__ == "__main__":
    main()
