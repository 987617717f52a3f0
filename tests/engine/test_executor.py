"""Executors: stream modules on threads, and what they may not return; pretended steps by a profile."""

from __future__ import annotations

import math

import numpy as np
import pytest
from toys import Step, adds_up, draw_and_decode, ends, engine, live, one_stage, request, table

from neustream import (
    BackendError,
    EventLog,
    Graph,
    LinearProfile,
    ProfiledExecutor,
    Request,
    Stage,
    StageFailed,
    ThreadExecutor,
    VirtualClock,
    WallClock,
    loop,
    seq,
)
from neustream.core.batch import Batch
from neustream.core.work import Walk

SOON = 30
ONE = {"s": table("s", 1.0, 1.5)}


def batch(*ids, stage="s", worker=0, at=0.0, expected=1.0):
    graph = one_stage(max_batch=8)
    jobs = tuple(Walk(Request(id, graph)).job for id in ids)
    return Batch(1, "gpu", worker, stage, jobs, (0.0,) * len(jobs), at, expected)


def results(modules, asked, **options):
    """What a ThreadExecutor posts for a batch."""
    executor, clock = ThreadExecutor(modules, **options), WallClock()
    executor.start(asked, clock)
    [done] = clock.wait()
    executor.close()
    assert done.batch is asked
    return done.results


class Returns(Step):
    """A stream module that returns the same whatever it is given."""

    def __init__(self, value):
        super().__init__()
        self.value = value

    def step(self, inputs):
        return self.value


# -- ThreadExecutor -----------------------------------------------------------------------------------


def test_a_step_gives_one_update_a_job_in_order():
    assert results({"s": Step()}, batch("a", "b")) == [{"out": "a"}, {"out": "b"}]


def test_modules_are_loaded_once_on_their_device_before_the_first_step():
    modules = [{"s": Step(), "other": Step()} for _ in range(3)]
    executor = ThreadExecutor(modules, ["cpu", "toy:0", "toy:1"])
    assert [[module.loaded for module in mods.values()] for mods in modules] == [
        [["cpu"], ["cpu"]],
        [["toy:0"], ["toy:0"]],
        [["toy:1"], ["toy:1"]],
    ]
    clock = WallClock()
    for worker in (2, 0, 2):
        executor.start(batch("a", worker=worker), clock)
        [done] = clock.wait()
        assert done.results == [{"out": "a"}]
    executor.close()
    assert [mods["s"].sizes for mods in modules] == [[1], [], [1, 1]]


@pytest.mark.parametrize(("sets", "devices"), [(1, 2), (2, 1), (0, 1)])
def test_there_must_be_as_many_sets_of_modules_as_devices(sets, devices):
    with pytest.raises(BackendError, match=rf"{sets} set\(s\) of modules for {devices} device"):
        ThreadExecutor([{"s": Step()}] * sets, ["cpu"] * devices)


def test_a_module_that_cannot_load_is_told_at_once():
    class Broken(Step):
        def load(self, device):
            raise RuntimeError("no such weights")

    with pytest.raises(RuntimeError, match="no such weights"):
        ThreadExecutor({"s": Broken()})


def test_a_missing_module_fails_the_batch():
    error = results({"t": Step(), "r": Step()}, batch("a"))
    assert isinstance(error, StageFailed)
    assert str(error) == "stage 's': no module for it; modules: ['r', 't']"


@pytest.mark.parametrize(
    ("value", "named"),
    [({"out": 1}, "dict"), ([1], "list"), ("a", "str"), ([{"out": 1}, None], "list")],
    ids=["a dict", "a list of numbers", "a string", "None among dicts"],
)
def test_a_module_must_return_dicts(value, named):
    error = results({"s": Returns(value)}, batch("a"))
    assert isinstance(error, StageFailed)
    assert str(error) == f"stage 's': must return one dict per job, got {named}"


def test_a_module_that_returns_nothing_fails_its_batch():
    assert isinstance(results({"s": Returns(None)}, batch("a")), Exception)


def test_a_raising_module_fails_its_batch():
    error = results({"s": Step(lambda job: 1 / 0)}, batch("a"))
    assert isinstance(error.__cause__, ZeroDivisionError)
    assert str(error) == "stage 's': ZeroDivisionError: division by zero"


def test_a_module_that_exits_fails_its_batch_and_leaves_the_worker_alive():
    error = results({"s": Step(lambda job: exit(3))}, batch("a"))
    assert str(error) == "stage 's': SystemExit: 3"


def test_an_error_in_place_of_an_update_fails_that_job_alone():
    bad = StageFailed("bad")
    assert results({"s": Returns([bad, {}])}, batch("a", "b")) == [bad, {}]


FAULTS = {
    "raises": (lambda inputs: 1 / 0, "stage 's': ZeroDivisionError: division by zero"),
    "too few": (lambda inputs: [{}] * (len(inputs) - 1), "stage 's' returned 0 results for 1 jobs"),
    "too many": (lambda inputs: [{}] * (len(inputs) + 1), "stage 's' returned 2 results for 1 jobs"),
    "a dict": (lambda inputs: {}, "stage 's': must return one dict per job, got dict"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_engine_lives_on_after_a_failed_batch(fault):
    misbehave, reason = FAULTS[fault]
    graph = one_stage()

    class Sometimes(Step):
        def step(self, inputs):
            return misbehave(inputs) if inputs[0].params else super().step(inputs)

    with live(graph, {"s": Sometimes()}, ONE) as engine:
        answers = [engine.submit(graph, params) for params in ({}, {"bad": True}, {})]
        got = [answer.result(SOON) for answer in answers]
    assert [result.status for result in got] == ["done", "failed", "done"]
    assert got[1].reason == reason
    assert got[1].output is None


def test_a_failed_batch_fails_all_of_its_jobs_and_no_others():
    graph, log = draw_and_decode(max_batch=2), EventLog()
    modules = {"draw": Step(lambda job: {"x": 1 / (job.id != "b")}), "decode": Step()}
    profiles = {"draw": table("draw", 0.001, 0.001), "decode": table("decode", 0.001)}
    executor = ThreadExecutor(modules)
    work = [request("a", graph, steps=1), request("b", graph, 0.0), request("c", graph, 0.0), request("d", graph, 0.1)]
    tested = engine(graph, profiles, executor=executor, clock=WallClock(), observers=[log])
    report = tested.run(work)
    tested.close()
    [failed] = [step for step in log.steps if step["error"]]
    assert "b" in failed["jobs"]
    assert failed["error"] == "stage 'draw': ZeroDivisionError: division by zero"
    assert report.counts["failed"] == len(failed["jobs"])
    assert report.counts["on_time"] == 4 - len(failed["jobs"])
    assert adds_up(report.to_dict()["counts"])


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    "make",
    [
        float,
        np.float32,
        lambda value: np.array([[0.0, value]]),
        lambda value: np.array([0.0, value], np.float16),
        lambda value: np.array([complex(0.0, value)]),
    ],
    ids=["float", "scalar", "array", "half", "complex"],
)
def test_check_finite_fails_the_job_alone(make, bad):
    module = Step(lambda job: {"fine": make(1.0), "x": make(bad if job.id == "b" else 1.0)})
    first, second, third = results({"s": module}, batch("a", "b", "c"), check_finite=True)
    assert set(first) == set(third) == {"fine", "x"}
    assert isinstance(second, StageFailed)
    assert str(second) == "stage 's' returned NaN or infinity in 'x'"


def test_check_finite_knows_torch():
    torch = pytest.importorskip("torch")
    values = {"a": torch.ones(2, 2), "b": torch.tensor([1.0, torch.nan]), "c": torch.tensor(torch.inf).half()}
    module = Step(lambda job: {"x": values[job.id], "count": torch.ones(2, dtype=torch.int64)})
    first, second, third = results({"s": module}, batch("a", "b", "c"), check_finite=True)
    assert set(first) == {"x", "count"}
    assert isinstance(second, StageFailed) and isinstance(third, StageFailed)


def test_check_finite_lets_everything_else_pass():
    update = {"n": 3, "text": "nan", "list": [math.nan], "ints": np.array([1, 2]), "none": None, "flag": True}
    assert results({"s": Returns([update])}, batch("a"), check_finite=True) == [update]


def test_nothing_is_checked_unless_asked():
    [update] = results({"s": Returns([{"x": math.nan}])}, batch("a"))
    assert math.isnan(update["x"])


def test_close_waits_for_the_step_under_way():
    module = Step()
    executor, clock = ThreadExecutor({"s": module}), WallClock()
    for id in "abc":
        executor.start(batch(id), clock)
    executor.close()
    assert module.sizes == [1, 1, 1]
    done = clock.wait()
    while len(done) < 3:
        done += clock.wait()
    assert [event.batch.jobs[0].id for event in done] == ["a", "b", "c"]


# -- ProfiledExecutor ---------------------------------------------------------------------------------


def run(executor, *requests, graph=None, profiles=ONE):
    """id -> end of requests that a ProfiledExecutor served, and the report."""
    log = EventLog()
    report = engine(graph, profiles, executor=executor, observers=[log]).run(requests)
    return ends(log), report


def test_a_profiled_step_takes_what_the_scheduler_expects():
    clock = VirtualClock()
    asked = batch("a", "b", expected=0.5)
    ProfiledExecutor().start(asked, clock)
    [done] = clock.wait()
    assert clock.now() == 0.5
    assert done.batch is asked
    assert list(done.results) == [{}, {}]


def test_overhead_is_added_to_each_step():
    graph = draw_and_decode(max_batch=1)
    profiles = {"draw": table("draw", 1.0), "decode": table("decode", 0.5)}
    got, report = run(ProfiledExecutor(handover_s=0.25), request("a", graph, steps=2), graph=graph, profiles=profiles)
    assert got == {"a": 3.25}
    assert report.profile_error() == {"draw": 1.25, "decode": 1.5}


def test_stretch_multiplies_each_step():
    graph, seen = one_stage(max_batch=2), []

    def slower(asked):
        seen.append(len(asked))
        return 1.0 + len(seen)

    got, report = run(ProfiledExecutor(stretch=slower), request("a", graph), request("b", graph, 0.5), graph=graph)
    assert got == {"a": 2.0, "b": 5.0}
    assert seen == [1, 1]
    assert report.profile_error() == {"s": 2.5}


def test_stretch_does_not_touch_the_overhead():
    graph = one_stage()
    executor = ProfiledExecutor(stretch=lambda asked: 3.0, handover_s=0.5)
    assert run(executor, request("a", graph), graph=graph)[0] == {"a": 3.5}


def test_the_truth_may_differ_from_what_the_scheduler_expects():
    graph = one_stage(max_batch=2)
    truth = {"s": table("s", 2.0, 2.5)}
    got, report = run(
        ProfiledExecutor(truth), request("a", graph), request("b", graph, 0.1), request("c", graph, 0.2), graph=graph
    )
    assert got == {"a": 2.0, "b": 4.5, "c": 4.5}
    assert report.profile_error() == {"s": pytest.approx(4.5 / 2.5)}


def test_the_truth_knows_the_sizes_of_jobs():
    graph = Graph("sized", Stage("s", emits=True, size=lambda job: job.params["steps"]))
    profile = LinearProfile("s", base=1.0, max_batch=1)
    truth = {"s": LinearProfile("s", base=1.0, per_size=0.5, per_square=0.25, max_batch=1)}
    assert run(ProfiledExecutor(truth), request("a", graph, steps=4), graph=graph, profiles={"s": profile})[0] == {
        "a": 1.0 + 0.5 * 4 + 0.25 * 16
    }


def test_outcomes_are_what_only_the_simulation_knows():
    decode = Stage("decode", emits=True)
    graph = Graph("chat", seq(Stage("prefill"), loop(decode, until=lambda job: job.state["eos"], expect=3)))
    profiles = {"prefill": table("prefill", 1.0), "decode": table("decode", 0.5)}
    lengths = {"short": 1, "long": 6}

    def outcome(asked):
        return [{"eos": job.outputs + 1 == lengths[job.id]} if asked.stage == "decode" else {} for job in asked.jobs]

    got, report = run(
        ProfiledExecutor(outcome=outcome),
        request("short", graph),
        request("long", graph, 10.0),
        graph=graph,
        profiles=profiles,
    )
    assert got == {"short": 1.5, "long": 14.0}
    assert report.counts["on_time"] == 2


def test_an_outcome_may_fail_a_job():
    graph = one_stage()
    executor = ProfiledExecutor(outcome=lambda asked: [StageFailed("out of paper")] * len(asked))
    report = run(executor, request("a", graph), graph=graph)[1]
    assert report.counts["failed"] == 1
    assert report.reasons == {"out of paper": 1}
    executor.close()


def test_overheads_are_one_for_all_or_by_stage():
    graph = draw_and_decode()
    profiles = {"draw": table("draw", 1.0, 1.0), "decode": table("decode", 1.0)}
    for overhead, end in [(0.5, 4.5), (1, 6.0), ({"draw": 0.25, "decode": 2.0}, 5.5)]:
        log = EventLog()
        work = [request("a", graph, steps=2)]
        engine(graph, profiles, executor=ProfiledExecutor(handover_s=overhead), observers=[log]).run(work)
        assert ends(log) == {"a": end}
