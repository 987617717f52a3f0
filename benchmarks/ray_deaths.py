"""What requests on two local nodes of a real Ray lose: when an instance is killed under load, and when they move.

    .venv-ray/bin/python benchmarks/ray_deaths.py [--requests 200] [--moves 40] [--state-kb 300]

Steps sleep, so that nothing competes for the cores. After a kill -9 of one of two instances each request has to
be answered once, its stream without gap or repeat; the first request is sent again after so many milliseconds.
The downtime of a move is from being held at the end of a step to being taken elsewhere.
"""

from __future__ import annotations

import argparse
import collections
import logging
import os
import signal
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from arguments import at_least_one

import neustream
from neustream import Graph, Service, Stage, loop
from neustream.cluster.happenings import Happening, Lost, Restarted, Routed
from neustream.core.batch import StepInput
from neustream.core.profile import TableProfile
from neustream.engine.clock import stopwatch

STEP_S = 0.01
WORDS = 20


class Says:
    """A stage that says numbers, one a step, and keeps so many bytes of each request by itself."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._kept: dict[str, Any] = {}

    def load(self, device: str) -> None:
        pass

    def step(self, inputs: Sequence[StepInput]) -> list[dict[str, Any]]:
        time.sleep(STEP_S)
        return [self._say(given) for given in inputs]

    def _say(self, given: StepInput) -> dict[str, Any]:
        kept = self._kept.setdefault(given.id, np.zeros(self._size, np.uint8))
        kept[0] += 1
        return {"said": int(kept[0])}

    def release(self, id: str) -> None:
        self._kept.pop(id, None)

    def export(self, given: StepInput) -> Any:
        return self._kept[given.id]

    def adopt(self, given: StepInput, piece: Any) -> None:
        self._kept[given.id] = piece.copy()


def maker(size: int) -> Callable[[str], Service]:
    """Makes the service of an instance whose requests keep so many bytes."""

    def make(device: str) -> Service:
        graph = Graph("says", loop(Stage("say", max_batch=8, emits=True), times=lambda job: job.params["words"]))
        profile = TableProfile("say", range(1, 9), [STEP_S] * 8)
        return neustream.serve(graph, {"say": Says(size)}, {"say": profile}, policy="fcfs", slo=600.0)

    return make


def kill(address: str, requests: int) -> None:
    """Kill one of two instances under load, and say what came of it."""
    again: list[float] = []
    noticed: list[float] = []

    def happened(event: Happening) -> None:
        if isinstance(event, Lost):
            noticed.append(stopwatch())
        elif isinstance(event, Restarted):
            restarted.add(event.id)
        elif isinstance(event, Routed) and event.id in restarted:
            again.append(stopwatch())

    restarted: set[str] = set()
    with neustream.Cluster(maker(1000), instances=2, address=address, watchers=[happened]) as cluster:
        answers = [cluster.submit(words=WORDS) for _ in range(requests)]
        for answer in answers[:4]:
            next(iter(answer))
        name, pid = next(iter(cluster.pids.items()))
        at = stopwatch()
        os.kill(pid, signal.SIGKILL)
        ends = collections.Counter(answer.outcome(120).status for answer in answers)
        whole = sum(
            [output.update["item"]["said"] for output in answer.outputs] == [*range(1, WORDS + 1)] for answer in answers
        )
        counts = cluster.counts
    told = ", ".join(f"{count} {status}" for status, count in sorted(ends.items()))
    print(f"killed {name} of two under {requests} requests: {told}; {whole} streams without gap or repeat")
    print(f"  noticed after {1e3 * (noticed[0] - at):.1f} ms; sent again: {len(again)}, the first after ", end="")
    print(f"{1e3 * (min(again) - at):.1f} ms; instances lost: {counts.lost}")


def move(address: str, moves: int, size: int) -> None:
    """Have a request go to and fro, and say for how long it stood still."""
    with neustream.Cluster(maker(size), instances=2, address=address) as cluster:
        places = list(cluster.instances)
        answer = cluster.submit(words=250, id="m")
        reading = iter(answer)
        for number in range(moves):
            next(reading)
            moved, source = cluster.counts.moved, answer.outputs[-1].member
            cluster.move("m", places[1] if source == places[0] else places[0])
            while cluster.counts.moved == moved and number < moves:
                next(reading)
        answer.result(60)
        said = [output.update["item"]["said"] for output in answer.outputs]
        down = [1e3 * seconds for seconds in cluster.counts.downtimes_s]
    exact = said == [*range(1, 251)]
    print(
        f"{len(down)} moves of {size:,} bytes: downtime p50 {statistics.median(down):.1f}, most {max(down):.1f} ms; ",
        end="",
    )
    print("no gap, no repeat" if exact else f"WRONG: {said}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=at_least_one, default=200)
    parser.add_argument("--moves", type=at_least_one, default=40)
    parser.add_argument("--state-kb", type=at_least_one, default=300)
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    from ray.cluster_utils import Cluster as Nodes

    nodes = Nodes(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
    try:
        nodes.add_node(num_cpus=2)
        kill(nodes.address, options.requests)
        move(nodes.address, options.moves, 1000 * options.state_kb)
    finally:
        nodes.shutdown()


if __name__ == "__main__":
    main()
