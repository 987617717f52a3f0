"""The paper's diffusion sweeps, ours beside the artifact's logs.

    python benchmarks/paper_diffusion.py [--quick] [--jobs N]

Simulates every sweep of every config in configs/paper (500 requests, the artifact's trace) under
`clockwork`, `neustream` and `fcfs`, and writes benchmarks/results/paper_diffusion.{json,md}: requests
on time of 500, the artifact's own count where its logs are public, and the mean absolute error over
the points of a sweep at SLO 2 and above. `--quick` does the rate sweeps alone and writes nothing.

Rows with a star are of the artifact's processes (`AS_DEPLOYED`): there the stages of a pipeline were
processes that shared the device, so that a VAE took longer while the denoiser ran, which no policy
here brings about.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from arguments import at_least_one
from rich.progress import Progress

from neustream import __version__
from neustream.config import StagesExperiment, load_experiment
from neustream.experiment import prepare, simulate, sweep_points

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results"
POLICIES = ("clockwork", "neustream", "fcfs")
SWEEPS = ("workload.rate", "workload.cv", "slo.scale")
AS_DEPLOYED = {
    "sd15_512_rtx4090": [
        "simulation={truth: {unet: [unet_served], vae: [vae_served]}}",
        "policies.clockwork.plan={unet: [unet]}",
    ]
}
"""Changes to configs whose steps took otherwise in the artifact's processes: periods in its logs.

Its Clockwork let the device wait for its plan.
"""
STAR = "*"


def tasks(quick: bool) -> list[tuple[str, str, float]]:
    """(config, what is swept, value) of every point."""
    found = []
    for path in sorted((ROOT / "configs/paper").glob("*.yaml")):
        setting = load_experiment(path)
        if not isinstance(setting, StagesExperiment):  # benchmarks/llm.py, benchmarks/agents.py
            continue
        sweeps = setting.sweeps
        for over in SWEEPS[:1] if quick else SWEEPS:
            found += [(path.stem, over, value) for value in sweeps[over].values]
    return found


def point(task: tuple[str, str, float]) -> dict[str, Any]:
    """Requests on time at one point, by policy."""
    name, over, value = task
    on_time = on_time_at(task, POLICIES, [])
    if name in AS_DEPLOYED:
        again = on_time_at(task, POLICIES[:2], AS_DEPLOYED[name])
        on_time |= {policy + STAR: count for policy, count in again.items()}
    return {"config": name, "over": over, "value": value, "on_time": on_time}


def on_time_at(task: tuple[str, str, float], policies: Sequence[str], changes: Sequence[str]) -> dict[str, int]:
    """Requests on time at one point of a changed config, by policy."""
    name, over, value = task
    path = ROOT / "configs/paper" / f"{name}.yaml"
    held = [f"{key}={x}" for key, x in load_experiment(path).sweeps[over].at.items()]
    ((_, experiment),) = sweep_points(load_experiment(path, [*held, *changes]), over, [value])
    prepared = prepare(experiment)
    return {policy: simulate(prepared, policy).counts["on_time"] for policy in policies}


def logged_counts(logged: dict[str, Any] | None, policy: str) -> dict[float, int]:
    """What the artifact's logs say of a policy, by the value of what is swept; empty if nothing."""
    counts = (logged or {}).get(policy.removesuffix(STAR), [])
    return dict(zip(logged["values"], counts, strict=True)) if logged and counts else {}


def error(points: list[dict[str, Any]], theirs: dict[float, int], policy: str, lost: int = 0) -> float:
    """Mean absolute error against the logs, in requests, at SLO 2 and above.

    `lost`: requests that each run of theirs lost at its end, which count as served here.
    """
    rows = [p for p in points if p["value"] in theirs and not (p["over"] == "slo.scale" and p["value"] < 2)]
    total: int = sum(abs(p["on_time"][policy] - theirs[p["value"]] - lost) for p in rows)
    return total / len(rows)


def errors(rows: list[dict[str, Any]], logged: dict[str, Any], lost: int) -> str:
    """A sentence with the error of each policy that the logs tell of."""
    told = []
    for policy in rows[0]["on_time"]:
        if theirs := logged_counts(logged, policy):
            told.append(f"{policy} {error(rows, theirs, policy):.1f}")
            if lost and policy.startswith("neustream"):
                told[-1] += f" ({error(rows, theirs, policy, lost):.1f} but for the {lost} lost at the end of each run)"
    return f"Mean absolute error in requests: {', '.join(told)}."


def markdown(points: list[dict[str, Any]], logs: dict[str, Any]) -> str:
    """One table a sweep."""
    lines = ["# The paper's diffusion sweeps, simulated", ""]
    lines += ["Requests on time of 500; `a (b)`: ours (the artifact's logs, where they are public)."]
    lines += ["A star: with the steps as they took in the artifact's processes, which shared the device.", ""]
    for name in dict.fromkeys(p["config"] for p in points):
        for over in dict.fromkeys(p["over"] for p in points if p["config"] == name):
            rows = [p for p in points if (p["config"], p["over"]) == (name, over)]
            logged = logs.get(name, {}).get(over)
            lines += [f"## {name}, {over}", "", "| " + " | ".join([over, *(f"{p['value']:g}" for p in rows)]) + " |"]
            lines.append("|" + "---|" * (len(rows) + 1))
            for policy in rows[0]["on_time"]:
                theirs = logged_counts(logged, policy)
                cells = [str(p["on_time"][policy]) for p in rows]
                for at, p in enumerate(rows):
                    if p["value"] in theirs:
                        cells[at] += f" ({theirs[p['value']]})"
                lines.append("| " + " | ".join([policy.replace(STAR, "\\*"), *cells]) + " |")
            if logged:
                lines += ["", errors(rows, logged, logs[name].get("lost_at_the_end", 0))]
            lines.append("")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the rate sweeps alone; print, write nothing")
    parser.add_argument("--jobs", type=at_least_one, default=os.cpu_count() or 1, help="processes")
    args = parser.parse_args()
    todo = tasks(args.quick)
    points = []
    with Progress() as progress, ProcessPoolExecutor(args.jobs) as pool:
        for done in progress.track(pool.map(point, todo), total=len(todo), description="simulating"):
            points.append(done)
    logs = json.loads((Path(__file__).parent / "artifact_results.json").read_text())
    text = markdown(points, logs)
    if args.quick:
        print(text)
        return
    origin = {"command": "python benchmarks/paper_diffusion.py", "neustream": __version__, "seed": 0}
    origin["python"] = platform.python_version()
    RESULTS.mkdir(exist_ok=True)
    compact = ",\n  ".join(json.dumps(p) for p in points)
    (RESULTS / "paper_diffusion.json").write_text(f'{{"origin": {json.dumps(origin)}, "points": [\n  {compact}\n]}}\n')
    (RESULTS / "paper_diffusion.md").write_text(text)
    print(text)
    print(f"wrote {RESULTS / 'paper_diffusion.json'} and .md")


if __name__ == "__main__":
    main()
