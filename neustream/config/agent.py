"""Agents as configs describe them: language models, tools, and a graph of calls. Simulated alone."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from neustream.config.fields import (
    MOST_TOKENS,
    MOST_WORKERS,
    Between,
    Choices,
    LogNormal,
    Range,
    Seconds,
    Section,
    Share,
    Steps,
    TokenCount,
    kind_of_tokens,
)
from neustream.config.places import check_places, placed
from neustream.config.schema import Experiment, LlmConfig
from neustream.config.workload import Workload, without
from neustream.errors import nearest

MOST_IMAGES = 1024
"""Of a prompt."""


class Uniform(Range):
    """Seconds drawn uniformly."""

    min: Seconds
    max: Seconds


class LogNormalSeconds(Section):
    """Seconds around `median`, log-normal with `sigma`."""

    median: Seconds
    sigma: float = Field(ge=0, le=5)


class Samples(Section):
    """Seconds drawn from the lines of a file, one number each."""

    samples: Path


def _kind_of_latency(value: Any) -> str:
    keys = set(value) if isinstance(value, dict) else set()
    if isinstance(value, Samples) or "samples" in keys:
        return "of samples"
    if isinstance(value, LogNormalSeconds) or "median" in keys:
        return "log-normal"
    return "from to" if isinstance(value, dict | Uniform) else "a number"


Latency = Annotated[
    Annotated[Seconds, Tag("a number")]
    | Annotated[Uniform, Tag("from to")]
    | Annotated[LogNormalSeconds, Tag("log-normal")]
    | Annotated[Samples, Tag("of samples")],
    Discriminator(_kind_of_latency),
]
"""Seconds of a call of a tool: of all calls, or how each call's are drawn."""


class ToolConfig(Section):
    """A tool: calls just start, `concurrency` at once.

    `latency_s`: how long a call takes. A call that takes more than `timeout_s`, or is one of the
    share `fails`, has failed, and is made anew as often as `retries` says. `slo_s`: what a call
    adds to a promise by scale; none: the scale times the mean of `latency_s`.
    """

    latency_s: Latency
    slo_s: Seconds | None = None
    concurrency: Annotated[int, Field(ge=1, le=2**20)] = 64
    timeout_s: Seconds | None = None
    retries: Annotated[int, Field(ge=0, le=100)] = 0
    fails: float = Field(default=0.0, ge=0, le=1)


class NodeSlo(Section):
    """What a call is promised, from its own start."""

    total_s: Seconds | None = None
    first_s: Seconds | None = None
    step_s: Seconds | None = None

    @model_validator(mode="after")
    def _first(self) -> NodeSlo:
        if self.step_s is not None and self.first_s is None:
            raise ValueError("step_s needs first_s: output k is due at first + k * step")
        return self


class Listed(Section):
    """Numbers of the list at `lengths` of the workload's file: the first request has the first."""

    lengths: Annotated[str, Field(min_length=1)]


def _kind_of_count(value: Any) -> str:
    if isinstance(value, Listed) or (isinstance(value, dict) and "lengths" in value):
        return "of a file"
    return kind_of_tokens(value)


Count = Annotated[
    Annotated[TokenCount, Tag("a number")]
    | Annotated[Between, Tag("from to")]
    | Annotated[Choices, Tag("of choices")]
    | Annotated[LogNormal, Tag("log-normal")]
    | Annotated[Listed, Tag("of a file")],
    Discriminator(_kind_of_count),
]
"""Tokens of a call: of all requests, how each request's are drawn, or listed in a file."""


def _kind_of_most(value: Any) -> str:
    return "a word" if isinstance(value, str) else "a number"


Most = Annotated[
    Annotated[TokenCount, Tag("a number")] | Annotated[Literal["output"], Tag("a word")],
    Discriminator(_kind_of_most),
]
"""Outputs that a call allows; "output": as many as will come, which policies then know."""


class AgentLlm(LlmConfig):
    """A language model of an agent: `replicas` with a device each, which requests take in turns.

    Where a `placement` says which models are where, the devices of a model are its replicas.
    """

    replicas: Annotated[int, Field(ge=1, le=MOST_WORKERS)] = 1


class ModelCall(Section):
    """A call of the language model `llm`; its numbers of tokens are drawn for each request.

    The prompt has `prompt` tokens of its own, `extra_tokens` (those of an image), and the outputs
    of the calls before it that it `reads`. Its `images` are looked at before, by the model's vision
    tower; without any there is no such step.
    """

    llm: str
    name: str | None = None
    prompt: Count = 128
    extra_tokens: Annotated[int, Field(ge=0, le=MOST_TOKENS)] = 0
    images: Annotated[int, Field(ge=0, le=MOST_IMAGES)] = 0
    reads: list[str] = Field(default=[])
    output: Count = 128
    max_tokens: Most = 256
    slo: NodeSlo | None = None

    @property
    def known_as(self) -> str:
        """The name of the call."""
        return self.name or self.llm


class ToolCall(Section):
    """A call of a tool."""

    tool: str


class ParNode(Section):
    """Branches that run at the same time, by name."""

    par: dict[str, list[NodeConfig]] = Field(min_length=1, max_length=20_000)
    policy: str | Annotated[int, Field(ge=1)] = "all"


class LoopNode(Section):
    """Nodes that run `times`, which is drawn for each request; the scheduler plans with `expect`."""

    loop: list[NodeConfig] = Field(min_length=1)
    times: Steps
    expect: Annotated[int, Field(ge=0, le=10**6)] | None = None


class Case(Section):
    """A branch of a switch, and how often it is taken."""

    share: Share = 1.0
    nodes: list[NodeConfig] = Field(default=[])


class SwitchNode(Section):
    """One of several branches, drawn by share; what the scheduler expects is learnt."""

    switch: dict[str, Case] = Field(min_length=1)


class CallNode(Section):
    """Nodes as a part with a name and a promise of its own."""

    call: list[NodeConfig] = Field(min_length=1)
    name: str
    slo: NodeSlo | None = None


def _kind_of_node(value: Any) -> str:
    kinds = ("llm", "tool", "par", "loop", "switch", "call")
    for kind in kinds:
        if (isinstance(value, dict) and kind in value) or kind in getattr(type(value), "model_fields", ()):
            return f"node of {kind}"
    return "node of llm"


NodeConfig = Annotated[
    Annotated[ModelCall, Tag("node of llm")]
    | Annotated[ToolCall, Tag("node of tool")]
    | Annotated[ParNode, Tag("node of par")]
    | Annotated[LoopNode, Tag("node of loop")]
    | Annotated[SwitchNode, Tag("node of switch")]
    | Annotated[CallNode, Tag("node of call")],
    Discriminator(_kind_of_node),
]
"""A node of an agent's graph, by the key that only it has."""

for _node in (ParNode, LoopNode, Case, SwitchNode, CallNode):
    _node.model_rebuild()


class AgentWorkload(Workload):
    """When requests come; what they ask for is drawn at the nodes of the graph.

    `lengths`: a JSON file of lists that nodes take their numbers of tokens from. `seeds`: the seed
    at each value of `cv`, unless `seed` is given.
    """

    lengths: Path | None = None
    seeds: dict[float, Annotated[int, Field(ge=0, lt=2**32)]] | None = Field(default=None, min_length=1)

    @model_validator(mode="before")
    @classmethod
    def _no_sizes(cls, raw: Any) -> Any:
        keys = ("steps", "prompt", "output", "max_tokens")
        return without(raw, keys, "an agent's numbers are at the nodes of its graph")

    @model_validator(mode="after")
    def _seed_of_cv(self) -> AgentWorkload:
        if self.seeds is None or "seed" in self.model_fields_set:
            return self
        if self.cv not in self.seeds:
            known = ", ".join(f"{cv:g}" for cv in sorted(self.seeds))
            told = f"seeds: there is none for cv {self.cv:g}, only for {known}"
            raise ValueError(f"{told}; give a seed: --set workload.seed=0")
        object.__setattr__(self, "seed", self.seeds[self.cv])  # of no key that was given
        return self


class AgentExperiment(Experiment):
    """An agent: its graph, in `agent`, of calls of `llms` and `tools`.

    Each of the `llms` has devices of its own, unless `placement` says which of the `devices` it is on:
    models of one device take turns there. Those that it does not name are then on all of them.
    Without a placement, each of the `devices` is an instance of the whole.
    """

    agent: list[NodeConfig] = Field(min_length=1)
    llms: dict[str, AgentLlm] = Field(default_factory=dict)
    tools: dict[str, ToolConfig] = Field(default_factory=dict)
    placement: dict[str, list[str]] = Field(default_factory=dict)
    workload: AgentWorkload = AgentWorkload()

    @property
    def instances(self) -> int:
        return 1 if self.placement else super().instances

    @property
    def placed(self) -> dict[str, list[str]]:
        """The models on each device that a placement speaks of."""
        return placed(self.llms, self.device_names, self.placement) if self.placement else {}

    @model_validator(mode="after")
    def _places(self) -> AgentExperiment:
        if not self.placement:
            return self
        if self.cluster is not None:
            raise ValueError("give placement (of devices) or cluster, whose instances name stages, not both")
        check_places(self.llms, self.device_names, self.placement)
        for name, model in self.llms.items():
            if "replicas" in model.model_fields_set:
                raise ValueError(f"llms.{name}.replicas: where there is a placement, its devices are its replicas")
        for device, names in self.placed.items():
            tokens = {name: self.llms[name].step_tokens for name in names}
            if len(set(tokens.values())) > 1:
                raise ValueError(f"llms: models of one device ({device!r}) need one step_tokens; got {tokens}")
        return self

    @model_validator(mode="after")
    def _known(self) -> AgentExperiment:
        names: set[str] = set()
        for node in nodes_below(self.agent):
            if isinstance(node, ToolCall) and node.tool not in self.tools:
                raise ValueError(f"agent: unknown tool {node.tool!r}; {nearest(node.tool, self.tools)}")
            if isinstance(node, ModelCall) and node.llm not in self.llms:
                raise ValueError(f"agent: unknown llm {node.llm!r}; {nearest(node.llm, self.llms)}")
            if isinstance(node, ModelCall):
                name = node.known_as
                if name in names:
                    raise ValueError(f"agent: two calls are named {name!r}; give them names")
                names.add(name)
        return self

    @model_validator(mode="after")
    def _lengths(self) -> AgentExperiment:
        _check_reads(self.agent, frozenset())
        calls = [node for node in nodes_below(self.agent) if isinstance(node, ModelCall)]
        listed = [of for call in calls for of in (call.prompt, call.output) if isinstance(of, Listed)]
        if listed and self.workload.lengths is None:
            raise ValueError(f"agent: lengths {listed[0].lengths!r} needs workload.lengths: FILE")
        if not listed and self.workload.lengths is not None:
            raise ValueError("workload.lengths: no node of the agent takes its numbers from there")
        return self

    @model_validator(mode="after")
    def _replicas(self) -> AgentExperiment:
        if self.cluster is None:
            return self
        for name, model in self.llms.items():
            if model.replicas > 1:
                raise ValueError(f"llms: {name!r} has replicas; a cluster has instances in place of them")
        return self

    @model_validator(mode="after")
    def _served_alone(self) -> AgentExperiment:
        if self.simulation.truth:
            raise ValueError("simulation.truth: it is of stages, and an agent has none of its own")
        scaled = [self.slo, *(self.slo.classes or ())]
        if any(one.first_scale is not None or one.step_scale is not None for one in scaled):
            raise ValueError("slo: an agent's calls are promised first_s and step_s, not scales")
        return self


def _check_reads(nodes: list[NodeConfig], before: frozenset[str]) -> frozenset[str]:
    """ValueError if a call reads what is not before it; gives the calls before what follows."""
    for node in nodes:
        if isinstance(node, ModelCall):
            for name in node.reads:
                if name not in before:
                    told = f"agent: call {node.known_as!r} reads {name!r}, which is no call before it"
                    raise ValueError(f"{told}; {nearest(name, before)}")
            before |= {node.known_as}
        else:
            before = before.union(*[_check_reads(inside, before) for inside in inner(node)])
    return before


def nodes_below(nodes: list[NodeConfig]) -> list[Any]:
    """All nodes, each before those inside of it."""
    found: list[Any] = []
    for node in nodes:
        found.append(node)
        for inside in inner(node):
            found += nodes_below(inside)
    return found


def inner(node: Any) -> list[list[NodeConfig]]:
    """The lists of nodes inside of a node."""
    if isinstance(node, ParNode):
        return list(node.par.values())
    if isinstance(node, LoopNode):
        return [node.loop]
    if isinstance(node, SwitchNode):
        return [case.nodes for case in node.switch.values()]
    return [node.call] if isinstance(node, CallNode) else []
