"""Agents, as configs describe them: calls of language models and tools, drawn and simulated."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

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
from neustream.core.cursor import Cursor
from neustream.core.graph import Graph, Node, loop, seq, switch
from neustream.core.job import Entry, Job
from neustream.core.kv_cache import KVCache
from neustream.core.legs import Legs
from neustream.core.nodes import call, par, tool
from neustream.core.policy import Pool
from neustream.core.profile import LatencyProfile
from neustream.core.step_times import StepTimes
from neustream.core.types import SLO, Request
from neustream.engine.executor import Executor
from neustream.engine.tooling import pools_of, profiles_of
from neustream.experiment.pipelines.base import Pipeline
from neustream.experiment.pipelines.llm import tokens_drawn
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
from neustream.graphs import llm, llm_profiles
from neustream.profiling.steps import load_steps


class AgentPipeline(Pipeline[AgentExperiment]):
    """An agent: a graph of calls, a device for each of its models, a pool for each tool."""

    kind = "agent"

    # -- what it runs -----------------------------------------------------------------------------

    def build_graph(self) -> Graph:
        """Its nodes; what is drawn for one is a parameter of the request."""
        config = self.experiment
        self._llms = {
            name: llm(self.prefix + name, max_batch=model.max_batch)
            for name, model in config.llms.items()
        }
        self._tools = {
            name: tool(
                self.prefix + name,
                concurrency=of.concurrency,
                timeout_s=of.timeout_s,
                retries=of.retries,
                expect_s=mean_of_latency(name, of.latency_s),
            )
            for name, of in config.tools.items()
        }
        self._places = {id(node): at for at, node in enumerate(nodes_below(config.agent))}
        return Graph(self.name, self._seq(config.agent))

    def _seq(self, nodes: Sequence[NodeConfig]) -> Node:
        made = [self._node(node) for node in nodes]
        return made[0] if len(made) == 1 else seq(*made)

    def _node(self, node: NodeConfig) -> Node:
        """A node of the graph; what is drawn for it is a parameter of the request."""
        if isinstance(node, ModelCall):
            name = node.name or node.llm
            return call(
                self._llms[node.llm], name, slo=_slo(node.slo), params=partial(_tokens_of, name)
            )
        if isinstance(node, ToolCall):
            return self._tools[node.tool]
        key = f"node {self._places[id(node)]}"
        if isinstance(node, ParNode):
            return par(
                policy=node.policy, **{name: self._seq(some) for name, some in node.par.items()}
            )
        if isinstance(node, LoopNode):
            expect = round(mean_of(node.times)) if node.expect is None else node.expect
            return loop(self._seq(node.loop), times=partial(_param, key), expect=expect)
        if isinstance(node, SwitchNode):
            return switch(
                partial(_param, key),
                {name: self._seq(case.nodes) for name, case in node.switch.items()},
            )
        return call(self._seq(node.call), node.name, slo=_slo(node.slo))

    @property
    def labels(self) -> tuple[str, ...]:
        return (*self.stages, *(self.prefix + name for name in self.experiment.llms))

    @property
    def drawn(self) -> str:
        return " -> ".join(_drawn(node) for node in self.experiment.agent)

    @property
    def main_stage(self) -> str:
        decodes = [name for name, stage in self.graph.stages.items() if stage.phase == "decode"]
        return decodes[0] if decodes else self.stages[0]

    @property
    def pools(self) -> list[Pool]:
        stages = self.graph.stages
        pools = []
        for name, model in self.experiment.llms.items():
            label, memory = self.prefix + name, model.memory
            cache = (
                {}
                if memory is None
                else {label: KVCache(memory.tokens // memory.block, memory.block)}
            )
            own = tuple(stage for stage in stages if stages[stage].model == label)
            if own:
                pools.append(Pool(label, own, kv_caches=cache, step_tokens=model.step_tokens))
        return [*pools, *pools_of(self._used_tools)]

    @property
    def _used_tools(self) -> list[Any]:
        return [stage for stage in self.graph.stages.values() if stage.tool is not None]

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

    def _file(self, name: str) -> Path:
        return self.experiment.profiles / f"{self.experiment.llms[name].profile}.json"

    def files_by_stage(self) -> dict[str, list[Path]]:
        return {
            stage: [self._file(name)]
            for name in self.experiment.llms
            for stage in self.stages
            if self.graph.stages[stage].model == self.prefix + name
        }

    @property
    def measured_names(self) -> Sequence[str]:
        return ()

    def load_profiles(self) -> dict[str, LatencyProfile]:
        profiles: dict[str, LatencyProfile] = dict(profiles_of(self._used_tools))
        for name, model in self.experiment.llms.items():
            profiles |= llm_profiles(
                self.prefix + name, load_steps(self._file(name)), model.max_batch
            )
        return profiles

    def load_found(self) -> dict[str, LatencyProfile]:
        return (
            self.load_profiles()
            if all(self._file(name).exists() for name in self.experiment.llms)
            else {}
        )

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
        count = len(rows.rows)
        asked: list[dict[str, Any]] = [
            {**params(at), **row.params} for at, row in enumerate(rows.rows)
        ]
        ends: list[dict[str, int]] = [{} for _ in asked]
        for at, node in enumerate(nodes_below(self.experiment.agent)):
            self._draw_node(node, at, asked, ends)
        check_work(sum(sum(some.values()) for some in ends))
        times = StepTimes(profiles)
        alone = [self._alone(some, end, times) for some, end in zip(asked, ends, strict=True)]
        arrivals = arrivals_of(load, rows, sum(alone))
        classes = classes_of(self.experiment.slo, load.seed, rows)
        requests = [
            Request(
                self.id_of(at),
                self.graph,
                arrivals[at],
                self._promise(rows, at, classes[at], alone[at]),
                asked[at],
            )
            for at in range(count)
        ]
        return Drawn(requests, notes=rows.notes)

    def _draw_node(
        self,
        node: NodeConfig,
        at: int,
        asked: Sequence[dict[str, Any]],
        ends: Sequence[dict[str, int]],
    ) -> None:
        """Draw what a node takes of each request, from streams of its own."""
        seed, count = self.experiment.workload.seed, len(asked)
        if isinstance(node, ModelCall):
            name = node.name or node.llm
            prompts = tokens_drawn(node.prompt, count, seed, 10 + 2 * at)
            outputs = tokens_drawn(node.output, count, seed, 11 + 2 * at)
            for some, end, prompt, output in zip(asked, ends, prompts, outputs, strict=True):
                end[name] = min(max(output, 1), node.max_tokens)
                some[name] = {
                    "prompt_tokens": max(prompt, 1),
                    "max_tokens": node.max_tokens,
                    "ends": end[name],  # for the simulated device alone
                }
        elif isinstance(node, LoopNode):
            for some, times in zip(
                asked, tokens_drawn(node.times, count, seed, 10 + 2 * at), strict=True
            ):
                some[f"node {at}"] = times
        elif isinstance(node, SwitchNode):
            shares = np.array([case.share for case in node.switch.values()])
            draw = np.random.default_rng([seed, 10 + 2 * at])
            for some, way in zip(
                asked, draw.choice(len(shares), count, p=shares / shares.sum()), strict=True
            ):
                some[f"node {at}"] = list(node.switch)[int(way)]

    def _alone(self, asked: Params, ends: Mapping[str, int], times: StepTimes) -> float:
        """Seconds of a request alone, with its own lengths, and the mean of its tools."""
        known = {name: {**asked[name], "max_tokens": end} for name, end in ends.items()}
        job = Entry(Request("alone", self.graph, params={**asked, **known}))
        job.cursor = Cursor(self.graph, job)
        return Legs(times).path_s(job)

    def _promise(self, rows: Rows, at: int, slo: SloClass, alone: float) -> SLO:
        row = rows.rows[at]
        total = promised(row.slo_s or slo.total_s, slo.scale, alone + self.experiment.slo.extra_s)
        first = row.slo_ttft_s or slo.first_s or math.inf
        step = row.slo_tpot_s or slo.step_s or math.inf
        return SLO(total, first, step, weight=slo.weight, name=slo.name)


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
        return node.name or node.llm
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
