"""How an engine is, at some moment."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from neustream.engine.member import Drive
from neustream.errors import told

State = Literal["new", "serving", "closing", "closed", "failed"]


@dataclass(frozen=True, slots=True)
class MemberState:
    """How one member is: see `Snapshot`; `leaving`: whether it is to go."""

    open: int
    decisions: int
    policy_faults: int
    closed: Mapping[str, str]
    leaving: bool


@dataclass(frozen=True, slots=True)
class Snapshot:
    """How an engine is.

    Args:
        state: "failed" if its loop broke; `reason` says why it serves nothing or not all.
        open: requests that have no answer yet.
        policy_faults: decisions that FCFS made since the policy raised or decided what cannot be.
        closed: why pools serve nothing any more, by name (`member/pool` where members have names).
        members: each of those that serve, by name; the numbers above are their sums.
    """

    state: State
    reason: str = ""
    open: int = 0
    decisions: int = 0
    policy_faults: int = 0
    closed: Mapping[str, str] = field(default_factory=dict)
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
        members,
    )


def _of(drive: Drive) -> MemberState:
    scheduler = drive.scheduler
    return MemberState(
        len(scheduler.jobs),
        scheduler.decisions,
        drive.deciding.faults,
        dict(drive.closed),
        drive.departures is not None,
    )
