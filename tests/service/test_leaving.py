"""Requests that go from one service to another: one answer, streams without a gap, and what cannot go stays."""

from __future__ import annotations

import threading

import pytest
from crossing import Crossing, through_bytes
from toys import Gate, Step, adds_up, draw_and_decode, table

from neustream import (
    FCFS,
    SLO,
    EventLog,
    Graph,
    GraphError,
    RequestCancelled,
    RequestError,
    Stage,
    StageFailed,
    loop,
    seq,
    serve,
)

WORDS = 5


def chat():
    stage = Stage("say", max_batch=4, emits=True)
    return Graph("chat", loop(stage, times=lambda job: job.params["words"]))


class Words(Step):
    """Says how many words a request has said; counted in the request's state."""

    def __init__(self):
        super().__init__(self.say)

    def say(self, given):
        said = given.state.get("said", 0) + 1
        return {"said": said, "word": f"{given.params['voice']}{said}"}


class Keeper(Step):
    """Counts the words of each request by itself."""

    def __init__(self):
        super().__init__(self.say)
        self.said = {}

    def say(self, given):
        self.said[given.id] = self.said.get(given.id, 0) + 1
        return {"word": f"{given.params['voice']}{self.said[given.id]}"}

    def release(self, id):
        self.said.pop(id, None)


class Movable(Keeper):
    def export(self, given):
        return self.said[given.id]

    def adopt(self, given, piece):
        self.said[given.id] = piece


class Proud(Movable):
    def adopt(self, given, piece):
        raise StageFailed("not invented here")


def chatting(module, graph=None, **options):
    graph = graph or chat()
    profiles = {stage: table(stage, *[0.001] * 4) for stage in graph.stages}
    return serve(graph, dict.fromkeys(graph.stages, module), profiles, policy=FCFS(), **options)


def words(answer):
    return [update["word"] for update in answer]


def sums(service):
    return adds_up({"submitted": service.report.submitted, **service.report.counts})


@pytest.mark.parametrize("kind", [Words, Movable], ids=["in its state", "in the module"])
@pytest.mark.parametrize("step", range(1, WORDS))
def test_a_request_that_moves_at_any_step_is_the_unmoved_one(kind, step):
    log = EventLog()
    with chatting(kind()) as source, chatting(kind(), observers=[log]) as target:
        wanted = words(source.submit(words=WORDS, voice="a"))
        crossing = Crossing(source, "x", step)
        there = source.submit(words=WORDS, voice="a", id="x")
        here = crossing.to(target)
        assert words(here) == wanted and here.result() == target(words=WORDS, voice="a")
        assert [output.index for output in here.outputs] == list(range(WORDS))
        with pytest.raises(RequestError, match="request 'x' left: another engine goes on with it") as moved:
            there.result(30)
        assert moved.value.code == "moved"
        assert [output.update["word"] for output in there.outputs] == wanted[:step]
        assert len(log.requests["x"]["outputs"]) == WORDS - step
        assert source.report.submitted == 1 and sums(source) and sums(target)
        assert target.report.submitted == 2
    if kind is Movable:
        assert not source._mounts[""]._modules["say"].said and not target._mounts[""]._modules["say"].said


def test_it_moves_on_and_back_while_its_promise_counts_on():
    with chatting(Words()) as one, chatting(Words()) as other:
        first = Crossing(one, "x", 1)
        one.submit(words=WORDS, voice="b", id="x", slo=SLO(total=60.0))
        second = Crossing(other, "x", 2)
        first.to(other, waited_s=20.0)
        back = second.to(one, waited_s=30.0)
        assert words(back) == [f"b{at + 1}" for at in range(WORDS)]
        assert back.ended.latency_s > 50 and back.ended.on_time
        assert sums(one) and sums(other) and other.report.submitted == 0


def test_a_promise_that_was_broken_on_the_way():
    with chatting(Words()) as one, chatting(Words()) as other:
        crossing = Crossing(one, "x", 1)
        one.submit(words=WORDS, voice="b", id="x", slo=SLO(total=60.0))
        moved = crossing.left.result(30)
        assert other.take(moved, waited_s=100.0).result(30).outcome(30).status in ("done", "dropped")
        assert other.report.counts["on_time"] == 0 and sums(other)


def test_a_request_that_has_not_begun_goes_without_anything():
    graph = draw_and_decode(max_batch=1)
    modules = [Step(lambda given: {"line": given.state.get("line", "") + given.stage}) for _ in range(2)]
    with chatting(modules[0], graph) as source, chatting(modules[1], draw_and_decode(max_batch=1)) as target:
        held = threading.Event()
        source._devices[0].executor.call(lambda: held.wait(30))  # the first request's step does not end
        first, second = (source.submit(steps=2, id=id) for id in "ab")
        moved = source.give("b").result(30)
        assert moved.there.pieces == {} and not moved.outputs and moved.there.carry.started_ago is None
        assert target.take(through_bytes(moved)).result(30).result(30)["line"] == "drawdrawdecode"
        held.set()
        assert first.result(30)["line"] == "drawdrawdecode"
        assert second.outcome(30).code == "moved" and len(modules[0].sizes) == 3


# -- what cannot go ---------------------------------------------------------------------------------


def test_what_a_module_cannot_part_with_stays_and_goes_on():
    with chatting(Keeper()) as source:
        crossing = Crossing(source, "x", 2)
        answer = source.submit(words=WORDS, voice="a", id="x")
        why = "request 'x' stays: stage 'say': request 'x' cannot move: Keeper keeps something of it"
        with pytest.raises(StageFailed, match=why):
            crossing.left.result(30)
        assert words(answer) == [f"a{at + 1}" for at in range(WORDS)] and sums(source)


def test_a_target_that_cannot_go_on_says_so_and_the_source_may_take_it_back():
    with chatting(Movable()) as source, chatting(Proud()) as target:
        crossing = Crossing(source, "x", 2)
        source.submit(words=WORDS, voice="a", id="x")
        moved = crossing.left.result(30)
        with pytest.raises(StageFailed, match=r"request 'x' cannot go on here: stage 'say': not invented here"):
            target.take(moved).result(30)
        assert target.snapshot().open == 0 and not target._requests.open
        assert words(source.take(moved).result(30)) == [f"a{at + 1}" for at in range(WORDS)]
        assert sums(source) and target.report.submitted == 0


def test_another_graph_is_refused_with_both_prints():
    other = Graph("chat", seq(loop(Stage("say", max_batch=4, emits=True), times=lambda job: 9), Stage("wave")))
    with chatting(Words()) as source, chatting(Words(), other) as target:
        crossing = Crossing(source, "x", 1)
        source.submit(words=WORDS, voice="a", id="x")
        with pytest.raises(GraphError, match=f"with print {chat().print}; graph 'chat' here has print {other.print}"):
            crossing.to(target)
        assert target.snapshot().open == 0


def test_who_is_not_here_who_is_here_already_and_who_leaves_twice():
    with chatting(Words()) as source, chatting(Words()) as target:
        with pytest.raises(RequestError, match="give: no request 'x' is being served here"):
            source.give("x").result(30)
        crossing = Crossing(source, "x", 1)
        source.submit(words=WORDS, voice="a", id="x")
        moved = crossing.left.result(30)
        held = threading.Event()
        target._devices[0].executor.call(lambda: held.wait(30))
        here = target.take(moved).result(30)
        with pytest.raises(RequestError, match="request id 'x' is already being served"):
            target.take(moved)
        first = target.give("x")
        with pytest.raises(RequestError, match="'x' is to leave already"):
            target.give("x").result(30)
        held.set()
        assert first.result(30).id == "x" and here.outcome(30).code == "moved"


def test_one_that_is_cancelled_before_it_could_leave():
    gate = Gate()
    with chatting(gate) as source:
        answer = source.submit(words=WORDS, id="x")
        assert gate.began.wait(30)
        gone = source.give("x")
        assert answer.cancel()
        gate.go.set()
        with pytest.raises(RequestError, match="request 'x' is cancelled: cancelled by the caller"):
            gone.result(30)
        assert sums(source) and source.snapshot().open == 0


def test_one_that_is_cancelled_after_its_move():
    with chatting(Words()) as source, chatting(Words()) as target:
        crossing = Crossing(source, "x", 1)
        source.submit(words=10**6, voice="a", id="x")
        here = crossing.to(target)
        assert not source.cancel("x") and target.cancel("x")
        assert here.outcome(30).error.__class__ is RequestCancelled
        assert len(here.outputs) >= 1


def test_one_that_ends_with_the_step_it_would_leave_after():
    with chatting(Words()) as source:
        crossing = Crossing(source, "x", WORDS)
        answer = source.submit(words=WORDS, voice="a", id="x")
        with pytest.raises(RequestError, match="request 'x' is done"):
            crossing.left.result(30)
        assert len(words(answer)) == WORDS


def test_a_closed_service_gives_and_takes_nothing():
    with chatting(Words()) as source:
        crossing = Crossing(source, "x", 1)
        source.submit(words=WORDS, voice="a", id="x")
        moved = crossing.left.result(30)
    for ask in (lambda: source.take(moved), lambda: source.give("x")):
        with pytest.raises(RequestError) as closed:
            ask()
        assert closed.value.code == "closed"
