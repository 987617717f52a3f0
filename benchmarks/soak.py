"""The HTTP front under more than it can serve, with clients that go away and requests that are hostile.

    python benchmarks/soak.py [--seconds 600] [--warm-s 60] [--load 1.5] [--json FILE] [--log FILE]

A server in a process of its own serves a tiny language model and a tiny Stable Diffusion. First as many
requests as it can take at once tell its capacity (and warm it up); then requests arrive at `--load`
times that rate, whatever becomes of them: one in five leaves before its answer is whole, one in twenty is
hostile (no JSON, NaN, wrong types, half a body, huge heads, deep nesting, raw bytes). Then it idles.

What must hold, or it ends with status 1: every request is answered once or its stream is cut; no hostile
one gets a status of 500 or more; the server counts as many answers as were asked for; memory grows by
less than 2 percent from the first to the last tenth, once `--warm-s` seconds of the same load have passed;
no task, descriptor, connection, open request or KV slot is left. Of a request that is lost it is told what
was asked, what came when, and what the server's own log (`--log`) says of it.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import re
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from http_load import HOST, Heard, Served, ask, post, serving, total
from rich.console import Console

from neustream.analysis.tables import new_table
from neustream.backends.demo import IMAGE, TEXT

CONFIG = {
    "models": [
        {
            "name": "text",
            "kind": "text",
            "backend": TEXT,
            "tokenizer": "bytes",
            "options": {"measure_s": 3.0, "slots": 16},
        },
        {"name": "image", "kind": "image", "backend": IMAGE, "options": {"measure_s": 3.0}},
    ],
    "observe": {"access_log": "json"},
    "promises": {"classes": {"chat": {"ttft_ms": 2000, "tpot_ms": 200}, "batch": {"e2e_ms": 20_000}}},
}
AT_ONCE = 24
"""Requests under way while capacity is measured."""
GROWTH = 0.02
SILENT_S, WHOLE_S = 150.0, 300.0
"""A stream is lost after so long without a token: it may begin within `limits.patience_s` (60), and have its
first token within as much again. Other answers come as a whole: they are lost after the longer time, for one that
is promised nothing has a twentieth of the device."""
IDLE_S = 60.0
"""The longest that the server may take to be idle again."""
BLANK = b"\r\n\r\n"
OURS = ("/v1/completions", "/v1/images/generations")


def texts(rng: random.Random, promised: bool) -> bytes:
    body = {
        "model": "text",
        "prompt": "x" * rng.randint(1, 120),
        "max_tokens": rng.randint(1, 64),
        "ignore_eos": True,
        "stream": rng.random() < 0.7,
    }
    name = rng.choice(["chat", "batch", None]) if promised else None
    return post("/v1/completions", body, {} if name is None else {"x-slo-class": name})


def images(rng: random.Random, promised: bool) -> bytes:
    body = {"model": "image", "prompt": "a lighthouse", "num_inference_steps": rng.randint(1, 6)}
    return post("/v1/images/generations", body, {"x-slo-class": "batch"} if promised else {})


def good(rng: random.Random, promised: bool = True) -> bytes:
    make = images if rng.random() < 0.05 else texts
    return make(rng, promised)


def _raw(body: bytes, length: int | None = None) -> bytes:
    lines = ["POST /v1/completions HTTP/1.1", f"host: {HOST}", "content-type: application/json", "connection: close"]
    lines.append(f"content-length: {len(body) if length is None else length}")
    return "\r\n".join([*lines, "", ""]).encode() + body


HOSTILE: list[Callable[[random.Random], bytes]] = [
    lambda rng: _raw(b"{"),
    lambda rng: _raw(b"[" * 50_000),
    lambda rng: _raw(b'{"prompt": "x", "temperature": NaN}'),
    lambda rng: _raw(b'{"prompt": "\\ud800", "max_tokens": 2}'),
    lambda rng: _raw(b'{"prompt": ' + b"9" * 5000 + b"}"),
    lambda rng: _raw(rng.randbytes(200)),
    lambda rng: _raw(b"", 10**12),
    lambda rng: post("/v1/completions", {"prompt": "x", "model": "nobody"}),
    lambda rng: post("/v1/completions", {"prompt": [[1], "x"], "model": "text"}),
    lambda rng: post("/v1/completions", {"prompt": "x" * 100_000, "model": "text"}),
    lambda rng: post("/v1/completions", {"prompt": "x", "model": "text", "max_tokens": -1}),
    lambda rng: post("/v1/completions", {"prompt": "x", "model": "text", "slo": {"e2e_ms": 1e-9}}),
    lambda rng: post("/v1/completions", {"prompt": "x", "model": "text", "n": 1000}),
    lambda rng: post("/v1/images/generations", {"prompt": "x", "model": "image", "size": "8000x8000"}),
    lambda rng: b"GET /" + b"a" * 200_000 + b" HTTP/1.1\r\n\r\n",
    lambda rng: b"POST / HTTP/1.1\r\nconnection: close\r\nhost: " + b"x" * 70_000 + b"\r\n\r\n",
    lambda rng: rng.randbytes(300) + b"\r\n\r\n",
]


@dataclass
class Tally:
    """What became of requests, and what the server used meanwhile."""

    sent: int = 0
    ended: Counter[str] = field(default_factory=Counter)
    hostile: Counter[str] = field(default_factory=Counter)
    memory: list[int] = field(default_factory=list)
    late_s: float = 0.0
    """By how much the load itself was late, at most."""
    lost: dict[str, str] = field(default_factory=dict)
    """What is known of those that are lost, by id."""
    longest: dict[str, float] = field(default_factory=dict)
    """Seconds that the longest of each kind took."""

    def count(self, heard: Heard, hostile: bool, id: str = "", request: bytes = b"") -> None:
        kind = fate(heard)
        (self.hostile if hostile else self.ended)[kind] += 1
        if hostile:
            return
        of = kind_of(request)
        self.longest[of] = max(self.longest.get(of, 0.0), heard.whole_s)
        if kind == "lost":
            self.lost[id] = f"{of}: {request.partition(BLANK)[2].decode()}; {heard.tokens} tokens"
            if heard.first_s is not None and heard.last_s is not None:
                self.lost[id] += f", the first after {heard.first_s:.1f} s, the last after {heard.last_s:.1f} s"


def kind_of(request: bytes) -> str:
    """What is asked for, and with which promise."""
    head = request.partition(BLANK)[0]
    what = "image" if b"/v1/images" in head else "text"
    named = re.search(rb"x-slo-class: (\w+)", head)
    return f"{what}, {named[1].decode() if named else 'no promise'}"


def named(request: bytes, id: str) -> bytes:
    """A request with an id, by which the server's log tells of it."""
    return request.replace(b"\r\n", f"\r\nx-request-id: {id}\r\n".encode(), 1)


def fate(heard: Heard) -> str:
    """What became of a request: done, left, a status, cut, or what must not be."""
    if heard.lost:
        return "lost"
    if heard.left:
        return "left"
    if heard.status == 0:
        return "closed"
    if heard.status != 200:
        return str(heard.status) if heard.whole else "broken"
    if heard.done:
        return "done"
    return "cut" if b'"error"' in heard.raw else "broken"


async def capacity(port: int, seconds: float, rng: random.Random) -> float:
    """Requests a second that are done, so many at once; nothing is promised, so none is given up."""
    fates: Counter[str] = Counter()

    async def one() -> None:
        while True:
            fates[fate(await ask(port, good(rng, promised=False)))] += 1

    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await asyncio.gather(*[one() for _ in range(AT_ONCE)])
    return fates["done"] / seconds


async def storm(server: Served, rate: float, options: argparse.Namespace, rng: random.Random) -> Tally:
    """Open loop: requests leave at times that were fixed beforehand."""
    tally, tasks = Tally(), set()
    began = time.monotonic()
    at, looked = 0.0, 0.0

    async def one(request: bytes, leave: int | None, hostile: bool) -> None:
        id = f"soak-{tally.sent}"
        request = request if hostile else named(request, id)
        patience_s = SILENT_S if b'"stream": true' in request else WHOLE_S
        tally.count(await ask(server.port, request, leave, patience_s), hostile, id, request)

    while at < options.warm_s + options.seconds:
        at += rng.expovariate(rate)
        await asyncio.sleep(max(began + at - time.monotonic(), 0))
        tally.late_s = max(tally.late_s, time.monotonic() - began - at)
        hostile = rng.random() < options.hostile
        request = rng.choice(HOSTILE)(rng) if hostile else good(rng)
        leave = rng.randint(0, 8) if not hostile and rng.random() < options.leave else None
        tally.sent += 1
        task = asyncio.ensure_future(one(request, leave, hostile))
        tasks.add(task)
        task.add_done_callback(tasks.discard)
        if at - looked >= 1.0:
            looked = at
            if at > options.warm_s:
                tally.memory.append(server.memory)
    await asyncio.gather(*tasks)
    return tally


def idle(server: Served) -> dict[str, float]:
    """What is left once nothing is open, or after the longest that may take."""
    until = time.monotonic() + IDLE_S
    while True:
        time.sleep(0.5)
        samples = server.metrics()
        left = {
            "open requests": total(samples, "num_requests_running") + total(samples, "num_requests_waiting"),
            "KV slots": total(samples, "kv_slots_used"),
            "streams": total(samples, "http_streams"),
            "connections": total(samples, "http_connections") - 1,  # ours
            "tasks": total(samples, "event_loop_tasks"),
            "descriptors": float(_descriptors(server)),
        }
        settled = not any(left[name] for name in ("open requests", "KV slots", "streams", "connections"))
        if settled or time.monotonic() > until:
            return left


def _descriptors(server: Served) -> int:
    """Open ones; the least of some looks, since the connection by which we looked is closed a moment later."""
    looks = []
    for _ in range(5):
        time.sleep(0.1)
        looks.append(server.descriptors)
    return min(looks)


def growth(memory: list[int]) -> float:
    """From the first tenth to the last one, by their medians."""
    tenth = max(len(memory) // 10, 1)
    first, last = statistics.median(memory[:tenth]), statistics.median(memory[-tenth:])
    return last / first - 1


def answers(server: Served) -> float:
    samples = server.metrics()
    return sum([total(samples, "http_requests_total", f'route="{route}"') for route in OURS])


def faults(tally: Tally, before: dict[str, float], after: dict[str, float], answered: float) -> list[str]:
    """What should not be."""
    found = []
    both = tally.ended + tally.hostile
    for kind in ("lost", "broken"):
        if both[kind]:
            found.append(f"{both[kind]} requests {kind}")
    if tally.ended["closed"]:
        found.append(f"{tally.ended['closed']} good requests got nothing")
    if bad := [kind for kind in tally.hostile if kind.startswith("5")]:
        found.append(f"hostile requests got {', '.join(bad)}")
    if both.total() != tally.sent:
        found.append(f"{tally.sent} requests, {both.total()} fates")
    if tally.ended["500"]:
        found.append(f"{tally.ended['500']} good requests got 500")
    reached = tally.ended.total()
    if not reached - tally.ended["left"] <= answered <= tally.sent:
        found.append(f"the server counts {answered:.0f} answers to {reached} good requests and some hostile ones")
    grown = growth(tally.memory)
    if grown >= GROWTH:
        found.append(f"memory grew by {grown:.1%}")
    found += [
        f"{name}: {before[name]:.0f} before, {after[name]:.0f} after" for name in after if after[name] > before[name]
    ]
    return found


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--load", type=float, default=1.5, help="times the capacity")
    parser.add_argument("--leave", type=float, default=0.2, help="share of good requests that go away")
    parser.add_argument("--hostile", type=float, default=0.05, help="share of all requests")
    parser.add_argument("--capacity-s", type=float, default=20.0, help="seconds to measure the capacity in")
    parser.add_argument("--warm-s", type=float, default=60.0, help="of the load before memory is looked at")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--log", type=Path, help="gets the server's log, a line a request")
    options = parser.parse_args(arguments)
    rng = random.Random(options.seed)
    console = Console(markup=False, highlight=False)
    with tempfile.TemporaryDirectory() as folder, serving(CONFIG, log := options.log or Path(folder) / "log") as server:
        most = asyncio.run(capacity(server.port, options.capacity_s, rng))
        before, counted, early = idle(server), answers(server), _looks(server)
        console.print(
            f"capacity {most:.1f} requests/s; {options.warm_s + options.seconds:g} s at {options.load:g} times that"
        )
        tally = asyncio.run(storm(server, most * options.load, options, rng))
        after = idle(server)
        answered = answers(server) - counted
        lag = _lag(_looks(server), early)
        said = told_of(tally.lost, log)
    wrong = faults(tally, before, after, answered)
    _print(console, tally, before, after, lag)
    result = {"capacity": most, "sent": tally.sent, "ended": dict(tally.ended), "hostile": dict(tally.hostile)}
    result |= {
        "memory_growth": growth(tally.memory),
        "left": after,
        "before": before,
        "faults": wrong,
        "lag": lag,
        "memory": tally.memory,
        "longest": tally.longest,
        "lost": said,
    }
    if options.json is not None:
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    for line in said:
        console.print(f"lost: {line}")
    for fault in wrong:
        console.print(f"wrong: {fault}")
    return 1 if wrong else 0


def told_of(lost: Mapping[str, str], log: Path) -> list[str]:
    """What we know of each request that is lost, and the lines of the server's log that name it."""
    lines = log.read_text(errors="replace").splitlines()
    found = []
    for id, known in lost.items():
        of = [line for line in lines if f'"id": "{id}-' in line]
        found.append(f"{id}, {known}; the server: {' '.join(of) or 'nothing'}")
    return found


def _looks(server: Served) -> dict[str, float]:
    """Looks at the event loop so far, by how late they were at most, in seconds; "+Inf": all of them."""
    samples, name = server.metrics(), "neustream:event_loop_lag_seconds"
    return {bound: samples[f'{name}_bucket{{le="{bound}"}}'] for bound in ("0.01", "0.05", "0.1", "0.5", "+Inf")}


def _lag(looks: dict[str, float], early: dict[str, float]) -> dict[str, float]:
    """Shares of looks that were late by no more than so many seconds, of those behind the `early` ones.

    While models load, full collections of garbage stop the loop; nobody is served then.
    """
    since = {bound: looks[bound] - early[bound] for bound in looks}
    return {bound: count / since["+Inf"] for bound, count in since.items() if bound != "+Inf"}


def _print(
    console: Console, tally: Tally, before: dict[str, float], after: dict[str, float], lag: dict[str, float]
) -> None:
    table = new_table(f"{tally.sent} requests", "", ["good", "hostile"])
    for kind in sorted({*tally.ended, *tally.hostile}):
        table.add_row(kind, f"{tally.ended[kind]:,}", f"{tally.hostile[kind]:,}")
    console.print(table)
    used = new_table("left", "", ["before", "after"])
    for name in after:
        used.add_row(name, f"{before[name]:.0f}", f"{after[name]:.0f}")
    console.print(used)
    first, last = tally.memory[0] / 2**20, tally.memory[-1] / 2**20
    console.print(f"memory {first:.0f} MiB to {last:.0f} MiB: {growth(tally.memory):+.2%} by medians of tenths")
    for kind, seconds in sorted(tally.longest.items()):
        console.print(f"{kind}: the longest took {seconds:.1f} s")
    console.print(f"event loop late by at most 50 ms in {lag['0.05']:.2%} of looks; the load by {tally.late_s:.2f} s")


if __name__ == "__main__":
    sys.exit(main())
