"""How soon the front answers those who watch it while many streams are open.

    python benchmarks/http_probes.py [--streams 1024] [--step-ms 1000] [--seconds 20]

No model: a thread brings every stream a token each `--step-ms`, as in `http_front.py`, to a client in a process of its
own. Another process asks for /health and /metrics in turns, on connections of their own, as probes do, and at last for
the dashboard's first data. Told: milliseconds from connecting to the last byte (of the dashboard: to the first data).
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import time
import urllib.request
from collections.abc import Sequence

from arguments import at_least_one
from http_front import PROMPT, Tokens, front
from http_load import HOST, streamed
from rich.console import Console

from neustream.analysis.tables import new_table
from neustream.server.lifecycle import keep_still

ASKED = {"/health": 20.0, "/metrics": 10.0, "/ui/events": 2000.0}
"""Milliseconds in which there is to be an answer, by what is asked."""
PAUSE_S = 0.05


def probed(port: int, seconds: float, streams: int) -> dict[str, list[float]]:
    """Milliseconds of each answer, by path, once all streams are open."""
    while opened(port) < streams:
        time.sleep(PAUSE_S)
    found: dict[str, list[float]] = {path: [] for path in ASKED}
    until = time.perf_counter() + seconds
    while time.perf_counter() < until:
        for path in ("/health", "/metrics"):
            found[path].append(asked(port, path))
            time.sleep(PAUSE_S)
    found["/ui/events"].append(asked(port, "/ui/events"))
    return found


def asked(port: int, path: str) -> float:
    """Milliseconds until an answer was there; of events, until the first was."""
    began = time.perf_counter()
    with urllib.request.urlopen(f"http://{HOST}:{port}{path}", timeout=60) as answer:
        content = answer.readline() if path == "/ui/events" else answer.read()
    if path == "/ui/events":
        json.loads(content.removeprefix(b"data: "))
    return (time.perf_counter() - began) * 1e3


def opened(port: int) -> int:
    """Streams that are open."""
    with urllib.request.urlopen(f"http://{HOST}:{port}/metrics", timeout=60) as answer:
        lines = answer.read().decode().splitlines()
    return int(float(next(line for line in lines if line.startswith("neustream:http_streams ")).split()[1]))


def quantile(found: Sequence[float], share: float) -> float:
    """The value that so large a share is at most."""
    return sorted(found)[min(int(share * len(found)), len(found) - 1)]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=at_least_one, default=1024)
    parser.add_argument("--step-ms", type=float, default=1000.0)
    parser.add_argument("--seconds", type=float, default=20.0)
    options = parser.parse_args(arguments)
    step_s = options.step_ms / 1e3
    tokens = int((options.seconds + 20) / step_s)
    port = front(Tokens(tokens, step_s))
    keep_still()
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        pool.apply_async(streamed, (port, PROMPT, options.streams, tokens))
        found = pool.apply(probed, (port, options.seconds, options.streams))
        pool.terminate()
    title = f"{options.streams} streams, a token each {options.step_ms:g} ms: ms until an answer"
    table = new_table(title, "", ["asked for", "median", "p99", "most", "times"])
    for path, each in found.items():
        told = [ASKED[path], statistics.median(each), quantile(each, 0.99), max(each)]
        table.add_row(path, *[f"{ms:.1f}" for ms in told], str(len(each)))
    Console(markup=False, highlight=False).print(table)


if __name__ == "__main__":
    main()
