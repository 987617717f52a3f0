"""vLLM's part of benchmarks/fidelity.py: an OPT in vLLM under our scheduler class, by policy."""

from __future__ import annotations

import tempfile
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from llm_vllm import PROMISES, Asked, alone, serve, simulated, throughput, workload
from vllm_engines import OURS, STOCK, make_model, make_server, size_on

from neustream import POLICIES
from neustream.analysis.fidelity import Outcome

TTFT, TPOT = PROMISES[1]
LEARN = 48
"""Requests that each engine serves first, so that steps of all kinds were seen."""


def outcome_of(some: Sequence[Asked]) -> Outcome:
    """What clients saw: every token in time, and latencies of what is done."""
    seconds = [asked.tokens[-1] - asked.arrival for asked in some if asked.done]
    low, high = (float(x) for x in np.percentile(seconds, (50, 99))) if seconds else (None, None)
    return Outcome(sum(asked.every for asked in some) / len(some), low, high)


class Servers:
    """An engine of vLLM's for each policy, and one of stock vLLM that tells where the knee is.

    `size`: of the model, which the kind of device says.
    """

    def __init__(self, policies: Collection[str], device: str) -> None:
        self.size = size_on(device)
        with tempfile.TemporaryDirectory() as name:
            make_model(Path(name), self.size)
            stock = make_server(Path(name), self.size, STOCK)
            self._engines = {policy: make_server(Path(name), self.size, OURS, policy) for policy in sorted(policies)}
        self._prefill, self._decode = alone(stock)
        some = {STOCK: stock, OURS: next(iter(self._engines.values()))}
        self._knee = throughput(some, 2)[STOCK]
        for engine in self._engines.values():
            serve(engine, self._asked(LEARN, self._knee, seed=999), OURS)

    def _asked(self, count: int, rate: float, seed: int) -> list[Asked]:
        some = workload(count, rate, seed)
        for asked in some:
            asked.first, asked.step = TTFT * self._prefill(len(asked.prompt)), TPOT * self._decode
        return some

    def serve(
        self, policy: str, load: float, count: int, seed: int
    ) -> tuple[Outcome, dict[str, Any], dict[str, Outcome]]:
        """Serve `count` requests at `load` times the knee, and simulate them with latencies as learnt.

        What was served, what was seen, and what was simulated by what that knows.
        """
        engine = self._engines[policy]
        scheduler = engine.engine_core.engine_core.scheduler
        steps, overhead = scheduler.stats.steps, scheduler.stats.overhead_s
        some = self._asked(count, load * self._knee, seed + 1)
        serve(engine, some, OURS)
        taken = scheduler.stats.steps - steps
        each = (scheduler.stats.overhead_s - overhead) / max(taken, 1) * 1e6
        report = simulated(some, self.size, scheduler.step_times, POLICIES[policy]())
        seen: dict[str, Any] = {"decisions": taken, "decision_us": [each, each], "knee_rps": self._knee}
        seen["step_error"] = scheduler.stats.step_error
        return outcome_of(some), seen, {"profile": Outcome.of(report.to_dict())}
