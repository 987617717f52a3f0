"""Pipelines of stages, as configs describe them: a sequence, looped where it says `times`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from neustream.config.fields import MOST_TOKENS, Between, Choices
from neustream.config.promises import SloClass
from neustream.config.schema import StageConfig, StagesExperiment
from neustream.core.graph import Graph, Node, Stage, loop, seq
from neustream.core.job import Job
from neustream.core.policy import Pool
from neustream.core.profile import LatencyProfile, SumProfile, TableProfile
from neustream.core.types import SLO, Request
from neustream.core.work import alone_s
from neustream.errors import ConfigError, ProfileError, shown
from neustream.experiment.pipelines.base import Pipeline
from neustream.experiment.requests import (
    Drawn,
    Params,
    arrivals_of,
    check_work,
    classes_of,
    promised,
)
from neustream.experiment.trace_rows import TOKENS, Rows
from neustream.profiling.files import load_stage
from neustream.workload import Row


class StagesPipeline(Pipeline[StagesExperiment]):
    """A pipeline of stages."""

    kind = "stages"

    # -- what it runs -----------------------------------------------------------------------------

    @property
    def configs(self) -> dict[str, StageConfig]:
        """What the config says of each stage."""
        return {self.prefix + name: stage for name, stage in self.experiment.stages.items()}

    def build_graph(self) -> Graph:
        """Its stages in order, looped where they say `times`; the last emits."""
        last = list(self.configs)[-1]
        nodes: list[Node] = []
        for name, config in self.configs.items():
            stage = Stage(name, max_batch=config.max_batch, emits=name == last)
            if config.times is None:
                nodes.append(stage)
            else:
                nodes.append(loop(stage, times=partial(_param, config.times)))
        return Graph(self.name, seq(*nodes))

    @property
    def drawn(self) -> str:
        parts = []
        for name, config in self.configs.items():
            parts.append(name if config.times is None else f"{name} x {config.times}")
        return " -> ".join(parts)

    @property
    def main_stage(self) -> str:
        looped = [name for name, config in self.configs.items() if config.times is not None]
        return looped[0] if looped else self.stages[-1]

    @property
    def pools(self) -> list[Pool]:
        return [
            Pool(name, self.stages_on(name), pool.workers, pool.sticky)
            for name, pool in self.experiment.pools.items()
        ]

    def stages_on(self, pool: str) -> tuple[str, ...]:
        """The stages that run on a pool."""
        return tuple(name for name, config in self.configs.items() if config.pool == pool)

    @property
    def rounds(self) -> Sequence[str]:
        return [config.times for config in self.configs.values() if config.times]

    # -- how long it takes ------------------------------------------------------------------------

    def files_by_stage(self) -> dict[str, list[Path]]:
        folder = self.experiment.profiles
        return {
            self.prefix + name: [folder / f"{part}.json" for part in stage.profile or [name]]
            for name, stage in self.experiment.stages.items()
        }

    @property
    def measured_names(self) -> Sequence[str]:
        return self.stages

    def load_profiles(self) -> dict[str, LatencyProfile]:
        """The profile of each stage; those of one pool must come from one device."""
        profiles = {name: load_stage(name, files) for name, files in self.files_by_stage().items()}
        for pool in self.pools if not self.experiment.simulation.mixed_devices else ():
            check_device(pool, profiles)
        return profiles

    def load_found(self) -> dict[str, LatencyProfile]:
        found = {}
        for name, files in self.files_by_stage().items():
            if all(file.exists() for file in files):
                found[name] = load_stage(name, files)
        return found

    def load_truth(self, profiles: Mapping[str, LatencyProfile]) -> dict[str, LatencyProfile]:
        truth = {name: load_stage(name, files) for name, files in self.truth_files().items()}
        for name, profile in truth.items():
            batch = min(self.configs[name].max_batch, profiles[name].max_batch)
            if profile.max_batch < batch:
                raise ProfileError(
                    f"simulation.truth of {name!r} knows batches of at most {profile.max_batch}; "
                    f"steps have up to {batch}"
                )
        for pool in self.pools if not self.experiment.simulation.mixed_devices else ():
            check_device(pool, {**profiles, **truth})
        return truth

    def measured_batches(self, stage: str, profile: LatencyProfile, most: int) -> list[int]:
        if isinstance(profile, TableProfile):
            return [batch for batch in profile.batch if batch <= most]
        if isinstance(profile, SumProfile):
            each = [set(self.measured_batches(stage, part, most)) for part in profile.parts]
            return sorted(set.intersection(*each))
        return super().measured_batches(stage, profile, most)

    # -- what is asked of it ----------------------------------------------------------------------

    @property
    def unused_columns(self) -> Sequence[str]:
        return TOKENS

    def notes_on(self, rows: Sequence[Row]) -> list[str]:
        if len({(row.width, row.height, row.frames) for row in rows}) > 1:
            return ["sizes differ; in simulations a step takes as long at each"]
        return []

    def draw(
        self,
        profiles: Mapping[str, LatencyProfile],
        params: Callable[[int], Params] = lambda at: {},
    ) -> Drawn:
        rows, slo = self.rows(), self.experiment.slo
        asked = self._asked(rows, params)
        check_work(sum(some[name] for some in asked for name in self.rounds))
        alone = self._alone(profiles, asked)
        arrivals = arrivals_of(self.experiment.workload, rows, sum(alone))
        requests = []
        for at, chosen in enumerate(classes_of(slo, self.experiment.workload.seed, rows)):
            promise = _promise(rows, at, chosen, alone[at] + slo.extra_s)
            requests.append(Request(self.id_of(at), self.graph, arrivals[at], promise, asked[at]))
        return Drawn(requests, notes=rows.notes)

    def _asked(self, rows: Rows, params: Callable[[int], Params]) -> list[dict[str, Any]]:
        """The parameters of each request."""
        if "steps" in self.rounds:
            rows.need("steps", "steps", example=50)
        load = self.experiment.workload
        drawn = _steps(load.steps, len(rows.rows), load.seed)
        asked = []
        for at, (row, steps) in enumerate(zip(rows.rows, drawn, strict=True)):
            count = steps if row.steps is None else row.steps
            given = {**params(at), **rows.sizes(row), **row.params, "steps": count}
            _check_counts(rows, at, given, self.rounds)
            asked.append(given)
        return asked

    def _alone(
        self, profiles: Mapping[str, LatencyProfile], asked: Sequence[Params]
    ) -> list[float]:
        """Each request's seconds alone.

        Computed once for those that agree in what their loops ask for.
        """
        known: dict[tuple[Any, ...], float] = {}
        seconds = []
        for request in asked:
            key = tuple(request[name] for name in self.rounds)
            if key not in known:
                known[key] = alone_s(self.graph, request, profiles)
            seconds.append(known[key])
        if self.experiment.workload.load is not None and not sum(seconds) > 0:
            raise ConfigError(
                "workload.load: the requests have no work, so no rate makes that load; "
                "use workload.rate"
            )
        return seconds


def check_device(pool: Pool, profiles: Mapping[str, LatencyProfile]) -> None:
    """ProfileError if the profiles of a pool's stages come from different devices."""
    devices = {name: profiles[name].device for name in pool.stages}
    if len(set(devices.values())) > 1:
        raise ProfileError(f"pool {pool.name!r} mixes profiles of different devices: {devices}")


def _param(name: str, job: Job) -> Any:
    return job.params[name]


def _promise(rows: Rows, at: int, slo: SloClass, alone: float) -> SLO:
    """What a request is promised that takes `alone` seconds, the config's extra included."""
    row = rows.rows[at]
    if row.slo_ttft_s is not None or row.slo_tpot_s is not None:
        raise ConfigError(
            f"{rows.where(at)}: promises of tokens (slo_ttft_*, slo_tpot_*) are for an llm"
        )
    total = promised(row.slo_s or slo.total_s, slo.scale, alone)
    if not total > 0:
        raise ConfigError(
            f"slo.scale: request {at} has no work, so its SLO would be 0 s; use slo.total_s"
        )
    return SLO(total, weight=slo.weight, name=slo.name)


def _check_counts(rows: Rows, at: int, request: Params, names: Sequence[str]) -> None:
    """ConfigError unless the parameters that loops ask for are whole numbers."""
    for name in names:
        value = request.get(name)
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= MOST_TOKENS:
            what = f"{name!r} is what a stage's `times` ask for, so a count of at most"
            raise ConfigError(f"{rows.where(at)}: {what} {MOST_TOKENS}; got {shown(value)}")


def _steps(steps: int | Between | Choices, count: int, seed: int) -> list[int]:
    draw = np.random.RandomState(seed)
    if isinstance(steps, Between):
        return [int(x) for x in draw.randint(steps.min, steps.max + 1, count)]
    if isinstance(steps, Choices):
        return [int(x) for x in draw.choice(steps.choices, count)]
    return [steps] * count
