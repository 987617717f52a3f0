"""A head whose instances serve some stages each: requests go from role to role, whoever dies, refuses or lacks."""

from __future__ import annotations

import itertools
import threading
import time
from concurrent.futures import CancelledError

import pytest
from local_machines import driving
from toys import Step, table

from neustream import (
    FCFS,
    SLO,
    BackendError,
    Graph,
    RequestError,
    RequestFailed,
    Stage,
    StageFailed,
    loop,
    seq,
    serve,
)
from neustream.backends.ray.kinds import Each
from neustream.cluster.book import Settings
from neustream.cluster.head import Head
from neustream.cluster.rules.slack import Slack
from neustream.service.graphs import GraphMount
from neustream.service.service import Service

PATIENT = Settings(suspect_s=60.0, dead_s=90.0, scale_s=0.02, patience_s=60.0)
ROLES = {"front": ("draft",), "core": ("say",), "back": ("polish",)}
IDS = itertools.count()


class Part(Step):
    """Adds its place to a request's way. Its step number `at` of a request waits for `gate`, if there is one."""

    def __init__(self, place, gate=None):
        super().__init__(self.add)
        self.place, self.gate = place, gate

    def add(self, given):
        if self.gate is not None:
            assert self.gate.wait(30)
        way = (*given.state.get("way", ()), f"{self.place}:{given.stage}")
        return {"way": way, "word": len(way)}


class Keeper(Part):
    """Keeps something of requests that it cannot part with."""

    def release(self, id):
        pass


class Picky(Part):
    """Takes nothing of others until `gate` is set; keeps nothing itself."""

    def release(self, id):
        pass

    def export(self, given):
        return self.place

    def adopt(self, given, piece):
        if not self.gate.is_set():
            raise StageFailed("not now")


def words(job):
    return job.params["words"]


def made(kind, role, place, **options):
    say = loop(Stage("say", max_batch=8, emits=True), times=words)
    graph = Graph("way", seq(Stage("draft", max_batch=8), say, Stage("polish", max_batch=8, emits=True)))
    stages = list(graph.stages)
    module = kind(place, **options)
    profiles = {name: table(name, *[0.001] * 8, device="toy") for name in stages}
    return serve(graph, dict.fromkeys(stages, module), profiles, policy=FCFS(drop_hopeless=False), stages=role)


def running(make, counts, settings=PATIENT):
    """A driver of instances by kind; `make(number, kind)` makes the service of each."""
    head = Head([], {}, Slack(), None, Each(counts), settings=settings)
    return driving(head, make, sum(counts.values()))


def ask(driver, words=3, slo=None):
    return driver.submit((), {"words": words}, None, slo, f"r{next(IDS)}")


def until(true):
    """Wait for what another thread does."""
    end = time.monotonic() + 30
    while not true():
        assert time.monotonic() < end
        time.sleep(0.001)


def at(driver, id):
    """Where a request is, and the stage that it waits for elsewhere."""
    one = driver.ask(lambda head, now: head._book.requests.get(id)).result(30)
    return ("", "") if one is None else (one.where, one.away)


def whole(way, words=3):
    stages = [step.partition(":")[2] for step in way]
    return stages == ["draft", *["say"] * words, "polish"]


def test_requests_go_from_role_to_role_and_their_streams_have_no_gap():
    with running(lambda number, kind: made(Part, ROLES[kind], kind), {"front": 1, "core": 2, "back": 1}) as driver:
        answers = [ask(driver) for _ in range(30)]
        for answer in answers:
            assert [update["word"] for update in answer] == [2, 3, 4, 5]
            way = answer.result(30)["way"]
            assert way == ("front:draft", *["core:say"] * 3, "back:polish")
            assert [output.index for output in answer.outputs] == [0, 1, 2, 3]
        assert {answer.outputs[0].member for answer in answers} <= {"core-2", "core-3"}
        until(lambda: driver.counts.moved == 60)  # an answer is there before its last move is counted
        assert driver.counts.on_time == 30 and not driver.counts.unmoved
        assert all(not instance.service.snapshot().open for instance in driver.machines.instances.values())


def test_a_promise_counts_what_waits_between_roles():
    gate = threading.Event()
    makes = {"front": {}, "core": {"gate": gate}, "back": {}}
    with running(lambda number, kind: made(Part, ROLES[kind], kind, **makes[kind]), dict.fromkeys(ROLES, 1)) as driver:
        late = ask(driver, slo=SLO(total=0.3))
        time.sleep(0.4)
        gate.set()
        outcome = late.outcome(30)
        assert outcome.status == "done" and not outcome.on_time and outcome.latency_s > 0.4


def test_an_instance_of_a_role_dies_with_requests_and_they_begin_anew():
    gate = threading.Event()

    def make(number, kind):
        return made(Part, ROLES[kind], f"{kind}{number}", **({"gate": gate} if number == 2 else {}))

    with running(make, {"front": 1, "core": 1, "back": 1}) as driver:
        answers = [ask(driver) for _ in range(5)]
        until(lambda: at(driver, answers[0].id)[0] == "core-2")
        driver.machines.die("core-2")
        gate.set()
        assert all(whole(answer.result(30)["way"]) for answer in answers)
        assert {answer.result()["way"][1] for answer in answers} == {"core4:say"}
        assert driver.counts.lost == 1 and driver.counts.on_time == 5


class Slow(Picky):
    """Takes long to take what was another's, until `gate` is set."""

    def adopt(self, given, piece):
        assert self.gate.wait(30)


def test_a_target_that_dies_while_it_takes_a_request_is_replaced():
    gate = threading.Event()
    with running(
        lambda number, kind: made(Slow, ROLES[kind], f"{kind}{number}", gate=gate if number == 2 else _set()),
        dict.fromkeys(ROLES, 1),
    ) as driver:
        answer = ask(driver)
        until(lambda: taking(driver, answer.id) == "core-2")
        driver.machines.die("core-2")
        gate.set()
        way = answer.result(30)["way"]
        assert whole(way) and way[:2] == ("front1:draft", "core4:say")
        assert driver.counts.restarted == 0 and driver.counts.lost == 1


def taking(driver, id):
    """The instance that is asked to take a request just now."""
    one = driver.ask(lambda head, now: head._book.requests.get(id)).result(30)
    moving = None if one is None else one.moving
    return "" if moving is None or moving.step != "take" else moving.target


def test_the_source_dies_while_a_request_waits_there_for_a_role_that_is_not_there():
    made_once = []

    def make(number, kind):
        if kind == "core" and len(made_once) < 2:
            made_once.append(number)
            raise_once = number > 3
            if raise_once:
                raise OSError("no device is free")
        return made(Part, ROLES[kind], f"{kind}{number}")

    with running(make, {"front": 1, "core": 1, "back": 1}) as driver:
        driver.machines.die("core-2")
        until(lambda: "core-2" not in driver.states)
        answer = ask(driver)
        until(lambda: at(driver, answer.id)[1] == "say" or answer.done())
        driver.machines.die("front-1")
        way = answer.result(60)["way"]
        assert whole(way) and way[0].startswith("front")


def test_one_that_its_target_does_not_take_yet_waits_where_it_is():
    gate = threading.Event()
    kinds = {"front": Picky, "core": Picky, "back": Picky}
    with running(
        lambda number, kind: made(kinds[kind], ROLES[kind], kind, gate=gate if kind == "core" else _set()),
        dict.fromkeys(ROLES, 1),
    ) as driver:
        answer = ask(driver)
        until(lambda: driver.counts.unmoved >= 2)
        assert at(driver, answer.id) == ("front-1", "say")
        gate.set()
        assert answer.result(30)["way"] == ("front:draft", *["core:say"] * 3, "back:polish")
        assert {event.reason for event in driver.events if type(event).__name__ == "Unmoved"} == {
            f"request {answer.id!r} cannot go on here: stage 'draft': not now"
        }


def _set():
    event = threading.Event()
    event.set()
    return event


def test_one_that_cannot_leave_fails_and_says_why():
    with running(lambda number, kind: made(Keeper, ROLES[kind], kind), dict.fromkeys(ROLES, 1)) as driver:
        answer = ask(driver)
        with pytest.raises(RequestFailed, match="stage 'say' is served elsewhere, and it cannot go there: not movable"):
            answer.result(30)
        assert driver.wait_empty(30) and driver.counts.failed == 1
        until(lambda: not driver.machines.instances["front-1"].service.snapshot().open)


@pytest.mark.parametrize("slo", [None, SLO(total=1.0)], ids=["no promise", "a promise"])
def test_a_role_that_nobody_has_is_waited_for_and_then_named(slo):
    impatient = Settings(suspect_s=60.0, dead_s=90.0, scale_s=0.02, patience_s=0.5)
    with running(lambda number, kind: made(Part, ROLES[kind], kind), {"front": 1, "core": 1}, impatient) as driver:
        answer = ask(driver, slo=slo)
        with pytest.raises(RequestFailed, match="no instance serves stage 'polish'"):
            answer.result(30)
        until(lambda: not driver.machines.instances["core-2"].service.snapshot().open)


def test_cancel_while_it_waits_for_a_role():
    with running(lambda number, kind: made(Part, ROLES[kind], kind), {"front": 1, "core": 1}) as driver:
        answer = ask(driver)
        until(lambda: at(driver, answer.id) == ("core-2", "polish"))
        assert answer.cancel()
        with pytest.raises(CancelledError):
            answer.result(30)
        assert driver.wait_empty(30) and driver.counts.cancelled == 1


def test_an_instance_of_a_role_is_drained_without_a_request_begun_anew():
    gate = threading.Event()

    def make(number, kind):
        return made(Part, ROLES[kind], f"{kind}{number}", **({"gate": gate} if number == 2 else {}))

    with running(make, {"front": 1, "core": 2, "back": 1}) as driver:
        answers = [ask(driver) for _ in range(6)]
        until(lambda: any(at(driver, answer.id)[0] == "core-2" for answer in answers))
        driver.ask(lambda head, now: head.drain("core-2", now)).result(30)
        gate.set()
        assert all(whole(answer.result(30)["way"]) for answer in answers)
        assert driver.counts.restarted == 0 and driver.counts.on_time == 6


def test_instances_have_only_the_models_that_they_serve():
    """Whoever has a model looks at requests for it, also while most of them are busy or gone."""

    def make(number, kind):
        def graph(name):
            return Graph(name, Stage(f"{name}.say", max_batch=8, emits=True))

        def mount(name):
            stage = f"{name}.say"
            return GraphMount(graph(name), {stage: Part(kind)}, {stage: table(stage, *[0.001] * 8, device="toy")})

        names = {"left": ["a"], "right": ["b"], "both": ["a", "b"], "unsaid": ["a"]}[kind]
        stages = None if kind == "unsaid" else names
        return Service({name: mount(name) for name in names}, policy=FCFS(drop_hopeless=False), stages=stages)

    def asked(driver, model):
        return driver.submit((), {"words": 1}, model, None, f"r{next(IDS)}")

    with running(make, {"left": 1, "right": 1}) as driver:
        for model, place in {"a": "left", "b": "right"}.items():
            assert [asked(driver, model).result(30)["way"] for _ in range(5)] == [(f"{place}:{model}.say",)] * 5
        with pytest.raises(RequestError, match="model=None: allowed: a, b"):
            asked(driver, None).result(30)
        with pytest.raises(RequestError, match="model='c'"):
            asked(driver, "c").result(30)
        driver.machines.die("right-2")
        assert asked(driver, "b").result(30)["way"] == ("right:b.say",)
        assert driver.counts.lost == 1
    why = r"instance 'unsaid-2' has the models \['a'\], others have \['a', 'b'\]: say which stages it serves"
    with pytest.raises(BackendError, match=why), running(make, {"both": 1, "unsaid": 1}):
        pass
