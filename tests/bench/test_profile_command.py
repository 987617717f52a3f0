"""`neustream bench profile`, `validate` and `convert`: from a profile to its reports."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import yaml

pytest.importorskip("httptools", reason="needs the extra 'bench'")
from profile_files import FLAT, GUIDE, NOP, PERF, VLLM, bare, changed, write  # noqa: F401
from reported import read_report
from stub import Stub
from toys import command, results

from neustream.bench import Target, read_runs
from neustream.bench.profiles.server import words_a_token
from neustream.bench.reports.folder import report_file

pytestmark = pytest.mark.usefixtures("bare")
CLOSED = changed(
    PERF, load={"type": "concurrent", "interval": 0, "stages": [{"num_requests": 6, "concurrency_level": 2}]}
)
PLAYED = (0, 3)
"""Exit codes of a profile that was played: 3 where the machine was too busy for its client."""
FILES = {
    "runs.json",
    "stage_0.records.jsonl",
    "benchmark_report_v0.2,_stage_0_lifecycle_metrics.json.yaml",
    "stage_0_lifecycle_metrics.json",
    "summary_lifecycle_metrics.json",
    "per_request_lifecycle_metrics.json",
    "run_metadata.yaml",
}


@pytest.fixture(scope="module")
def stub():
    with Stub() as running:
        yield running


def run(folder, profile, url, *arguments):
    path = write(folder, profile)
    return command("bench", "profile", path, "--base-url", url, "--report", folder / "out", *arguments)


@pytest.mark.parametrize(
    ("profile", "stages"),
    [
        (changed(PERF, load__interval=0), [20, 40]),
        (CLOSED, [6]),
        (changed(GUIDE, spec__profile__streams=[1, 3]), [6, 6]),
        (changed(FLAT, max_seconds=..., max_requests=3, rate=[30, 50]), [3, 3]),
        (VLLM, [6]),
        (changed(VLLM, **{"request-rate": 50, "num-warmups": 2}), [6]),
        (changed(GUIDE, spec__profile={"kind": "sweep", "sweep_size": 4, "max_concurrency": 4}), [6, 6, 6, 6]),
    ],
    ids=["rates", "closed", "guidellm", "flat", "vllm", "warmups", "sweep"],
)
def test_a_profile_is_run_and_reported(tmp_path, stub, profile, stages):
    done = run(tmp_path, profile, stub.url, "--json", tmp_path / "all.json")
    assert done.status in PLAYED, done.err
    assert [each["completed"] for each in results(tmp_path / "all.json")] == stages
    found, about = read_runs(tmp_path / "out")
    assert [len(each.records) for each in found] == stages and about["profile"]["target"]["url"] == stub.url
    assert {path.name for path in (tmp_path / "out").iterdir()} >= FILES
    for stage, count in enumerate(stages):
        told = read_report(tmp_path / "out" / report_file(stage))
        aggregate = told.results.request_performance.aggregate
        assert (aggregate.requests.total, aggregate.requests.failures) == (count, 0)
        standardized = told.scenario.load.standardized
        assert (standardized.source, standardized.stage) == ("random", stage)
        assert told.scenario.stack[0].standardized.model.name == "paced"  # the server's first
        native = told.scenario.load.native.config["profile"]
        assert native.keys() == profile.keys()
    valid = command("bench", "validate", *(tmp_path / "out").glob("benchmark_report*"))
    assert (valid.status, valid.out.count("a Benchmark Report 0.2.1")) == (0, len(stages))


@pytest.mark.parametrize("profile", [CLOSED, changed(GUIDE, spec__profile__streams=[1, 3]), VLLM])
def test_a_disk_without_room_for_the_records_is_told_before_the_load(tmp_path, stub, monkeypatch, profile):
    seen = len(stub.log)
    monkeypatch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(total=9000, free=1700))
    done = run(tmp_path, profile, stub.url)
    assert done.status == 2 and "0.0 MB are free on its disk" in done.err, done.err
    assert len(stub.log) == seen and list((tmp_path / "out").iterdir()) == []


BOUNDS = [{"kind": "max_requests", "count": 100_000}, {"kind": "max_duration", "seconds": 0.2}]
"""Of requests there are far more than fit into the time."""


@pytest.mark.parametrize("kind", [{"kind": "concurrent", "streams": 1}, {"kind": "constant", "rate": 50}])
def test_requests_that_a_duration_leaves_out_need_no_room(tmp_path, stub, monkeypatch, kind):
    monkeypatch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(total=10**9, free=5 * 10**6))
    done = run(tmp_path, changed(GUIDE, spec__profile=kind, spec__constraints=BOUNDS), stub.url)
    assert done.status in PLAYED, done.err


def test_a_dry_run_asks_nobody(tmp_path):
    path = write(tmp_path, PERF)
    done = command("bench", "profile", path, "--dry-run", "--json", tmp_path / "plan.json")
    assert done.status == 0 and "needed before a run: the server's URL" in done.out
    assert "ignored: storage.local_storage" in done.out and "stage 1: 40 requests/s" in done.out
    plan = results(tmp_path / "plan.json")
    assert plan["dialect"] == "inference-perf" and [each["requests"] for each in plan["stages"]] == [20, 40]
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == []


def test_without_a_url_it_is_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = command("bench", "profile", write(tmp_path, PERF))
    assert done.status == 2 and "--base-url" in done.err


def test_what_is_not_run_has_an_exit_code_of_its_own(tmp_path):
    path = write(tmp_path, changed(PERF, data__type="cnn_dailymail"))
    done = command("bench", "profile", path, "--dry-run")
    assert done.status == 4 and "not run:" in done.err and "cnn_dailymail" in done.err
    wrong = command("bench", "profile", write(tmp_path, changed(PERF, lod=1)), "--dry-run")
    assert wrong.status == 2 and "'lod'" in wrong.err
    assert command("bench", "profile", tmp_path / "nowhere.yaml").status == 2


@pytest.mark.parametrize(
    "arguments", [["--tokenizer", "nowhere"], ["--stack", "nowhere.yaml"], ["-o", "load"], ["--harness", "x"]]
)
def test_wrong_options_are_told_in_a_line(tmp_path, arguments, stub):
    done = run(tmp_path, CLOSED, stub.url, *arguments)
    assert done.status == 2 and "Traceback" not in done.err and not (tmp_path / "out").exists()


def test_failures_are_in_the_report(tmp_path, stub):
    done = run(tmp_path, CLOSED, stub.url, "--model", "s429")
    assert done.status in PLAYED, done.err
    observability = read_report(tmp_path / "out" / report_file(0)).results.observability
    assert observability.drop_rate.mean == 1.0
    assert observability.neustream_slo["failures"] == {"status_429": 6}


def test_what_was_played_before_a_fault_is_written(tmp_path, stub):
    sweep = changed(GUIDE, spec__profile={"kind": "sweep", "sweep_size": 4, "max_concurrency": 4})
    done = run(tmp_path, sweep, stub.url, "--model", "s429")
    assert done.status == 2 and "no request of a load was done" in done.err
    assert len(read_runs(tmp_path / "out")[0]) == 2 and read_report(tmp_path / "out" / report_file(1))


def test_a_server_that_is_not_there_is_told_in_a_line(tmp_path):
    done = run(tmp_path, CLOSED, "http://127.0.0.1:1")
    assert done.status == 2 and "http://127.0.0.1:1/v1/models: ConnectionRefusedError" in done.err


def test_nop_reports_how_long_a_server_takes_to_be_ready(tmp_path, stub):
    done = run(tmp_path, NOP, stub.url)
    assert done.status == 0 and "ready after" in done.out, done.err
    found = read_report(tmp_path / "out" / report_file(0)).results.observability.pod_startup_times
    assert found.pods[0].startup_seconds >= 0 and found.aggregate.units == "s"


def test_words_are_calibrated_by_what_the_server_counts(stub):
    assert words_a_token(Target(stub.url, model="whole")) is None  # it tells 7 tokens of everything
    assert words_a_token(Target(stub.url, model="html")) is None


def test_results_are_converted(tmp_path, stub):
    assert run(tmp_path, CLOSED, stub.url).status in PLAYED
    for to, name in (
        ("vllm", "vllm-bench.json"),
        ("lifecycle", "per_request_lifecycle_metrics.json"),
        ("runs", "runs.json"),
    ):
        done = command("bench", "convert", tmp_path / "out", "--to", to, "--out", tmp_path / to)
        assert done.status == 0 and (tmp_path / to / name).is_file(), done.err
    again = command("bench", "convert", tmp_path / "vllm/vllm-bench.json", "--to", "report", "--out", tmp_path / "r")
    assert again.status == 0 and read_report(tmp_path / "r" / report_file(0))
    lacking = command("bench", "convert", tmp_path / "r" / report_file(0), "--to", "runs", "--out", tmp_path / "x")
    assert lacking.status == 2 and "a record of each request" in lacking.err and not (tmp_path / "x").exists()
    odd = command("bench", "convert", tmp_path / "r" / report_file(0), "--to", "reprot", "--out", tmp_path / "x")
    assert odd.status == 2 and "did you mean 'report'" in odd.err


def test_files_that_are_no_reports_are_told(tmp_path):
    good, bad = tmp_path / "good.yaml", tmp_path / "bad.yaml"
    good.write_text(yaml.safe_dump({"version": "0.2.1", "run": {"uid": "u"}, "results": {}}))
    bad.write_text(yaml.safe_dump({"version": 0.2, "run": {}, "results": {}}))
    done = command("bench", "validate", good, bad, tmp_path / "none.yaml", "--json", tmp_path / "v.json")
    assert done.status == 2 and "2 of 3 files are no Benchmark Report" in done.err
    assert results(tmp_path / "v.json")[str(good)] == []
    (tmp_path / "schema.json").write_text(json.dumps({"required": ["scenario"]}))
    held = command("bench", "validate", good, "--schema", tmp_path / "schema.json")
    assert held.status == 2 and "'scenario' is a required property" in held.err


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_profile_is_run_against_our_own_server(tmp_path, root, monkeypatch):
    """A tiny real language model behind `neustream serve`'s front."""
    pytest.importorskip("starlette", reason="needs the extra 'serve'")
    pytest.importorskip("transformers", reason="needs the extra 'llm'")
    monkeypatch.syspath_prepend(str(root / "tests/server"))
    from serving import serving, stock, text_service

    with serving(lambda metrics: text_service(stock(), metrics)) as (url, _, _):
        done = run(tmp_path, CLOSED, url, "--ready-check-timeout-sec", "60", "--scrape-s", "0.05")
    assert done.status in PLAYED, done.err
    assert "no tokenizer: a word is" in done.err
    told = read_report(tmp_path / "out" / report_file(0)).results
    aggregate = told.request_performance.aggregate
    assert (aggregate.requests.total, aggregate.requests.failures) == (6, 0)
    assert aggregate.latency.time_to_first_token.mean > 0 and aggregate.requests.output_length.mean >= 2
    assert told.observability.neustream_slo["tokens_counted_by"] == {"usage": 6}
    (component,) = told.observability.components
    assert component.component_label == "server" and component.aggregate.running_requests.max >= 0
