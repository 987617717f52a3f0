"""A cluster behind a server's front: its models on each instance, what they do in /metrics."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

from neustream.backends.loading import model_of, mount_of, policy_of, service_of
from neustream.backends.ray.cluster import LEASE_S, Cluster
from neustream.backends.ray.configs import check, instances_of, needs_of, rules_of
from neustream.by_name import make_policy
from neustream.cluster.foretold import Foretold
from neustream.cluster.happenings import Happening, Lost, Moved, Restarted, Routed, Unmoved
from neustream.core.events import Emitted, Ended, Submitted
from neustream.engine.clock import stopwatch
from neustream.engine.desk import Limit
from neustream.engine.events import Record, Started
from neustream.engine.report import Report
from neustream.engine.snapshot import Snapshot
from neustream.engine.tally import Latest
from neustream.server.admission import Began, Pace
from neustream.server.backing import Happened, InstanceState
from neustream.server.config import ModelConfig, ServerConfig
from neustream.server.loading import Loaded
from neustream.server.metrics import Metrics
from neustream.server.models import ImageModel, Model
from neustream.server.observe.table import Table
from neustream.service.answer import Answer
from neustream.service.service import Service


@dataclass(frozen=True)
class Made:
    """Makes the service of one instance: all models of a server's config."""

    config: ServerConfig

    def __call__(self, device: str) -> Service:
        models = [_on(model, device) for model in self.config.models]
        named = policy_of(self.config)
        policy = make_policy(named.pop("name"), named)
        mounts = {model.name: mount_of(model) for model in models}
        places = {model.name: device for model in models}
        unlimited = self.config.model_copy(update={"limits": self.config.limits.model_copy(update={"max_open": None})})
        return service_of(unlimited, mounts, places, policy, [])


def _on(model: ModelConfig, device: str) -> ModelConfig:
    return model.model_copy(update={"device": device})


def models_of(config: ServerConfig, service: Service) -> list[Model]:
    """What a front has to know of an instance's models, asked there."""
    found: list[Model] = []
    for model, mount in zip(config.models, service.models.values(), strict=True):
        known = model_of(_on(model, ""), mount, config.promises.fallback_ttft_ms)
        found.append(replace(known, previews=False) if isinstance(known, ImageModel) else known)
    return found


def load(config: ServerConfig, metrics: Metrics) -> Loaded:
    """A running cluster of the instances that a config asks for, with all of its models.

    Raises:
        ConfigError: what it cannot have, by its key.
        BackendError: Ray is not there; there are too few devices; an instance's models cannot be
            had, with the machine and why.
    """
    section = config.cluster
    assert section is not None
    check(section)
    rules = rules_of(section, next(iter(section.router)))
    began = stopwatch()
    figures = Figures(metrics.table)
    report = Report()
    cluster = Cluster(
        Made(config),
        instances=instances_of(section.instances, rules["scaler"]),
        address=section.address,
        resources=needs_of(config.models[0].device, f"model {config.models[0].name!r}: device"),
        observers=[metrics, figures, report],
        watchers=[figures.happened],
        **lasting_of(config),
        **rules,
    )
    try:
        models = cluster.inspect(partial(models_of, config))
    except BaseException:
        cluster.close(cancel=True)
        raise
    least = getattr(rules["scaler"], "min", getattr(rules["scaler"], "count", section.instances))
    policy = type(make_policy(policy_of(config)["name"])).__name__
    names = [model.name for model in models]
    backing = OfCluster(cluster, figures, report, names, policy, max_open=config.limits.max_open, asked=least)
    return Loaded(backing, models, warmup_s=stopwatch() - began)


def lasting_of(config: ServerConfig) -> dict[str, Any]:
    """What of a `Cluster` lets its instances outlive the front, as its arguments.

    Instances serve by the config that they were made with: those of other models, or of another
    policy, have another name.
    """
    section = config.cluster
    if section is None or section.name is None:
        return {}
    made = config.model_dump_json(include={"models", "policy", "promises", "limits", "step_timeout_s"})
    name = f"{section.name}-{hashlib.blake2b(made.encode(), digest_size=8).hexdigest()}"
    return {"name": name, "lease_s": LEASE_S if section.lease_s is None else section.lease_s}


@dataclass(eq=False)
class Job:
    """A request without an answer: when it came, and when its first step began."""

    arrival: float
    started_at: float | None = None


class Figures:
    """Counts what instances do, on the cluster's thread.

    Attributes:
        jobs: requests without an answer, by id; at: the instances that they are at.
        moves, unmoved: by reason; moved_in, moved_out: by instance; downtime: of moves, seconds.
        restarted, lost: requests that began anew; instances that were lost.
        foretold: forecasts and outcomes.
        pace: from one request that is done to the next.
    """

    def __init__(self, table: Table) -> None:
        self.moves: Counter[str] = Counter()
        self.unmoved: Counter[str] = Counter()
        self.moved_in: Counter[str] = Counter()
        self.moved_out: Counter[str] = Counter()
        self.downtime = Latest()
        self.restarted = self.lost = 0
        self.foretold = Foretold(lambda what, seconds: table.forecast_error.labels(what).observe(seconds), Latest)
        self.jobs: dict[str, Job] = {}
        self.at: dict[str, str] = {}
        self.pace = Pace()
        self._table = table

    def __call__(self, record: Record) -> None:
        """A record of the cluster."""
        if isinstance(record, Submitted):
            self.jobs[record.id] = Job(record.arrival)
        elif isinstance(record, Started):
            for id in record.step.ids:
                job = self.jobs.get(id)
                if job is not None and job.started_at is None:
                    job.started_at = record.at
        elif isinstance(record, Emitted):
            self.foretold.emitted(record)
        elif isinstance(record, Ended):
            self._ended(record)

    def _ended(self, record: Ended) -> None:
        self.jobs.pop(record.id, None)
        self.at.pop(record.id, None)
        self.foretold.ended(record)
        if record.status == "done":
            self.pace.done(record.at, record.latency_s)
        if record.member and record.slo.promises and record.status != "cancelled":
            table = self._table
            counter = table.instance_attained if record.on_time else table.instance_missed
            counter.labels(record.member).inc()

    def happened(self, event: Happening) -> None:
        """A route, a move, a loss, a restart; of a request it may be told behind its end."""
        table = self._table
        match event:
            case Routed():
                self._put(event.id, event.instance)
                if event.id in self.jobs:
                    self.foretold.routed(event)
                table.instance_routed.labels(event.instance).inc()
            case Moved():
                self._moved(event)
            case Unmoved():
                self.unmoved[event.reason] += 1
            case Restarted():
                self.restarted += 1
                if (instance := self.at.pop(event.id, None)) is not None:
                    table.instance_restarted.labels(instance).inc()
            case Lost():
                self.lost += 1
                table.instances_lost.inc()
                table.instance_lost.labels(event.instance).inc(event.requests)

    def _moved(self, event: Moved) -> None:
        table = self._table
        self._put(event.id, event.target)
        self.moves[event.reason] += 1
        self.moved_out[event.source] += 1
        self.moved_in[event.target] += 1
        table.instance_moved.labels(event.source, "out").inc()
        table.instance_moved.labels(event.target, "in").inc()
        if event.held_at < math.inf:
            downtime_s = event.at - event.held_at
            self.downtime.add(downtime_s)
            table.move_downtime.labels(event.reason).observe(downtime_s)

    @property
    def so_far(self) -> Happened:
        """What happened between instances."""
        downtime_s = {f"p{q}": self.downtime.percentile(q) for q in (50, 99)} if self.downtime.count else {}
        return Happened(
            dict(self.moves),
            dict(self.unmoved),
            downtime_s,
            self.restarted,
            self.lost,
            self.foretold.as_dict(),
            self.foretold.errors_as_dict(),
        )

    def _put(self, id: str, instance: str) -> None:
        """A request is at an instance, unless it is over by now."""
        if id in self.jobs:
            self.at[id] = instance

    @property
    def live(self) -> Mapping[str, int]:
        """Requests that are at each instance."""
        return Counter(list(self.at.values()))


class OfCluster:
    """A cluster as what is behind a front (`Backing`). `asked`: instances that have to be up."""

    def __init__(
        self,
        cluster: Cluster,
        figures: Figures,
        report: Report,
        names: Sequence[str],
        policy: str,
        *,
        max_open: int,
        asked: int,
    ) -> None:
        self.report = report
        self.models: Collection[str] = names if len(names) > 1 else [""]
        self.policies: Collection[str] = [policy]
        self._asked = asked
        self._limit = Limit(max_open)
        self._cluster = cluster
        self._figures = figures
        self._closed = False

    @property
    def jobs(self) -> Sequence[Mapping[str, Began]]:
        return [self._figures.jobs]

    @property
    def instances(self) -> Mapping[str, InstanceState]:
        figures, live = self._figures, self._figures.live
        return {
            name: InstanceState(
                **{**asdict(each), "live": live.get(name, 0)},
                moved_in=figures.moved_in[name],
                moved_out=figures.moved_out[name],
            )
            for name, each in self._cluster.instances.items()
        }

    @property
    def happened(self) -> Happened:
        return self._figures.so_far

    @property
    def lacking(self) -> str:
        up = sum([each.state == "up" for each in self._cluster.instances.values()])
        return f"{up} of {self._asked} instances are up" if up < self._asked else ""

    def now(self) -> float:
        return stopwatch()

    def wait_s(self, count: int) -> float | None:
        gap_s = self._figures.pace.gap_s
        return None if gap_s is None else count * gap_s

    def snapshot(self) -> Snapshot:
        return Snapshot("closed" if self._closed else "serving", open=len(self._figures.jobs))

    def submit(self, *args: Any, model: str | None, id: str, **options: Any) -> Answer[Any]:
        self._limit.check(id, self._cluster.open, self.wait_s)
        return self._cluster.submit(*args, model=model, id=id, **options)

    def close(self, *, cancel: bool) -> None:
        self._cluster.close(cancel=cancel)
        self._closed = True
