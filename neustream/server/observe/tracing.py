"""OpenTelemetry: a span for each request and each of its stages, and gen_ai.server metrics.

Needs the extra `otel`; only imported where the operator asks for it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import PeriodicExportingMetricReader
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import SpanKind, Status, StatusCode, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from neustream.server.observe.lives import Follower, Life
from neustream.server.observe.notes import Answered, Arrived, Told

NAME = "neustream"
OPERATIONS = {
    "/v1/chat/completions": "chat",
    "/v1/images/generations": "generate_content",
    "/v1/images/edits": "generate_content",
}
"""By route; else text_completion."""
WHOLE = (0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24, 20.48, 40.96, 81.92)
FIRST = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0)
EACH = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5)
"""Bounds of histograms, in seconds, that the conventions advise."""
LATER = 1000
"""Answered requests that are remembered: the engine may end theirs a moment later."""


@dataclass(slots=True)
class Trace:
    """A request under way: its span, and what its metrics are labelled with."""

    arrived: Arrived
    span: Any
    labels: dict[str, str]


class Tracer(Follower):
    """Makes spans and metrics of lives and HTTP requests.

    Args:
        spans, meters: the SDK's providers.

    Attributes:
        zero: seconds since 1970 at which the engine's clock began.
    """

    def __init__(self, spans: TracerProvider, meters: MeterProvider) -> None:
        self.zero = 0.0
        self._providers = (spans, meters)
        self._tracer = spans.get_tracer(NAME, version(NAME))
        self._open: OrderedDict[str, Trace] = OrderedDict()
        self._answered: OrderedDict[str, Trace] = OrderedDict()
        self._incoming = TraceContextTextMapPropagator()
        meter = meters.get_meter(NAME, version(NAME))

        def seconds(name: str, about: str, bounds: tuple[float, ...]) -> Any:
            return meter.create_histogram(
                f"gen_ai.server.{name}", "s", about, explicit_bucket_boundaries_advisory=bounds
            )

        self._whole = seconds("request.duration", "From a request's head to the end of its answer", WHOLE)
        self._first = seconds("time_to_first_token", "From a request to its first token", FIRST)
        self._each = seconds("time_per_output_token", "Of each token behind the first", EACH)

    def close(self) -> None:
        """Send what is left; it may wait for whoever collects."""
        for provider in self._providers:
            provider.shutdown()

    # -- what happens -----------------------------------------------------------------------------

    def noted(self, note: Told) -> None:
        if isinstance(note, Arrived):
            self._arrived(note)
        elif isinstance(note, Answered):
            self._over(note)

    def _arrived(self, note: Arrived) -> None:
        operation = OPERATIONS.get(note.route, "text_completion")
        labels = {"gen_ai.operation.name": operation, "gen_ai.provider.name": NAME}
        span = self._tracer.start_span(
            f"POST {note.route}",
            self._incoming.extract(note.carrier),
            SpanKind.SERVER,
            {**labels, "http.route": note.route, "neustream.request.id": note.id},
            start_time=_ns(note.at),
        )
        self._open[note.id] = Trace(note, span, labels)

    def ended(self, life: Life) -> None:
        trace = self._of(life.id)
        if trace is None:
            return
        trace.labels["gen_ai.request.model"] = life.model
        span, operation = trace.span, trace.labels["gen_ai.operation.name"]
        span.update_name(f"{operation} {life.model}")
        span.set_attributes({"gen_ai.request.model": life.model, **_facts(life)})
        context = set_span_in_context(span)
        for name, began, ended, steps in _stages(life):
            facts: dict[str, Any] = {"neustream.request.id": life.id}
            if steps:
                facts["neustream.steps"] = steps
            start, end = _ns(self.zero + began), _ns(self.zero + ended)
            self._tracer.start_span(name, context, attributes=facts, start_time=start).end(end)
        if life.kind == "text" and life.first is not None and life.latest is not None:
            self._first.record(life.first - life.arrival, trace.labels)
            if life.outputs > 1:
                self._each.record((life.latest - life.first) / (life.outputs - 1), trace.labels)

    def _over(self, note: Answered) -> None:
        trace = self._open.pop(note.id, None)
        if trace is None:
            return
        span, labels = trace.span, dict(trace.labels)
        span.set_attribute("http.response.status_code", note.status)
        wrong = note.code or (str(note.status) if note.status >= 400 else "")
        if wrong:
            labels["error.type"] = wrong
            span.set_attribute("error.type", wrong)
        if wrong and (note.status >= 500 or note.status == 200):
            span.set_status(Status(StatusCode.ERROR, wrong))
        span.end(_ns(note.at))
        self._whole.record(note.at - trace.arrived.at, labels)
        self._answered[note.id] = trace
        if len(self._answered) > LATER:
            self._answered.popitem(last=False)

    def _of(self, id: str) -> Trace | None:
        """The HTTP request that an engine's request is of: it has its id, or that and a number."""
        for known in (id, id.rpartition("-")[0]):
            trace = self._open.get(known) or self._answered.get(known)
            if trace is not None:
                return trace
        return None


def _facts(life: Life) -> dict[str, Any]:
    found: dict[str, Any] = {"neustream.outcome": str(life.outcome)}
    if life.name:
        found["neustream.slo.class"] = life.name
    if life.kind == "text":
        found["gen_ai.usage.output_tokens"] = life.outputs
    if life.prompt_tokens is not None:
        found["gen_ai.usage.input_tokens"] = life.prompt_tokens
    if life.finish:
        found["gen_ai.response.finish_reasons"] = [life.finish]
    return found


def _stages(life: Life) -> Iterator[tuple[str, float, float, int]]:
    """Name, begin, end and steps of each stage; seconds of the engine's clock."""
    assert life.ended is not None
    yield "queue", life.arrival, life.began if life.began is not None else life.ended, 0
    if life.began is None:
        return
    if life.kind != "text":
        for name, phase in life.phases.items():
            yield name, phase.began, life.ended if phase.ended is None else phase.ended, phase.steps
        return
    yield "prefill", life.began, life.ended if life.first is None else life.first, 0
    if life.outputs > 1 and life.first is not None and life.latest is not None:
        yield "decode", life.first, life.latest, life.outputs - 1


def _ns(seconds: float) -> int:
    return int(seconds * 1e9)


def exporting(endpoint: str) -> Tracer:
    """One that sends to a collector over OTLP and HTTP. The SDK's own variables (OTEL_...) hold too."""
    base = endpoint.rstrip("/")
    resource = Resource.create({"service.name": NAME, "service.version": version(NAME)})
    spans = TracerProvider(resource=resource, shutdown_on_exit=False)
    spans.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(f"{base}/v1/traces")))
    reader = PeriodicExportingMetricReader(OTLPMetricExporter(f"{base}/v1/metrics"))
    return Tracer(spans, MeterProvider([reader], resource=resource, shutdown_on_exit=False))
