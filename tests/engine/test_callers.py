"""What callers do with futures, ids and threads stays their own; workers and profiles that fail."""

from __future__ import annotations

import logging
import threading
from concurrent.futures import wait

import pytest
from asked import GRAPH, PROFILES, WORK, Module, engine_of, served

from neustream import (
    FCFS,
    BackendError,
    Decision,
    Engine,
    Graph,
    GraphError,
    Member,
    Pool,
    ProfiledExecutor,
    RequestError,
    Scheduler,
    Stage,
    TableProfile,
    ThreadExecutor,
    WallClock,
    seq,
    switch,
)
from neustream.engine.events import Cancel, Done, Submit

# -- arguments, futures and ids ------------------------------------------------------------------------


@pytest.mark.parametrize("id", [[1], None, 3, {}])
def test_cancelling_what_is_no_id_is_refused_at_once(id):
    with engine_of() as engine:
        with pytest.raises(RequestError, match="cancel: a request id is a string, got"):
            engine.cancel(id)
        assert served(engine)


@pytest.mark.parametrize(
    ("pool", "profiles", "error"),
    [
        ("nope", PROFILES, "no pool 'nope'; pools: \\['p'\\]"),
        ([1], PROFILES, "pool \\[1\\]: TypeError"),
        ("p", 3, "pool 'p': AttributeError"),
        ("p", PROFILES, "is served already"),
    ],
)
def test_stages_that_cannot_be_added_harm_nobody(pool, profiles, error):
    with engine_of() as engine:
        with pytest.raises((GraphError, RequestError), match=error):
            engine.add(pool, profiles).result(20)
        assert served(engine) and engine.snapshot().open == 0


def test_who_waits_for_a_future_that_was_given_up_at_once_is_told():
    with engine_of() as engine:
        held = threading.Event()
        engine.inspect(lambda members, now: held.wait(20))
        answer = engine.submit(GRAPH)
        assert answer.cancel()
        held.set()
        assert wait([answer], 20).done == {answer}


def test_a_future_that_its_caller_answers_harms_nobody():
    held = threading.Event()
    with engine_of() as engine:
        tampered = engine.submit(GRAPH, {"in_step": lambda: held.wait(20)})
        tampered.set_result(None)
        held.set()
        assert served(engine) and engine.snapshot().open == 0


def test_a_refused_future_that_is_cancelled_leaves_the_request_of_that_id_alone():
    held = threading.Event()
    with engine_of() as engine:
        first = engine.submit(GRAPH, {"in_step": lambda: held.wait(20), "rounds": 3, "value": 7}, id="x")
        second = engine.submit(GRAPH, id="x")
        assert second.cancel()
        held.set()
        assert first.result(20).output == {"value": 7}


class OneAtATime(WallClock):
    """Gives out what a test says, in place of what time it is."""

    def __init__(self):
        super().__init__()
        self.events, self.posted = [], []

    def post(self, event, at):
        self.posted.append(event)
        if not isinstance(event, Submit | Done | Cancel):
            super().post(event, at)

    def wait(self):
        return self.events.pop(0)

    def step(self):
        """The latest step that ended."""
        return [event for event in self.posted if isinstance(event, Done)][-1]


def test_an_id_that_is_used_again_as_its_request_ends_has_two_answers():
    scheduler = Scheduler([Pool("p", ("work",))], FCFS(), PROFILES)
    clock = OneAtATime()
    engine = Engine(Member(scheduler, {"p": ProfiledExecutor()}), clock)
    engine._life.begin(serving=True)
    engine._loop.observers.append(engine._answers.hear)
    answers = [engine.submit(GRAPH, id="x") for _ in range(2)]
    first, second = clock.posted
    engine._loop.handle(first)
    engine._loop.drives[0].turn()
    engine._loop.handle(clock.step())  # its step ends, and the other comes in the same moment
    engine._loop.handle(second)
    assert answers[0].result(0).status == "done" and not answers[1].done()
    engine._loop.drives[0].turn()
    engine._loop.handle(clock.step())
    engine._loop.publish()
    assert answers[1].result(0).status == "done"


class Id(str):
    """A string that compares as it likes."""

    def __eq__(self, other):
        raise SystemExit(2)

    def __hash__(self):
        raise SystemExit(2)


def test_an_id_is_a_plain_string_whatever_class_it_comes_as():
    with engine_of() as engine:
        result = engine.submit(GRAPH, id=Id("x")).result(20)
        assert (type(result.id), result.status) == (str, "done")
        assert served(engine)


class Odd(Graph):
    """A graph whose hash raises: what it does is its caller's."""

    def __hash__(self):
        raise SystemExit(3)


def test_a_graph_that_raises_is_refused_and_leaves_nothing_behind():
    with engine_of() as engine:
        with pytest.raises(RequestError, match="request 'x': SystemExit: 3"):
            engine.submit(Odd("odd", WORK), id="x").result(20)
        assert served(engine) and not engine.members[0].scheduler.jobs


def test_a_call_on_a_worker_that_is_given_up_or_answered_badly_leaves_the_worker_alone(caplog):
    executor = ThreadExecutor({"work": Module()})
    held = threading.Event()

    def leave(done):
        raise SystemExit(1)

    with engine_of(executor) as engine, caplog.at_level(logging.ERROR):
        executor.call(lambda: held.wait(20))
        assert executor.call(int).cancel()
        loud = executor.call(int)
        loud.add_done_callback(leave)
        held.set()
        assert served(engine) and loud.result(20) == 0


class Keeping(Module):
    def release(self, id):
        raise ValueError("cannot let go")


def test_a_module_that_cannot_release_is_logged(caplog):
    with engine_of(ThreadExecutor({"work": Keeping()})) as engine, caplog.at_level(logging.ERROR):
        assert served(engine) and served(engine)
    assert "Keeping: request" in caplog.text and "cannot let go" in caplog.text


def test_a_limit_of_years_is_no_fault():
    with engine_of(step_timeout_s=1e12) as engine:
        assert served(engine)


# -- workers and profiles that fail --------------------------------------------------------------------


class Fails(TableProfile):
    """Raises once the engine serves."""

    serving = False

    def latency(self, batch, total=0.0, square=0.0):
        if self.serving and batch == 3:
            raise ZeroDivisionError("no latency of three")
        return super().latency(batch, total, square)


class Unreadable(dict):
    """An update that raises as it is read."""

    def keys(self):
        raise SystemExit(2)

    __iter__ = keys


class Strange(Module):
    def step(self, inputs):
        return [Unreadable(x=1) if given.params.get("odd") else {"value": given.params["value"]} for given in inputs]


def test_an_update_that_cannot_be_read_fails_its_request_alone():
    with engine_of(ThreadExecutor({"work": Strange()})) as engine:
        result = engine.submit(GRAPH, {"odd": True}).result(20)
        assert result.reason == "stage 'work': what it returned cannot be read: SystemExit: 2"
        assert served(engine)


class Stubborn(ThreadExecutor):
    def close(self, *, wait=True):
        super().close(wait=wait)
        raise OSError("cannot close")


def test_an_executor_that_cannot_close_leaves_no_other_open():
    pools = [Pool(name, (name,)) for name in ("work", "last")]
    scheduler = Scheduler(pools, FCFS(), {name: TableProfile(name, [1], [1e-4]) for name in ("work", "last")})
    executors = {pool.name: Stubborn({pool.name: Module()}) for pool in pools}
    engine = Engine(Member(scheduler, executors), WallClock()).start()
    with pytest.raises(OSError, match="cannot close"):
        engine.close()
    for executor in executors.values():
        with pytest.raises(BackendError, match="this executor is closed"):
            executor.call(int)


class Gate:
    """A step that waits in here until it may go on."""

    def __init__(self):
        self.entered, self.opened = threading.Event(), threading.Event()

    def __call__(self):
        self.entered.set()
        assert self.opened.wait(60)


def test_a_profile_that_raises_fails_the_oldest_request_and_the_others_go_on(caplog):
    profile = Fails("work", [1, 8], [1e-4, 2e-4])
    scheduler = Scheduler([Pool("p", ("work",))], FCFS(drop_hopeless=False), {"work": profile})
    gate = Gate()
    engine = Engine(Member(scheduler, {"p": ThreadExecutor({"work": Module()})}), WallClock())
    with engine, caplog.at_level(logging.CRITICAL):
        first = engine.submit(GRAPH, {"in_step": gate})
        assert gate.entered.wait(20)
        profile.serving = True
        three = [engine.submit(GRAPH, {"value": n}) for n in range(3)]
        gate.opened.set()
        results = [answer.result(20) for answer in (first, *three)]
        assert [result.status for result in results] == ["done", "failed", "done", "done"]
        assert results[1].reason == "no step could be planned for it: ZeroDivisionError: no latency of three"
        profile.serving = False
        assert served(engine)


class StuckFirst:
    """One job at a time, the one called "stuck" before all others."""

    def decide(self, view):
        return Decision([min(view.jobs, key=lambda job: (job.id != "stuck", job.arrival))])


def test_what_a_lost_worker_keeps_of_waiting_requests_is_lost_too():
    pool = Pool("p", ("work",), workers=2, sticky=True)
    scheduler = Scheduler([pool], StuckFirst(), PROFILES)
    executor = ThreadExecutor([{"work": Module()}, {"work": Module()}], ("cpu", "cpu"))
    busy, begun, stuck = Gate(), Gate(), Gate()
    with Engine(Member(scheduler, {"p": executor}), WallClock(), step_timeout_s=1.0) as engine:
        other = engine.submit(GRAPH, {"in_step": busy})
        waits = engine.submit(GRAPH, {"in_step": begun, "rounds": 2})
        assert busy.entered.wait(20) and begun.entered.wait(20)
        never = engine.submit(GRAPH, {"in_step": stuck}, id="stuck")
        begun.opened.set()
        assert stuck.entered.wait(20)
        busy.opened.set()
        assert other.result(20).status == "done"
        for answer in (never, waits):
            assert answer.result(20).reason == "stage 'work': its step did not come back within 1.000 s"
        assert served(engine)
        stuck.opened.set()


def test_a_request_that_comes_to_a_closed_pool_by_an_unexpected_branch_fails():
    draw, last = Stage("draw"), Stage("last")
    graph = Graph("odd", seq(draw, switch(lambda job: 1, {1: last, 2: seq()}, likely=2)))
    profiles = {name: TableProfile(name, [1], [1e-4]) for name in ("draw", "last")}
    scheduler = Scheduler([Pool("a", ("draw",)), Pool("b", ("last",))], FCFS(), profiles)
    executors = {"a": ThreadExecutor({"draw": Module()}), "b": ThreadExecutor({"last": Module()})}
    drawing = Gate()
    with Engine(Member(scheduler, executors), WallClock()) as engine:
        answer = engine.submit(graph, {"in_step": drawing})
        assert drawing.entered.wait(20)
        engine._loop.drives[0].closed["b"] = "pool 'b' is closed: a test did it"
        drawing.opened.set()
        result = answer.result(20)
        assert (result.status, result.reason) == ("failed", "pool 'b' is closed: a test did it")
