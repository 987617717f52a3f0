"""Served like simulated: the same requests on a real model and in the simulator, in turns.

    OMP_NUM_THREADS=1 python benchmarks/fidelity.py [--quick] [--only dit sd opt vllm]
    OMP_NUM_THREADS=1 VLLM_CPU_KVCACHE_SPACE=1 .venv-vllm/bin/python benchmarks/fidelity.py --only vllm

For a tiny DiT, Stable Diffusion and OPT on transformers (the configs in configs/demo), and an OPT in
vLLM where that is installed (on CUDA one of 1.3 billion weights in float16): profiles are measured anew
for each load, since machines drift, then each point (a load and a policy) is served and simulated.
Loads are multiples of what one request after the other can be served at, of vLLM those of its knee.
The order of policies turns with the load. Printed and written into benchmarks/results/fidelity.{json,md}:
the share on time, p50 and p99 of both, the errors by the profile and of the device as it was, what steps
took over their profile, gaps, decisions, and how much the simulator has to be told of the run until it
is close (`neustream/analysis/fidelity.py`): nothing (`profile`), how fast steps were in the mean
(`speed`), each step's own speed (`steps`), what the engine took beside them (`engine`); or `nothing` of
these explains it.

Points are kept in out/fidelity as they are served, and an interrupted run goes on where it was; `--fresh`
measures and serves anew. `--quick` has two loads and two policies, and writes no results. A machine
that does anything else gives other errors: the load of the machine is written beside them.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from arguments import at_least_one
from kept_results import kept
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TimeElapsedColumn

from neustream import __version__
from neustream.analysis.fidelity import Error, Outcome, Watch, error, errors_table, explained, ladder
from neustream.analysis.tables import new_table
from neustream.analysis.took import Took
from neustream.config import load_experiment
from neustream.profiling import processor, versions

if TYPE_CHECKING:
    from neustream.backends.serving import Session

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results"
WORK = ROOT / "out/fidelity"
VLLM = "vllm"
IMAGES, TEXTS = ("fcfs", "neustream", "priced"), ("fcfs", "neustream_llm", "priced")
OBSERVED = "engine"
"""The simulation that knows most of a run."""
LOADS, KNEES = (0.5, 1.0, 2.0, 3.0, 5.0), (0.5, 0.75, 1.0, 1.5, 2.0)
"""Times the load of one request after the other; times vLLM's knee."""


@dataclass(frozen=True)
class Model:
    """What is served: a config (none: vLLM), under these policies, at these loads."""

    name: str
    config: str
    policies: Sequence[str]
    loads: Sequence[float] = LOADS


MODELS = (
    Model("dit", "dit_tiny", IMAGES),
    Model("sd", "sd_tiny", IMAGES),
    Model("opt", "opt_tiny", TEXTS),
    Model(VLLM, "", TEXTS, KNEES),
)

Row = dict[str, Any]


@dataclass(frozen=True)
class Point:
    """One run, by what it depends on."""

    model: str
    load: float
    policy: str
    seed: int
    requests: int

    def key(self, profiles: str) -> str:
        """Its name in the file of what was served; `profiles`: a digest of these."""
        return json.dumps([*asdict(self).values(), profiles])


def points(model: Model, args: argparse.Namespace) -> list[Point]:
    """The points of a model; the policies of each load begin with another one."""
    loads = args.loads or (model.loads[1::2] if args.quick else model.loads)
    policies = list(args.policies or (model.policies[::2] if args.quick else model.policies))
    found = []
    for turn, load in enumerate(loads):
        first = turn % len(policies)
        for policy in policies[first:] + policies[:first]:
            found.append(Point(model.name, load, policy, args.seed, args.requests))
    return found


def row_of(point: Point, served: Outcome, seen: Mapping[str, Any], simulated: Mapping[str, Outcome]) -> Row:
    """What is kept of a point: served, simulated with more and more knowledge, the error of each."""
    errors = {name: error(served, outcome) for name, outcome in simulated.items()}
    return {
        **asdict(point),
        "served": asdict(served),
        "simulated": {name: asdict(outcome) for name, outcome in simulated.items()},
        "error": {name: asdict(off) for name, off in errors.items()},
        "explained_by": explained(errors),
        "seen": dict(seen),
    }


# -- models of configs ------------------------------------------------------------------------------


def measured(model: Model, load: float, device: str, seconds: float) -> Path:
    """The folder of a model's profiles for a load, which are measured if they are not there."""
    folder = WORK / "profiles" / f"{model.name}-{device.replace(':', '-')}" / f"{load:g}"
    if not list(folder.glob("*.json")):
        config = ROOT / f"configs/demo/{model.config}.yaml"
        command = [sys.executable, "-m", "neustream.cli", "profile", str(config), "--out", str(folder)]
        subprocess.run([*command, "--device", device, "--seconds", str(seconds)], check=True)
    return folder


def digest(folder: Path) -> str:
    """A name for the content of a folder's profiles."""
    files = sorted(folder.glob("*.json"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:12]


@lru_cache(maxsize=1)  # policies of one load come one after the other
def session_of(config: Path, overrides: tuple[str, ...], device: str) -> Session:
    """A config's model with the requests of a load, for all policies."""
    from neustream.backends.serving import Session

    return Session(load_experiment(config, overrides), device)


def serve_config(model: Model, point: Point, folder: Path, device: str) -> Row:
    """Serve a point for real and simulate it."""
    changes = {"profiles": folder, "workload.load": point.load, "workload.seed": point.seed}
    changes["workload.requests"] = point.requests
    overrides = tuple(f"{key}={value}" for key, value in changes.items())
    session = session_of(ROOT / f"configs/demo/{model.config}.yaml", overrides, device)
    watch, took = Watch(), Took()
    report = session.serve(point.policy, [watch, took], lambda: None, lambda replay: None)
    seen = watch.told()
    reports = ladder(session.prepared, point.policy, seen, took.stretch(report.start))
    simulated = {name: Outcome.of(one.to_dict()) for name, one in reports.items()}
    return row_of(point, Outcome.of(report.to_dict()), asdict(seen), simulated)


# -- running ----------------------------------------------------------------------------------------


def run(
    todo: Sequence[Point], profiles: Callable[[Point], str], serve: Callable[[Point], Row], progress: Progress
) -> Iterator[Row]:
    """The rows of some points: those that were served before, and the others as they are.

    `profiles`: a digest of those of a point.
    """
    path = WORK / "points.jsonl"
    known = kept(path)
    task = progress.add_task(todo[0].model, total=len(todo))
    for point in todo:
        progress.update(task, description=f"{point.model}, load {point.load:g}, {point.policy}")
        key = point.key(profiles(point))
        if key not in known:
            known[key] = {**serve(point), "load_average": os.getloadavg()[0]}
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("a", encoding="utf-8") as file:
                file.write("\n" + json.dumps({"key": key, "result": known[key]}) + "\n")
        progress.advance(task)
        yield known[key]


def rows_of(model: Model, args: argparse.Namespace, progress: Progress) -> list[Row]:
    """All rows of a model."""
    todo = points(model, args)
    if model.name == VLLM:
        from fidelity_vllm import Servers

        servers = Servers({point.policy for point in todo}, args.device)

        def serve(point: Point) -> Row:
            return row_of(point, *servers.serve(point.policy, point.load, point.requests, point.seed))

        return list(run(todo, lambda point: f"learnt, {servers.size.name}", serve, progress))

    def folder(point: Point) -> Path:
        return measured(model, point.load, args.device, args.profile_s)

    def serve_it(point: Point) -> Row:
        return serve_config(model, point, folder(point), args.device)

    return list(run(todo, lambda point: digest(folder(point)), serve_it, progress))


# -- results ----------------------------------------------------------------------------------------


def tables(rows: Sequence[Row]) -> list[Any]:
    """For each model: the errors, and what the run did beside its steps."""
    found = []
    for name in dict.fromkeys(row["model"] for row in rows):
        some = [row for row in rows if row["model"] == name]
        found.append(errors(f"{name}: served beside simulated, by the profile", some, "profile"))
        if OBSERVED in some[0]["simulated"]:
            found.append(errors(f"{name}: served beside simulated, the device as it was", some, OBSERVED))
        found.append(seen_table(name, some))
    return found


def errors(title: str, rows: Sequence[Row], known: str) -> Any:
    """Served beside what was simulated with some knowledge."""
    told = [(label(row), Outcome(**row["served"]), Outcome(**row["simulated"][known])) for row in rows]
    return errors_table(title, "load, policy", told)


def label(row: Row) -> str:
    return f"{row['load']:g} {row['policy']}"


def seen_table(name: str, rows: Sequence[Row]) -> Any:
    """What is not in the profile, and what the simulator has to know of it to be close."""
    headings = ("step/profile", "spread", "gap us", "idle", "decisions", "us each", "explained by")
    table = new_table(f"{name}: what the runs did", "load, policy", headings)
    for row in rows:
        seen = row["seen"]
        table.add_row(
            label(row),
            f"{worst(seen['steps']):.3f}" if seen.get("steps") else "-",
            f"{seen['spread']:.1%}" if "spread" in seen else "-",
            f"{seen['gap_us'][0]:.0f}/{seen['gap_us'][1]:.0f}" if "gap_us" in seen else "-",
            f"{seen['idle_share']:.1%}" if "idle_share" in seen else "-",
            str(seen["decisions"]),
            f"{seen['decision_us'][0]:.0f}/{seen['decision_us'][1]:.0f}",
            row["explained_by"],
        )
    return table


def worst(steps: Mapping[str, float]) -> float:
    """The ratio that is furthest from 1."""
    return max(steps.values(), key=lambda ratio: abs(ratio - 1))


def summary(rows: Sequence[Row]) -> str:
    """In a line or two: how many points are close, and the largest error of a share on time."""
    said = []
    for known, what in (("profile", "by the profile"), (OBSERVED, "of the device as it was")):
        found = [Error(**row["error"][known]) for row in rows if known in row["error"]]
        close, largest = sum(off.close for off in found), max((abs(off.points) for off in found), default=0.0)
        if found:
            said.append(f"{what}, {close} of {len(found)} points are close, the largest error is {largest:.1f} points")
    return "; ".join(said)


def markdown(rows: Sequence[Row]) -> str:
    """The tables as text."""
    console = Console(width=110, record=True, file=io.StringIO())
    for table in tables(rows):
        console.print(table)
    return f"# Served beside simulated\n\n{summary(rows)}.\n\n```\n{console.export_text().rstrip()}\n```\n"


def write(rows: Sequence[Row], args: argparse.Namespace, out: Path) -> None:
    """Results with their origin; those of other models that are there stay."""
    before = json.loads(out.read_text()) if out.exists() else {"origin": {}, "rows": []}
    names = {row["model"] for row in rows}
    device = processor() if args.device == "cpu" else args.device
    origin = {
        "command": " ".join(["OMP_NUM_THREADS=1 python benchmarks/fidelity.py", *args.given]),
        "neustream": __version__,
        "seed": args.seed,
        "device": device,
        "versions": versions(),
    }
    origins = {**before["origin"], **dict.fromkeys(sorted(names), origin)}
    merged = [row for row in before["rows"] if row["model"] not in names] + list(rows)
    lines = ",\n  ".join(json.dumps(row) for row in merged)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(f'{{"origin": {json.dumps(origins)}, "rows": [\n  {lines}\n]}}\n')
    out.with_suffix(".md").write_text(markdown(merged))


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [model.name for model in MODELS]
    parser.add_argument("--quick", action="store_true", help="two loads, two policies; write no results")
    parser.add_argument("--only", nargs="+", choices=names, default=names, help="models")
    parser.add_argument("--loads", nargs="+", type=float, help="in place of five")
    parser.add_argument("--policies", nargs="+", help="in place of three")
    parser.add_argument("--seed", type=int, default=0, help="of the workloads")
    parser.add_argument("--requests", type=at_least_one, help="of each point (100, quick 24)")
    parser.add_argument("--device", default="cpu", help="cpu, cuda:0, ...")
    parser.add_argument("--profile-s", type=float, default=30.0, help="about how long an llm is measured")
    parser.add_argument("--fresh", action="store_true", help="measure and serve again what is kept")
    parser.add_argument("--out", type=Path, default=RESULTS / "fidelity.json", help="where results go")
    args = parser.parse_args(argv)
    args.given = sys.argv[1:] if argv is None else argv
    args.requests = args.requests or (24 if args.quick else 100)
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args, console = arguments(argv), Console()
    if args.fresh:
        shutil.rmtree(WORK, ignore_errors=True)
    rows: list[Row] = []
    with Progress(*Progress.get_default_columns(), MofNCompleteColumn(), TimeElapsedColumn()) as progress:
        for model in MODELS:
            if model.name not in args.only:
                continue
            if model.name == VLLM and find_spec("vllm") is None:
                progress.console.print("vllm: skipped, since the package vllm is not installed here")
                continue
            rows += rows_of(model, args, progress)
    for table in tables(rows):
        console.print(table)
    console.print(summary(rows))
    if rows and not args.quick:
        write(rows, args, args.out)
        console.print(f"wrote {args.out} and .md")


if __name__ == "__main__":
    logging.getLogger("neustream").setLevel(logging.ERROR)  # of profiles that are off the tables tell
    main()
