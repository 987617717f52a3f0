"""One client asks for image sizes that nobody asked for before, one after the other: what do others notice?

    OMP_NUM_THREADS=1 python benchmarks/new_sizes.py [--requests 150] [--sizes 20] [--load 0.5] [--slo 8] [--seed 0]

A tiny real Stable Diffusion on the CPU. Requests of one size, measured beforehand, come at `load` times
what one request after the other can be served at, each promised `slo` times its time alone. The same
arrivals are served twice: without the other client, and while it asks for one new size after the
other, without a promise. Prints the share on time of the known size in both, and the longest time
that `submit` took for a new one.
"""

from __future__ import annotations

import argparse
import logging
import tempfile
import threading
import time
from itertools import product
from typing import Any

import numpy as np
from arguments import at_least_one
from diffusion_models import model

import neustream
from neustream.service.service import Service

KNOWN = 16
STEPS = 10


def arguments(height: int, width: int, seed: int) -> dict[str, Any]:
    return {"prompt": f"a lighthouse, {seed}", "height": height, "width": width, "num_inference_steps": STEPS}


def sizes(count: int) -> list[tuple[int, int]]:
    """Sizes near the known one, none of them twice."""
    sides = range(KNOWN, KNOWN + 8 * 6, 8)
    found = [(height, width) for height, width in product(sides, sides) if height * width > KNOWN * KNOWN]
    return sorted(found, key=lambda size: size[0] * size[1])[:count]


class NewSizes(threading.Thread):
    """A client that asks for one new size after the other."""

    def __init__(self, service: Service, count: int) -> None:
        super().__init__(daemon=True)
        self.longest_s = 0.0
        self.done = 0
        self._service, self._count = service, count

    def run(self) -> None:
        for height, width in sizes(self._count):
            began = time.perf_counter()
            answer = self._service.submit(**arguments(height, width, 0), slo=neustream.SLO())
            self.longest_s = max(self.longest_s, time.perf_counter() - began)
            answer.result(120)
            self.done += 1


def serve_once(args: argparse.Namespace, cache: str, beside: bool) -> tuple[float, NewSizes | None]:
    """The share on time of the known size, and the other client."""
    pipe = model("sd_tiny", "cpu", "float32").pipe
    sample = {"prompt": "x", "height": KNOWN, "width": KNOWN}
    with neustream.serve(pipe, samples=[sample], cache=cache, measure_s=10.0, progress=False) as service:
        alone = []
        for seed in range(5):
            began = time.perf_counter()
            service(**arguments(KNOWN, KNOWN, seed), slo=neustream.SLO())
            alone.append(time.perf_counter() - began)
        solo_s = float(np.median(alone))
        gaps = np.random.RandomState(args.seed).exponential(solo_s / args.load, args.requests)
        client = NewSizes(service, args.sizes) if beside else None
        if client is not None:
            client.start()
        answers, start, due = [], time.perf_counter(), 0.0
        for seed, gap in enumerate(gaps):
            due += gap
            time.sleep(max(0.0, start + due - time.perf_counter()))
            answers.append(service.submit(**arguments(KNOWN, KNOWN, seed), slo=args.slo * solo_s))
        on_time = 0
        for answer in answers:
            answer.exception(120)
            on_time += answer.ended is not None and answer.ended.on_time
        if client is not None:
            client.join(120)
    return on_time / args.requests, client


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--requests", type=at_least_one, default=150)
    parser.add_argument("--sizes", type=at_least_one, default=20)
    parser.add_argument("--load", type=float, default=0.5)
    parser.add_argument("--slo", type=float, default=8.0, help="times the time alone")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    logging.getLogger("neustream").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as cache:
        without, _ = serve_once(args, cache, beside=False)
        beside, client = serve_once(args, cache, beside=True)
    assert client is not None
    print(f"on time at the known size: {without:.3f} alone, {beside:.3f} beside {client.done} new sizes")
    print(f"ratio {beside / without:.3f}; submit of a new size took {client.longest_s * 1e3:.0f} ms at most")


if __name__ == "__main__":
    main()
