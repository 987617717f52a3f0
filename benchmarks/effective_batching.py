"""effective-batching's experiment: a small model under none, static and dynamic batching, and our default.

    OMP_NUM_THREADS=1 python benchmarks/effective_batching.py [--requests 100] [--rate 1] [--add]

A server in a process of its own serves a GPT-2 with random weights (`--layers`, `--width`) under one
policy after the other: `serial`, `static`, `fcfs` (Orca's rule) and the default. 100 requests come at
about one a second, as a Poisson process; each asks `/inference` for 1 to 200 tokens, drawn from
a normal distribution (mean 100, deviation 50). The same requests go to every server. Latency counts
from when a request was to be sent. `--images` does the same with a tiny Stable Diffusion, 1 to 40 steps.

Printed: tokens a second by the clock, and as effective-batching's `/stats` counts them (tokens by the
sum of latencies); mean latency per token. Written into `--out`: its CSV files and its plot, and all records. Modes
that an earlier call left in the same folder (`--modes`) stand beside. `--add` keeps the runs of a mode that are
there and adds one: the first table is then of all runs together, the second of their medians and how far they
are apart.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from arguments import at_least_one
from http_load import Served, serving

from neustream.backends.demo import IMAGE
from neustream.bench.by_length import by_length
from neustream.bench.load import Load
from neustream.bench.plan import Plan, Target
from neustream.bench.planning import Timing, plan_of
from neustream.bench.runs import Run, read_runs, write_runs
from neustream.commands.bench_latency_by_length import save_lengths, show_lengths
from neustream.commands.outputs import write_text
from neustream.commands.printing import console
from neustream.workload.asks import Ask, ImageAsk
from neustream.workload.datasets import normal
from neustream.workload.texts import BYTES, Texts

MODES = {"none": "serial", "static": "static", "dynamic": "fcfs", "default": "default"}
"""effective-batching's names of the ways to serve -> our policies."""
PROMPT = 16
"""Tokens of each prompt: theirs are one sentence."""


def text_model(layers: int, width: int) -> dict[str, Any]:
    """A GPT-2 of random weights whose tokens are bytes, as a server's config has it."""
    config = {
        "vocab_size": 257,
        "n_positions": 512,
        "n_embd": width,
        "n_layer": layers,
        "n_head": 4,
        "bos_token_id": 256,
        "eos_token_id": 256,
        "pad_token_id": 256,
    }
    backend = {"model_type": "gpt2", "config": config, "threads": 1}
    options = {"measure_s": 10.0, "slots": 16}
    return {"name": "model", "kind": "text", "backend": backend, "tokenizer": "bytes", "options": options}


def image_model() -> dict[str, Any]:
    return {"name": "model", "kind": "image", "backend": IMAGE, "options": {"measure_s": 10.0}}


def asks_of(options: argparse.Namespace) -> list[Ask]:
    """What is asked for: lengths drawn normally."""
    texts = Texts(BYTES)
    most = 40 if options.images else 200
    lengths = normal(most / 2, most / 4, 1, most, options.requests, options.seed)
    found = []
    for at, length in enumerate(map(int, lengths)):
        prompt = texts.text(PROMPT, options.seed, at)
        text = Ask(str(at), prompt=prompt, input_tokens=PROMPT, output_tokens=length)
        found.append(replace(text, output_tokens=None, image=ImageAsk(steps=length)) if options.images else text)
    return found


def measured(server: Served, plan: Plan, images: bool) -> Run:
    """The plan, behind a few requests of which nothing is kept."""
    target = Target(server.url, "images" if images else "inference", model="model")
    first = [replace(ask, id=f"warm-{ask.id}", arrival_s=None) for ask in plan.asks[:4]]
    Load(Plan(first, concurrency=2), target).run()
    return Load(plan, target).run()


def show_spread(runs: Mapping[str, Sequence[Run]]) -> None:
    """Print the median of each figure over the runs of a mode, with its least and most, as Markdown."""
    console.print("| mode | runs | s/unit | as its /stats | mean, s | p50, s | p99, s |\n|---|---|---|---|---|---|---|")
    for mode, several in runs.items():
        totals = [by_length([run]) for run in several]
        latencies = [sorted(record.e2e_s() or 0.0 for record in run.records if record.done) for run in several]
        cells = [
            spread([each.per_unit_s for each in totals], 4),
            spread([each.own_throughput for each in totals], 1),
            spread([statistics.fmean(each) for each in latencies], 2),
            spread([each[len(each) // 2] for each in latencies], 2),
            spread([each[len(each) * 99 // 100] for each in latencies], 2),
        ]
        console.print(f"| {mode} | {len(several)} | {' | '.join(cells)} |", soft_wrap=True)


def spread(values: Sequence[float], digits: int) -> str:
    """The median, with the least and the most."""
    least, middle, most = min(values), statistics.median(values), max(values)
    return f"{middle:.{digits}f} ({least:.{digits}f} to {most:.{digits}f})"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=at_least_one, default=100)
    parser.add_argument("--rate", type=float, default=1.0, help="requests a second")
    parser.add_argument("--layers", type=at_least_one, default=6)
    parser.add_argument("--width", type=at_least_one, default=256)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--images", action="store_true")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--add", action="store_true", help="a further run beside those that are there")
    parser.add_argument("--out", type=Path, default=Path("out/effective_batching"))
    options = parser.parse_args(arguments)
    model = image_model() if options.images else text_model(options.layers, options.width)
    plan = plan_of(asks_of(options), Timing(options.rate), options.seed, f"rate {options.rate:g}")
    folders = {mode: options.out / mode for mode in MODES}
    for mode in options.modes:
        limits = {"max_queued": 10_000}
        with serving({"models": [model], "policy": MODES[mode], "limits": limits}) as server:
            run = measured(server, plan, options.images)
        before = read_runs(folders[mode])[0] if options.add and folders[mode].exists() else []
        write_runs(folders[mode], [*before, run], write_text, policy=MODES[mode])
    runs = {mode: read_runs(folder)[0] for mode, folder in folders.items() if folder.exists()}
    found = {mode: by_length(several) for mode, several in runs.items()}
    show_lengths(found)
    show_spread(runs)
    save_lengths(found, options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
