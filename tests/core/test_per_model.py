"""Images and texts in one pool: each promise is kept as its own rule would, and the device is promised once."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hand import Hand, ids, seen
from hypothesis import given, settings
from hypothesis import strategies as st
from images_and_texts import STEP_S, images, one_of_each, serve, texts
from texts_by_hand import ask, scheduler_with

from neustream import (
    EDF,
    FCFS,
    SLO,
    ConfigError,
    Decision,
    Graph,
    LinearProfile,
    NeuStream,
    PerModel,
    Priced,
    Request,
    Stage,
    loop,
)
from neustream.core.policies import NeuStreamLLM, PricedSteps, TokenDeadlines
from neustream.core.reserved import NOTHING, Reserved, by_deadlines, by_pace
from neustream.core.steps import StepProfile

# -- both kinds at once ----------------------------------------------------------------------------

TOY = images(40, 0.25, 20, 1.5), texts(60, 0.2, 20, 0.5, 0.1)
"""A text takes half of the device as long as it runs, an image two thirds: above capacity together."""


def test_alone_each_kind_of_the_toy_load_is_kept():
    assert serve(Priced(), TOY[0]) == {"images kept": 40}
    assert serve(Priced(), TOY[1]) == {"texts kept": 60}


def test_above_capacity_nobody_is_started_in_vain():
    assert serve(Priced(), *TOY) == {"images kept": 1, "images refused": 39, "texts kept": 59, "texts refused": 1}
    for policy in (EDF(), FCFS()):
        assert serve(policy, *TOY) == {"images lost": 40, "texts kept": 56, "texts lost": 4}


@pytest.mark.parametrize("loads", [
    (images(40, 0.5, 10, 3.0), texts(60, 0.25, 20, 1.0, 0.2)),
    (images(10, 0.1, 20, 3.5, start=2.0), texts(20, 0.1, 40, 0.5, 0.15)),
    (images(10, 0.1, 20, 3.5), texts(20, 0.1, 20, 1.0, 0.2, start=1.0)),
    (images(10, 2.0, 20, 1.15), texts(60, 0.25, 20, 2.0, 0.4)),
    (images(20, 1.0, 10, 8.0), texts(40, 0.5, 20, 0.3, 0.08)),
    (images(40, 0.25, 1, 0.5), texts(20, 0.5, 20, 0.5, 0.1)),
    (images(20, 1.0, 10, 3.0), texts(40, 0.5, 10, 1.0, 0.3, models=("chat", "code"))),
    (texts(20, 1.0, 10, 0.5, 0.12, models=("code",)), texts(20, 1.0, 10, 2.0, 0.5, start=0.5)),
], ids=["light", "texts 1st", "images 1st", "tight images", "tight texts", "one step", "models", "texts"])  # fmt: skip
def test_every_promise_is_kept_where_an_order_keeps_all(loads):
    kept = serve(Priced(), *loads)
    assert kept == {what: count for what, count in kept.items() if what.endswith("kept")}
    assert sum(kept.values()) == sum(map(len, loads))


def test_tight_texts_beside_loose_images_are_kept_where_edf_and_fcfs_lose_some():
    loads = images(20, 1.0, 10, 8.0), texts(40, 0.5, 20, 0.3, 0.08)
    for policy in (EDF(), FCFS()):
        assert serve(policy, *loads) == {"images kept": 20, "texts kept": 38, "texts lost": 2}


def test_those_who_keep_newcomers_out_and_are_promised_nothing_more_go_on_beside_images_with_time():
    """Each text is promised its first output alone, and there is memory for four of them. Images keep the device busy
    for a minute, and each of them has seconds to spare: while they ran the four stood, and the others found no room."""
    many = images(120, 0.5, 40, 15.0)
    few = texts(30, 1.0, 10, 2.0, math.inf)
    assert serve(Priced(), many, few, blocks=8) == {"images kept": 120, "texts kept": 30}


def test_a_flood_of_images_costs_no_text_and_no_image_that_began():
    loads = images(100, 0.05, 20, 1.5), texts(20, 0.5, 20, 1.0, 0.2)
    assert serve(Priced(), *loads, per_image=0.01) == {"images kept": 4, "images refused": 96, "texts kept": 20}
    assert serve(EDF(), *loads, per_image=0.01)["images lost"] == 100


def test_a_flood_of_texts_costs_no_image_that_began():
    decode = LinearProfile("decode", base=0.04, per_job=0.002, max_batch=999)
    steps = StepProfile("llm", LinearProfile("prefill", base=STEP_S, max_batch=999), decode)
    loads = images(20, 1.0, 10, 2.0), texts(500, 0.02, 20, 0.5, 0.1)
    ours = serve(Priced(), *loads, steps=steps)
    edf = serve(EDF(), *loads, steps=steps)
    assert "images lost" not in ours and edf["images lost"] == 11
    assert ours["images kept"] + ours["texts kept"] > 5 * (edf["images kept"] + edf["texts kept"])


def test_a_text_that_finds_no_memory_beside_other_kinds_is_told_so():
    """It was hopeless in the end, as those who run were expected to fill the memory."""
    running = [ask(f"old-{at}", most=300, first=0.5, step=0.5) for at in range(4)]
    new = ask("new", most=300, first=0.5, step=0.5)
    lax = by_deadlines([(100.0, 1.0)])
    for blocks, why in ((80, True), (200, False)):
        scheduler = scheduler_with(running, [new], ends=[300] * 20, blocks=blocks)
        waits = TokenDeadlines().decide(replace(seen(scheduler, 0.0), reserved=lax))
        assert ("new" in ids(waits.jobs)) is not why and not waits.drop
        gone = TokenDeadlines().decide(replace(seen(scheduler, 0.495), reserved=lax)).drop
        (reason,) = gone.values()
        assert reason.startswith("hopeless: its next output needs") and ("fill the KV cache" in reason) is why


gaps = st.sampled_from([0.1, 0.25, 0.5, 1.0])
some_images = st.builds(images, st.integers(1, 12), gaps, st.sampled_from([1, 4, 20]), st.sampled_from([1.2, 2.0, 6.0]))
some_texts = st.builds(
    texts,
    st.integers(1, 12),
    gaps,
    st.sampled_from([1, 5, 20]),
    st.sampled_from([0.3, 1.0]),
    st.sampled_from([0.08, 0.2, 0.5]),
    st.sampled_from([("chat",), ("chat", "code")]),
)


def test_a_text_that_will_be_late_keeps_nobody_out_beside_other_kinds():
    behind = ask("behind", most=400, first=0.5, step=0.008)  # a decode alone takes 0.011 s
    scheduler = scheduler_with([behind], [ask("new", most=10, first=1.0, step=0.1)], ends=[300] * 20)
    view = seen(scheduler, 0.0)
    lax, none = by_deadlines([(100.0, 1.0)]), by_deadlines([(100.0, 99.5)])
    rule = TokenDeadlines()
    assert set(ids(rule.decide(replace(view, reserved=lax)).jobs)) == {"behind", "new"}
    assert ids(rule.decide(replace(view, reserved=none)).jobs) == ["behind"], "it would cost others their promise"


@settings(max_examples=60, deadline=None, derandomize=True)
@given(pictures=some_images, words=some_texts)
def test_whoever_is_started_is_kept(pictures, words):
    """Steps take what they should, and all texts are as long as they may be: no promise has to be broken."""
    came = serve(Priced(), pictures, words)
    assert not came.get("images lost", 0), came
    assert sum(came.values()) == len(pictures) + len(words)


# -- the rules -------------------------------------------------------------------------------------


class Shown:
    """A rule that keeps what it was shown, and runs what the test says."""

    def __init__(self, *stages):
        self.stages = stages
        self.views = []

    def decide(self, view):
        self.views.append(view)
        return Decision([job for job in view.jobs if job.stage.name in self.stages])


def test_each_rule_sees_its_own_jobs_and_what_the_others_were_promised():
    tokens, steps = Shown(), Shown("unet")
    batch = one_of_each().next_batch("gpu", 0.1, instead=PerModel(tokens, steps))
    assert batch.stage == "unet"
    (of_texts,), (of_images,) = tokens.views, steps.views
    assert [ids(of_texts.jobs), ids(of_images.jobs)] == [["text"], ["image"]]
    assert of_texts.reserved.by(2.9) == pytest.approx(19 * STEP_S)  # the image's other steps, by its deadline
    assert of_texts.reserved.by(2.8) == 0.0
    assert of_texts.reserved.share == pytest.approx(19 * STEP_S / 2.9)
    assert of_images.reserved.by(100.0) == pytest.approx(19 * STEP_S)  # its other decodes
    assert of_images.reserved.room == pytest.approx(0.5 + 0.1 - 0.1 - STEP_S)  # to the next one


def test_the_kind_with_less_room_goes_first():
    for total, stage in ((1.1, "unet"), (3.0, "chat.decode")):
        rules = Shown("chat.decode"), Shown("unet")
        assert one_of_each(total).next_batch("gpu", 0.1, instead=PerModel(*rules)).stage == stage


def test_one_kind_alone_is_its_rules_own():
    tokens, steps = Shown("chat.decode"), Shown("unet")
    some = one_of_each()
    some.cancel("image", 0.1)
    assert some.next_batch("gpu", 0.1, instead=PerModel(tokens, steps)).stage == "chat.decode"
    assert not steps.views and tokens.views[0].reserved is NOTHING


def test_any_two_rules_go_together():
    loads = images(10, 1.0, 10, 6.0), texts(20, 0.5, 10, 1.0, 0.3)
    both = PerModel(NeuStreamLLM(), NeuStream(3.0))
    assert serve(both, *loads) == {"images kept": 10, "texts kept": 20}


def test_the_default_is_a_rule_for_each_kind():
    loads = images(40, 0.25, 20, 2.0), texts(60, 0.3, 20, 0.5, 0.1)
    assert serve(PerModel(TokenDeadlines(), PricedSteps()), *loads) == serve(Priced(), *loads)
    with pytest.raises(ConfigError, match="per_model: background must be 0 or more and below 1, got 1"):
        PerModel(TokenDeadlines(), PricedSteps(), background=1)


@pytest.mark.parametrize("rule", [PricedSteps(), TokenDeadlines()], ids=["stages", "texts"])
def test_a_rule_for_one_kind_alone_serves_the_other_kind_too(rule):
    loads = images(20, 0.5, 10, 2.0), texts(20, 0.5, 10, 1.0, 0.3, models=("chat", "code"))
    assert serve(rule, *loads) == {"images kept": 20, "texts kept": 20}
    assert serve(rule, loads[0]) == {"images kept": 20}
    assert serve(rule, loads[1]) == {"texts kept": 20}


# -- what is promised away -------------------------------------------------------------------------

needs = st.lists(st.tuples(st.sampled_from([0.5, 1.0, 2.0, 3.5, 6.0]), st.sampled_from([0.1, 0.4, 1.0])), max_size=5)


def summed(jobs):
    """Each deadline with the work of all jobs that are due until then: EDF's own order."""
    return [(due, sum(work for other, work in jobs if other <= due)) for due, _ in jobs]


@settings(max_examples=200, deadline=None, derandomize=True)
@given(promised=needs, own=needs)
def test_a_job_that_fits_into_what_is_left_breaks_no_deadline(promised, own):
    reserved = by_deadlines(summed(promised))
    fits = all(work <= reserved.left(due) for due, work in summed(own))
    together = all(work <= due for due, work in summed([*promised, *own]))
    if promised and fits:
        assert together or reserved.room < 0
    if together:
        assert fits


@settings(max_examples=100, deadline=None, derandomize=True)
@given(first=needs, second=needs)
def test_two_kinds_need_what_both_need(first, second):
    both = by_deadlines(summed(first)) + by_pace(summed(second))
    assert both.room == min([time - seconds for time, seconds in both.points], default=both.room)
    for time in (0.25, 0.5, 1.5, 3.5, 10.0):
        expected = by_deadlines(summed(first)).by(time) + by_pace(summed(second)).by(time)
        assert both.by(time) == pytest.approx(expected)
    assert all(before[0] < after[0] and before[1] <= after[1] for before, after in pairwise(both.points))


@settings(max_examples=100, deadline=None, derandomize=True)
@given(first=needs, second=needs)
def test_what_is_left_of_many_times_is_what_is_left_of_each(first, second):
    reserved = by_deadlines(summed(first), step=0.1) + by_pace(summed(second))
    times = np.array([[0.0, 0.25, 0.5, 1.0], [1.5, 3.5, 10.0, 1e9]])
    assert reserved.each_left(times).tolist() == [pytest.approx([reserved.left(time) for time in row]) for row in times]


def test_nothing_promised_leaves_everything():
    assert not NOTHING and NOTHING.room == float("inf") and NOTHING.share == 0.0
    assert NOTHING.left(2.0) == 2.0 and NOTHING + NOTHING is NOTHING
    assert (Reserved([(1.0, 0.25)]) + NOTHING).left(2.0) == 1.75
    assert NOTHING.each_left(np.array([2.0])).tolist() == [2.0]


def test_a_step_that_may_be_under_way_is_left_out():
    plain = by_deadlines([(4.0, 1.0)])
    assert plain.left(8.0) == 7.0 and by_deadlines([(4.0, 1.0)], step=0.5).left(8.0) == 6.5
    assert plain.left(2.0) == 2.0 and plain.left(3.5) == 3.0, "a later deadline counts too"
    assert plain.leaves([(2.0, 1.5)]) and not plain.leaves([(2.0, 1.5), (4.0, 3.5)])


def test_a_rule_of_stages_promises_nobody_more_than_is_left():
    some = one_of_each()
    image = Graph("second", loop(Stage("other", 64), times=20))
    some.add("gpu", {"other": LinearProfile("other", base=STEP_S, max_batch=64)})
    some.cancel("image", 0.1)
    some.cancel("text", 0.1)
    some.submit(Request("new", image, 0.1, SLO(total=2.0)), 0.1)
    hand = Hand()
    some.next_batch("gpu", 0.1, instead=hand)
    free = replace(hand.view, reserved=by_deadlines([(3.0, 1.5)]))
    full = replace(hand.view, reserved=by_deadlines([(3.0, 2.5)]))
    assert [ids(PricedSteps().decide(view).jobs) for view in (free, full)] == [["new"], []]
