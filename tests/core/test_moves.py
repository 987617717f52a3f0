"""Jobs that leave one scheduler for another: the same calls, in the same order, and one end."""

from __future__ import annotations

import pickle
import random
from collections import Counter
from dataclasses import replace
from math import inf

import pytest
from hand import Hand, set_policy
from hypothesis import given, settings
from hypothesis import strategies as st
from walks import free, step, walk

from neustream import (
    FCFS,
    POLICIES,
    SLO,
    Decision,
    Graph,
    GraphError,
    Job,
    KVCache,
    LinearProfile,
    PolicyError,
    Pool,
    Request,
    RequestError,
    Scheduler,
    Stage,
    TableProfile,
    loop,
    seq,
)
from neustream.core.cursor import Cursor
from neustream.core.events import Emitted, Ended, Given, Held, Left
from neustream.core.steps import StepProfile
from neustream.graphs import llm, llm_profiles

STAGES = [Stage("encode", 2), Stage("denoise", 4), Stage("decode", 3, emits=True)]
PROFILES = {
    "encode": LinearProfile("encode", base=0.25, max_batch=2),
    "denoise": TableProfile("denoise", [1, 2, 4], [1.0, 1.125, 1.5]),
    "decode": LinearProfile("decode", base=0.25, per_job=0.25, max_batch=4),
}
STEPS = StepProfile(
    "llm",
    LinearProfile("p", base=0.25, per_size=0.0625, max_batch=8),
    LinearProfile("d", base=0.25, per_job=0.0625, max_batch=8),
)
slos = st.sampled_from([SLO(), SLO(total=12.0), SLO(total=60.0), SLO(total=40.0, first=20.0)])
anything = st.builds(
    lambda nodes, times, last: seq(*nodes, loop(STAGES[1], times=times), last),
    st.lists(free(STAGES), min_size=1, max_size=3),
    st.integers(1, 5),
    free(STAGES),
)


class Twins:
    """Two schedulers that jobs move between at random, and what was seen of each job."""

    def __init__(self, make, graphs, draw):
        self.schedulers, self.graphs, self.draw = [make(), make()], graphs, draw
        self.now = 0.0
        self.calls, self.outputs, self.ends = {}, {}, Counter()
        self.status, self.moves = {}, 0
        self.owner = {}

    def submit(self, id, slo, params, side=0):
        self.calls[id], self.outputs[id] = [], []
        self.owner[id] = side
        self.schedulers[side].submit(Request(id, self.graphs[side], self.now, slo, params), self.now)
        self.events()

    def run(self, pool, update, cached=False):
        """Steps on both sides, with moves before, during and after them, until all jobs have ended."""
        for _ in range(4000):
            if not any(scheduler.jobs for scheduler in self.schedulers):
                return
            for side, scheduler in enumerate(self.schedulers):
                self.some_leave(side, cached)
                batch = scheduler.next_batch(pool, self.now)
                self.events()
                if batch is None:
                    continue
                for job in batch.jobs:
                    self.calls[job.id].append(job.stage.name)
                for job in self.draw.sample(batch.jobs, len(batch.jobs) // 2):
                    scheduler.hold(job.id, self.now)
                self.now += batch.expected
                scheduler.finish(batch, [update(job) for job in batch.jobs], self.now)
                self.events()
            self.now += 0.125
        raise AssertionError("jobs are still open")

    def some_leave(self, side, cached):
        scheduler, other = self.schedulers[side], self.schedulers[1 - side]
        for id, job in list(scheduler.jobs.items()):
            if job.status != "held" and self.draw.random() < 0.7:
                continue
            if job.status == "held" and self.draw.random() < 0.2:
                scheduler.resume(id)
                continue
            kept = job.num_blocks and job.kept
            carry = scheduler.give(id, self.now)
            assert id not in scheduler.jobs and job.status == "gone" and not job.num_blocks
            assert carry.kept == kept
            carry = pickle.loads(pickle.dumps(carry))
            bring = cached and self.draw.random() < 0.7
            try:
                other.take(carry, self.graphs[1 - side], self.now, cached=bring)
            except RequestError:  # no blocks for what it kept: without them there is always room
                assert bring
                other.take(carry, self.graphs[1 - side], self.now)
            self.owner[id] = 1 - side
            self.moves += 1
        self.events()

    def events(self):
        for scheduler in self.schedulers:
            for event in scheduler.pop_events():
                if isinstance(event, Emitted):
                    assert event.index == len(self.outputs[event.id])
                    self.outputs[event.id].append(event.update)
                elif isinstance(event, Ended):
                    self.ends[event.id] += 1
                    self.status[event.id] = event.status, event.reason


def two_graphs(node):
    return Graph("any", node), Graph("any", node)


@settings(max_examples=60, deadline=None)
@given(
    anything,
    st.lists(slos, min_size=1, max_size=6),
    st.sampled_from(sorted(POLICIES)),
    st.booleans(),
    st.randoms(use_true_random=False),
)
def test_calls_and_outputs_are_those_of_a_job_that_stays(node, promises, policy, sticky, draw):
    graph = Graph("any", node)
    names = tuple(graph.stages)
    pool = Pool("gpu", names, sticky=sticky)

    def make():
        profiles = {name: PROFILES[name] for name in names}
        return Scheduler([pool], POLICIES[policy](), profiles)

    twins = Twins(make, (graph, graph), draw)
    for index, slo in enumerate(promises):
        twins.submit(f"r{index}", slo, {}, index % 2)
    twins.run("gpu", step)
    for id, (status, reason) in twins.status.items():
        alone = Job(Request(id, graph))
        expected, emitted = [], 0
        for stage in walk(node, alone):
            expected.append(stage.name)
            alone.state.update(step(alone))
            emitted += stage.emits
        assert twins.ends[id] == 1
        if status == "done":
            assert twins.calls[id] == expected
            assert len(twins.outputs[id]) == emitted
        else:
            assert status == "dropped" and reason
            assert twins.calls[id] == expected[: len(twins.calls[id])]
    assert set(twins.ends) == set(twins.calls)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 20), st.integers(1, 9)), min_size=1, max_size=6),
    st.sampled_from(["fcfs", "edf", "priced", "neustream_llm", "sarathi", "priority"]),
    st.booleans(),
    st.randoms(use_true_random=False),
)
def test_generations_go_on_where_they_were_with_their_blocks_or_without(asks, policy, cached, draw):
    graph = Graph("chat", llm("llm", max_batch=6))
    pool = Pool("gpu", tuple(graph.stages), kv_caches={"llm": KVCache(10, 4)}, step_tokens=8)
    twins = Twins(lambda: Scheduler([pool], POLICIES[policy](), llm_profiles("llm", STEPS, 6)), (graph, graph), draw)
    for index, (prompt, most) in enumerate(asks):
        twins.submit(f"r{index}", SLO(), {"prompt_tokens": prompt, "max_tokens": most}, index % 2)
    twins.run("gpu", lambda job: {"at": job.call_outputs}, cached)
    for index, (_, most) in enumerate(asks):
        assert twins.status[f"r{index}"] == ("done", "")
        assert [update["at"] for update in twins.outputs[f"r{index}"]] == list(range(most))
    for scheduler in twins.schedulers:
        assert scheduler.reserve("gpu", "llm", 40).blocks == 10  # all of them are free again


# -- one move, step by step ---------------------------------------------------------------------------

IMAGE = Graph("image", seq(STAGES[0], loop(STAGES[1], times=4), STAGES[2]))


def scheduler_of(graph=IMAGE, policy=None, **options):
    pools = [Pool("gpu", tuple(graph.stages))]
    return Scheduler(pools, policy or FCFS(), PROFILES, **options)


def one_step(scheduler, now, took=1.0, update=None):
    batch = scheduler.next_batch("gpu", now)
    assert batch is not None
    scheduler.finish(batch, [update or {} for _ in batch.jobs], now + took)
    return batch


def test_what_leaves_is_relative_and_arrives_on_another_clock():
    here, there = scheduler_of(), scheduler_of()
    job = here.submit(Request("a", IMAGE, 1.0, SLO(total=10.0), {"seed": 7}), 1.0)
    one_step(here, 1.0, 0.5, {"x": 1})
    one_step(here, 1.5)
    assert job.calls_left == {"denoise": 3, "decode": 1}
    carry = here.give("a", 3.0)
    assert (carry.age, carry.due_in, carry.started_ago) == (2.0, 8.0, 2.0)
    assert [type(event) for event in here.pop_events()] == [Given]
    moved = there.take(carry, IMAGE, 100.0)
    assert (moved.arrival, moved.due, moved.started_at) == (98.0, 108.0, 98.0)
    assert (moved.state, moved.params, moved.worker) == ({"x": 1}, {"seed": 7}, 0)
    assert (moved.calls_left, moved.remaining_s) == ({"denoise": 3, "decode": 1}, 3.5)
    assert (moved.alone_s, moved.planned_calls) == (4.75, {"encode": 1, "denoise": 4, "decode": 1})
    for at in range(4):
        one_step(there, 100.0 + at)
    (ended,) = [event for event in there.pop_events() if isinstance(event, Ended)]
    assert (ended.status, ended.on_time, ended.latency_s) == ("done", True, 6.0)


def test_a_clock_that_began_later_is_no_obstacle():
    here, there = scheduler_of(), scheduler_of()
    here.submit(Request("a", IMAGE, 5.0, SLO(total=10.0)), 5.0)
    moved = there.take(here.give("a", 9.0), IMAGE, 1.0)
    assert (moved.arrival, moved.due) == (-3.0, 7.0)


def test_a_job_in_a_step_is_held_first():
    scheduler = scheduler_of()
    scheduler.submit(Request("a", IMAGE), 0.0)
    batch = scheduler.next_batch("gpu", 0.0)
    with pytest.raises(PolicyError, match="give: request 'a' is in a step; hold it"):
        scheduler.give("a", 0.0)
    scheduler.hold("a", 0.0)
    assert not scheduler.pop_events()
    scheduler.finish(batch, [{}], 1.0)
    assert scheduler.pop_events() == [Held("a", 1.0)]
    assert scheduler.next_batch("gpu", 1.0) is None  # in no view
    assert scheduler.give("a", 1.0).saved.stage == "denoise"


def test_a_held_job_runs_again_when_it_is_resumed_and_can_be_cancelled():
    scheduler = scheduler_of()
    for id in "ab":
        scheduler.submit(Request(id, IMAGE), 0.0)
    scheduler.hold("a", 0.0)
    assert [job.id for job in scheduler.next_batch("gpu", 0.0).jobs] == ["b"]
    scheduler.resume("a")
    assert [job.id for job in scheduler.next_batch("gpu", 0.0, 1).jobs] == ["a"]
    scheduler = scheduler_of()
    scheduler.submit(Request("a", IMAGE), 0.0)
    scheduler.hold("a", 0.0)
    assert scheduler.cancel("a", 0.5)
    assert [type(event) for event in scheduler.pop_events()] == [Held, Ended]
    scheduler.submit(Request("b", IMAGE), 0.5)
    assert scheduler.next_batch("gpu", 0.5) is not None


def test_unknown_and_ended_requests_cannot_be_moved():
    scheduler = scheduler_of()
    scheduler.submit(Request("a", IMAGE), 0.0)
    scheduler.cancel("a", 0.0)
    for move in (scheduler.hold, scheduler.give):
        for id in ("a", "nobody"):
            with pytest.raises(RequestError, match=f"{move.__name__}: no request '{id}' is being served"):
                move(id, 0.0)
    with pytest.raises(RequestError, match="resume: no request 'a'"):
        scheduler.resume("a")
    scheduler.submit(Request("b", IMAGE), 0.0)
    with pytest.raises(RequestError, match="resume: request 'b' is not held"):
        scheduler.resume("b")


def test_a_carry_of_another_graph_is_refused_with_both_prints():
    here, there = scheduler_of(), scheduler_of()
    here.submit(Request("a", IMAGE), 0.0)
    carry = here.give("a", 0.0)
    other = Graph("image", seq(STAGES[0], STAGES[1], STAGES[2]))
    with pytest.raises(GraphError, match=f"print {IMAGE.print}; .* has print {other.print}"):
        there.take(carry, other, 0.0)
    assert not there.jobs
    assert there.take(carry, IMAGE, 0.0).status == "waiting"
    with pytest.raises(RequestError, match="'a' is already being served"):
        there.take(carry, IMAGE, 0.0)


def test_a_carry_whose_place_is_not_in_the_graph_is_refused():
    here = scheduler_of()
    here.submit(Request("a", IMAGE), 0.0)
    carry = here.give("a", 0.0)
    there = scheduler_of()
    for frames, problem in ((((99, 0, 1),), "loop 99 at 0 of 1"), (((1, 0, 1),), "loop 1 at 0 of 1")):
        saved = carry.saved._replace(frames=frames)
        with pytest.raises(GraphError, match=problem):
            there.take(replace(carry, saved=saved), IMAGE, 0.0)
    with pytest.raises(GraphError, match="no stage 'vae'"):
        there.take(replace(carry, saved=carry.saved._replace(stage="vae")), IMAGE, 0.0)
    assert not there.jobs


@settings(max_examples=100, deadline=None)
@given(anything, st.integers(0, 12), st.integers(1, 3))
def test_a_saved_place_goes_on_as_the_cursor_that_stayed(node, stay, every):
    graph = Graph("any", node)
    job, moved = Job(Request("a", graph)), Job(Request("a", graph))
    here, there = Cursor(graph, job), Cursor(graph, moved)
    for count in range(60):
        assert (here.stage is None) == (there.stage is None)
        if here.stage is None:
            break
        assert here.stage is there.stage
        assert list(here.ahead(job)) == list(there.ahead(moved))
        if count >= stay and count % every == 0:
            there = Cursor.load(graph, pickle.loads(pickle.dumps(there.save(graph))))
        for one in (job, moved):
            one.state.update(step(one))
        here.advance(job)
        there.advance(moved)


def test_prints_differ_with_structure_and_not_with_conditions():
    one = Graph("g", seq(STAGES[0], loop(STAGES[1], times=3)))
    assert one.print == Graph("g", seq(STAGES[0], loop(STAGES[1], times=9))).print
    assert len({one.print, Graph("h", one.root).print, Graph("g", seq(STAGES[0], STAGES[1])).print}) == 3
    assert [type(node).__name__ for node in one.nodes] == ["Seq", "Stage", "Loop", "Stage"]


# -- blocks -------------------------------------------------------------------------------------------

CHAT = Graph("chat", llm("llm", max_batch=4))


def chat_scheduler(blocks=8, choose=None):
    pool = Pool("gpu", tuple(CHAT.stages), kv_caches={"llm": KVCache(blocks, 4)})
    hand = Hand(choose or (lambda view: Decision(view.jobs)))
    return Scheduler([pool], hand, llm_profiles("llm", STEPS, 4))


def ask(id, prompt=6, most=20):
    return Request(id, CHAT, params={"prompt_tokens": prompt, "max_tokens": most})


def test_blocks_that_come_along_are_held_and_those_that_do_not_are_computed_again():
    here = chat_scheduler()
    job = here.submit(ask("a"), 0.0)
    for at in range(3):
        one_step(here, float(at))
    assert (job.stage.name, job.size, job.num_blocks, job.kept) == ("llm.decode", 9, 2, 8)
    carry = here.give("a", 3.0)
    assert carry.kept == 8 and here.reserve("gpu", "llm", 32).blocks == 8
    there = chat_scheduler()
    moved = there.take(carry, CHAT, 0.0, cached=True)
    assert (moved.stage.name, moved.num_blocks, moved.call_outputs) == ("llm.decode", 2, 3)
    one_step(there, 0.0)
    assert moved.outputs == 4
    bare = chat_scheduler().take(carry, CHAT, 0.0)
    assert (bare.stage.name, bare.size, bare.num_blocks, bare.call_outputs) == ("llm.prefill", 9, 0, 3)


def test_a_prompt_that_is_half_computed_moves_with_what_it_has():
    here = chat_scheduler(choose=lambda view: Decision(view.jobs, sizes={view.jobs[0]: 4}))
    here.submit(ask("a", 10), 0.0)
    one_step(here, 0.0)
    carry = here.give("a", 1.0)
    assert (carry.kept, carry.computed) == (4, 4)
    assert chat_scheduler().take(carry, CHAT, 0.0, cached=True).computed == 4
    again = chat_scheduler().take(carry, CHAT, 0.0)
    assert (again.computed, again.size, again.num_blocks) == (0, 10, 0)


def test_reserved_blocks_are_not_free_for_others_and_wait_for_their_request():
    here, there = chat_scheduler(), chat_scheduler(blocks=3)
    here.submit(ask("a"), 0.0)
    one_step(here, 0.0)
    carry = here.give("a", 1.0)
    ticket = there.reserve("gpu", "llm", carry.kept)
    assert ticket.blocks == 2
    with pytest.raises(RequestError, match=r"cannot reserve 2 blocks \(6 tokens\), 1 of 3 are free"):
        there.reserve("gpu", "llm", 6)
    there.submit(ask("b", 8, 2), 0.0)
    seen = []
    set_policy(there, Hand(lambda view: seen.append(view.free["llm"]) or Decision(view.jobs)))
    assert there.next_batch("gpu", 0.0) is None  # its blocks come free without the policy
    assert seen[0] == 1
    moved = there.take(carry, CHAT, 0.0, cached=True, ticket=ticket)
    assert moved.num_blocks == 2
    with pytest.raises(RequestError, match="not reserved, or was released before"):
        there.release(ticket)


def test_without_room_for_its_blocks_a_request_is_refused_and_nothing_has_changed():
    here, there = chat_scheduler(), chat_scheduler(blocks=2)
    here.submit(ask("a"), 0.0)
    one_step(here, 0.0)
    carry = here.give("a", 1.0)
    there.submit(ask("b", 4, 2), 0.0)
    one_step(there, 0.0)
    with pytest.raises(RequestError, match="request 'a' comes with 2 blocks, 1 of 2 are free"):
        there.take(carry, CHAT, 0.0, cached=True)
    assert set(there.jobs) == {"b"}


def test_reserving_more_than_there_is_or_where_there_is_no_cache_is_refused():
    with pytest.raises(RequestError, match=r"cannot reserve 9 blocks \(33 tokens\), 8 of 8 are free"):
        chat_scheduler().reserve("gpu", "llm", 33)
    with pytest.raises(RequestError, match=r"pool 'gpu' has no KV cache of model 'llm'; KV caches: \[\]"):
        scheduler_of().reserve("gpu", "llm", 5)


# -- stages elsewhere, lost steps, a policy per pool --------------------------------------------------


def test_a_job_whose_next_stage_is_elsewhere_waits_to_be_given():
    names = ("encode", "denoise")
    away = {"decode": LinearProfile("decode", base=0.5, per_job=0.5, max_batch=4)}
    here = Scheduler([Pool("gpu", names)], FCFS(), {n: PROFILES[n] for n in names}, away=away)
    job = here.submit(Request("a", IMAGE, 0.0, SLO(total=60.0)), 0.0)
    assert job.remaining_s == 0.25 + 4.0 + 1.0
    for at in range(5):
        one_step(here, float(at))
    assert job.status == "away" and here.next_batch("gpu", 5.0) is None
    assert here.pop_events() == [Left("a", "decode", 5.0)]
    there = Scheduler([Pool("gpu", ("decode",))], FCFS(), PROFILES, away={n: PROFILES[n] for n in names})
    there.take(here.give("a", 5.0), IMAGE, 5.0)
    one_step(there, 5.0)
    assert [type(event) for event in there.pop_events()] == [Emitted, Ended]


def test_a_job_that_is_away_can_be_cancelled():
    here = Scheduler([Pool("gpu", ("encode",))], FCFS(), PROFILES, away=PROFILES)
    job = here.submit(Request("a", IMAGE), 0.0)
    one_step(here, 0.0)
    assert job.status == "away" and here.cancel("a", 1.0)
    assert [type(event) for event in here.pop_events()] == [Left, Ended]


@pytest.mark.parametrize("lost", ["nothing", "state"])
def test_a_lost_step_is_run_again_from_what_survives(lost):
    scheduler = scheduler_of()
    job = scheduler.submit(Request("a", IMAGE, 0.0, SLO(total=60.0)), 0.0)
    one_step(scheduler, 0.0, update={"x": 1})
    one_step(scheduler, 1.0)
    batch = scheduler.next_batch("gpu", 2.0)
    scheduler.requeue(batch, 3.0, lost)
    if lost == "state":
        assert (job.status, job.stage.name, job.state) == ("waiting", "encode", {})
        assert job.calls_left == {"encode": 1, "denoise": 4, "decode": 1}
    else:
        assert (job.status, job.stage.name, job.state) == ("waiting", "denoise", {"x": 1})
        assert job.calls_left == {"denoise": 3, "decode": 1}
    with pytest.raises(PolicyError, match="is not running"):
        scheduler.finish(batch, [{}], 3.0)
    for at in range(6 if lost == "state" else 4):
        one_step(scheduler, 4.0 + at)
    assert job.status == "done"


def test_a_lost_step_that_took_the_cache_sends_generations_back_to_their_prefill():
    scheduler = chat_scheduler()
    job = scheduler.submit(ask("a", 6, 4), 0.0)
    one_step(scheduler, 0.0)
    batch = scheduler.next_batch("gpu", 1.0)
    scheduler.requeue(batch, 2.0, "cache")
    assert (job.stage.name, job.size, job.num_blocks, job.outputs) == ("llm.prefill", 7, 0, 1)
    batch = scheduler.next_batch("gpu", 2.0)
    scheduler.requeue(batch, 3.0)  # a prefill that was lost has kept nothing
    assert (job.stage.name, job.num_blocks) == ("llm.prefill", 0)
    for at in range(3):
        one_step(scheduler, 3.0 + at)
    assert job.status == "done"


def test_a_lost_step_s_jobs_are_cancelled_or_held_if_that_was_wanted():
    scheduler = scheduler_of()
    for id in "ab":
        scheduler.submit(Request(id, IMAGE), 0.0)
    batch = scheduler.next_batch("gpu", 0.0)
    scheduler.cancel("a", 0.5)
    scheduler.hold("b", 0.5)
    scheduler.requeue(batch, 1.0)
    assert [type(event) for event in scheduler.pop_events()] == [Ended, Held]


def test_a_held_job_that_is_lost_with_its_state_can_be_resumed_where_it_starts_again():
    pools = [Pool("a", ("encode",)), Pool("b", ("denoise", "decode"))]
    scheduler = Scheduler(pools, FCFS(), PROFILES)
    scheduler.submit(Request("a", IMAGE), 0.0)
    scheduler.finish(scheduler.next_batch("a", 0.0), [{}], 1.0)
    batch = scheduler.next_batch("b", 1.0)
    scheduler.hold("a", 1.5)
    scheduler.requeue(batch, 2.0, "state")
    assert scheduler.next_batch("a", 2.0) is None
    scheduler.resume("a")
    assert scheduler.next_batch("a", 2.0).stage == "encode"
    assert [state.out for state in scheduler._pools.values()] == [0, 0]


def test_each_pool_may_have_a_policy_of_its_own():
    pools = [Pool("a", ("encode",)), Pool("b", ("denoise", "decode"))]
    latest = Hand(lambda view: Decision([max(view.jobs, key=lambda job: job.arrival)]))
    oldest = Hand(lambda view: Decision([min(view.jobs, key=lambda job: job.arrival)]))
    scheduler = Scheduler(pools, {"a": latest, "b": oldest}, PROFILES)
    assert scheduler.policies == {"a": latest, "b": oldest}
    for at in range(3):
        scheduler.submit(Request(f"r{at}", IMAGE, float(at)), float(at))
    first = scheduler.next_batch("a", 3.0)
    assert [job.id for job in first.jobs] == ["r2"]
    scheduler.finish(first, [{}], 4.0)
    second = scheduler.next_batch("a", 4.0)
    scheduler.finish(second, [{}], 5.0)
    assert [job.id for job in scheduler.next_batch("b", 5.0).jobs] == ["r1"]
    with pytest.raises(PolicyError, match=r"pool 'b' has no policy; policies for: \['a'\]"):
        Scheduler(pools, {"a": latest}, PROFILES)


def test_a_policy_may_not_choose_or_drop_a_held_job():
    for decision in (lambda job: Decision([job]), lambda job: Decision(drop={job: "why"})):
        scheduler = scheduler_of()
        held = scheduler.submit(Request("a", IMAGE), 0.0)
        scheduler.submit(Request("b", IMAGE), 0.0)
        scheduler.hold("a", 0.0)
        set_policy(scheduler, Hand(lambda view, decision=decision, held=held: decision(held)))
        with pytest.raises(PolicyError, match=r"Job\('a', held"):
            scheduler.next_batch("gpu", 0.0)


def test_moves_happen_in_these_runs():
    """The twins above would prove nothing if nobody moved."""
    twins = Twins(scheduler_of, (IMAGE, IMAGE), random.Random(1))
    for index in range(6):
        twins.submit(f"r{index}", SLO(total=inf), {}, index % 2)
    twins.run("gpu", step)
    assert twins.moves > 10 and all(count == 1 for count in twins.ends.values())
