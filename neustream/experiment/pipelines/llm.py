"""Language models, as configs describe them: prefill, then decode until the end."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from neustream.config.fields import Between, Choices, LogNormal, mean_of
from neustream.config.promises import SloClass
from neustream.config.schema import LlmExperiment, MemoryConfig
from neustream.core.graph import Graph, Stage
from neustream.core.kv_cache import KVCache
from neustream.core.policy import Pool
from neustream.core.profile import LatencyProfile, units_of
from neustream.core.types import SLO, Request
from neustream.errors import ConfigError
from neustream.experiment.pipelines.base import Pipeline
from neustream.experiment.requests import (
    Drawn,
    Params,
    arrivals_of,
    check_work,
    classes_of,
    promised,
)
from neustream.experiment.trace_rows import SIZES, Rows
from neustream.graphs import SEE_BATCH, llm, llm_profiles, with_eyes
from neustream.profiling.files import load_profile
from neustream.profiling.steps import load_steps


def cache_of(memory: MemoryConfig) -> KVCache:
    """The blocks of one instance."""
    return KVCache(memory.tokens // memory.block, memory.block, memory.host_tokens // memory.block)


class LlmPipeline(Pipeline[LlmExperiment]):
    """A language model."""

    kind = "llm"

    # -- what it runs -----------------------------------------------------------------------------

    @property
    def label(self) -> str:
        """Of steps with prefills and decodes."""
        return f"{self.prefix}llm"

    def build_graph(self) -> Graph:
        node = llm(self.label, max_batch=self.experiment.llm.max_batch)
        if self.sees:
            most = min(self.experiment.llm.max_batch, SEE_BATCH)
            stage = Stage(f"{self.label}.see", most, size=lambda job: job.params["images"])
            node = with_eyes(stage, node, lambda job: int(job.params["images"]))
        return Graph(self.name, node)

    @property
    def sees(self) -> bool:
        """Whether some of its prompts have images."""
        return self.experiment.workload.images > 0

    @property
    def labels(self) -> tuple[str, ...]:
        return (*self.stages, self.label)

    @property
    def drawn(self) -> str:
        return f"{' -> '.join(self.stages)} until it ends"

    @property
    def main_stage(self) -> str:
        return f"{self.label}.decode"

    @property
    def kv_cache(self) -> KVCache | None:
        """The blocks of one instance; None: memory is no limit."""
        memory = self.experiment.llm.memory
        return None if memory is None else cache_of(memory)

    @property
    def pools(self) -> list[Pool]:
        caches = {} if self.kv_cache is None else {self.label: self.kv_cache}
        tokens = self.experiment.llm.step_tokens
        return [Pool("gpu", self.stages, kv_caches=caches, step_tokens=tokens)]

    @property
    def rounds(self) -> Sequence[str]:
        return ()

    # -- how long it takes ------------------------------------------------------------------------

    @property
    def steps_file(self) -> Path:
        """Its one profile."""
        return self.experiment.profiles / f"{self.experiment.llm.profile}.json"

    @property
    def see_file(self) -> Path:
        """The profile of its vision tower."""
        return self.experiment.profiles / f"{self.experiment.llm.see}.json"

    def files_by_stage(self) -> dict[str, list[Path]]:
        see = f"{self.label}.see"
        return {
            stage: [self.see_file if stage == see else self.steps_file] for stage in self.stages
        }

    @property
    def measured_names(self) -> Sequence[str]:
        llm = self.experiment.llm
        return [llm.profile, llm.see] if self.sees else [llm.profile]

    def load_profiles(self) -> dict[str, LatencyProfile]:
        steps = load_steps(self.steps_file)
        profiles = llm_profiles(self.label, steps, self.experiment.llm.max_batch)
        if self.sees:
            profiles[f"{self.label}.see"] = units_of(load_profile(self.see_file))
        return profiles

    def load_found(self) -> dict[str, LatencyProfile]:
        files = [file for some in self.files_by_stage().values() for file in some]
        return self.load_profiles() if all(file.exists() for file in files) else {}

    def typical_size(self, stage: str) -> float:
        """Tokens: of a prompt, and of the context in the middle of an output."""
        load = self.experiment.workload
        prompt = mean_of(load.prompt)
        if stage == f"{self.label}.see":
            return 1.0
        if stage != self.main_stage:
            return prompt
        return prompt + min(mean_of(load.output), load.max_tokens) / 2

    def measured_batches(self, stage: str, profile: LatencyProfile, most: int) -> list[int]:
        if stage == f"{self.label}.prefill":
            return [1]  # of a prefill tokens count, not requests
        return super().measured_batches(stage, profile, most)

    # -- what is asked of it ----------------------------------------------------------------------

    @property
    def unused_columns(self) -> Sequence[str]:
        return ("steps", *SIZES)

    def draw(
        self,
        profiles: Mapping[str, LatencyProfile],
        params: Callable[[int], Params] = lambda at: {},
    ) -> Drawn:
        """The requests, and the outputs after which each generation ends."""
        rows = self.rows()
        asked = self._asked(rows, params)
        ends = [min(some.pop("output_tokens"), some["max_tokens"]) for some in asked]
        check_work(sum(ends))
        alone = _Alone(
            profiles[f"{self.label}.prefill"],
            profiles[f"{self.label}.decode"],
            profiles.get(f"{self.label}.see"),
        )
        whole = sum(alone.request(some, end) for some, end in zip(asked, ends, strict=True))
        arrivals = arrivals_of(self.experiment.workload, rows, whole)
        requests = []
        classes = classes_of(self.experiment.slo, self.experiment.workload.seed, rows)
        for at, chosen in enumerate(classes):
            promise = self._promise(rows, at, chosen, alone, asked[at])
            requests.append(Request(self.id_of(at), self.graph, arrivals[at], promise, asked[at]))
        lengths = {request.id: end for request, end in zip(requests, ends, strict=True)}
        return Drawn(requests, lengths, rows.notes)

    def _promise(self, rows: Rows, at: int, slo: SloClass, alone: _Alone, request: Params) -> SLO:
        """What the request of a row is promised."""
        row, extra = rows.rows[at], self.experiment.slo.extra_s
        first, step = alone.first(request), alone.step(request)
        whole = first + step * (request["max_tokens"] - 1)
        total = promised(row.slo_s or slo.total_s, slo.scale, whole + extra)
        ttft = promised(row.slo_ttft_s or slo.first_s, slo.first_scale, first + extra)
        tpot = promised(row.slo_tpot_s or slo.step_s, slo.step_scale, step)
        if tpot < math.inf and ttft == math.inf:
            raise ConfigError(
                f"{rows.where(at)}: slo_tpot_* needs slo_ttft_*: token k is due at TTFT + k * TPOT"
            )
        return SLO(total, ttft, tpot, weight=slo.weight, name=slo.name)

    def _asked(self, rows: Rows, params: Callable[[int], Params]) -> list[dict[str, Any]]:
        """Numbers of tokens, and what a real backend needs.

        Where neither the trace nor the config has `max_tokens`, all may have as many as the longest
        output.
        """
        load, count = self.experiment.workload, len(rows.rows)
        rows.need("prompt_tokens", "prompt", example=512)
        rows.need("output_tokens", "output", example=128)
        prompts = tokens_drawn(load.prompt, count, load.seed, 2)
        outputs = tokens_drawn(load.output, count, load.seed, 3)
        images = np.random.default_rng([load.seed, 4]).random(count) < load.images
        most = load.max_tokens
        if load.trace is not None and "max_tokens" not in load.model_fields_set:
            lengths = zip(rows.rows, outputs, strict=True)
            most = max(row.output_tokens or drawn for row, drawn in lengths)
        asked = []
        for at, (row, prompt, output) in enumerate(zip(rows.rows, prompts, outputs, strict=True)):
            numbers = {
                "prompt_tokens": row.prompt_tokens or prompt,
                "output_tokens": row.output_tokens or output,
                "max_tokens": row.max_tokens or most,
            }
            if min(numbers.values()) < 1:
                raise ConfigError(
                    f"{rows.where(at)}: prompt_tokens, output_tokens and max_tokens "
                    "must be 1 or more"
                )
            looks = {"images": int(images[at])} if self.sees else {}
            asked.append({**params(at), **row.params, **numbers, **looks})
        return asked


class _Alone:
    """Seconds that a request's steps take if it runs alone."""

    def __init__(
        self, prefill: LatencyProfile, decode: LatencyProfile, see: LatencyProfile | None
    ) -> None:
        self._prefill, self._decode, self._see = prefill, decode, see

    def first(self, request: Params) -> float:
        """Its prefill, and the look at its image before it."""
        tokens = float(request["prompt_tokens"])
        looks = 0.0
        if self._see is not None and request["images"]:
            looks = self._see.latency(1, 1.0, 1.0)
        return looks + self._prefill.latency(1, tokens, tokens * tokens)

    def step(self, request: Params) -> float:
        """A decode in the middle of its `max_tokens`."""
        return self._decode.latency(1, request["prompt_tokens"] + request["max_tokens"] / 2)

    def request(self, request: Params, outputs: int) -> float:
        """All of it, if it ends after `outputs`."""
        return self.first(request) + self.step(request) * (outputs - 1)


def tokens_drawn(
    tokens: int | Between | Choices | LogNormal, count: int, seed: int, stream: int
) -> list[int]:
    """Numbers of tokens, drawn from a stream of their own."""
    draw = np.random.default_rng([seed, stream])
    if isinstance(tokens, LogNormal):
        values = np.exp(draw.normal(math.log(tokens.median), tokens.sigma, count))
        return [int(x) for x in np.clip(np.rint(values), tokens.min, tokens.max)]
    if isinstance(tokens, Between):
        return [int(x) for x in draw.integers(tokens.min, tokens.max + 1, count)]
    if isinstance(tokens, Choices):
        return [int(x) for x in draw.choice(tokens.choices, count)]
    return [tokens] * count
