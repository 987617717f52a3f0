"""Summaries of runs, and runs side by side."""

from __future__ import annotations

import json
import math

import pytest
from toys import command

from neustream.bench import Record, Run, write_runs
from neustream.bench.shares import Share
from neustream.bench.summary import client_warnings, ours, scale_at, summary, valid
from neustream.workload.asks import Limits


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def record(at, ttft=0.1, tokens=3, gap=0.05, outcome="done", lag=0.0, **more):
    times = [at + ttft + gap * k for k in range(tokens)] if outcome == "done" else []
    end = times[-1] if times else at + 1.0
    given = {"limits": Limits(ttft_s=0.2, tpot_s=0.06), "input_tokens": 10, "output_tokens": len(times) or None, **more}
    return Record(str(at), outcome=outcome, scheduled_s=at, sent_s=at + lag, token_times_s=times, end_s=end, **given)


def run(*records, name="", rate=None, seconds=None):
    duration = seconds or max(each.end_s for each in records)
    return Run(name, list(records), {"rate": rate}, {"api": "completions"}, 1e9, duration)


@pytest.mark.parametrize("share", [Share(0, 10), Share(10, 10), Share(9, 10), Share(450, 500)])
def test_an_interval_ends_where_the_share_is_as_far_off_as_chance_makes_it(share):
    """Wilson's: at an end p, the share is 1.96 of the deviations that samples of p have away."""
    for end in share.interval:
        if 1e-9 < end < 1 - 1e-9:
            assert abs(share.value - end) == pytest.approx(1.959964 * math.sqrt(end * (1 - end) / share.of))
    low, high = share.interval
    assert low - 1e-9 <= share.value <= high + 1e-9
    assert any(0 < end < 1 for end in share.interval)


def test_of_nothing_nothing_is_known():
    assert Share(0, 0).interval == (0.0, 1.0) and Share(0, 0).value is None and str(Share(0, 0)) == "-"


def test_all_that_was_offered_is_in_the_denominator():
    late = record(1.0, ttft=0.3)
    failed = record(2.0, outcome="cut")
    refused = record(3.0, outcome="status", status=429)
    told = summary(run(record(0.0), late, failed, refused, seconds=4.0))
    assert (told["offered"], told["completed"], told["failed"]) == (4, 2, 2)
    assert told["slo_attainment"]["value"] == 0.25 and told["goodput_all"] == 0.25
    assert told["failures"] == {"cut": 1, "status_429": 1}
    assert told["each"]["ttft"]["value"] == 0.25 and told["each"]["tpot"]["value"] == 0.5


def test_latencies_have_vllms_names_and_meaning():
    told = summary(run(record(0.0), record(1.0, ttft=0.3), seconds=2.0), detailed=True)
    assert told["mean_ttft_ms"] == pytest.approx(200) and told["median_tpot_ms"] == pytest.approx(50)
    assert told["p99_itl_ms"] == pytest.approx(50) and told["p50_e2el_ms"] == pytest.approx(300)
    assert (told["total_input_tokens"], told["total_output_tokens"], told["output_throughput"]) == (20, 6, 3.0)
    assert told["ttfts"] == pytest.approx([0.1, 0.3]) and told["output_lens"] == [3, 3]
    ranks = ["p0.1", "p1", "p5", "p10", "p25", "p50", "p75", "p90", "p95", "p99", "p99.9"]
    assert {f"{rank}_{kind}_ms" for rank in ranks for kind in ("ttft", "tpot", "itl", "e2el")} <= told.keys()
    json.dumps(told, allow_nan=False)


def test_nothing_done_is_no_latency_and_still_json():
    told = summary(run(record(0.0, outcome="connect")))
    assert told["mean_ttft_ms"] is None and told["slo_attainment"]["value"] == 0.0 and told["slo_scale_at_90"] is None
    json.dumps(told, allow_nan=False)
    assert summary(Run("", []))["offered"] == 0


def test_classes_are_told_apart():
    told = ours(run(record(0.0, slo_class="chat"), record(1.0, ttft=0.9, slo_class="batch")))
    assert told["classes"]["chat"]["slo_attainment"]["value"] == 1.0
    assert told["classes"]["batch"]["slo_attainment"]["value"] == 0.0


def test_the_scale_at_which_enough_would_be_met():
    records = [record(float(k), ttft=0.02 * (k + 1), limits=Limits(ttft_s=0.1)) for k in range(10)]
    assert scale_at(records, 0.9) == pytest.approx(1.8)
    met = sum(each.met(scale=scale_at(records, 0.9) + 1e-9) for each in records)
    assert met == 9
    assert scale_at([*records, record(11.0, outcome="cut"), record(12.0, outcome="cut")], 0.9) is None


@pytest.mark.parametrize(
    ("lag", "says", "good"), [(0.0, None, True), (0.03, "p99 30.0 ms", True), (0.06, "not valid", False)]
)
def test_a_client_that_is_late_says_so(lag, says, good):
    found = run(*[record(float(k), ttft=1.0, lag=lag) for k in range(20)])
    (said,) = client_warnings(found) or [""]
    assert (says or "") in said and valid(found) == good and bool(said) == bool(says)


def test_lag_is_compared_with_the_ttft():
    (said,) = client_warnings(run(*[record(float(k), ttft=0.02, lag=0.004) for k in range(20)]))
    assert "5 % of the median TTFT" in said


@pytest.mark.parametrize(("fast", "slow"), [("fast", "slow"), ("_fast", "$\\slow$")])  # the last is no formula
def test_compare_sets_loads_side_by_side_and_draws(tmp_path, fast, slow):
    for name, slower in ((fast, 1.0), (slow, 2.5)):
        runs = [
            run(*[record(k / rate, 0.1 * slower) for k in range(8)], name=f"rate {rate:g}", rate=rate)
            for rate in (2.0, 4.0)
        ]
        write_runs(tmp_path / name, runs, write)
    done = command("bench", "compare", tmp_path / fast, tmp_path / slow, "--json", "-", "--out", tmp_path / "png")
    assert done.status == 0, done.err
    told = json.loads(done.out)
    assert [one["slo_attainment"]["value"] for one in told[fast] + told[slow]] == [1.0, 1.0, 0.0, 0.0]
    assert f"{fast} rate 2" in done.err and "100.0 % (67.6 to 100.0)" in done.err
    assert {path.name for path in (tmp_path / "png").iterdir()} == {
        "cdfs.png",
        "rates.png",
        "scales.png",
        "throughput.png",
    }


def test_loads_of_one_rate_are_lines_of_their_own_and_one_point():
    pytest.importorskip("matplotlib", reason="needs the extra 'analysis'")
    from neustream.bench import figures

    same = [run(record(0.0), record(1.0, ttft=slow), name="rate 2", rate=2.0) for slow in (0.1, 0.9)]
    assert list(figures._labelled({"a": same})) == ["a, rate 2", "a, rate 2 (2)"]
    (together,) = figures._by_rate(same).values()
    assert str(figures._together(together, "scheduled")).startswith("75.0 %")


def test_compare_names_what_is_no_result(tmp_path):
    done = command("bench", "compare", tmp_path)
    assert done.status == 2 and "runs.json" in done.err
    write_runs(tmp_path / "a", [run(record(0.0))], write)
    done = command("bench", "compare", tmp_path / "a", tmp_path / "a")
    assert done.status == 2 and "the same folder twice" in done.err
