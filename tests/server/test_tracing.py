"""OpenTelemetry: spans of requests and their stages, and metrics, as a collector gets them."""

from __future__ import annotations

import builtins
import http.server
import threading

import pytest

pytest.importorskip("starlette", reason="needs the extra 'serve'")
httpx = pytest.importorskip("httpx", reason="needs the extra 'dev'")

from serving import serving, settled, stock, text_service  # noqa: E402
from toys import command  # noqa: E402

from neustream import BackendError  # noqa: E402
from neustream.server.lifecycle import tracer_of  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
ASK = {"prompt": "Once upon", "max_tokens": 6, "temperature": 0, "ignore_eos": True}


@pytest.fixture(scope="module")
def otel():
    pytest.importorskip("opentelemetry.sdk", reason="needs the extra 'otel'")
    pytest.importorskip("opentelemetry.exporter.otlp.proto.http", reason="needs the extra 'otel'")
    from neustream.server.observe import tracing

    return tracing


class Kept:
    """What in-memory exporters got."""

    def __init__(self, tracing):
        from opentelemetry.sdk.metrics.export import InMemoryMetricReader
        from opentelemetry.sdk.trace.export import SimpleSpanProcessor
        from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

        self.exporter, self.reader = InMemorySpanExporter(), InMemoryMetricReader()
        spans = tracing.TracerProvider(shutdown_on_exit=False)
        spans.add_span_processor(SimpleSpanProcessor(self.exporter))
        self.tracer = tracing.Tracer(spans, tracing.MeterProvider([self.reader], shutdown_on_exit=False))
        self.tracer.close = lambda: None  # else what was kept is gone

    @property
    def spans(self):
        return self.exporter.get_finished_spans()

    def points(self):
        """Name -> the points of each metric."""
        data = self.reader.get_metrics_data()
        scopes = [scope for resource in data.resource_metrics for scope in resource.scope_metrics]
        return {metric.name: list(metric.data.data_points) for scope in scopes for metric in scope.metrics}


@pytest.fixture(scope="module")
def traced(otel):
    """What came of five requests over HTTP."""
    pytest.importorskip("torch", reason="needs the extra 'llm'")
    kept, loaded, model = Kept(otel), [], stock()

    def load(metrics):
        loaded.append(text_service(model, metrics))
        return loaded[0]

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(otel, "exporting", lambda endpoint: kept.tracer)
        with serving(load, observe={"otel_endpoint": "http://127.0.0.1:4318"}) as (url, said, _):
            said.get(timeout=60)
            with httpx.Client(base_url=url, timeout=60) as client:
                parent = {"traceparent": f"00-{TRACE}-{PARENT}-01", "x-request-id": "first"}
                statuses = [
                    client.post("/v1/completions", json=ASK, headers=parent).status_code,
                    client.post("/v1/completions", json={**ASK, "n": 2, "stream": True}).status_code,
                    client.post("/v1/completions", json={**ASK, "max_tokens": -1}).status_code,
                    client.post("/v1/completions", json={**ASK, "slo": {"e2e_ms": 1e-3}}).status_code,
                    client.post("/v1/completions", json=ASK, headers={"traceparent": "junk"}).status_code,
                    client.get("/health").status_code,
                ]
            assert statuses == [200, 200, 400, 400, 200, 200] and settled(loaded[0].service)
    return kept


def requests(kept):
    return [span for span in kept.spans if span.kind.name == "SERVER"]


def stages(kept, request):
    return [span for span in kept.spans if span.parent and span.parent.span_id == request.context.span_id]


def test_a_span_a_request_and_one_a_stage(traced):
    names = {span.attributes["neustream.request.id"]: span for span in requests(traced)}
    assert len(names) == len(requests(traced)) == 5
    (first,) = [span for id, span in names.items() if id.startswith("first-")]
    assert first.name == "text_completion tiny" and first.status.status_code.name == "UNSET"
    wanted = {
        "gen_ai.operation.name": "text_completion",
        "gen_ai.provider.name": "neustream",
        "gen_ai.request.model": "tiny",
        "gen_ai.usage.input_tokens": 9,
        "gen_ai.usage.output_tokens": 6,
        "gen_ai.response.finish_reasons": ("length",),
        "neustream.outcome": "on_time",
        "http.response.status_code": 200,
        "http.route": "/v1/completions",
    }
    assert wanted.items() <= dict(first.attributes).items()
    parts = stages(traced, first)
    assert [span.name for span in parts] == ["queue", "prefill", "decode"]
    ends = [(span.start_time, span.end_time) for span in parts]
    assert ends[0][1] == ends[1][0] and ends[1][1] == ends[2][0]
    assert all(start <= end for start, end in ends)
    slack = 50_000_000  # ns: two clocks
    assert first.start_time - slack <= ends[0][0] and ends[2][1] <= first.end_time + slack
    assert parts[2].attributes["neustream.steps"] == 5


def test_a_trace_goes_on_where_the_client_began_it(traced):
    theirs = [span for span in traced.spans if f"{span.context.trace_id:032x}" == TRACE]
    (request,) = [span for span in theirs if span.kind.name == "SERVER"]
    assert f"{request.parent.span_id:016x}" == PARENT and len(theirs) == 4
    assert all(span.parent is None for span in requests(traced) if span is not request)


def test_choices_share_a_request_and_what_fails_says_why(traced):
    parts = {span.context.span_id: [part.name for part in stages(traced, span)] for span in requests(traced)}
    assert sorted(parts.values()) == [
        [],
        ["queue"],
        *[["queue", "prefill", "decode"]] * 2,
        ["queue", "prefill", "decode"] * 2,
    ]
    wrong = [span.attributes["error.type"] for span in requests(traced) if "error.type" in span.attributes]
    assert sorted(wrong) == ["invalid", "unattainable"]


def test_metrics_of_the_conventions(traced):
    points = traced.points()
    durations = points["gen_ai.server.request.duration"]
    assert sum(point.count for point in durations) == 5
    assert {point.attributes.get("error.type") for point in durations} == {None, "invalid", "unattainable"}
    (first,), (each,) = points["gen_ai.server.time_to_first_token"], points["gen_ai.server.time_per_output_token"]
    assert first.count == each.count == 4 and first.attributes["gen_ai.request.model"] == "tiny"
    assert first.explicit_bounds[0] == 0.001 and 0 < each.sum < first.sum * 100


def test_spans_and_metrics_are_sent_over_otlp(otel):
    got = []

    class Collector(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            got.append((self.path, len(self.rfile.read(int(self.headers["content-length"])))))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Collector) as there:
        thread = threading.Thread(target=there.serve_forever)
        thread.start()
        tracer = tracer_of(f"http://127.0.0.1:{there.server_port}/")
        tracer.noted(otel.Arrived("a", "/v1/completions", {}, 1.0))
        tracer.noted(otel.Answered("a", 200, "", 2.0))
        tracer.close()
        there.shutdown()
        thread.join()
    assert {path for path, size in got if size} == {"/v1/traces", "/v1/metrics"}


def test_without_the_package_only_who_asks_hears_of_it(monkeypatch, tmp_path):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name == "neustream.server.observe" and "tracing" in (args[2] or ()):
            raise ImportError("No module", name="opentelemetry")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    assert tracer_of(None) is None
    with pytest.raises(BackendError, match=r"opentelemetry is not here: pip install 'neustream\[otel\]'"):
        tracer_of("http://127.0.0.1:4318")
    (tmp_path / "x").mkdir()
    path = tmp_path / "server.yaml"
    path.write_text("models: [{name: a, kind: text, path: x}]\nobserve: {otel_endpoint: 'http://127.0.0.1:4318'}\n")
    told = command("serve", path, "--check")
    assert told.status == 2 and "neustream[otel]" in told.err
    path.write_text("models: [{name: a, kind: text, path: x}]\nobserve: {otel_endpoint: 'file:///x'}\n")
    assert "otel_endpoint" in command("serve", path, "--check").err
