"""How the instances of a cluster are, for people: values read off what a head knows of them."""

from __future__ import annotations

from neustream.cluster.fleet import Instance
from neustream.engine.snapshot import InstanceStatus


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
