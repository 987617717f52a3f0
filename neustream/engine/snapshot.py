"""How an engine is, at some moment."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from neustream.engine.member import Drive
from neustream.errors import told

State = Literal["new", "serving", "closing", "closed", "failed"]


@dataclass(frozen=True, slots=True)
class KVUse:
    """Blocks of KV caches: how many are used, of how many."""

    used: int
    blocks: int


@dataclass(frozen=True, slots=True)
class MemberState:
    """How one member is: see `Snapshot`; `leaving`: whether it is to go."""

    open: int
    decisions: int
    policy_faults: int
    closed: Mapping[str, str]
    leaving: bool
    kv: Mapping[str, KVUse] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class InstanceStatus:
    """How an instance of a cluster is, by its latest report and what was sent there since.

    Args:
        state: "up", "suspect" or "draining".
        role, place: what it serves, by name; where it is, for people.
        live, waiting: requests there, and those that have not begun.
        backlog_s: device seconds of their calls, in efficient batches.
        told_ago_s: since that report.
    """

    state: str
    role: str
    place: str
    live: int
    waiting: int
    backlog_s: float
    told_ago_s: float


@dataclass(frozen=True, slots=True)
class Snapshot:
    """How an engine is.

    Args:
        state: "failed" if its loop broke; `reason` says why it serves nothing or not all.
        open: requests that have no answer yet.
        policy_faults: decisions that FCFS made since the policy raised or decided what cannot be.
        closed: why pools serve nothing any more, by name (`member/pool` where members have names).
        kv: used blocks of KV caches, by the language model's name in graphs.
        members: each of those that serve, by name; the numbers above are their sums.
    """

    state: State
    reason: str = ""
    open: int = 0
    decisions: int = 0
    policy_faults: int = 0
    closed: Mapping[str, str] = field(default_factory=dict)
    kv: Mapping[str, KVUse] = field(default_factory=dict)
    members: Mapping[str, MemberState] = field(default_factory=dict)


def take(state: State, drives: Sequence[Drive], open: int, fault: BaseException | None) -> Snapshot:
    """A snapshot of an engine that drives these; from any thread."""
    members = {drive.name: _of(drive) for drive in drives}
    closed: dict[str, str] = {}
    for name, member in members.items():
        for pool, why in member.closed.items():
            closed[f"{name}/{pool}" if name else pool] = why
    return Snapshot(
        state,
        "; ".join(closed.values()) if fault is None else told(fault),
        open,
        sum([member.decisions for member in members.values()]),
        sum([member.policy_faults for member in members.values()]),
        closed,
        _sums([member.kv for member in members.values()]),
        members,
    )


def _of(drive: Drive) -> MemberState:
    scheduler = drive.scheduler
    return MemberState(
        len(scheduler.jobs),
        scheduler.asked.decisions,
        drive.deciding.faults,
        dict(drive.closed),
        drive.leaving,
        {name: KVUse(used, of) for name, (used, of) in scheduler.kv_blocks.items()},
    )


def _sums(of: Sequence[Mapping[str, KVUse]]) -> dict[str, KVUse]:
    """What several use, together."""
    found: dict[str, KVUse] = {}
    for each in of:
        for name, use in each.items():
            before = found.get(name, KVUse(0, 0))
            found[name] = KVUse(before.used + use.used, before.blocks + use.blocks)
    return found
