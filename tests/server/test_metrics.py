"""What /metrics tells: every name of the table, and counts that add up with the engine's own log."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import random
import re

import pytest

pytest.importorskip("starlette", reason="needs the extra 'serve'")
httpx = pytest.importorskip("httpx", reason="needs the extra 'dev'")

from prometheus_client.parser import text_string_to_metric_families  # noqa: E402
from toys import Flat, engine  # noqa: E402

from neustream import SLO, EventLog, Graph, Priced, Request  # noqa: E402
from neustream.core.events import Emitted, Ended, Submitted  # noqa: E402
from neustream.graphs import llm, llm_profiles  # noqa: E402
from neustream.server.metrics import RENDER_S, Metrics, reason_of  # noqa: E402
from neustream.server.observe.gauges import Gauges  # noqa: E402
from neustream.server.observe.lives import MOST_CANCELLED, Follower, Lives  # noqa: E402
from neustream.server.observe.notes import Asked, Unasked  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

CLASS, MODEL = ("class", "model"), ("model",)
TABLE = {
    "requests": ("counter", ("class", "model", "outcome")),
    "request_success": ("counter", ("finished_reason", "model")),
    "refused": ("counter", ("model", "reason")),
    "dropped": ("counter", ("code", "model")),
    "slo_attained": ("counter", CLASS),
    "slo_missed": ("counter", ("class", "model", "what")),
    "num_requests_running": ("gauge", MODEL),
    "num_requests_waiting": ("gauge", MODEL),
    "time_to_first_token_seconds": ("histogram", CLASS),
    "inter_token_latency_seconds": ("histogram", CLASS),
    "request_time_per_output_token_seconds": ("histogram", CLASS),
    "e2e_request_latency_seconds": ("histogram", CLASS),
    "request_queue_time_seconds": ("histogram", CLASS),
    "request_prefill_time_seconds": ("histogram", CLASS),
    "request_decode_time_seconds": ("histogram", CLASS),
    "request_slack_seconds": ("histogram", CLASS),
    "open_request_slack_min_seconds": ("gauge", ()),
    "open_request_slack_median_seconds": ("gauge", ()),
    "prompt_tokens": ("counter", MODEL),
    "generation_tokens": ("counter", MODEL),
    "request_prompt_tokens": ("histogram", MODEL),
    "request_generation_tokens": ("histogram", MODEL),
    "request_params_n": ("histogram", MODEL),
    "request_params_max_tokens": ("histogram", MODEL),
    "images": ("counter", MODEL),
    "num_inference_steps": ("histogram", MODEL),
    "step_batch_size": ("histogram", ("model", "module")),
    "step_latency_seconds": ("histogram", ("model", "module")),
    "step_profile_ratio": ("histogram", ("model", "module")),
    "num_preemptions": ("counter", MODEL),
    "num_kv_offloads": ("counter", MODEL),
    "kv_cache_usage_perc": ("gauge", MODEL),
    "kv_slots_used": ("gauge", MODEL),
    "policy_faults": ("gauge", ()),
    "http_requests": ("counter", ("code", "route")),
    "http_request_body_bytes": ("histogram", ()),
    "http_connections": ("gauge", ()),
    "http_streams": ("gauge", ()),
    "event_loop_lag_seconds": ("histogram", ()),
    "event_loop_tasks": ("gauge", ()),
    "disconnects": ("counter", ("when",)),
    "streams_cut": ("counter", ("code",)),
    "slow_readers": ("counter", ()),
    "slo_header_invalid": ("counter", ()),
    "unknown_fields": ("counter", ()),
    "load_seconds": ("gauge", ()),
    "warmup_seconds": ("gauge", ()),
    "ready": ("gauge", ()),
    "draining": ("gauge", ()),
    "build_info": ("gauge", ("backend", "policy", "version")),
    "instances": ("gauge", ("state",)),
    "instance_live_requests": ("gauge", ("member",)),
    "instance_backlog_seconds": ("gauge", ("member",)),
    "outlook_age_seconds": ("gauge", ("member",)),
    "move_downtime_seconds": ("histogram", ("reason",)),
    "forecast_error_seconds": ("histogram", ("what",)),
    "instance_routed": ("counter", ("member",)),
    "instance_moved": ("counter", ("member", "way")),
    "instance_restarted": ("counter", ("member",)),
    "instance_lost": ("counter", ("member",)),
    "instances_lost": ("counter", ()),
    "instance_slo_attained": ("counter", ("member",)),
    "instance_slo_missed": ("counter", ("member",)),
}
"""Metrics by name, with their types and labels: what dashboards and alarms stand on."""


class Told:
    """The numbers of a page of metrics, by name; with labels, the sum over those that fit."""

    def __init__(self, page):
        families = text_string_to_metric_families(page if isinstance(page, str) else page.decode())
        self.samples = [sample for family in families for sample in family.samples]

    def __call__(self, name, **labels):
        return sum(
            sample.value
            for sample in self.samples
            if sample.name == f"neustream:{name}" and labels.items() <= sample.labels.items()
        )


def told_by(metrics):
    metrics.fold()
    return Told(metrics.render(Gauges("ready")))


# -- the table ------------------------------------------------------------------------------------------


def test_every_metric_has_its_type_and_labels():
    found = {}
    for metric in Metrics().table.registry._collector_to_names:
        name = metric._name.removeprefix("neustream:")
        found[name] = (metric._type, tuple(sorted(metric._labelnames)))
        assert metric._documentation
    assert found == TABLE


def test_the_operators_guide_names_every_metric(root):
    section = (root / "neustream/server/README.md").read_text().partition("\n## Metrics\n")[2].partition("\n## ")[0]
    cells = re.findall(r"^\| (`[^|]*) \|", section, re.MULTILINE)
    assert sorted(re.findall(r"`([a-z0-9_]+)`", " ".join(cells))) == sorted(TABLE)


def test_no_name_has_that_of_another_server():
    assert b"vllm" not in Metrics().render(Gauges("ready"))


# -- counts that add up ---------------------------------------------------------------------------------


def replayed(observers, count=60):
    """Texts of all kinds in virtual time: early and late ones, promised and not, hopeless ones."""
    graph = Graph("llm", llm("llm", max_batch=4))
    rng = random.Random(7)
    slos = [SLO(), SLO(total=0.03, name="chat"), SLO(first=0.01, step=0.0012, name="chat"), SLO(total=1e-4)]
    requests = [
        Request(
            f"r{number}",
            graph,
            number * 0.004,
            slos[number % len(slos)],
            {"prompt_tokens": rng.randint(1, 40), "max_tokens": rng.randint(1, 12)},
        )
        for number in range(count)
    ]
    made = engine(graph, llm_profiles("llm", Flat(), 4), Priced(), observers=observers)
    return made.run(requests)


def test_counts_add_up_with_the_event_log():
    metrics, log = Metrics(["tiny"]), EventLog()
    report = replayed([log, metrics])
    told = told_by(metrics)
    for outcome in ("on_time", "late", "dropped", "failed", "cancelled"):
        assert told("requests_total", model="tiny", outcome=outcome) == report.counts[outcome], outcome
    assert report.counts["on_time"] and report.counts["dropped"], "or this test tests little"
    assert told("dropped_total") == report.counts["dropped"]
    outputs = [request.get("outputs", []) for request in log.requests.values()]
    begun = [each for each in outputs if each]
    assert told("generation_tokens_total", model="tiny") == sum(map(len, outputs))
    assert told("request_generation_tokens_sum") == sum(map(len, outputs))
    assert told("time_to_first_token_seconds_count") == len(begun)
    firsts = [request["outputs"][0] - request["arrival"] for request in log.requests.values() if "outputs" in request]
    assert told("time_to_first_token_seconds_sum") == pytest.approx(sum(firsts))
    assert told("inter_token_latency_seconds_count") == sum(len(each) - 1 for each in begun)
    gaps = sum(each[-1] - each[0] for each in begun)
    assert told("inter_token_latency_seconds_sum") == pytest.approx(gaps)
    assert told("request_decode_time_seconds_sum") == pytest.approx(gaps)
    assert told("request_time_per_output_token_seconds_count") == sum(len(each) > 1 for each in begun)
    done = [request for request in log.requests.values() if request["status"] == "done"]
    assert told("e2e_request_latency_seconds_count") == len(done)
    assert told("e2e_request_latency_seconds_sum") == pytest.approx(sum(r["end"] - r["arrival"] for r in done))
    assert told("request_success_total", finished_reason="length") == len(done)
    assert told("step_batch_size_count") == len(log.steps)
    assert told("step_batch_size_sum") == sum(len(step["jobs"]) for step in log.steps)
    assert told("step_latency_seconds_sum") == pytest.approx(sum(s["end"] - s["start"] for s in log.steps))
    assert told("num_requests_running") == told("num_requests_waiting") == 0 == len(metrics.lives.open)


def test_each_promise_is_kept_or_missed_once():
    metrics, log = Metrics(["tiny"]), EventLog()
    replayed([log, metrics])
    told = told_by(metrics)
    promised = sum(
        request["due"] is not None or number % 4 == 2 for number, request in enumerate(log.requests.values())
    )
    assert told("slo_attained_total") + told("slo_missed_total") == promised
    unpromised = told("requests_total", outcome="on_time") - told("slo_attained_total")
    assert unpromised == sum(number % 4 == 0 for number in range(60))
    assert told("slo_missed_total", what="dropped") == told("requests_total", outcome="dropped")
    assert {sample.labels["class"] for sample in told.samples if "slo_missed_total" in sample.name} <= {"", "chat"}


class Ends(Follower):
    """Keeps the lives that ended."""

    def __init__(self):
        self.lives = []

    def ended(self, life):
        self.lives.append(life)


def test_a_queue_a_prefill_and_a_decode_make_a_request():
    metrics = Metrics(["tiny"])
    replayed([metrics])
    told = told_by(metrics)
    parts = ("request_queue_time_seconds", "request_prefill_time_seconds", "request_decode_time_seconds")
    ends = Ends()
    replayed([Lives(["tiny"], [ends])])
    whole = sum(life.latest - life.arrival for life in ends.lives if life.first is not None)
    waited = sum(life.began - life.arrival for life in ends.lives if life.first is None and life.began is not None)
    assert sum(told(f"{part}_sum") for part in parts) == pytest.approx(whole + waited)


def test_an_observer_only_appends():
    metrics = Metrics(["tiny"])
    replayed([metrics], 4)
    count = len(metrics._feed)
    assert count and not metrics.lives.open
    metrics.fold(3)
    assert len(metrics._feed) == count - 3 and metrics.lives.open
    metrics.fold()
    assert not metrics._feed and not metrics.lives.open


def test_what_the_engine_would_not_have_leaves_nothing():
    metrics = Metrics(["tiny"])
    metrics.tell(Asked("a", "tiny", "text", SLO(), 5, 5))
    metrics.tell(Unasked("a"))
    assert told_by(metrics)("requests_total") == 0 and not metrics.lives._asked


def test_what_was_given_up_before_the_engine_had_it_is_counted():
    metrics = Metrics(["sd"])
    metrics.tell(Asked("a", "sd", "image", SLO(total=1.0, name="batch")))
    metrics.tell(Unasked("a", "dropped", "crowded"))
    told = told_by(metrics)
    assert told("requests_total", outcome="dropped", **{"class": "batch"}) == told("dropped_total", code="crowded") == 1
    assert told("slo_missed_total", what="dropped") == 1 == told("requests_total")
    assert not metrics.lives._asked and not metrics.lives.open


def test_an_engine_that_tells_of_no_steps_is_counted_by_its_outputs():
    metrics = Metrics(["own", "chat"])
    metrics.tell(Asked("a", "own", "text", SLO(), 7, 5))
    metrics(Submitted("a", "own", 1.0, 9.0, SLO(), 5, 1.0))
    metrics(Emitted("a", 0, {"token": 3, "finish_reason": None}, 1.5, 0.5))
    told = told_by(metrics)
    assert told("num_requests_running", model="own") == 1 and told("num_requests_waiting") == 0
    metrics(Emitted("a", 1, {"token": 4, "finish_reason": "stop"}, 1.75, 0.75))
    metrics(Ended("a", "done", "", {}, True, 1.0, 1.75, SLO(), 2))
    metrics._rendered_at = None
    told = told_by(metrics)
    assert told("request_success_total", model="own", finished_reason="stop") == 1
    assert told("time_to_first_token_seconds_sum") == 0.5 and told("inter_token_latency_seconds_sum") == 0.25
    assert told("prompt_tokens_total") == 7 and told("request_queue_time_seconds_count") == 0


def test_who_cancels_before_the_engine_has_heard_of_it_is_counted_once():
    log, metrics = [], Metrics(["sd", "chat"])
    replayed([log.append], 1)
    ended = dataclasses.replace(log[-1], status="cancelled", on_time=False)
    metrics.tell(Asked("r0", "chat", "text", SLO(), 5, 5))
    metrics.tell(Unasked("r0", "cancelled"))
    for record in (log[0], ended):
        metrics(record)
    told = told_by(metrics)
    assert told("requests_total", model="chat", outcome="cancelled") == 1 == told("requests_total")
    for number in range(MOST_CANCELLED + 5):
        metrics.tell(Asked(f"x{number}", "sd", "image", SLO()))
        metrics.tell(Unasked(f"x{number}", "cancelled"))
    metrics.fold()
    assert len(metrics.lives._cancelled) == MOST_CANCELLED and not metrics.lives._asked


@pytest.mark.parametrize(
    ("models", "stage", "expected"),
    [
        (["a"], "llm.prefill", ("a", "prefill")),
        (["a"], "llm", ("a", "prefill+decode")),
        (["a"], "denoise@64x64", ("a", "denoise")),
        (["opt", "opt-1.3b"], "opt-1.3b.decode", ("opt-1.3b", "decode")),
        (["opt", "opt-1.3b"], "opt-1.3b", ("opt-1.3b", "prefill+decode")),
        (["sd", "chat"], "sd/decode@64x96", ("sd", "decode")),
        (["sd", "chat"], "mine", ("", "mine")),
    ],
)
def test_stages_belong_to_models_and_modules(models, stage, expected):
    assert Lives(models).module_of(stage) == expected


# -- the page -------------------------------------------------------------------------------------------


class Hands:
    """A clock that is set by hand."""

    def __init__(self, step=0.0):
        self.at, self.step = 0.0, step

    def now(self):
        self.at += self.step
        return self.at


def test_it_is_rendered_at_most_four_times_a_second():
    clock = Hands()
    metrics = Metrics(["tiny"], clock)
    first = metrics.render(Gauges("loading"))
    metrics.unknown(3)
    assert metrics.render(Gauges("ready")) is first
    clock.at = RENDER_S
    later = Told(metrics.render(Gauges("ready")))
    assert later("unknown_fields_total") == 3 and later("ready") == 1 and Told(first)("ready") == 0


def test_the_lag_of_the_event_loop_is_seen():
    metrics = Metrics(["tiny"], Hands(step=0.15))

    async def main():
        pulse = asyncio.ensure_future(metrics.pulse())
        while not Told(metrics.render(Gauges("ready")))("event_loop_lag_seconds_count"):
            await asyncio.sleep(0.01)
        pulse.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await pulse

    asyncio.run(main())
    assert Told(metrics.render(Gauges("ready")))("event_loop_lag_seconds_sum") >= 0.1


@pytest.mark.parametrize(
    ("status", "code", "reason"),
    [
        (200, "", None),
        (400, "invalid", "invalid"),
        (400, "unattainable", None),
        (404, "model_not_found", "invalid"),
        (413, "too_large", "invalid"),
        (401, "key", "auth"),
        (403, "host", "auth"),
        (429, "crowded", None),
        (429, "too_many", "limit"),
        (429, "queue_full", "queue_full"),
        (429, "wait", "wait"),
        (503, "loading", "loading"),
        (503, "draining", "draining"),
        (503, "closed", "draining"),
        (503, "failed", "failed"),
        (503, "cancelled", None),
        (504, "late", None),
        (500, "failed", None),
        (499, "", None),
    ],
)
def test_only_what_never_got_to_the_engine_was_refused(status, code, reason):
    assert reason_of(status, code) == reason
