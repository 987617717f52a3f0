"""How the instances of a cluster are, for people: values read off what a head knows of them."""

from __future__ import annotations

from dataclasses import dataclass

from neustream.cluster.fleet import Instance


@dataclass(frozen=True, slots=True)
class InstanceStatus:
    """An instance, by its latest report and what was sent there since.

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


def status_of(instance: Instance, place: str, now: float) -> InstanceStatus:
    """How an instance is at `now`, on the cluster's clock."""
    outlook, sent = instance.outlook, len(instance.sent)
    return InstanceStatus(
        instance.state,
        instance.role,
        place,
        outlook.live + sent,
        outlook.waiting + sent,
        outlook.backlog,
        max(now - outlook.sent_at, 0.0),
    )
