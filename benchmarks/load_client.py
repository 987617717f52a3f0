"""What `neustream bench` itself costs, and how far what it measures is from what a server did.

    python benchmarks/load_client.py [--rate 200] [--tokens 20] [--seconds 10] [--search]

A stub in a process of its own answers with streams of `--tokens` tokens, 5 ms apart after 20 ms, and
keeps a log of when it sent each. Requests come as a Poisson process. Printed: the client's time of the
processor for each event, its lag, and the difference of TTFT and ITL from the log's (the sending of
a byte and its reception lie between, both on this machine).

`--search`: the stub serves `--places` requests at a time, 50 ms each, so that its capacity is known; the
search is to find it. Arrivals are evenly spaced there.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import sys
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
from rich.console import Console

from neustream.analysis.tables import new_table
from neustream.bench.load import Load
from neustream.bench.plan import Target
from neustream.bench.planning import Timing, plan_of
from neustream.bench.runs import Run
from neustream.bench.search import Goal, Search
from neustream.bench.summary import lag_ms
from neustream.engine.clock import stopwatch
from neustream.workload.asks import Ask, Limits
from neustream.workload.mixing import with_limits

FIRST_S, GAP_S, SERVICE_S = 0.02, 0.005, 0.05
HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
Log = dict[str, list[float]]
"""The instants at which tokens were sent, by request."""


@dataclass
class Stub:
    """The server: `places` bounds how many are served at a time (0: all), each for `SERVICE_S` then."""

    places: int

    async def main(self, pipe: Connection) -> None:
        self.log: Log = {}
        self.free = asyncio.Semaphore(self.places or 10**6)
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
                (length,) = [line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length")]
                body = json.loads(await reader.readexactly(int(length.partition(b":")[2])))
                async with self.free:
                    await self.answer(body, writer)
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()

    async def answer(self, body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        sent = self.log.setdefault(str(body["prompt"]), [])
        first, gap = (SERVICE_S, 0.0) if self.places else (FIRST_S, GAP_S)
        due = stopwatch() + first
        writer.write(HEAD)
        for at in range(body["max_tokens"]):
            await asyncio.sleep(max(0.0, due - stopwatch()))
            reason = '"length"' if at == body["max_tokens"] - 1 else "null"
            choice = f'{{"index":0,"text":" word","logprobs":null,"finish_reason":{reason}}}'
            event = f'data: {{"id":"cmpl-1","object":"text_completion","model":"m","choices":[{choice}]}}\n\n'
            writer.write(_chunk(event.encode()))
            sent.append(stopwatch())
            due += gap
        writer.write(_chunk(b"data: [DONE]\n\n") + b"0\r\n\r\n")
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
    plan = plan_of(asks_of(round(options.rate * options.seconds), options.tokens), Timing(options.rate), 0)
    run, log = with_stub(0, lambda url: Load(plan, Target(url, ignore_eos=True)).run())
    assert isinstance(run, Run) and all(record.done for record in run.records)
    firsts, gaps = [], []
    start = max(log[record.id][0] - record.token_times_s[0] for record in run.records)  # by the fastest byte
    for record in run.records:
        sent = [at - start for at in log[record.id]]
        firsts.append(record.token_times_s[0] - sent[0])
        gaps += [
            (b - a) - (d - c) for (a, b), (c, d) in zip(pairwise(record.token_times_s), pairwise(sent), strict=True)
        ]
    lag, events = lag_ms(run.records), run.client["events"]
    table = new_table(f"{options.rate:g} requests/s, {events / run.duration_s:.0f} events/s", "", ["p50", "p99"])
    table.add_row("lag (ms)", f"{lag['p50']:.2f}", f"{lag['p99']:.2f}")
    for name, seconds in (("TTFT beyond the log's (ms)", firsts), ("ITL off the log's (ms)", np.abs(gaps))):
        p50, p99 = np.percentile(np.array(seconds) * 1e3, [50, 99])
        table.add_row(name, f"{p50:.3f}", f"{p99:.3f}")
    Console().print(table)
    print(f"client: {run.client['cpu_s'] / events * 1e6:.1f} us of the processor for each of {events} events")


def search(options: argparse.Namespace) -> None:
    """The capacity that is found, beside the true one."""
    capacity = options.places / SERVICE_S
    limits = Limits(ttft_s=3 * SERVICE_S)

    def work(url: str) -> Any:
        def play(rate: float, seed: int, seconds: float) -> Run:
            asks = with_limits(asks_of(max(100, round(rate * seconds)), 1), limits)
            return Load(plan_of(asks, Timing(rate, law="constant"), seed), Target(url)).run()

        goal = Goal(start=capacity / 7, point_s=options.seconds, most_s=2 * options.seconds)
        return Search(goal, play).run()

    found, _ = with_stub(options.places, work)
    points = len(found.points) + len(found.confirmed)
    rate = found.rate or float("nan")
    print(f"found {rate:.2f}/s in {points} points; capacity {capacity:g}/s if no wait of the stub's is late")
    served = max(point.served for point in found.points)
    print(f"the most that it served is {served:.2f}/s, of which that is {rate / served:.1%}")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rate", type=float, default=200.0)
    parser.add_argument("--tokens", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--places", type=int, default=5)
    parser.add_argument("--search", action="store_true")
    options = parser.parse_args(arguments)
    (search if options.search else accuracy)(options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
