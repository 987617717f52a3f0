"""Several members on one clock: what is told of them, what callers ask of them, and what becomes of those that go."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import Counter
from concurrent.futures import Future
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toys import Gate, Step, adds_up, draw_and_decode, one_stage, request, table

from neustream import (
    EDF,
    FCFS,
    Engine,
    EventLog,
    Graph,
    GraphError,
    Member,
    Pool,
    Priced,
    ProfiledExecutor,
    Report,
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
from neustream.core.events import Ended, Given, Submitted
from neustream.engine.events import Finished, Leave

ONE = one_stage()
SLOW = {"s": table("s", 1.0)}
TOY = {"draw": table("draw", 1.0, 1.5), "decode": table("decode", 0.5)}


def member(name, graph=ONE, profiles=SLOW, policy=None, executor=None, **pool):
    scheduler = Scheduler([Pool("gpu", tuple(graph.stages), **pool)], policy or FCFS(), profiles)
    return Member(scheduler, {"gpu": executor or ProfiledExecutor()}, name)


def run(members, requests, *, leave=(), observers=()):
    """The log and the report; `leave`: who goes when."""
    log, clock = EventLog(), VirtualClock()
    engine = Engine(members, clock, [log, *observers])
    for name, at in leave:
        clock.post(Leave(name, Future()), at)
    return log, engine.run(requests)


def by_member(log):
    return {name: request.get("member") for name, request in log.requests.items()}


def serving(modules, **options):
    """An engine of members named by `modules`, each with modules of its own for the stage "s"."""
    members = [member(name, executor=ThreadExecutor({"s": module})) for name, module in modules.items()]
    return Engine(members, WallClock(), **options)


def until(condition):
    """Wait for what another thread does."""
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.001)


# -- several as one -----------------------------------------------------------------------------------


def test_two_members_serve_twice_as_much_and_records_name_them():
    records = []
    log, report = run(
        [member("a"), member("b")], [request(str(at), ONE) for at in range(10)], observers=[records.append]
    )
    assert report.duration == 5.0
    assert report.to_dict()["members"] == {name: {"ended": 5, "on_time": 5, "steps": 5, "busy_s": 5.0} for name in "ab"}
    named = [record for record in records if isinstance(record, Submitted | Ended | Finished)]
    assert Counter(record.member for record in named) == {"a": 15, "b": 15}
    names = {entry["args"]["name"] for entry in log.chrome()["traceEvents"] if entry["name"] == "process_name"}
    assert names == {"requests", "pool a/gpu", "pool b/gpu"}


def test_one_member_is_what_an_engine_is_without_others():
    graph = draw_and_decode()
    requests = [request(str(at), graph, arrival=at * 0.7, steps=1 + at % 3, total=9.0) for at in range(40)]
    _, plain = run(member("", graph, TOY), requests)
    _, named = run([member("only", graph, TOY)], requests)
    assert {**named.to_dict(), "decision_us": 0} == {**plain.to_dict(), "decision_us": 0}
    assert named.members["only"].ended == 40 and not plain.members


def test_executors_are_those_of_the_pools():
    with pytest.raises(RequestError, match=r"executors for \['cpu'\], but pools are \['gpu'\]"):
        Member(member("a").scheduler, {"cpu": ProfiledExecutor()})


POLICIES = {"fcfs": FCFS, "edf": EDF, "priced": Priced}


@pytest.mark.parametrize("policy", POLICIES)
@settings(max_examples=25, deadline=None)
@given(
    count=st.integers(1, 4),
    loads=st.lists(st.tuples(st.integers(0, 8), st.integers(1, 5), st.integers(1, 20)), min_size=1, max_size=25),
    going=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 10)), max_size=3),
)
def test_each_request_ends_once_whoever_goes(policy, count, loads, going):
    graph = draw_and_decode()
    members = [member(f"m{at}", graph, TOY, POLICIES[policy]()) for at in range(count)]
    records = []
    requests = [
        request(str(at), graph, arrival=float(arrival), steps=steps, total=float(total))
        for at, (arrival, steps, total) in enumerate(sorted(loads))
    ]
    leave = [(f"m{at}", when + 0.25) for at, when in going]
    log, report = run(members, requests, leave=leave, observers=[records.append])
    assert adds_up({"submitted": report.submitted, **report.counts}) and report.submitted == len(loads)
    ended = Counter(record.id for record in records if isinstance(record, Ended))
    assert all(times == 1 for times in ended.values())
    accepted = {record.id for record in records if isinstance(record, Submitted)}
    assert set(ended) == accepted
    steps = Counter(id for step in log.steps for id in step["jobs"])
    for at, (_, wanted, _) in enumerate(sorted(loads)):
        if log.requests.get(str(at), {}).get("status") == "done":
            assert steps[str(at)] == wanted + 1
    gone = {name for name, _ in leave}
    if count > len(gone):
        assert len(accepted) == len(loads)


def test_cancel_finds_the_member():
    gates = {"a": Gate(), "b": Gate()}
    with serving(gates) as engine:
        answers = [engine.submit(ONE, id=str(at)) for at in range(4)]
        assert gates["a"].began.wait(30) and gates["b"].began.wait(30)
        assert {name: one.open for name, one in engine.snapshot().members.items()} == {"a": 2, "b": 2}
        assert engine.cancel("3").result(30) and engine.cancel("2").result(30)
        assert not engine.cancel("9").result(30)
        for gate in gates.values():
            gate.go.set()
        assert [answer.result(30).status for answer in answers] == ["done", "done", "cancelled", "cancelled"]


def test_more_stages_for_one_member_or_for_all():
    more = {"t": table("t", 1.0)}
    with serving({"a": Step(), "b": Step()}) as engine:
        engine.add("gpu", more, member="b").result(30)
        with pytest.raises(GraphError, match="stage 't' of pool 'gpu' is served already"):
            engine.add("gpu", more, member="b").result(30)
        with pytest.raises(RequestError, match=r"no member 'c'; members: \['a', 'b'\]"):
            engine.add("gpu", more, member="c").result(30)
        engine.add("gpu", {"u": table("u", 1.0)}).result(30)
        assert [sorted(each.scheduler.pools["gpu"].stages) for each in engine.members] == [["s", "u"], ["s", "t", "u"]]


def test_a_member_whose_pools_are_closed_gets_nothing_while_another_can_serve():
    gates = {"a": Gate(), "b": Step()}
    with serving(gates, step_timeout_s=0.5) as engine:
        lost = engine.submit(ONE).result(30)
        assert "did not come back within" in lost.reason
        assert list(engine.snapshot().closed) == ["a/gpu"]
        assert [engine.submit(ONE).result(30).status for _ in range(3)] == ["done"] * 3
        engine.remove("b").result(30)
        with pytest.raises(RequestError, match=r"pool 'gpu' is closed"):
            engine.submit(ONE).result(30)
        gates["a"].go.set()


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
    assert first.kept == second.kept == {} and first.released[0] == "x"


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


# -- closing ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("timeout", [None, 0.01, 0])
@pytest.mark.parametrize("leaving", [False, True])
def test_close_answers_everybody(timeout, leaving):
    gates = {"a": Gate(), "b": Gate()}
    engine = serving(gates).start()
    answers = [engine.submit(ONE) for _ in range(6)]
    assert gates["a"].began.wait(30) and gates["b"].began.wait(30)
    gone = engine.remove("a") if leaving else None
    for gate in gates.values():
        gate.go.set()
    engine.close(timeout_s=timeout)
    statuses = Counter(answer.result(0).status for answer in answers)
    assert sum(statuses.values()) == 6 and set(statuses) <= {"done", "cancelled"}
    if timeout is None:
        assert statuses == {"done": 6}
    assert gone is None or gone.done()
    assert engine.snapshot().state == "closed"


def test_close_and_remove_from_callbacks():
    """On the engine's thread and on a worker's: at once an error, or work that is done later."""
    told = []

    def step(one):
        with pytest.raises(RequestError, match="waits for workers"):
            engine.close()
        return {"out": 1}

    def back(done):
        with pytest.raises(RequestError, match="waits for the engine's thread"):
            engine.close()
        told.append(engine.remove("a"))

    with serving({"a": Step(step), "b": Step(step)}) as engine:
        engine.submit(ONE).add_done_callback(back)
        until(lambda: told)
        told[0].result(30)
        assert engine.submit(ONE).result(30).status == "done"


def test_a_clock_that_jumps():
    """All that was due meanwhile is handled in its order, for all members."""

    class Jumping(VirtualClock):
        def wait(self):
            events = super().wait()
            self._now += 3.0  # somebody stopped the machine
            return events

    log = EventLog()
    engine = Engine([member("a"), member("b")], Jumping(), [log])
    report = engine.run([request(str(at), ONE, arrival=float(at)) for at in range(8)], Report())
    assert report.counts["on_time"] == 8
    starts = [step["start"] for step in log.steps]
    assert all(step["end"] >= step["start"] for step in log.steps) and len(starts) == 8
    for name in "ab":
        mine = [step for step in log.steps if step["member"] == name]
        assert all(one["end"] <= other["start"] for one, other in pairwise(mine))


def test_a_storm_over_members_that_go():
    """Threads that submit and cancel; two of three members go; each is answered once."""
    engine = serving({name: Step(lambda one: {"out": one.params["n"]}) for name in "abc"}).start()
    told, lock = Counter(), threading.Lock()

    def caller(first):
        for number in range(first, first + 100):
            answer = engine.submit(ONE, {"n": number}, id=str(number))

            def back(done, number=number):
                with lock:
                    told[number] += 1

            answer.add_done_callback(back)
            if number % 7 == 0:
                engine.cancel(str(number))
            if number % 11 == 0:
                answer.cancel()
            answers[number] = answer

    answers = {}
    threads = [threading.Thread(target=caller, args=(100 * at,)) for at in range(8)]
    for thread in threads:
        thread.start()
    gone = [engine.remove(name) for name in "ab"]
    for thread in threads:
        thread.join()
    for one in gone:
        one.result(30)
    engine.close()
    assert told == dict.fromkeys(range(800), 1)
    for number, answer in answers.items():
        if not answer.cancelled():
            result = answer.result(0)
            assert result.status == "cancelled" or result.output == {"out": number}
            assert result.status == "done" or number % 7 == 0
    assert list(engine.snapshot().members) == ["c"]
