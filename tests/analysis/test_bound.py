"""The bound is never below what can be served: exhaustive search, policies, and corners."""

from __future__ import annotations

import importlib
import os
import random
import sys
from dataclasses import replace

import pytest
from exhaustive import draw, draw_fleet, optimum
from toys import draw_and_decode, request, table

from neustream import (
    Engine,
    Graph,
    Member,
    Pool,
    ProfiledExecutor,
    Request,
    Scheduler,
    Stage,
    VirtualClock,
    loop,
    seq,
    switch,
)
from neustream.analysis.bounds import Devices, slack_bound, upper_bound
from neustream.analysis.bounds.graphs import upper as module
from neustream.core.policies import POLICIES
from neustream.engine.trace import EventLog
from neustream.errors import BackendError, GraphError, ProfileError

INSTANCES = int(os.environ.get("NEUSTREAM_BOUND_INSTANCES", "120"))
"""How many random instances to search exhaustively; 10,000 take some minutes."""
CLOSE = 1e-6


def bound_of(instance, **other):
    more = {"others": instance.others, "overhead_s": instance.overhead_s, **other}
    return upper_bound(instance.requests, instance.profiles, instance.pools, **more)


def looped(max_batch=4):
    return Graph("looped", loop(Stage("s", max_batch=max_batch, emits=True), times=lambda job: job.params["steps"]))


# -- against the truth ------------------------------------------------------------------------------


@pytest.mark.parametrize("part", range(4))
def test_no_schedule_serves_more_than_the_bound(part):
    for seed in range(part, INSTANCES, 4):
        instance = draw(seed)
        best, found = optimum(instance), bound_of(instance)
        assert best <= found.value + CLOSE, f"seed {seed}: {best} can be served, the bound is {found}"
        assert found.value <= found.relaxed + CLOSE, f"seed {seed}: {found}"


@pytest.mark.parametrize("part", range(2))
def test_no_schedule_of_unlike_devices_serves_more_than_the_bound(part):
    exact = 0
    some = range(part, INSTANCES // 3, 2)
    for seed in some:
        instance = draw_fleet(seed)
        best, found = optimum(instance), bound_of(instance)
        assert best <= found.value + CLOSE, f"seed {seed}: {best} can be served, the bound is {found}"
        assert found.value <= found.relaxed + CLOSE, f"seed {seed}: {found}"
        exact += found.value <= best + CLOSE
    assert exact >= 0.7 * len(some), "and mostly it is what can be served"


def test_a_device_more_of_any_kind_lowers_no_bound():
    for seed in range(30):
        fleet = draw_fleet(seed)
        alone = replace(fleet, others=[])
        if set(fleet.pools[0].stages) == set(fleet.profiles):
            assert bound_of(alone).relaxed <= bound_of(fleet).relaxed + CLOSE, f"seed {seed}"


def test_devices_of_one_kind_are_a_pool_of_as_many_workers():
    for seed in range(30):
        instance = draw(seed)
        twice = replace(instance, others=[Devices(instance.profiles, instance.pools)])
        more = replace(instance, pools=[replace(pool, workers=2 * pool.workers) for pool in instance.pools])
        assert bound_of(twice).relaxed == pytest.approx(bound_of(more).relaxed, abs=1e-4), f"seed {seed}"


def test_the_bound_is_mostly_exact_on_small_instances():
    seeds = range(60)
    exact = sum(bound_of(draw(seed)).value <= optimum(draw(seed)) + CLOSE for seed in seeds)
    assert exact >= 0.8 * len(seeds)


def test_shares_are_no_looser_than_slack_prices():
    for seed in range(100):
        instance = draw(seed)
        slack = slack_bound(instance.requests, instance.profiles, instance.pools, overhead_s=instance.overhead_s)
        assert bound_of(instance).relaxed <= slack + CLOSE, f"seed {seed}"


def test_more_workers_or_time_lower_no_relaxed_bound():
    for seed in range(60):
        instance = draw(seed)
        relaxed = bound_of(instance).relaxed
        more = replace(instance, pools=[replace(pool, workers=pool.workers + 1) for pool in instance.pools])
        assert bound_of(more).relaxed >= relaxed - CLOSE, f"seed {seed}: a worker more"
        later = [replace(r, slo=replace(r.slo, total=r.slo.total + 0.5)) for r in instance.requests]
        assert bound_of(replace(instance, requests=later)).relaxed >= relaxed - CLOSE, f"seed {seed}: more time"


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("seed", range(3))
def test_no_policy_serves_more_than_the_bound(seed, workers):
    rng = random.Random(seed)
    graph = draw_and_decode(max_batch=4, decode_batch=2)
    profiles = {"draw": table("draw", 0.1, 0.13, 0.17, 0.23), "decode": table("decode", 0.05, 0.08)}
    requests = []
    for at in range(14):
        steps = rng.randint(2, 8)
        alone, scale = steps * 0.1 + 0.05, rng.choice([1.1, 1.5, 2.5])
        requests.append(request(str(at), graph, rng.uniform(0, 4), steps, alone * scale, weight=rng.choice([1, 2])))
    requests.sort(key=lambda r: r.arrival)
    pool, overhead_s = Pool("gpu", ("draw", "decode"), workers), 0.001
    found = upper_bound(requests, profiles, [pool], overhead_s=overhead_s)
    for name, make in POLICIES.items():
        log = EventLog()
        executors = {"gpu": ProfiledExecutor(handover_s=overhead_s)}
        Engine(Member(Scheduler([pool], make(), profiles), executors), VirtualClock(), [log]).run(requests)
        assert sum(r.slo.weight for r in requests if log.requests[r.id]["on_time"]) <= found.value + CLOSE, name


# -- what counts ------------------------------------------------------------------------------------

GPU = [Pool("gpu", ("s",))]
SOLO = {"s": table("s", 1.0)}


def test_of_two_that_cannot_share_the_heavier_counts():
    graph = looped(max_batch=1)
    pair = [request("a", graph, steps=2, total=3, weight=2), request("b", graph, steps=2, total=3, weight=7)]
    found = upper_bound(pair, SOLO, GPU)
    assert (found.value, found.relaxed) == (7, pytest.approx(8))
    assert upper_bound(pair, SOLO, [Pool("gpu", ("s",), workers=2)]).value == 9


def test_a_deadline_met_to_the_tick_is_met():
    late = request("a", looped(), steps=3, total=3 - 1e-6)
    assert upper_bound([request("a", looped(), steps=3, total=3.0)], SOLO, GPU).value == 1
    assert upper_bound([late], SOLO, GPU).value == 0
    assert slack_bound([late], SOLO, GPU) == 0


def test_overhead_makes_steps_longer():
    one = [request("a", looped(), steps=3, total=3.2)]
    assert upper_bound(one, SOLO, GPU, overhead_s=0.05).value == 1
    assert upper_bound(one, SOLO, GPU, overhead_s=0.1).value == 0


def test_a_larger_batch_that_is_faster_is_open_to_all():
    pair = [request(id, looped(2), steps=2, total=1.0) for id in "ab"]
    assert upper_bound(pair, {"s": table("s", 3.0, 0.5)}, GPU).value == 2


def test_steps_of_different_models_share_no_batch():
    graphs = [Graph(name, loop(Stage(name, max_batch=2), times=2)) for name in "xy"]
    profiles = {name: table(name, 1.0, 1.0) for name in "xy"}
    pool = [Pool("gpu", ("x", "y"))]
    same = [request(id, graphs[0], total=2) for id in "ab"]
    mixed = [request("a", graphs[0], total=2), request("b", graphs[1], total=2)]
    assert upper_bound(same, profiles, pool).value == 2
    assert upper_bound(mixed, profiles, pool).value == 1


def test_half_a_batch_needs_another_half():
    """While `a` has no time to lose, `b` and `c` come and go one after the other, each too tight to be joined."""
    profiles = {"s": table("s", 1.0, 1.5)}
    requests = [
        request("a", looped(2), 0.0, steps=4, total=5),
        request("b", looped(2), 0.0, steps=2, total=2),
        request("c", looped(2), 3.0, steps=2, total=2),
    ]
    assert upper_bound(requests, profiles, GPU).value == 2


def test_without_a_deadline_or_work_all_are_served():
    free = [Request("a", looped(), params={"steps": 5}), request("b", looped(), steps=0, total=1)]
    assert upper_bound(free, SOLO, GPU).value == 2
    assert slack_bound(free, SOLO, GPU) == 2
    assert upper_bound([], SOLO, GPU).value == 0


def test_the_first_output_is_a_deadline_where_it_is_the_last():
    ends = draw_and_decode()
    profiles = {"draw": table("draw", 1.0), "decode": table("decode", 1.0)}
    pool = [Pool("gpu", ("draw", "decode"))]
    assert upper_bound([request("a", ends, steps=2, total=9, first=2.5)], profiles, pool).value == 0
    assert upper_bound([request("a", ends, steps=2, total=9, first=3.0)], profiles, pool).value == 1
    tokens = [request("a", looped(), steps=4, total=9, first=1.0, step=0.9)]
    assert upper_bound(tokens, SOLO, GPU).value == 0
    assert upper_bound([request("a", looped(), steps=4, total=9, first=1.0)], SOLO, GPU).value == 1


def test_a_merged_grid_is_looser_but_valid(monkeypatch):
    crowd = [request(str(at), looped(), 0.13 * at, steps=1 + at % 3, total=3 + at % 2) for at in range(30)]
    profiles = {"s": table("s", 0.5, 0.6, 0.8, 1.1)}
    fine = upper_bound(crowd, profiles, GPU)
    monkeypatch.setattr(module, "COARSE", 100)
    monkeypatch.setattr(module, "FINE", 200)
    coarse = upper_bound(crowd, profiles, GPU)
    assert fine.relaxed <= coarse.relaxed + CLOSE < 30
    assert fine.relaxed <= slack_bound(crowd, profiles, GPU) + CLOSE


def test_a_time_limit_leaves_a_valid_bound():
    requests = [request(str(at), looped(max_batch=1), steps=2, total=3) for at in range(4)]
    assert upper_bound(requests, SOLO, GPU, time_limit_s=0.0).value == 4
    assert upper_bound(requests, SOLO, GPU).value == 1


# -- what cannot be bounded -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("root", "says"),
    [
        (Stage("s", size=lambda job: 1.0), "sized or fused"),
        (Stage("s", model="mixed"), "sized or fused"),
        (loop(Stage("s"), until=lambda job: True, expect=3), "length of a loop"),
        (loop(Stage("s"), times=3, expect=2), "length of a loop"),
        (seq(switch(lambda job: 0, {0: Stage("s")}, likely=0)), "switch"),
    ],
)
def test_graphs_whose_work_is_not_known(root, says):
    with pytest.raises(GraphError, match=says):
        upper_bound([request("a", Graph("g", root))], SOLO, GPU)


def test_stages_need_a_pool_and_a_profile():
    with pytest.raises(GraphError, match="in no pool"):
        upper_bound([request("a", looped())], SOLO, [])
    with pytest.raises(ProfileError, match="has no profile"):
        upper_bound([request("a", looped())], {}, GPU)


def test_without_scipy_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    monkeypatch.delitem(sys.modules, "neustream.analysis.bounds.linear")
    with pytest.raises(BackendError, match=r"neustream\[analysis\]"):
        importlib.import_module("neustream.analysis.bounds.linear")
