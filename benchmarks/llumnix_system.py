"""What Llumnix's artifact ran, as data and rules: LLaMA-7B on A10s under vLLM 0.1's scheduler.

Sun et al., Llumnix: Dynamic Scheduling for Large Language Model Serving, OSDI'24, branch
osdi24ae. Steps: figure 10 (prefill by tokens, decode by batch at 8,192 tokens in all). What a
decode costs by its context is not in the artifact: 33.1 ms at none and 1.2 us a token are ours,
from figure 13. Nothing is fitted to figure 11.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from neustream import SLO, Decision, Graph, Job, Request, View
from neustream.cluster.book import Again, Settings
from neustream.cluster.fleet import Fleet, Move, Mover, Router, Scaler
from neustream.cluster.head import Head
from neustream.cluster.network import Network
from neustream.cluster.place import Place
from neustream.cluster.report import ClusterReport
from neustream.cluster.reporting import Reporting
from neustream.cluster.rules import MOVERS, ROUTERS, SCALERS
from neustream.cluster.simulation import Cluster, Kind, Watcher
from neustream.core.events import Emitted, Ended
from neustream.core.kv_cache import KVCache
from neustream.core.policy import Pool
from neustream.core.scheduler import Scheduler
from neustream.core.steps import PhaseProfile, PrefillTable, StepProfile
from neustream.engine.events import Finished, Record
from neustream.engine.executor import ProfiledExecutor
from neustream.graphs import llm

PREFILL_S = {
    1: 0.0331,
    128: 0.0331,
    256: 0.058,
    512: 0.110,
    1024: 0.220,
    2048: 0.436,
    4096: 0.940,
    8192: 1.995,
}
"""By tokens; below 256 ours: a line through the next two points, no less than a decode."""
BASE_S, JOB_S, TOKEN_S = 0.0331, 0.28e-3, 1.2e-6
BETWEEN_STEPS_S = 0.004
DELAY_S = 0.0005
"""Of a message between head and instances; ours."""
KV_BYTES = 524288.0
BANDWIDTH = 2.5e9
"""Bytes a second: 8,192 tokens in 1.68 s (figure 10)."""
BLOCKS = {12800: 790, 12000: 792}
WATERMARK = 0.01
MOST_TOKENS = 6144
LENGTHS = {"S": (128, 2.0), "M": (256, 1.5), "L": (512, 1.15)}
"""Mean tokens, and the exponent of the truncated Zipf."""
RATES = {
    "S-S": (32.0, 33.0, 34.0, 35.0, 36.0),
    "M-M": (7.4, 7.5, 7.6, 7.7, 7.8),
    "L-L": (2.6, 2.7, 2.8, 2.9, 3.0),
    "S-L": (4.1, 4.2, 4.3, 4.4),
    "L-S": (10.0, 14.0, 18.0, 22.0),
}
SYSTEMS = ("round robin", "infaas++", "llumnix")


Make = Callable[[Place], tuple[Scheduler, dict[str, ProfiledExecutor]]]


class Decodes:
    """Seconds of a decode step by requests and tokens of context."""

    name, device, max_batch = "decode", "a10", 256

    def __init__(self, scale: float) -> None:
        self._scale = scale

    def latency(self, batch: int, total: float = 0.0, square: float = 0.0) -> float:
        return self._scale * (BASE_S + JOB_S * batch + TOKEN_S * total)


@dataclass(frozen=True)
class Vllm01:
    """The scheduler of vLLM 0.1: prompts first, whole, those that were evicted in front.

    A step is of prompts only, up to `batched` tokens, as far as blocks beyond the watermark are
    free; else everybody decodes, and the latest lose their blocks where these run out. With `high`,
    requests of that class come first.
    """

    batched: int
    high: str = ""

    def decide(self, view: View) -> Decision:
        prompts = self._ordered(view.queues.get("llm.prefill", ()))
        decodes = self._ordered(view.queues.get("llm.decode", ()))
        cache = view.pool.kv_caches["llm"]
        free = view.free["llm"] - WATERMARK * cache.num_blocks
        chosen: list[Job] = []
        tokens = 0.0
        for job in prompts:
            blocks = cache.blocks_of(job.size)
            full = len(chosen) + len(decodes) >= 256
            if blocks > free or tokens + job.size > self.batched or full:
                break
            chosen.append(job)
            free -= blocks
            tokens += job.size
        if not chosen and prompts and not decodes:
            chosen = prompts[:1]
        return Decision(chosen or decodes)

    def _ordered(self, jobs: Sequence[Job]) -> list[Job]:
        def key(job: Job) -> tuple[bool, bool, float]:
            behind = bool(self.high) and job.slo.name != self.high
            return behind, not job.call_outputs, job.arrival

        return sorted(jobs, key=key)


def lengths(kind: str, count: int, random: np.random.RandomState) -> NDArray[np.int64]:
    """Numbers of tokens: a truncated Zipf, made to have the kind's mean."""
    mean, alpha = LENGTHS[kind]
    values = np.arange(1, 2 * mean)
    chance = values**-alpha
    drawn = random.choice(values, count, p=chance / chance.sum())
    found: NDArray[np.int64] = np.ceil(drawn * mean / drawn.mean()).astype(np.int64)
    return np.minimum(found, MOST_TOKENS)


def requests(
    trace: str, rate: float, cv: float, count: int, seed: int, graph: Graph, share_high: float = 0.0
) -> Iterator[Request]:
    """The artifact's requests: lengths of one seed, arrivals of `seed`."""
    inputs, outputs = trace.split("-")
    random = np.random.RandomState(0xCADE)
    prompts, ends = lengths(inputs, count, random), lengths(outputs, count, random)
    arrivals = np.random.RandomState(seed)
    shape = 1.0 / cv**2
    gaps = arrivals.gamma(shape, 1.0 / (rate * shape), count)
    high = arrivals.random_sample(count) < share_high
    for number, at in enumerate(np.cumsum(gaps).tolist()):
        params = {"prompt_tokens": int(prompts[number]), "max_tokens": int(ends[number])}
        slo = SLO(name="high" if high[number] else "normal", weight=10.0 if high[number] else 1.0)
        yield Request(str(number), graph, at, slo, params)


class Metrics:
    """Llumnix's seven metrics, of all requests or of one class. Seconds."""

    def __init__(self) -> None:
        self.rows: dict[str, list[tuple[float, float, float, float]]] = {}
        self._first: dict[str, float] = {}
        self._lost: dict[str, float] = {}
        self._evicted: dict[str, float] = {}

    def __call__(self, record: Record) -> None:
        if isinstance(record, Finished):
            for id in record.step.preempted:
                self._evicted.setdefault(id, record.step.started_at)
        elif isinstance(record, Emitted):
            self._first.setdefault(record.id, record.age)
            if record.id in self._evicted:
                lost = record.at - self._evicted.pop(record.id)
                self._lost[record.id] = self._lost.get(record.id, 0.0) + lost
        elif isinstance(record, Ended) and record.status == "done":
            first = self._first.pop(record.id)
            decode = (record.latency_s - first) / max(record.outputs - 1, 1)
            row = record.latency_s, first, decode, self._lost.pop(record.id, 0.0)
            self.rows.setdefault(record.slo.name, []).append(row)

    def told(self, name: str | None = None) -> dict[str, float]:
        """The metrics of a class; None: of all."""
        chosen = [self.rows[name]] if name else list(self.rows.values())
        request, prefill, decode, lost = np.array([row for rows in chosen for row in rows]).T
        found = {"preemption_loss": float(lost.mean())}
        for what, values in (("request", request), ("prefill", prefill), ("decode", decode)):
            found[f"{what}_mean"] = float(values.mean())
            found[f"{what}_p99"] = float(np.percentile(values, 99))
        return found


@dataclass(frozen=True)
class Setting:
    """One point of a figure."""

    trace: str
    rate: float
    system: str
    count: int = 10000
    seed: int = 0
    cv: float = 1.0
    batched: int = 12800
    share_high: float = 0.0
    classes: bool = False
    scaled: bool = False


def rules_of(setting: Setting) -> tuple[Router, Mover | None, Scaler | None]:
    """The rules of a system."""
    high = ("high",) if setting.classes else ()
    headroom = BLOCKS[setting.batched] - 100.0 if setting.classes else 0.0
    router: Router = ROUTERS["freeness"](own=False, headroom=headroom, high=high)
    mover: Mover | None = None
    if setting.system == "round robin":
        router = ROUTERS["round_robin"]()
    if setting.system == "llumnix":
        threshold = 10.0 if setting.trace in ("M-M", "S-L") else 3.0
        mover = MOVERS["freeness"](threshold=threshold, headroom=headroom, high=high)
    scaler: Scaler | None = SCALERS["freeness"](max=16) if setting.scaled else None
    return router, mover, scaler


def parts(decode: float, batched: int, classes: bool) -> tuple[Graph, dict[str, PhaseProfile], Make]:
    """The model, its profiles, and what makes an instance of it."""
    graph = Graph("llama", llm("llm"))
    fit = (0.0, 0.24e-3, 0.0)
    prefill = PrefillTable("prefill", list(PREFILL_S), list(PREFILL_S.values()), fit, device="a10")
    steps = StepProfile("llama-7b", prefill, Decodes(decode), device="a10")
    profiles = {f"llm.{phase}": PhaseProfile(steps, phase, max_batch=256) for phase in ("prefill", "decode")}
    policy = Vllm01(batched, "high" if classes else "")

    def make(place: Place) -> tuple[Scheduler, dict[str, ProfiledExecutor]]:
        pool = Pool("gpu", tuple(profiles), kv_caches={"llm": KVCache(BLOCKS[batched], 16)})
        executor = ProfiledExecutor(handover_s=BETWEEN_STEPS_S)
        return Scheduler([pool], policy, profiles), {"gpu": executor}

    return graph, profiles, make


def cluster_of(
    graph: Graph,
    profiles: dict[str, PhaseProfile],
    make: Make,
    rules: tuple[Router, Mover | None, Scaler | None],
    first: int,
    watcher: Watcher,
    move_s: float = 0.2,
) -> Cluster:
    """So many instances, which tell how they are after each of their steps."""
    never = 1e9
    settings = Settings(move_s=move_s, scale_s=10.0, bandwidth=BANDWIDTH, suspect_s=never, dead_s=never, drain_s=never)
    router, mover, scaler = rules
    again: dict[str, Again] = {"llama": "replay"}
    head = Head([graph], {"a10": profiles}, router, mover, scaler, settings=settings, again=again)
    kind = Kind("whole", "a10", first, make, load_s=5.0, token_bytes=KV_BYTES)
    network = Network(DELAY_S, BANDWIDTH)
    return Cluster(head, [kind], [graph], network, reporting=Reporting(0.0, never), watchers=[watcher])


def run(setting: Setting, decode: float = 1.0) -> dict[str, float]:
    """Simulate a point: its metrics, and how many instances there were on average."""
    graph, profiles, make = parts(decode, setting.batched, setting.classes)
    metrics, report = Metrics(), ClusterReport()
    first = 8 if setting.scaled else 16
    cluster = cluster_of(graph, profiles, make, rules_of(setting), first, report.happened)
    load = requests(setting.trace, setting.rate, setting.cv, setting.count, setting.seed, graph, setting.share_high)
    cluster.run(load, [metrics], report)
    found = {"instances": cluster.instance_s / report.duration, "moves": float(sum(report.moves.values()))}
    found |= metrics.told()
    if setting.share_high:
        for name in ("high", "normal"):
            found |= {f"{name} {what}": value for what, value in metrics.told(name).items()}
    return found


@dataclass(frozen=True)
class Once:
    """Moves the one request to the other instance, once it decodes."""

    def moves(self, fleet: Fleet) -> Sequence[Move]:
        names = list(fleet.instances)
        for source, target in ((names[0], names[1]), (names[1], names[0])):
            for place in fleet.requests(source):
                if place.free and place.outputs > 4 and place.moved_at < 0:
                    return [Move(place.id, source, target, "once")]
        return []


def downtime_s(tokens: int) -> tuple[float, float, float]:
    """Seconds for a request of so many tokens: computed anew, copied while it waits, moved live."""
    graph, profiles, make = parts(1.0, 12800, False)
    report = ClusterReport()
    rules = ROUTERS["least_work"](), Once(), None
    cluster = cluster_of(graph, profiles, make, rules, 2, report.happened, move_s=0.01)
    one = Request("0", graph, 0.0, SLO(), {"prompt_tokens": tokens, "max_tokens": 200})
    cluster.run([one], [], report)
    anew = profiles["llm.prefill"].latency(1, float(tokens), float(tokens) ** 2)
    live = report.downtime.mean
    assert live is not None, "it moved"
    return anew, tokens * KV_BYTES / BANDWIDTH, live
