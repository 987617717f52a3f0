"""The table of metrics: every name, its type, its labels, in a registry of its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.metrics import MetricWrapperBase

M = TypeVar("M", bound=MetricWrapperBase)
PREFIX = "neustream:"
FIRST = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0),
    *(20.0, 40.0, 80.0, 160.0, 640.0, 2560.0),
)
"""Seconds to a first token. These and the next three are what vLLM's dashboards expect."""
GAPS = (
    *(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0),
    *(2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0),
)
"""Seconds between two tokens."""
WHOLE = (
    *(0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0),
    *(120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0),
)
"""Seconds of a whole request, or of a part of one."""
COUNTS = tuple([float(one * 10**power) for power in range(6) for one in (1, 2, 5)])
"""Tokens of a request."""
FEW = (1.0, 2.0, 5.0, 10.0, 20.0)
BATCHES = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0)
STEPS = (1.0, 2.0, 4.0, 8.0, 15.0, 20.0, 25.0, 30.0, 40.0, 50.0, 100.0, 200.0)
STEP_S = (*GAPS[:16], 5.0, 10.0)
RATIOS = (0.25, 0.5, 0.75, 0.9, 1.0, 1.1, 1.25, 1.5, 2.0, 3.0, 5.0, 10.0)
SLACK = (-60.0, -10.0, -5.0, -1.0, -0.5, -0.1, 0.0, 0.1, 0.5, 1.0, 5.0, 10.0, 60.0)
BYTES = (128.0, 512.0, 2048.0, 8192.0, 32_768.0, 131_072.0, 524_288.0, 2_097_152.0, 33_554_432.0)
LAGS = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.04, 0.05, 0.075, 0.1, 0.25, 0.5, 1.0)
OF_CLASS = ("model", "class")


class Table:
    """All metrics. Each has the label `model`, but for those of the process and of HTTP.

    Attributes: one a metric, under its name without the prefix and `_total`.
    """

    def __init__(self) -> None:
        self.registry = CollectorRegistry(auto_describe=True)
        self._of_requests()
        self._of_times()
        self._of_tokens()
        self._of_steps()
        self._of_http()
        self._of_life()
        self._of_instances()

    def _counter(self, name: str, about: str, labels: Sequence[str] = ()) -> Counter:
        return Counter(PREFIX + name, about, labels, registry=self.registry)

    def _gauge(self, name: str, about: str, labels: Sequence[str] = ()) -> Gauge:
        return Gauge(PREFIX + name, about, labels, registry=self.registry)

    def _histogram(
        self, name: str, about: str, buckets: Sequence[float], labels: Sequence[str] = OF_CLASS
    ) -> Histogram:
        return Histogram(PREFIX + name, about, labels, buckets=buckets, registry=self.registry)

    def _of_requests(self) -> None:
        outcome = ("model", "class", "outcome")
        self.requests = self._counter(
            "requests",
            "Requests by what became of them; refused: they never got to the engine",
            outcome,
        )
        self.request_success = self._counter(
            "request_success", "Texts that are whole, by why they ended", ("model", "finished_reason")
        )
        self.refused = self._counter("refused", "Refused requests, by why", ("model", "reason"))
        self.dropped = self._counter("dropped", "Requests that a policy gave up, by code", ("model", "code"))
        self.slo_attained = self._counter("slo_attained", "Promised requests that were on time", OF_CLASS)
        self.slo_missed = self._counter(
            "slo_missed", "Promised requests that were not, by the first promise broken", (*OF_CLASS, "what")
        )
        self.running = self._gauge("num_requests_running", "Open requests that have run", ("model",))
        self.waiting = self._gauge("num_requests_waiting", "Open requests that have not", ("model",))

    def _of_times(self) -> None:
        self.ttft = self._histogram("time_to_first_token_seconds", "To the first token", FIRST)
        self.itl = self._histogram("inter_token_latency_seconds", "Between two tokens", GAPS)
        self.tpot = self._histogram(
            "request_time_per_output_token_seconds", "Mean of a request's tokens but its first", GAPS
        )
        self.e2e = self._histogram("e2e_request_latency_seconds", "Of a request that is done", WHOLE)
        self.queue = self._histogram("request_queue_time_seconds", "Until its first step", WHOLE)
        self.prefill = self._histogram("request_prefill_time_seconds", "From its first step to its first token", WHOLE)
        self.decode = self._histogram("request_decode_time_seconds", "From its first token to its last", WHOLE)
        self.slack = self._histogram(
            "request_slack_seconds", "Left at the end of a request; negative: it was late", SLACK
        )
        self.slack_min = self._gauge("open_request_slack_min_seconds", "The least of open requests that have a promise")
        self.slack_median = self._gauge("open_request_slack_median_seconds", "Its median")

    def _of_tokens(self) -> None:
        model = ("model",)
        self.prompt_tokens = self._counter("prompt_tokens", "Tokens of prompts that were prefilled", model)
        self.generation_tokens = self._counter("generation_tokens", "Tokens generated", model)
        self.request_prompt = self._histogram("request_prompt_tokens", "Of a prompt", COUNTS, model)
        self.request_generation = self._histogram(
            "request_generation_tokens", "Of a request that is over", COUNTS, model
        )
        self.params_n = self._histogram("request_params_n", "Choices asked for", FEW, model)
        self.params_max_tokens = self._histogram(
            "request_params_max_tokens", "The most tokens asked for", COUNTS, model
        )
        self.images = self._counter("images", "Images that were made", model)
        self.image_steps = self._histogram("num_inference_steps", "Of an image", STEPS, model)

    def _of_steps(self) -> None:
        module = ("model", "module")
        self.step_batch = self._histogram("step_batch_size", "Requests of a step", BATCHES, module)
        self.step_latency = self._histogram("step_latency_seconds", "Of a step", STEP_S, module)
        self.step_ratio = self._histogram(
            "step_profile_ratio", "What a step took over what its profile says", RATIOS, module
        )
        self.preemptions = self._counter("num_preemptions", "Requests that lost their KV blocks to a step", ("model",))
        self.offloads = self._counter(
            "num_kv_offloads", "Of these, requests whose keys and values went to host memory", ("model",)
        )
        self.kv_usage = self._gauge("kv_cache_usage_perc", "Used KV blocks over all, 0 to 1", ("model",))
        self.kv_slots = self._gauge("kv_slots_used", "Used KV blocks; by default one a request", ("model",))
        self.policy_faults = self._gauge("policy_faults", "Decisions FCFS made for a policy that raised")

    def _of_http(self) -> None:
        self.http_requests = self._counter("http_requests", "Answers", ("route", "code"))
        self.http_body = self._histogram("http_request_body_bytes", "Of a body", BYTES, ())
        self.http_connections = self._gauge("http_connections", "Open connections")
        self.http_streams = self._gauge("http_streams", "Streams that have begun and not ended")
        self.lag = self._histogram("event_loop_lag_seconds", "By which the event loop is late", LAGS, ())
        self.tasks = self._gauge("event_loop_tasks", "Tasks of the event loop")
        self.disconnects = self._counter(
            "disconnects", "Clients that went away, before the first byte or behind it", ("when",)
        )
        self.cut = self._counter("streams_cut", "Streams that ended before they were whole", ("code",))
        self.slow_readers = self._counter("slow_readers", "Clients that were cut: they did not read")
        self.slo_header_invalid = self._counter("slo_header_invalid", "Headers of promises not taken")
        self.unknown_fields = self._counter("unknown_fields", "Fields of bodies that nobody knows")

    def _of_life(self) -> None:
        self.load = self._gauge("load_seconds", "Until models were loaded and measured")
        self.warmup = self._gauge("warmup_seconds", "Of it, to measure them and start the engine")
        self.ready = self._gauge("ready", "Whether requests are taken")
        self.draining = self._gauge("draining", "Whether what is open is still served, and nothing else")
        self.build_info = self._gauge("build_info", "1", ("version", "backend", "policy"))

    def _of_instances(self) -> None:
        member = ("member",)
        self.instances = self._gauge("instances", "Instances of a cluster, by how they are", ("state",))
        self.instance_live = self._gauge("instance_live_requests", "Requests that are at an instance", member)
        self.instance_backlog = self._gauge(
            "instance_backlog_seconds", "Work that is at an instance, by its latest report", member
        )
        self.outlook_age = self._gauge("outlook_age_seconds", "Since the latest report of an instance", member)
        self.move_downtime = self._histogram(
            "move_downtime_seconds", "That a request which moved stood still, by why it moved", STEP_S, ("reason",)
        )
        self.forecast_error = self._histogram(
            "forecast_error_seconds",
            "That a first token, or an end, came after its forecast; negative: before",
            SLACK,
            ("what",),
        )
        self.instance_routed = self._counter("instance_routed", "Requests sent to an instance", member)
        self.instance_moved = self._counter(
            "instance_moved", "Requests that moved to an instance (in) or away from it (out)", ("member", "way")
        )
        self.instance_restarted = self._counter(
            "instance_restarted", "Requests that began anew, by the instance that they were at", member
        )
        self.instance_lost = self._counter(
            "instance_lost", "Requests that were at an instance when it was lost", member
        )
        self.instances_lost = self._counter("instances_lost", "Instances that were lost")
        self.instance_attained = self._counter(
            "instance_slo_attained", "Promised requests that an instance ended on time", member
        )
        self.instance_missed = self._counter("instance_slo_missed", "Promised requests that it did not", member)


class Children:
    """The children of metrics, by the values of their labels; looked up once."""

    def __init__(self) -> None:
        self._known: dict[tuple[object, ...], MetricWrapperBase] = {}

    def __call__(self, metric: M, *values: str) -> M:
        key = (metric, *values)
        child = self._known.get(key)
        if child is None:
            child = self._known[key] = metric.labels(*values)
        return child  # type: ignore[return-value]
