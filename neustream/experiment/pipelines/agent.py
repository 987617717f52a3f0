"""Agents, as configs describe them: calls of language models and tools, drawn and simulated."""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from neustream.config.agent import AgentExperiment
from neustream.config.promises import SloClass
from neustream.config.schema import LlmConfig
from neustream.core.graph import Graph, Stage
from neustream.core.policy import Pool
from neustream.core.profile import LatencyProfile, units_of
from neustream.core.step_times import StepTimes
from neustream.core.types import SLO, Request
from neustream.engine.executor import Executor
from neustream.engine.tooling import pools_of, profiles_of
from neustream.experiment.agent_draws import Alone, NodeDraws
from neustream.experiment.agent_graphs import AgentGraphs, line_of, see_of
from neustream.experiment.pipelines.base import Pipeline
from neustream.experiment.pipelines.llm import cache_of
from neustream.experiment.pipelines.stages import check_device
from neustream.experiment.requests import (
    Drawn,
    Params,
    arrivals_of,
    check_work,
    classes_of,
    promised,
)
from neustream.experiment.tool_times import SimulatedTool
from neustream.experiment.trace_rows import SIZES, Rows
from neustream.graphs import llm_profiles
from neustream.profiling.files import load_profile
from neustream.profiling.steps import load_steps

TYPICAL = 100
"""Requests that typical sizes are the mean of."""


class AgentPipeline(Pipeline[AgentExperiment]):
    """An agent: a graph of calls, devices of its models, a pool for each tool.

    A model has a device for each of its replicas, or is on those that the config's placement says.
    """

    kind = "agent"

    # -- what it runs -----------------------------------------------------------------------------

    def build_graph(self) -> Graph:
        return self._graphs.of(0)

    @cached_property
    def _graphs(self) -> AgentGraphs:
        return AgentGraphs(self.experiment, self.name, self.prefix)

    @cached_property
    def stages_by_name(self) -> Mapping[str, Stage]:
        """The stages of all its graphs."""
        turns = max(map(len, self._graphs.labels.values()), default=1)
        graphs = [self._graphs.of(at) for at in range(turns)]
        return {name: stage for graph in graphs for name, stage in graph.stages.items()}

    def replicas_of(self, stages: Container[str]) -> dict[str, str]:
        """The models that have some of `stages`, and what the replica of each is called there."""
        return {name: label for stage, (name, label) in self._models.items() if stage in stages}

    @cached_property
    def _called(self) -> list[str]:
        """The models that are called, by their first calls."""
        return list(dict.fromkeys(node.llm for node in self._graphs.calls))

    @property
    def labels(self) -> tuple[str, ...]:
        return (
            *self.stages,
            *[label for labels in self._graphs.labels.values() for label in labels],
        )

    @property
    def drawn(self) -> str:
        return line_of(self.experiment.agent)

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
        llms, labels = self.experiment.llms, self._graphs.labels
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
            label: cache_of(model.memory)
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
            for label, node in zip(self._graphs.labels[name], self._graphs.llms[name], strict=True)
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
            / f"{model.see if stage == see_of(label) else model.profile}.json"
        )

    def files_by_stage(self) -> dict[str, list[Path]]:
        return {stage: [self._file(stage)] for stage in self._models}

    @property
    def measured_names(self) -> Sequence[str]:
        return ()

    def load_profiles(self) -> dict[str, LatencyProfile]:
        profiles: dict[str, LatencyProfile] = dict(profiles_of(self._used_tools))
        for stage, (name, label) in self._models.items():
            if stage == see_of(label):
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
        calls = [node for node in self._graphs.calls if node.llm == name]
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
                Request(self.id_of(at), self._graphs.of(at), arrivals[at], promise, asked[at])
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
