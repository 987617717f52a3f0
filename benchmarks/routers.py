"""What routing is worth: all routers of clusters on the settings in which they were compared, simulated.

    python benchmarks/routers.py [--only unlike_19 slow] [--seeds 0] [--requests 800] [--out benchmarks/results]
    python benchmarks/routers.py --only unlike_19 --bound  # what no routing, batching and moving can exceed
    python benchmarks/routers.py --only unlike_19 --moves  # `slack`, and what would be late moves, which takes no time

`priced` decides in each instance, with the artifact's latency tables; arrivals have a cv of 2. A number is the share of
the requests on time, the mean over seeds. `slack`, the default, is to be within half a point of the best rule in each
setting, and two points or more before the best baseline where devices or promises differ and where one is slow.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

from arguments import at_least_one

from neustream.analysis.headroom import bound_of
from neustream.config.schema import StagesExperiment
from neustream.experiment.prepared import prepare
from neustream.experiment.running import simulate

PROFILES = Path(__file__).parent.parent / "profiles"
BASELINES = ("round_robin", "random", "two_choices", "least_requests", "least_work")
ROUTERS = ("slack", *BASELINES, "headroom", "tiered")
"""Those for language models (freeness, prefix) are in benchmarks/llumnix.py."""
SD = {
    "profiles": PROFILES / "h100/sd15_512",
    "stages": {
        "clip": {"max_batch": 10},
        "unet": {"times": "steps", "max_batch": 15},
        "vae": {"profile": ["vae", "safety"]},
    },
}
STEPS = {"min": 30, "max": 50}
UNLIKE = {"h100": {"count": 4}, "rtx4090": {"count": 4, "profiles": PROFILES / "rtx4090/sd15_512"}}
TWO_CLASSES = {"classes": [{"name": "tight", "scale": 1.3}, {"name": "loose", "scale": 4}]}
SLOW = [{"at_s": 30, "instance": 0, "kind": "slow", "factor": 3}]
SETTINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "sd": ("8 H100, SD 512, all alike, 2.2/s each", {"instances": 8, "rate": 17.6}),
    "unlike_15": ("4 H100 and 4 RTX 4090, 1.5/s each", {"instances": UNLIKE, "rate": 12}),
    "unlike_19": ("the same, 1.9/s each", {"instances": UNLIKE, "rate": 15.2}),
    "classes_10": (
        "the same, half of the promises 1.3 times, half 4 times solo, 1.0/s each",
        {"instances": UNLIKE, "rate": 8, "slo": TWO_CLASSES},
    ),
    "classes_13": ("the same, 1.3/s each", {"instances": UNLIKE, "rate": 10.4, "slo": TWO_CLASSES}),
    "steps": (
        "8 H100, 10, 30, 50 or 100 steps, SLO 2 times solo, 1.1/s each",
        {"instances": 8, "rate": 8.8, "slo": {"scale": 2}, "steps": {"choices": [10, 30, 50, 100]}},
    ),
    "slow": (
        "8 H100, one three times slower from 30 s on, 0.9/s each",
        {"instances": 8, "rate": 7.2, "faults": SLOW},
    ),
    "crash": (
        "8 H100, one crashes at 30 s, 0.9/s each",
        {"instances": 8, "rate": 7.2, "faults": [{"at_s": 30, "instance": 0, "kind": "crash"}]},
    ),
}
"""By name: what it is, and what differs from SD 512 with promises of three times what a request takes alone."""
DIFFER = ("unlike_15", "unlike_19", "classes_10", "classes_13", "slow")
"""Settings in which devices or promises differ."""
WITHIN, AHEAD = 0.5, 2.0
"""Points that the default may be behind the best rule, and is to be before the best baseline where they differ."""


def experiment(name: str, router: str, seed: int, requests: int) -> StagesExperiment:
    """A setting under one router."""
    return made_of(name, SETTINGS[name][1], router, seed, requests)


def made_of(name: str, given: dict[str, Any], router: str, seed: int, requests: int) -> StagesExperiment:
    """The same of what differs from SD 512 with promises of three times what a request takes alone."""
    steps = given.get("steps", STEPS)
    return StagesExperiment.model_validate(
        {
            "name": name,
            **SD,
            "workload": {"rate": given["rate"], "cv": 2, "requests": requests, "seed": seed, "steps": steps},
            "slo": given.get("slo", {"scale": 3}),
            "policies": {"priced": {}},
            "simulation": {"mixed_devices": True},
            "cluster": {"instances": given["instances"], "router": router, "faults": given.get("faults", [])},
        }
    )


def attainments(name: str, seeds: list[int], requests: int) -> dict[str, float]:
    """The share on time by router."""
    found = {}
    for router in ROUTERS:
        runs = [simulate(prepare(experiment(name, router, seed, requests)), "priced").attainment for seed in seeds]
        found[router] = round(statistics.fmean(runs), 4)
    return found


def moving(name: str, seeds: list[int], requests: int) -> float:
    """The share on time under `slack`, where requests that would be late move at once to where they would not be."""
    free = {
        "mover": {"rescue": {}},
        "network": {"delay_s": 0.0, "report_s": 0.0, "bandwidth": 1e15},
        "failure": {"move_s": 0.1},
    }
    found = []
    for seed in seeds:
        given = experiment(name, "slack", seed, requests).model_dump(mode="json", exclude_unset=True)
        given["cluster"] |= free
        found.append(simulate(prepare(StagesExperiment.model_validate(given)), "priced").attainment)
    return round(statistics.fmean(found), 4)


def bounds(name: str, seeds: list[int], requests: int) -> float:
    """The share on time that nothing can exceed."""
    found = [bound_of(prepare(experiment(name, "slack", seed, requests))).value / requests for seed in seeds]
    return round(statistics.fmean(found), 4)


def table(results: dict[str, dict[str, float]], command: str) -> str:
    """The results as a page."""
    lines = ["# What routing is worth", "", f"`{command}`; share of the requests on time, simulated.", ""]
    heads = ["setting", *ROUTERS, "`slack` less the best", "less the best baseline"]
    lines += [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    for name, found in results.items():
        ours, best = found["slack"], max(found.values())
        baseline = max(found[router] for router in BASELINES)
        shown = [f"**{share:.3f}**" if share == best else f"{share:.3f}" for share in found.values()]
        points = [f"{100 * (ours - best):+.1f}", f"{100 * (ours - baseline):+.1f}"]
        lines.append(f"| {' | '.join([SETTINGS[name][0], *shown, *points])} |")
    lines += ["", "Differences in points. Baselines: " + ", ".join(f"`{one}`" for one in BASELINES) + "."]
    return "\n".join([*lines, "", *against_each(results), "", *claims(results)])


def against_each(results: dict[str, dict[str, float]]) -> list[str]:
    """By setting, the points by which `slack` is before each other router."""
    others = [router for router in ROUTERS if router != "slack"]
    lines = ["## `slack` less each other router, in points", ""]
    lines += [f"| {' | '.join(['setting', *others])} |", "|" + "---|" * (1 + len(others))]
    for name, found in results.items():
        points = [f"{100 * (found['slack'] - found[router]):+.1f}" for router in others]
        lines.append(f"| {' | '.join([SETTINGS[name][0], *points])} |")
    return lines


def claims(results: dict[str, dict[str, float]]) -> list[str]:
    """What `slack` is to reach, and whether it does."""
    lines = ["## What it is to reach", ""]
    for name, found in results.items():
        ours = found["slack"]
        behind = 100 * (max(found.values()) - ours)
        verdict = "holds" if behind <= WITHIN + 1e-6 else "**fails**"
        lines.append(f"* {SETTINGS[name][0]}: within {WITHIN} points of the best {verdict} ({behind:.1f} behind).")
        if name in DIFFER:
            ahead = 100 * (ours - max(found[router] for router in BASELINES))
            verdict = "holds" if ahead >= AHEAD - 1e-6 else "**fails**"
            lines.append(f"  {AHEAD:g} points before the best baseline {verdict} ({ahead:+.1f}).")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--requests", type=at_least_one, default=800)
    parser.add_argument("--out", type=Path, help="Results that are there, of the same seeds and requests, are kept.")
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument("--bound", action="store_true", help="The bound of each setting in place of the routers.")
    instead.add_argument("--moves", action="store_true", help="`slack` with moves that take no time in their place.")
    asked = parser.parse_args()
    if asked.bound or asked.moves:
        for name in asked.only:
            share = (bounds if asked.bound else moving)(name, asked.seeds, asked.requests)
            print(name, share, flush=True)
        return
    seeds = " ".join(map(str, asked.seeds))
    command = f"python benchmarks/routers.py --seeds {seeds} --requests {asked.requests}"
    results = {} if asked.out is None else kept(asked.out / "routers.json", command)
    for name in asked.only:
        results[name] = attainments(name, asked.seeds, asked.requests)
        print(name, results[name], flush=True)
        if asked.out is not None:
            save(asked.out, command, {name: results[name] for name in SETTINGS if name in results})
    print(table(results, command))


def kept(path: Path, command: str) -> dict[str, dict[str, float]]:
    """What an earlier run of the same command computed, by setting."""
    found = json.loads(path.read_text()) if path.exists() else {}
    return dict(found["attainment"]) if found.get("command") == command else {}


def save(out: Path, command: str, results: dict[str, dict[str, float]]) -> None:
    """Write the results, as JSON and as a page."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "routers.json").write_text(json.dumps({"command": command, "attainment": results}, indent=1) + "\n")
    (out / "routers.md").write_text(table(results, command) + "\n")


if __name__ == "__main__":
    main()
