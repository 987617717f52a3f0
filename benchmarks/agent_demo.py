"""A small agent for real: a tiny LLM plans, a tool draws a chart, a tiny LLaVA looks at it, the LLM writes.

    OMP_NUM_THREADS=1 python benchmarks/agent_demo.py --out out/agent [--same-device] [--set KEY=VALUE ...]

Both models have random weights, so what they write is nonsense: which program the tool runs is chosen by a hash
of the plan, among three that are written here. It runs in a process of its own, with limits of time, memory
and files, in an empty folder. How many runs come when, and what they are promised, is in
configs/demo/agent_tiny.yaml, whose keys `--set` changes. What it reads is measured first: the profiles of both
models, what the tool takes while nothing else runs, the tokens of the prompts.

The same runs are then served under each policy in turn, and simulated twice: by what was measured before, and
of the device and the tool as they were meanwhile. `--same-device` also simulates each policy on the device and the
tool as they were while each of them served: what was served under two policies was not served on the same device,
as the speed of a machine drifts. Written are the pictures of the first runs, a report with each call and tool, and
a figure of the critical path.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from rich.console import Console

import neustream as ns
from neustream.analysis.fidelity import Outcome, Watch, errors_table
from neustream.analysis.tables import policies_table
from neustream.analysis.took import Took
from neustream.backends.demo import TEXT
from neustream.backends.loading.texts import BYTES_TEMPLATE
from neustream.backends.options import options_of
from neustream.backends.replaying import OfService, Replay, Sending
from neustream.backends.serving import Named
from neustream.backends.transformers import TextMount
from neustream.backends.transformers.from_config import Options, build, byte_tokenizer
from neustream.backends.transformers.processors import processor_for
from neustream.commands.beside import same_device_table
from neustream.config import load_config
from neustream.core.batch import StepInput
from neustream.engine.events import Finished, Observer, Record
from neustream.engine.executor import alone_s
from neustream.engine.report import Report
from neustream.experiment import Prepared, prepare, simulate
from neustream.profiling.files import add_costs
from neustream.service.service import Service

CONFIG = Path(__file__).parent.parent / "configs/demo/agent_tiny.yaml"
SERVED = "served"
ALONE = 10
"""Runs that are measured, one after the other."""
FILES = {
    "OPTForCausalLM-*/steps": "chat",
    "LlavaForConditionalGeneration-*/steps": "llava",
    "LlavaForConditionalGeneration-*/see-*": "llava-see",
}
"""Profiles as services keep them, and what the config calls them."""
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
import os, resource
os.nice(10)
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


def agent(expect_s: float, models: Any) -> ns.Graph:
    """The graph: plan, draw, look, write; `expect_s`: of a chart."""
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
    picture = ns.tool("draw", draw, concurrency=1, timeout_s=TOOL_S + 5, expect_s=expect_s)
    return ns.Graph("agent", ns.seq(plan, picture, look, write))


@functools.cache
def stock() -> tuple[Any, Any]:
    """The two models, made once."""
    return tuple(build(options_of(Options, raw), torch.device("cpu")) for raw in (TEXT, LLAVA))


def served(policy: str, cache: Path, expect_s: float = 0.3, observers: Sequence[Observer] = ()) -> Service:
    """Both models and the agent behind one service."""
    chat, llava = stock()
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = BYTES_TEMPLATE
    options: dict[str, Any] = {"slots": 8, "cache": cache, "measure_s": 5.0, "progress": False}
    mounts = {
        "chat": TextMount(chat, tokenizer, **options),
        "llava": TextMount(llava, processor_for(llava, tokenizer), **options),
        "agent": lambda models: agent(expect_s, models),
    }
    return ns.serve(mounts, policy=policy, observers=observers)


class Charts:
    """An observer of how long the tool took."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def __call__(self, record: Record) -> None:
        if isinstance(record, Finished) and record.step.stage == "draw":
            self.seconds.append(record.at - record.step.started_at)


def measured(out: Path) -> None:
    """Measure what the config reads, with nothing else served: profiles, charts, and prompts of each question."""
    cache, charts = out / "cache", Charts()
    shutil.rmtree(cache, ignore_errors=True)
    with served("fcfs", cache, observers=[charts]) as service:
        states = []
        for at in range(ALONE):
            answer = service.submit(question=QUESTIONS[at % len(QUESTIONS)], model="agent")
            states.append(answer.result(120))
    profiles = out / "profiles"
    profiles.mkdir(exist_ok=True)
    for pattern, name in FILES.items():
        (found,) = cache.glob(f"profiles/{pattern}.json")
        shutil.copy(found, profiles / f"{name}.json")
    add_costs(sorted(profiles.glob("*.json")), {"alone_s": alone_s(["cpu"])})
    (out / "draw.txt").write_text("\n".join(map(str, charts.seconds[1:])) + "\n")  # the first loads what it needs
    lengths = {name: [state[name].prompt_tokens for state in states[:3]] for name in ("plan", "look", "write")}
    (out / "lengths.json").write_text(json.dumps(lengths))


def prepared(out: Path, sets: Sequence[str]) -> Prepared:
    """The config with what was measured."""
    files = {
        "profiles": out / "profiles",
        "tools.draw.latency_s": f"{{samples: {out / 'draw.txt'}}}",
        "workload.lengths": out / "lengths.json",
    }
    return prepare(load_config(CONFIG, [*[f"{key}={value}" for key, value in files.items()], *sets]))


@dataclass
class Played:
    """What came of serving all runs under one policy, and of simulating the same; reports as JSON types.

    `device`: what `simulate` has to be told of the device and the tool as they were meanwhile. `on_device_of`: runs
    that the policy keeps on them as they were under each policy, if that was simulated.
    """

    served: dict[str, Any]
    simulated: dict[str, Any]
    as_observed: dict[str, Any]
    outcomes: list[Any]
    device: Mapping[str, Any]
    on_device_of: dict[str, int] = field(default_factory=dict)

    @property
    def reports(self) -> dict[str, dict[str, Any]]:
        """By how it was played."""
        return {SERVED: self.served, "simulated": self.simulated, "simulated as observed": self.as_observed}

    @property
    def on_device(self) -> dict[str, Any]:
        """What a report has of it: nothing where it was not simulated."""
        return {"on_time_on_device_of": self.on_device_of} if self.on_device_of else {}

    def told(self, policy: str) -> dict[str, Any]:
        """A row of the tables of policies."""
        return {"policy": policy, **self.served, **self.on_device}


def play(policy: str, cache: Path, runs: Prepared) -> Played:
    """Serve all runs under one policy, and simulate them."""
    watch, took, heard = Watch(), Took(), Named([])
    ended: dict[str, Any] = {}
    with served(policy, cache, runs.profiles["draw"].latency(1), [heard]) as service:
        service.submit(question=QUESTIONS[0], model="agent").result(120)  # processes and caches are warm
        serving = OfService(service)
        report = Report(serving.now())
        replay = Replay(serving)
        heard.observers += [watch, took, report]
        replay.play(
            Sending(
                run,
                ((), {"question": QUESTIONS[at % len(QUESTIONS)]}),
                "agent",
                lambda answer: ended.update({answer.id: answer.outcome()}),
            )
            for at, run in enumerate(runs.requests)
        )
    device: dict[str, Any] = {"took": took.stretch(report.start), "device": watch.told().costs}
    plain, again = simulate(runs, policy), simulate(runs, policy, **device)
    outcomes = [ended[run.id] for run in runs.requests if run.id in ended]
    return Played(report.to_dict(), plain.to_dict(), again.to_dict(), outcomes, device)


def compare(played: Mapping[str, Played], runs: Prepared) -> None:
    """Simulate each policy on the device and the tool as they were while each of them served."""
    for policy, one in played.items():
        one.on_device_of = {
            name: simulate(runs, policy, **other.device).counts["on_time"] for name, other in played.items()
        }


def figure(played: Mapping[str, Played], path: Path) -> None:
    """Where the time of a run goes on its critical path, by policy, served and simulated."""
    from matplotlib.figure import Figure

    rows = [(f"{policy}, {how}", report) for policy, one in played.items() for how, report in one.reports.items()]
    drawn = Figure(figsize=(7, 1 + 0.3 * len(rows)), layout="constrained")
    axes = drawn.subplots()
    colours = {"plan": "#0072b2", "draw": "#e69f00", "look": "#009e73", "write": "#cc79a7"}
    for row, (_, report) in enumerate(rows):
        left = 0.0
        for name, colour in colours.items():
            seconds = report["legs"].get(name, {}).get("critical_path_s", 0.0)
            axes.barh(row, seconds, left=left, color=colour, label=None if row else name)
            left += seconds
    axes.set_yticks(range(len(rows)), [name for name, _ in rows])
    axes.invert_yaxis()
    axes.set_xlabel("seconds of a run on its critical path, mean")
    drawn.legend(ncols=4, loc="outside upper center", frameon=False)
    drawn.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out/agent"))
    parser.add_argument("--set", nargs="*", default=[], dest="sets", metavar="KEY=VALUE", help="keys of the config")
    parser.add_argument(
        "--same-device",
        action="store_true",
        help="also simulate each policy on the device and the tool as they were while each of them served",
    )
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    given.out.mkdir(parents=True, exist_ok=True)
    console = Console()
    console.print("== measuring the two models, the tool, and what is asked")
    measured(given.out)
    runs = prepared(given.out, given.sets)
    totals = [run.slo.total for run in runs.requests]
    console.print(f"   {len(totals)} runs, promised {min(totals):.2f} to {max(totals):.2f} s each")
    played: dict[str, Played] = {}
    for policy in runs.experiment.policies:
        console.print(f"== serving them under {policy}, and simulating the same")
        one = played[policy] = play(policy, given.out / "cache", runs)
        done = [outcome for outcome in one.outcomes if outcome.status == "done"]
        for at, outcome in enumerate(done[:3]):
            outcome.value["chart"].save(given.out / f"{policy}-{at}.png")
    console.print(policies_table("runs of the agent, served", [one.told(policy) for policy, one in played.items()]))
    rows = [
        (f"{policy}, {how}", Outcome.of(one.served), Outcome.of(report))
        for policy, one in played.items()
        for how, report in one.reports.items()
        if how != SERVED
    ]
    console.print(errors_table("how far the simulator was off", "policy", rows))
    if given.same_device:
        compare(played, runs)
        console.print(same_device_table([one.told(policy) for policy, one in played.items()]))
    figure(played, given.out / "critical_path.png")
    told = {policy: {**one.reports, **one.on_device} for policy, one in played.items()}
    (given.out / "report.json").write_text(json.dumps(told, indent=1), "utf-8")
    console.print(f"wrote report.json, critical_path.png and pictures into {given.out}")


if __name__ == "__main__":
    main()
