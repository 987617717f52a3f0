"""The graph of an agent, as a config describes it: calls of models and tools, loops, branches."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import cached_property, partial
from typing import Any

from neustream.config.agent import (
    AgentExperiment,
    CallNode,
    LoopNode,
    ModelCall,
    NodeConfig,
    NodeSlo,
    ParNode,
    SwitchNode,
    ToolCall,
    nodes_below,
)
from neustream.config.fields import mean_of
from neustream.core.graph import Graph, Node, Stage, loop, seq, switch
from neustream.core.job import Job
from neustream.core.nodes import call, par, tool
from neustream.core.types import SLO
from neustream.experiment.tool_times import mean_of_latency
from neustream.graphs import SEE_BATCH, llm, with_eyes

Turn = Mapping[str, int]
"""The replica of each model that a request's calls go to."""


class AgentGraphs:
    """The graphs of an agent's requests, one for each turn of the replicas that they call.

    Args:
        name: of the graphs; prefix: of what models and tools are called.
    """

    def __init__(self, experiment: AgentExperiment, name: str, prefix: str) -> None:
        self._experiment = experiment
        self._name = name
        self._prefix = prefix
        self._made: dict[tuple[int, ...], Graph] = {}

    def of(self, at: int) -> Graph:
        """The graph of the workload's `at`-th request: requests take replicas in turns."""
        turn = {name: at % len(labels) for name, labels in self.labels.items()}
        key = tuple(turn.values())
        if key not in self._made:
            self._made[key] = Graph(self._name, self._seq(self._experiment.agent, turn))
        return self._made[key]

    @cached_property
    def labels(self) -> dict[str, list[str]]:
        """What the replicas of each model are called."""
        found = {}
        for name, model in self._experiment.llms.items():
            on = [device for device, names in self._experiment.placed.items() if name in names]
            count, label = len(on) or model.replicas, self._prefix + name
            found[name] = [label] if count == 1 else [f"{label}.{number}" for number in range(count)]
        return found

    @cached_property
    def llms(self) -> dict[str, list[Node]]:
        """A node for each replica of each model, behind its vision tower if a call has images."""
        return {
            name: [self._llm(name, label, model.max_batch) for label in self.labels[name]]
            for name, model in self._experiment.llms.items()
        }

    def _llm(self, name: str, label: str, max_batch: int) -> Node:
        node: Node = llm(label, max_batch=max_batch)
        if name not in self._seeing:
            return node
        see = Stage(see_of(label), min(max_batch, SEE_BATCH), size=lambda job: job.params["images"])
        return with_eyes(see, node, lambda job: int(job.params["images"] > 0))

    @cached_property
    def calls(self) -> list[ModelCall]:
        """All calls of models."""
        return [node for node in nodes_below(self._experiment.agent) if isinstance(node, ModelCall)]

    @cached_property
    def _seeing(self) -> set[str]:
        """Models that are called with images."""
        return {node.llm for node in self.calls if node.images}

    @cached_property
    def _tools(self) -> dict[str, Stage]:
        return {
            name: tool(
                self._prefix + name,
                concurrency=of.concurrency,
                timeout_s=of.timeout_s,
                retries=of.retries,
                expect_s=mean_of_latency(name, of.latency_s),
            )
            for name, of in self._experiment.tools.items()
        }

    @cached_property
    def _numbers(self) -> dict[int, int]:
        return {id(node): at for at, node in enumerate(nodes_below(self._experiment.agent))}

    def _seq(self, nodes: Sequence[NodeConfig], turn: Turn) -> Node:
        made = [self._node(node, turn) for node in nodes]
        return made[0] if len(made) == 1 else seq(*made)

    def _node(self, node: NodeConfig, turn: Turn) -> Node:
        """A node of the graph; what is drawn for it is a parameter of the request."""
        if isinstance(node, ModelCall):
            name, replica = node.known_as, self.llms[node.llm][turn[node.llm]]
            return call(replica, name, slo=_slo(node.slo), params=partial(_tokens_of, name))
        if isinstance(node, ToolCall):
            return self._tools[node.tool]
        key = f"node {self._numbers[id(node)]}"
        if isinstance(node, ParNode):
            branches = {name: self._seq(some, turn) for name, some in node.par.items()}
            return par(policy=node.policy, **branches)
        if isinstance(node, LoopNode):
            expect = round(mean_of(node.times)) if node.expect is None else node.expect
            return loop(self._seq(node.loop, turn), times=partial(_param, key), expect=expect)
        if isinstance(node, SwitchNode):
            return switch(
                partial(_param, key),
                {name: self._seq(case.nodes, turn) for name, case in node.switch.items()},
            )
        return call(self._seq(node.call, turn), node.name, slo=_slo(node.slo))


def see_of(label: str) -> str:
    """The stage of a model's vision tower."""
    return f"{label}.see"


def _param(name: str, job: Job) -> Any:
    return job.params[name]


def _tokens_of(name: str, job: Job) -> Mapping[str, int]:
    tokens: Mapping[str, int] = job.params[name]
    return tokens


def _slo(of: NodeSlo | None) -> SLO | None:
    if of is None:
        return None
    return SLO(of.total_s or math.inf, of.first_s or math.inf, of.step_s or math.inf)


def _drawn(node: NodeConfig) -> str:
    """A node in a line."""
    if isinstance(node, ModelCall):
        return node.known_as
    if isinstance(node, ToolCall):
        return node.tool
    if isinstance(node, ParNode):
        return "(" + " | ".join(line_of(some) for some in node.par.values()) + ")"
    if isinstance(node, LoopNode):
        return f"({line_of(node.loop)}) x times"
    if isinstance(node, SwitchNode):
        return "(" + " or ".join(line_of(case.nodes) or "nothing" for case in node.switch.values()) + ")"
    assert isinstance(node, CallNode)
    return f"{node.name}({line_of(node.call)})"


def line_of(nodes: Sequence[NodeConfig]) -> str:
    """Nodes one after the other in a line."""
    return " -> ".join(_drawn(node) for node in nodes)
