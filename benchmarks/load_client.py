"""What `neustream bench` itself costs, and how far what it measures is from what a server did.

    python benchmarks/load_client.py [--rate 200] [--tokens 20] [--seconds 10] [--rounds 3]
    python benchmarks/load_client.py --search [--places 5] [--start 0.14]
    python benchmarks/load_client.py --arrivals

A stub in a process of its own answers with streams of `--tokens` tokens, 5 ms apart after 20 ms. It
logs when it had read a request, and when it sent each token. Requests come as a Poisson process. Printed, for
each round: the client's time of the processor for each event; its lag; by how much its TTFT (from the sending) is
beyond the log's, and its ITLs off the log's. What this machine takes to bring a byte over is in both.

`--search`: the stub serves `--places` requests at a time, 50 ms each by its own account: a place is free
when the 50 ms are over, not when the stub gets to it. So its capacity is known on a busy machine too. The search is
to find it, from `--start` times the capacity. Arrivals are evenly spaced there.

`--arrivals`: the gaps of 20 seeds by Kolmogorov's and Smirnov's test, and their mean rates.
"""

from __future__ import annotations

import argparse
import asyncio
import heapq
import json
import multiprocessing
import sys
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
from arguments import at_least_one
from rich.console import Console

from neustream.analysis.tables import new_table
from neustream.bench.load import Load
from neustream.bench.plan import Target
from neustream.bench.planning import Timing, plan_of
from neustream.bench.runs import Run
from neustream.bench.search import Goal, Search
from neustream.engine.clock import stopwatch
from neustream.workload.arrivals import gamma_arrivals
from neustream.workload.asks import Ask, Limits
from neustream.workload.mixing import with_limits

FIRST_S, GAP_S, SERVICE_S = 0.02, 0.005, 0.05
HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
SERVED = b'{"object":"list","data":[{"id":"m"}]}'
MODELS = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%s" % (len(SERVED), SERVED)
Log = dict[str, list[float]]
"""When a request had been read, and when each of its tokens was sent, by request."""
SEEDS, GAPS = 20, 2000


@dataclass
class Stub:
    """The server: `places` bounds how many are served at a time (0: all), each for `SERVICE_S` then."""

    places: int

    async def main(self, pipe: Connection) -> None:
        self.log: Log = {}
        self.free = [0.0] * self.places
        server = await asyncio.start_server(self.handle, "127.0.0.1", 0)
        pipe.send(server.sockets[0].getsockname()[1])
        over = asyncio.Event()
        asyncio.get_running_loop().add_reader(pipe.fileno(), over.set)
        await over.wait()
        pipe.send(self.log)
        server.close()

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                if head.startswith(b"GET"):  # what is served: asked by some
                    writer.write(MODELS)
                    continue
                (length,) = [line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length")]
                body = json.loads(await reader.readexactly(int(length.partition(b":")[2])))
                await self.answer(body, writer, stopwatch())
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()

    def first(self, came: float) -> float:
        """When the first token of a request is due."""
        if not self.places:
            return came + FIRST_S
        end = max(came, self.free[0]) + SERVICE_S
        heapq.heapreplace(self.free, end)
        return end

    async def answer(self, body: dict[str, Any], writer: asyncio.StreamWriter, came: float) -> None:
        sent = self.log.setdefault(str(body["prompt"]), [came])
        due, gap = self.first(came), 0.0 if self.places else GAP_S
        writer.write(HEAD)
        for at in range(body["max_tokens"]):
            await asyncio.sleep(max(0.0, due - stopwatch()))
            reason = '"length"' if at == body["max_tokens"] - 1 else "null"
            choice = f'{{"index":0,"text":" word","logprobs":null,"finish_reason":{reason}}}'
            event = f'data: {{"id":"cmpl-1","object":"text_completion","model":"m","choices":[{choice}]}}\n\n'
            writer.write(_chunk(event.encode()))
            sent.append(stopwatch())
            due += gap
        usage = {"prompt_tokens": len(body["prompt"]), "completion_tokens": body["max_tokens"]}
        last = json.dumps({"choices": [], "usage": {**usage, "total_tokens": sum(usage.values())}})
        writer.write(_chunk(f"data: {last}\n\ndata: [DONE]\n\n".encode()) + b"0\r\n\r\n")
        await writer.drain()


def _chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


def _serve(places: int, pipe: Connection) -> None:
    asyncio.run(Stub(places).main(pipe))


def with_stub(places: int, work: Callable[[str], Any]) -> tuple[Any, Log]:
    """What `work` makes of the stub's URL, and the stub's log."""
    ours, theirs = multiprocessing.get_context("spawn").Pipe()
    process = multiprocessing.get_context("spawn").Process(target=_serve, args=(places, theirs), daemon=True)
    process.start()
    try:
        found = work(f"http://127.0.0.1:{ours.recv()}")
        ours.send(None)
        return found, ours.recv()
    finally:
        process.kill()


def asks_of(number: int, tokens: int) -> list[Ask]:
    """Requests whose prompts are their names, so that the log knows them."""
    return [Ask(str(at), prompt=str(at), output_tokens=tokens) for at in range(number)]


def accuracy(options: argparse.Namespace) -> None:
    """Costs, lag, and the difference from the log."""
    rounds = [_round(options, seed) for seed in range(options.rounds)]
    table = new_table(f"{options.rate:g} requests/s", "", [f"round {seed}" for seed in range(options.rounds)])
    for name in rounds[0]:
        table.add_row(name, *(found[name] for found in rounds))
    Console().print(table)


def _round(options: argparse.Namespace, seed: int) -> dict[str, str]:
    asks = asks_of(round(options.rate * options.seconds), options.tokens)
    plan = plan_of(asks, Timing(options.rate), seed)
    run, log = with_stub(0, lambda url: Load(plan, Target(url, ignore_eos=True)).run())
    assert isinstance(run, Run) and all(record.done for record in run.records)
    events, lag = run.client["events"], [record.lag_s for record in run.records]
    firsts, gaps = _off(run, log)
    found = {"events/s": f"{events / run.duration_s:.0f}", "us an event": f"{run.client['cpu_s'] / events * 1e6:.1f}"}
    for name, seconds in (("lag", lag), ("TTFT beyond the log's", firsts), ("ITL off the log's", gaps)):
        p50, p99 = np.percentile(np.array(seconds) * 1e3, [50, 99])
        found |= {f"{name}, p50 ms": f"{p50:.2f}", f"{name}, p99 ms": f"{p99:.2f}"}
    return found


def _off(run: Run, log: Log) -> tuple[list[float], list[float]]:
    """By how many seconds TTFTs are beyond the log's, and ITLs off the log's; no ITLs: 0."""
    firsts, gaps = [], [0.0]
    for record in run.records:
        came, *sent = log[record.id]
        firsts.append((record.ttft_s("sent") or 0.0) - (sent[0] - came))
        told = [later - earlier for earlier, later in pairwise(sent)]
        gaps += [abs(ours - theirs) for ours, theirs in zip(record.itls_s, told, strict=True)]
    return firsts, gaps


def search(options: argparse.Namespace) -> None:
    """The capacity that is found, beside the true one."""
    capacity = options.places / SERVICE_S
    limits = Limits(ttft_s=3 * SERVICE_S)

    def work(url: str) -> Any:
        def play(rate: float, seed: int, seconds: float) -> Run:
            asks = with_limits(asks_of(max(100, round(rate * seconds)), 1), limits)
            return Load(plan_of(asks, Timing(rate, law="constant"), seed), Target(url)).run()

        goal = Goal(start=capacity * options.start, point_s=options.seconds, most_s=2 * options.seconds)
        return Search(goal, play).run()

    found, _ = with_stub(options.places, work)
    points = len(found.points) + len(found.confirmed)
    rate = found.rate or float("nan")
    print(f"found {rate:.2f}/s in {points} points; capacity {capacity:g}/s: {rate / capacity - 1:+.1%}")


def arrivals(options: argparse.Namespace) -> None:
    """How well the gaps fit their law, seed by seed."""
    from scipy import stats  # type: ignore[import-untyped]

    table = new_table(f"{SEEDS} seeds of {GAPS} gaps", "cv", ["least p", "p of all gaps", "most off the rate (sigma)"])
    for cv in (0.5, 1.0, 2.0):
        law = stats.gamma(1 / cv**2, scale=cv**2 / options.rate)
        drawn = [gamma_arrivals(GAPS, rate=options.rate, cv=cv, seed=seed) for seed in range(SEEDS)]
        gaps = [np.diff(each, prepend=0.0) for each in drawn]
        least = min(stats.kstest(each, law.cdf).pvalue for each in gaps)
        whole = stats.kstest(np.concatenate(gaps), law.cdf).pvalue
        off = max(abs(each.mean() - law.mean()) / (law.std() / GAPS**0.5) for each in gaps)
        table.add_row(f"{cv:g}", f"{least:.3f}", f"{whole:.3f}", f"{off:.2f}")
    Console().print(table)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rate", type=float, default=200.0)
    parser.add_argument("--tokens", type=at_least_one, default=20)
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--rounds", type=at_least_one, default=3)
    parser.add_argument("--places", type=at_least_one, default=5)
    parser.add_argument("--start", type=float, default=1 / 7)
    parser.add_argument("--search", action="store_true")
    parser.add_argument("--arrivals", action="store_true")
    options = parser.parse_args(arguments)
    (search if options.search else arrivals if options.arrivals else accuracy)(options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
