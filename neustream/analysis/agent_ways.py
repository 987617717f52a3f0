"""What each request of an agent goes through, as its config and what was drawn for it say."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from neustream.analysis.bounds.agents.ways import Call, Fork, Line, Wait, Way, Within
from neustream.config.agent import (
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
from neustream.core.nodes import needed
from neustream.core.profile import LatencyProfile
from neustream.core.types import Request
from neustream.experiment.agent_graphs import see_of
from neustream.experiment.pipelines.agent import AgentPipeline
from neustream.experiment.tool_times import SimulatedTool
from neustream.graphs import SEE_BATCH


@dataclass(frozen=True, slots=True)
class Branch:
    """What a branch of a request is called, and how often it has called each tool so far.

    `sure`: whether it has to be done.
    """

    id: str
    sure: bool = True
    calls: Counter[str] = field(default_factory=Counter)


class Ways:
    """The ways of an agent's requests.

    Args:
        profiles: least seconds of steps, by stage; those of vision towers are asked.
    """

    def __init__(self, pipeline: AgentPipeline, profiles: Mapping[str, LatencyProfile]) -> None:
        self._pipeline = pipeline
        self._profiles = profiles
        nodes = nodes_below(pipeline.experiment.agent)
        self.numbers = {id(node): at for at, node in enumerate(nodes)}
        calls = [node for node in nodes if isinstance(node, ModelCall)]
        self._most_images = SEE_BATCH * max([call.images for call in calls], default=0)
        seed = pipeline.experiment.workload.seed
        tools = pipeline.experiment.tools.items()
        self.tools = {name: SimulatedTool(name, of, seed) for name, of in tools}

    def of(self, request: Request) -> Way:
        """That of one request."""
        one = _OneWay(self, request, self._pipeline.replicas_of(request.graph.stages))
        return one.line(self._pipeline.experiment.agent, Branch(request.id))

    def see(self, label: str, images: int) -> float:
        """Least seconds of a look at so many images, alone or with those of others."""
        profile = self._profiles[see_of(label)]
        return min([profile.latency(1, float(total)) for total in range(images, self._most_images + 1)])


class _OneWay:
    """The way of one request; tools are drawn as `SimulatedTool` draws them when they are called."""

    def __init__(self, ways: Ways, request: Request, turn: Mapping[str, str]) -> None:
        self._ways, self._request, self._turn = ways, request, turn

    def line(self, nodes: Sequence[NodeConfig], branch: Branch) -> Line:
        return Line([part for node in nodes for part in self._parts(node, branch)])

    def _parts(self, node: NodeConfig, branch: Branch) -> Iterator[Way]:
        match node:
            case ToolCall():
                yield Wait(self._tool(node.tool, branch))
            case ModelCall():
                yield from self._own(self._call(node), node.slo)
                branch.calls.clear()  # what a model keeps of a request is let go of, everywhere
            case CallNode():
                yield from self._own(self.line(node.call, branch), node.slo)
            case LoopNode():
                for _ in range(self._drawn(node)):
                    yield self.line(node.loop, branch)
            case SwitchNode():
                yield self.line(node.switch[self._drawn(node)].nodes, branch)
            case ParNode():
                yield self._fork(node, branch)

    def _drawn(self, node: NodeConfig) -> Any:
        return self._request.params[f"node {self._ways.numbers[id(node)]}"]

    def _own(self, part: Way, slo: NodeSlo | None) -> Iterator[Way]:
        yield part if slo is None or slo.total_s is None else Within(part, slo.total_s)

    def _call(self, node: ModelCall) -> Call:
        tokens, label = self._request.params[node.known_as], self._turn[node.llm]
        before = self._ways.see(label, tokens["images"]) if tokens["images"] else 0.0
        return Call(label, tokens["prompt_tokens"], tokens["ends"], before)

    def _fork(self, node: ParNode, branch: Branch) -> Fork:
        need = needed(node.policy, len(node.par))
        sure = branch.sure and need == len(node.par)
        made = [self.line(nodes, Branch(f"{branch.id}/{name}", sure)) for name, nodes in node.par.items()]
        return Fork(made, need)

    def _tool(self, name: str, branch: Branch) -> float:
        """Seconds of a tool's next call: of a branch that may be one too many none are known."""
        if not branch.sure:
            return 0.0
        branch.calls[name] += 1
        seconds, why = self._ways.tools[name].drawn(branch.id, branch.calls[name])
        return math.inf if why else seconds
