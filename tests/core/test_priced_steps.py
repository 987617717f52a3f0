"""What `priced` runs next: its batches in turns and on seats, several workers and models."""

from __future__ import annotations

import pytest
from hand import ids, set_policy
from priced_images import (
    BOTH,
    IMAGE,
    OTHER,
    PROFILES,
    SHORT,
    UNET,
    VAE,
    ask,
    chosen,
    outcomes,
    run,
    steps_of,
    waiting,
)

from neustream import (
    Graph,
    LinearProfile,
    Priced,
    TableProfile,
    loop,
    seq,
)

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


@pytest.mark.parametrize("many, runs", [(3, ["u0", "u1"]), (4, ["r0", "r1", "r2", "r3"])])
def test_promised_jobs_of_one_model_make_room_for_many_of_another(many, runs):
    """A step of `refine` takes as long for one as for four: in the place of one of two that run nobody has time."""
    some = waiting(ask("u0", 9, 13.25), ask("u1", 9, 13.25))
    now = run(some, "u0", "u1")
    for at in range(many):
        some.submit(ask(f"r{at}", 5, now + 6.0, arrival=now, graph=OTHER), now)
    assert chosen(some, now) == runs


@pytest.mark.parametrize("order", ["si", "is"])
def test_graphs_that_share_an_encoder_are_told_apart(order):
    # s has no loop; i has one that does not fit beside r0 (three steps left in 3.6 s)
    some = waiting(ask("r0", 4, 4.6))
    now = run(some, "r0")
    new = {"s": ask("s", 1, 61.0, now, graph=SHORT), "i": ask("i", 9, 99.0, now, graph=IMAGE)}
    for which in order:
        some.submit(new[which], now)
    assert "i" not in chosen(some, now)
