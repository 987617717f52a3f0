"""While serving, nobody's fault is another's."""

from __future__ import annotations

import logging
import random
import threading
import time
from concurrent.futures import CancelledError, ThreadPoolExecutor

import pytest

from neustream import (
    FCFS,
    SLO,
    Decision,
    Engine,
    Graph,
    GraphError,
    Member,
    PolicyError,
    Pool,
    RequestError,
    Scheduler,
    Stage,
    TableProfile,
    ThreadExecutor,
    WallClock,
    loop,
    seq,
    switch,
)

WORK = Stage("work", max_batch=8)
LAST = Stage("last", max_batch=8, emits=True)
PROFILES = {"work": TableProfile("work", [1, 8], [1e-4, 2e-4]), "last": TableProfile("last", [1, 8], [1e-4, 2e-4])}
GRAPH = Graph("good", seq(loop(WORK, times=lambda job: job.params.get("rounds", 3)), LAST))


class Module:
    """Raises, or does, what a request's parameters say."""

    def load(self, device):
        pass

    def step(self, inputs):
        for given in inputs:
            if "in_step" in given.params:
                given.params["in_step"]()
        return [{"value": given.params.get("value")} for given in inputs]


class Alone(FCFS):
    """A batch has one request, so that a step that raises fails that one alone."""

    def decide(self, view):
        decision = super().decide(view)
        return Decision(decision.jobs[:1], decision.drop)


def engine_of(policy=None, *, executor=None, **options):
    names = ("work", "last")
    scheduler = Scheduler([Pool("p", names)], policy or Alone(drop_hopeless=False), PROFILES)
    module = Module()
    executor = executor or ThreadExecutor(dict.fromkeys(names, module))
    return Engine(Member(scheduler, {"p": executor}), WallClock(), **options)


def served(engine, value=1):
    """Whether the engine still answers."""
    return engine.submit(GRAPH, {"value": value}).result(20).output == {"value": value}


class Wild(BaseException):
    pass


class Speechless(Exception):
    def __str__(self):
        raise RuntimeError("no text")

    __repr__ = __str__


class Unhashable:
    def __hash__(self):
        raise RuntimeError("no hash")


class Incomparable:
    def __hash__(self):
        return hash("a")

    def __eq__(self, other):
        raise Wild("no comparison")


def raising(error):
    def call(*args):
        raise error

    return call


ERRORS = [ValueError("odd"), Wild("wild"), SystemExit(3), KeyboardInterrupt(), GeneratorExit(), Speechless()]


# -- wrong arguments are refused where they come in ---------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (lambda e: e.submit(GRAPH, slo=5.0), "slo must be an SLO, got 5.0"),
        (lambda e: e.submit({"x": 1}), "graph must be a Graph, got {'x': 1}"),
        (lambda e: e.submit(GRAPH, id=[1]), r"request id must be a string, not empty, got \[1\]"),
        (lambda e: e.submit(GRAPH, id=""), "request id must be a string, not empty, got ''"),
        (lambda e: e.submit(GRAPH, [1]), r"params must be a dict, got \[1\]"),
        (lambda e: e.submit(GRAPH, on_output=3), "on_output must be callable, got int"),
        (lambda e: SLO(total=10**400), "SLO: total is out of range, got 1000.*"),
        (lambda e: SLO(total=True), "SLO: total must be a number of seconds, got True"),
        (lambda e: SLO(total="5"), "SLO: total must be a number of seconds, got '5'"),
        (lambda e: SLO(first=float("nan")), "SLO: first must be greater than 0, got nan"),
        (lambda e: SLO(weight=0), "SLO: weight must be greater than 0, got 0"),
        (lambda e: SLO(name=3), "SLO: name must be a string, got 3"),
    ],
)
def test_a_wrong_argument_is_refused_at_once_and_harms_nobody(arguments, message):
    with engine_of() as engine:
        before = engine.submit(GRAPH)
        with pytest.raises(RequestError, match=message):
            arguments(engine)
        assert before.result(20).status == "done" and served(engine)
        assert engine.snapshot().open == 0


def test_a_policy_s_class_in_place_of_a_policy_is_refused():
    for policy, hint in ((FCFS, r"make one: FCFS\(\)"), (3, "got 3"), ("fcfs", "got 'fcfs'")):
        with pytest.raises(PolicyError, match=hint):
            Scheduler([Pool("p", ("work",))], policy, PROFILES)


# -- whatever a caller's code does ends its own request alone -----------------------------------------


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_what_a_graph_s_conditions_raise_fails_that_request_alone(error):
    graphs = [
        Graph("times", loop(WORK, times=raising(error))),
        Graph("until", loop(WORK, until=raising(error), expect=2)),
        Graph("on", seq(WORK, switch(raising(error), {1: LAST}, likely=1))),
    ]
    with engine_of() as engine:
        for graph in graphs:
            answer = engine.submit(graph)
            refused = answer.exception(20)
            if refused is None:
                assert answer.result().status == "failed" and answer.result().reason
            else:
                assert isinstance(refused, GraphError)
            assert served(engine)


@pytest.mark.parametrize("value", [Unhashable(), Incomparable(), [1]], ids=lambda value: type(value).__name__)
def test_what_a_switch_chooses_may_be_anything(value):
    graph = Graph("odd", seq(WORK, switch(lambda job: value, {"a": LAST}, likely="a")))
    with engine_of() as engine:
        assert engine.submit(graph).result(20).status == "failed"
        assert served(engine)


@pytest.mark.parametrize("rounds", [10**400, -1, 2.5, True, None])
def test_a_number_of_rounds_that_is_none_fails_that_request_alone(rounds):
    with engine_of() as engine:
        with pytest.raises(GraphError, match="times must be a whole number from 0 to 1000000000"):
            engine.submit(GRAPH, {"rounds": rounds}).result(20)
        assert served(engine)


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_what_a_step_raises_fails_its_requests_alone(error):
    with engine_of() as engine:
        result = engine.submit(GRAPH, {"in_step": raising(error)}).result(20)
        assert result.status == "failed" and type(error).__name__ in result.reason
        assert served(engine)


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_what_callbacks_raise_is_their_own(error, caplog):
    with engine_of() as engine, caplog.at_level(logging.ERROR):
        others = [engine.submit(GRAPH, {"rounds": 30, "value": n}) for n in range(8)]
        loud = engine.submit(GRAPH, on_output=raising(error))
        loud.add_done_callback(raising(error))
        assert loud.result(20).status == "done"
        assert [other.result(20).output["value"] for other in others] == list(range(8))
        assert served(engine)


def test_callbacks_may_use_the_engine():
    seen = []
    with engine_of() as engine:

        def again(done):
            seen.append(engine.submit(GRAPH, {"value": "from a callback"}))
            engine.cancel("nobody")
            with pytest.raises(RequestError, match="close\\(\\) waits for this thread"):
                engine.close()

        engine.submit(GRAPH).add_done_callback(again)
        deadline = time.monotonic() + 20
        while not seen and time.monotonic() < deadline:
            time.sleep(0.001)
        assert seen[0].result(20).output == {"value": "from a callback"}


# -- giving up ------------------------------------------------------------------------------------------


def test_cancelling_the_future_gives_the_request_up():
    held = threading.Event()
    with engine_of() as engine:
        answer = engine.submit(GRAPH, {"in_step": lambda: held.wait(20), "rounds": 10**6})
        waiting = engine.submit(GRAPH, {"rounds": 10**6})
        assert waiting.cancel() and answer.cancel()
        held.set()
        with pytest.raises(CancelledError):
            waiting.result(20)
        assert served(engine)
        assert engine.snapshot().open == 0 and not engine.members[0].scheduler.jobs


def test_no_more_than_max_open_are_accepted():
    held = threading.Event()
    with engine_of(max_open=2) as engine:
        open_ones = [engine.submit(GRAPH, {"in_step": lambda: held.wait(20)}) for _ in range(2)]
        with pytest.raises(RequestError, match="2 requests are open, and max_open is 2"):
            engine.submit(GRAPH)
        held.set()
        for answer in open_ones:
            answer.result(20)
        assert served(engine)
    with pytest.raises(RequestError, match="max_open must be 1 or more, got 0"):
        engine_of(max_open=0)


# -- faults of what is around the engine ---------------------------------------------------------------


class Faulty(Alone):
    """Raises in every other decision, or decides what cannot be."""

    def __init__(self, error=None):
        super().__init__(drop_hopeless=False)
        object.__setattr__(self, "error", error)
        object.__setattr__(self, "asked", [0])

    def decide(self, view):
        self.asked[0] += 1
        if self.asked[0] % 2:
            return super().decide(view)
        if self.error is None:
            return Decision(view.jobs[:1] * 2)
        raise self.error


@pytest.mark.parametrize("error", [None, ValueError("odd"), Wild("wild"), SystemExit(1)])
def test_a_policy_s_fault_is_covered_by_fcfs_and_counted(error, caplog):
    with engine_of(Faulty(error)) as engine, caplog.at_level(logging.ERROR):
        assert all(served(engine, n) for n in range(5))
        state = engine.snapshot()
        assert state.policy_faults > 3 and state.state == "serving"
    assert "FCFS decided in its place" in caplog.text


def test_in_a_replay_a_policy_s_fault_is_an_error():
    scheduler = Scheduler([Pool("p", ("work", "last"))], Faulty(ValueError("odd")), PROFILES)
    from neustream import ProfiledExecutor, Request, VirtualClock

    with pytest.raises(ValueError, match="odd"):
        Engine(Member(scheduler, {"p": ProfiledExecutor()}), VirtualClock()).run([Request("a", GRAPH)])


def test_an_observer_that_raises_is_told_no_more(caplog):
    told, all_of_them = [], []

    def bad(record):
        told.append(record)
        if len(told) == 3:
            raise KeyError("lost")

    with engine_of(observers=[bad, all_of_them.append]) as engine, caplog.at_level(logging.ERROR):
        assert all(served(engine, n) for n in range(3))
    assert len(told) == 3 < len(all_of_them)
    assert caplog.text.count("it is told nothing more") == 1


class Unreachable(ThreadExecutor):
    """Cannot start every third step."""

    def __init__(self, modules):
        super().__init__(modules)
        self.started = 0

    def start(self, batch, clock):
        self.started += 1
        if self.started % 3 == 0:
            raise ConnectionError("nobody there")
        super().start(batch, clock)


def test_a_step_that_cannot_start_fails_its_requests_alone():
    executor = Unreachable(dict.fromkeys(("work", "last"), Module()))
    with engine_of(executor=executor) as engine:
        results = [engine.submit(GRAPH, {"rounds": 1}).result(20) for _ in range(6)]
        failed = [result for result in results if result.status == "failed"]
        assert 0 < len(failed) < 6
        assert {result.reason for result in failed} <= {
            f"stage '{name}': its step could not start: ConnectionError: nobody there" for name in ("work", "last")
        }


def test_a_step_that_does_not_come_back_fails_its_requests_and_closes_its_pool_until_it_does():
    held = threading.Event()
    with engine_of(step_timeout_s=0.05) as engine:
        stuck = engine.submit(GRAPH, {"in_step": lambda: held.wait(20)})
        behind = engine.submit(GRAPH)
        assert "did not come back within 0.050 s" in stuck.result(20).reason
        assert "pool 'p' is closed" in behind.result(20).reason
        with pytest.raises(RequestError, match="pool 'p' is closed: stage 'work': its step did not come back"):
            engine.submit(GRAPH).result(20)
        state = engine.snapshot()
        assert (state.state, list(state.closed)) == ("serving", ["p"]) and "did not come back" in state.reason
        held.set()
        deadline = time.monotonic() + 20
        while engine.snapshot().closed and time.monotonic() < deadline:
            time.sleep(0.001)
        assert served(engine)


def test_a_snapshot_tells_every_state():
    engine = engine_of().start()
    assert engine.snapshot().state == "serving"
    engine.close()
    assert engine.snapshot().state == "closed"
    fresh = Engine(Member(Scheduler([Pool("p", ("work", "last"))], FCFS(), PROFILES), {"p": Module}), WallClock())
    assert fresh.snapshot().state == "new"


# -- all of it at once --------------------------------------------------------------------------------


def test_a_storm_of_good_and_bad_requests_is_answered_once_each():
    draw = random.Random(5)
    callbacks = []
    lock = threading.Lock()

    def one(engine, at):
        kind = draw.random()
        if kind < 0.05:
            wrong = draw.choice([{"slo": 5.0}, {"id": [at]}, {"params": 3}, {"on_output": 1}])
            with pytest.raises(RequestError):
                engine.submit(GRAPH, **wrong)
            return None
        params = {"value": at, "rounds": draw.randint(0, 3)}
        if kind < 0.10:
            params["in_step"] = raising(draw.choice(ERRORS))
        answer = engine.submit(GRAPH, params, on_output=raising(Wild("x")) if kind > 0.95 else None)

        def told(done):
            with lock:
                callbacks.append(at)
            if kind > 0.9:
                raise SystemExit(1)

        answer.add_done_callback(told)
        if 0.10 <= kind < 0.20:
            answer.cancel()
        return at, kind, answer

    with engine_of() as engine:
        with ThreadPoolExecutor(16) as threads:
            made = [got for got in threads.map(lambda at: one(engine, at), range(1500)) if got]
        for at, kind, answer in made:
            if answer.cancelled():
                continue
            result = answer.result(60)
            if kind < 0.10:
                assert result.status == "failed"
            elif kind >= 0.20:
                assert (result.status, result.output) == ("done", {"value": at})
        assert served(engine)
        assert sorted(callbacks) == sorted(at for at, _, _ in made)
        assert engine.snapshot().open == 0
