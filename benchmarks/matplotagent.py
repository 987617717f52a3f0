"""MatPlotAgent as in the artifact's multi-agent experiment: four models on a device each, and an executor.

codellama_1 -> executor -> llava (two replicas, in turns) -> codellama_2 -> executor. Latencies, lengths of outputs,
order and seeds are the artifact's. What it does not say is assumed, below.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from agent_rules import Call

from neustream.core.batch import Batch
from neustream.core.graph import Graph, Stage, seq
from neustream.core.kv_cache import KVCache
from neustream.core.policy import Policy, Pool
from neustream.core.profile import LinearProfile
from neustream.core.scheduler import Scheduler
from neustream.core.steps import Step, StepLatency
from neustream.core.types import SLO, Request
from neustream.engine.clock import VirtualClock
from neustream.engine.engine import Engine
from neustream.engine.events import Observer
from neustream.engine.executor import ProfiledExecutor
from neustream.engine.member import Member
from neustream.engine.report import Report
from neustream.graphs import llm, llm_profiles
from neustream.profiling.steps import load_steps
from neustream.workload import gamma_arrivals

PROFILES = Path(__file__).parent.parent / "profiles/rtx4090/matplotagent"
SEEDS = {1: 4, 2: 6, 3: 8, 4: 6}
"""Of the artifact's arrivals, by cv."""
EXECUTOR_SLO_S = 2.5
"""What a run of the executor adds to what a request is promised."""
EXECUTOR_S = 1.5
"""Seconds that it takes: assumed, at most 40 at once."""
MEMORY = 12000
"""Tokens of a device's KV cache: assumed, what 90 % of 24 GB leaves beside 13.5 GB of weights and activations."""
IMAGE = 576
"""Tokens of the picture in a prompt of LLaVA."""
MODELS = {"codellama_1": "codellama_7b", "llava.0": "llava_7b", "llava.1": "llava_7b", "codellama_2": "codellama_7b"}
READS = {"codellama_1": (), "llava": ("codellama_1",), "codellama_2": ("codellama_1", "llava")}
"""Whose outputs are in the prompt of a call, beside the request's own."""


@dataclass(frozen=True)
class Workload:
    """Requests of one setting, and what each of their calls is promised."""

    requests: Sequence[Request]
    calls: Mapping[str, Sequence[Call]]
    steps: Mapping[str, StepLatency]

    def simulate(self, policy: Policy, observers: Sequence[Observer] = ()) -> Report:
        """Serve them in virtual time."""
        ends = {(id, call.model): call.outputs for id, calls in self.calls.items() for call in calls}

        def outcome(batch: Batch) -> list[dict[str, bool]]:
            over = [ends.get((job.id, job.stage.model if job.stage else "")) for job in batch.jobs]
            return [
                {"ended": True} if end is not None and job.call_outputs + 1 >= end else {}
                for job, end in zip(batch.jobs, over, strict=True)
            ]

        cache = KVCache(MEMORY // 16, 16)
        pools = [Pool(name, (f"{name}.prefill", f"{name}.decode"), kv_caches={name: cache}) for name in MODELS]
        pools.append(Pool("executor", ("executor_1", "executor_2"), concurrency=40))
        profiles = {
            name: profile for model in MODELS for name, profile in llm_profiles(model, self.steps[model]).items()
        }
        tools = {name: LinearProfile(name, base=EXECUTOR_S, max_batch=1) for name in ("executor_1", "executor_2")}
        executor = ProfiledExecutor(outcome=outcome)
        scheduler = Scheduler(pools, policy, {**profiles, **tools})
        member = Member(scheduler, {pool.name: executor for pool in pools})
        return Engine(member, VirtualClock(), observers).run(self.requests)


def workload(*, rate: float, cv: float, scale: float, count: int, seed: int | None) -> Workload:
    """The artifact's requests. A request may take `scale` times what its calls take alone, and the executor's SLOs.

    Args:
        seed: None: the artifact's.
    """
    lengths = json.loads((PROFILES / "lengths.json").read_text())
    steps = {name: load_steps(PROFILES / f"{file}.json") for name, file in MODELS.items()}
    arrivals = gamma_arrivals(count, rate=rate, cv=cv, seed=SEEDS[int(cv)] if seed is None else seed)
    graphs = _graphs()
    requests, calls = [], {}
    for at, arrival in enumerate(arrivals.tolist()):
        place = at % len(lengths["prompt"])
        outputs = {name: some[place] for name, some in lengths["outputs"].items()}
        own = _calls(arrival, scale, lengths["prompt"][place], outputs, at % 2, steps)
        total = own[-1].end + EXECUTOR_SLO_S - arrival
        params = {f"{call.model}.prompt": call.prompt for call in own}
        params |= {f"{call.model}.max_tokens": call.outputs for call in own}  # the artifact forces them so
        requests.append(Request(f"plot-{at}", graphs[at % 2], arrival, SLO(total), params))
        calls[requests[-1].id] = own
    return Workload(requests, calls, steps)


def _graphs() -> list[Graph]:
    """The way by each replica."""
    nodes = {name: llm(name, prompt=f"{name}.prompt", max_tokens=f"{name}.max_tokens") for name in MODELS}
    first, last = Stage("executor_1"), Stage("executor_2")
    return [
        Graph("matplotagent", seq(nodes["codellama_1"], first, nodes[llava], nodes["codellama_2"], last))
        for llava in ("llava.0", "llava.1")
    ]


def _calls(
    arrival: float,
    scale: float,
    prompt: int,
    outputs: Mapping[str, int],
    replica: int,
    steps: Mapping[str, StepLatency],
) -> list[Call]:
    """What each call of a request is promised, one behind the other."""
    at = arrival
    calls: list[Call] = []
    for name, reads in READS.items():
        label = f"llava.{replica}" if name == "llava" else name
        tokens = prompt + sum([outputs[read] for read in reads]) + (IMAGE if name == "llava" else 0)
        first = scale * steps[label].seconds(Step(1, tokens, tokens**2))
        one, other = (steps[label].seconds(Step(decodes=1, context=context)) for context in (1000, 2000))
        each = (other - one) / 1000
        call = Call(label, at, first, tokens, outputs[name], scale * (one - 1000 * each), scale * each)
        calls.append(call)
        at = call.end + (EXECUTOR_SLO_S if name == "codellama_1" else 0.0)
    return calls
