"""What may go wrong, one test each, end to end: no fault hangs the engine or loses a request."""

from __future__ import annotations

import json
import os
import sys
from concurrent.futures import Future

import pytest
from processes import interrupted
from toys import (
    OUTCOMES,
    TESTS,
    Gate,
    Step,
    adds_up,
    command,
    draw_and_decode,
    engine,
    live,
    one_stage,
    request,
    squash,
    table,
    toy,
    write_profile,
)

from neustream import (
    EDF,
    FCFS,
    SLO,
    Clockwork,
    EventLog,
    NeuStream,
    ProfiledExecutor,
    RequestError,
    Serial,
    Static,
)
from neustream.engine.events import Cancel

SOON = 30
TOY = {"draw": table("draw", 0.10, 0.15), "decode": table("decode", 0.05)}


def run(folder, fault="", at=-1, *, policy="fcfs", **options):
    """The one record of `neustream run` with the toy backend misbehaving at request `at`."""
    path = toy(folder, backend={"kind": "toy_backend:make", "fault": fault, "at": at, **options})
    done = command("run", path, "--policy", policy, "--json", folder / "out.json")
    assert done.status == 0, done.err
    [entry] = json.loads((folder / "out.json").read_text())
    assert entry["counts"]["submitted"] == 10
    assert adds_up(entry["counts"])
    return entry


# -- stages that misbehave ------------------------------------------------------------------------------


def test_nothing_goes_wrong_with_the_toy_itself(tmp_path):
    entry = run(tmp_path)
    assert entry["counts"]["on_time"] == 10
    assert "failures" not in entry


def test_a_stage_that_raises(tmp_path):
    entry = run(tmp_path, "raise", 4)
    assert 1 <= entry["counts"]["failed"] <= 4  # its batch
    assert entry["counts"]["on_time"] == 10 - entry["counts"]["failed"]
    assert entry["failures"] == {"stage 'draw': ValueError: the toy broke": entry["counts"]["failed"]}


def test_a_stage_that_raises_fails_one_request_at_a_time_under_serial(tmp_path):
    entry = run(tmp_path, "raise", 4, policy="serial")
    assert entry["counts"]["failed"] == 1
    assert entry["counts"]["on_time"] == 9


def test_a_stage_that_returns_the_wrong_number(tmp_path):
    entry = run(tmp_path, "short", 4)
    assert 1 <= entry["counts"]["failed"] <= 4
    assert entry["counts"]["on_time"] == 10 - entry["counts"]["failed"]
    assert all("stage 'draw' returned" in reason for reason in entry["failures"])


def test_a_stage_that_returns_no_list(tmp_path):
    entry = run(tmp_path, "dict", 4, policy="serial")
    assert entry["failures"] == {"stage 'draw': must return one dict per job, got dict": 1}


def test_nan_where_the_config_asks_to_check(tmp_path):
    entry = run(tmp_path, "nan", 4, check_finite=True)
    assert entry["counts"]["failed"] == 1
    assert entry["counts"]["on_time"] == 9
    assert entry["failures"] == {"stage 'draw' returned NaN or infinity in 'x'": 1}


def test_nan_where_nobody_asked(tmp_path):
    assert run(tmp_path, "nan", 4)["counts"]["on_time"] == 10


@pytest.mark.parametrize(
    "policy", [Serial(), Static(), FCFS(), EDF(), Clockwork(), NeuStream()], ids=lambda policy: type(policy).__name__
)
def test_a_stage_that_takes_three_times_its_profile(policy):
    graph = draw_and_decode(max_batch=2)
    work = [request(f"r{at}", graph, 0.1 * at, steps=1 + at % 3, total=0.8) for at in range(40)]
    report = engine(graph, TOY, policy, executor=ProfiledExecutor(stretch=lambda batch: 3.0)).run(work)
    assert adds_up(report.to_dict()["counts"])
    assert report.submitted == 40
    assert report.counts["late"] + report.counts["dropped"] >= 20
    assert report.counts["failed"] == report.counts["cancelled"] == 0
    assert set(report.profile_error()) <= {"draw", "decode"}
    assert all(error == pytest.approx(3.0) for error in report.profile_error().values())


# -- cancelling -----------------------------------------------------------------------------------------


def test_a_request_cancelled_while_waiting():
    graph, module = one_stage(), Gate()
    with live(graph, {"s": module}, {"s": table("s", 0.001)}) as tested:
        running, waiting = tested.submit(graph), tested.submit(graph, id="waiting")
        assert module.began.wait(SOON)
        assert tested.cancel("waiting").result(SOON) is True
        result = waiting.result(SOON)
        module.go.set()
        assert running.result(SOON).status == "done"
    assert (result.status, result.reason, result.output) == ("cancelled", "cancelled by the caller", None)
    assert module.sizes == [1]


def test_a_request_cancelled_while_running():
    graph, module = draw_and_decode(), Gate()
    with live(graph, {"draw": module, "decode": Step()}, TOY) as tested:
        answer = tested.submit(graph, {"steps": 5}, id="running")
        assert module.began.wait(SOON)
        assert tested.cancel("running").result(SOON) is True
        assert not answer.done()  # its step goes on
        module.go.set()
        assert answer.result(SOON).status == "cancelled"
    assert module.sizes == [1]


def test_a_request_cancelled_after_the_end():
    graph = one_stage()
    with live(graph, {"s": Step()}, {"s": table("s", 0.001)}) as tested:
        answer = tested.submit(graph, id="over")
        assert answer.result(SOON).status == "done"
        assert tested.cancel("over").result(SOON) is False
        assert answer.result(0).status == "done"


@pytest.mark.parametrize("policy", [Serial(), Static(), FCFS(), NeuStream()], ids=lambda policy: type(policy).__name__)
def test_cancels_at_any_moment_lose_nothing(policy):
    graph = draw_and_decode(max_batch=2)
    tested = engine(graph, TOY, policy)
    answers = [Future() for _ in range(30)]
    for at, answer in enumerate(answers):
        tested.clock.post(Cancel(f"r{at}", answer), 0.07 * at + 0.11 * (at % 5))
    report = tested.run([request(f"r{at}", graph, 0.07 * at, steps=at % 4, total=100.0) for at in range(30)])
    assert report.counts["cancelled"] == sum(answer.done() and answer.result() for answer in answers) > 10
    assert report.counts["on_time"] == 30 - report.counts["cancelled"]


# -- requests that cannot be served ---------------------------------------------------------------------


@pytest.mark.parametrize("policy", [FCFS(), EDF(), NeuStream(), Clockwork()], ids=lambda policy: type(policy).__name__)
def test_an_impossible_slo_is_dropped_at_once_with_a_reason(policy):
    graph, log = draw_and_decode(), EventLog()
    work = [request("impossible", graph, 1.0, steps=5, total=0.2), request("fine", graph, 1.5, total=50.0)]
    report = engine(graph, TOY, policy, observers=[log]).run(work)
    assert report.counts == {**dict.fromkeys(OUTCOMES, 0), "on_time": 1, "dropped": 1}
    dropped = log.requests["impossible"]
    assert (dropped["status"], dropped["end"]) == ("dropped", 1.0)
    assert "0.550 s" in dropped["reason"] and "0.200 s" in dropped["reason"]
    assert not any("impossible" in step["jobs"] for step in log.steps)


@pytest.mark.parametrize("policy", [Serial(), Static()], ids=lambda policy: type(policy).__name__)
def test_an_impossible_slo_is_served_late_by_those_who_do_not_look(policy):
    graph, log = draw_and_decode(), EventLog()
    report = engine(graph, TOY, policy, observers=[log]).run([request("a", graph, 1.0, steps=5, total=0.2)])
    assert report.counts["late"] == 1
    assert log.requests["a"]["end"] == pytest.approx(1.55)
    assert not log.requests["a"]["on_time"]


@pytest.mark.parametrize("policy", ["serial", "static", "fcfs", "edf", "clockwork", "neustream"])
def test_requests_of_no_steps(tmp_path, policy):
    path = toy(tmp_path, workload={"arrivals": "constant", "rate": 50, "requests": 8, "steps": 0})
    done = command("simulate", path, "-p", policy, "--json", tmp_path / "out.json")
    assert done.status == 0
    [entry] = json.loads((tmp_path / "out.json").read_text())
    assert entry["counts"]["on_time"] == 8
    assert entry["batch_size"].keys() == {"decode"}


def test_requests_of_no_steps_on_the_real_model(tmp_path):
    path = toy(tmp_path, stages={"draw": {"times": "steps", "max_batch": 4}})
    done = command("run", path, "--set", "workload.steps={min: 0, max: 1}", "--json", tmp_path / "out.json")
    assert done.status == 0, done.err
    [entry] = json.loads((tmp_path / "out.json").read_text())
    assert entry["counts"]["on_time"] == 10


def test_duplicate_ids():
    graph, module = one_stage(), Gate()
    with live(graph, {"s": module}, {"s": table("s", 0.001)}) as tested:
        first, second = (tested.submit(graph, slo=SLO(100.0), id="twin") for _ in range(2))
        with pytest.raises(RequestError, match="'twin' is already being served"):
            second.result(SOON)
        module.go.set()
        assert first.result(SOON).status == "done"
    report = engine(graph, {"s": table("s", 1.0)}).run([request("twin", graph), request("twin", graph)])
    assert (report.submitted, report.counts["on_time"], report.counts["failed"]) == (2, 1, 1)


# -- configs that name what is not there ----------------------------------------------------------------


@pytest.mark.parametrize("how", ["simulate", "run"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"policies": {"fcsf": {}}}, "unknown policy 'fcsf'; did you mean 'fcfs'? allowed: "),
        (
            {"stages": {"draw": {"times": "steps", "pool": "gpuu"}}},
            "stage 'draw': unknown pool 'gpuu'; did you mean 'gpu'?",
        ),
        ({"stages": {"draw": {"tims": "steps"}}}, "unknown key 'stages.draw.tims'; did you mean 'times'?"),
        ({"profiles": "nowhere"}, "ProfileError: no profile at"),
    ],
    ids=["policy", "pool", "key", "profile"],
)
def test_a_config_that_names_what_is_not_there(tmp_path, how, change, message):
    done = command(how, toy(tmp_path, **change))
    assert done.status == 2
    assert squash(message) in squash(done.err)
    assert "Traceback" not in done.err


def test_a_config_with_a_stage_that_was_not_measured(tmp_path):
    done = command("simulate", toy(tmp_path, stages={"draw": {"times": "steps"}, "upscale": {}}))
    assert done.status == 2
    assert squash("upscale.json; `neustream profile CONFIG --out DIR` measures one") in squash(done.err)


def test_a_config_with_a_stage_that_the_backend_has_not(tmp_path):
    path = toy(tmp_path, stages={"draw": {"times": "steps"}, "upscale": {}})
    write_profile(tmp_path / "profiles/upscale.json", "upscale", [1], [0.001])
    done = command("run", path)
    assert done.status == 2
    assert squash("no module for stage(s) ['upscale']; it has: ['decode', 'draw']") in squash(done.err)


# -- Ctrl-C ---------------------------------------------------------------------------------------------


def test_control_c_in_the_middle_of_a_run(tmp_path):
    marker, out = tmp_path / "serving", tmp_path / "deep/out.json"
    path = toy(
        tmp_path,
        backend={"kind": "toy_backend:make", "step_s": 0.02, "marker": str(marker)},
        workload={"arrivals": "constant", "rate": 500, "requests": 500, "steps": 5},
        slo={"total_s": 600},
        policies={"fcfs": {}, "serial": {}},
    )
    arguments = ["run", path, "--json", out, "--trace", tmp_path / "trace.json"]
    status, printed, problems = interrupted(
        [sys.executable, "-m", "neustream.cli", *arguments],
        marker.exists,
        env={**os.environ, "PYTHONPATH": str(TESTS)},
    )
    assert status == 130, problems
    assert "Traceback" not in problems
    assert "interrupted: open requests ended as cancelled" in " ".join(problems.split())
    [entry] = json.loads(out.read_text())  # the second policy did not begin
    counts = entry["counts"]
    assert entry["policy"] == "fcfs"
    assert entry["interrupted"] is True
    assert adds_up(counts)
    assert 0 < counts["cancelled"] < 500
    assert entry["simulated"]["counts"]["submitted"] == counts["submitted"]
    assert "fcfs" in printed and "cancelled" in printed
    assert json.loads((tmp_path / "trace-fcfs.json").read_text())["traceEvents"]
