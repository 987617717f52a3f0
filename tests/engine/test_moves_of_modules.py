"""Requests that move between executors: what their modules keep goes along, or forbids it by name."""

from __future__ import annotations

import pickle

import pytest
from toys import Step, draw_and_decode, table

from neustream import (
    FCFS,
    BackendError,
    Graph,
    Pool,
    Request,
    Scheduler,
    Stage,
    StageFailed,
    ThreadExecutor,
    WallClock,
    seq,
)
from neustream.core.batch import StepInput, input_of
from neustream.engine.worker import movable

PROFILES = {"draw": table("draw", 1.0, 1.2), "decode": table("decode", 1.0)}


def drawn(given):
    """A value that tells which steps were taken, in which order."""
    line = given.state.get("line", given.id)
    return {"line": f"{line}.{len(line)}"}


class Diary(Step):
    """Keeps the line that it writes to itself."""

    def __init__(self):
        super().__init__(self.write)
        self.lines = {}

    def write(self, given):
        line = self.lines.get(given.id, given.id)
        self.lines[given.id] = f"{line}.{len(line)}"
        return {"line": self.lines[given.id]}

    def release(self, id):
        self.lines.pop(id, None)


class Movable(Diary):
    """The same, and lets it go."""

    def export(self, given):
        return self.lines.get(given.id)

    def adopt(self, given, piece):
        if not piece.startswith(given.id):
            raise StageFailed(f"{piece!r} is no line of {given.id!r}")
        self.lines[given.id] = piece


class Side:
    """A scheduler and an executor, step by step."""

    def __init__(self, modules, graph=None):
        self.graph = graph or draw_and_decode()
        self.scheduler = Scheduler([Pool("gpu", tuple(self.graph.stages))], FCFS(), PROFILES)
        self.executor = ThreadExecutor(modules)
        self.clock = WallClock()

    def steps(self, count):
        for _ in range(count):
            batch = self.scheduler.next_batch("gpu", 0.0)
            self.executor.start(batch, self.clock)
            [done] = self.clock.wait()
            self.scheduler.finish(batch, done.results, 0.0)

    def leave(self, id):
        self.scheduler.hold(id, 0.0)
        pieces = self.executor.export(input_of(self.scheduler.jobs[id])).result()
        carry = self.scheduler.give(id, 0.0)
        self.executor.release(id)
        return pickle.loads(pickle.dumps((carry, pieces)))

    def arrive(self, carry, pieces):
        self.executor.adopt(carry.input(), pieces).result()
        self.scheduler.take(carry, self.graph, 0.0)

    def ended(self):
        return [event for event in self.scheduler.pop_events() if hasattr(event, "output")]


def modules(kind):
    return {"draw": Step(drawn) if kind is None else kind(), "decode": Step(drawn)}


@pytest.mark.parametrize("kind", [None, Movable], ids=["keeps nothing", "keeps a line"])
@pytest.mark.parametrize("at", range(5))
def test_a_request_that_moves_at_any_step_is_the_unmoved_one(kind, at):
    alone, source, target = [Side(modules(kind)) for _ in range(3)]
    for side, ids in ((alone, "m"), (source, "mx"), (target, "y")):
        for id in ids:
            side.scheduler.submit(Request(id, side.graph, params={"steps": 4}), 0.0)
    alone.steps(5)
    source.steps(at)
    target.steps(1)
    target.arrive(*source.leave("m"))
    while source.scheduler.jobs:
        source.steps(1)
    while target.scheduler.jobs:
        target.steps(1)
    [wanted] = alone.ended()
    got = {end.id: end.output for side in (source, target) for end in side.ended()}
    assert got["m"] == wanted.output
    assert got["x"]["line"] == wanted.output["line"].replace("m", "x") and len(got) == 3
    draw = source.executor._workers[0].modules["draw"]
    for side in (alone, source, target):
        side.executor.close()
    if kind is not None:
        assert "m" not in draw.lines


def test_what_keeps_something_and_cannot_part_with_it_forbids_the_move():
    source = Side(modules(Diary))
    for id in "ab":
        source.scheduler.submit(Request(id, source.graph, params={"steps": 2}), 0.0)
    fresh = input_of(source.scheduler.jobs["a"])
    assert source.executor.export(fresh).result() == {}  # nothing has begun: all may move
    source.steps(1)
    words = "stage 'draw': request 'a' cannot move: Diary keeps something of it"
    with pytest.raises(StageFailed, match=words):
        source.executor.export(input_of(source.scheduler.jobs["a"])).result()
    source.executor.release("a")
    assert source.executor.export(fresh).result() == {}
    source.executor.close()


@pytest.mark.parametrize(("module", "may"), [(Step(), True), (Diary(), False), (Movable(), True)])
def test_movable(module, may):
    assert movable(module) is may


def given(id="a", stage="draw"):
    return StepInput(id, {}, {}, stage)


def test_pieces_that_do_not_fit_are_refused_and_leave_nothing_behind():
    both = {"draw": Movable(), "other": Movable(), "plain": Step(), "diary": Diary()}
    executor = ThreadExecutor(both)

    def refused(pieces, why, id="a"):
        with pytest.raises(StageFailed, match=why):
            executor.adopt(given(id), pieces).result()

    refused({"draw": "a.1", "unknown": "a"}, r"stage 'unknown': no module for it; modules: \['diary', 'draw'")
    refused({"draw": "a.1", "other": "b"}, "stage 'other': 'b' is no line of 'a'")
    refused({"draw": "a.1", "other": None}, "stage 'other': AttributeError: 'NoneType'")
    for name in ("plain", "diary"):
        refused({name: "a"}, f"stage '{name}': request 'a' cannot move")
    assert not both["draw"].lines and not both["other"].lines
    executor.adopt(given(), {"draw": "a.1", "other": "a"}).result()
    refused({"draw": "a.2"}, "request 'a' is here already")
    assert both["draw"].lines == {"a": "a.1"}
    executor.close()
    with pytest.raises(BackendError, match="closed"):
        executor.export(given())


def test_a_module_of_several_stages_moves_what_it_keeps_once():
    class Counted(Movable):
        exports = 0

        def export(self, given):
            self.exports += 1
            return super().export(given)

    one = Counted()
    graph = Graph("twice", seq(Stage("draw"), Stage("decode")))
    source = Side({"draw": one, "decode": one}, graph)
    source.scheduler.submit(Request("a", graph), 0.0)
    source.steps(1)
    carry, pieces = source.leave("a")
    assert pieces == {"draw": "a.1"} and one.exports == 1
    assert carry.saved.stage == "decode"
    other = Counted()
    target = Side({"draw": other, "decode": other}, graph)
    target.arrive(carry, pieces)
    target.steps(1)
    [end] = target.ended()
    assert end.output["line"] == "a.1.3"
    source.executor.close()
    target.executor.close()


def test_each_worker_keeps_its_own():
    sets = [{"draw": Movable(), "decode": Step()} for _ in range(2)]
    executor = ThreadExecutor(sets, ["cpu", "cpu"])
    executor.adopt(given(), {"draw": "a.1"}, worker=1).result()
    assert executor.export(given()).result() == {}
    assert executor.export(given(), worker=1).result() == {"draw": "a.1"}
    executor.close()
