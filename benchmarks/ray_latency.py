"""What a cluster on Ray adds to the latency of the service in it: the same requests here and there, in turns.

    .venv-ray/bin/python benchmarks/ray_latency.py [--requests 300] [--step-ms 2] [--steps 5] [--unlike]

One request at a time, so that nothing waits for anything but messages; steps sleep, so that nothing competes
for the cores. With --unlike no two requests are alike: an instance looks at each before it is routed.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

from arguments import at_least_one

import neustream
from neustream import Graph, Service, Stage, loop
from neustream.core.batch import StepInput
from neustream.core.profile import TableProfile


class Sleeps:
    """A stage whose steps take their time and no CPU."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds

    def load(self, device: str) -> None:
        pass

    def step(self, inputs: Sequence[StepInput]) -> list[dict[str, Any]]:
        time.sleep(self._seconds)
        return [{} for _ in inputs]


def maker(steps: int, seconds: float) -> Callable[[str], Service]:
    """Makes the service of an instance."""

    def make(device: str) -> Service:
        graph = Graph("sleeps", loop(Stage("sleep", max_batch=8), times=steps))
        profile = TableProfile("sleep", [1, 8], [seconds, seconds])
        return neustream.serve(graph, {"sleep": Sleeps(seconds)}, {"sleep": profile}, slo=60.0)

    return make


def took(submit: Callable[..., neustream.Answer[Any]], **params: object) -> float:
    """Seconds from asking to having."""
    since = time.perf_counter()
    submit(params).result(60)
    return time.perf_counter() - since


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=at_least_one, default=300)
    parser.add_argument("--steps", type=at_least_one, default=5)
    parser.add_argument("--step-ms", type=float, default=2.0)
    parser.add_argument("--unlike", action="store_true")
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    make = maker(options.steps, options.step_ms / 1e3)
    here, there = [], []
    with make("cpu") as service, neustream.Cluster(make, instances=1) as cluster:
        for number in range(20 + options.requests):
            params = {f"name{number}" if options.unlike else "name": number}
            one, other = took(service.submit, **params), took(cluster.submit, **params)
            if number >= 20:
                here.append(1e3 * one)
                there.append(1e3 * other)
    added = [other - one for one, other in zip(here, there, strict=True)]
    for name, each in (("service", here), ("cluster", there), ("added", added)):
        low, median, high = (statistics.quantiles(each, n=100)[at] for at in (9, 49, 89))
        print(f"{name:8} p10 {low:6.2f}  p50 {median:6.2f}  p90 {high:6.2f} ms")


if __name__ == "__main__":
    main()
