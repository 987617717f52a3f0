"""The sections of a report about the servers themselves, and the whole report."""

from __future__ import annotations

import datetime
from typing import Annotated, Any

from neustream.bench.reports.scenario import Scenario
from neustream.bench.reports.schema import (
    MEMORY,
    PORTION,
    POWER,
    VERSION,
    Counted,
    Memory,
    Open,
    Portion,
    Power,
    RequestPerformance,
    RunSection,
    Section,
    Series,
    SessionPerformance,
    Statistics,
    Version,
    Whole,
)
from pydantic import Field

PortionSeries = Annotated[Series | None, PORTION]
MemorySeries = Annotated[Series | None, MEMORY]
PowerSeries = Annotated[Series | None, POWER]


class Resources(Section):
    kv_cache_usage: Portion = None
    cache_hit_rate: Portion = None
    gpu_cache_usage: Portion = None
    cpu_cache_usage: Portion = None
    gpu_memory_usage: Memory = None
    cpu_memory_usage: Memory = None
    storage_usage: Memory = None
    gpu_utilization: Portion = None
    cpu_utilization: Portion = None
    power_consumption: Power = None
    running_requests: Counted = None
    waiting_requests: Counted = None
    swapped_requests: Counted = None
    preemptions: Counted = None


class ResourceSeries(Section):
    kv_cache_usage: PortionSeries = None
    gpu_cache_usage: PortionSeries = None
    cpu_cache_usage: PortionSeries = None
    gpu_memory_usage: MemorySeries = None
    cpu_memory_usage: MemorySeries = None
    storage_usage: MemorySeries = None
    gpu_utilization: PortionSeries = None
    cpu_utilization: PortionSeries = None
    power_consumption: PowerSeries = None
    num_requests_running: Series | None = None
    num_requests_waiting: Series | None = None
    num_preemptions: Series | None = None
    prefix_cache_queries: Series | None = None
    prefix_cache_hits: Series | None = None
    prefix_cache_hit_rate: Series | None = None
    external_prefix_cache_queries: Series | None = None
    external_prefix_cache_hits: Series | None = None
    external_prefix_cache_hit_rate: Series | None = None
    prompt_tokens: Series | None = None
    generation_tokens: Series | None = None
    pool_avg_kv_cache_utilization: Series | None = None
    pool_avg_queue_size: Series | None = None
    pool_avg_running_requests: Series | None = None
    pool_ready_pods: Series | None = None


class ComponentObservability(Section):
    component_label: str
    replica_id: str | None = None
    aggregate: Resources | None = None
    time_series: ResourceSeries | None = None
    raw_data_path: str | None = None
    graph_path: str | None = None


class PodStartup(Section):
    name: str
    model: str | None = None
    role: str | None = None
    node: str | None = None
    creation_timestamp: datetime.datetime | None = None
    ready_timestamp: datetime.datetime | None = None
    startup_seconds: float | None = Field(default=None, ge=0)


class PodStartupTimes(Section):
    collected_at: datetime.datetime | None = None
    pods: list[PodStartup] | None = None
    aggregate: Statistics | None = None
    graph_path: str | None = None


class Controller(Section):
    kind: str
    name: str
    model: str | None = None
    role: str | None = None
    desired_replicas: Whole
    available_replicas: Whole
    ready_replicas: Whole
    updated_replicas: Whole | None = None


class ReplicaSnapshot(Section):
    timestamp: datetime.datetime | None = None
    namespace: str | None = None
    controllers: list[Controller] | None = None


class ReplicaStatus(Section):
    namespace: str | None = None
    timestamp: datetime.datetime | None = None
    controllers: list[Controller] | None = None
    time_series: list[ReplicaSnapshot] | None = None
    aggregate_ready_replicas: Statistics | None = None
    graph_path: str | None = None


class Observability(Open):
    """Open: what neustream says of promises is in `neustream_slo`."""

    components: list[ComponentObservability] | None = None
    drop_rate: Portion = None
    pod_startup_times: PodStartupTimes | None = None
    replica_status: ReplicaStatus | None = None


class ReplicaHealth(Section):
    replica_id: str
    restarts: Whole | None = None
    healthy: bool | None = None
    logs: str | None = None


class ComponentHealth(Section):
    component_label: str
    total_restarts: Whole | None = None
    failed_replicas: Whole | None = None
    replica_health: list[ReplicaHealth] | None = None


class Results(Section):
    request_performance: RequestPerformance | None = None
    session_performance: SessionPerformance | None = None
    observability: Observability | None = None
    profiling: Any = None
    component_health: list[ComponentHealth] | None = None


class Report(Section):
    """One stage of a benchmark."""

    version: Version = VERSION
    run: RunSection
    scenario: Scenario | None = None
    results: Results

    def content(self) -> dict[str, Any]:
        """As files have it: what is not said is left out."""
        return self.model_dump(mode="json", exclude_none=True)
