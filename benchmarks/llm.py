"""Language models: ours beside vLLM's, Sarathi's and NeuStream's rules, simulated and on real engines.

    python benchmarks/llm.py simulate [--quick] [--jobs N] [--no-bound]
    OMP_NUM_THREADS=1 python benchmarks/llm.py transformers
    OMP_NUM_THREADS=1 VLLM_CPU_KVCACHE_SPACE=1 .venv-vllm/bin/python benchmarks/llm.py vllm [--quick]

`simulate` runs every sweep of the OPT settings in configs/paper under every policy that they name, and
the clairvoyant bound along the rates: share of 1000 requests whose every token was in time. `transformers` profiles the
model of configs/demo/opt_tiny.yaml, serves its workload at several loads and simulates the same.
`vllm` (see llm_vllm.py; `make .venv-vllm/installed` makes its venv) serves the same arrivals on a real
vLLM under its own two schedulers and ours, in turns. Each writes benchmarks/results/llm_<part>.json.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from rich.progress import Progress

from neustream import __version__
from neustream.config import LlmExperiment, load_experiment
from neustream.experiment import LlmPipeline, prepare, simulate, sweep_points

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results"
SETTINGS = ("opt_13b_a6000", "opt_30b_a6000", "opt_66b_a6000")
LOADS = (1.0, 1.5, 2.0, 2.5, 3.0)


# -- simulated --------------------------------------------------------------------------------------

Point = tuple[str, str, float, bool]


def points(quick: bool, bound: bool) -> list[Point]:
    """(config, what is swept, value, whether with the bound) of every point."""
    found = []
    for name in SETTINGS:
        for over, swept in load_experiment(ROOT / "configs/paper" / f"{name}.yaml").sweeps.items():
            if not quick or over == "workload.rate":
                found += [(name, over, value, bound and over == "workload.rate") for value in swept.values]
    return found


def simulated(point: Point) -> dict[str, Any]:
    """Attainment at one point by policy, in both views, and what the bound says."""
    name, over, value, bounded = point
    path = ROOT / "configs/paper" / f"{name}.yaml"
    held = [f"{key}={x}" for key, x in load_experiment(path).sweeps[over].at.items()]
    ((_, experiment),) = sweep_points(load_experiment(path, held), over, [value])
    prepared = prepare(experiment)
    out: dict[str, Any] = {"config": name, "over": over, "value": value, "attainment": {}, "client_attainment": {}}
    for policy in experiment.policies:
        report = simulate(prepared, policy)
        out["attainment"][policy] = report.attainment
        out["client_attainment"][policy] = report.to_dict()["tokens"]["client_attainment"]
    if bounded:
        from neustream.analysis.headroom import bound_of

        out["bound"] = bound_of(prepared).value / len(prepared.requests)
    return out


def simulated_tables(rows: Sequence[dict[str, Any]]) -> str:
    """One table a sweep."""
    lines = ["# OPT on A6000s, simulated", ""]
    lines += ["Share of 1000 requests whose every token was in time (seed 0); bound: no scheduler could do more.", ""]
    for name in SETTINGS:
        for over in dict.fromkeys(row["over"] for row in rows if row["config"] == name):
            some = [row for row in rows if (row["config"], row["over"]) == (name, over)]
            lines += [
                f"## {name}, {over}",
                "",
                "| " + " | ".join([over, *(f"{row['value']:g}" for row in some)]) + " |",
            ]
            lines.append("|" + "---|" * (len(some) + 1))
            for policy in some[0]["attainment"]:
                lines.append("| " + " | ".join([policy, *(f"{r['attainment'][policy]:.3f}" for r in some)]) + " |")
            if "bound" in some[0]:
                lines.append("| " + " | ".join(["bound", *(f"{row['bound']:.3f}" for row in some)]) + " |")
            lines.append("")
    ours = [(row, max(x for p, x in row["attainment"].items() if p != "priced")) for row in rows]
    behind = sum(row["attainment"]["priced"] < best for row, best in ours)
    lines.append(f"`priced` is behind the best baseline at {behind} of {len(rows)} points.")
    past = [
        row["attainment"]["priced"] / row["attainment"]["fcfs"] for row, _ in ours if row["attainment"]["fcfs"] < 0.9
    ]
    if past:
        lines.append(f"Where `fcfs` is below 0.9, `priced` is {min(past):.2f} times it at least ({len(past)} points).")
    if bounded := [row["attainment"]["priced"] / row["bound"] for row in rows if row.get("bound")]:
        lines.append(f"Share of the bound: mean {sum(bounded) / len(bounded):.3f}, least {min(bounded):.3f}.")
    return "\n".join([*lines, ""])


def figure(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Attainment against rate, a panel for each setting."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    picture, panels = pyplot.subplots(1, len(SETTINGS), figsize=(13, 4), sharey=True)
    for panel, name in zip(panels, SETTINGS, strict=True):
        some = [row for row in rows if (row["config"], row["over"]) == (name, "workload.rate")]
        rates = [row["value"] for row in some]
        for policy in some[0]["attainment"]:
            ours = policy == "priced"
            panel.plot(
                rates,
                [row["attainment"][policy] for row in some],
                marker="o",
                markersize=3,
                linewidth=2.5 if ours else 1.2,
                zorder=3 if ours else 2,
                label=policy,
            )
        if "bound" in some[0]:
            panel.plot(rates, [row["bound"] for row in some], "k--", linewidth=1, label="bound")
        panel.set(title=name.replace("_", " "), xlabel="requests per second", ylim=(0, 1.02))
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("share with every token in time")
    panels[0].legend(fontsize=8)
    picture.tight_layout()
    picture.savefig(path, dpi=110)


def run_simulated(args: argparse.Namespace) -> None:
    todo = points(args.quick, not args.no_bound)
    with Progress() as progress, ProcessPoolExecutor(args.jobs) as pool:
        rows = list(progress.track(pool.map(simulated, todo), total=len(todo), description="simulating"))
    if args.no_bound and (RESULTS / "llm_simulated.json").exists():
        known = json.loads((RESULTS / "llm_simulated.json").read_text())["rows"]
        bounds = {(row["config"], row["over"], row["value"]): row["bound"] for row in known if "bound" in row}
        for row in rows:
            if (bound := bounds.get((row["config"], row["over"], row["value"]))) is not None:
                row["bound"] = bound
    text = simulated_tables(rows)
    print(text)
    if not args.quick:
        write("simulated", rows, "python benchmarks/llm.py simulate")
        (RESULTS / "llm_simulated.md").write_text(text)
        figure(rows, RESULTS / "llm_simulated.png")


# -- served by transformers -------------------------------------------------------------------------


def run_transformers(args: argparse.Namespace) -> None:
    """Serve and simulate the demo's workload at several loads."""
    from neustream.backends.serving import Session, profile_steps

    path = ROOT / "configs/demo/opt_tiny.yaml"
    with tempfile.TemporaryDirectory() as folder:
        base = [f"profiles={folder}"]
        setting = load_experiment(path, base)
        assert isinstance(setting, LlmExperiment)
        profile_steps(LlmPipeline(setting), "cpu", Path(folder), args.profile_s, lambda *step: None)
        rows = []
        for load in LOADS:
            experiment = load_experiment(path, [*base, f"workload.load={load}", f"workload.requests={args.requests}"])
            with Session(experiment, "cpu") as session:
                session.warm_up()
                for policy in args.policies:
                    report = session.serve(policy, [], lambda: None, lambda engine: None)
                    slower = report.profile_error()
                    same = simulate(session.prepared, policy)
                    again = simulate(session.prepared, policy, speed=slower)
                    row = {"load": load, "policy": policy, "served": report.attainment, "simulated": same.attainment}
                    row |= {"simulated_as_observed": again.attainment, "slower": slower}
                    rows.append(row)
                    print(
                        f"load {load:g} {policy:14s} served {report.attainment:.3f}, simulated {same.attainment:.3f}, "
                        f"at its speed {again.attainment:.3f}; steps took "
                        + ", ".join(f"{x:.2f} x ({stage})" for stage, x in slower.items()),
                        flush=True,
                    )
    write("transformers", rows, "OMP_NUM_THREADS=1 python benchmarks/llm.py transformers")


def write(part: str, rows: Sequence[dict[str, Any]], command: str, more: dict[str, Any] = {}) -> None:
    """Results with their origin, one row a line."""
    from neustream.profiling import processor, versions

    origin = {"command": command, "neustream": __version__, "seed": 0, "python": platform.python_version()}
    if part != "simulated":
        origin |= {"device": processor(), "versions": versions()}
    RESULTS.mkdir(exist_ok=True)
    lines = ",\n  ".join(json.dumps(row) for row in rows)
    head = json.dumps({"origin": origin, **more})[:-1]
    path = RESULTS / f"llm_{part}.json"
    path.write_text(f'{head}, "rows": [\n  {lines}\n]}}\n')
    print(f"wrote {path}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = parser.add_subparsers(dest="part", required=True)
    some = parts.add_parser("simulate")
    some.add_argument("--quick", action="store_true", help="the rate sweeps alone; write nothing")
    some.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes")
    some.add_argument(
        "--no-bound", action="store_true", help="keep the bounds of the results that are there: no policy changes them"
    )
    some = parts.add_parser("transformers")
    some.add_argument("--requests", type=int, default=120)
    some.add_argument("--profile-s", type=float, default=30.0, help="seconds of measuring")
    some.add_argument("--policies", nargs="+", default=["fcfs", "neustream_llm", "priced"])
    some = parts.add_parser("vllm")
    some.add_argument("--quick", action="store_true", help="one SLO, two rates, one round; write nothing")
    some.add_argument("--requests", type=int, default=150)
    some.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    if args.part == "simulate":
        run_simulated(args)
    elif args.part == "transformers":
        run_transformers(args)
    else:
        sys.path.insert(0, str(Path(__file__).parent))
        from llm_vllm import run_vllm

        run_vllm(args, write)


if __name__ == "__main__":
    main()
