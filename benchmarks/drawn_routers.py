"""Routers on settings that were drawn: unlike devices, mixed promises, a slow instance, steps that differ, a crash.

    python benchmarks/drawn_routers.py [--first 0] [--count 20] [--requests 400] [--routers slack least_work ...]

Setting N is drawn with seed N, its requests too. A line says what it is, how many are on time under each router, and by
how many points `slack` is before the best of the others: below -0.5 a setting is to be looked at.
"""

from __future__ import annotations

import argparse
import random
from typing import Any

from arguments import at_least_one
from routers import PROFILES, ROUTERS, made_of

from neustream.experiment.prepared import prepare
from neustream.experiment.running import simulate

KINDS = ("unlike", "classes", "slow", "steps", "crash")
ON_H100 = 2.0
"""Requests of 30 to 50 steps a second that an H100 serves; an RTX 4090 serves three quarters of that."""


def drawn(seed: int) -> tuple[str, dict[str, Any]]:
    """What setting `seed` is, and what differs from SD 512 on H100s with one promise for all."""
    draw = random.Random(seed)
    kind = KINDS[seed % len(KINDS)]
    new, old = draw.randint(2, 6), draw.randint(2, 6)
    load = draw.uniform(0.5, 1.05)
    unlike = kind in ("unlike", "classes") or draw.random() < 0.3
    given: dict[str, Any] = {"instances": new + old, "slo": {"scale": round(draw.uniform(1.5, 5.0), 2)}}
    capacity = ON_H100 * (new + old)
    if unlike:
        device = {"count": old, "profiles": PROFILES / "rtx4090/sd15_512"}
        given["instances"] = {"h100": {"count": new}, "rtx4090": device}
        capacity = ON_H100 * (new + 0.75 * old)
    if kind == "classes":
        tight, loose = round(draw.uniform(1.2, 2.0), 2), round(draw.uniform(3.0, 10.0), 1)
        given["slo"] = {"classes": [{"name": "tight", "scale": tight}, {"name": "loose", "scale": loose}]}
    if kind == "steps":
        given["steps"] = {"choices": sorted(draw.sample([5, 10, 20, 30, 50, 80, 120], 3))}
        capacity *= 40 / (sum(given["steps"]["choices"]) / 3)
    if kind == "slow":
        given["faults"] = [{"at_s": 10, "instance": 0, "kind": "slow", "factor": round(draw.uniform(1.5, 4.0), 1)}]
    if kind == "crash":
        given["faults"] = [{"at_s": 10, "instance": 0, "kind": "crash"}]
    given["rate"] = round(load * capacity, 2)
    devices = f"{new} H100 and {old} RTX 4090" if unlike else f"{new + old} H100"
    about = {name: given[name] for name in ("slo", "steps", "faults") if name in given}
    return f"{kind}: {devices}, {given['rate']}/s, load {load:.2f}, {about}", given


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--count", type=at_least_one, default=20)
    parser.add_argument("--requests", type=at_least_one, default=400)
    parser.add_argument("--routers", nargs="+", choices=ROUTERS, default=list(ROUTERS))
    asked = parser.parse_args()
    if "slack" not in asked.routers or len({*asked.routers}) < 2:
        parser.error("--routers: slack and at least one other")
    for seed in range(asked.first, asked.first + asked.count):
        what, given = drawn(seed)
        found = {}
        for router in asked.routers:
            prepared = prepare(made_of(f"drawn{seed}", given, router, seed, asked.requests))
            found[router] = simulate(prepared, "priced").counts["on_time"]
        best = max([count for router, count in found.items() if router != "slack"])
        ahead = 100 * (found["slack"] - best) / asked.requests
        print(f"{seed} {ahead:+.1f} {found} {what}", flush=True)


if __name__ == "__main__":
    main()
