"""The event log of a run, and its export as a Chrome trace that Perfetto opens."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from neustream.core.events import Emitted, Ended, LegEnded, Submitted
from neustream.engine.events import Finished, Gone, Record, Refused

REQUEST_BYTES = 500
"""A saved trace has at least so many bytes for each request that has ended."""


class EventLog:
    """An observer that keeps what happened, as plain tuples and dicts without tensors.

    Memory grows with the run: attach one where a trace is wanted.
    """

    def __init__(self) -> None:
        self.steps: list[dict[str, Any]] = []
        self.requests: dict[str, dict[str, Any]] = {}
        self.waiting: list[tuple[float, int]] = []
        self.moves: list[dict[str, Any]] = []
        self.legs: list[dict[str, Any]] = []
        self._live = 0

    def __call__(self, record: Record) -> None:
        if isinstance(record, Finished):
            step = record.step
            self.steps.append(
                {
                    "stage": step.stage,
                    "member": record.member,
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
            if record.member:
                self.requests[record.id]["member"] = record.member
            self._count(record.at, 1)
        elif isinstance(record, Ended):
            facts = {"status": record.status, "reason": record.reason, "on_time": record.on_time}
            self.requests[record.id].update(end=record.at, **facts)
            if record.member:
                self.requests[record.id]["member"] = record.member  # it may have moved
            self._count(record.at, -1)
        elif isinstance(record, LegEnded):
            self.legs.append(
                {
                    "id": record.id,
                    "branch": record.branch,
                    "leg": record.leg,
                    "start": record.began,
                    "end": record.at,
                    "due": record.due if record.due < math.inf else None,
                    "late": record.late,
                    "status": record.status,
                }
            )
        elif isinstance(record, Gone):
            gone = {"status": "moved", "reason": "", "on_time": False}
            self.requests[record.id].update(end=record.at, **gone)
            self._count(record.at, -1)
        elif isinstance(record, Emitted):
            self.requests[record.id].setdefault("outputs", []).append(record.at)
        elif isinstance(record, Refused):
            name = f"{record.id} (refused {len(self.requests)})"  # another may have its id
            self.requests[name] = {
                "arrival": record.arrival,
                "end": record.at,
                "status": "failed",
                "reason": record.reason,
                "on_time": False,
            }

    def moved(
        self, id: str, source: str, target: str, held_at: float, at: float, reason: str
    ) -> None:
        """A request went from one member to another, and did not run from `held_at` to `at`."""
        self.moves.append(
            {
                "id": id,
                "source": source,
                "target": target,
                "held": held_at,
                "at": at,
                "reason": reason,
            }
        )

    def _count(self, at: float, change: int) -> None:
        self._live += change
        self.waiting.append((at, self._live))

    def chrome(self) -> dict[str, Any]:
        """The Chrome trace event format: a process a pool, a thread a worker, a slice a step.

        Requests are async slices from arrival to end, with their legs inside (those of a branch
        beside), their moves arrows, live requests a counter.
        Timestamps are in microseconds of the engine's clock.
        """
        pools = sorted({_pool(step) for step in self.steps})
        pids = {name: pid for pid, name in enumerate(pools, 1)}
        out = [_named("process_name", 0, "requests")]
        out += [_named("process_name", pid, f"pool {name}") for name, pid in pids.items()]
        for pool, worker in sorted({(_pool(step), step["worker"]) for step in self.steps}):
            out.append(_named("thread_name", pids[pool], f"worker {worker}", worker))
        out += [_slice(step, pids[_pool(step)]) for step in self.steps]
        for id, request in self.requests.items():
            out += _request(id, request)
        for leg in self.legs:
            out += _leg(leg)
        out += self._arrows(pids)
        out += [_live(at, count) for at, count in self.waiting]
        return {"traceEvents": out, "displayTimeUnit": "ms"}

    def _arrows(self, pids: dict[str, int]) -> list[dict[str, Any]]:
        """Moves as arrows from a request's last step at the source to its first at the target."""
        ran: dict[tuple[str, str], list[dict[str, Any]]] = {}
        moved = {move["id"] for move in self.moves}
        for step in self.steps if moved else ():
            for id in moved.intersection(step["jobs"]):
                ran.setdefault((step["member"], id), []).append(step)
        out = []
        for number, move in enumerate(self.moves, 1):
            left = [
                s for s in ran.get((move["source"], move["id"]), ()) if s["end"] <= move["held"]
            ]
            came = [
                s for s in ran.get((move["target"], move["id"]), ()) if s["start"] >= move["at"]
            ]
            if left and came:
                both = {"cat": "move", "name": f"{move['id']}: {move['reason']}", "id": number}
                out += [
                    {**both, "ph": "s", **_within(left[-1], pids)},
                    {**both, "ph": "f", "bp": "e", **_within(came[0], pids)},
                ]
        return out

    def save(self, path: Path | str) -> None:
        """Write the Chrome trace to `path`; open it at ui.perfetto.dev or chrome://tracing."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(self.chrome()))


def _within(step: dict[str, Any], pids: dict[str, int]) -> dict[str, Any]:
    """The middle of a step's slice, where an arrow ends."""
    middle = (step["start"] + step["end"]) / 2
    return {"pid": pids[_pool(step)], "tid": step["worker"], "ts": middle * 1e6}


def _pool(step: dict[str, Any]) -> str:
    """What the pool of a step is called, where members have pools of the same names."""
    return f"{step['member']}/{step['pool']}" if step["member"] else str(step["pool"])


def _named(what: str, pid: int, name: str, tid: int = 0) -> dict[str, Any]:
    """A name for a row of the trace."""
    return {"ph": "M", "name": what, "pid": pid, "tid": tid, "args": {"name": name}}


def _slice(step: dict[str, Any], pid: int) -> dict[str, Any]:
    """A step on its worker's row."""
    start = step["start"]
    return {
        "ph": "X",
        "name": f"{step['stage']} x{len(step['jobs'])}",
        "cat": step["stage"],
        "pid": pid,
        "tid": step["worker"],
        "ts": start * 1e6,
        "dur": (step["end"] - start) * 1e6,
        "args": {
            "jobs": step["jobs"],
            "expected_ms": step["expected_s"] * 1e3,
            "error": step["error"],
        },
    }


def _request(id: str, request: dict[str, Any]) -> list[dict[str, Any]]:
    """A request as an async slice from its arrival to its end, if it has ended."""
    outcome = "open"
    if "end" in request:
        outcome = "on time" if request["on_time"] else request["status"]
    both = {"name": f"{id}: {outcome}", "cat": "request", "id": id, "pid": 0, "tid": 0}
    began = {**both, "ph": "b", "ts": request["arrival"] * 1e6, "args": request}
    if "end" not in request:
        return [began]
    return [began, {**both, "ph": "e", "ts": request["end"] * 1e6}]


def _leg(leg: dict[str, Any]) -> list[dict[str, Any]]:
    """A leg as an async slice in its request's row, or in that of its branch."""
    row = f"{leg['id']}/{leg['branch']}" if leg["branch"] else leg["id"]
    both = {"name": leg["leg"], "cat": "request", "id": row, "pid": 0, "tid": 0}
    began = {**both, "ph": "b", "ts": leg["start"] * 1e6, "args": leg}
    return [began, {**both, "ph": "e", "ts": leg["end"] * 1e6}]


def _live(at: float, count: int) -> dict[str, Any]:
    """The number of live requests from an instant on."""
    counter = {"ph": "C", "name": "live requests", "pid": 0, "tid": 0}
    return {**counter, "ts": at * 1e6, "args": {"n": count}}
