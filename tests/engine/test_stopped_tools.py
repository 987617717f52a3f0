"""Calls of tools whose request ends midway: an `async def` is cancelled, and its seat is free at once."""

from __future__ import annotations

import asyncio
import threading

import pytest

from neustream import Engine, Graph, Member, Request, Scheduler, ToolExecutor, VirtualClock, WallClock, par, seq, tool
from neustream.config.agent import ToolConfig
from neustream.core.events import Ended
from neustream.engine.events import Finished
from neustream.engine.tooling import pools_of, profiles_of
from neustream.experiment.tool_times import SimulatedTool

LIMIT_S = 30


class Search:
    """A tool that waits for ever; it tells when it has begun, and when it was cancelled."""

    def __init__(self):
        self.begun, self.cancelled, self.calls = threading.Semaphore(0), threading.Semaphore(0), 0

    async def __call__(self, given):
        self.calls += 1
        self.begun.release()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            self.cancelled.release()
            raise


def serving(graph, told=()):
    tools = list(graph.stages.values())
    scheduler = Scheduler(pools_of(tools), {}, profiles_of(tools))
    executors = {f"tool {stage.name}": ToolExecutor({stage.name: stage.tool}) for stage in tools}
    return Engine(Member(scheduler, executors), WallClock(), told)


@pytest.mark.parametrize("options", [{}, {"retries": 5}, {"timeout_s": 600.0}, {"timeout_s": 600.0, "retries": 5}])
def test_a_call_whose_request_is_cancelled_is_cancelled_and_not_tried_again(options):
    search = Search()
    graph = Graph("g", tool("search", search, concurrency=1, **options))
    with serving(graph) as engine:
        for _ in range(5):  # as often as a failing stage is passed over
            answer = engine.submit(graph)
            assert search.begun.acquire(timeout=LIMIT_S), "the one seat is free again"
            assert answer.cancel()
            assert search.cancelled.acquire(timeout=LIMIT_S)
    assert search.calls == 5


def test_closing_without_waiting_cancels_calls():
    search = Search()
    graph = Graph("g", tool("search", search))
    engine = serving(graph)
    engine.__enter__()
    answers = [engine.submit(graph) for _ in range(3)]
    for _ in answers:
        assert search.begun.acquire(timeout=LIMIT_S)
    engine.close(cancel=True)
    assert [answer.result(LIMIT_S).status for answer in answers] == ["cancelled"] * 3
    assert not [thread for thread in threading.enumerate() if thread.name == "neustream-tools"]


def test_the_branches_that_lost_are_cancelled():
    slow = Search()

    async def fast(given):
        while slow.calls < 2:
            await asyncio.sleep(0.001)
        return {"found": 1}

    graph = Graph("g", par(a=tool("slow", slow), b=tool("fast", fast), c=tool("slower", slow), policy="first"))
    with serving(graph) as engine:
        assert engine.submit(graph).result(LIMIT_S).output == {"b": {"found": 1}}
        for _ in range(2):
            assert slow.cancelled.acquire(timeout=LIMIT_S)


def test_a_call_that_does_not_stop_keeps_its_seat_until_it_is_back():
    """Its request is over all the same; what it returns in the end is for nobody."""
    begun, go = threading.Semaphore(0), threading.Event()

    async def stubborn(given):
        begun.release()
        while not go.is_set():
            try:
                await asyncio.sleep(0.001)
            except asyncio.CancelledError:
                begun.release()
        return {"found": given.params["n"]}

    graph = Graph("g", tool("search", stubborn, concurrency=1))
    with serving(graph) as engine:
        first, second = engine.submit(graph, {"n": 1}), engine.submit(graph, {"n": 2})
        assert begun.acquire(timeout=LIMIT_S)
        assert first.cancel()
        assert begun.acquire(timeout=LIMIT_S), "it was told"
        assert not second.done()
        go.set()
        assert second.result(LIMIT_S).output == {"found": 2}


def test_cancelled_before_its_task_has_begun_it_is_never_called():
    """Told to stop in the same turn of the tools' event loop in which it is to begin."""
    search, busy, go = Search(), threading.Semaphore(0), threading.Event()

    async def block(given):
        busy.release()
        assert go.wait(LIMIT_S)  # the event loop itself
        return {}

    tools = [tool("block", block), tool("search", search)]
    executor = ToolExecutor({stage.name: stage.tool for stage in tools})
    scheduler = Scheduler(pools_of(tools), {}, profiles_of(tools))
    with Engine(Member(scheduler, dict.fromkeys(scheduler.pools, executor)), WallClock()) as engine:
        blocked = engine.submit(Graph("one", tools[0]))
        assert busy.acquire(timeout=LIMIT_S)
        answer = engine.submit(Graph("two", tools[1]), id="r")
        assert engine.cancel("r").result(LIMIT_S)
        go.set()
        assert blocked.result(LIMIT_S).status == "done"
        assert answer.result(LIMIT_S).status == "cancelled"
    assert search.calls == 0


def test_how_long_a_call_takes_is_not_learnt_of_calls_that_were_stopped():
    """Whoever loses a race is stopped when another wins: it would seem to take no longer."""
    slow = Search()

    async def fast(given):
        while not slow.calls:
            await asyncio.sleep(0.001)
        slow.calls = 0
        return {}

    graph = Graph("g", par(a=tool("slow", slow, expect_s=60.0), b=tool("fast", fast, expect_s=60.0), policy="first"))
    with serving(graph) as engine:
        for _ in range(9):
            assert engine.submit(graph).result(LIMIT_S).status == "done"
            assert slow.cancelled.acquire(timeout=LIMIT_S)
        seen = engine.inspect(lambda members, now: set(members[0].scheduler.times.spread)).result(LIMIT_S)
    assert seen == {"fast"}


def test_a_plain_function_is_not_tried_again_once_its_request_is_over():
    begun, go, calls = threading.Semaphore(0), threading.Event(), []

    def search(given):
        calls.append(given.id)
        begun.release()
        assert go.wait(LIMIT_S)
        raise ValueError("nothing found")

    graph = Graph("g", tool("search", search, concurrency=1, retries=5))
    with serving(graph) as engine:
        answer = engine.submit(graph, id="r")
        assert begun.acquire(timeout=LIMIT_S)
        assert engine.cancel("r").result(LIMIT_S)
        engine.inspect(lambda members, now: None).result(LIMIT_S)  # behind what follows the cancelling
        settled = asyncio.run_coroutine_threadsafe(asyncio.sleep(0), loop_of(engine))
        settled.result(LIMIT_S)  # it was told, too
        go.set()
        assert answer.result(LIMIT_S).status == "cancelled"
    assert calls == ["r"]


def loop_of(engine):
    """The event loop that calls of tools are awaited on."""
    [executor] = engine.members[0].executors.values()
    return executor._awaits._loop


def test_an_executor_that_cannot_stop_a_step_harms_nobody(caplog):
    class Odd(ToolExecutor):
        def stop(self, id):
            raise OSError("no way to stop it")

    search = Search()
    tools = [tool("search", search), tool("fast", lambda given: {})]
    executor = Odd({stage.name: stage.tool for stage in tools})
    scheduler = Scheduler(pools_of(tools), {}, profiles_of(tools))
    with Engine(Member(scheduler, dict.fromkeys(scheduler.pools, executor)), WallClock()) as engine:
        engine.submit(Graph("one", tools[0]), id="r")
        assert search.begun.acquire(timeout=LIMIT_S)
        assert engine.cancel("r").result(LIMIT_S)
        assert engine.submit(Graph("two", tools[1])).result(LIMIT_S).status == "done"
        ToolExecutor.stop(executor, "r")
        assert search.cancelled.acquire(timeout=LIMIT_S)
    assert "pool 'tool search': request 'r' could not be stopped" in caplog.text


def engine_of(how, told):
    """Four requests of a quick tool and a slow one with one seat race: served, or simulated by a config's times."""
    seconds = {"slow": 60.0, "quick": 0.01}

    def made(name):
        async def call(given):
            await asyncio.sleep(seconds[name])
            return {}

        return call

    tools = [tool(name, made(name), concurrency=1, expect_s=seconds[name]) for name in seconds]
    scheduler = Scheduler(pools_of(tools), {}, profiles_of(tools))
    executors = {f"tool {stage.name}": ToolExecutor({stage.name: stage.tool}) for stage in tools}
    if how == "simulated":
        executors = {
            f"tool {name}": SimulatedTool(name, ToolConfig(latency_s=taken), 0) for name, taken in seconds.items()
        }
    clock = WallClock() if how == "served" else VirtualClock()
    graph = Graph("race", seq(par(a=tools[0], b=tools[1], policy="first"), tools[1]))
    return Engine(Member(scheduler, executors), clock, [told.append]), graph


@pytest.mark.parametrize("how", ["served", "simulated"])
def test_who_lost_a_race_frees_its_seat_at_once(how):
    told = []
    engine, graph = engine_of(how, told)
    requests = [Request(f"r{index}", graph, 0.001 * index) for index in range(4)]
    report = engine.run(requests)
    ends = [record.at for record in told if isinstance(record, Ended)]
    slow = [record for record in told if isinstance(record, Finished) and record.step.stage == "slow"]
    assert report.counts["on_time"] == 4 and max(ends) < 10.0, "nobody waited for a call of 60 s"
    assert slow and all(record.at - record.step.started_at < 10.0 for record in slow)
