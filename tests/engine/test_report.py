"""Reports: counts that add up, denominators that keep everything, and memory that does not grow."""

from __future__ import annotations

import json
import math
import tracemalloc

import numpy as np
import pytest
from toys import OUTCOMES, adds_up, draw_and_decode, engine, one_stage, request, table

import neustream.engine.tally
from neustream import FCFS, SLO, Graph, Job, Report, Request, Stage, Static, seq
from neustream.core.batch import StepInfo
from neustream.core.events import ended, submitted
from neustream.engine.events import Decided, Finished
from neustream.engine.tally import Distribution, Shares

GRAPH = one_stage(max_batch=4)
PROMISE = SLO(1.0)


def tell(report, arrival, end, status="done", late=False, slo=PROMISE, reason=""):
    """A request's whole life, as a report sees it; `end` None leaves it open."""
    job = Job(Request(f"r{report.submitted}", GRAPH, arrival, slo))
    report(submitted(job, arrival))
    if end is not None:
        job.status, job.late, job.reason = status, late, reason
        report(ended(job, end))


def strict(content):
    """Through JSON and back; infinity and NaN are errors."""
    return json.loads(json.dumps(content, allow_nan=False))


def test_every_outcome_has_its_count():
    report = Report()
    tell(report, 0.0, 1.0)
    tell(report, 0.0, 2.0, late=True)
    tell(report, 0.0, 0.0, "dropped")
    tell(report, 0.0, 0.5, "failed", reason="broken")
    tell(report, 0.0, 0.7, "cancelled")
    assert report.to_dict()["counts"] == {"submitted": 5, **dict.fromkeys(OUTCOMES, 1)}


def test_attainment_keeps_every_request_in_the_denominator():
    report = Report()
    tell(report, 1.0, 2.0)
    for status in ("dropped", "failed", "cancelled"):
        tell(report, 1.0, 1.0, status)
    assert report.attainment == 0.25
    tell(report, 1.0, None)  # still open: submitted, and not on time
    assert report.attainment == 0.2


def test_goodput_is_over_the_span_of_the_arrivals():
    report = Report(start=10.0)
    for arrival in (11.0, 12.0, 14.0):
        tell(report, arrival, arrival + 30.0)
    tell(report, 14.0, 99.0, late=True)
    assert report.goodput == 3 / 4.0
    assert report.duration == 89.0


def test_goodput_is_over_the_run_where_all_came_at_the_start():
    report = Report()
    tell(report, 0.0, 4.0)
    tell(report, 0.0, 5.0)
    assert report.goodput == 2 / 5.0


def test_a_run_of_no_time_has_no_goodput():
    report = Report()
    tell(report, 0.0, 0.0)
    assert report.goodput == 0.0
    assert report.attainment == 1.0
    assert strict(report.to_dict())["goodput_rps"] == 0.0


def test_latencies_are_those_of_the_served():
    report = Report()
    for at in range(101):
        tell(report, 0.5, 0.5 + at, late=at > 50)
    tell(report, 0.0, 1e6, "dropped")
    tell(report, 0.0, 1e6, "failed")
    latency = report.to_dict()["latency_s"]
    assert latency == {"mean": pytest.approx(50.0), "p50": 50.0, "p90": 90.0, "p99": 99.0}


def test_an_empty_report_is_json():
    out = strict(Report().to_dict())
    assert out["counts"] == {"submitted": 0, **dict.fromkeys(OUTCOMES, 0)}
    assert out["latency_s"] == {"mean": None, "p50": None, "p90": None, "p99": None}
    assert out["decision_us"] == {"p50": None, "p99": None}
    assert out["batch_size"] == out["profile_error"] == {}
    assert out["by_steps"] == []
    assert out["goodput_rps"] == out["attainment"] == out["duration_s"] == 0.0


def test_a_report_without_promises_is_json():
    report = engine(GRAPH, {"s": table("s", 1.0)}).run([Request("a", GRAPH)])
    assert strict(report.to_dict())["counts"]["on_time"] == 1


def test_the_keys_of_a_report():
    report = Report()
    tell(report, 0.0, 1.0)
    assert list(report.to_dict()) == [
        "duration_s",
        "counts",
        "goodput_rps",
        "attainment",
        "latency_s",
        "batch_size",
        "decisions",
        "decision_us",
        "busy_s",
        "profile_error",
        "by_steps",
    ]


def test_classes_are_counted_apart():
    report = Report()
    gold, plain = SLO(1.0, weight=10.0, name="gold"), SLO(5.0, name="plain")
    tell(report, 0.0, 0.5, slo=gold)
    tell(report, 0.0, 2.0, slo=gold, late=True)
    tell(report, 0.0, 2.0, slo=plain)
    tell(report, 0.0, 0.0, "dropped", slo=plain)
    tell(report, 0.0, 2.0, slo=plain)
    assert strict(report.to_dict())["classes"] == {
        "gold": {"submitted": 2, "on_time": 1, "weight": 20.0, "weight_on_time": 10.0},
        "plain": {"submitted": 3, "on_time": 2, "weight": 3.0, "weight_on_time": 2.0},
    }


def test_classes_are_left_out_where_there_are_none():
    report = Report()
    tell(report, 0.0, 1.0)
    assert "classes" not in report.to_dict()


def asked(*steps, weight=1.0):
    """A report of requests of so many steps; those of an even number were on time."""
    report = Report()
    for at, count in enumerate(steps):
        job = Job(Request(f"r{at}", draw_and_decode(), 0.0, SLO(1.0, weight=weight)))
        job.planned_calls = {"draw": count, "decode": 1}
        report(submitted(job, 0.0))
        job.status = "dropped" if count % 2 else "done"
        report(ended(job, 1.0))
    return report


def spread(report):
    return [(r["from"], r["to"], r["submitted"], r["on_time"]) for r in strict(report.to_dict())["by_steps"]]


def test_shares_on_time_are_by_the_steps_asked_for():
    report = asked(*range(200, 250), weight=2.0)
    first = {"from": 200, "to": 209, "submitted": 10, "on_time": 5, "weight": 20.0, "weight_on_time": 10.0}
    assert strict(report.to_dict())["by_steps"][0] == first
    assert spread(report) == [(start, start + 9, 10, 5) for start in (200, 210, 220, 230, 240)]


def test_ranges_of_steps_fit_the_data():
    assert spread(asked(7, 7, 7)) == [(7, 7, 3, 0)]
    assert spread(asked(4, 5, 6)) == [(4, 4, 1, 1), (5, 5, 1, 0), (6, 6, 1, 1)]
    assert spread(asked(10, 50, 10, 49)) == [(10, 18, 2, 2), (46, 54, 2, 1)]  # nobody asked for 19 to 45
    assert spread(asked(0, 6)) == [(0, 1, 1, 1), (6, 7, 1, 1)]
    assert sum(submitted for _, _, submitted, _ in spread(asked(*range(1, 1000, 7)))) == 143


def test_steps_are_those_of_the_loops_or_of_all_stages_where_none_is_looped():
    graph = draw_and_decode()
    profiles = {"draw": table("draw", 0.1, 0.1), "decode": table("decode", 0.1)}
    report = engine(graph, profiles).run([request(f"r{at}", graph, steps=5) for at in range(3)])
    assert spread(report) == [(5, 5, 3, 3)]
    stages = [Stage(name, emits=True) for name in "ab"]
    plain = Graph("plain", seq(*stages))
    report = engine(plain, {name: table(name, 0.1) for name in "ab"}).run([request("r", plain)])
    assert spread(report) == [(2, 2, 1, 1)]


def test_refused_requests_are_in_no_range_of_steps():
    report = engine(GRAPH, {"s": table("s", 1.0)}).run([request("a", GRAPH), request("a", GRAPH)])
    assert report.submitted == 2
    assert spread(report) == [(1, 1, 1, 1)]


def test_many_numbers_of_steps_are_counted_in_bounded_memory(monkeypatch):
    monkeypatch.setattr(neustream.engine.tally, "BINS", 8)
    shares = Shares()
    for steps in [3, 1000, *range(100)]:
        shares.of(steps).submitted += 1
        assert len(shares._bins) <= 8
    for steps in range(100):
        shares.of(steps).on_time += 1  # counted where they were submitted
    ranges = shares.ranges()
    assert sum(r["submitted"] for r in ranges) == 102
    assert sum(r["on_time"] for r in ranges) == 100
    assert len(ranges) <= 5
    assert len({r["to"] - r["from"] for r in ranges}) == 1
    assert ranges[0]["from"] == 0
    assert ranges[0]["on_time"] == 100
    assert ranges[-1]["from"] <= 1000 <= ranges[-1]["to"]


def test_batch_sizes_and_the_error_of_profiles_are_by_stage():
    report = Report()
    for stage, size, expected, observed in [("s", 1, 1.0, 1.5), ("s", 3, 2.0, 1.5), ("t", 2, 0.1, 0.3)]:
        ids = tuple(f"r{at}" for at in range(size))
        step = StepInfo(1, "gpu", 0, stage, ids, (0.0,) * size, 5.0, expected_s=observed, profiled_s=expected)
        report(Finished(step, 5.0 + observed, ""))
    out = strict(report.to_dict())
    assert out["batch_size"] == {"s": 2.0, "t": 2.0}
    assert out["profile_error"] == {"s": pytest.approx(1.0), "t": pytest.approx(3.0)}


def test_decisions_are_counted_in_microseconds():
    report = Report()
    for micro in range(1, 102):
        report(Decided("gpu", 0.0, micro * 1e-6))
    out = strict(report.to_dict())
    assert out["decisions"] == 101
    assert out["decision_us"] == {"p50": pytest.approx(51.0), "p99": pytest.approx(100.0)}


def test_reasons_of_failures_are_counted_and_their_kinds_bounded():
    report = Report()
    for at in range(50):
        tell(report, 0.0, 1.0, "failed", reason=f"fault {at}")
    tell(report, 0.0, 1.0, "failed", reason="fault 3")
    tell(report, 0.0, 1.0, "dropped", reason="hopeless")
    failures = strict(report.to_dict())["failures"]
    assert failures["fault 3"] == 2
    assert len(failures) == 20
    assert report.counts["failed"] == 51


def test_interrupted_is_told_only_if_it_was():
    report = Report()
    assert "interrupted" not in report.to_dict()
    report.interrupted = True
    assert report.to_dict()["interrupted"] is True


@pytest.mark.parametrize("policy", [FCFS(), FCFS(drop_hopeless=False), Static()], ids=["drops", "keeps", "static"])
@pytest.mark.parametrize("rate", [1.0, 6.0, 30.0])
def test_the_counts_of_a_run_add_up(policy, rate):
    graph = draw_and_decode(max_batch=2)
    profiles = {"draw": table("draw", 0.10, 0.15), "decode": table("decode", 0.05)}
    work = [request(f"r{at}", graph, at / rate, steps=at % 4, total=0.2 + 0.3 * (at % 3)) for at in range(60)]
    report = engine(graph, profiles, policy).run(work)
    out = strict(report.to_dict())
    assert out["counts"]["submitted"] == 60
    assert adds_up(out["counts"])
    assert out["attainment"] == out["counts"]["on_time"] / 60
    assert out["goodput_rps"] == pytest.approx(out["counts"]["on_time"] / (59 / rate))
    assert all(error == pytest.approx(1.0) for error in out["profile_error"].values())


# -- distributions --------------------------------------------------------------------------------------


def test_quantiles_are_exact_while_all_values_are_kept():
    distribution = Distribution()
    values = np.random.default_rng(0).normal(size=1000)
    for value in values:
        distribution.add(value)
    assert distribution.count == 1000
    assert distribution.mean == pytest.approx(values.mean())
    assert [distribution.percentile(q) for q in (1, 50, 99)] == pytest.approx(np.percentile(values, (1, 50, 99)))


def test_an_empty_distribution_has_neither_mean_nor_quantiles():
    distribution = Distribution()
    assert distribution.mean is None
    assert distribution.percentile(50) is None


def test_a_long_distribution_keeps_its_exact_mean_and_a_fair_sample(monkeypatch):
    monkeypatch.setattr(neustream.engine.tally, "KEEP", 1000)
    distribution = Distribution()
    for value in range(30_000):
        distribution.add(float(value))
    assert distribution.count == 30_000
    assert distribution.mean == 14999.5
    for q in (10, 50, 90):  # of 1000 values drawn from 30,000: within a few percent
        assert math.isclose(distribution.percentile(q), 300 * q, abs_tol=1500)


def test_a_long_distribution_is_the_same_each_time(monkeypatch):
    monkeypatch.setattr(neustream.engine.tally, "KEEP", 50)
    first, second = Distribution(), Distribution()
    for value in range(1000):
        first.add(value)
        second.add(value)
    assert first.percentile(50) == second.percentile(50)


def test_a_long_distribution_takes_bounded_memory(monkeypatch):
    monkeypatch.setattr(neustream.engine.tally, "KEEP", 200)

    def peak(count):
        tracemalloc.start()
        distribution = Distribution()
        for value in range(count):
            distribution.add(value + 0.5)
        size = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return size

    peak(10)
    assert peak(20_000) < peak(1_000) + 4_000
