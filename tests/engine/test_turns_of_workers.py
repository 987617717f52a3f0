"""Turns of the loop on the threads of workers, while the loop's own waits."""

from __future__ import annotations

import threading
import time

import pytest
from asked import GRAPH, PROFILES, Module, engine_of
from members import ONE, serving, until
from toys import Step

from neustream import FCFS, Engine, Member, Pool, RequestError, Scheduler
from neustream.core.batch import Batch
from neustream.engine.clock import VirtualClock, WallClock
from neustream.engine.events import Started, Stop, Wake
from neustream.engine.executor import BRIEF_ON_CPU_S, BRIEF_S, ThreadExecutor

SOON = 30


def event(name):
    return Wake(None, name)


class Waiter:
    """A clock with a thread that waits for events, and lends its turns; what was taken in, by whom."""

    def __init__(self, turn=lambda events: False):
        self.clock, self.turns, self.over = WallClock(), [], threading.Event()
        self._turn = turn
        self.fault = None
        self.thread = threading.Thread(target=self._wait, daemon=True)
        self.thread.start()

    def _wait(self):
        try:
            with self.clock.lent(self.taken):
                while not self.over.is_set():
                    self.taken(self.clock.wait())
        except ZeroDivisionError as fault:
            self.fault = fault

    def taken(self, events):
        names = [event.pool for event in events if isinstance(event, Wake)]
        self.turns.append((names, threading.current_thread() is self.thread))
        return self._turn(names)

    def names(self):
        return [name for names, _ in self.turns for name in names]

    def until(self, what):
        """Wait for something to be so."""
        ends = time.monotonic() + SOON
        while not what():
            assert time.monotonic() < ends
            time.sleep(0.001)

    def asleep(self):
        self.until(lambda: not self.clock._lead.locked())

    def end(self):
        self.over.set()
        self.clock.post(event("end"), 0.0)
        self.thread.join(SOON)
        assert not self.thread.is_alive()


def test_who_delivers_an_event_takes_the_turn_while_the_other_sleeps():
    waiter = Waiter()
    for name in ("a", "b"):
        waiter.asleep()
        waiter.clock.deliver(event(name))
    assert waiter.turns == [(["a"], False), (["b"], False)]
    waiter.end()
    waiter.clock.deliver(event("late"))  # nobody waits any more: it is there for who does
    assert waiter.names() == ["a", "b", "end"]
    assert waiter.clock.wait() == [event("late")]


def test_events_that_are_due_by_then_belong_to_the_turn():
    waiter = Waiter()
    waiter.asleep()
    with waiter.clock._lead:  # it would wake for the first one, and cannot
        waiter.clock._heap.append((0.0, 3, 0, event("due")))
    waiter.clock.deliver(event("a"))
    assert waiter.turns == [(["due", "a"], False)]
    waiter.end()


def test_an_event_that_comes_within_a_turn_is_left_to_the_thread_that_waits():
    begun, go = threading.Event(), threading.Event()

    def hold(names):
        if names == ["a"]:
            begun.set()
            assert go.wait(SOON)
        return False

    waiter = Waiter(hold)
    waiter.asleep()
    first = threading.Thread(target=waiter.clock.deliver, args=(event("a"),))
    first.start()
    assert begun.wait(SOON)
    waiter.clock.deliver(event("b"))
    waiter.clock.post(event("c"), waiter.clock.now())
    assert waiter.names() == ["a"]
    go.set()
    first.join(SOON)
    waiter.until(lambda: len(waiter.names()) == 3)
    assert waiter.turns[0] == (["a"], False)
    assert all(own for _, own in waiter.turns[1:])
    waiter.end()


def test_what_was_posted_is_taken_in_first():
    waiter = Waiter()
    waiter.asleep()
    with waiter.clock._lead:  # it is woken, and has not got so far
        waiter.clock.post(event("posted"), 0.0)
        waiter.clock.deliver(event("delivered"))
    waiter.until(lambda: len(waiter.names()) == 2)
    assert waiter.names() == ["posted", "delivered"]
    assert all(own for _, own in waiter.turns)
    waiter.end()


@pytest.mark.parametrize("before", [None, 3600.0], ids=["sleeps for ever", "sleeps for an hour"])
def test_the_thread_that_waits_wakes_for_what_a_turn_posted(before):
    waiter = Waiter(lambda names: names == ["a"] and waiter.clock.post(event("soon"), waiter.clock.now() + 0.01))
    waiter.asleep()
    if before is not None:
        waiter.clock.post(event("later"), before)
        waiter.until(lambda: waiter.clock._until == before)
        waiter.asleep()
    waiter.clock.deliver(event("a"))
    waiter.until(lambda: len(waiter.names()) == 2)
    assert waiter.turns == [(["a"], False), (["soon"], True)]
    waiter.end()


def test_the_thread_that_waits_has_the_turn_that_a_turn_asked_for():
    waiter = Waiter(lambda names: names == ["a"])
    waiter.asleep()
    waiter.clock.deliver(event("a"))
    waiter.until(lambda: len(waiter.turns) == 2)
    assert waiter.turns == [(["a"], False), ([], True)]
    waiter.end()


def test_what_a_turn_raises_is_raised_by_the_thread_that_waits():
    waiter = Waiter(lambda names: 1 / (names != ["a"]) and False)
    waiter.asleep()
    waiter.clock.deliver(event("a"))
    waiter.thread.join(SOON)
    assert isinstance(waiter.fault, ZeroDivisionError)
    waiter.clock.deliver(event("b"))
    assert waiter.names() == ["a"]
    assert waiter.clock.wait() == [event("b")]


def test_an_event_behind_a_turn_that_raised_is_there_for_who_waits():
    waiter = Waiter()
    waiter.asleep()
    clock = waiter.clock

    def other_raises():  # just before this one has the lead
        clock._turn = None
        return True

    clock._inbox.empty = other_raises
    clock.deliver(event("a"))
    del clock._inbox.empty
    waiter.until(lambda: waiter.turns)
    assert waiter.turns == [(["a"], True)]
    waiter.end()


def test_what_a_finalizer_posts_at_the_end_of_a_turn_wakes_the_thread_that_waits():
    waiter = Waiter()
    waiter.asleep()
    clock = waiter.clock
    clock.post(event("later"), 3600.0)
    waiter.until(lambda: clock._until == 3600.0)
    waiter.asleep()

    class Instant(float):
        def __gt__(self, other):
            clock.post(event("of a finalizer"), 0.0)
            return super().__gt__(other)

    clock._until = Instant(3600.0)
    clock.deliver(event("a"))
    waiter.until(lambda: len(waiter.turns) == 2)
    assert waiter.turns == [(["a"], False), (["of a finalizer"], True)]
    waiter.end()


@pytest.mark.parametrize("make", [VirtualClock, WallClock])
def test_without_turns_that_are_lent_events_are_posted(make):
    clock = make()
    clock.deliver(event("a"))
    assert clock.wait() == [event("a")]


@pytest.mark.parametrize(("device", "brief"), [("cpu", BRIEF_ON_CPU_S), ("cuda:0", BRIEF_S)])
@pytest.mark.parametrize(("share", "kind"), [(0.5, "deliver"), (1.0, "post")], ids=["a brief step", "a longer one"])
def test_a_turn_follows_brief_steps_on_their_workers_thread(device, brief, share, kind):
    seconds = share * brief
    heard, told = [], threading.Event()

    class Clock:
        def now(self):
            return 1.0 + seconds

        def deliver(self, event):
            heard.append("deliver")
            told.set()

        def post(self, event, at):
            heard.append("post")
            told.set()

    class Module:
        def load(self, device):
            pass

        def step(self, inputs):
            return []

    executor = ThreadExecutor({"s": Module()}, [device])
    executor.start(Batch(1, "gpu", 0, "s", (), (), 1.0, 1.0), Clock())
    assert told.wait(SOON)
    executor.close()
    assert heard == [kind]


@pytest.fixture
def patient(monkeypatch):
    """All steps count as brief."""
    monkeypatch.setattr("neustream.engine.executor.BRIEF_ON_CPU_S", 60.0)


def asleep(engine):
    """What a step does to end while the engine's thread sleeps."""

    def wait():
        ends = time.monotonic() + SOON
        while engine.clock._lead.locked() and time.monotonic() < ends:
            time.sleep(0.001)

    return wait


def test_a_request_goes_from_step_to_step_on_its_workers_thread(patient):
    started = []

    def observe(record):
        if isinstance(record, Started):
            started.append(threading.current_thread().name)

    with engine_of(observers=[observe]) as engine:
        params = {"in_step": asleep(engine), "rounds": 4, "value": 7}
        assert engine.submit(GRAPH, params).result(SOON).output == {"value": 7}
        assert engine.submit(GRAPH, params).result(SOON).output == {"value": 7}
    assert started == ["neustream-engine", *["neustream-worker-0"] * 3] * 2


def test_callbacks_on_a_workers_thread_may_ask_and_cancel_but_not_close(patient):
    seen, more = [], []

    def told(emitted):
        if emitted.index == 1:
            seen.append(threading.current_thread().name)
            more.append(engine.submit(GRAPH, {"value": 8}, id="more"))
            engine.cancel("first")
            with pytest.raises(RequestError, match="waits for this thread: it cannot be called on it"):
                engine.close()

    with engine_of() as engine:
        params = {"in_step": asleep(engine), "rounds": 50, "value": 7}
        first = engine.submit(GRAPH, params, id="first", on_output=told)
        assert first.result(SOON).status == "cancelled"
        assert more[0].result(SOON).output == {"value": 8}
    assert seen == ["neustream-worker-0"]


def test_a_policy_that_fails_on_a_workers_thread_ends_the_engine_as_ever(patient):
    class Breaks(FCFS):
        def decide(self, view):
            if threading.current_thread().name != "neustream-engine":
                raise ZeroDivisionError("on a worker")
            return super().decide(view)

    scheduler = Scheduler([Pool("p", ("work",))], Breaks(drop_hopeless=False), PROFILES)
    member = Member(scheduler, {"p": ThreadExecutor({"work": Module()})})
    engine = Engine(member, WallClock(), forgiving=False).start()
    answer = engine.submit(GRAPH, {"in_step": asleep(engine), "rounds": 4})
    with pytest.raises(RequestError, match="the engine stopped before this request was served"):
        answer.result(SOON)
    engine.close()
    assert isinstance(engine.fault, ZeroDivisionError)


def until_asleep(engine):
    asleep(engine)()
    assert not engine.clock._lead.locked()


@pytest.mark.parametrize("cancel", [False, True])
def test_the_engine_ends_where_another_thread_took_in_that_it_is_to(cancel):
    engine = engine_of().start()
    until_asleep(engine)
    engine.clock.deliver(Stop(cancel))  # as a callback on a worker's thread would have it
    engine._thread.join(SOON)
    assert not engine._thread.is_alive() and engine.fault is None
    engine.close()


def test_close_is_refused_on_the_thread_of_a_member_that_has_just_gone(patient):
    seen = []

    def leave(one):
        engine.remove("a").add_done_callback(refused)
        until(lambda: engine._loop.drives[0].leaving)
        asleep(engine)()
        return {"out": 1}

    def refused(done):
        with pytest.raises(RequestError, match="waits for this thread"):
            engine.close()
        seen.append((threading.current_thread().name, [member.name for member in engine.members]))

    with serving({"a": Step(leave)}) as engine:
        answer = engine.submit(ONE)
        answer.add_done_callback(refused)
        assert answer.result(SOON).status == "done"
        assert seen == [("neustream-worker-0", [])] * 2


def test_a_callback_may_wait_for_a_call_on_its_own_thread(patient):
    executor, seen = ThreadExecutor({"work": Module()}), []

    def told(emitted):
        if emitted.index == 1:
            called = executor.call(lambda: threading.current_thread().name)
            seen.append((threading.current_thread().name, called.result(SOON)))

    with engine_of(executor) as engine:
        params = {"in_step": asleep(engine), "rounds": 3}
        assert engine.submit(GRAPH, params, on_output=told).result(SOON).status == "done"
    assert seen == [("neustream-worker-0", "neustream-worker-0")]


def test_calls_in_a_step_come_behind_it(patient):
    executor, order = ThreadExecutor({"work": Module()}), []

    def in_step():
        executor.call(lambda: order.append("call"))
        order.append("step")

    with engine_of(executor) as engine:
        engine.submit(GRAPH, {"in_step": in_step}).result(SOON)
    assert order == ["step", "call"]


def test_a_callback_that_takes_long_fails_nobodys_step(patient):
    seen = []

    def told(emitted):
        if emitted.index == 1:
            seen.append(threading.current_thread().name)
            time.sleep(1.5)

    with engine_of(step_timeout_s=1.0) as engine:
        params = {"in_step": asleep(engine), "rounds": 3}
        answer = engine.submit(GRAPH, params, on_output=told).result(SOON)
    assert (answer.status, answer.reason) == ("done", "")
    assert seen == ["neustream-worker-0"]
