"""A small agent for real: a tiny LLM plans, a tool draws a chart, a tiny LLaVA looks at it, the LLM writes.

    OMP_NUM_THREADS=1 python benchmarks/agent_demo.py --out out/agent [--runs 24] [--load 1.5] [--slo 6] [--seed 0]

Both models have random weights, so what they write is nonsense: which program the tool runs is chosen by a hash
of the plan, among three that are written here. It runs in a process of its own, with limits of time, memory
and files, in an empty folder. The runs come as a Poisson process at `load` times what one after the other could
be served, with a plain chat beside each. A run is promised `slo` times its time alone. The same arrivals are served
under each policy in turn. Written are the pictures of the first runs, a report with each call and tool, and a
figure of the critical path.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table

import neustream as ns
from neustream.backends.demo import TEXT
from neustream.backends.loading import BYTES_TEMPLATE
from neustream.backends.options import options_of
from neustream.backends.transformers import TextMount
from neustream.backends.transformers.from_config import Options, build, byte_tokenizer
from neustream.backends.transformers.processors import processor_for
from neustream.core.batch import StepInput
from neustream.service.service import Service
from neustream.workload.arrivals import gamma_arrivals

POLICIES = ("fcfs", "edf", "priced")
LLAVA: dict[str, Any] = {
    "model_type": "llava",
    "threads": 1,
    "config": {
        "image_token_index": 257,  # behind the bytes and the end of the tokenizer that needs no files
        "text_config": {
            "model_type": "llama",
            "vocab_size": 258,
            "hidden_size": 128,
            "intermediate_size": 256,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 512,
        },
        "vision_config": {
            "model_type": "clip_vision_model",
            "hidden_size": 128,
            "intermediate_size": 256,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "image_size": 64,
            "patch_size": 8,
        },
    },
}
QUESTIONS = ("draw the sales of a year", "compare four teams", "how did the weather change")
PLAN, LOOK, WRITE = 24, 16, 32
"""Tokens of the three calls."""
DRAW = """
import resource
resource.setrlimit(resource.RLIMIT_CPU, (10, 10))  # seconds
resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
from PIL import Image, ImageDraw
chart = Image.new("RGB", (64, 64), "white")
pen = ImageDraw.Draw(chart)
{body}
chart.save("chart.png")
"""
BODIES = (
    """for at, high in enumerate([12, 30, 22, 45, 38]):
    pen.rectangle([6 + 11 * at, 58 - high, 13 + 11 * at, 58], fill="steelblue")""",
    """points = [(4 + 7 * at, 50 - (at * at) % 37) for at in range(9)]
pen.line(points, fill="darkorange", width=2)""",
    """pen.pieslice([6, 6, 58, 58], 0, 140, fill="seagreen")
pen.pieslice([6, 6, 58, 58], 140, 250, fill="goldenrod")
pen.pieslice([6, 6, 58, 58], 250, 360, fill="slateblue")""",
)
TOOL_S = 20.0
"""Seconds that a chart may take, at most."""


def draw(given: StepInput) -> Mapping[str, Any]:
    """Run the program of a plan, and read the chart that it leaves."""
    plan = given.state["plan"].text.encode()
    body = BODIES[hashlib.sha256(plan).digest()[0] % len(BODIES)]
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [sys.executable, "-I", "-c", DRAW.format(body=body)],
            cwd=folder,
            env={"PATH": os.defpath, "OMP_NUM_THREADS": "1"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=TOOL_S,
        )
        if done.returncode != 0:
            raise RuntimeError(f"the program ended with {done.returncode}: {done.stderr.decode()[-200:]}")
        with Image.open(Path(folder, "chart.png")) as picture:
            return {"chart": picture.convert("RGB")}


def agent(models: Any) -> ns.Graph:
    """The graph: plan, draw, look, write."""
    like = {"prompt": "x" * 32, "max_tokens": PLAN, "ignore_eos": True}
    blank = {"prompt": "<image> what is this?", "images": [Image.new("RGB", (64, 64))]}
    plan = models["chat"].call("plan", lambda job: {**like, "prompt": job.params["question"]}, like=like)
    look = models["llava"].call(
        "look",
        lambda job: {**blank, "images": [job.state["chart"]], "max_tokens": LOOK, "ignore_eos": True},
        like={**blank, "max_tokens": LOOK, "ignore_eos": True},
    )
    write = models["chat"].call(
        "write",
        lambda job: {**like, "prompt": f"{job.params['question']}: {job.state['look'].text}", "max_tokens": WRITE},
        like={**like, "max_tokens": WRITE},
    )
    picture = ns.tool("draw", draw, concurrency=2, timeout_s=TOOL_S + 5, expect_s=0.3)
    return ns.Graph("agent", ns.seq(plan, picture, look, write))


@functools.cache
def stock() -> tuple[Any, Any]:
    """The two models, made once."""
    return tuple(build(options_of(Options, raw), torch.device("cpu")) for raw in (TEXT, LLAVA))


def served(policy: str, cache: Path) -> Service:
    """Both models and the agent behind one service."""
    chat, llava = stock()
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = BYTES_TEMPLATE
    options: dict[str, Any] = {"slots": 8, "cache": cache, "measure_s": 5.0, "progress": False}
    mounts = {
        "chat": TextMount(chat, tokenizer, **options),
        "llava": TextMount(llava, processor_for(llava, tokenizer), **options),
        "agent": agent,
    }
    return ns.serve(mounts, policy=policy)


def alone_s(cache: Path) -> float:
    """Seconds of a run when nothing else is served: the median of three, after one to warm up."""
    with served("fcfs", cache) as service:
        took = []
        for at in range(4):
            began = time.monotonic()
            service.submit(question=QUESTIONS[at % 3], model="agent").result(120)
            took.append(time.monotonic() - began)
    return float(np.median(took[1:]))


def play(policy: str, cache: Path, arrivals: Any, slo: ns.SLO) -> tuple[dict[str, Any], list[Any]]:
    """Serve all runs under one policy: its report, and what became of each."""
    with served(policy, cache) as service:
        service.submit(question=QUESTIONS[0], model="agent").result(120)  # processes and caches are warm
        began = time.monotonic()
        runs, chats = [], []
        for at, arrival in enumerate(arrivals):
            time.sleep(max(began + arrival - time.monotonic(), 0.0))
            runs.append(service.submit(question=QUESTIONS[at % 3], model="agent", slo=slo, id=f"run-{at}"))
            chats.append(service.submit("hello", max_tokens=16, ignore_eos=True, model="chat"))
        outcomes = [run.outcome() for run in runs]
        for chat in chats:
            chat.outcome()
    return service.report.to_dict(), outcomes


def figure(reports: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """Where the time of a run goes on its critical path, by policy."""
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(7, 2.6), layout="constrained")
    axes = drawn.subplots()
    names = ["plan", "draw", "look", "write"]
    colours = ["#0072b2", "#e69f00", "#009e73", "#cc79a7"]
    for row, report in enumerate(reports.values()):
        left = 0.0
        for name, colour in zip(names, colours, strict=True):
            seconds = report["legs"].get(name, {}).get("critical_path_s", 0.0)
            axes.barh(row, seconds, left=left, color=colour, label=name if row == 0 else None)
            left += seconds
    axes.set_yticks(range(len(reports)), list(reports))
    axes.set_xlabel("seconds of a run on its critical path, mean")
    axes.legend(ncols=4, loc="upper center", bbox_to_anchor=(0.5, 1.25), frameon=False)
    drawn.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out/agent"))
    parser.add_argument("--runs", type=int, default=24)
    parser.add_argument("--load", type=float, default=1.5)
    parser.add_argument("--slo", type=float, default=6.0)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    given.out.mkdir(parents=True, exist_ok=True)
    cache = given.out / "profiles"
    console = Console()
    console.print("== measuring the two models, and a run alone")
    alone = alone_s(cache)
    arrivals = gamma_arrivals(given.runs, rate=given.load / alone, cv=1.0, seed=given.seed)
    slo = ns.SLO(total=given.slo * alone)
    console.print(f"   a run alone takes {alone:.2f} s; {given.runs} of them, promised {slo.total:.2f} s each")
    table = Table("policy", "on time", "late", "given up", "p50 s", "p99 s", title="runs of the agent, served")
    reports: dict[str, Any] = {}
    for policy in POLICIES:
        console.print(f"== serving them under {policy}")
        report, outcomes = play(policy, cache, arrivals, slo)
        reports[policy] = report
        done = [one for one in outcomes if one.status == "done"]
        late = [one for one in done if not one.on_time]
        took = [one.latency_s for one in done] or [float("nan")]
        spread = [f"{np.percentile(took, share):.2f}" for share in (50, 99)]
        table.add_row(policy, str(len(done) - len(late)), str(len(late)), str(len(outcomes) - len(done)), *spread)
        for at, one in enumerate(done[:3]):
            one.value["chart"].save(given.out / f"{policy}-{at}.png")
    console.print(table)
    figure(reports, given.out / "critical_path.png")
    about = {"alone_s": alone, "slo_s": slo.total, "arrivals": list(map(float, arrivals)), "policies": reports}
    (given.out / "report.json").write_text(json.dumps(about, indent=1), "utf-8")
    console.print(f"wrote report.json, critical_path.png and pictures into {given.out}")


if __name__ == "__main__":
    main()
