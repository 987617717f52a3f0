"""Reports of a run: what they say, and that they are valid."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import yaml
from reported import FOLDER, SCHEMA, START, a_run, one, read_report, record, theirs

from neustream.bench import Record, Run
from neustream.bench.reports.building import About, reports
from neustream.bench.reports.checking import problems, read_content, remarks
from neustream.bench.reports.folder import json_text
from neustream.bench.reports.lifecycle import per_request, stage_summary, summary
from neustream.bench.reports.observability import Report
from neustream.bench.reports.scraping import parsed
from neustream.bench.reports.stack import read_stack
from neustream.errors import ConfigError
from neustream.workload.asks import Limits

# -- what a report says --------------------------------------------------------------------------------


def test_a_report_of_a_worked_example():
    content = one()
    assert problems(content) == [] and remarks(content) == []
    performance = content["results"]["request_performance"]["aggregate"]
    requests, latency, rates = (performance[key] for key in ("requests", "latency", "throughput"))
    assert (requests["total"], requests["failures"], requests["incomplete"]) == (4, 1, 1)
    assert requests["input_length"]["mean"] == 10 and requests["output_length"]["mean"] == 3
    assert (
        requests["request_size"] == pytest.approx(requests["request_size"])
        and requests["request_size"]["units"] == "bytes"
    )
    assert latency["time_to_first_token"]["mean"] == pytest.approx((0.1 + 0.5) / 2)
    assert latency["request_latency"]["mean"] == pytest.approx((0.2 + 0.6) / 2)
    assert latency["time_per_output_token"]["mean"] == pytest.approx((0.02 + 0.1) / 2)
    assert latency["normalized_time_per_output_token"]["mean"] == pytest.approx((0.2 / 4 + 0.6 / 2) / 2)
    assert latency["inter_token_latency"]["mean"] == pytest.approx((3 * 0.02 + 0.1) / 4)
    assert {key: value["units"] for key, value in latency.items()} == {
        "time_to_first_token": "s",
        "request_latency": "s",
        "time_per_output_token": "s/token",
        "normalized_time_per_output_token": "s/token",
        "inter_token_latency": "s/token",
    }
    assert {key: value["mean"] for key, value in rates.items()} == {
        "input_token_rate": 5.0,
        "output_token_rate": 1.5,
        "total_token_rate": 6.5,
        "request_rate": 0.5,
    }
    assert content["run"]["time"]["duration"] == "PT4.000000S"
    assert content["run"]["time"]["start"].endswith("Z")


def test_latencies_count_from_when_requests_were_due_or_sent():
    content = one(since="sent")
    latency = content["results"]["request_performance"]["aggregate"]["latency"]
    assert latency["time_to_first_token"]["mean"] == pytest.approx((0.09 + 0.49) / 2)
    assert content["results"]["observability"]["neustream_slo"]["since"] == "sent"


def test_the_block_of_promises_counts_all_that_was_offered():
    observability = one(constraints={"itl": 0.05})["results"]["observability"]
    block = observability["neustream_slo"]
    assert observability["drop_rate"]["mean"] == 0.25
    assert (block["attainment"], block["goodput"], block["late"], block["dropped"]) == (0.25, 0.25, 1, 1)
    assert block["slo"] == {"ttft_s": 0.15, "e2e_s": 1.0, "itl_s": 0.05}
    assert block["interval"] == pytest.approx([0.0456, 0.6994], abs=1e-3)
    assert {name: each["number"] for name, each in block["each"].items()} == {"ttft": 1, "e2e": 2, "itl": 1}
    assert block["failures"] == {"interrupted": 1, "status_429": 1} and block["offered"] == 4
    free = one(a_run(record(0, limits=Limits())))["results"]["observability"]["neustream_slo"]
    assert "attainment" not in free and free["done"] == 1


def test_limits_that_differ_are_told_as_a_spread():
    run = a_run(record(0), record(1, limits=Limits(ttft_s=0.25), slo_class="b"))
    block = one(run)["results"]["observability"]["neustream_slo"]
    assert block["slo"]["ttft_s"]["mean"] == pytest.approx(0.2) and block["slo"]["e2e_s"]["max"] == 1.0
    assert set(block["classes"]) == {"", "b"}


def test_figures_over_time_are_by_the_second_in_which_requests_ended():
    run = a_run(*[record(at) for at in (0, 0.2, 2)])
    series = one(run)["results"]["request_performance"]["time_series"]
    rates = series["throughput"]["output_token_rate"]["series"]
    assert [point["value"] for point in rates] == [8.0, 0.0, 4.0]
    assert len(series["latency"]["time_to_first_token"]["series"]) == 2


def test_sessions_are_told_where_there_are_some():
    turns = [record(at, session=f"s{at % 2}") for at in range(4)]
    turns[3] = replace(turns[3], outcome="blocked", token_times_s=[], output_tokens=None)
    sessions = one(a_run(*turns))["results"]["session_performance"]["sessions"]
    assert (sessions["total"], sessions["succeeded"], sessions["failed"]) == (2, 1, 1)
    assert (sessions["total_events"], sessions["total_events_completed"], sessions["total_events_cancelled"]) == (
        4,
        3,
        1,
    )
    assert sessions["session_duration"]["mean"] == pytest.approx(2.2)
    assert "session_performance" not in one()["results"]


@pytest.mark.parametrize(
    "run",
    [
        a_run(record(0, outcome="connect", token_times_s=[], output_tokens=None, input_tokens=None)),
        a_run(record(0, output_tokens=1, token_times_s=[0.1])),
        a_run(record(0, output_tokens=None, input_tokens=None, counted_by="")),
        a_run(duration_s=0.0),
        Run("", []),
        Run("x", [Record("0", outcome="blocked")], {"rate": 0.0, "concurrency": None}),
        a_run(
            record(0),
            plan={"meta": {"scenario": {"source": "random", "input_seq_len": {"distribution": "fixed", "value": 9}}}},
        ),
    ],
    ids=["failed", "one token", "no counts", "no time", "nothing", "never sent", "scenario"],
)
def test_a_report_of_anything_is_valid_and_json(run):
    found = Report.model_validate(one(run))
    json.loads(json_text(found), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    json.dumps([per_request([run]), stage_summary(run), summary([run])], allow_nan=False)


def test_reports_of_an_experiment_belong_together(tmp_path):
    found = reports([a_run(), a_run()], About(description="d", config={"a": 1}, keywords=["k"]))
    assert found[0].run.eid == found[1].run.eid and found[0].run.uid != found[1].run.uid
    assert [each.scenario.load.standardized.stage for each in found] == [0, 1]
    assert found[0].scenario.load.native.config == {"a": 1} and found[0].run.keywords == ["k"]
    standardized = found[0].scenario.load.standardized
    assert (standardized.tool, standardized.rate_qps, standardized.concurrency) == ("neustream", 2.0, 8)


def test_a_user_says_who_served(tmp_path):
    stack = one()["scenario"]["stack"]
    stack[0]["standardized"]["accelerator"]["model"] = "H100"
    path = tmp_path / "stack.yaml"
    path.write_text(yaml.safe_dump({"stack": stack}))
    assert one(stack=read_stack(path))["scenario"]["stack"][0]["standardized"]["accelerator"]["model"] == "H100"
    path.write_text("- {metadata: {}}")
    with pytest.raises(ConfigError, match=r"stack.yaml: 0.metadata.label: Field required"):
        read_stack(path)
    assert read_stack(None) == []


METRICS = """# HELP neustream:num_requests_running Open requests
neustream:num_requests_running{model="a"} 3.0
neustream:num_requests_running{model="b"} 5.0
vllm:num_requests_waiting{engine="0",model_name="a"} 1
vllm:num_requests_waiting{engine="1",model_name="a"} 2e0
vllm:kv_cache_usage_perc{engine="0",model_name="a"} 0.25
vllm:kv_cache_usage_perc{engine="1",model_name="a"} 0.75
neustream:num_preemptions_total{model="a"} NaN
neustream:num_requests_running_of_another{model="a"} 9
neustream:num_requests_running{model="a"} x
other:num_requests_running 7
"""


def test_metrics_of_a_server_are_of_one_model():
    assert parsed(METRICS, "a") == {
        "num_requests_running": 3.0,
        "num_requests_waiting": 3.0,
        "kv_cache_usage_perc": 0.5,
    }
    assert parsed(METRICS, "c") == parsed("", "a") == parsed("neustream:num_preemptions_total 1e999", "a") == {}


def test_metrics_of_a_server_are_in_the_report():
    samples = [{"at": START + at, "num_requests_running": at, "num_preemptions_total": 5 + at} for at in (0.0, 2.0)]
    content = one(a_run(meta={"server_metrics": samples}))
    (found,) = content["results"]["observability"]["components"]
    assert problems(content) == [] and found["component_label"] == "server"
    assert found["aggregate"]["running_requests"]["mean"] == 1.0
    assert found["aggregate"]["preemptions"] == {"units": "count", "mean": 2.0}
    assert [each["value"] for each in found["time_series"]["num_preemptions"]["series"]] == [5.0, 7.0]
    assert "components" not in one(a_run(meta={"server_metrics": []}))["results"]["observability"]


# -- validation ----------------------------------------------------------------------------------------

WRONG = [
    (lambda c: c.update(version=0.2), "version 0.2; allowed: the text '0.2.1'"),
    (lambda c: c.update(version="0.2"), "version '0.2'"),
    (lambda c: c.pop("results"), "results: Field required"),
    (lambda c: c["run"].update(submitter="x"), "run.submitter: Extra inputs are not permitted"),
    (lambda c: c["results"].update(slo={}), "results.slo: Extra inputs"),
    (lambda c: latency_of(c)["request_latency"].update(units="tokens/s"), "units 'tokens/s'; allowed: ms, s"),
    (lambda c: latency_of(c)["request_latency"].pop("mean"), "request_latency.mean: Field required"),
    (lambda c: latency_of(c)["request_latency"].update(mean=math.nan), "finite number"),
    (lambda c: c["scenario"]["load"]["standardized"].update(concurrency=4.5), "expected a whole number, or .inf"),
    (lambda c: c["scenario"]["load"]["standardized"].update(rate_qps=0), "rate_qps: Input should be greater than 0"),
    (lambda c: c["scenario"]["load"]["standardized"].pop("input_seq_len"), "input_seq_len: Field required"),
    (lambda c: c["scenario"]["stack"][0]["standardized"].update(role="denoise"), "role"),
]


def latency_of(content):
    return content["results"]["request_performance"]["aggregate"]["latency"]


@pytest.mark.parametrize(("change", "says"), WRONG, ids=[says for _, says in WRONG])
def test_what_is_wrong_with_a_report_is_told(change, says):
    content = one()
    change(content)
    found = problems(content)
    assert any(says in text for text in found) and all("\n" not in text for text in found)


def test_what_readers_drop_is_told():
    content = one()
    latency_of(content)["request_latency"]["p97"] = 1.0
    content["scenario"]["load"]["standardized"]["concurrency"] = math.inf
    assert problems(content) == []
    assert remarks(content) == ["results.request_performance.aggregate.latency.request_latency.p97: readers drop it"]


@pytest.mark.parametrize("text", ["", "[]", "a: [", "{\x00", "!!python/object:os.system {}", "[" * 5000])
def test_a_file_that_is_no_report_is_told_in_a_line(tmp_path, text):
    path = tmp_path / "r.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as error:
        read_content(path)
    assert str(error.value).startswith(str(path)) and "\n" not in str(error.value)


@theirs
def test_our_sections_are_those_of_their_schema():
    def shapes(schema, root, path, found):
        """Place -> keys, needed keys and openness of the sections there; values of an enumeration."""
        if "$ref" in schema:
            return shapes(root["$defs"][schema["$ref"].rpartition("/")[2]], root, path, found)
        for branch in schema.get("anyOf", schema.get("oneOf", ())):
            shapes(branch, root, path, found)
        if schema.get("type") == "object" and "properties" in schema:
            is_open = schema.get("additionalProperties", True)
            shape = (frozenset(schema["properties"]), frozenset(schema.get("required", ())), is_open)
            found.setdefault(path, set()).add(shape)
            for key, inner in schema["properties"].items():
                shapes(inner, root, f"{path}.{key}", found)
        elif schema.get("type") == "array":
            shapes(schema.get("items", {}), root, f"{path}[]", found)
        elif "enum" in schema:
            found.setdefault(path, set()).add(frozenset(schema["enum"]))
        return found

    schema, ours = json.loads(SCHEMA.read_text()), Report.model_json_schema()
    assert shapes(ours, ours, "", {}) == shapes(schema, schema, "", {})


@theirs
def test_their_example_is_a_report_for_us():
    pytest.importorskip("jsonschema", reason="needs the extra 'bench'")
    content = read_content(FOLDER / "br_v0_2_1_example.yaml")
    assert problems(content, read_content(SCHEMA)) == []
    assert problems(read_report(FOLDER / "br_v0_2_1_example.yaml").content(), read_content(SCHEMA)) == []


@theirs
def test_our_reports_are_valid_by_their_schema():
    pytest.importorskip("jsonschema", reason="needs the extra 'bench'")
    turns = a_run(*[record(at, session="s") for at in range(3)])
    for run in (a_run(), turns, Run("", [])):
        assert problems(one(run), read_content(SCHEMA)) == []
    content = one()
    content["results"]["goodput"] = 1
    assert len(problems(content, read_content(SCHEMA))) == 2  # by both


def test_a_schema_that_is_none_is_an_error():
    pytest.importorskip("jsonschema", reason="needs the extra 'bench'")
    for schema in ({"type": 5}, {"$ref": "nowhere#/x"}):
        with pytest.raises(ConfigError, match="the schema"):
            problems(one(), schema)
    assert problems(one(), {"required": ["more"]}) == ["$: 'more' is a required property"]
