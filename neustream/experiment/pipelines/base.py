"""What the kinds of models that an experiment may have differ in, behind one class."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

from neustream.config.schema import Experiment
from neustream.core.graph import Graph, Stage
from neustream.core.policy import Pool
from neustream.core.profile import LatencyProfile
from neustream.engine.executor import Executor
from neustream.experiment.requests import Drawn, Params
from neustream.experiment.trace_rows import Rows, rows_of
from neustream.profiling.files import EngineCosts, load_costs
from neustream.workload import Row

Config = TypeVar("Config", bound=Experiment, covariant=True)


class Pipeline(ABC, Generic[Config]):
    """The model of an experiment: its graph, profiles, pools and requests.

    Args:
        experiment: what the config says.
        prefix: stands in front of the names of the graph, its stages and its requests, so that
            several pipelines can be told apart.
    """

    kind: ClassVar[str]
    """The key that it has in a config."""

    def __init__(self, experiment: Config, prefix: str = "") -> None:
        self.experiment = experiment
        self.prefix = prefix

    @property
    def name(self) -> str:
        """Of its graph; the ids of its requests begin with it."""
        return self.prefix + self.experiment.name

    # -- what it runs -----------------------------------------------------------------------------

    @cached_property
    def graph(self) -> Graph:
        return self.build_graph()

    @abstractmethod
    def build_graph(self) -> Graph:
        """The graph of its requests."""

    @property
    def stages_by_name(self) -> Mapping[str, Stage]:
        """Its stages in their order."""
        return self.graph.stages

    @property
    def stages(self) -> tuple[str, ...]:
        """The names of its stages, in their order."""
        return tuple(self.stages_by_name)

    @property
    def labels(self) -> tuple[str, ...]:
        """What its steps are called: each needs a module and takes a time."""
        return self.stages

    @property
    @abstractmethod
    def drawn(self) -> str:
        """Its graph in a line."""

    @property
    @abstractmethod
    def main_stage(self) -> str:
        """The stage that most steps are of."""

    @property
    @abstractmethod
    def pools(self) -> list[Pool]:
        """The workers of one instance, and their memory."""

    def executors(self) -> Mapping[str, Executor]:
        """What lets the time of pools pass that have no profile to go by, by their names."""
        return {}

    @property
    @abstractmethod
    def rounds(self) -> Sequence[str]:
        """Parameters of requests that say how often a stage runs, once for each such stage."""

    # -- how long it takes ------------------------------------------------------------------------

    @abstractmethod
    def files_by_stage(self) -> Mapping[str, Sequence[Path]]:
        """The profile files of each stage, whose seconds add up."""

    def profile_files(self) -> list[Path]:
        """The files that `load_profiles` reads."""
        return list(dict.fromkeys(file for some in self.files_by_stage().values() for file in some))

    @property
    @abstractmethod
    def measured_names(self) -> Sequence[str]:
        """The profile files, without .json, that measuring writes."""

    @abstractmethod
    def load_profiles(self) -> dict[str, LatencyProfile]:
        """The profile of each stage; ProfileError if one is missing or malformed."""

    @abstractmethod
    def load_found(self) -> dict[str, LatencyProfile]:
        """The profiles of those stages whose files are there."""

    def truth_files(self) -> Mapping[str, Sequence[Path]]:
        """The files of `simulation.truth` by stage."""
        folder = self.experiment.profiles
        return {
            self.prefix + name: [folder / f"{part}.json" for part in parts]
            for name, parts in self.experiment.simulation.truth.items()
        }

    def load_truth(self, profiles: Mapping[str, LatencyProfile]) -> dict[str, LatencyProfile]:
        """How long simulated steps really take, of those stages that take not what `profiles` say.

        Raises:
            ProfileError: a file is missing or malformed, of another device, or of fewer batches.
        """
        return {}

    def typical_size(self, stage: str) -> float:
        """What a request of the workload weighs in a step of a stage, where steps have sizes."""
        return 0.0

    def measured_batches(self, stage: str, profile: LatencyProfile, most: int) -> list[int]:
        """The batch sizes up to `most` that a stage was measured at."""
        return [1] if most == 1 else [1, most]

    def costs(self) -> EngineCosts:
        """What the engine adds to its steps, by its profiles."""
        return load_costs(self.profile_files())

    # -- what is asked of it ----------------------------------------------------------------------

    @abstractmethod
    def draw(
        self,
        profiles: Mapping[str, LatencyProfile],
        params: Callable[[int], Params] = lambda at: {},
    ) -> Drawn:
        """The workload's requests; `params` adds what a real backend needs.

        The same config gives the same ones.

        Raises:
            ConfigError: the trace cannot be read, or lacks what the graph asks for.
        """

    @property
    @abstractmethod
    def unused_columns(self) -> Sequence[str]:
        """Fields of a trace's rows that change nothing here."""

    def notes_on(self, rows: Sequence[Row]) -> list[str]:
        """What else the user of a trace should know, one sentence each."""
        return []

    def rows(self) -> Rows:
        """The rows that the workload takes of its trace."""
        return rows_of(self.experiment.workload, self.unused_columns, self.notes_on)

    def id_of(self, at: int) -> str:
        """The id of the workload's `at`-th request."""
        return f"{self.name}-{at}"

    def sample(self, count: int) -> dict[str, Any]:
        """Parameters of a request: `count` wherever one says how often a stage runs."""
        return dict.fromkeys(self.rounds, count)
