"""Reports as files, and runs in the formats of other tools."""

from __future__ import annotations

import copy
import itertools
import json
import math

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as some
from reported import START, a_run, one, read_report

from neustream.bench.reports.building import About
from neustream.bench.reports.checking import problems, read_content
from neustream.bench.reports.converting import FORMATS, converted, read_results
from neustream.bench.reports.figures import statistics
from neustream.bench.reports.folder import METADATA, report_file, write_reports
from neustream.bench.reports.lifecycle import per_request, stage_summary, summarized, summary
from neustream.errors import ConfigError

# -- files ---------------------------------------------------------------------------------------------


def keep(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_the_files_of_an_experiment(tmp_path):
    paths = write_reports(tmp_path, [a_run(), a_run()], About(), keep, harness_rc=0)
    assert [path.name for path in paths[:2]] == [
        "benchmark_report_v0.2,_stage_0_lifecycle_metrics.json.yaml",
        "benchmark_report_v0.2,_stage_1_lifecycle_metrics.json.yaml",
    ]
    assert all(path.is_file() for path in paths)
    metadata = yaml.safe_load((tmp_path / METADATA).read_text())
    assert (metadata["model"], metadata["harness_delta"], metadata["harness_rc"]) == ("m", "PT4.000S", 0)
    assert read_report(tmp_path / report_file(1)).scenario.load.standardized.stage == 1


def test_requests_in_the_names_of_inference_perf():
    found = per_request([a_run(), a_run()])
    assert len(found) == 8 and [each["stage"] for each in found] == [0] * 4 + [1] * 4
    first = found[0]
    assert (first["scheduled_time"], first["start_time"], first["end_time"]) == (START, START + 0.01, START + 0.2)
    assert first["info"] == {
        "input_tokens": 10,
        "output_tokens": 4,
        "output_token_times": pytest.approx([START + 0.1 + 0.02 * k for k in range(4)]),
    }
    assert (first["error"], first["met"], found[1]["met"]) == (None, True, False)
    assert found[2]["error"] == {"error_type": "status", "error_msg": "queue full"}


def test_a_stage_in_the_names_of_inference_perf():
    found = stage_summary(a_run())
    assert found["benchmark_time_seconds"] == 4.0
    assert (found["successes"]["count"], found["failures"]["count"]) == (2, 2)
    assert found["load_summary"]["requested_rate"] == 2.0 and found["load_summary"]["concurrency"] == 8
    assert found["load_summary"]["schedule_delay"]["median"] == pytest.approx(0.01)
    assert found["successes"]["throughput"]["output_tokens_per_sec"] == 1.5
    assert found["successes"]["latency"]["time_to_first_token"]["mean"] == pytest.approx(0.3)
    assert found["failures"]["by_label"]["status"] == {"count": 1, "messages": ["queue full"]}
    assert summary([a_run(), a_run(started=START + 6)])["benchmark_time_seconds"] == 10.0


@settings(derandomize=True, deadline=None)
@given(some.lists(some.floats(0, 1e6), min_size=1, max_size=30))
def test_statistics_are_ordered(values):
    found = statistics(values, "s")
    ranks = ("min", "p0p1", "p1", "p5", "p10", "p25", "p50", "p75", "p90", "p95", "p99", "p99p9", "max")
    told = [getattr(found, rank) for rank in ranks]
    assert all(a <= b or a == pytest.approx(b) for a, b in itertools.pairwise(told))
    assert summarized(values)["median"] == found.p50
    assert statistics([None, math.nan, math.inf], "s") is None is summarized([None])


# -- conversions ---------------------------------------------------------------------------------------


def files(found, to, folder, since="scheduled"):
    """Results converted, as files of a folder of its own; the first of them."""
    folder.mkdir(exist_ok=True)
    texts = converted(found, to, About(since=since))
    for name, text in texts.items():
        (folder / name).write_text(text)
    return folder if to == "runs" else folder / next(iter(texts))


@pytest.fixture
def runs(tmp_path):
    files(type("Found", (), {"report": None, "runs": [a_run()]})(), "runs", tmp_path / "runs")
    return tmp_path / "runs"


@pytest.mark.parametrize("to", FORMATS)
def test_runs_become_anything_and_what_has_requests_comes_back(tmp_path, runs, to):
    path = files(read_results(runs), to, tmp_path / to, since="sent")
    back = read_results(path)
    if to == "report":
        assert back.report is not None
        return
    (run,) = back.runs
    good, origin = [each for each in run.records if each.done], a_run()
    assert [len(each.token_times_s) for each in good] == [4, 2]
    assert [each.input_tokens for each in good] == [10, 10] and [each.output_tokens for each in good] == [4, 2]
    for ours, before in zip(good, origin.records, strict=False):
        assert ours.ttft_s("sent") == pytest.approx(before.ttft_s("sent"), abs=1e-5)
        assert ours.tpot_s == pytest.approx(before.tpot_s, abs=1e-5)
        assert ours.itls_s == pytest.approx(before.itls_s, abs=1e-5)


@pytest.mark.parametrize("way", [["vllm"], ["lifecycle"], ["report"], ["report", "vllm"], ["report", "lifecycle"]])
def test_what_was_made_of_requests_stays_the_same_on_the_way_to_a_report(tmp_path, runs, way):
    expected = one(since="sent")["results"]["request_performance"]["aggregate"]
    path = runs
    for number, to in enumerate(way):
        path = files(read_results(path), to, tmp_path / f"{number}{to}", since="sent")
    content = read_content(files(read_results(path), "report", tmp_path / "last", since="sent"))
    assert problems(content) == []
    found = content["results"]["request_performance"]["aggregate"]
    for key in ("time_to_first_token", "time_per_output_token", "inter_token_latency"):
        for figure in ("mean", "p50", "p99"):
            assert found["latency"][key][figure] == pytest.approx(expected["latency"][key][figure], abs=1e-5), key
    assert found["throughput"]["output_token_rate"]["mean"] == pytest.approx(1.5)
    assert found["requests"]["total"] == 4


def test_a_result_of_vllm_with_details_is_exact(tmp_path):
    lists = {"start_times": [100.0, 101.0, 102.0], "ttfts": [0.25, 0.5, 0.0], "itls": [[0.125, 0.125], [0.25], []]}
    lists |= {"input_lens": [5, 6, 7], "output_lens": [3, 2, 0], "errors": ["", "", ""], "latencies": [1.0, 2.0, 0.0]}
    told = {"duration": 8.0, "completed": 2, "request_throughput": 0.25, "request_rate": 2.0, "date": "20260102-030405"}
    (tmp_path / "v.json").write_text(json.dumps(told | lists))
    (run,) = read_results(tmp_path / "v.json").runs
    assert [each.outcome for each in run.records] == ["done", "done", "failed"]
    assert [each.e2e_s("sent") for each in run.records[:2]] == [1.0, 2.0]
    assert [each.ttft_s("sent") for each in run.records[:2]] == [0.25, 0.5]
    assert run.records[0].itls_s == [0.125, 0.125] and run.started == 1767323045.0
    (tmp_path / "v.json").write_text(json.dumps(told | lists | {"latencies": [1.0]}))
    with pytest.raises(ConfigError, match=r"lists of different lengths: .* latencies 1"):
        read_results(tmp_path / "v.json")


def test_a_result_of_vllm_without_details_becomes_a_report(tmp_path):
    told = {
        "duration": 10.0,
        "completed": 20,
        "failed": 5,
        "total_input_tokens": 400,
        "total_output_tokens": 200,
        "request_throughput": 2.0,
        "request_rate": "inf",
        "max_concurrency": 4,
        "model_id": "m",
        "mean_ttft_ms": 50.0,
        "median_ttft_ms": 45.0,
        "p99_ttft_ms": 99.0,
        "mean_e2el_ms": None,
    }
    (tmp_path / "v.json").write_text(json.dumps(told))
    found = read_results(tmp_path / "v.json")
    performance = found.report.results.request_performance.aggregate
    assert (performance.requests.total, performance.requests.failures) == (25, 5)
    ttft = performance.latency.time_to_first_token
    assert (ttft.mean, ttft.p50, ttft.p99, ttft.units) == (0.05, 0.045, 0.099, "s")
    assert performance.latency.request_latency is None
    assert performance.throughput.total_token_rate.mean == 60
    back = json.loads(converted(found, "vllm", About())["vllm-bench.json"])
    assert (back["completed"], back["mean_ttft_ms"], back["total_output_tokens"]) == (20, 50.0, 200)
    with pytest.raises(ConfigError, match="runs need a record of each request"):
        converted(found, "runs", About())


def test_requests_of_inference_perf_itself_are_read(tmp_path):
    rows = [
        {
            "start_time": 1000.5 + at,
            "end_time": 1001.0 + at,
            "request": "{}",
            "info": {
                "request_metrics": {"text": {"input_tokens": 7}},
                "response_metrics": {"output_tokens": 3, "output_token_times": [1000.7 + at, 1000.8 + at, 1000.9 + at]},
            },
            "error": None,
        }
        for at in (1, 0)
    ]
    rows.append({**rows[0], "info": None, "error": {"error_type": "Timeout", "error_msg": "5 s"}})
    (tmp_path / "p.json").write_text(json.dumps(rows))
    (run,) = read_results(tmp_path / "p.json").runs
    assert [each.outcome for each in run.records] == ["done", "done", "failed"]
    first = run.records[0]
    assert (first.sent_s, first.input_tokens, first.output_tokens) == (0.0, 7, 3)
    assert first.ttft_s() == pytest.approx(0.2) and run.started == 0.0
    assert run.records[2].error == "Timeout: 5 s"


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("{}", "in no format that is known"),
        ("[]", "no requests"),
        ('[{"start_time": 1}]', "in no format that is known"),
        ('[{"start_time": "x", "end_time": 1, "info": {}}]', "start_time: expected a number, got 'x'"),
        ('{"completed": 1, "duration": NaN, "request_throughput": 1}', "duration: expected a number, got nan"),
        ('{"load_summary": 1, "successes": {}, "failures": {}}', "are sections"),
        ('{"run": {}, "results": {}}', "run.uid: Field required"),
        ("{", "JSON"),
    ],
)
def test_results_that_cannot_be_read_are_told_in_a_line(tmp_path, content, says):
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(ConfigError) as error:
        read_results(tmp_path / "x.json")
    text = str(error.value)
    assert says in text and str(tmp_path) in text and "\n" not in text


def test_a_report_without_requests_says_what_lacks(tmp_path):
    content = copy.deepcopy(one())
    del content["results"]["request_performance"]
    (tmp_path / "r.json").write_text(json.dumps(content))
    for to in ("vllm", "lifecycle"):
        with pytest.raises(ConfigError, match=r"results.request_performance.aggregate.requests is not in there"):
            converted(read_results(tmp_path / "r.json"), to, About())
