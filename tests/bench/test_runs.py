"""Records and the folder that they lie in."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from neustream.bench import FAILURES, Plan, Record, Run, Target, read_runs, write_runs
from neustream.errors import ConfigError
from neustream.workload.asks import Ask, ImageAsk, Limits


def record(**given):
    given = {"scheduled_s": 1.0, "sent_s": 1.25, "token_times_s": [1.5, 1.75, 2.5], "end_s": 2.5, **given}
    return Record("a", output_tokens=3, **given)


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_latencies_count_from_the_scheduled_arrival_unless_asked_otherwise():
    one = record()
    assert (one.ttft_s(), one.e2e_s(), one.lag_s) == (0.5, 1.5, 0.25)
    assert (one.ttft_s("sent"), one.e2e_s("sent")) == (0.25, 1.25)
    assert one.tpot_s == 0.5 and one.itls_s == [0.25, 0.75] and one.ntpot_s() == 0.5


def test_tokens_that_came_in_one_event_share_the_time_between_events():
    assert record(token_times_s=[1.5, 2.5]).tpot_s == 0.5
    assert record(token_times_s=[1.5]).tpot_s == 0.0
    assert Record("a", output_tokens=1, token_times_s=[1.0]).tpot_s is None
    assert Record("a").tpot_s is Record("a").ttft_s() is Record("a").e2e_s() is Record("a").ntpot_s() is None


@pytest.mark.parametrize(
    ("limits", "scale"),
    [
        (Limits(), 0.0),
        (Limits(ttft_s=1.0), 0.5),
        (Limits(ttft_s=1.0, tpot_s=0.25), 2.0),
        (Limits(e2e_s=0.5, ttft_s=1.0), 3.0),
    ],
)
def test_the_scale_at_which_limits_are_just_met(limits, scale):
    one = record(limits=limits)
    assert one.scale() == scale and one.met() == (scale <= 1) and one.met(scale=scale)


@pytest.mark.parametrize("outcome", FAILURES)
def test_what_is_not_done_is_met_at_no_scale(outcome):
    one = record(outcome=outcome)
    assert one.scale() == math.inf and not one.met(scale=1e9)


def test_a_request_has_a_route_by_what_it_asks_for():
    image = Ask("b", image=ImageAsk(512, 512, 20))
    assert Target("u", "chat").path_of(Ask("a")) == "/v1/chat/completions"
    assert Target("u", "chat", path="/x").path_of(Ask("a")) == "/x"
    assert Target("u", "chat", path="/x").path_of(image) == "/v1/images/generations"
    assert Target("u", "images", path="/x").path_of(image) == "/x"


def test_runs_are_read_as_they_were_written(tmp_path):
    plan = Plan([Ask("a", 0.5)], "rate 2", 2.0, meta={"why": "test"})
    first = Run("rate 2", [record(limits=Limits(ttft_s=1.0), text="a\u2028b")], plan.about(), {"url": "u"}, 5.0, 2.5)
    runs = [first, Run("none", [], interrupted=True, client={"cpu_s": 1.0})]
    paths = write_runs(tmp_path / "new", runs, write, seed=3)
    assert [path.name for path in paths] == ["runs.json", "stage_0.records.jsonl", "stage_1.records.jsonl"]
    assert read_runs(tmp_path / "new") == (runs, {"version": 1, "seed": 3})


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("runs.json", "{", "runs.json: no JSON"),
        ("runs.json", "[]", "runs.json: not results"),
        ("runs.json", '{"version": 1, "stages": [{"odd": 1}]}', "runs.json: TypeError"),
        ("stage_0.records.jsonl", '{"id": "a"}', "jsonl, line 1: no record: KeyError"),
        ("stage_0.records.jsonl", '{"limits": {}, "x": 1}', "line 1: no record: TypeError"),
        ("stage_0.records.jsonl", "[1]", "line 1: no record"),
    ],
)
def test_what_is_no_result_is_named(tmp_path, name, text, says):
    write_runs(tmp_path, [Run("", [record()])], write)
    (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError, match=says):
        read_runs(tmp_path)


def test_a_folder_without_results_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"nowhere/runs.json: FileNotFoundError"):
        read_runs(tmp_path / "nowhere")


def test_files_are_json_without_infinities(tmp_path):
    write_runs(tmp_path, [Run("", [record()])], write)
    for path in Path(tmp_path).iterdir():
        for line in path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]:
            json.loads(line, parse_constant=pytest.fail)
