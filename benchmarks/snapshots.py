"""What copies of requests in the middle of their steps save where instances die, and what they cost, simulated.

    python benchmarks/snapshots.py [--every 0.25 1] [--only short long] [--seed 0]

Eight H100s serve Stable Diffusion, 30 to 50 steps (`short`) or 150 to 250 (`long`), under `slack` and `priced`. Each
of the eight first instances crashes once, 3 s apart, and is replaced at once. A copy is 280 KB: latents and embeddings
at 512 pixels. Printed are requests on time, without copies and with one every so many seconds.
"""

from __future__ import annotations

import argparse

import routers
from arguments import at_least_one

from neustream.config.schema import StagesExperiment
from neustream.experiment.prepared import prepare
from neustream.experiment.running import simulate

KINDS = {"short": ({"min": 30, "max": 50}, 9.0, 360), "long": ({"min": 150, "max": 250}, 2.0, 120)}
"""Steps, requests a second, requests."""
INSTANCES = 8
CRASHES = [{"at_s": 4 + 3 * number, "instance": number, "kind": "crash"} for number in range(INSTANCES)]


def experiment(kind: str, scale: float, every: float | None, *, crashes: bool, seed: int) -> StagesExperiment:
    """A setting; `every`: seconds between copies, None: there are none."""
    steps, rate, requests = KINDS[kind]
    return StagesExperiment.model_validate(
        {
            "name": kind,
            **routers.SD,
            "workload": {"rate": rate, "cv": 2, "requests": requests, "seed": seed, "steps": steps},
            "slo": {"scale": scale},
            "policies": {"priced": {}},
            "cluster": {
                "instances": INSTANCES,
                "router": "slack",
                "scaler": {"fixed": {"count": INSTANCES}},
                "network": {"state_bytes": 280_000, "delay_s": 0.0007},
                "failure": {} if every is None else {"snapshot_s": every},
                "faults": CRASHES if crashes else [],
            },
        }
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--every", type=float, nargs="+", default=[0.25, 1.0], help="seconds")
    parser.add_argument("--only", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--scales", type=float, nargs="+", default=[1.5, 3.0], help="promises, times solo")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--requests", type=at_least_one, help="fewer than usual")
    asked = parser.parse_args()
    for kind in asked.only:
        if asked.requests:
            KINDS[kind] = (*KINDS[kind][:2], asked.requests)
        for scale in asked.scales:
            for crashes in (True, False):
                found = []
                for every in (None, *asked.every):
                    setting = experiment(kind, scale, every, crashes=crashes, seed=asked.seed)
                    report = simulate(prepare(setting), "priced")
                    copies = report.to_dict()["cluster"].get("snapshots", {})
                    found.append(f"{every or 'none'}: {report.counts['on_time']} {copies or ''}".strip())
                what = "each instance crashes" if crashes else "nothing fails"
                total = KINDS[kind][2]
                print(f"{kind}, {scale:g} times solo, {what}, on time of {total}: " + "; ".join(found), flush=True)


if __name__ == "__main__":
    main()
