"""A newcomer begins if it is in time also though others come in place of those who end."""

from __future__ import annotations

import random

import pytest
from hand import ids, seen
from priced_images import LOOP, UNET, VAE, ask, run, steps_of, waiting

from neustream import Graph, Priced, loop, seq
from neustream.core.demand import Calls, Demand
from neustream.core.policies.lasting import lasting
from neustream.core.policies.line_up import line_up

DECODED = Graph("decoded", seq(loop(UNET, times=steps_of), VAE))


def load(gap):
    """Requests that took 2 s of the device came every `gap` seconds."""
    calls = {"unet": Calls(4, True, 4)}
    return tuple(Demand(at * gap, 6.0, calls=calls) for at in range(100))


def beside_three(*, gap=None, weight=1.0, began=0.0, due=14.0, time=12.0, graph=LOOP):
    """Who is in the next step: three with two of eight steps left, and one who would have its eight.

    The three, of eight steps, came at 0. All four fit: after two turns of 2 s each the newcomer is
    alone. A step of three takes 1.5 s. The newcomer is due in `time`.
    """
    some = waiting(*[ask(f"r{at}", 8, due, graph=graph) for at in range(3)])
    now = began
    for _ in range(6):
        now = run(some, "r0", "r1", "r2", now=now)
    some.submit(ask("new", 8, now + time, arrival=now, weight=weight, graph=graph), now)
    view = seen(some, now)
    if gap is not None:
        view.recent = load(gap)
    return set(ids(Priced(price=0.0).decide(view).jobs))


THREE = {"r0", "r1", "r2"}


def test_under_load_a_plan_does_not_count_on_who_ends():
    assert beside_three(gap=2.0) == THREE
    assert beside_three(gap=1.0) == THREE  # no more than all of the time is filled


@pytest.mark.parametrize("gap", [None, 4.0])
def test_where_few_come_it_does(gap):
    assert "new" in beside_three(gap=gap)


def test_those_who_have_little_time_left_need_a_seat_though_they_came_with_much():
    assert beside_three(gap=2.0, began=27.0, due=40.0) == THREE
    assert "new" in beside_three(gap=2.0, began=22.0, due=40.0)


@pytest.mark.parametrize(("due", "in_time"), [(40.0, True), (26.0, True), (19.0, False)])
def test_those_who_can_wait_until_a_newcomer_is_over_take_no_seat_of_it(due, in_time):
    """Its eight steps may take 10.5 s; the three then have two steps of 1.5 s each left, together."""
    assert ("new" in beside_three(gap=1.0, due=due, time=10.5)) is in_time


def test_a_heavier_one_takes_seats_of_lighter_ones():
    assert beside_three(gap=2.0, weight=1.1) == THREE
    assert "new" in beside_three(gap=2.0, weight=1.5)


def test_the_first_of_several_newcomers_take_the_seats_that_are_left():
    some = waiting(ask("r0", 8, 14.0), ask("r1", 8, 14.0))
    now = 0.0
    for _ in range(6):
        now = run(some, "r0", "r1", now=now)
    for name in ("n0", "n1"):
        some.submit(ask(name, 8, now + 12.0, arrival=now), now)
    view = seen(some, now)
    view.recent = load(2.0)
    assert len({"n0", "n1"} & set(ids(Priced(price=0.0).decide(view).jobs))) == 1


def test_a_decode_takes_all_seats_while_it_runs():
    # a decode of 0.25 s leaves each as much time for its steps, and stops the steps of the others
    assert "new" in beside_three(gap=2.0, due=17.75, time=13.75)
    assert beside_three(gap=2.0, due=18.0, time=14.0, graph=DECODED) == THREE


def begins(gap, *others):
    """Whether one that has 1.75 s for each step has a seat beside others of 100 steps.

    `others`: seconds for each step that one came with, and has by now. Batches of two take 1.25 s,
    of three 1.5.
    """
    asked = [
        ask(f"r{at}", 100, 1000 + 100 * now, arrival=1000 - 100 * (came - now))
        for at, (came, now) in enumerate([*others, (1.75, 1.75)])
    ]
    view = seen(waiting(*asked), 1000.0)
    view.recent = load(gap)
    jobs = line_up(view, {})
    places = {job.id: place for place, job in enumerate(jobs.jobs)}
    *promised, new = [places[request.id] for request in asked]
    return lasting(view, jobs, promised, [new]) == [new]


def test_what_became_of_others_who_came_with_as_much_time_becomes_of_a_newcomer():
    assert begins(2.0, (2.0, 1.75), (2.0, 1.75))
    assert not begins(2.0, (2.0, 1.75), (2.0, 1.3))


def test_one_that_came_with_little_time_says_nothing_of_a_newcomer_with_much():
    assert begins(2.0, (2.0, 1.75), (1.3, 1.3))


def test_where_few_come_a_newcomer_keeps_its_pace():
    assert begins(4.0, (2.0, 1.75), (2.0, 1.3))


def test_to_ask_for_all_newcomers_at_once_is_to_ask_for_one_after_the_other():
    draw, some_but_not_all = random.Random(5), 0
    for _ in range(60):
        asked = []
        for at in range(draw.randint(4, 14)):
            steps, pace = draw.randint(1, 40), draw.choice([1.1, 1.3, 1.6, 2.0, 6.0])
            graph, weight = draw.choice([LOOP, DECODED]), draw.choice([1.0, 1.0, 3.0])
            arrival = 1000 - draw.choice([0.0, 0.0, 0.4 * pace * steps])
            due = arrival + pace * steps + 1
            asked.append(ask(f"r{at}", steps, due, arrival=arrival, weight=weight, graph=graph))
        view = seen(waiting(*asked), 1000.0)
        view.recent = load(draw.choice([1.0, 2.0, 3.0]))
        jobs = line_up(view, {})
        places = list(range(len(jobs.jobs)))
        draw.shuffle(places)
        promised, ranked = sorted(places[:2]), places[2:]
        one_by_one: list[int] = []
        for new in ranked:
            one_by_one += lasting(view, jobs, [*promised, *one_by_one], [new])
        assert lasting(view, jobs, promised, ranked) == one_by_one
        some_but_not_all += 0 < len(one_by_one) < len(ranked)
    assert some_but_not_all > 20
