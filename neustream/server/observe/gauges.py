"""How a server is at this moment, read off without waiting for anybody."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from neustream.engine.snapshot import KVUse
from neustream.server.backing import Happened, InstanceState


@dataclass(frozen=True, slots=True)
class Gauges:
    """How a server is.

    Args:
        state: of its life; reason: why it is no better.
        now: of the engine's clock, seconds.
        open: requests without an answer; policy_faults: see `Snapshot`.
        wait_s: seconds until one more request would be done; None: not known.
        connections: that are open.
        kv: used blocks of each language model's KV cache, by its node.
        instances: of a cluster, by name; happened: what happened between them; None: there is no cluster.
    """

    state: str
    reason: str = ""
    now: float = 0.0
    open: int = 0
    policy_faults: int = 0
    wait_s: float | None = None
    connections: int = 0
    kv: Mapping[str, KVUse] = field(default_factory=dict)
    instances: Mapping[str, InstanceState] = field(default_factory=dict)
    happened: Happened | None = None
