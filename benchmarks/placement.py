"""The planner against all placements: what its choice serves, of what the best one does.

    python benchmarks/placement.py [--only sd dit opt unlike both] [--devices 2 3 4] [--loads 0.8 1.1]
        [--seconds 20] [--policy priced] [--json FILE]

All placements whose devices serve stages that follow each other are simulated on the same arrivals. Loads are
shares of what all devices together can carry by their charges. The planner is to be within 2 percent of the best.
`sd`, `dit`, `opt`: Stable Diffusion on H100s, DiT-XL on RTX 4090s, OPT-13B on A6000s. `unlike`: Stable Diffusion on
an H100 and RTX 4090s for the rest. `both`: Stable Diffusion and OPT on the same devices.
"""

from __future__ import annotations

import argparse
import json
import time
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from arguments import at_least_one

from neustream.cluster.book import asked_of
from neustream.cluster.planning import Settings
from neustream.cluster.planning.capacity import placements
from neustream.cluster.planning.cuts import segments
from neustream.config import load_config
from neustream.config.cluster import ClusterConfig
from neustream.engine.report import Report
from neustream.experiment.placements import Ground, ground_of, last_of, plan_for, span_of
from neustream.experiment.prepared import Prepared, prepare
from neustream.experiment.running import simulate

PROFILES = Path(__file__).parent.parent / "profiles"
SD = {
    "profiles": str(PROFILES / "h100/sd15_512"),
    "stages": {
        "clip": {"max_batch": 10},
        "unet": {"times": "steps", "max_batch": 15},
        "vae": {"profile": ["vae", "safety"]},
    },
    "workload": {"cv": 2, "steps": {"min": 30, "max": 50}},
    "slo": {"scale": 3},
}
DIT = {
    "profiles": str(PROFILES / "rtx4090/dit_xl2_256"),
    "stages": {"dit": {"times": "steps", "max_batch": 20}, "vae": {"max_batch": 10}},
    "workload": {"cv": 2, "steps": {"min": 20, "max": 50}},
    "slo": {"scale": 3},
}
OPT = {
    "profiles": str(PROFILES / "a6000/opt_13b"),
    "llm": {"max_batch": 64, "memory": {"tokens": 16000}},
    "workload": {
        "prompt": {"median": 70, "sigma": 1.1, "max": 400},
        "output": {"min": 1, "max": 100},
        "max_tokens": 100,
    },
    "slo": {"first_s": 1.0, "step_s": 0.1},
}
SETTINGS: dict[str, dict[str, Any]] = {
    "sd": SD,
    "dit": DIT,
    "opt": OPT,
    "unlike": SD,
    "both": {"models": {"sd": SD, "opt": OPT}},
}
NETWORK = {"token_bytes": 819200, "state_bytes": 272000, "bandwidth": 3e9}


def config_of(name: str, devices: int, rate: float, seconds: float, folder: Path, policy: str) -> Path:
    """A config file of a setting."""
    values = json.loads(json.dumps(SETTINGS[name]))
    requests = max(round(rate * seconds), 2)
    parts = values.get("models", {"": values}).values()
    for part in parts:
        part["workload"] |= {"rate": rate / len(parts), "requests": max(requests // len(parts), 2)}
    instances: Any = devices
    if name == "unlike":
        slow = {"count": devices - 1, "profiles": str(PROFILES / "rtx4090/sd15_512")}
        instances = {"h100": {"count": 1}, "rtx4090": slow}
    values |= {
        "name": name,
        "policies": {policy: {}},
        "simulation": {"mixed_devices": True},
        "cluster": {"instances": instances, "network": NETWORK},
    }
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def serve(policy: str, prepared: Prepared, cluster: ClusterConfig) -> Report:
    return simulate(prepared, policy, cluster=cluster)


def prepared_at(
    name: str, devices: int, load: float, seconds: float, folder: Path, policy: str
) -> tuple[Ground, list[Any]]:
    """A setting whose load is a share of what its devices can carry together, and its requests."""
    rate = float(devices)
    for _ in range(2):
        prepared = prepare(load_config(config_of(name, devices, rate, seconds, folder, policy)))
        cluster = prepared.experiments[0].cluster
        assert cluster is not None
        ground = ground_of(prepared, cluster)
        requests = last_of(prepared.requests, seconds)
        charges = ground.charges([asked_of(one) for one in requests], span_of(requests))
        rate = load * sum(
            device.count / charges.total(device.name, charges.stages) for device in charges.devices.values()
        )
    return ground, requests


def compare(name: str, devices: int, load: float, seconds: float, folder: Path, policy: str) -> dict[str, Any]:
    """What the planner's choice serves at a point, beside the best of all placements."""
    ground, requests = prepared_at(name, devices, load, seconds, folder, policy)
    began = time.process_time()
    plan, charges = plan_for(ground, requests, partial(serve, policy), Settings())
    planning = time.process_time() - began
    served = {one.placement: one.goodput for one in plan.candidates}
    span = span_of(requests)
    some = Prepared(**{**vars(ground.prepared), "requests": requests})
    for placement in placements(charges, segments(charges.stages)):
        if placement not in served:
            report = serve(policy, some, ground.with_placement(placement))
            served[placement] = report.counts["on_time"] / span
    best = max(served, key=served.__getitem__)
    return {
        "setting": name,
        "devices": devices,
        "load": load,
        "requests": len(requests),
        "placements": len(served),
        "simulated": len(plan.candidates),
        "planning_s": round(planning, 1),
        "chosen": str(plan.placement),
        "goodput_rps": plan.best.goodput,
        "best": str(best),
        "best_rps": served[best],
        "share": plan.best.goodput / served[best] if served[best] else 1.0,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(SETTINGS), default=list(SETTINGS))
    parser.add_argument("--devices", nargs="+", type=at_least_one, default=[2, 3, 4])
    parser.add_argument("--loads", nargs="+", type=float, default=[0.8, 1.1])
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--policy", default="priced")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--scratch", type=Path, default=Path("out"))
    args = parser.parse_args()
    args.scratch.mkdir(parents=True, exist_ok=True)
    rows = []
    for name in args.only:
        for devices in args.devices:
            for load in args.loads:
                row = compare(name, devices, load, args.seconds, args.scratch, args.policy)
                rows.append(row)
                print(
                    f"{name} x{devices} at {load:g}: {row['share']:.1%} of the best of {row['placements']}, "
                    f"{row['simulated']} simulated in {row['planning_s']} s; {row['chosen']} | best {row['best']}",
                    flush=True,
                )
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")
    print(f"least share: {min(row['share'] for row in rows):.1%}")


if __name__ == "__main__":
    main()
