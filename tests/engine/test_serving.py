"""The loop serves callers from threads: answers, cancelling, faults, the end."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pytest
from started import ONE, SOON, TOY, started
from toys import Gate, Step, draw_and_decode, engine, live, one_stage, request, table

import neustream.engine.tally
from neustream import (
    FCFS,
    SLO,
    Decision,
    Engine,
    EventLog,
    Graph,
    Member,
    PolicyError,
    Pool,
    RequestError,
    Scheduler,
    Stage,
    ThreadExecutor,
    WallClock,
    loop,
    seq,
)

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
