"""No policy keeps anything of what it was shown: neither requests, nor graphs, nor what they hold."""

from __future__ import annotations

import gc
import weakref

import pytest
from toys import engine, table

from neustream import SLO, Graph, LinearProfile, Request, Stage, TableProfile, loop, seq
from neustream.core.demand import RECENT
from neustream.core.policies import POLICIES
from neustream.core.policies.curve import CURVES, Curve, curve_of
from neustream.core.policies.price import price_of
from neustream.core.policies.tied import MOST, share


class Weights:
    """Something large that a graph's conditions look into."""

    steps = 3


def graph_over(weights):
    """A graph whose loop asks `weights` how often it runs; its steps have sizes."""
    draw = Stage("draw", max_batch=4, size=lambda job: float(job.params["size"]))
    return Graph(
        "toy",
        seq(Stage("read"), loop(draw, times=lambda job: weights.steps), Stage("show", emits=True)),
    )


def profiles():
    draw = LinearProfile("draw", base=0.02, per_job=0.01, per_size=0.001, max_batch=4)
    return {"read": table("read", 0.01), "draw": draw, "show": table("show", 0.01)}


def requests(graph, count):
    return [Request(f"r{index}", graph, index * 0.04, SLO(total=0.5), {"size": index % 7}) for index in range(count)]


@pytest.mark.parametrize("name", POLICIES)
def test_a_served_graph_is_gone_once_its_engine_is(name):
    weights = Weights()
    graph = graph_over(weights)
    policy = POLICIES[name]()  # lives on, as a module-level one does
    served = engine(graph, profiles(), policy)
    ended = served.run(requests(graph, 200)).counts
    assert sum(ended.values()) == 200
    assert ended["failed"] == 0
    gone = weakref.ref(weights), weakref.ref(graph), weakref.ref(served.members[0].scheduler)
    del weights, graph, served
    gc.collect()
    assert [what() for what in gone] == [None, None, None]
    assert policy == POLICIES[name]()


class Seen:
    """Decides as another policy does, and keeps the latest view."""

    def __init__(self, policy):
        self.policy = policy

    def decide(self, view):
        self.view = view
        return self.policy.decide(view)


def test_what_is_kept_between_decisions_is_bounded():
    graph = graph_over(Weights())
    seen = Seen(POLICIES["priced"]())
    many = [Request(f"r{index}", graph, index * 0.04, SLO(total=0.5), {"size": index}) for index in range(1000)]
    engine(graph, profiles(), seen).run(many)
    price_of(seen.view)
    (price,) = [kept for kept in seen.view.memo.values() if hasattr(kept, "costs")]
    curves = [kept for key, kept in seen.view.memo.items() if isinstance(key, tuple)]
    assert 0 < len(price.costs) <= RECENT
    assert set(price.costs) <= set(seen.view.recent)
    assert all(0 < len(of) <= CURVES for _, of in curves)
    assert len(seen.view.memo.get(share, ())) <= MOST


def test_costs_are_computed_anew_only_when_speeds_move_by_more_than_noise_does():
    graph = graph_over(Weights())
    seen = Seen(POLICIES["priced"]())
    engine(graph, profiles(), seen).run(requests(graph, 20))
    view = seen.view

    def costs(speed):
        view.speed = dict.fromkeys(view.profiles, speed)
        price_of(view)
        return next(kept.costs for kept in view.memo.values() if hasattr(kept, "costs"))

    as_profiled = costs(1.0)
    assert costs(1.04) is costs(0.96) is as_profiled
    slower = costs(1.2)
    assert costs(1.16) is slower
    demand = view.recent[-1]
    assert slower[demand].alone == pytest.approx(1.2 * as_profiled[demand].alone)


def test_a_corrected_profile_has_a_curve_of_its_own():
    graph = graph_over(Weights())
    seen = Seen(POLICIES["priced"]())
    engine(graph, profiles(), seen).run(requests(graph, 5))
    view = seen.view
    before = curve_of(view, "draw", 2, 1.0)
    assert curve_of(view, "draw", 2, 1.0) is before
    view.profiles = {**view.profiles, "draw": TableProfile("draw", [1, 2], [1.0, 1.5])}
    after = curve_of(view, "draw", 2, 1.0)
    assert after.latency.tolist() == [0.0, 1.0, 1.5]
    assert len(view.memo[Curve, "draw"][1]) == 1  # those of the profile before are gone
