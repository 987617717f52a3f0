"""What `submit` costs its caller: the stock call's dry run and what comes behind it, off the device.

    OMP_NUM_THREADS=1 python benchmarks/submitting.py [--config CONFIG] [--rounds 100] [--json FILE]

Serves both models of a config (default: the tiny ones, on the CPU) and submits to them from one
thread, each time when nothing else is open: a call of a shape that is known, a call of a size that
is new each time, and a text. Microseconds of the caller's thread (time in which it waits for others
does not count), medians and 99th percentiles: of the whole `submit`; of `Mount.request` in it, which
binds and checks the arguments; and of a pipeline's dry run alone: the stock call, as far as it gets
until it would use a model.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from time import thread_time
from typing import Any

import numpy as np
from arguments import at_least_one
from rich.console import Console

import neustream as ns
from neustream.analysis.tables import new_table
from neustream.backends.diffusers import PipelineMount
from neustream.backends.diffusers.dry_run import check
from neustream.backends.making import make_model
from neustream.backends.transformers import TextMount
from neustream.config import load_experiment

CONFIG = Path(__file__).parents[1] / "configs/demo/tiny_pair.yaml"
Ask = Callable[[int], dict[str, Any]]
"""The arguments of the n-th request."""


def timed(work: Callable[[], Any], after: Callable[[Any], Any]) -> float:
    """Seconds of this thread that `work` takes; `after` puts away what comes of it."""
    began = thread_time()
    made = work()
    took = thread_time() - began
    after(made)
    return took


def wait(answer: Any) -> None:
    answer.cancel()
    answer.outcome(60)


def measure(service: ns.Service, name: str, ask: Ask, rounds: int) -> dict[str, Any]:
    """Microseconds of `submit`, and of `request` in it."""
    mount = service.models[name]
    submits, requests = [], []
    for n in range(rounds):
        named = ask(2 * n)
        submits.append(timed(lambda named=named: service.submit(model=name, **named), wait))  # type: ignore[misc]
        named = ask(2 * n + 1)
        requests.append(timed(lambda named=named: mount.request(**named), lambda call: call.over()))  # type: ignore[misc]
    return {"submit_us": two(submits), "request_us": two(requests)}


def two(seconds: list[float]) -> tuple[float, float]:
    median, high = np.percentile(seconds, (50, 99)) * 1e6
    return float(median), float(high)


def asks_of(pipe: Any, image: Any) -> Mapping[str, tuple[str, Ask]]:
    """The kinds of requests, by what they are: the model and its arguments."""
    side = pipe.unet.config.sample_size * pipe.vae_scale_factor

    def known(n: int) -> dict[str, Any]:
        return dict(image.arguments({**image.params(n), "steps": 2}, None)[1])

    def new(n: int) -> dict[str, Any]:
        return {**known(n), "height": side + 8 * (n // 64 + 1), "width": side + 8 * (n % 64)}

    def text(n: int) -> dict[str, Any]:
        return {"prompt": [1 + n % 200] * 40, "max_tokens": 1}

    return {"image, known shape": ("sd", known), "image, new shape": ("sd", new), "text": ("chat", text)}


def run(config: Path, rounds: int) -> list[dict[str, Any]]:
    image, chat = (make_model(load_experiment(config, model=name), "cpu") for name in ("sd", "chat"))
    pipe: Any = image.pipe  # type: ignore[attr-defined]
    asks = asks_of(pipe, image)
    sample = asks["image, known shape"][1](0)
    with tempfile.TemporaryDirectory() as cache:
        pictures = PipelineMount(pipe, samples=[sample], measure_s=0, cache=cache, progress=False)
        texts = TextMount(chat.model, measure_s=0.2, cache=cache, progress=False)  # type: ignore[attr-defined]
        with ns.serve({"sd": pictures, "chat": texts}, policy="fcfs") as service:
            rows = [{"what": what, **measure(service, *ask, rounds)} for what, ask in asks.items()]
    dry = []
    for n in range(rounds):
        named = asks["image, known shape"][1](n)
        dry.append(timed(lambda named=named: check(pipe, named, pipe.device), bool))  # type: ignore[misc]
    return [*rows, {"what": "the stock call's dry run alone", "request_us": two(dry)}]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--config", type=Path, default=CONFIG)
    parser.add_argument("--rounds", type=at_least_one, default=100)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    rows = run(args.config, args.rounds)
    table = new_table("median / p99 us", "request", ["submit", "of it Mount.request"])
    for row in rows:
        cells = [f"{row[key][0]:.0f} / {row[key][1]:.0f}" if key in row else "" for key in ("submit_us", "request_us")]
        table.add_row(row["what"], *cells)
    Console().print(table)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
