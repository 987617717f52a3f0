"""The parameters of `priced`, what weights buy, and that any view has a sound decision."""

from __future__ import annotations

import dataclasses
import math
import random

import pytest
from hand import Hand, seen, set_policy
from hypothesis import given, settings
from hypothesis import strategies as st
from priced_images import (
    BOTH,
    IMAGE,
    LOOP,
    OTHER,
    SHORT,
    SIZED,
    TURNS,
    ask,
    outcomes,
    steps_of,
    waiting,
)

from neustream import (
    ConfigError,
    Decision,
    Graph,
    LinearProfile,
    Priced,
    Stage,
    loop,
)

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
