"""NeuStream's rule: its cap, its two queues, its drop test."""

from __future__ import annotations

import pytest
from hand import chosen, dropped, seen
from images import (
    FAR,
    LOOP,
    PREVIEW,
    PROFILES,
    ask,
    run,
    units,
    waiting,
)

from neustream import (
    EDF,
    FCFS,
    SLO,
    Graph,
    Job,
    NeuStream,
    Pool,
    Request,
    Stage,
    SumProfile,
    TableProfile,
    View,
    load_profile,
)

# -- neustream: the cap -----------------------------------------------------------------------------

# Table 1.3 of the reference: the caps in the artifact's own files.
CAPS = [
    ("rtx4090/dit_s2_256", ["dit"], 0.95, {1.2: 4, 1.5: 10, 2: 20, 2.5: 20, 3: 20, 3.5: 20, 4: 20, 5: 20}),
    ("rtx4090/dit_s2_256", ["vae"], 0.95, {1.2: 1, 1.5: 1, 2: 2, 2.5: 2, 3: 3, 3.5: 4, 4: 4, 5: 5}),
    ("rtx4090/dit_xl2_256", ["dit"], 1.0, {1.2: 3, 1.5: 4, 2: 6, 2.5: 7, 3: 10, 3.5: 12, 4: 12, 5: 17}),
    ("rtx4090/dit_xl2_256", ["dit"], 0.95, {1.2: 3, 1.5: 4, 2: 6, 2.5: 7, 3: 8, 3.5: 11, 4: 12, 5: 16}),
    ("rtx4090/palette_256", ["unet"], 0.95, {1.2: 2, 1.5: 3, 2: 4, 2.5: 5, 3: 6, 3.5: 7, 4: 8, 5: 10}),
    ("rtx4090/sd15_256", ["unet"], 0.95, {1.2: 6, 1.5: 10, 2: 12, 3: 21, 4: 28, 5: 36, 6: 40, 7: 40}),
    ("rtx4090/sd15_256", ["vae", "safety"], 0.95, {1.2: 2, 1.5: 2, 2: 3, 3: 5, 4: 6, 5: 8, 6: 9, 7: 10}),
    ("rtx4090/sd15_512", ["unet"], 0.95, {1.2: 1, 1.5: 2, 2: 3, 3: 4, 4: 6, 5: 8, 6: 11, 7: 12}),
    ("h100/sd15_512", ["unet"], 0.95, {1.2: 1, 1.5: 2, 2: 4, 3: 6, 4: 9, 5: 11, 6: 14, 7: 15}),
]


def cap_of(profile, policy, *jobs):
    stage = Stage("x", max_batch=1000)
    some = jobs or [Job(Request("r0", Graph("g", stage)))]
    for job in some:
        job.stage = stage
    view = View(0.0, Pool("gpu", ("x",)), 0, {"x": some}, {"x": profile})
    return policy.cap(view, "x", some)


@pytest.mark.parametrize("model, parts, delta, caps", CAPS, ids=[f"{m}/{'+'.join(p)}@{d}" for m, p, d, _ in CAPS])
def test_the_caps_are_those_of_the_artifact(root, model, parts, delta, caps):
    profile = SumProfile("x", [load_profile(root / "profiles" / model / f"{part}.json") for part in parts])
    assert {scale: cap_of(profile, NeuStream(scale, delta)) for scale in caps} == caps


def test_the_cap_is_found_by_scanning_up_to_the_first_failure():
    profile = TableProfile("x", [1, 2, 3, 4], [1.0, 3.0, 2.0, 4.0])
    assert cap_of(profile, NeuStream(2.5, 1.0)) == 1  # 3 would fit
    assert cap_of(profile, NeuStream(3.5, 1.0)) == 3
    assert cap_of(profile, NeuStream(3.0, 1.0)) == 1  # less than, not equal


@pytest.mark.parametrize("scale, delta", [(1.0, 0.95), (1.05, 0.95), (0.1, 1.0)])
def test_the_cap_is_at_least_1(scale, delta):
    assert cap_of(PROFILES["unet"], NeuStream(scale, delta)) == 1


def test_the_cap_stays_within_stage_and_profile():
    assert cap_of(PROFILES["unet"], NeuStream(1000.0)) == 4
    some = waiting(*[ask(f"r{i}", graph=LOOP) for i in range(6)])
    assert chosen(NeuStream(1000.0), some) == ["r0", "r1", "r2", "r3"]


def test_without_a_scale_the_cap_uses_the_mean_of_what_was_promised():
    def promised(*totals):
        jobs = [Job(Request(f"r{i}", LOOP, 0.0, SLO(total=total))) for i, total in enumerate(totals)]
        for job in jobs:
            job.alone_s = 4.0
        return cap_of(PROFILES["unet"], NeuStream(step_delta=1.0), *jobs)

    assert promised(5.2) == 2  # 1.3 times the solo latency
    assert promised(6.4) == 3
    assert promised(5.2, 7.6) == 3  # 1.6 on average
    assert promised(FAR) == 4


# -- neustream: the two queues ----------------------------------------------------------------------

PAIRS = NeuStream(1.4, 1.0)  # a cap of 2
SEATED = NeuStream(1.4, 1.0, sticky_demotion=False)


def demoted():
    """a and b ran from the start, c was skipped twice; then b ended and d came."""
    some = waiting(*[ask(name, steps, graph=LOOP) for name, steps in (("a", 9), ("b", 2), ("c", 9))])
    for now in (1.0, 2.0):
        run(some, "a", "b", now=now)
    some.submit(ask("d", 9, arrival=2.0, graph=LOOP), 2.0)
    assert [(job.id, job.skipped) for job in some.jobs.values()] == [("a", 0), ("c", 2), ("d", 0)]
    return some


@pytest.mark.parametrize("policy", [PAIRS, SEATED])
def test_who_was_never_skipped_goes_first_in_order_of_coming(policy):
    some = waiting(*[ask(name, 9, graph=LOOP) for name in "abc"])
    assert chosen(policy, some) == ["a", "b"]
    run(some, "a", "b")
    assert chosen(policy, some) == ["a", "b"]
    assert chosen(policy, demoted()) == ["a", "d"]  # c lost its turn to a newcomer


@pytest.mark.parametrize("policy", [PAIRS, SEATED])
def test_among_the_skipped_the_least_often_skipped_goes_first(policy):
    some = demoted()
    some.submit(ask("e", 9, arrival=2.0, graph=LOOP), 2.0)
    run(some, "a", "d", now=3.0)
    some.cancel("a", 3.0)
    some.cancel("d", 3.0)
    assert {job.id: job.skipped for job in some.jobs.values()} == {"c": 3, "e": 1}
    some.submit(ask("f", 9, arrival=3.0, graph=LOOP), 3.0)
    assert chosen(policy, some, now=3.0) == ["f", "e"]  # the oldest waits on: last in, first out


def test_sticky_demotion_lets_newcomers_pre_empt_who_was_skipped_once():
    some = demoted()
    some.cancel("d", 2.0)
    assert chosen(PAIRS, some, now=2.0) == ["a", "c"]
    run(some, "a", "c", now=3.0)
    some.submit(ask("e", 9, arrival=3.0, graph=LOOP), 3.0)
    assert chosen(PAIRS, some, now=3.0) == ["a", "e"]


def test_without_it_who_runs_again_keeps_its_seat():
    some = demoted()
    some.cancel("d", 2.0)
    run(some, "a", "c", now=3.0)
    some.submit(ask("e", 9, arrival=3.0, graph=LOOP), 3.0)
    assert chosen(SEATED, some, now=3.0) == ["c", "a"]
    run(some, "c", "a", now=4.0)
    some.cancel("a", 4.0)
    assert chosen(SEATED, some, now=4.0) == ["c", "e"]


# -- neustream: the drop test -----------------------------------------------------------------------


def test_neustream_drops_whose_budget_is_not_more_than_the_work_left():
    some = units((4, 4.0), (4, 4.125), (4, 90.0))
    assert dropped(NeuStream(3.0), some) == ["r0"]
    assert dropped(NeuStream(3.0), some, now=0.125) == ["r0", "r1"]
    (reason,) = NeuStream(3.0).decide(seen(some)).drop.values()
    assert reason == "budget: needs 4.000 s and 0 s of margin, due in 4.000 s"


def test_neustream_tests_every_queue_and_the_next_output_too():
    some = waiting(ask("r0", total=5.0), ask("r1", first=5.0), ask("r2", total=5.0), ask("r3"))
    run(some, "r0")
    assert dropped(NeuStream(3.0), some, now=0.75) == ["r1", "r2", "r0"]
    assert chosen(NeuStream(3.0), some, now=0.75) == ["r3"]


def test_neustream_tests_the_end_where_the_next_output_is_near():
    some = waiting(ask("r0", total=4.25, graph=PREVIEW), ask("r1", total=4.5, graph=PREVIEW))
    assert dropped(NeuStream(3.0), some) == ["r0"]


def test_neustream_may_drop_everyone():
    some = units((4, 3.0), (4, 3.0))
    assert (chosen(NeuStream(), some), dropped(NeuStream(), some)) == ([], ["r0", "r1"])


def test_the_margin_is_charged_in_front_of_a_later_stage_only():
    rule = NeuStream(3.0, margin_s=0.5)
    alone = units((4, 4.25))
    assert dropped(rule, alone) == []  # nothing comes after this loop
    some = waiting(ask("r0", 1, total=2.0))  # 1.75 s of work
    assert dropped(rule, some) == []  # text is not looped
    run(some, "r0")
    assert dropped(rule, some, now=0.5) == ["r0"]  # 1.5 s left for 1.25 s of work and the margin
    assert dropped(NeuStream(3.0), some, now=0.5) == []
    run(some, "r0", now=0.5)
    assert dropped(rule, some, now=1.7) == []  # vae is the last one


def test_neustream_clears_the_once_only_stages_first_and_then_the_oldest_comer():
    some = waiting(ask("r0", 2), ask("r1", 2))
    run(some, "r0")
    assert chosen(NeuStream(3.0), some) == ["r1"]
    run(some, "r1")
    assert chosen(NeuStream(3.0), some) == ["r0", "r1"]


def test_requests_at_different_rounds_share_a_step():
    some = waiting(ask("r0", 9, graph=LOOP))
    run(some, "r0")
    some.submit(ask("r1", 9, graph=LOOP), 0.0)
    for policy in (FCFS(), EDF(), NeuStream(3.0)):
        assert chosen(policy, some) == ["r0", "r1"]
