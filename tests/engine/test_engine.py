"""The one loop: replaying workloads in virtual time, serving callers from threads, and ending in every way."""

from __future__ import annotations

import asyncio
import threading
import time
import tracemalloc
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import pytest
from toys import Gate, Step, adds_up, batches, draw_and_decode, ends, engine, live, one_stage, request, table

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
    Report,
    Request,
    RequestError,
    Scheduler,
    Serial,
    Stage,
    Static,
    TableProfile,
    ThreadExecutor,
    VirtualClock,
    WallClock,
    loop,
    seq,
)
from neustream.engine.events import Cancel, Decided, Finished

SOON = 30  # seconds to wait for what must come at once, so that a fault does not hang the tests
TOY = {"draw": table("draw", 0.10, 0.15), "decode": table("decode", 0.05)}
ONE = {"s": table("s", 1.0)}


def started(graph, module, policy=None, workers=1):
    """A started engine in real time, whose stage "s" is `module`."""
    modules, devices = [{"s": module}] * workers, ["cpu"] * workers
    executor = ThreadExecutor(modules, devices)
    return engine(graph, ONE, policy, workers=workers, executor=executor, clock=WallClock()).start()


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


# -- serving from threads -------------------------------------------------------------------------------


def test_results_of_requests_from_several_threads():
    graph = one_stage(max_batch=8)
    profiles = {"s": table("s", *[0.001] * 8)}
    module = Step(lambda job: {"square": job.params["n"] ** 2})

    with live(graph, {"s": module}, profiles) as tested:

        def ask(n):
            return tested.submit(graph, {"n": n}, slo=SLO(100.0)).result(SOON)

        with ThreadPoolExecutor(8) as threads:
            results = list(threads.map(ask, range(60)))
    assert [result.output["square"] for result in results] == [n * n for n in range(60)]
    assert all(result.status == "done" and result.on_time and result.latency_s > 0 for result in results)
    assert len({result.id for result in results}) == 60
    assert sum(module.sizes) == 60
    assert module.loaded == ["cpu"]


def test_a_result_tells_what_became_of_it():
    graph = one_stage()
    with live(graph, {"s": Step()}, {"s": table("s", 5.0)}) as tested:
        good = tested.submit(graph, id="mine").result(SOON)
        hopeless = tested.submit(graph, slo=SLO(1.0)).result(SOON)
    assert (good.id, good.status, good.on_time, good.reason) == ("mine", "done", True, "")
    assert good.unwrap() == {"out": "mine"}
    assert (hopeless.status, hopeless.output, hopeless.on_time) == ("dropped", None, False)
    with pytest.raises(RequestError, match=r"was dropped: hopeless: needs 5\.000 s more, due in"):
        hopeless.unwrap()


def test_a_request_that_fails_after_an_output_has_none():
    first, second = Stage("first", emits=True), Stage("second", emits=True)
    graph = Graph("two outputs", seq(first, second))
    modules = {"first": Step(), "second": Step(lambda job: 1 / 0)}
    profiles = {"first": table("first", 0.001), "second": table("second", 0.001)}
    log = EventLog()
    with live(graph, modules, profiles, observers=[log]) as tested:
        result = tested.submit(graph, id="a").result(SOON)
    assert (result.status, result.output) == ("failed", None)
    assert len(log.requests["a"]["outputs"]) == 1


def test_a_late_result_is_done_but_not_on_time():
    graph, module = one_stage(), Gate()
    with live(graph, {"s": module}, {"s": table("s", 1e-6)}, policy=FCFS(drop_hopeless=False)) as tested:
        answer = tested.submit(graph, slo=SLO(1e-5))
        assert module.began.wait(SOON)
        module.go.set()
        result = answer.result(SOON)
    assert (result.status, result.on_time) == ("done", False)
    assert result.output == {"out": result.id}


def test_cancelling_a_waiting_a_running_and_an_ended_request():
    graph, module = one_stage(), Gate()
    tested = started(graph, module)
    first, second = tested.submit(graph, id="first"), tested.submit(graph, id="second")
    assert module.began.wait(SOON)
    assert tested.cancel("second").result(SOON) is True
    assert second.result(SOON).status == "cancelled"  # at once, while the first still runs
    assert tested.cancel("first").result(SOON) is True
    assert tested.cancel("first").result(SOON) is False  # it is on its way out already
    assert not first.done()
    module.go.set()
    assert first.result(SOON).status == "cancelled"
    assert tested.cancel("first").result(SOON) is False
    assert tested.cancel("nobody").result(SOON) is False
    assert tested.submit(graph).result(SOON).status == "done"
    tested.close()


def test_close_serves_what_is_open():
    graph, module = one_stage(), Step()
    tested = started(graph, module)
    answers = [tested.submit(graph) for _ in range(20)]
    tested.close()
    assert [answer.result(0).status for answer in answers] == ["done"] * 20


def test_close_with_cancel_ends_what_is_open():
    graph, module = one_stage(), Gate()
    tested = started(graph, module)
    running, waiting = tested.submit(graph), tested.submit(graph)
    assert module.began.wait(SOON)
    closer = threading.Thread(target=tested.close, kwargs={"cancel": True})
    closer.start()
    assert waiting.result(SOON).status == "cancelled"
    assert not running.done()
    module.go.set()
    closer.join(SOON)
    assert not closer.is_alive()
    assert running.result(0).status == "cancelled"


def test_a_closed_engine_takes_nothing_and_may_be_closed_again():
    graph = one_stage()
    tested = started(graph, Step())
    tested.close()
    tested.close()
    for use in (lambda: tested.submit(graph), lambda: tested.cancel("a"), tested.start, lambda: tested.run([])):
        with pytest.raises(RequestError):
            use()


def test_an_engine_takes_requests_only_once_it_serves():
    graph = one_stage()
    tested = engine(graph, ONE)
    with pytest.raises(RequestError, match=r"call start\(\) first"):
        tested.submit(graph)
    with pytest.raises(RequestError, match=r"call start\(\) first"):
        tested.cancel("a")
    tested.close()


def test_a_serving_engine_cannot_be_started_or_run_again():
    with live(one_stage(), {"s": Step()}, ONE) as tested:
        with pytest.raises(RequestError, match="running already"):
            tested.start()
        with pytest.raises(RequestError, match="running already"):
            tested.run([])


def test_leaving_the_context_by_an_exception_cancels():
    graph, module = one_stage(), Gate()
    with pytest.raises(KeyError), live(graph, {"s": module}, ONE) as tested:
        running, waiting = tested.submit(graph), tested.submit(graph)
        assert module.began.wait(SOON)
        waiting.add_done_callback(lambda answer: module.go.set())  # the cancelled one lets the other go
        raise KeyError
    assert [running.result(0).status, waiting.result(0).status] == ["cancelled", "cancelled"]


def test_a_duplicate_id_fails_its_own_future_alone():
    graph, module = one_stage(), Gate()
    tested = started(graph, module)
    first, second = tested.submit(graph, id="a"), tested.submit(graph, id="a")
    with pytest.raises(RequestError, match="'a' is already being served"):
        second.result(SOON)
    module.go.set()
    assert first.result(SOON).status == "done"
    assert tested.submit(graph, id="a").result(SOON).status == "done"  # the id is free again
    tested.close()


def test_a_graph_that_is_not_served_fails_its_future():
    graph = one_stage()
    with live(graph, {"s": Step()}, ONE) as tested:
        with pytest.raises(neustream.GraphError, match="'elsewhere' is in no pool"):
            tested.submit(Graph("other", Stage("elsewhere"))).result(SOON)
        assert tested.submit(graph).result(SOON).status == "done"


@dataclass(frozen=True)
class Breaks:
    """Breaks its contract once a request named "bad" is there."""

    def decide(self, view):
        for job in view.jobs:
            if job.id == "bad":
                return Decision([job, job])
        return FCFS().decide(view)


def test_a_policy_that_breaks_its_contract_ends_a_replay_and_its_engine():
    graph = one_stage()
    tested = engine(graph, ONE, Breaks())
    with pytest.raises(PolicyError, match="'Breaks' chose a job twice"):
        tested.run([request("good", graph), request("bad", graph)])
    for again in (lambda: tested.run([]), lambda: tested.start(), lambda: tested.submit(graph)):
        with pytest.raises(RequestError):
            again()


def test_an_interrupt_ends_a_serving_engine():
    graph, module = one_stage(), Gate()
    tested = started(graph, module)
    running, waiting = tested.submit(graph), tested.submit(graph)
    assert module.began.wait(SOON)
    tested.interrupt()
    assert waiting.result(SOON).status == "cancelled"
    module.go.set()
    assert running.result(SOON).status == "cancelled"
    tested.close()


def test_two_workers_serve_at_the_same_time():
    graph = one_stage()
    meet = threading.Barrier(2)
    module = Step(lambda job: {"place": meet.wait(SOON)})  # a step ends only while another runs beside it
    tested = started(graph, module, workers=2)
    answers = [tested.submit(graph) for _ in range(2)]
    assert sorted(answer.result(SOON).output["place"] for answer in answers) == [0, 1]
    tested.close()


def test_stages_of_two_pools_in_real_time():
    graph = draw_and_decode(max_batch=4, decode_batch=4)
    draw = Step(lambda job: {"x": job.state.get("x", 0) + 1})
    decode = Step(lambda job: {"image": job.state["x"]})
    profiles = {"draw": table("draw", *[0.001] * 4), "decode": table("decode", *[0.001] * 4)}
    scheduler = Scheduler([Pool("first", ("draw",)), Pool("second", ("decode",))], FCFS(), profiles)
    executors = {"first": ThreadExecutor({"draw": draw}), "second": ThreadExecutor({"decode": decode})}
    with Engine(Member(scheduler, executors), WallClock()) as tested:
        answers = [tested.submit(graph, {"steps": steps}) for steps in (3, 0, 1, 5) if steps]
        assert [answer.result(SOON).output["image"] for answer in answers] == [3, 1, 5]


def test_steps_of_a_request_see_what_earlier_ones_returned():
    graph = draw_and_decode()
    draw = Step(lambda job: {"seen": [*job.state.get("seen", []), len(job.state)]})
    decode = Step(lambda job: {"seen": job.state["seen"]})
    with live(graph, {"draw": draw, "decode": decode}, TOY) as tested:
        assert tested.submit(graph, {"steps": 3}).result(SOON).output == {"seen": [0, 1, 1]}


def test_requests_without_steps_get_an_empty_output():
    graph = Graph("only a loop", loop(Stage("s"), times=lambda job: job.params["steps"]))
    with live(graph, {"s": Step()}, ONE) as tested:
        result = tested.submit(graph, {"steps": 0}).result(SOON)
    assert (result.status, result.on_time, result.output) == ("done", True, {})


def test_futures_can_be_awaited():
    graph = one_stage(max_batch=4)
    profiles = {"s": table("s", *[0.001] * 4)}

    async def ask(tested):
        futures = [asyncio.wrap_future(tested.submit(graph, id=f"r{at}")) for at in range(10)]
        return await asyncio.gather(*futures)

    with live(graph, {"s": Step()}, profiles) as tested:
        results = asyncio.run(ask(tested))
    assert [result.output["out"] for result in results] == [f"r{at}" for at in range(10)]


def test_giving_up_an_await_leaves_the_engine_alone():
    graph, module = one_stage(), Gate()

    async def give_up(tested):
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(asyncio.wrap_future(tested.submit(graph)), 0.001)
        module.go.set()
        return await asyncio.wrap_future(tested.submit(graph))

    with live(graph, {"s": module}, ONE) as tested:
        assert asyncio.run(give_up(tested)).status == "done"


# -- the same trace on both clocks ------------------------------------------------------------------------

DRAW, DECODE = 0.04, 0.02  # seconds of a step, whatever its batch


def clumps(graph):
    """Requests in two clumps; each is served to its end before the next comes.

    They arrive in the middle of steps, so that it does not matter if real steps take a little longer.
    """
    out = []
    for clump, steps in enumerate([(3, 1, 2, 2, 1), (2, 1, 1, 4, 0)]):
        for at, (offset, count) in enumerate(zip((0.0, 0.5, 0.5, 1.5, 1.5), steps, strict=True)):
            slo = SLO(1.2 * DRAW if at == 3 else 100.0)  # the fourth is hopeless
            out.append(Request(f"r{clump}{at}", graph, 0.6 * clump + offset * DRAW, slo, {"steps": count}))
    return out


@pytest.mark.parametrize(
    "policy", [FCFS(), EDF(), Static(), Serial(), NeuStream(slo_scale=3.0)], ids=lambda policy: type(policy).__name__
)
def test_both_clocks_give_the_same_steps(policy):
    graph = draw_and_decode(max_batch=2, decode_batch=2)
    profiles = {"draw": table("draw", DRAW, DRAW), "decode": table("decode", DECODE, DECODE)}
    modules = {"draw": Slow(DRAW), "decode": Slow(DECODE)}
    simulated, served = EventLog(), EventLog()
    expected = engine(graph, profiles, policy, observers=[simulated]).run(clumps(graph))
    real = live(graph, modules, profiles, policy=policy, observers=[served])
    report = real.run(clumps(graph))
    real.close()
    assert batches(served) == batches(simulated)
    assert statuses(served) == statuses(simulated)
    assert report.submitted == expected.submitted == 10


def statuses(log):
    return {id: entry["status"] for id, entry in log.requests.items()}


class Slow(Step):
    def __init__(self, seconds):
        super().__init__()
        self.seconds = seconds

    def step(self, jobs):
        time.sleep(self.seconds)
        return super().step(jobs)


def test_a_report_of_the_callers_own_is_filled():
    graph, mine = one_stage(), Report()
    assert engine(graph, ONE).run([request("a", graph)], mine) is mine
    assert mine.submitted == mine.counts["on_time"] == 1


def test_a_graph_of_one_seq_is_served():
    graph = Graph("two", seq(Stage("a"), Stage("b", emits=True)))
    report = engine(graph, {"a": table("a", 1.0), "b": table("b", 2.0)}).run([request("r", graph)])
    assert report.duration == 3.0


def test_an_interrupt_does_not_wait_for_arrivals_to_come():
    """The next request is an hour away; the engine can then serve another workload."""
    graph = Graph("g", Stage("a"))
    profiles = {"a": TableProfile("a", [1], [0.001])}
    scheduler = Scheduler([Pool("gpu", ("a",))], FCFS(), profiles)
    engine = Engine(Member(scheduler, {"gpu": ProfiledExecutor()}), WallClock())
    stop = threading.Timer(0.05, engine.interrupt)
    stop.start()
    report = engine.run([Request("now", graph), Request("later", graph, 3600.0)])
    stop.join()
    assert report.interrupted and report.counts["on_time"] == 1 and report.submitted == 1
    again = engine.run([Request("another", graph)])
    assert not again.interrupted and again.counts["on_time"] == 1
