"""A stock pipeline, served four ways: by stock calls, by stock calls in batches, by a bare batched loop, by neustream.

    python benchmarks/diffusion.py [--pipeline dit_tiny] [--device cpu] [--parts burst,lone,load] [--quick]

Pipelines have their real configurations and random weights (diffusion_models.py); the ways to serve them
are in diffusion_ways.py and diffusion_bare.py. First of all the engine measures its profiles, anew each time
(`--profiles DIR` takes those of `--profile-only --out-profiles DIR` in their place). Three parts:

* burst: 24 requests at once, of mixed step counts and guidance. Seconds until all images are on the host, medians
  over rounds in which the ways take turns, ratios by round; how far images are from stock's (largest difference
  over largest value); the share of the time spent in the denoiser's forwards. Ours hands in requests one by one.
* lone: one request at a time, stock and the engine in turns; the median over pairs of the ratio of their latencies,
  and the latency of the first request after the start.
* load: gamma arrivals (cv 2), the same for all ways, at rates relative to the capacity that the profiles say: each
  stage at its most efficient batch, all the time (more than deadlines allow). SLOs are scales, drawn for each
  request, of its solo latency by the profiles. The stock ways are servers on one thread that take requests in order
  and know no deadlines; the one with batches puts up to 8 waiting requests of equal steps and guidance into one
  call. Latencies run from the planned arrival to the image on the host, by the client's clock. Beside what was
  served stands what `neustream.simulate` says for the same requests, from the profiles as measured; and, as
  "at its speed", how many it says are on time if steps take as much longer than profiled as they did ("slower").
  "accept" is the time from a planned arrival to the engine having taken the request.

Forwards are timed around `Part.function`, in the engine's own steps (on CUDA by events, read at the end). "over" is the
stepping overhead: what a denoising step takes on average in the engine's records, from asking the policy to the
step's end, less its forwards. It has in it: deciding, the way to the worker's thread, gathering and sharing
out rows, the scheduler's step and the stock call's own code. Python's collector leaves out what is there after the
imports (gc.freeze): a full collection would stop all threads for a quarter of a second, now and then.

`--compile` compiles the denoiser for all ways. `--quick` takes a minute for dit_tiny and writes into out/. Results
go to benchmarks/results/diffusion-PIPELINE-DEVICE.json (or `--out`), the figure to out/.

`--against vllm-omni` only says why there is no such column. Its wheel (0.30.0, pure Python) can be downloaded
where this was written, but not used there: it imports vLLM throughout (not among its declared dependencies) and has
platforms for GPUs and NPUs alone; and it pins diffusers 0.40.0, accelerate 1.12.0 and transformers below 5.15, so it
needs an environment of its own. Of the pipelines here it serves SD 3 alone, and its synchronous API
gives all prompts of a call the same step count. No code is given here that was never run.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import cycle, islice, product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from arguments import at_least_one
from diffusers.utils import logging as diffusers_logging
from diffusion_bare import bare_loop, forwards_alone
from diffusion_models import MODELS, model
from diffusion_tables import burst_table, load_table, lone_table, plot, profile_lines
from diffusion_ways import (
    Ask,
    Bench,
    Image,
    batch_of,
    in_batches,
    one_by_one,
    queued_in_batches,
    queued_one_by_one,
    queued_submitted,
    simulated,
    submitted,
    watched,
)
from rich.console import Console

from neustream import POLICIES, BackendError
from neustream.backends.diffusers.measured import place_of
from neustream.profiling import versions
from neustream.workload import gamma_arrivals

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results"
PARTS = ("burst", "lone", "load")
BURST = 24
CV = 2.0
STOCK, BATCHED, BARE, ALONE, OURS = "stock, one by one", "stock, batches", "bare loop", "forwards alone", "ours, "
QUICK = {"rounds": 2, "pairs": 3, "requests": 40, "rates": [0.5, 1.0], "measure_s": 15.0}
Line = dict[str, Any]

# -- all at once ------------------------------------------------------------------------------------


@dataclass
class Way:
    """One way to serve a burst: its images, and by round its seconds and those in forwards (where known)."""

    run: Callable[[], tuple[float, Sequence[Image], float]]
    images: Sequence[Image] = ()
    seconds: list[float] = field(default_factory=list)
    forwards: list[float] = field(default_factory=list)

    def go(self, *, counts: bool) -> None:
        seconds, self.images, forwards = self.run()
        if counts:
            self.seconds.append(seconds)
            self.forwards.append(forwards)


def timed(make: Callable[[], Sequence[Image]]) -> tuple[float, Sequence[Image], float]:
    began = time.perf_counter()
    images = make()
    return time.perf_counter() - began, images, 0.0


def ours(bench: Bench, policy: str, asks: Sequence[Ask]) -> tuple[float, Sequence[Image], float]:
    with watched(bench, policy) as (engine, forwards):
        seconds, images, _ = timed(lambda: submitted(engine, bench.model, asks))
        return seconds, images, forwards.seconds


def burst(bench: Bench) -> list[Line]:
    """24 requests at once, every way in each round; a first round does not count."""
    settings, stock, most = bench.settings, bench.stock, bench.settings.max_batch
    kinds = islice(cycle(product(settings.steps, settings.guidance)), BURST)
    asks = [Ask(*kind, seed=100 + at) for at, kind in enumerate(kinds)]
    counts: list[int] = []
    bare_loop(stock, asks, most, counts)
    ways = {
        STOCK: Way(lambda: timed(lambda: one_by_one(stock, asks))),
        BATCHED: Way(lambda: timed(lambda: in_batches(stock, asks, most))),
        BARE: Way(lambda: timed(lambda: bare_loop(stock, asks, most))),
        ALONE: Way(partial(timed, forwards_alone(stock, asks, counts))),
    }
    ways |= {OURS + policy: Way(partial(ours, bench, policy, asks)) for policy in settings.policies}
    names = list(ways)
    for turn in range(settings.rounds + 1):
        for at in range(len(names)):
            ways[names[(turn + at) % len(names)]].go(counts=turn > 0)
    return [burst_line(name, ways) for name in names]


def burst_line(name: str, ways: Mapping[str, Way]) -> Line:
    way = ways[name]

    def against(other: str) -> float:
        return statistics.median(a / b for a, b in zip(ways[other].seconds, way.seconds, strict=True))

    seconds = statistics.median(way.seconds)
    line: Line = {"way": name, "seconds": seconds, "images_s": BURST / seconds, "rounds": way.seconds}
    line |= {"of_stock": against(STOCK), "of_bare": against(BARE), "of_forwards": against(ALONE)}
    if len(way.images):
        line["error"] = max(distance(*both) for both in zip(way.images, ways[STOCK].images, strict=True))
    if any(way.forwards):
        line["forwards"] = statistics.median(f / s for f, s in zip(way.forwards, way.seconds, strict=True))
    return line


def distance(image: Image, stock: Image) -> float:
    """The largest difference, relative to the largest value."""
    return float(np.abs(image - stock).max() / np.abs(stock).max())


# -- one at a time ----------------------------------------------------------------------------------


def lone(bench: Bench, policy: str) -> Line:
    """One request at a time, alternately through the engine and by stock."""
    asks = [Ask(bench.settings.lone_steps, max(bench.settings.guidance), seed=7)]
    began = time.perf_counter()
    with bench.engine(policy) as engine:
        ready = time.perf_counter() - began
        ours_s = partial(timed, lambda: submitted(engine, bench.model, asks))
        stock_s = partial(timed, lambda: one_by_one(bench.stock, asks))
        first = ours_s()[0]
        stock_s()
        pairs = []
        for at in range(bench.settings.pairs):
            one, other = (ours_s, stock_s) if at % 2 else (stock_s, ours_s)
            both = one()[0], other()[0]
            pairs.append(both if at % 2 else both[::-1])
    return {
        "way": OURS + policy,
        "steps": asks[0].steps,
        "guidance": asks[0].guidance,
        "ours_s": statistics.median(mine for mine, _ in pairs),
        "stock_s": statistics.median(stock for _, stock in pairs),
        "ratio": statistics.median(mine / stock for mine, stock in pairs),
        "first_s": first,
        "ready_s": ready,
        "pairs": pairs,
    }


# -- under load -------------------------------------------------------------------------------------


def workload(bench: Bench) -> list[Ask]:
    """Requests at a rate of 1 a second; their SLOs follow from the profiles."""
    settings = bench.settings
    draw = np.random.RandomState(settings.seed)
    asks = []
    for at, arrival in enumerate(gamma_arrivals(settings.requests, rate=1.0, cv=CV, seed=settings.seed)):
        steps, guidance, scale = (
            some[draw.randint(len(some))] for some in (settings.steps, settings.guidance, settings.slo_scale)
        )
        ask = Ask(steps, guidance, seed=1000 + at, arrival=float(arrival))
        asks.append(replace(ask, slo=scale * bench.solo(ask)))
    return asks


def load(bench: Bench, console: Console) -> Line:
    """Every way at every rate."""
    base = workload(bench)
    capacity = bench.capacity(base)
    lines: list[Line] = []
    for relative in bench.settings.rates:
        rate = relative * capacity
        asks = [replace(ask, arrival=ask.arrival / rate) for ask in base]
        some: list[Line] = []
        if bench.settings.rivals:
            some.append({"way": STOCK, **outcome(asks, queued_one_by_one(bench.stock, asks))})
            some.append({"way": BATCHED, **outcome(asks, queued_in_batches(bench.stock, asks))})
        some += [{"way": OURS + policy, **served(bench, policy, asks)} for policy in bench.settings.policies]
        lines += [{"load": relative, "rate": rate, **line} for line in some]
        console.print(load_table(f"load {relative:g}, {rate:.2f} requests/s", some))
    return {"capacity_rps": capacity, "cv": CV, "requests": len(base), "lines": lines}


def outcome(asks: Sequence[Ask], ends: Sequence[float | None]) -> Line:
    """Counts and latencies; goodput is per second of the span of the arrivals, as in reports."""
    latencies = [None if end is None else end - ask.arrival for ask, end in zip(asks, ends, strict=True)]
    on_time = sum(x is not None and x <= ask.slo for x, ask in zip(latencies, asks, strict=True))
    done = [x for x in latencies if x is not None]
    spread = {f"p{q}": float(np.percentile(done, q)) if done else None for q in (50, 99)}
    return {
        "on_time": on_time,
        "goodput_rps": on_time / asks[-1].arrival,
        "attainment": on_time / len(asks),
        "latency_s": spread,
        "images_s": len(done) / max((end for end in ends if end is not None), default=1.0),
    }


def served(bench: Bench, policy: str, asks: Sequence[Ask]) -> Line:
    """What came of `asks` under a policy, and what the simulator says."""
    with watched(bench, policy) as (engine, forwards):
        lags: list[float] = []
        line = outcome(asks, queued_submitted(engine, bench.model, asks, lags))
        report, over = engine.report.to_dict(), (forwards.wall - forwards.seconds) / max(forwards.steps, 1)
    slower = {stage.partition("@")[0]: factor for stage, factor in report["profile_error"].items()}
    line |= {"batch": batch_of(report), "slower": slower, "over_ms": over * 1e3}
    line["accept_ms"] = {f"p{q}": float(np.percentile(lags, q)) * 1e3 for q in (50, 99)}
    line |= {"decision_us": report["decision_us"], "simulated": simulated(bench, policy, asks, {})}
    return {**line, "at_its_speed": simulated(bench, policy, asks, slower)}


# -- the command ------------------------------------------------------------------------------------


def numbers(kind: type) -> Callable[[str], list[Any]]:
    """Parses `1,2,5`, and `30-50` as all whole numbers in between."""

    def parse(text: str) -> list[Any]:
        low, dash, high = text.partition("-")
        return [*range(int(low), int(high) + 1)] if dash else [kind(part) for part in text.split(",")]

    return parse


def some_of(known: Sequence[str]) -> Callable[[str], list[str]]:
    def parse(text: str) -> list[str]:
        if wrong := [part for part in text.split(",") if part not in known]:
            raise argparse.ArgumentTypeError(f"{wrong[0]!r} is none of {', '.join(known)}")
        return text.split(",")

    return parse


def parsed(given: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pipeline", choices=list(MODELS), default="dit_tiny")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", help="default: float32 on a CPU, float16 elsewhere")
    parser.add_argument("--parts", type=some_of(PARTS), default=list(PARTS), help="of burst,lone,load")
    parser.add_argument("--steps", type=numbers(int), default=[8, 12, 16, 20], help="8,12 or 30-50")
    parser.add_argument("--guidance", type=numbers(float), default=[1.0, 3.0, 7.5])
    parser.add_argument("--policies", type=some_of(list(POLICIES)), default=["fcfs", "neustream", "priced"])
    parser.add_argument("--max-batch", type=at_least_one, default=24)
    parser.add_argument("--decode-batch", type=at_least_one, default=8)
    parser.add_argument("--rounds", type=at_least_one, default=5, help="of the burst")
    parser.add_argument("--pairs", type=at_least_one, default=15, help="of lone requests")
    parser.add_argument("--lone-steps", type=at_least_one, default=20)
    parser.add_argument("--requests", type=at_least_one, default=200, help="of the load")
    parser.add_argument("--rates", type=numbers(float), default=[0.5, 1.0, 1.5, 2.0], help="relative to capacity")
    parser.add_argument("--slo-scale", type=numbers(float), default=[2.0, 5.0], help="of the solo latency")
    parser.add_argument("--no-rivals", dest="rivals", action="store_false", help="leave stock out of the load")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--measure-s", type=float, default=60.0, help="seconds to measure profiles in, about")
    parser.add_argument("--profiles", type=Path, help="a folder of --out-profiles")
    parser.add_argument("--profile-only", action="store_true")
    parser.add_argument("--out-profiles", type=Path, help="where measured profiles are copied to")
    parser.add_argument("--against", choices=["vllm-omni"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="fewer rounds, pairs, requests and rates")
    parser.add_argument("--out", type=Path, help="the JSON file")
    settings = parser.parse_args(given)
    if settings.profile_only and settings.out_profiles is None:
        parser.error("--profile-only needs --out-profiles DIR")
    for name, value in QUICK.items() if settings.quick else ():
        if getattr(settings, name) == parser.get_default(name):
            setattr(settings, name, value)
    settings.dtype = settings.dtype or ("float32" if settings.device == "cpu" else "float16")
    return settings


def refuse_vllm_omni() -> None:
    if importlib.util.find_spec("vllm_omni") is None:
        raise BackendError(
            "--against vllm-omni: vllm_omni is not importable here; it needs an environment of its own with a GPU "
            "build of vLLM (the docstring of benchmarks/diffusion.py says more)"
        )
    raise BackendError(
        "--against vllm-omni: no comparison is written; the docstring of benchmarks/diffusion.py says why"
    )


def prepared(settings: argparse.Namespace) -> Bench:
    """The pipeline, with its profiles."""
    own = model(settings.pipeline, settings.device, settings.dtype, settings.seed)
    bench = Bench(own, own.stock(compile=settings.compile), settings)
    if settings.profiles:
        bench.load(settings.profiles)
    else:
        bench.measure(settings.out_profiles)
    return bench


def main(given: Sequence[str]) -> None:
    settings = parsed(given)
    if settings.against:
        refuse_vllm_omni()
    if torch.device(settings.device).type == "cpu":
        torch.set_num_threads(1)  # several make steps wait for each other where cores are shared
    diffusers_logging.set_verbosity_error()
    console = Console(width=150)
    bench = prepared(settings)
    for line in profile_lines(bench.profiles):
        console.print(line, highlight=False)
    if settings.profile_only:
        return
    name = f"diffusion-{settings.pipeline}-{torch.device(settings.device).type}"
    found: Line = {
        "origin": {
            "command": shlex.join(["python", "benchmarks/diffusion.py", *given]),
            "device": place_of(bench.model.pipe),
            "dtype": settings.dtype,
            "seed": settings.seed,
            "versions": versions(),
        },
        "profiles_ms": {
            stage: {size: round(profile.latency(size) * 1e3, 4) for size in range(1, profile.max_batch + 1)}
            for stage, profile in bench.profiles.items()
        },
    }
    if "burst" in settings.parts:
        found["burst"] = burst(bench)
        console.print(burst_table(BURST, found["burst"]))
    if "lone" in settings.parts:
        found["lone"] = [lone(bench, policy) for policy in settings.policies]
        console.print(lone_table(found["lone"]))
    if "load" in settings.parts:
        found["load"] = load(bench, console)
        plot(found["load"], f"{settings.pipeline}, {found['origin']['device']}", ROOT / f"out/{name}.png")
        console.print(f"wrote {ROOT / f'out/{name}.png'}")
    path = settings.out or (ROOT / "out" if settings.quick else RESULTS) / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found, indent=1) + "\n")
    console.print(f"wrote {path}")


if __name__ == "__main__":
    gc.freeze()
    try:
        main(sys.argv[1:])
    except BackendError as error:
        sys.exit(f"error: {error}")
