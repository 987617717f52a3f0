"""The one loop: workloads replayed in virtual time."""

from __future__ import annotations

import tracemalloc
from concurrent.futures import Future
from dataclasses import dataclass

import pytest
from started import ONE, TOY
from toys import adds_up, batches, draw_and_decode, ends, engine, one_stage, request, table

import neustream.engine.tally
from neustream import (
    EDF,
    FCFS,
    SLO,
    Decision,
    Engine,
    EventLog,
    Graph,
    Member,
    NeuStream,
    PolicyError,
    Pool,
    ProfiledExecutor,
    Request,
    RequestError,
    Scheduler,
    Serial,
    Stage,
    Static,
    VirtualClock,
    loop,
)
from neustream.engine.events import Cancel, Decided, Finished

# -- replaying a workload in virtual time -------------------------------------------------------------


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        # a draws alone; a and b together; then one decode at a time before c draws
        (FCFS(), {"a": 0.30, "b": 0.35, "c": 0.50}),
        (EDF(), {"a": 0.30, "b": 0.35, "c": 0.50}),
        (Serial(), {"a": 0.25, "b": 0.40, "c": 0.55}),
        # b and c form the batch after a's
        (Static(), {"a": 0.25, "b": 0.45, "c": 0.50}),
    ],
    ids=["fcfs", "edf", "serial", "static"],
)
def test_ends_are_what_the_profiles_add_up_to(policy, expected):
    graph, log = draw_and_decode(), EventLog()
    work = [request("a", graph, 0.0, steps=2), request("b", graph, 0.05), request("c", graph, 0.08)]
    report = engine(graph, TOY, policy, observers=[log]).run(work)
    assert ends(log) == pytest.approx(expected, abs=1e-12)
    assert report.counts["on_time"] == 3
    assert report.duration == pytest.approx(max(expected.values()))
    latency = [at - arrival for at, arrival in zip(expected.values(), (0, 0.05, 0.08), strict=True)]
    assert report.latency.mean == pytest.approx(sum(latency) / 3)


def test_the_batches_of_a_run():
    graph, log = draw_and_decode(), EventLog()
    work = [request("a", graph, 0.0, steps=2), request("b", graph, 0.05), request("c", graph, 0.08)]
    engine(graph, TOY, FCFS(), observers=[log]).run(work)
    assert batches(log) == [
        ("draw", ["a"]),
        ("draw", ["a", "b"]),
        ("decode", ["a"]),
        ("decode", ["b"]),
        ("draw", ["c"]),
        ("decode", ["c"]),
    ]


def test_deadlines_decide_what_is_on_time_late_and_dropped():
    graph = one_stage()
    work = [request("a", graph, total=1.0), request("b", graph, total=1.5), request("c", graph, total=2.5)]
    report = engine(graph, ONE, FCFS()).run(work)
    assert report.counts == {"on_time": 2, "late": 0, "dropped": 1, "failed": 0, "cancelled": 0}
    work = [request("a", graph, total=1.0), request("b", graph, total=1.5), request("c", graph, total=2.5)]
    report = engine(graph, ONE, FCFS(drop_hopeless=False)).run(work)
    assert report.counts == {"on_time": 1, "late": 2, "dropped": 0, "failed": 0, "cancelled": 0}


def test_an_empty_workload_ends_at_once():
    report = engine(one_stage(), ONE).run([])
    assert report.submitted == 0
    assert report.attainment == report.goodput == report.duration == 0.0
    assert not report.interrupted


def test_an_engine_may_run_again_from_where_its_clock_stands():
    graph = one_stage()
    tested = engine(graph, ONE)
    first = tested.run([request("a", graph, 2.0)])
    second = tested.run([request("a", graph, 2.0)])
    assert (first.start, second.start) == (0.0, 3.0)
    assert first.duration == second.duration == 3.0
    assert tested.clock.now() == 6.0


def test_two_workers_share_a_pool():
    graph, log = one_stage(), EventLog()
    report = engine(graph, ONE, workers=2, observers=[log]).run(request(id, graph) for id in "abc")
    assert ends(log) == {"a": 1.0, "b": 1.0, "c": 2.0}
    assert [(step["worker"], step["start"]) for step in log.steps] == [(0, 0.0), (1, 0.0), (0, 1.0)]
    assert report.counts["on_time"] == 3


@pytest.mark.parametrize("policy", [FCFS(), Serial(), Static(), NeuStream()], ids=lambda policy: type(policy).__name__)
def test_sticky_jobs_stay_on_their_worker(policy):
    graph, log = draw_and_decode(max_batch=1), EventLog()
    work = [request(f"r{at}", graph, 0.03 * at, steps=3) for at in range(12)]
    report = engine(graph, TOY, policy, workers=2, sticky=True, observers=[log]).run(work)
    assert report.counts["on_time"] == 12
    for id in log.requests:
        assert len({step["worker"] for step in log.steps if id in step["jobs"]}) == 1


def test_requests_of_one_instant_are_decided_on_together():
    graph, log = one_stage(max_batch=4), EventLog()
    profiles = {"s": table("s", 1.0, 1.0, 1.0, 1.0)}
    engine(graph, profiles, Static(), observers=[log]).run(request(id, graph, 2.0) for id in "abcd")
    assert batches(log) == [("s", ["a", "b", "c", "d"])]


def test_a_pipeline_over_two_pools_overlaps():
    graph, log = draw_and_decode(max_batch=1), EventLog()
    profiles = {"draw": table("draw", 1.0), "decode": table("decode", 1.0)}
    pools = [Pool("first", ("draw",)), Pool("second", ("decode",))]
    executors = {pool.name: ProfiledExecutor() for pool in pools}
    report = Engine(Member(Scheduler(pools, FCFS(), profiles), executors), VirtualClock(), [log]).run(
        [request("a", graph), request("b", graph)]
    )
    assert ends(log) == {"a": 2.0, "b": 3.0}
    assert {(step["pool"], step["stage"]) for step in log.steps} == {("first", "draw"), ("second", "decode")}
    assert report.duration == 3.0


def test_a_request_of_no_steps_goes_straight_to_what_is_behind_the_loop():
    graph, log = draw_and_decode(), EventLog()
    engine(graph, TOY, observers=[log]).run([request("a", graph, 1.0, steps=0)])
    assert ends(log) == {"a": 1.05}
    assert batches(log) == [("decode", ["a"])]


def test_a_request_with_nothing_to_run_ends_on_arrival():
    graph, log = Graph("only a loop", loop(Stage("draw"), times=lambda job: job.params["steps"])), EventLog()
    report = engine(graph, {"draw": table("draw", 1.0)}, observers=[log]).run([request("a", graph, 2.5, steps=0)])
    assert ends(log) == {"a": 2.5}
    assert log.steps == []
    assert report.counts["on_time"] == 1


def test_executors_must_be_those_of_the_pools():
    scheduler = Scheduler([Pool("gpu", ("s",))], FCFS(), ONE)
    with pytest.raises(RequestError, match=r"executors for \['cpu'\], but pools are \['gpu'\]"):
        Engine(Member(scheduler, {"cpu": ProfiledExecutor()}), VirtualClock())


def test_a_duplicate_id_in_a_workload_fails_alone():
    graph, log = one_stage(), EventLog()
    report = engine(graph, ONE, observers=[log]).run([request("a", graph), request("a", graph, 0.5)])
    assert (report.submitted, report.counts["on_time"], report.counts["failed"]) == (2, 1, 1)
    assert list(report.reasons) == ["request id 'a' is already being served"]
    assert [entry["status"] for entry in log.requests.values()] == ["done", "failed"]
    log.chrome()


def test_arrivals_that_go_back_are_an_error():
    graph = one_stage()
    with pytest.raises(RequestError, match="'b': arrivals must not go back"):
        engine(graph, ONE).run([request("a", graph, 1.0), request("b", graph, 0.5)])


def test_a_policy_that_waits_is_woken_once_a_moment():
    """Each arrival asks it again, but every wish to be woken is not one more wake-up."""

    @dataclass(frozen=True)
    class Patient:
        def decide(self, view):
            ready = min(job.joined_at for job in view.jobs) + 0.0101
            return Decision(view.jobs[:1]) if view.now >= ready else Decision(wake_at=ready)

    graph = one_stage()
    tested = engine(graph, {"s": table("s", 0.001)}, Patient())
    report = tested.run(request(str(at), graph, at * 0.02) for at in range(100))
    assert report.counts["on_time"] == 100 and report.decision.count <= 300


def test_an_id_may_come_again_once_it_is_over():
    graph = one_stage()
    report = engine(graph, ONE).run([request("a", graph), request("a", graph, 2.0)])
    assert report.counts["on_time"] == 2


def test_a_request_for_a_graph_that_no_pool_serves_fails_alone():
    other = Graph("other", Stage("elsewhere"))
    report = engine(one_stage(), ONE).run([request("a", other)])
    assert report.counts["failed"] == report.submitted == 1
    assert "'elsewhere' is in no pool; stages served: ['s']" in next(iter(report.reasons))


def test_a_policy_that_stalls_ends_a_run():
    graph = one_stage()
    with pytest.raises(PolicyError, match="left 1 job"):
        engine(graph, ONE, Idle()).run([request("a", graph)])


@dataclass(frozen=True)
class Idle:
    def decide(self, view):
        return Decision()


@dataclass(frozen=True)
class Together:
    """Waits up to `patience` seconds for a batch of `wanted`."""

    wanted: int = 3
    patience: float = 1.0

    def decide(self, view):
        jobs = view.queues["s"]
        leave = jobs[0].arrival + self.patience
        if len(jobs) < self.wanted and view.now < leave:
            return Decision(wake_at=leave)
        return Decision(jobs[: self.wanted])


def test_a_policy_may_wait_on_purpose():
    graph, log = one_stage(max_batch=3), EventLog()
    profiles = {"s": table("s", 1.0, 1.0, 1.0)}
    work = [request(id, graph, at) for id, at in [("a", 0.0), ("b", 0.1), ("c", 0.2), ("d", 10.0), ("e", 10.5)]]
    engine(graph, profiles, Together(), observers=[log]).run(work)
    assert [(step["start"], step["jobs"]) for step in log.steps] == [(0.2, ["a", "b", "c"]), (11.0, ["d", "e"])]


def test_observers_see_every_record_and_decisions_add_up():
    graph, seen = draw_and_decode(), []
    report = engine(graph, TOY, observers=[seen.append]).run(
        [request("a", graph, 0.0, steps=2), request("b", graph, 0.05, steps=1)]
    )
    kinds = [type(record).__name__ for record in seen]
    assert kinds.count("Submitted") == kinds.count("Ended") == kinds.count("Emitted") == 2
    assert kinds.count("Finished") == 4
    assert kinds.count("Decided") == report.decision.count >= 4
    assert all(record.seconds >= 0 for record in seen if isinstance(record, Decided))
    instants = [record.at for record in seen]
    assert instants == sorted(instants)


def run_many(count):
    """The report of `count` requests, drawn by need, and the peak of memory while they were served."""
    graph, lead = one_stage(), 0
    drawn = ended = 0

    def work():
        nonlocal drawn
        for at in range(count):
            drawn += 1
            yield Request(f"r{at}", graph, 0.002 * at, SLO(1.0))

    def watch(record):
        nonlocal ended, lead
        ended += type(record).__name__ == "Ended"
        lead = max(lead, drawn - ended)

    tracemalloc.start()
    report = engine(graph, {"s": table("s", 0.001)}, observers=[watch]).run(work())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert lead <= 3
    return report, peak


def test_a_generator_of_many_requests_takes_no_more_memory_than_few(monkeypatch):
    monkeypatch.setattr(neustream.engine.tally, "KEEP", 500)
    few, small = run_many(5_000)
    many, large = run_many(20_000)
    assert (few.counts["on_time"], many.counts["on_time"]) == (5_000, 20_000)
    assert large < 1.3 * small + 50_000


# -- cancelling and interrupting in virtual time --------------------------------------------------------


def test_cancelling_in_virtual_time():
    graph, log = one_stage(), EventLog()
    tested = engine(graph, ONE, observers=[log])
    answers = {(id, at): Future() for id, at in [("b", 0.5), ("a", 0.6), ("a", 0.7), ("a", 1.5), ("nobody", 1.6)]}
    for (id, at), answer in answers.items():
        tested.clock.post(Cancel(id, answer), at)
    report = tested.run(request(id, graph) for id in "abc")
    assert [answer.result(0) for answer in answers.values()] == [True, True, False, False, False]
    assert ends(log) == {"b": 0.5, "a": 1.0, "c": 2.0}
    assert report.counts == {"on_time": 1, "late": 0, "dropped": 0, "failed": 0, "cancelled": 2}


def test_an_interrupt_ends_what_is_open_and_takes_no_more():
    graph, log = one_stage(), EventLog()
    work = [*(request(id, graph) for id in "abcd"), request("never", graph, 50.0)]
    tested = engine(graph, ONE, observers=[log, lambda record: stop_after(record, 2)])

    def stop_after(record, steps):
        if isinstance(record, Finished) and len(log.steps) == steps:
            tested.interrupt()

    report = tested.run(work)
    assert report.interrupted
    assert report.to_dict()["interrupted"] is True
    assert report.counts["on_time"] == 2
    assert report.counts["cancelled"] == 2
    assert adds_up(report.to_dict()["counts"])
    assert "never" not in log.requests
    assert log.requests["c"]["reason"] == "cancelled by the caller"


def test_an_interrupt_does_not_wait_for_the_next_arrival():
    graph = one_stage()
    tested = engine(graph, ONE, observers=[lambda record: isinstance(record, Finished) and tested.interrupt()])
    report = tested.run([request("a", graph), request("b", graph, 3600.0)])
    assert tested.clock.now() == 1.0
    assert report.to_dict()["counts"]["submitted"] == 1
