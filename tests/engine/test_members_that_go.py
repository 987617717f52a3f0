"""Members that leave a running engine: their requests go elsewhere, or end."""

from __future__ import annotations

import asyncio
import threading
from collections import Counter
from concurrent.futures import Future

import pytest
from members import ONE, TOY, by_member, member, run, serving, until
from toys import Gate, Step, draw_and_decode, request, table

from neustream import (
    FCFS,
    Engine,
    EventLog,
    Graph,
    Member,
    Pool,
    ProfiledExecutor,
    RequestError,
    Scheduler,
    Stage,
    StageFailed,
    ThreadExecutor,
    ToolExecutor,
    VirtualClock,
    WallClock,
    seq,
)
from neustream.core.events import Given
from neustream.engine.events import Leave

# -- members that go ----------------------------------------------------------------------------------


def test_requests_that_wait_go_to_others_and_those_in_steps_end_there_or_follow():
    graph = draw_and_decode(max_batch=1)
    members = [member(name, graph, TOY) for name in "ab"]
    requests = [request(str(at), graph, steps=2) for at in range(4)]
    records = []
    log, report = run(members, requests, leave=[("a", 0.5)], observers=[records.append])
    assert report.counts["on_time"] == 4
    assert by_member(log) == dict.fromkeys("0123", "b")
    assert [step["jobs"] for step in log.steps if step["member"] == "a"] == [["0"]]
    given = [record for record in records if isinstance(record, Given)]
    assert [(record.id, record.at, record.member) for record in given] == [("2", 0.5, "a"), ("0", 1.0, "a")]
    assert Counter(id for step in log.steps for id in step["jobs"]) == dict.fromkeys("0123", 3)


def test_a_member_that_goes_alone_serves_what_it_has_and_nothing_more():
    _, report = run(
        [member("a")], [request("0", ONE), request("1", ONE), request("2", ONE, arrival=0.75)], leave=[("a", 0.5)]
    )
    assert report.counts["on_time"] == 2 and report.counts["failed"] == 1
    assert list(report.reasons) == ["request '2': member 'a' is to go"]


def test_when_none_is_left_requests_are_refused():
    _, report = run(
        [member("a"), member("b")], [request("0", ONE, 0.0), request("1", ONE, 5.0)], leave=[("a", 2.0), ("b", 3.0)]
    )
    assert report.counts["on_time"] == 1 and list(report.reasons) == ["request '1': no member is left"]


def test_who_cannot_go():
    with serving({"a": Step(), "b": Step()}) as engine:
        with pytest.raises(RequestError, match=r"no member 'c'; members: \['a', 'b'\]"):
            engine.remove("c").result(30)
        engine.remove("a").result(30)
        assert [each.name for each in engine.members] == ["b"]
        with pytest.raises(RequestError, match=r"no member 'a'; members: \['b'\]"):
            engine.remove("a").result(30)
        assert engine.submit(ONE).result(30).status == "done"
        assert list(engine.snapshot().members) == ["b"]
    with pytest.raises(RequestError, match="not serving"):
        engine.remove("b")


def test_a_member_goes_with_a_step_under_way():
    gates = {"a": Gate(), "b": Gate()}
    with serving(gates) as engine:
        answers = [engine.submit(ONE, id=str(at)) for at in range(6)]
        assert gates["a"].began.wait(30) and gates["b"].began.wait(30)
        gone = engine.remove("a")
        until(lambda: engine.snapshot().members["a"].leaving)
        until(lambda: engine.snapshot().members["a"].open == 1)
        assert not gone.done()
        gates["b"].go.set()
        gates["a"].go.set()
        gone.result(30)
        assert [answer.result(30).status for answer in answers] == ["done"] * 6
        assert gates["a"].sizes == [1] and gates["b"].sizes == [1] * 5
    assert not engine.snapshot().members.get("a")


class Keeper:
    """A module that counts the steps of each request by itself; `out` of them. `moves` if it can be left."""

    def __init__(self):
        self.kept, self.released = {}, []

    def load(self, device):
        pass

    def step(self, inputs):
        for one in inputs:
            self.kept[one.id] = self.kept.get(one.id, 0) + 1
        return [{"count": self.kept[one.id]} for one in inputs]

    def release(self, id):
        self.kept.pop(id, None)
        self.released.append(id)


class Movable(Keeper):
    def export(self, given):
        return self.kept[given.id]

    def adopt(self, given, piece):
        self.kept[given.id] = piece


class Stuck(Movable):
    def export(self, given):
        raise StageFailed("not now")


class Proud(Movable):
    def adopt(self, given, piece):
        raise StageFailed("not invented here")


def between(first, second, steps=6):
    """A request of `steps` draws, whose member goes after its first; its result, and the two members' names.

    Draws are held up by their gate until the member is told to go.
    """
    held, go = threading.Event(), threading.Event()
    graph = Graph("count", seq(*[Stage(f"n{at}", emits=at == steps - 1) for at in range(steps)]))
    profiles = {stage: table(stage, 0.001) for stage in graph.stages}

    def gated(module):
        step = module.step

        def slow(inputs):
            held.set()
            assert go.wait(30)
            return step(inputs)

        module.step = slow
        return dict.fromkeys(graph.stages, module)

    members = [
        member(name, graph, profiles, executor=ThreadExecutor(gated(module)))
        for name, module in (("a", first), ("b", second))
    ]
    log = EventLog()
    with Engine(members, WallClock(), [log]) as engine:
        answer = engine.submit(graph, id="x")
        assert held.wait(30)
        gone = engine.remove("a")
        until(lambda: engine.snapshot().members["a"].leaving)
        go.set()
        result = answer.result(30)
        gone.result(30)
    return result, Counter(step["member"] for step in log.steps)


def test_what_modules_keep_goes_along():
    first, second = Movable(), Movable()
    result, steps = between(first, second)
    assert result.output == {"count": 6} and steps == {"a": 1, "b": 5}
    until(lambda: first.kept == second.kept == {})  # a member that went lets go in its own time
    assert first.released[0] == "x"


@pytest.mark.parametrize("first", [Keeper, Stuck])
def test_a_request_whose_modules_cannot_part_with_it_ends_where_it_is(first):
    result, steps = between(first(), Movable())
    assert result.output == {"count": 6} and steps == {"a": 6}


def test_a_member_that_cannot_go_on_from_what_was_kept_fails_that_request():
    result, _ = between(Movable(), Proud())
    assert result.status == "failed" and "not invented here" in result.reason


def two_pools(name, first, second, **options):
    """A member with the stage "s" on one pool and "n0", "n1", "n2" on another, each with its executor."""
    pools = [Pool("one", ("s",)), Pool("two", tuple(STEPS.stages), **options)]
    policies = {pool.name: FCFS() for pool in pools if pool.concurrency is None}
    profiles = {stage: table(stage, 1.0) for stage in ("s", *STEPS.stages)}
    return Member(Scheduler(pools, policies, profiles), {"one": first, "two": second}, name)


class ByName:
    """A router: a request goes to the member that its id begins with."""

    def choose(self, loads, request):
        return [load.name for load in loads].index(request.id[0])


STEPS = Graph("steps", seq(Stage("n0"), Stage("n1"), Stage("n2", emits=True)))


class Hung(ProfiledExecutor):
    """Steps never end, and nothing that it is asked is answered."""

    def start(self, batch, clock):
        pass

    def export(self, given, worker=0):
        return Future()


@pytest.mark.parametrize("arrival", [0.0, 0.8], ids=["held before", "held after"])
def test_a_worker_that_is_lost_keeps_no_request_that_could_go_on(arrival):
    """It is asked what it keeps of a request that is to move, and never answers."""
    clock, log = VirtualClock(), EventLog()
    members = [two_pools("a", Hung(), ProfiledExecutor()), two_pools("b", ProfiledExecutor(), ProfiledExecutor())]
    engine = Engine(members, clock, [log], router=ByName(), step_timeout_s=1.5)
    for drive in engine._loop.drives:
        drive.deciding.forgiving = True  # as when callers are served
    clock.post(Leave("a", Future()), arrival + 0.1)
    report = engine.run([request("a lost", ONE), request("a held", STEPS, arrival)])
    assert report.counts["failed"] == 1 == report.counts["on_time"]
    assert "did not come back within 1.500 s" in next(iter(report.reasons))
    assert [step["member"] for step in log.steps if step["jobs"] == ["a held"]] == ["a"] * 3
    starts = [step["start"] for step in log.steps if step["jobs"] == ["a held"]]
    assert starts == pytest.approx([arrival, max(arrival + 1, 1.5), max(arrival + 2, 2.5)])
    assert [member.name for member in engine.members] == ["b"]


class Mute(ProfiledExecutor):
    """Its steps end, and what it is asked is not answered."""

    def export(self, given, worker=0):
        return Future()


def test_an_executor_that_never_tells_what_it_keeps():
    clock, log = VirtualClock(), EventLog()
    members = [two_pools("a", Mute(), Mute()), two_pools("b", ProfiledExecutor(), ProfiledExecutor())]
    engine = Engine(members, clock, [log], step_timeout_s=5.0)
    clock.post(Leave("a", Future()), 0.5)
    report = engine.run([request("x", STEPS)])
    assert report.counts["on_time"] == 1
    assert [(step["member"], step["start"]) for step in log.steps] == [("a", 0.0), ("a", 6.0), ("a", 7.0)]


def test_a_member_with_tools_goes():
    async def call(given):
        tools.began.set()
        while not tools.go.is_set():
            await asyncio.sleep(0.001)
        return {"at": given.stage}

    tools = Gate()
    calls = dict.fromkeys(STEPS.stages, call)
    members = [two_pools(name, ThreadExecutor({"s": Step()}), ToolExecutor(calls), concurrency=4) for name in "ab"]
    log = EventLog()
    with Engine(members, WallClock(), [log]) as engine:
        answers = [engine.submit(STEPS, id=str(at)) for at in range(12)]
        assert tools.began.wait(30)
        gone = engine.remove("a")
        until(lambda: engine.snapshot().members["a"].leaving)
        tools.go.set()
        gone.result(30)
        assert [answer.result(30).output for answer in answers] == [{"at": "n2"}] * 12
    steps = Counter(id for step in log.steps for id in step["jobs"])
    assert steps == {str(at): 3 for at in range(12)}
    assert {step["stage"] for step in log.steps if step["member"] == "a"} == {"n0"}
