"""What is far ahead in a long sequence is kept; what is near is asked anew at each call."""

from __future__ import annotations

from collections import Counter
from functools import cache

import pytest

from neustream import (
    FCFS,
    SLO,
    Graph,
    LinearProfile,
    Pool,
    Request,
    Scheduler,
    Stage,
    call,
    loop,
    par,
    seq,
    switch,
    tool,
)
from neustream.core.cursor import Cursor
from neustream.core.entry import Entry
from neustream.core.seen import Seen
from neustream.core.step_times import StepTimes
from neustream.core.stretch import EVERY, NEAR, Tail
from neustream.core.work import Work

LONG = 60
SAID = {"a": 1.0, "b": 100.0}


@cache
def sized(name):
    return Stage(name, size=lambda job: job.params["tokens"], emits=name == "s2")


def asking(index, ask):
    """A call of one of three stages, with params of its own."""
    return call(sized(f"s{index % 3}"), f"c{index}", params=lambda job: ask(index, job))


def by_index(index, job):
    return {"tokens": 1.0 + index}


def mixed(ask=by_index):
    """Calls with params, plain stages that read the request's, loops, switches, branches, tools."""
    nodes = [asking(index, ask) for index in range(LONG)]
    nodes[5] = sized("plain")
    nodes[20] = sized("s1")
    nodes[30] = loop(nodes[30], times=3)
    nodes[37] = loop(sized("again"), until=lambda job: True, expect=4)
    nodes[40] = switch(lambda job: "b", {"a": nodes[40], "b": tool("other")}, likely="b")
    nodes[44:56] = [tool(f"t{index}") for index in range(44, 56)]
    return nodes


def job_of(root):
    graph = Graph("g", root)
    job = Entry(Request("r", graph, slo=SLO(total=1e9), params={"tokens": 2.5}))
    job.history, job.cursor = Seen(), Cursor(graph, job)
    job.stage = job.cursor.stage
    profiles = {
        name: LinearProfile(name, base=0.01 * index, per_size=0.001 * index, max_batch=1)
        for index, name in enumerate(graph.stages, 1)
    }
    return job, profiles


def by_hand(job, times):
    """Calls, sizes in calls with other params, and seconds, all that is ahead asked anew."""
    calls, sizes, seconds, to_output, own = Counter(), {}, 0.0, None, job.params
    for stage, count in job.cursor.ahead(job):
        size = stage.size_of(job)
        calls[stage.name] += count
        if job.params is not own and stage.size is not None:
            sizes[stage.name] = size
        alone = times.alone(stage, size)
        if stage.emits and to_output is None:
            to_output = seconds + alone
        seconds += count * alone
    return calls, sizes, seconds, to_output


def sized_ahead(job):
    """Of stages that have sizes."""
    stages = job.request.graph.stages
    return {name: size for name, size in job.sizes_ahead.items() if stages[name].size is not None}


@pytest.mark.parametrize("around", ["nothing", "a call", "a loop", "a sequence"])
def test_what_is_ahead_is_what_asking_all_of_it_says(around):
    inner = seq(*mixed())
    root = {
        "nothing": inner,
        "a call": seq(sized("first"), call(inner, "agent"), sized("last")),
        "a loop": loop(inner, times=2),
        "a sequence": seq(inner, *[asking(LONG + index, by_index) for index in range(20)]),
    }[around]
    job, profiles = job_of(root)
    times = StepTimes(profiles)
    work = Work(times)
    moves = 0
    while job.cursor.stage is not None:
        work.measure(job)
        calls, sizes, seconds, to_output = by_hand(job, times)
        assert dict(job.calls_left) == calls and sized_ahead(job) == sizes
        assert job.remaining_s == pytest.approx(seconds)
        assert job.next_output_s == pytest.approx(seconds if to_output is None else to_output)
        job.stage = job.cursor.advance(job)
        moves += 1
    assert moves > LONG


@pytest.mark.parametrize("count", [12, 15, 16, 40])
def test_a_sequence_in_two_calls_is_asked_with_the_params_of_each(count):
    inner = seq(*[sized("s0")] * count)
    calls = [call(inner, name, params=lambda job, tokens=tokens: {"tokens": tokens}) for name, tokens in SAID.items()]
    job, profiles = job_of(seq(*calls))
    times = StepTimes(profiles)
    work = Work(times)
    while job.cursor.stage is not None:
        work.measure(job)
        assert job.remaining_s == pytest.approx(by_hand(job, times)[2])
        job.stage = job.cursor.advance(job)


def test_legs_are_due_as_if_all_were_asked(monkeypatch):
    job, profiles = job_of(seq(*mixed()))
    whole, _ = job_of(job.request.graph.root)
    whole.cursor.stage = whole.stage
    legs, others = Work(StepTimes(profiles)).legs, Work(StepTimes(profiles)).legs
    while job.cursor.stage is not None:
        legs.promise(job, 0.0, 0.0)
        with monkeypatch.context() as patched:
            patched.setattr("neustream.core.cursor.ahead_of", lambda node, at: iter(node.nodes[at + 1 :]))
            others.promise(whole, 0.0, 0.0)
        assert (job.leg_due, job.leg_latest) == pytest.approx((whole.leg_due, whole.leg_latest))
        assert dict(job.later) == dict(whole.later)
        job.stage, whole.stage = job.cursor.advance(job), whole.cursor.advance(whole)


def test_what_a_call_said_counts_at_once_for_what_is_near_and_later_for_what_is_far():
    said = 1.0
    job, profiles = job_of(seq(*[asking(index, lambda index, job: {"tokens": said}) for index in range(LONG)]))
    times = StepTimes(profiles)
    work = Work(times)
    late = []
    while job.cursor.stage is not None:
        work.measure(job)
        exact = by_hand(job, times)[2]
        late.append(job.remaining_s < exact - 1e-9)
        if len(late) == 1:
            near = sum(times.alone(stage, 9.0) - times.alone(stage, 1.0) for stage in stages(job, NEAR + 1))
            before, said = job.remaining_s, 9.0
            work.measure(job)
            assert before + near - 1e-9 <= job.remaining_s < by_hand(job, times)[2]
        job.stage = job.cursor.advance(job)
    assert late.index(True) == 1 and not any(late[LONG // 4 + 1 :]), "all are asked again on a quarter of the way"


def stages(job, count):
    """The stages of the next calls."""
    return [stage for (stage, _), _ in zip(job.cursor.ahead(job), range(count), strict=False)]


def test_nothing_is_kept_of_short_sequences_and_few_nodes_are_near_in_long_ones():
    for count in range(1, LONG):
        job, _ = job_of(seq(*[asking(index, by_index) for index in range(count)]))
        parts = [node for node, _, _ in job.cursor.rest(job)]
        tails = [part for part in parts if isinstance(part, Tail)]
        assert len(tails) <= 1 and (tails or count <= NEAR + 2 * EVERY)
        assert len(parts) - len(tails) < NEAR + 2 * EVERY
        assert sum(len(tail.children) for tail in tails) + len(parts) - len(tails) == count - 1


def test_who_forks_in_a_long_sequence_keeps_what_is_behind_the_join():
    nodes = mixed()
    nodes[10] = par(sized("left"), sized("right"))
    job, profiles = job_of(seq(*nodes))
    times = StepTimes(profiles)
    work = Work(times)
    for _ in range(10):
        work.measure(job)
        calls, sizes, _, _ = by_hand(job, times)
        assert dict(job.calls_left) == calls and sized_ahead(job) == sizes
        job.stage = job.cursor.advance(job)
    assert job.cursor.fork is nodes[10]
    job.status = "forked"
    seconds = 0.0
    for stage, count in job.cursor.ahead(job):
        seconds += count * times.alone(stage, stage.size_of(job))
    assert work.legs.after(job).alone == pytest.approx(seconds)


@pytest.mark.parametrize("ahead", [False, True])
def test_nobody_is_given_up_for_what_was_asked_before_a_call_said_less(ahead):
    """A first call says that all others are short: what is kept of them would be late, and is asked anew."""
    nodes = [asking(3 * index, lambda index, job: {"tokens": job.state.get("said", 1000.0)}) for index in range(LONG)]
    graph = Graph("g", seq(*nodes))
    profiles = {"s0": LinearProfile("s0", base=0.01, per_size=0.001, max_batch=1)}
    some = Scheduler([Pool("gpu", ("s0",))], FCFS(), profiles)
    some.submit(Request("r", graph, slo=SLO(total=62.0), params={}), 0.0)
    now = 0.0
    for count in range(LONG):
        batch = some.next_batch("gpu", now, 0)
        assert batch is not None and [job.id for job in batch.jobs] == ["r"]
        if ahead:
            some.plan(batch, now)
        now += batch.expected if count else 20.0
        some.finish(batch, [{"said": 1.0}], now)
    assert not some.jobs and now < 62.0
