"""Placements of what a config describes: its devices, needs and load, and simulations as judges."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from neustream.cluster.book import asked_of
from neustream.cluster.planning import Charges, Device, Needs, Placement, Plan, Settings, plan
from neustream.cluster.planning.placement import Stages, Where
from neustream.config.cluster import ClusterConfig, InstanceConfig
from neustream.core.outlook import Asked
from neustream.core.rates import Rates
from neustream.core.types import Request
from neustream.engine.report import Report
from neustream.errors import ConfigError, nearest
from neustream.experiment.prepared import Prepared
from neustream.experiment.roles import Role, roles_of, stages_of

ALL = "gpu"
"""What devices are called where a config only says how many there are."""

Serve = Callable[[Prepared, ClusterConfig], Report]
"""Simulates a workload on a cluster."""


@dataclass(frozen=True)
class Ground:
    """What a config has to place on what.

    Attributes:
        stages: all, in the order of their graphs. present: the placement that the config has.
        kinds: the first kind of instances that the config has on each kind of device.
        roles: of the config's kinds, by name.
    """

    prepared: Prepared
    config: ClusterConfig
    devices: tuple[Device, ...]
    stages: Stages
    present: Placement
    kinds: Mapping[str, InstanceConfig]
    roles: Mapping[str, Role]

    def charges(self, load: Sequence[Asked], span: float) -> Charges:
        """What a load costs here."""
        needs = needs_of(self.prepared, self.config)
        return Charges(load, span, self.stages, self.devices, needs)

    def with_placement(self, placement: Placement) -> ClusterConfig:
        """The config with other roles; nothing breaks in it, and nobody scales."""
        instances = {}
        for (device, stages), count in placement.as_counts().items():
            update = {"count": count, "stages": self.served(stages)}
            instances[self.name(device, stages)] = self.kinds[device].model_copy(update=update)
        return self.config.model_copy(update={"instances": instances, "scaler": {}, "faults": []})

    def served(self, stages: Stages) -> list[str] | None:
        """The stages of a role as a config says them; None: all."""
        return None if len(stages) == len(self.stages) else list(stages)

    def name(self, device: str, stages: Stages) -> str:
        """What instances of a role are called: `h100` for all stages, else `h100.unet+vae`."""
        some = self.served(stages)
        return device if some is None else f"{device}.{'+'.join(some)}"


def ground_of(prepared: Prepared, config: ClusterConfig) -> Ground:
    """What a config has to place on what. Kinds with the same profiles are on one kind of device.

    Raises:
        ConfigError: as of `roles_of`; weights of a stage that is none.
        ProfileError: as of loading profiles.
    """
    roles = roles_of(prepared, config)
    order = [stage for graph in prepared.graphs for stage in graph.stages]
    for stage in config.weights_bytes:
        if stage not in order:
            raise ConfigError(f"cluster.weights_bytes: no stage {stage!r}; {nearest(stage, order)}")
    devices: dict[str, Device] = {}
    kinds: dict[str, InstanceConfig] = {}
    present: dict[Where, int] = {}
    for name, kind in config.kinds.items():
        device = next((each for each, other in kinds.items() if _alike(kind, other)), "")
        if not device:
            device = _called(name, kind, roles[name], config)
            device = name if device in kinds else device
            kinds[device] = kind
            memory = math.inf if kind.memory_bytes is None else kind.memory_bytes
            devices[device] = Device(device, 0, Rates(roles[name].profiles), memory, roles[name].load_s)
        devices[device] = replace(devices[device], count=devices[device].count + kind.count)
        served = stages_of(prepared, name, kind)
        where = device, tuple(stage for stage in order if stage in served)
        present[where] = present.get(where, 0) + kind.count
    placed = Placement.of(present)
    found = tuple(devices.values())
    return Ground(prepared, config, found, tuple(order), placed, kinds, roles)


def _called(name: str, kind: InstanceConfig, role: Role, config: ClusterConfig) -> str:
    """What a kind of device is called: as its instances, or those of a role by its profiles."""
    if isinstance(config.instances, int):
        return ALL
    if kind.stages is None:
        return name
    words = next(iter(role.profiles.values())).device.lower().split()
    return words[-1] if words else name


def _alike(kind: InstanceConfig, other: InstanceConfig) -> bool:
    """Whether two kinds are on the same kind of device."""
    return (kind.profiles, kind.memory_bytes) == (other.profiles, other.memory_bytes)


def needs_of(prepared: Prepared, config: ClusterConfig) -> Needs:
    """What the stages of a config need beside time."""
    rooms = {model: float(cache.capacity) for pool in prepared.pools for model, cache in pool.kv_caches.items()}
    texts = {stage.model for graph in prepared.graphs for stage in graph.stages.values() if stage.caches}
    network = config.network
    return Needs(
        config.weights_bytes,
        network.state_bytes,
        network.token_bytes,
        network.bandwidth,
        rooms,
        frozenset() if network.token_bytes else frozenset(texts),
    )


def plan_for(
    ground: Ground,
    requests: Sequence[Request],
    serve: Serve,
    settings: Settings,
    seen: Callable[[Placement], None] = lambda placement: None,
) -> tuple[Plan, Charges]:
    """The placement for some requests that came, judged by simulating them.

    Raises:
        ConfigError: as of `plan`.
    """
    span = span_of(requests)
    prepared = replace(ground.prepared, requests=requests)

    def judge(placement: Placement) -> float:
        report = serve(prepared, ground.with_placement(placement))
        seen(placement)
        return report.counts["on_time"] / span

    charges = ground.charges([asked_of(request) for request in requests], span)
    present = ground.present if _possible(charges, ground.present) else None
    return plan(charges, judge, present, settings), charges


def _possible(charges: Charges, placement: Placement) -> bool:
    """Whether weights fit where a config puts them."""
    return all(device in charges.fits(stages) for device, stages, _ in placement.counts)


def span_of(requests: Sequence[Request]) -> float:
    """Seconds in which requests came, one gap after the last included."""
    if len(requests) < 2:
        raise ConfigError(f"a placement needs a load: {len(requests)} requests are too few")
    first, last = requests[0].arrival, requests[-1].arrival
    return max((last - first) * len(requests) / (len(requests) - 1), 1e-6)


def last_of(requests: Sequence[Request], seconds: float) -> list[Request]:
    """The requests of the last so many seconds, from 0 on."""
    end = requests[-1].arrival if requests else 0.0
    start = max(end - seconds, 0.0)
    late = [request for request in requests if request.arrival >= start]
    return [replace(request, arrival=request.arrival - start) for request in late]
