"""Pools without a policy: jobs that just start, up to so many at once; tools that are called for real."""

from __future__ import annotations

import asyncio
import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toys import Step, batches, ends, table

from neustream import (
    FCFS,
    SLO,
    Engine,
    EventLog,
    Graph,
    GraphError,
    Member,
    PolicyError,
    Pool,
    ProfiledExecutor,
    Request,
    RequestError,
    Scheduler,
    Stage,
    ThreadExecutor,
    ToolExecutor,
    VirtualClock,
    WallClock,
    loop,
    seq,
)
from neustream.core.kv_cache import KVCache

ALONE = Graph("search", Stage("search", max_batch=8, emits=True))
PROFILE = {"search": table("search", *[1.0] * 8)}


def scheduler(concurrency=2):
    return Scheduler([Pool("tools", ("search",), concurrency=concurrency)], {}, PROFILE)


def simulated(arrivals, concurrency=2):
    """The log and the report of requests at these arrivals, each of one call of a second."""
    log = EventLog()
    member = Member(scheduler(concurrency), {"tools": ProfiledExecutor()})
    requests = [Request(str(at), ALONE, arrival) for at, arrival in enumerate(sorted(arrivals))]
    return log, Engine(member, VirtualClock(), [log]).run(requests)


def serving(tool, concurrency=2, **options):
    member = Member(scheduler(concurrency), {"tools": ToolExecutor({"search": tool})})
    return Engine(member, WallClock(), **options)


# -- who starts ---------------------------------------------------------------------------------------


def test_jobs_start_in_order_up_to_so_many_at_once_each_alone_and_no_policy_is_asked():
    log, report = simulated([0, 0, 0, 0.25, 0.5], concurrency=2)
    assert [(step["jobs"], step["start"]) for step in log.steps] == [
        (["0"], 0),
        (["1"], 0),
        (["2"], 1),
        (["3"], 1),
        (["4"], 2),
    ]
    assert report.decision.count == 0 and report.counts["on_time"] == 5
    assert {step["worker"] for step in log.steps} == {0, 1}


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 20), min_size=1, max_size=30), st.integers(1, 5))
def test_never_more_at_once_and_never_fewer_than_could_be(arrivals, concurrency):
    log, _ = simulated([at / 4 for at in arrivals], concurrency)
    free = [0.0] * concurrency  # when each seat is free: what a list of seats would do
    for step, arrival in zip(log.steps, sorted(arrivals), strict=True):
        seat = min(range(concurrency), key=free.__getitem__)
        assert step["start"] == max(free[seat], arrival / 4)
        free[seat] = step["start"] + 1
    starts = sorted(log.steps, key=lambda step: (step["start"], int(step["jobs"][0])))
    assert [step["jobs"][0] for step in starts] == [str(at) for at in range(len(arrivals))]


def test_a_request_goes_between_a_device_and_tools():
    think, call = Stage("think", max_batch=4), Stage("search")
    done = Stage("answer", emits=True)
    graph = Graph("agent", seq(loop(seq(think, call), times=lambda job: 3), done))
    pools = [Pool("gpu", ("think", "answer")), Pool("tools", ("search",), concurrency=8)]
    profiles = {"think": table("think", 0.1, 0.1, 0.1, 0.1), "answer": table("answer", 0.1), **PROFILE}
    log = EventLog()
    executors = dict.fromkeys(("gpu", "tools"), ProfiledExecutor())
    member = Member(Scheduler(pools, {"gpu": FCFS()}, profiles), executors)
    report = Engine(member, VirtualClock(), [log]).run([Request(str(at), graph, 0.0, SLO(60.0)) for at in range(4)])
    assert report.counts["on_time"] == 4
    assert batches(log).count(("think", ["0", "1", "2", "3"])) == 3  # they came back at the same instant
    assert sum(stage == "search" for stage, _ in batches(log)) == 12
    assert max(ends(log).values()) == pytest.approx(3 * 1.1 + 4 * 0.1)


def test_one_policy_for_all_pools_is_not_for_those_that_ask_none():
    pools = [Pool("gpu", ("think",)), Pool("tools", ("search",), concurrency=1)]
    rule = FCFS()
    made = Scheduler(pools, rule, {"think": table("think", 1.0), **PROFILE})
    assert made.policies == {"gpu": rule}


@pytest.mark.parametrize("count", [0, -1, True, 1.5, "4"])
def test_a_concurrency_is_a_whole_number_from_1(count):
    with pytest.raises(GraphError, match=r"pool 'tools': concurrency must be 1 or more, got"):
        scheduler(count)


@pytest.mark.parametrize("other", [{"workers": 2}, {"sticky": True}, {"kv_caches": {"llm": KVCache(4)}}])
def test_what_does_not_go_with_a_concurrency(other):
    with pytest.raises(GraphError, match=r"pool 'tools': concurrency is for pools without a policy"):
        Scheduler([Pool("tools", ("search",), concurrency=2, **other)], {}, PROFILE)


def test_a_policy_for_a_pool_that_asks_none():
    with pytest.raises(PolicyError, match=r"pool 'tools' has a concurrency: .* no policy is asked"):
        Scheduler([Pool("tools", ("search",), concurrency=2)], {"tools": FCFS()}, PROFILE)


def test_a_tool_is_a_function():
    with pytest.raises(RequestError, match=r"stage 'search': a tool is a function, got Step"):
        ToolExecutor({"search": Step()})


# -- for real -----------------------------------------------------------------------------------------


def test_64_coroutines_are_awaited_at_once_on_one_thread():
    threads, together = set(), asyncio.Event()

    async def search(input):
        threads.add(threading.current_thread())
        search.begun += 1
        if search.begun == 64:
            together.set()
        await together.wait()
        return {"found": input.params["query"]}

    search.begun = 0
    with serving(search, 64) as engine:
        answers = [engine.submit(ALONE, {"query": at}) for at in range(64)]
        assert [answer.result(30).output["found"] for answer in answers] == list(range(64))
    assert len(threads) == 1 and not threads.pop().is_alive()


def test_functions_run_at_once_on_threads():
    together = threading.Barrier(4)

    def search(input):
        together.wait(30)
        return {"found": input.id}

    with serving(search, 4) as engine:
        answers = [engine.submit(ALONE, id=str(at)) for at in range(12)]
        assert [answer.result(30).output["found"] for answer in answers] == [str(at) for at in range(12)]


class Callable:
    async def __call__(self, input):
        return {"found": "by an object"}


def test_an_object_with_an_async_call_is_a_tool():
    with serving(Callable()) as engine:
        assert engine.submit(ALONE).result(30).output == {"found": "by an object"}


def bad():
    def plain(input):
        raise input.params["error"]

    async def awaited(input):
        await asyncio.sleep(0)
        raise input.params["error"]

    return [plain, awaited]


class Silent(Exception):
    def __str__(self):
        raise ValueError("no words")


@pytest.mark.parametrize("tool", bad(), ids=["function", "coroutine"])
@pytest.mark.parametrize(
    "error",
    [ValueError("nothing found"), SystemExit(3), KeyboardInterrupt(), Silent()],
    ids=lambda one: type(one).__name__,
)
def test_what_a_tool_raises_fails_its_own_request(tool, error):
    async def search(input):
        return {"found": 1}

    stages = {"bad": tool, "search": search}
    profiles = {"bad": table("bad", 0.1), **PROFILE}
    made = Scheduler([Pool("tools", ("bad", "search"), concurrency=4)], {}, profiles)
    with Engine(Member(made, {"tools": ToolExecutor(stages)}), WallClock()) as engine:
        failed = [engine.submit(Graph("bad", Stage("bad", emits=True)), {"error": error}) for _ in range(1)]
        good = [engine.submit(ALONE) for _ in range(4)]
        for answer in failed:
            result = answer.result(30)
            assert result.status == "failed" and result.reason.startswith("stage 'bad': ")
        assert [answer.result(30).status for answer in good] == ["done"] * 4


@pytest.mark.parametrize("result", [None, [], "text"])
def test_a_tool_returns_a_mapping(result):
    async def search(input):
        return result

    with serving(search) as engine:
        reason = engine.submit(ALONE).result(30).reason
    assert reason == f"stage 'search' must return one dict per job, got {type(result).__name__}"


class Unread(dict):
    """What raises as it is read."""

    def keys(self):
        raise OSError("gone")

    __iter__ = keys


@pytest.mark.parametrize("plain", [True, False], ids=["function", "coroutine"])
def test_a_result_that_cannot_be_kept_fails_its_own_request(plain):
    def now(input):
        return Unread(found=1) if input.params.get("odd") else {"found": 1}

    async def later(input):
        return now(input)

    with serving(now if plain else later) as engine:
        odd, good = engine.submit(ALONE, {"odd": True}), engine.submit(ALONE)
        assert odd.result(30).reason == "stage 'search': what it returned cannot be read: OSError: gone"
        assert good.result(30).status == "done"


def test_a_plain_function_that_returns_a_coroutine():
    async def later():
        return {}

    with serving(lambda input: later()) as engine:
        reason = engine.submit(ALONE).result(30).reason
    assert reason == "stage 'search': it returned a coroutine: make it an `async def`"


def test_no_tool_for_a_stage():
    member = Member(scheduler(), {"tools": ToolExecutor({"look": print})})
    with Engine(member, WallClock()) as engine:
        reason = engine.submit(ALONE).result(30).reason
    assert reason == "stage 'search': no tool for it; tools: ['look']"


def test_a_tool_in_a_pool_that_batches():
    made = Scheduler([Pool("gpu", ("search",))], FCFS(), PROFILE)
    for id in "ab":
        made.submit(Request(id, ALONE), 0.0)
    clock, executor = WallClock(), ToolExecutor({"search": print})
    executor.start(made.next_batch("gpu", 0.0), clock)
    [done] = clock.wait()
    assert str(done.results) == "stage 'search': a tool is called for one request at a time, got 2"


class Held:
    """A tool whose calls wait until `go`."""

    def __init__(self):
        self.began, self.go = threading.Semaphore(0), threading.Event()

    def __call__(self, input):
        self.began.release()
        assert self.go.wait(30)
        return {}


def test_a_request_that_is_cancelled_in_a_call_ends_after_it():
    tool = Held()
    with serving(tool) as engine:
        answers = [engine.submit(ALONE, id=str(at)) for at in range(3)]
        assert tool.began.acquire(timeout=30) and tool.began.acquire(timeout=30)
        assert engine.cancel("2").result(30)  # it waits: at once
        assert answers[2].result(30).status == "cancelled"
        assert engine.cancel("0").result(30) and not answers[0].done()
        tool.go.set()
        assert [answer.result(30).status for answer in answers] == ["cancelled", "done", "cancelled"]


def test_closing_waits_for_calls():
    tool = Held()
    engine = serving(tool).start()
    answers = [engine.submit(ALONE) for _ in range(3)]
    assert tool.began.acquire(timeout=30) and tool.began.acquire(timeout=30)
    tool.go.set()
    engine.close(cancel=True)
    assert [answer.result(0).status for answer in answers[2:]] in (["cancelled"], ["done"])
    assert all(answer.done() for answer in answers)


def test_close_cannot_be_called_in_a_call():
    told = []

    def search(input):
        with pytest.raises(RequestError, match="waits for this thread"):
            engine.close()
        told.append(1)
        return {}

    async def awaited(input):
        return search(input)

    for function in (search, awaited):
        engine = serving(function).start()
        assert engine.submit(ALONE).result(30).status == "done"
        engine.close()
    assert told == [1, 1]


def test_calls_that_do_not_come_back_take_their_seats_with_them():
    tool = Held()
    with serving(tool, concurrency=2, step_timeout_s=0.02) as engine:
        answers = [engine.submit(ALONE, id=str(at)) for at in range(3)]
        reasons = [answer.result(30).reason for answer in answers]
        assert all("did not come back within" in reason for reason in reasons)
        assert reasons[2].startswith("pool 'tools' is closed")
        assert list(engine.snapshot().closed) == ["tools"]
        tool.go.set()


def test_a_closed_executor_takes_nothing():
    async def search(input):
        return {}

    executor = ToolExecutor({"search": search})
    executor.close()
    made = scheduler()
    with Engine(Member(made, {"tools": executor}), WallClock()) as engine:
        reason = engine.submit(ALONE).result(30).reason
    assert reason == "stage 'search': its step could not start: this executor is closed"


def test_tools_beside_modules():
    """One request: a module's step, then a tool of its result, then a module's again."""
    graph = Graph("rag", seq(Stage("write", max_batch=4), Stage("search"), Stage("answer", emits=True)))
    profiles = {"write": table("write", *[0.01] * 4), "answer": table("answer", 0.01), **PROFILE}
    pools = [Pool("gpu", ("write", "answer")), Pool("tools", ("search",), concurrency=16)]

    async def search(input):
        await asyncio.sleep(0)
        return {"hits": input.state["query"] * 2}

    modules = {
        "write": Step(lambda one: {"query": one.params["topic"] + "?"}),
        "answer": Step(lambda one: {"out": one.state["hits"] + "!"}),
    }
    executors = {"gpu": ThreadExecutor(modules), "tools": ToolExecutor({"search": search})}
    with Engine(Member(Scheduler(pools, FCFS(), profiles), executors), WallClock()) as engine:
        answers = [engine.submit(graph, {"topic": str(at)}) for at in range(20)]
        assert [a.result(30).output["out"] for a in answers] == [f"{at}?{at}?!" for at in range(20)]
