"""The rules of `priced`, one by one and by hand; what weights buy; and views of all kinds."""

from __future__ import annotations

import dataclasses
import math
import random

import hand
import pytest
from hand import Hand, ids, seen, set_policy
from hypothesis import given, settings
from hypothesis import strategies as st
from toys import engine

from neustream import (
    SLO,
    ConfigError,
    Decision,
    Graph,
    LinearProfile,
    Pool,
    Priced,
    Request,
    Scheduler,
    Stage,
    TableProfile,
    loop,
    seq,
)
from neustream.core.demand import Calls, Demand
from neustream.core.events import Ended

TEXT, UNET, VAE = Stage("text", max_batch=2), Stage("unet", max_batch=4), Stage("vae", max_batch=2, emits=True)
REFINE = Stage("refine", max_batch=4)
READ = Stage("read", max_batch=4, emits=True, size=lambda job: job.params["steps"])


def steps_of(job):
    return job.params["steps"]


LOOP = Graph("loop", loop(UNET, times=steps_of))
IMAGE = Graph("image", seq(TEXT, loop(UNET, times=steps_of), VAE))
SHORT = Graph("short", seq(TEXT, VAE))
OTHER = Graph("other", loop(REFINE, times=steps_of))
BOTH = Graph("both", seq(loop(UNET, times=steps_of), loop(REFINE, times=2), VAE))
TURNS = Graph("turns", seq(TEXT, loop(seq(UNET, REFINE), times=steps_of), VAE))
SIZED = Graph("sized", seq(READ, loop(UNET, times=steps_of)))
EVERY = Graph("every", seq(TEXT, UNET, VAE, REFINE, READ))
# In turns one step of each costs 1, 1.25, 1.5, then 0.5 for each: batches of three are the most efficient.
PROFILES = {
    "text": LinearProfile("text", base=0.5, max_batch=2),
    "unet": TableProfile("unet", [1, 2, 3, 4], [1.0, 1.25, 1.5, 4.0]),
    "refine": LinearProfile("refine", base=1.0, max_batch=4),
    "vae": TableProfile("vae", [1, 2], [0.25, 0.375]),
    "read": LinearProfile("read", base=0.5, per_size=0.125, max_batch=4),
}


def ask(id, steps=4, due=math.inf, arrival=0.0, graph=LOOP, **slo):
    return Request(id, graph, arrival, SLO(due - arrival, **slo), {"steps": steps})


def waiting(*requests, workers=1, profiles=PROFILES):
    some = Scheduler([Pool("gpu", tuple(profiles), workers)], Hand(), profiles)
    for request in requests:
        some.submit(request, request.arrival)
    return some


def run(some, *names, now=0.0, worker=0, end=True):
    """One step of the named jobs, which takes as long as its profile says; returns when it ends."""
    batch = hand.begin(some, *names, now=now, worker=worker)
    if end:
        some.finish(batch, [{}] * len(batch), now + batch.expected)
    return now + batch.expected


def chosen(some, now=0.0, worker=0, policy=None):
    return hand.chosen(policy or Priced(), some, now, worker)


def dropped(some, now=0.0):
    return hand.dropped(Priced(), some, now)


def outcomes(*requests, policy=None, graph=EVERY, profiles=PROFILES):
    """id -> whether it was on time, after a run on one worker that serves the stages of `graph`."""
    on_time = {}

    def see(record):
        if isinstance(record, Ended):
            on_time[record.id] = record.on_time

    engine(graph, profiles, policy or Priced(), observers=[see]).run(requests)
    assert set(on_time) == {request.id for request in requests}
    return on_time


# -- 1. promises are kept ---------------------------------------------------------------------------


def with_newcomer(total):
    """r0 has run one of its four steps, and has three left in `total` seconds; r1 comes with four, due in 6 s."""
    some = waiting(ask("r0", 4, 1.0 + total))
    now = run(some, "r0")
    some.submit(ask("r1", 4, 7.0, arrival=now), now)
    return some


def test_a_newcomer_that_would_make_a_promised_job_late_waits():
    some = with_newcomer(3.7)  # three steps with it take 3.75 s
    assert (chosen(some, 1.0), dropped(some, 1.0)) == (["r0"], [])
    assert chosen(with_newcomer(3.75), 1.0) == ["r0", "r1"]


def test_a_newcomer_that_would_be_late_itself_waits():
    some = with_newcomer(3.75)
    some.submit(ask("r2", 5, 1.0 + 6.5, arrival=1.0), 1.0)  # as tight as r1, and one more step
    assert chosen(some, 1.0) == ["r0", "r1"]


def running_pair(weight=1.0, **other):
    """Two that ran a step together until 1.25, three steps left of each; then the device stood still until 1.5."""
    some = waiting(ask("r0", 4, 5.0, weight=weight), ask("r1", 4, 5.2))
    assert run(some, "r0", "r1") == 1.25
    return some


def test_of_promises_that_cannot_all_be_kept_those_of_the_most_weight_per_charge_are():
    # together they would end at 1.5 + 3 * 1.25 = 5.25; r0 has less time, so its charge is larger
    some = running_pair()
    assert chosen(some, 1.25) == ["r0", "r1"]
    assert (chosen(some, 1.5), dropped(some, 1.5)) == (["r1"], [])
    assert chosen(running_pair(weight=2.0), 1.5) == ["r0"]


def test_who_lost_its_promise_waits_for_room():
    some = running_pair()
    some.cancel("r1", 1.75)
    assert chosen(some, 1.75) == ["r0"]
    assert (chosen(some, 2.25), dropped(some, 2.25)) == ([], ["r0"])


def test_promises_are_to_the_next_output_too():
    some = waiting(ask("r0", 4, first=4.7))  # no deadline but that of its first output
    now = run(some, "r0")
    some.submit(ask("r1", 4, 7.0, arrival=now), now)
    assert chosen(some, 1.0) == ["r0"]


def test_latencies_are_those_of_late():
    some = with_newcomer(3.75)
    view = seen(some, 1.0)
    view.speed = {"unet": 1.01}
    assert ids(Priced().decide(view).jobs) == ["r0"]
    view.speed = {"unet": 0.99}
    assert ids(Priced().decide(view).jobs) == ["r0", "r1"]


# -- 2. what fits is promised -----------------------------------------------------------------------


def test_what_fits_is_admitted_at_once_with_the_most_time_per_step_first():
    # four of four steps end at 8, three at 6: one of those with the least time has to wait
    some = waiting(*[ask(f"r{at}", 4, total) for at, total in enumerate([6.0, 6.0, 6.1, 6.2])])
    assert chosen(some) == ["r0", "r2", "r3"]
    some = waiting(*[ask(f"r{at}", 4, total) for at, total in enumerate([8.0, 8.0, 8.0, 8.0])])
    assert chosen(some) == ["r0", "r1", "r2"]  # all promised, three to a step
    assert chosen(some, 0.01) == ["r0", "r1", "r2"]  # r3 is not, by now


def test_who_does_not_fit_keeps_out_nobody_who_does():
    some = waiting(ask("r0", 4, 4.25), ask("r1", 2, 2.2), ask("r2", 1, 9.0))
    assert chosen(some) == ["r0", "r2"]  # r0 shares one step


# -- 3. the price -----------------------------------------------------------------------------------


def late_one(gap, asked=100, *, total=5.2, budget=6.0, weight=1.0, graph=LOOP, policy=None):
    """Who runs: a started job with all the time in the world, or also one that could share its steps.

    Before, `asked` requests for four steps within `budget` came, one every `gap` seconds: 2 s of the
    device each if it is 6 s, in batches of three.
    """
    some = waiting(ask("r0", 9, 1e3))
    now = run(some, "r0")
    some.submit(ask("r1", 4, now + total, arrival=0.5, weight=weight), now)
    view = seen(some, now)
    calls = {name: Calls(4, name in graph.looped, stage.max_batch) for name, stage in graph.stages.items()}
    view.recent = tuple(Demand(at * gap, budget, calls=calls) for at in range(asked))
    return ids((policy or Priced()).decide(view).jobs)


def test_at_twice_capacity_who_waited_too_long_is_not_admitted_though_it_fits():
    # at 5.2 s for four steps it needs batches of two for most of them: 0.6 s a step where others bring 0.5
    assert late_one(gap=1.0) == ["r0"]
    assert late_one(gap=2.1) == ["r1", "r0"]  # no overload


def test_at_twice_capacity_who_brings_enough_is_admitted():
    assert late_one(gap=1.0, total=6.0) == ["r1", "r0"]
    assert late_one(gap=1.0, weight=1.25) == ["r1", "r0"]
    assert late_one(gap=1.0, policy=Priced(price=0.8)) == ["r1", "r0"]


def test_a_price_needs_some_requests_that_pay():
    assert late_one(gap=1.0, asked=9) == ["r1", "r0"]
    assert late_one(gap=1.0, asked=10) == ["r0"]
    assert late_one(gap=1.0, budget=math.inf) == ["r1", "r0"]
    assert late_one(gap=1.0, graph=SIZED) == ["r1", "r0"]


def test_the_price_follows_the_requests_that_came():
    def after(gap):
        some = waiting(ask("r0", 9, 1e3))
        now = run(some, "r0")
        for at in range(100):
            now = 1.0 + gap * at
            some.submit(ask(f"x{at}", 4, now + 6.0, arrival=now), now)
            some.cancel(f"x{at}", now)
        some.submit(ask("r1", 4, now + 5.2, arrival=now - 0.8), now)
        return chosen(some, now)

    assert after(1.0) == ["r0"]
    assert after(2.1) == ["r1", "r0"]


def test_a_burst_that_fits_is_served():
    for count in (8, 9, 10, 12):
        asked = [ask(f"r{at}", 4 + at % 2 * 4, 40.0) for at in range(count)]
        assert all(outcomes(*asked, policy=Priced(price=0.0)).values())  # a step of each is 0.5 s: 36 s at most
        assert all(outcomes(*asked).values())


# -- 4. exchange ------------------------------------------------------------------------------------


def long_and_short(*, weight=1.0, total=9.3, other=2.4, **short):
    """r0 has nine steps left in 9.3 s, about 8.5 s of the device; r1, 1.4 s, comes and does not fit."""
    some = waiting(ask("r0", 10, 1.0 + total, weight=weight))
    now = run(some, "r0")
    some.submit(ask("r1", 2, now + other, arrival=now, **short), now)
    return some


def test_a_cheaper_job_takes_the_place_of_a_promised_one():
    assert chosen(long_and_short(), 1.0) == ["r1"]
    assert chosen(long_and_short(total=9.5, other=2.5), 1.0) == ["r0", "r1"]  # both fit


def test_nothing_is_exchanged_for_a_small_gain():
    assert chosen(long_and_short(), 1.0, policy=Priced(gain=4.0)) == ["r1"]
    assert chosen(long_and_short(), 1.0, policy=Priced(gain=6.0)) == ["r0"]


def test_a_charge_counts_by_weight_in_an_exchange():
    assert chosen(long_and_short(weight=10.0), 1.0) == ["r0"]


def test_no_job_takes_the_place_of_a_heavier_one_for_being_short():
    some = waiting(ask("r0", 20, 20.1, weight=10.0))
    now = run(some, "r0")
    some.submit(ask("r1", 1, 9.0, arrival=now), now)
    assert chosen(some, now) == ["r0"]


def test_a_job_of_more_weight_than_all_others_finds_room():
    # beside two of the others four steps take 6 s, beside one 5 s
    light = [ask(f"r{at}", 9, 14.0) for at in range(3)]
    assert outcomes(*light, ask("h", 4, 7.3, arrival=1.5, weight=100.0))["h"]


# -- 5. the step ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "seconds, sizes", [([1.0, 3.0, 2.0, 2.25], [1, 1, 3, 4]), ([1.0, 1.0, 1.0, 5.0], [1, 2, 3, 3])]
)
def test_a_step_is_the_most_efficient_batch_even_where_the_table_is_not_monotone(seconds, sizes):
    profiles = {"unet": TableProfile("unet", [1, 2, 3, 4], seconds)}
    for count, size in enumerate(sizes, 1):
        some = waiting(*[ask(f"r{at}", 4, 100.0 - at) for at in range(count)], profiles=profiles)
        assert chosen(some) == [f"r{at}" for at in range(count)][::-1][:size]  # least laxity first


def test_laxity_counts_the_steps_left_and_what_comes_behind():
    some = waiting(ask("r0", 4, 50.0), ask("r1", 9, 52.0), ask("r2", 2, 49.5), ask("r3", 4, 49.9))
    assert chosen(some) == ["r1", "r3", "r0"]  # 52 - 9 * 1.5, 49.9 - 6, 50 - 6, 49.5 - 3
    some = waiting(ask("r0", 1, 50.0, graph=BOTH), ask("r1", 1, 48.0), ask("r2", 1, 49.0), ask("r3", 1, 60.0))
    assert chosen(some) == ["r0", "r1", "r2"]  # 2.25 s behind the loop of r0


def test_one_in_a_hurry_runs_alone_if_the_others_can_wait():
    # in turns r0 would end at 12; on one seat at 8, and real steps may be two later
    some = waiting(ask("r0", 8, 10.2), ask("r1", 9, 99.0), ask("r2", 9, 99.0))
    assert chosen(some) == ["r0"]
    some = waiting(ask("r0", 8, 12.25), ask("r1", 9, 99.0), ask("r2", 9, 99.0))
    assert chosen(some) == ["r0", "r1", "r2"]
    hurried = [ask("r0", 8, 10.2), ask("r1", 9, 31.0), ask("r2", 9, 31.0)]
    assert all(outcomes(*hurried).values())


def test_seats_leave_two_steps_to_spare():
    """A seat for r0 takes 8 s."""
    others = [ask("r1", 9, 99.0), ask("r2", 9, 99.0)]
    assert chosen(waiting(ask("r0", 8, 10.0), *others)) == ["r0"]
    assert chosen(waiting(ask("r0", 8, 9.9), *others)) == ["r1", "r2"]


@pytest.mark.parametrize(("due", "steps", "served"), [(1.65, 1, 2), (1.6, 1, 1), (4.15, 3, 1)])
def test_decodes_that_meet_count_once_where_they_are_a_large_part_of_the_work(due, steps, served):
    """A step of two takes 1.25 s, their decodes 0.375 s; one by one 0.5 s. Of three steps they are a small part."""
    graph = Graph("decoded", seq(loop(UNET, times=steps_of), VAE))
    some = waiting(*[ask(f"r{at}", steps, due, graph=graph) for at in range(2)])
    assert len(chosen(some)) == served


def beside_short_ones(gap, weight=1.0):
    """Ten requests of one step at refine, with 0.5 s of slack, came `gap` apart; then one of 20 unet steps."""
    short = [ask(f"s{at}", 1, 1.5 + gap * at, arrival=gap * at, graph=OTHER) for at in range(11)]
    some = waiting(*short)
    now = 10 * gap + 1.0
    for one in short:
        some.cancel(one.id, now)
    some.submit(ask("long", 20, now + 40.0, arrival=now, weight=weight), now)
    return some, now


def test_a_job_does_not_begin_whose_steps_would_make_more_requests_late_than_one():
    some, now = beside_short_ones(gap=5.0)  # in 20 s four come, half of them in the last half of a step
    set_policy(some, Priced())
    assert some.next_batch("gpu", now) is None
    assert some.wake_at("gpu") == pytest.approx(now + 20.0)
    assert chosen(*beside_short_ones(gap=30.0)) == ["long"]
    assert chosen(*beside_short_ones(gap=5.0, weight=3.0)) == ["long"]


def test_encodings_of_admitted_jobs_come_first():
    some = waiting(ask("r0", 4, 99.0))
    now = run(some, "r0")
    some.submit(ask("r1", 4, 10.0, arrival=now, graph=IMAGE), now)
    assert chosen(some, now) == ["r1"]
    now = run(some, "r1", now=now)
    assert chosen(some, now) == ["r1", "r0"]  # its decode comes behind


def test_an_encoding_that_would_make_a_promised_job_late_waits():
    def encoded(total):
        some = waiting(ask("r0", 4, 1.0 + total))
        now = run(some, "r0")
        some.submit(ask("r1", 4, 99.0, arrival=now, graph=IMAGE), now)
        return chosen(some, now)

    assert encoded(0.5 + 3 * 1.25) == ["r1"]
    assert encoded(0.5 + 3 * 1.25 - 0.01) == ["r0"]


@pytest.mark.parametrize(
    ("due", "company", "step"),
    [
        (100.0, [], ["r0"]),  # one more may join it
        (10.0, [], ["r1"]),  # little time
        (100.0, ["r2"], ["r1", "r2"]),  # a full batch
    ],
)
def test_an_encoding_waits_for_company_while_a_step_of_others_runs(due, company, step):
    some = waiting(ask("r0", due=100.0, graph=IMAGE))
    now = run(some, "r0")
    for id in ["r1", *company]:
        some.submit(ask(id, due=due, arrival=now, graph=IMAGE), now)
    assert chosen(some, now) == step


def test_an_encoding_waits_for_nobody_where_that_would_save_little_or_nobody_is_in_the_loop():
    cheap = {**PROFILES, "text": LinearProfile("text", base=0.0, per_job=0.5, max_batch=2)}
    some = waiting(ask("r0", due=100.0, graph=IMAGE), profiles=cheap)
    assert chosen(some) == ["r0"]
    now = run(some, "r0")
    some.submit(ask("r1", due=100.0, arrival=now, graph=IMAGE), now)
    assert chosen(some, now) == ["r1"]


def decoding(*, first=99.0, other=3.7, waits=True, more=()):
    """At 3: r0 is to be decoded by `first`; r1 has three steps left in `other` seconds, too few with r3."""
    some, now = waiting(ask("r0", 1, first, graph=IMAGE), ask("r1", 4, 3.0 + other), *more), 0.0
    for names in (["r0", *ids(more)], ["r0", *ids(more)], ["r1"]):
        now = run(some, *names, now=now)
    if waits:
        some.submit(ask("r3", 4, 9.0, arrival=now), now)
    return some, 3.0


def test_decodes_wait_for_each_other_while_others_wait_for_room():
    assert chosen(*decoding()) == ["r1"]
    assert chosen(*decoding(waits=False)) == ["r0"]
    assert chosen(*decoding(other=4.25)) == ["r0"]  # room for r3, so nobody waits
    assert chosen(*decoding(more=[ask("r2", 1, 99.0, graph=IMAGE)])) == ["r0", "r2"]  # a full batch


def test_decodes_do_not_wait_until_they_are_late():
    enough = 3.0 + 1.0 + 0.375  # a step, and then two decodes
    assert chosen(*decoding(first=enough + 0.01)) == ["r1"]
    assert chosen(*decoding(first=enough - 0.01)) == ["r0"]


# -- nobody promised, no deadline -------------------------------------------------------------------


def test_jobs_without_a_deadline_fill_what_is_left():
    # r0 needs 4 s, and 0.25 s more for a step with r1: that leaves it half of its time
    some = waiting(ask("r0", 4, 8.51), ask("r1", 4))
    assert chosen(some) == ["r0", "r1"]
    assert chosen(waiting(ask("r0", 4, 8.49), ask("r1", 9))) == ["r0"]
    assert chosen(waiting(ask("r0", 1), ask("r1", 9))) == ["r0", "r1"]


def test_a_job_without_a_deadline_is_no_promise_even_if_it_has_run():
    some = waiting(ask("r0", 9))
    now = run(some, "r0")
    some.submit(ask("r1", 4, now + 4.1, arrival=now), now)
    assert chosen(some, now) == ["r1"]


def test_a_job_without_a_deadline_never_takes_the_place_of_a_promised_one():
    some = waiting(ask("r0", 4, 4.2))
    now = run(some, "r0")
    some.submit(ask("r1", 1, arrival=now), now)
    assert chosen(some, now) == ["r0"]


def test_jobs_without_deadlines_end_as_well():
    draw = random.Random(0)
    asked = [ask(f"r{at}", draw.randint(1, 9), graph=draw.choice([LOOP, IMAGE]), arrival=at / 4) for at in range(40)]
    assert all(outcomes(*asked).values())


def test_the_device_does_not_idle_while_there_is_hope():
    assert late_one(gap=1.0) == ["r0"]
    some = waiting(ask("r0", 4, 4.2))
    view = seen(some)
    view.recent = tuple(Demand(float(at), 6.0, calls={"unet": Calls(4, True, 4)}) for at in range(100))
    assert ids(Priced().decide(view).jobs) == ["r0"]  # brings far less than the price
    some.submit(ask("r1", 4, 4.1), 0.0)
    some.submit(ask("r2", 4, 4.3), 0.0)
    view = dataclasses.replace(seen(some), recent=view.recent)
    assert ids(Priced().decide(view).jobs) == ["r2"]  # the most weight per charge


def test_hopeless_jobs_are_dropped():
    some = waiting(ask("r0", 4, 3.9), ask("r1", 4, 4.0))
    assert (chosen(some), dropped(some)) == (["r1"], ["r0"])
    assert (chosen(some, 0.2), dropped(some, 0.2)) == ([], ["r0", "r1"])


# -- several workers, several models ----------------------------------------------------------------


def test_a_worker_plans_for_the_jobs_that_it_ran():
    some = waiting(ask("r0", 4, 5.0), ask("r1", 4, 5.0), ask("r2", 4, 9.0), workers=2)
    run(some, "r0")
    run(some, "r1", worker=1)
    assert chosen(some, 1.0, worker=0) == ["r0", "r2"]
    assert chosen(some, 1.0, worker=1) == ["r1", "r2"]


def test_who_has_not_run_is_taken_by_the_first_worker_with_room():
    some = waiting(ask("r0", 4, 4.7), ask("r1", 9, 99.0), workers=2)
    run(some, "r0")
    run(some, "r1", worker=1)
    some.submit(ask("r2", 4, 7.0, arrival=1.0), 1.0)
    assert chosen(some, 1.0, worker=0) == ["r0"]
    assert chosen(some, 1.0, worker=1) == ["r2", "r1"]
    run(some, "r1", "r2", now=1.0, worker=1)
    some.cancel("r0", 3.0)
    assert chosen(some, 3.0, worker=0) == []  # nobody here is its own
    assert chosen(some, 3.0, worker=1) == ["r2", "r1"]


def test_two_models_share_a_device_by_need():
    # r0 takes 0.8 of the device, r1 0.04
    some = waiting(ask("r0", 4, 5.0), ask("r1", 20, 500.0, graph=OTHER))
    assert chosen(some) == ["r0"]
    some = waiting(ask("r0", 4, 500.0), ask("r1", 4, 5.0, graph=OTHER))
    assert chosen(some) == ["r1"]


def test_a_job_of_another_model_that_would_make_a_promised_one_late_waits():
    some = waiting(ask("r0", 4, 4.1))
    now = run(some, "r0")
    some.submit(ask("r1", 20, now + 20.1, arrival=now, graph=OTHER), now)  # less laxity, one step in 1.005 s
    assert chosen(some, now) == ["r0"]
    some.cancel("r0", now)
    assert chosen(some, now) == ["r1"]
    relaxed = [ask("r0", 4, 25.0), ask("r1", 20, 25.0, graph=OTHER), ask("r2", 20, 26.0, graph=OTHER)]
    assert all(outcomes(*relaxed).values())


def test_jobs_of_two_models_that_fit_are_admitted_and_the_line_of_the_least_laxity_runs():
    some = waiting(ask("r0", 4, 4.4))
    now = run(some, "r0")
    some.submit(ask("r1", 4, 40.0, arrival=now, graph=OTHER), now)
    assert chosen(some, now) == ["r0"]
    some.submit(ask("r2", 1, 2.3, arrival=now, graph=OTHER), now)
    assert chosen(some, now) == ["r2", "r1"]  # a step of both is as long


@pytest.mark.parametrize("order", ["si", "is"])
def test_graphs_that_share_an_encoder_are_told_apart(order):
    # s has no loop; i has one that does not fit beside r0 (three steps left in 3.6 s)
    some = waiting(ask("r0", 4, 4.6))
    now = run(some, "r0")
    new = {"s": ask("s", 1, 61.0, now, graph=SHORT), "i": ask("i", 9, 99.0, now, graph=IMAGE)}
    for which in order:
        some.submit(new[which], now)
    assert "i" not in chosen(some, now)


# -- parameters -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["price", "gain"])
@pytest.mark.parametrize("value", [-0.1, math.inf, math.nan])
def test_priced_refuses_parameters_that_mean_nothing(name, value):
    with pytest.raises(ConfigError, match=f"priced: {name} must be 0 or more and finite"):
        Priced(**{name: value})


# -- what weights buy -------------------------------------------------------------------------------


def overload(seed, max_batch, steps):
    """200 requests at about twice capacity, due in 1.5 to 3 times their time alone; and a tenth of them."""
    draw, now, asked = random.Random(seed), 0.0, []
    unet = Stage("unet", max_batch=max_batch)
    graph = Graph("loop", loop(unet, times=steps_of))
    each = sum(steps) / 2 * (0.02 / max_batch + 0.005)
    for at in range(200):
        now += draw.expovariate(2 / each)
        count = draw.randint(*steps)
        asked.append(ask(f"r{at}", count, now + 0.025 * count * draw.uniform(1.5, 3.0), now, graph=graph))
    return asked, {request.id for request in draw.sample(asked, 20)}


@pytest.mark.parametrize("max_batch, steps", [(4, (10, 40)), (16, (10, 40)), (16, (2, 100))])
@pytest.mark.parametrize("seed", range(2))
def test_who_weighs_more_is_never_served_worse(seed, max_batch, steps):
    asked, heavy = overload(seed, max_batch, steps)
    profiles = {"unet": LinearProfile("unet", base=0.02, per_job=0.005, max_batch=max_batch)}

    def on_time(weight):
        weighed = [
            dataclasses.replace(request, slo=dataclasses.replace(request.slo, weight=weight))
            if request.id in heavy
            else request
            for request in asked
        ]
        ended = outcomes(*weighed, graph=asked[0].graph, profiles=profiles)
        return sum(ended[id] for id in heavy), sum(ended.values())

    (few, all_equal), (most, all_weighed) = on_time(1.0), on_time(10.0)
    assert all_equal < 160  # there is an overload
    assert most >= few
    assert all_weighed + 9 * most >= all_equal + 9 * few


# -- views of all kinds -----------------------------------------------------------------------------

GRAPHS = (LOOP, IMAGE, SHORT, OTHER, BOTH, TURNS, SIZED)
asks = st.tuples(
    st.sampled_from(GRAPHS),
    st.integers(1, 9),
    st.sampled_from([math.inf, 3.0, 6.0, 12.0, 40.0, 1e9]),
    st.sampled_from([math.inf, math.inf, 4.0, 15.0]),
    st.sampled_from([1.0, 1.0, 0.01, 10.0, 1e6]),
    st.sampled_from([0.0, 0.0, 0.25, 2.0]),
)


@given(
    asked=st.lists(asks, min_size=1, max_size=24),
    steps=st.lists(st.tuples(st.integers(0, 99), st.integers(1, 3), st.integers(0, 1)), max_size=20),
    slow=st.sampled_from([0.25, 1.0, 1.75]),
    later=st.sampled_from([0.0, 1.0, 6.0]),
)
@settings(max_examples=150, derandomize=True, deadline=None)
def test_any_view_has_a_sound_decision(asked, steps, slow, later):
    some, now = waiting(workers=2), 0.0
    for at, (graph, count, total, first, weight, gap) in enumerate(asked):
        now += gap
        some.submit(ask(f"r{at}", count, now + total, now, graph=graph, first=first, weight=weight), now)
    for which, most, worker in steps:  # move some on, as any policy might have done
        stages = [[job for job in jobs if job.worker in (-1, worker)] for jobs in seen(some, now).queues.values()]
        mine = [jobs for jobs in stages if jobs]
        if mine:
            queue = mine[which % len(mine)]
            batch = [queue[(which + at) % len(queue)] for at in range(min(most, len(queue), 2))]
            set_policy(some, Hand(lambda view, batch=batch: Decision(batch)))
            step = some.next_batch("gpu", now, worker)
            now += step.expected * slow
            some.finish(step, [{}] * len(step), now)
        if not some.jobs:
            return
    now += later
    for worker in (0, 1):
        view = seen(some, now, worker)
        decision = Priced().decide(view)
        hopeless = view.hopeless()
        assert set(decision.drop) <= set(hopeless)
        mine = {job for job in view.jobs if job.worker in (-1, worker)}
        assert bool(decision.jobs) == bool(mine - set(hopeless))  # never idle while there is hope
        assert set(decision.jobs) <= mine - set(decision.drop)
        assert len(set(decision.jobs)) == len(decision.jobs)
        if decision.jobs:
            (stage,) = {job.stage for job in decision.jobs}
            assert len(decision.jobs) <= view.limit(stage.name)
