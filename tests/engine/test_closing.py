"""Engines start and close in every state; closing never hangs."""

from __future__ import annotations

import os
import queue
import threading

import pytest
from asked import GRAPH, PROFILES, Module, engine_of, served

from neustream import (
    FCFS,
    BackendError,
    Engine,
    Member,
    Pool,
    ProfiledExecutor,
    Request,
    RequestError,
    Scheduler,
    ThreadExecutor,
    VirtualClock,
)


def test_a_clock_that_jumps_serves_nobody():
    scheduler = Scheduler([Pool("p", ("work",))], FCFS(), PROFILES)
    engine = Engine(Member(scheduler, {"p": ProfiledExecutor()}), VirtualClock())
    with pytest.raises(RequestError, match="needs a clock that threads share; VirtualClock is for run"):
        engine.start()
    assert engine.run([Request("a", GRAPH)]).counts["on_time"] == 1


def test_an_interrupted_engine_is_closed_and_starts_no_more():
    engine = engine_of().start()
    engine.interrupt()
    engine._thread.join(20)
    assert engine.snapshot().state == "closed"
    with pytest.raises(RequestError, match="was closed, or interrupted"):
        engine.start()
    engine.close()


def test_closing_does_not_wait_for_a_step_that_was_given_up():
    held = threading.Event()
    engine = engine_of(step_timeout_s=0.05).start()
    assert "did not come back" in engine.submit(GRAPH, {"in_step": lambda: held.wait(60)}).result(20).reason
    closing = threading.Thread(target=engine.close, daemon=True)
    closing.start()
    closing.join(20)
    hung = closing.is_alive()
    held.set()
    assert not hung and engine.snapshot().state == "closed"


def test_after_its_timeout_close_cancels_what_is_open():
    engine = engine_of().start()
    endless = engine.submit(GRAPH, {"rounds": 10**9})
    done = engine.submit(GRAPH)
    assert done.result(20).status == "done"
    engine.close(timeout_s=0.05)
    assert endless.result(0).status == "cancelled" and engine.snapshot().state == "closed"
    for wrong in (-1, float("nan"), float("inf")):
        with pytest.raises(RequestError, match="timeout_s must be a number of seconds >= 0, got"):
            engine.close(timeout_s=wrong)


def test_close_in_a_step_is_refused():
    seen = []
    with engine_of() as engine:

        def close():
            with pytest.raises(RequestError, match="close\\(\\) waits for this thread"):
                engine.close()
            seen.append(1)

        assert engine.submit(GRAPH, {"in_step": close}).result(20).status == "done"
    assert seen == [1]


def test_close_during_a_replay_is_refused():
    executor = ThreadExecutor({"work": Module()})
    engine = engine_of(executor)
    refused = []

    def close():
        try:
            engine.close()
        except RequestError as error:
            refused.append(str(error))

    engine._loop.observers.append(lambda record: close())
    assert engine.run([Request("a", GRAPH)]).counts["on_time"] == 1
    assert set(refused) == {"close() cannot be called during run(): interrupt() ends that"}
    engine.close()


def test_a_closed_executor_refuses_steps():
    executor = ThreadExecutor({"work": Module()})
    engine = engine_of(executor)
    executor.close()
    with pytest.raises(BackendError, match="this executor is closed"):
        engine.run([Request("a", GRAPH)])
    with pytest.raises(RequestError, match="this engine failed: make another one"):
        engine.run([Request("b", GRAPH)])


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_in_a_fork_steps_are_refused_and_close_does_nothing():
    with engine_of() as engine:
        child = os.fork()
        if not child:
            code = 1
            try:
                engine.close()
                engine.members[0].scheduler.submit(Request("a", GRAPH), 0.0)
                batch = engine.members[0].scheduler.next_batch("p", 0.0)
                engine.members[0].executors["p"].start(batch, engine.clock)
            except BackendError:
                code = 0
            finally:
                os._exit(code)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert served(engine)


def test_all_who_abandon_an_engine_are_told_once_it_has_ended():
    executor, told = ThreadExecutor({"work": Module()}), queue.Queue()
    engine = engine_of(executor).start()
    held = threading.Event()
    engine.inspect(lambda members, now: held.wait(20))
    for name in ("first", "second"):
        engine.abandon(lambda name=name: told.put(name))
    held.set()
    assert [told.get(timeout=20) for _ in range(2)] == ["first", "second"]
    with pytest.raises(BackendError, match="this executor is closed"):
        executor.call(int)
