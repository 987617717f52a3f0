"""Several schedulers behind one engine serve as one, and close as one."""

from __future__ import annotations

import threading
from collections import Counter
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from members import ONE, TOY, member, run, serving, until
from toys import Gate, Step, adds_up, draw_and_decode, request, table

from neustream import (
    EDF,
    FCFS,
    Engine,
    EventLog,
    GraphError,
    Member,
    Priced,
    ProfiledExecutor,
    Report,
    RequestError,
    VirtualClock,
)
from neustream.core.events import Ended, Submitted
from neustream.engine.events import Finished

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
        with pytest.raises(RequestError, match="waits for this thread"):
            engine.close()
        return {"out": 1}

    def back(done):
        with pytest.raises(RequestError, match="waits for this thread"):
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
