"""What is drawn for each request of an agent, and how long a request takes alone."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from neustream.config.agent import (
    AgentExperiment,
    Count,
    Listed,
    LoopNode,
    ModelCall,
    NodeConfig,
    SwitchNode,
    nodes_below,
)
from neustream.config.fields import MOST_TOKENS
from neustream.core.cursor import Cursor
from neustream.core.entry import Ahead, Entry
from neustream.core.graph import Graph, Stage
from neustream.core.legs import Legs
from neustream.core.step_times import StepTimes
from neustream.core.types import Request
from neustream.errors import ConfigError, nearest, told
from neustream.experiment.pipelines.llm import tokens_drawn
from neustream.experiment.requests import Params


class NodeDraws:
    """Draws what the nodes of an agent take of each request, from streams of their own.

    `asked`: the parameters of each request, which are added to. `ends`: outputs by call of each.
    """

    def __init__(self, experiment: AgentExperiment, asked: Sequence[dict[str, Any]]) -> None:
        self.asked = asked
        self.ends: list[dict[str, int]] = [{} for _ in asked]
        self._load = experiment.workload
        for at, node in enumerate(nodes_below(experiment.agent)):
            self._draw(node, at)

    def _draw(self, node: NodeConfig, at: int) -> None:
        seed, count = self._load.seed, len(self.asked)
        if isinstance(node, ModelCall):
            self._draw_call(node, at)
        elif isinstance(node, LoopNode):
            rounds = tokens_drawn(node.times, count, seed, 10 + 2 * at)
            for some, times in zip(self.asked, rounds, strict=True):
                some[f"node {at}"] = times
        elif isinstance(node, SwitchNode):
            shares = np.array([case.share for case in node.switch.values()])
            draw = np.random.default_rng([seed, 10 + 2 * at])
            ways = draw.choice(len(shares), count, p=shares / shares.sum())
            for some, way in zip(self.asked, ways, strict=True):
                some[f"node {at}"] = list(node.switch)[int(way)]

    def _draw_call(self, node: ModelCall, at: int) -> None:
        name = node.known_as
        prompts = self._tokens(node.prompt, 10 + 2 * at)
        outputs = self._tokens(node.output, 11 + 2 * at)
        for some, end, prompt, output in zip(self.asked, self.ends, prompts, outputs, strict=True):
            most = max(output, 1) if node.max_tokens == "output" else node.max_tokens
            read = sum([end[before] for before in node.reads])
            end[name] = min(max(output, 1), most)
            some[name] = {
                "prompt_tokens": max(prompt + node.extra_tokens + read, 1),
                "max_tokens": most,
                "images": node.images,
                "ends": end[name],  # for the simulated device alone
            }

    def _tokens(self, of: Count, stream: int) -> list[int]:
        count = len(self.asked)
        if not isinstance(of, Listed):
            return tokens_drawn(of, count, self._load.seed, stream)
        numbers = self._listed(of.lengths)
        return [numbers[at % len(numbers)] for at in range(count)]

    def _listed(self, place: str) -> list[int]:
        """The list at a place of the file, as "outputs.plan"; ConfigError if it is none of tokens."""
        at, where = self._file, f"workload.lengths: {self._load.lengths}"
        for part in place.split("."):
            if not isinstance(at, dict) or part not in at:
                hint = nearest(part, at if isinstance(at, dict) else ())
                raise ConfigError(f"{where}: there is no {place!r}; {hint}")
            at = at[part]
        if not isinstance(at, list) or not at:
            raise ConfigError(f"{where}: {place!r} must be a list of numbers of tokens")
        for number in at:
            if type(number) is not int or not 1 <= number <= MOST_TOKENS:
                allowed = f"whole numbers from 1 to {MOST_TOKENS}"
                raise ConfigError(f"{where}: {place!r}: {allowed}, got {number!r}")
        return at

    @cached_property
    def _file(self) -> Any:
        path: Path | None = self._load.lengths
        assert path is not None  # the config is checked
        try:
            return json.loads(path.read_text("utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise ConfigError(f"workload.lengths: {path}: {told(error)}") from None


class Alone:
    """Seconds of a request alone, with its own lengths, and the mean of its tools.

    `tools`: seconds of stages in place of their means.
    """

    def __init__(self, times: StepTimes, tools: Mapping[str, float] = {}) -> None:
        self._legs = _AloneLegs(times, tools)

    def seconds(self, graph: Graph, asked: Params, ends: Mapping[str, int]) -> float:
        known = {name: {**asked[name], "max_tokens": end} for name, end in ends.items()}
        job = Entry(Request("alone", graph, params={**asked, **known}))
        job.cursor = Cursor(graph, job)
        return self._legs.path_s(job)


class _AloneLegs(Legs):
    """Decodes count as those in the middle of an output, whose context grows with it."""

    def __init__(self, times: StepTimes, tools: Mapping[str, float]) -> None:
        super().__init__(times)
        self._tools = tools

    def _stage(self, stage: Stage, job: Entry) -> Ahead:
        if stage.name in self._tools:
            return Ahead(self._tools[stage.name])
        if stage.phase != "decode":
            return super()._stage(stage, job)
        middle = stage.size_of(job) + job.params["max_tokens"] / 2
        return Ahead(self._times.alone(stage, middle))
