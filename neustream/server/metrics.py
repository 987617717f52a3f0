"""What /metrics tells."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from neustream.core.events import Emitted, Ended, Submitted
from neustream.engine.events import Finished, Record
from neustream.engine.snapshot import Snapshot

SECONDS = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0)
GAPS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5)
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class Metrics:
    """An observer of the engine, and what routes tell of HTTP.

    Requests are counted by class and outcome: on_time, late, dropped, failed, cancelled.
    """

    def __init__(self) -> None:
        self.registry = CollectorRegistry(auto_describe=True)

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"neustream:{name}", text, labels, registry=self.registry)

        def histogram(name: str, text: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
            return Histogram(f"neustream:{name}", text, labels, buckets=buckets, registry=self.registry)

        def gauge(name: str, text: str) -> Gauge:
            return Gauge(f"neustream:{name}", text, registry=self.registry)

        self._requests = counter("requests", "Requests that ended", "class", "outcome")
        self._dropped = counter("dropped", "Requests that were given up, by code", "code")
        self._tokens = counter("generation_tokens", "Tokens of language models")
        self._ttft = histogram("time_to_first_token_seconds", "From a request to its first output", SECONDS, "class")
        self._itl = histogram("inter_token_latency_seconds", "Between two outputs", GAPS, "class")
        self._e2e = histogram("e2e_request_latency_seconds", "From a request to its end", SECONDS, "class")
        self._slack = histogram(
            "request_slack_seconds",
            "Time left at the end of a request that was promised an end; negative: late",
            (-10.0, -1.0, -0.1, 0.0, 0.1, 0.5, 1.0, 5.0, 10.0, 60.0),
            "class",
        )
        self._batch = histogram("step_batch_size", "Requests of a step", BATCHES, "stage")
        self._step = histogram("step_latency_seconds", "Seconds of a step", SECONDS, "stage")
        self._open = gauge("num_requests_running", "Requests that have not ended")
        self._faults = gauge("policy_faults", "Decisions that FCFS made for a policy that raised")
        self._ready = gauge("ready", "Whether requests are taken")
        self._http = counter("http_requests", "Answers, by route and status", "route", "code")
        self._cut = counter("streams_cut", "Streams that ended before they were whole", "code")
        self._unknown = counter("unknown_fields", "Fields of bodies that nobody knows")
        self._headers = counter("slo_header_invalid", "Headers of promises that were not taken")
        self._classes: dict[str, str] = {}
        self._latest: dict[str, float] = {}

    # -- of the engine, on its thread -------------------------------------------------------------

    def __call__(self, record: Record) -> None:
        if isinstance(record, Emitted):
            self._emitted(record)
        elif isinstance(record, Submitted):
            self._classes[record.id] = record.slo.name
        elif isinstance(record, Ended):
            self._ended(record)
        elif isinstance(record, Finished):
            step = record.step
            self._batch.labels(step.stage).observe(len(step))
            self._step.labels(step.stage).observe(record.at - step.started_at)

    def _emitted(self, record: Emitted) -> None:
        name = self._classes.get(record.id, "")
        if "token" in record.update:
            self._tokens.inc()
        before = self._latest.get(record.id)
        if before is None:
            self._ttft.labels(name).observe(record.age)
        else:
            self._itl.labels(name).observe(record.age - before)
        self._latest[record.id] = record.age

    def _ended(self, record: Ended) -> None:
        self._latest.pop(record.id, None)
        self._classes.pop(record.id, None)
        name, outcome = record.slo.name, str(record.status)
        if record.status == "done":
            outcome = "on_time" if record.on_time else "late"
            self._e2e.labels(name).observe(record.latency_s)
            if record.slo.total < float("inf"):
                self._slack.labels(name).observe(record.slo.total - record.latency_s)
        elif record.status == "dropped":
            self._dropped.labels(record.code).inc()
        self._requests.labels(name, outcome).inc()

    # -- of HTTP ----------------------------------------------------------------------------------

    def answered(self, route: str, status: int) -> None:
        """A route, by its pattern, answered."""
        self._http.labels(route, str(status)).inc()

    def cut(self, code: int) -> None:
        """A stream ended before it was whole; 499: its client went away."""
        self._cut.labels(str(code)).inc()

    def unknown(self, count: int) -> None:
        """A body had so many fields that nobody knows."""
        self._unknown.inc(count)

    def bad_headers(self, count: int) -> None:
        """So many headers of promises were not taken."""
        self._headers.inc(count)

    def render(self, snapshot: Snapshot | None, ready: bool) -> bytes:
        """All of them, as Prometheus reads them."""
        self._ready.set(ready)
        if snapshot is not None:
            self._open.set(snapshot.open)
            self._faults.set(snapshot.policy_faults)
        return generate_latest(self.registry)
