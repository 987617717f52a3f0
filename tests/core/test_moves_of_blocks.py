"""KV blocks kept for who comes; stages elsewhere, lost steps, a policy per pool."""

from __future__ import annotations

import random
from math import inf

import pytest
from hand import Hand, set_policy
from moved import IMAGE, PROFILES, STEPS, Twins, one_step, scheduler_of
from walks import step

from neustream import (
    FCFS,
    SLO,
    Decision,
    Graph,
    KVCache,
    LinearProfile,
    PolicyError,
    Pool,
    Request,
    RequestError,
    Scheduler,
)
from neustream.core.events import Emitted, Ended, Ending, Held, Left
from neustream.graphs import llm, llm_profiles

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
    assert [type(event) for event in scheduler.pop_events()] == [Ending, Ended, Held]


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
