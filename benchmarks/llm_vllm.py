"""The `vllm` part of benchmarks/llm.py: one real vLLM engine a scheduler, the same arrivals for all, in turns.

Engines run in this process and are stepped by the loop that submits requests at their arrivals, so that
times are the client's and no second process competes for the cores. The model is an OPT with dummy
weights (`vllm_engines.py`).
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from vllm_engines import EOS, Size, make_model, make_server, size_on

from neustream.engine.report import Report

VOCABULARY = 8192
"""Tokens of prompts are below it."""
MOST = 96
"""The outputs that a request allows."""
PROMISES = ((1.5, 1.5), (3.0, 2.0), (5.0, 5.0))
"""TTFT and TPOT as multiples of a prompt and a decode alone."""
LOADS = (0.5, 0.75, 1.0, 1.5, 2.0)
"""Rates as multiples of the knee: requests per second that the stock engine finishes when it is full."""
SERVERS = ("fcfs", "priority", "ours")


@dataclass
class Asked:
    """One request of the workload, and what its client saw: instants of its tokens, and how it ended."""

    id: str
    arrival: float
    prompt: list[int]
    end: int
    first: float = 0.0
    step: float = 0.0
    tokens: list[float] = field(default_factory=list)
    reason: str = ""

    @property
    def every(self) -> bool:
        """Whether every token was in time (cumulative deadlines)."""
        due = self.arrival + self.first
        return self.done and all(at <= due + k * self.step for k, at in enumerate(self.tokens))

    @property
    def client(self) -> bool:
        """What `vllm bench serve --goodput` counts: TTFT and mean TPOT."""
        if not self.done:
            return False
        tpot = (self.tokens[-1] - self.tokens[0]) / max(len(self.tokens) - 1, 1)
        return self.tokens[0] - self.arrival <= self.first and tpot <= self.step

    @property
    def done(self) -> bool:
        return self.reason in ("stop", "length")


def workload(count: int, rate: float, seed: int) -> list[Asked]:
    draw = np.random.default_rng(seed)
    arrivals = np.cumsum(draw.exponential(1 / rate, count))
    sizes = np.clip(np.rint(np.exp(draw.normal(np.log(64), 0.8, count))), 8, 256).astype(int)
    ends = np.clip(np.rint(np.exp(draw.normal(np.log(36), 0.7, count))), 1, MOST).astype(int).tolist()
    return [
        Asked(f"{seed}-{at}", float(arrivals[at]), draw.integers(4, VOCABULARY, size).tolist(), ends[at])
        for at, size in enumerate(sizes.tolist())
    ]


def serve(engine: Any, some: Sequence[Asked], kind: str, promised: bool = True) -> float:
    """Submit `some` at their arrivals and step the engine until all have ended; seconds that took."""
    from vllm import SamplingParams

    began, at = time.perf_counter(), 0
    live: dict[str, Asked] = {}
    while at < len(some) or live:
        now = time.perf_counter() - began
        while at < len(some) and some[at].arrival <= now:
            asked = some[at]
            extra: dict[str, float] = {"end": asked.end}
            if kind == "ours" and promised:
                extra |= {"slo_ttft_ms": asked.first * 1e3, "slo_tpot_ms": asked.step * 1e3}
            params = SamplingParams(
                temperature=0.0, max_tokens=MOST, stop_token_ids=[EOS], detokenize=False, extra_args=extra
            )
            more = {"priority": int((asked.arrival + asked.first) * 1e6)} if kind == "priority" else {}
            wall = time.time() - (now - asked.arrival)  # the client's arrival, not when this loop looked
            prompt = {"prompt_token_ids": asked.prompt}
            engine.add_request(asked.id, prompt, params, arrival_time=wall, **more)
            live[asked.id] = asked
            at += 1
        if not live:
            time.sleep(max(some[at].arrival - (time.perf_counter() - began), 0.0))
            continue
        for output in engine.step():
            asked, made = live[output.request_id], output.outputs[0]
            now = time.perf_counter() - began
            asked.tokens += [now] * (len(made.token_ids) - len(asked.tokens))
            if output.finished:
                asked.reason = str(made.finish_reason)
                del live[output.request_id]
    return time.perf_counter() - began


def alone(engine: Any) -> tuple[Callable[[int], float], float]:
    """What a prompt and a decode take alone on the stock engine: medians of requests one by one."""
    rows, gaps = [], []
    for turn in range(3):
        for at, size in enumerate((8, 32, 64, 128, 256)):
            one = Asked(f"alone-{turn}-{at}", 0.0, [5] * size, 24)
            serve(engine, [one], "fcfs", promised=False)
            if turn:
                rows.append((size, one.tokens[0]))
                gaps += np.diff(one.tokens).tolist()
    slope, base = np.polyfit([size for size, _ in rows], [seconds for _, seconds in rows], 1)
    return lambda size: float(base + slope * size), statistics.median(gaps)


def simulated(some: Sequence[Asked], size: Size, steps: Any, policy: Any) -> Report:
    """What the simulator says of the same requests, with latencies as ours learnt them."""
    from neustream import SLO, Engine, Graph, Member, Pool, ProfiledExecutor, Request, Scheduler, VirtualClock
    from neustream.core.kv_cache import KVCache
    from neustream.graphs import llm, llm_profiles

    graph = Graph("llm", llm("llm", max_batch=size.seats))
    lengths = {asked.id: asked.end for asked in some}
    caches = {"llm": KVCache(size.blocks - 1, size.block)}
    pool = Pool("vllm", tuple(graph.stages), kv_caches=caches, step_tokens=size.step_tokens)
    requests = [
        Request(
            asked.id,
            graph,
            asked.arrival,
            SLO(first=asked.first, step=asked.step),
            {"prompt_tokens": len(asked.prompt), "max_tokens": MOST},
        )
        for asked in some
    ]

    def outcome(batch: Any) -> list[dict[str, bool]]:
        return [{"ended": job.call_outputs + 1 >= lengths[job.id]} for job in batch.jobs]

    scheduler = Scheduler([pool], policy, llm_profiles("llm", steps, size.seats))
    return Engine(Member(scheduler, {"vllm": ProfiledExecutor(outcome=outcome)}), VirtualClock()).run(requests)


def overhead(engine: Any, seats: int) -> dict[str, float]:
    """What ours adds to a step of `seats` decodes that were promised something, in microseconds and as a share."""
    from vllm import SamplingParams

    stats = engine.engine_core.engine_core.scheduler.stats
    for turn in range(2):
        for at in range(seats):
            params = SamplingParams(
                max_tokens=MOST, ignore_eos=True, detokenize=False, extra_args={"slo_ttft_ms": 6e4, "slo_tpot_ms": 1e3}
            )
            engine.add_request(f"full-{turn}-{at}", {"prompt_token_ids": [5] * 64}, params)
        for _ in range(8):
            engine.step()
        before, steps, began = stats.overhead_s, stats.steps, time.perf_counter()
        while engine.has_unfinished_requests():
            engine.step()
        each = (stats.overhead_s - before) / (stats.steps - steps)
        step = (time.perf_counter() - began) / (stats.steps - steps)
    return {"overhead_us": each * 1e6, "step_us": step * 1e6, "share": each / (step - each)}


def throughput(servers: dict[str, Any], rounds: int) -> dict[str, float]:
    """Requests per second of stock and ours, nothing promised, all at once, in turns; medians."""
    found: dict[str, list[float]] = {"fcfs": [], "ours": []}
    for turn in range(rounds + 1):
        for kind in found if turn % 2 else reversed(found):
            some = workload(64, 1e9, 900 + turn)
            seconds = serve(servers[kind], some, kind, promised=False)
            if turn:
                found[kind].append(len(some) / seconds)
    return {kind: statistics.median(values) for kind, values in found.items()}


@dataclass(frozen=True)
class Alone:
    """What the stock engine does without company: seconds of a prompt by its tokens, and of a decode.

    `knee`: requests per second that it finishes when it is full.
    """

    prefill: Callable[[int], float]
    decode: float
    knee: float


Runs = dict[str, list[list[Asked]]]
"""By engine, its requests in each round."""


def run_vllm(args: argparse.Namespace, write: Callable[..., None]) -> None:
    size = size_on("cpu")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_model(folder, size)
        servers = {kind: make_server(folder, size, kind) for kind in SERVERS}
    prefill, decode = alone(servers["fcfs"])
    flat = throughput(servers, 2 if args.quick else 7)
    base = Alone(prefill, decode, flat["fcfs"])
    cost = overhead(servers["ours"], size.seats)
    say_costs(base, flat, cost, size.seats)
    rows = []
    for ttft, tpot in PROMISES[1:2] if args.quick else PROMISES:
        for load in LOADS[::3] if args.quick else LOADS:
            rows.append(compared(servers, base, ttft, tpot, load, args))
            say_row(rows[-1])
    stats = servers["ours"].engine_core.engine_core.scheduler.stats
    print(f"step latencies as learnt: median error {stats.step_error}")
    if args.quick:
        return
    summary: dict[str, Any] = {"prefill_64_s": prefill(64), "decode_s": decode, "knee_rps": base.knee}
    summary |= {"throughput_rps": flat, **cost, "step_error": stats.step_error}
    command = "OMP_NUM_THREADS=1 VLLM_CPU_KVCACHE_SPACE=1 .venv-vllm/bin/python benchmarks/llm.py vllm"
    more = {"summary": summary, "requests": args.requests, "rounds": args.rounds}
    write("vllm", rows, command, more)


def compared(
    servers: dict[str, Any], base: Alone, ttft: float, tpot: float, load: float, args: argparse.Namespace
) -> dict[str, Any]:
    """One pair of promises at one load: what came of it with each engine, and by the simulator."""
    runs = served_in_turns(servers, base, ttft, tpot, load, args)
    row: dict[str, Any] = {"ttft_x": ttft, "tpot_x": tpot, "load": load}
    row |= {kind: outcome_of(rounds) for kind, rounds in runs.items()}
    return {**row, "simulated": simulations(servers, size_on("cpu"), runs)}


def served_in_turns(
    servers: dict[str, Any], base: Alone, ttft: float, tpot: float, load: float, args: argparse.Namespace
) -> Runs:
    """The same requests for all engines in each round; who comes first changes from round to round."""
    runs: Runs = {kind: [] for kind in SERVERS}
    for turn in range(1 if args.quick else args.rounds):
        for kind in SERVERS[turn % 3 :] + SERVERS[: turn % 3]:
            some = workload(args.requests, load * base.knee, turn + 1)
            for asked in some:
                asked.first = ttft * base.prefill(len(asked.prompt))
                asked.step = tpot * base.decode
            serve(servers[kind], some, kind)
            runs[kind].append(some)
    return runs


def outcome_of(rounds: Sequence[Sequence[Asked]]) -> dict[str, float]:
    """Shares of requests, goodput and throughput; medians over rounds."""
    found = {what: statistics.median(share(some, what) for some in rounds) for what in ("every", "client", "done")}
    spans = [some[-1].arrival for some in rounds]
    good = [sum(a.client for a in some) / x for some, x in zip(rounds, spans, strict=True)]
    tokens = [sum(len(a.tokens) for a in some) / x for some, x in zip(rounds, spans, strict=True)]
    return {**found, "goodput_rps": statistics.median(good), "tokens_per_s": statistics.median(tokens)}


def share(some: Sequence[Asked], what: str) -> float:
    return float(sum(getattr(asked, what) for asked in some) / len(some))


def simulations(servers: dict[str, Any], size: Size, runs: Runs) -> dict[str, float]:
    """Attainment by the simulator, with latencies as ours learnt them; medians over rounds."""
    from neustream import POLICIES

    steps = servers["ours"].engine_core.engine_core.scheduler.step_times
    policies = {"fcfs": POLICIES["fcfs"](drop_hopeless=False), "ours": POLICIES["priced"]()}
    return {
        kind: statistics.median(simulated(some, size, steps, policy).attainment for some in runs[kind])
        for kind, policy in policies.items()
    }


def say_costs(base: Alone, flat: dict[str, float], cost: dict[str, float], seats: int) -> None:
    prompt, decode = base.prefill(64) * 1e3, base.decode * 1e3
    print(f"alone: prefill of 64 tokens {prompt:.1f} ms, decode {decode:.1f} ms; knee {base.knee:.1f}/s")
    ratio = flat["ours"] / flat["fcfs"]
    print(f"nothing promised: stock {flat['fcfs']:.2f}/s, ours {flat['ours']:.2f}/s ({ratio:.3f})")
    added, part = cost["overhead_us"], cost["share"]
    print(f"ours adds {added:.0f} us to a step of {seats} decodes: {part:.1%}", flush=True)


def say_row(row: dict[str, Any]) -> None:
    every, client = (", ".join(f"{kind} {row[kind][what]:.3f}" for kind in SERVERS) for what in ("every", "client"))
    said = ", ".join(f"{kind} {x:.3f}" for kind, x in row["simulated"].items())
    where = f"TTFT {row['ttft_x']:g}x TPOT {row['tpot_x']:g}x, {row['load']:g} of the knee"
    print(f"{where}: every token in time {every}; TTFT and mean TPOT {client}; simulated {said}", flush=True)
