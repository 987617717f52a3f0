"""Agents, as configs describe them: calls of language models and tools, drawn and simulated."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
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
from neustream.config.promises import SloClass
from neustream.config.schema import LlmConfig
from neustream.core.graph import Graph, Node, Stage, loop, seq, switch
from neustream.core.job import Job
from neustream.core.kv_cache import KVCache
from neustream.core.nodes import call, par, tool
from neustream.core.policy import Pool
from neustream.core.profile import LatencyProfile, units_of
from neustream.core.step_times import StepTimes
from neustream.core.types import SLO, Request
from neustream.engine.executor import Executor
from neustream.engine.tooling import pools_of, profiles_of
from neustream.experiment.agent_draws import Alone, NodeDraws
from neustream.experiment.pipelines.base import Pipeline
from neustream.experiment.pipelines.stages import check_device
from neustream.experiment.requests import (
    Drawn,
    Params,
    arrivals_of,
    check_work,
    classes_of,
    promised,
)
from neustream.experiment.tool_times import SimulatedTool, mean_of_latency
from neustream.experiment.trace_rows import SIZES, Rows
from neustream.graphs import SEE_BATCH, llm, llm_profiles, with_eyes
from neustream.profiling.files import load_profile
from neustream.profiling.steps import load_steps

TYPICAL = 100
"""Requests that typical sizes are the mean of."""
Turn = Mapping[str, int]
"""The replica of each model that a request's calls go to."""


class AgentPipeline(Pipeline[AgentExperiment]):
    """An agent: a graph of calls, devices of its models, a pool for each tool.

    A model has a device for each of its replicas, or is on those that the config's placement says.
    """

    kind = "agent"

    # -- what it runs -----------------------------------------------------------------------------

    def build_graph(self) -> Graph:
        return self.graph_of(0)

    def graph_of(self, at: int) -> Graph:
        """The graph of the workload's `at`-th request: requests take replicas in turns."""
        turn = {name: at % len(labels) for name, labels in self._labels.items()}
        key = tuple(turn.values())
        if key not in self._graphs:
            self._graphs[key] = Graph(self.name, self._seq(self.experiment.agent, turn))
        return self._graphs[key]

    @cached_property
    def _graphs(self) -> dict[tuple[int, ...], Graph]:
        """Those made so far, by the replicas that they call."""
        return {}

    @cached_property
    def stages_by_name(self) -> Mapping[str, Stage]:
        """The stages of all its graphs."""
        turns = max(map(len, self._labels.values()), default=1)
        graphs = [self.graph_of(at) for at in range(turns)]
        return {name: stage for graph in graphs for name, stage in graph.stages.items()}

    @cached_property
    def _labels(self) -> dict[str, list[str]]:
        """What the replicas of each model are called."""
        found = {}
        for name, model in self.experiment.llms.items():
            on = [device for device, names in self.experiment.placed.items() if name in names]
            count, label = len(on) or model.replicas, self.prefix + name
            found[name] = (
                [label] if count == 1 else [f"{label}.{number}" for number in range(count)]
            )
        return found

    @cached_property
    def _llms(self) -> dict[str, list[Node]]:
        """A node for each replica of each model, behind its vision tower if a call has images."""
        return {
            name: [self._llm(name, label, model.max_batch) for label in self._labels[name]]
            for name, model in self.experiment.llms.items()
        }

    def _llm(self, name: str, label: str, max_batch: int) -> Node:
        node: Node = llm(label, max_batch=max_batch)
        if name not in self._seeing:
            return node
        see = Stage(_see(label), min(max_batch, SEE_BATCH), size=lambda job: job.params["images"])
        return with_eyes(see, node, lambda job: int(job.params["images"] > 0))

    @cached_property
    def _calls(self) -> list[ModelCall]:
        return [node for node in nodes_below(self.experiment.agent) if isinstance(node, ModelCall)]

    @cached_property
    def _called(self) -> list[str]:
        """The models that are called, by their first calls."""
        return list(dict.fromkeys(node.llm for node in self._calls))

    @cached_property
    def _seeing(self) -> set[str]:
        """Models that are called with images."""
        return {node.llm for node in self._calls if node.images}

    @cached_property
    def _tools(self) -> dict[str, Stage]:
        return {
            name: tool(
                self.prefix + name,
                concurrency=of.concurrency,
                timeout_s=of.timeout_s,
                retries=of.retries,
                expect_s=mean_of_latency(name, of.latency_s),
            )
            for name, of in self.experiment.tools.items()
        }

    @cached_property
    def _numbers(self) -> dict[int, int]:
        return {id(node): at for at, node in enumerate(nodes_below(self.experiment.agent))}

    def _seq(self, nodes: Sequence[NodeConfig], turn: Turn) -> Node:
        made = [self._node(node, turn) for node in nodes]
        return made[0] if len(made) == 1 else seq(*made)

    def _node(self, node: NodeConfig, turn: Turn) -> Node:
        """A node of the graph; what is drawn for it is a parameter of the request."""
        if isinstance(node, ModelCall):
            name, replica = node.known_as, self._llms[node.llm][turn[node.llm]]
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

    @property
    def labels(self) -> tuple[str, ...]:
        return (*self.stages, *[label for labels in self._labels.values() for label in labels])

    @property
    def drawn(self) -> str:
        return " -> ".join(_drawn(node) for node in self.experiment.agent)

    @property
    def main_stage(self) -> str:
        decodes = [name for name, stage in self.stages_by_name.items() if stage.phase == "decode"]
        return decodes[0] if decodes else self.stages[0]

    @property
    def pools(self) -> list[Pool]:
        pools = [self._pool(device, own) for device, own in self._places.items()]
        return [*[pool for pool in pools if pool.stages], *pools_of(self._used_tools)]

    @cached_property
    def _places(self) -> dict[str, dict[str, LlmConfig]]:
        """The replicas on each device, by what they are called."""
        llms, labels = self.experiment.llms, self._labels
        if not self.experiment.placement:
            return {label: {label: llms[name]} for name, some in labels.items() for label in some}
        left = {name: iter(some) for name, some in labels.items()}
        return {
            self.prefix + device: {next(left[name]): llms[name] for name in names}
            for device, names in self.experiment.placed.items()
        }

    def _pool(self, device: str, own: Mapping[str, LlmConfig]) -> Pool:
        """A device, with the memory of its models."""
        stages = tuple([stage for stage, (_, label) in self._models.items() if label in own])
        caches = {
            label: KVCache(model.memory.tokens // model.memory.block, model.memory.block)
            for label, model in own.items()
            if model.memory is not None
        }
        (tokens,) = {model.step_tokens for model in own.values()}
        return Pool(device, stages, kv_caches=caches, step_tokens=tokens)

    @cached_property
    def _models(self) -> dict[str, tuple[str, str]]:
        """The model of each stage that is of one, and what its replica is called.

        Files are listed by it, so it asks no tool for its times, as the whole graph does.
        """
        return {
            stage: (name, label)
            for name in self._called
            for label, node in zip(self._labels[name], self._llms[name], strict=True)
            for stage in Graph(label, node).stages
        }

    @property
    def _used_tools(self) -> list[Any]:
        return [stage for stage in self.stages_by_name.values() if stage.tool is not None]

    def executors(self) -> Mapping[str, Executor]:
        seed = self.experiment.workload.seed
        return {
            f"tool {self.prefix + name}": SimulatedTool(name, of, seed)
            for name, of in self.experiment.tools.items()
        }

    @property
    def rounds(self) -> Sequence[str]:
        return ()

    # -- how long it takes ------------------------------------------------------------------------

    def _file(self, stage: str) -> Path:
        """The profile of a model's stage."""
        name, label = self._models[stage]
        model = self.experiment.llms[name]
        return (
            self.experiment.profiles
            / f"{model.see if stage == _see(label) else model.profile}.json"
        )

    def files_by_stage(self) -> dict[str, list[Path]]:
        return {stage: [self._file(stage)] for stage in self._models}

    @property
    def measured_names(self) -> Sequence[str]:
        return ()

    def load_profiles(self) -> dict[str, LatencyProfile]:
        profiles: dict[str, LatencyProfile] = dict(profiles_of(self._used_tools))
        for stage, (name, label) in self._models.items():
            if stage == _see(label):
                profiles[stage] = units_of(load_profile(self._file(stage)))
            elif stage not in profiles:  # both phases are of one file
                steps = load_steps(self._file(stage))
                profiles |= llm_profiles(label, steps, self.experiment.llms[name].max_batch)
        for pool in self.pools if not self.experiment.simulation.mixed_devices else ():
            if pool.concurrency is None:
                check_device(pool, profiles)
        return profiles

    def load_found(self) -> dict[str, LatencyProfile]:
        files = [file for some in self.files_by_stage().values() for file in some]
        return self.load_profiles() if all(file.exists() for file in files) else {}

    def typical_size(self, stage: str) -> float:
        """Of its calls on average: tokens of prompts or of contexts in mid-output, or images."""
        here = self.stages_by_name[stage]
        name = self._models[stage][0] if stage in self._models else None
        calls = [node for node in self._calls if node.llm == name]
        if here.phase == "step":
            images = [node.images for node in calls if node.images]
            return sum(images) / len(images) if images else 0.0
        names = [node.known_as for node in calls]
        count = min(self.experiment.workload.requests, TYPICAL)
        draws = NodeDraws(self.experiment, [{} for _ in range(count)])
        sizes = [
            asked[name]["prompt_tokens"] + (ends[name] / 2 if here.phase == "decode" else 0)
            for asked, ends in zip(draws.asked, draws.ends, strict=True)
            for name in names
        ]
        return sum(sizes) / len(sizes) if sizes else 0.0

    def measured_batches(self, stage: str, profile: LatencyProfile, most: int) -> list[int]:
        if self.stages_by_name[stage].phase == "prefill":
            return [1]  # of a prefill tokens count, not requests
        return super().measured_batches(stage, profile, most)

    # -- what is asked of it ----------------------------------------------------------------------

    @property
    def unused_columns(self) -> Sequence[str]:
        return ("steps", "prompt_tokens", "output_tokens", "max_tokens", *SIZES)

    def draw(
        self,
        profiles: Mapping[str, LatencyProfile],
        params: Callable[[int], Params] = lambda at: {},
    ) -> Drawn:
        """The requests, and the outputs after which each of their generations ends."""
        load = self.experiment.workload
        rows = self.rows()
        asked: list[dict[str, Any]] = [
            {**params(at), **row.params} for at, row in enumerate(rows.rows)
        ]
        ends = NodeDraws(self.experiment, asked).ends
        check_work(sum(sum(some.values()) for some in ends))
        times = StepTimes(profiles)
        alone = Alone(times)
        whole = sum(alone.seconds(self.graph, *both) for both in zip(asked, ends, strict=True))
        arrivals = arrivals_of(load, rows, whole)
        classes = classes_of(self.experiment.slo, load.seed, rows)
        requests = []
        for at, chosen in enumerate(classes):
            scaled = Alone(times, self._shares(chosen.scale or 1.0))
            promise = self._promise(
                rows, at, chosen, scaled.seconds(self.graph, asked[at], ends[at])
            )
            requests.append(
                Request(self.id_of(at), self.graph_of(at), arrivals[at], promise, asked[at])
            )
        return Drawn(requests, notes=rows.notes)

    def _shares(self, scale: float) -> dict[str, float]:
        """Seconds of tools that add to a promise, whatever its scale, before the scale counts."""
        tools = self.experiment.tools
        shares = {name: of.slo_s for name, of in tools.items() if of.slo_s is not None}
        return {self.prefix + name: seconds / scale for name, seconds in shares.items()}

    def _promise(self, rows: Rows, at: int, slo: SloClass, alone: float) -> SLO:
        row = rows.rows[at]
        total = promised(row.slo_s or slo.total_s, slo.scale, alone + self.experiment.slo.extra_s)
        first = row.slo_ttft_s or slo.first_s or math.inf
        step = row.slo_tpot_s or slo.step_s or math.inf
        return SLO(total, first, step, weight=slo.weight, name=slo.name)


def _see(label: str) -> str:
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
        return "(" + " | ".join(_line(some) for some in node.par.values()) + ")"
    if isinstance(node, LoopNode):
        return f"({_line(node.loop)}) x times"
    if isinstance(node, SwitchNode):
        return (
            "(" + " or ".join(_line(case.nodes) or "nothing" for case in node.switch.values()) + ")"
        )
    assert isinstance(node, CallNode)
    return f"{node.name}({_line(node.call)})"


def _line(nodes: Sequence[NodeConfig]) -> str:
    return " -> ".join(_drawn(node) for node in nodes)
