"""The event log of a run, and its export as a Chrome trace that Perfetto opens."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from neustream.core.events import Emitted, Ended, Submitted
from neustream.engine.events import Finished, Record, Refused


class EventLog:
    """An observer that keeps what happened, as plain tuples and dicts without tensors.

    Memory grows with the run: attach one where a trace is wanted.
    """

    def __init__(self) -> None:
        self.steps: list[dict[str, Any]] = []
        self.requests: dict[str, dict[str, Any]] = {}
        self.waiting: list[tuple[float, int]] = []
        self._live = 0

    def __call__(self, record: Record) -> None:
        if isinstance(record, Finished):
            step = record.step
            self.steps.append(
                {
                    "stage": step.stage,
                    "pool": step.pool,
                    "worker": step.worker,
                    "start": step.started_at,
                    "end": record.at,
                    "expected_s": step.expected_s,
                    "jobs": list(step.ids),
                    "error": record.error,
                }
            )
        elif isinstance(record, Submitted):
            self.requests[record.id] = {
                "graph": record.graph,
                "arrival": record.arrival,
                "due": record.due if record.due < math.inf else None,
            }
            self._count(record.at, 1)
        elif isinstance(record, Ended):
            facts = {"status": record.status, "reason": record.reason, "on_time": record.on_time}
            self.requests[record.id].update(end=record.at, **facts)
            self._count(record.at, -1)
        elif isinstance(record, Emitted):
            self.requests[record.id].setdefault("outputs", []).append(record.at)
        elif isinstance(record, Refused):
            request = record.request  # not by its id, which another may have
            at = {"arrival": request.arrival, "end": record.at}
            name = f"{request.id} (refused {len(self.requests)})"
            self.requests[name] = {
                **at,
                "status": "failed",
                "reason": record.reason,
                "on_time": False,
            }

    def _count(self, at: float, change: int) -> None:
        self._live += change
        self.waiting.append((at, self._live))

    def chrome(self) -> dict[str, Any]:
        """The Chrome trace event format: a process a pool, a thread a worker, a slice a step.

        Requests are async slices from arrival to end, live requests a counter. Timestamps are in
        microseconds of the engine's clock.
        """
        pools = {
            name: at for at, name in enumerate(sorted({step["pool"] for step in self.steps}), 1)
        }
        out: list[dict[str, Any]] = []
        for name, pid in pools.items():
            out.append(
                {"ph": "M", "name": "process_name", "pid": pid, "args": {"name": f"pool {name}"}}
            )
        for pool, worker in sorted({(step["pool"], step["worker"]) for step in self.steps}):
            args = {"name": f"worker {worker}"}
            out.append(
                {"ph": "M", "name": "thread_name", "pid": pools[pool], "tid": worker, "args": args}
            )
        for step in self.steps:
            start, seconds = step["start"], step["end"] - step["start"]
            args = {
                "jobs": step["jobs"],
                "expected_ms": step["expected_s"] * 1e3,
                "error": step["error"],
            }
            out.append(
                {
                    "ph": "X",
                    "name": f"{step['stage']} x{len(step['jobs'])}",
                    "cat": step["stage"],
                    "pid": pools[step["pool"]],
                    "tid": step["worker"],
                    "ts": start * 1e6,
                    "dur": seconds * 1e6,
                    "args": args,
                }
            )
        out.append({"ph": "M", "name": "process_name", "pid": 0, "args": {"name": "requests"}})
        for id, request in self.requests.items():
            outcome = (
                "open"
                if "end" not in request
                else "on time"
                if request["on_time"]
                else request["status"]
            )
            both = {"name": f"{id}: {outcome}", "cat": "request", "id": id, "pid": 0, "tid": 0}
            out.append({**both, "ph": "b", "ts": request["arrival"] * 1e6, "args": request})
            if "end" in request:
                out.append({**both, "ph": "e", "ts": request["end"] * 1e6})
        for at, live in self.waiting:
            out.append(
                {
                    "ph": "C",
                    "name": "live requests",
                    "pid": 0,
                    "tid": 0,
                    "ts": at * 1e6,
                    "args": {"n": live},
                }
            )
        return {"traceEvents": out, "displayTimeUnit": "ms"}

    def save(self, path: Path | str) -> None:
        """Write the Chrome trace to `path`; open it at ui.perfetto.dev or chrome://tracing."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(self.chrome()))
