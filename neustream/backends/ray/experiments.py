"""An experiment served by a cluster: its models on each instance, its workload before the head."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from neustream.backends.making import make_model, wanted_of
from neustream.backends.ray.cluster import Cluster, joined
from neustream.backends.ray.configs import instances_of, needs_of, rules_of
from neustream.backends.ray.kinds import Kind
from neustream.backends.replaying import Serving
from neustream.backends.serving import Named, Part, Session, experiments_in
from neustream.cluster.happenings import Happening
from neustream.cluster.report import ClusterReport
from neustream.cluster.ways import Ways
from neustream.config.cluster import ClusterConfig
from neustream.config.schema import Config
from neustream.core.profile import LatencyProfile
from neustream.core.types import SLO
from neustream.engine.clock import stopwatch
from neustream.experiment.clusters import parted
from neustream.experiment.pipelines import Pipeline, pipeline_of
from neustream.experiment.prepared import policy_for
from neustream.experiment.roles import profiles_of, roles_of, stages_of
from neustream.service.answer import Answer
from neustream.service.service import Service


@dataclass(frozen=True)
class Made:
    """Makes the service of one instance; it goes there as it is.

    Args:
        profiles: of all stages; lengths: outputs after which generations end, by request.
        stages: those of the config that it serves; None: all.
    """

    config: Config
    policy: str
    profiles: Mapping[str, LatencyProfile]
    lengths: Mapping[str, int]
    stages: frozenset[str] | None

    def __call__(self, device: str) -> Service:
        parts = [part for name in experiments_in(self.config) if (part := self._part(name, device)) is not None]
        for part in parts:
            part.check_device()
            if self._own(part.pipeline) is None:
                part.warm_up()
        gc.collect()
        gc.freeze()  # the models' objects stay: no step has to wait while they are searched again
        stages = None
        if self.stages is not None:
            stages = [name for part in parts for name in part.served_as(self.stages)]
        return Service(
            {part.name: part.mount() for part in parts},
            devices=[device],
            policy=policy_for([part.pipeline for part in parts], self.policy),
            stages=stages,
            forgiving=False,
        )

    def _own(self, pipeline: Pipeline[Any]) -> list[str] | None:
        """The stages of a model that are served here, by their names in its own config; None: all."""
        here = [stage for stage in pipeline.stages if self.stages is None or stage in self.stages]
        if len(here) == len(pipeline.stages):
            return None
        return [stage.removeprefix(pipeline.prefix) for stage in here]

    def _part(self, name: str, device: str) -> Part | None:
        """A model as it is served here, with what its stages here need; None if it has none here."""
        experiment = experiments_in(self.config)[name]
        pipeline = pipeline_of(experiment, f"{name}." if name else "")
        own = self._own(pipeline)
        if own == []:
            return None
        model = make_model(experiment, device, own)
        model.lengths = self.lengths
        profiles = {stage: self.profiles[stage] for stage in pipeline.stages}
        return Part(name, pipeline, model, wanted_of(pipeline, profiles), [device])


class OfCluster:
    """A cluster, as what serves a workload's requests."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster

    @property
    def fault(self) -> BaseException | None:
        return self._cluster.fault

    def now(self) -> float:
        return stopwatch()

    def interrupt(self) -> None:
        self._cluster.interrupt()

    def submit(self, *args: Any, model: str | None, slo: SLO, id: str, **named: Any) -> Answer[Any]:
        return self._cluster.submit(*args, model=model, slo=slo, id=id, **named)


class ClusterSession(Session):
    """An experiment whose models are on the instances of a cluster, and here too: they make the requests.

    Args:
        device: of each instance, "cpu" or "cuda".

    Attributes:
        ways: what messages took while the workload was served the latest time.

    Raises:
        ConfigError, BackendError, ProfileError: as of a `Session`.
    """

    def __init__(self, config: Config, device: str) -> None:
        self._needs = needs_of(device, "--device")
        self._watching: ClusterReport | None = None
        self.ways = Ways()
        assert config.cluster is not None
        self._leave = joined(config.cluster.address)
        try:
            super().__init__(config, "cpu")
            roles_of(self.prepared, config.cluster)  # says which stages nobody serves
        except BaseException:
            self._leave()
            raise

    def close(self) -> None:
        self._leave()

    def _check_devices(self) -> None:
        """Instances see to that: profiles are of theirs."""

    def _new_report(self, start: float) -> ClusterReport:
        self._watching = ClusterReport(start)
        return self._watching

    def _happened(self, event: Happening) -> None:
        self.ways.happened(event)
        if self._watching is not None:
            self._watching.happened(event)

    @contextlib.contextmanager
    def _serving(self, policy: str, heard: Named) -> Iterator[Serving]:
        config = self.config.cluster
        assert config is not None
        name, router = parted(policy)
        rules = rules_of(config, router or next(iter(config.router)))
        policy_for(self.prepared.pipelines, name)
        self._watching, self.ways = None, Ways()
        cluster = Cluster(
            self._kinds(config, name, rules["scaler"]),
            observers=[self.ways, heard],
            watchers=[self._happened],
            **rules,
        )
        with cluster:
            yield OfCluster(cluster)
            cluster.wait()
            report = self._watching
            if report is not None:
                report.instance_s = cluster.instance_s(report.start, report.start + report.duration)

    def _kinds(self, config: ClusterConfig, policy: str, scaler: Any) -> dict[str, Kind]:
        """The kinds of instances, each with the profiles of its device."""
        profiles, found = profiles_of(self.prepared, config), {}
        for name, kind in config.kinds.items():
            stages = None if kind.stages is None else stages_of(self.prepared, name, kind)
            made = Made(self.config, policy, profiles[name], self.prepared.lengths, stages)
            count, most = instances_of(kind.count, scaler, name)
            found[name] = Kind(made, count, most, {**self._needs, **kind.resources})
        return found
