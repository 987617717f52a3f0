"""The scaler `plan` in simulations: all roles that devices may get, and plans by simulation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from neustream.cluster.planning import Placement, Settings
from neustream.cluster.planning.charges import chains_of
from neustream.cluster.planning.cuts import possible_roles
from neustream.cluster.planning.placement import Where
from neustream.cluster.planning.replanner import Arrivals, Replanner
from neustream.cluster.rules.replan import Replan
from neustream.config.cluster import ClusterConfig
from neustream.core.graph import Graph
from neustream.core.types import Request
from neustream.experiment.placements import Ground, Serve, needs_of, plan_for


def role_names(ground: Ground) -> dict[Where, str]:
    """What instances are called, by kind of device and stages, for all roles that there may be."""
    needs = needs_of(ground.prepared, ground.config)
    found = {}
    for device in ground.devices:
        for stages in possible_roles(ground.stages, chains_of(ground.stages)):
            rest = [stage for stage in ground.stages if stage not in stages]
            if needs.fits(stages, device) and needs.may_part(stages, rest):
                found[device.name, stages] = ground.name(device.name, stages)
    for device_name, stages, _ in ground.present.counts:
        found[device_name, stages] = ground.name(device_name, stages)
    return found


def with_all_roles(ground: Ground, names: Mapping[Where, str]) -> ClusterConfig:
    """The config with a kind of instances for each role; there are those of its placement."""
    present = ground.present.as_counts()
    instances = {}
    for (device, stages), name in names.items():
        update = {"count": present.get((device, stages), 0), "stages": ground.served(stages)}
        instances[name] = ground.kinds[device].model_copy(update=update)
    return ground.config.model_copy(update={"instances": instances})


def replanner_of(ground: Ground, rule: Replan, names: Mapping[Where, str], serve: Serve) -> Replanner:
    """The scaler of a simulated cluster whose devices change their roles."""
    graphs = {stage: graph for graph in ground.prepared.graphs for stage in graph.stages}
    settings = Settings(rule.most, rule.tries, rule.gain, rule.plan_s, rule.drain_s)

    def planned(arrivals: Arrivals, present: Placement) -> Placement:
        requests = requests_of(arrivals, graphs)
        return plan_for(replace(ground, present=present), requests, serve, settings)[0].placement

    return Replanner(rule, names, ground.devices, ground.present, planned)


def requests_of(arrivals: Arrivals, graphs: Mapping[str, Graph]) -> list[Request]:
    """Requests that came, anew from 0 on."""
    first = arrivals[0][0]
    return [
        Request(asked.id, graphs[next(iter(asked.calls))], at - first, asked.slo, asked.params)
        for at, asked in arrivals
    ]
