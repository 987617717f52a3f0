"""A solver that lies lowers no bound below what can be served."""

from __future__ import annotations

import math

import numpy as np
import pytest
from exhaustive import draw, optimum
from test_token_bound import chat
from toys import request, table

from neustream import Graph, NeustreamError, Pool, Stage, loop
from neustream.analysis import headroom
from neustream.analysis.bounds import Bound, bound, linear, upper_bound, whole
from neustream.analysis.bounds.linear import Program
from neustream.analysis.bounds.tokens.costs import Costs
from neustream.analysis.bounds.tokens.lines import Line
from neustream.analysis.bounds.tokens.prompts import PromptGroup
from neustream.analysis.bounds.tokens.tasks import Task

SEEDS = range(40)
CLOSE = 1e-6


def bound_of(instance, **other):
    return upper_bound(instance.requests, instance.profiles, instance.pools, overhead_s=instance.overhead_s, **other)


@pytest.fixture
def lies(monkeypatch):
    """Makes the solver claim `less` than it found of whole tasks, and show a solution or hide it."""

    def lie(less, solution=False):
        honest = linear.milp

        def milp(*args, **options):
            found = honest(*args, **options)
            found.mip_dual_bound = less if math.isnan(less) else found.mip_dual_bound + less
            found.x = found.x if solution else None
            return found

        monkeypatch.setattr(linear, "milp", milp)

    return lie


@pytest.fixture
def no_search(monkeypatch):
    monkeypatch.setattr(whole, "BRANCHES", 0)


@pytest.fixture(scope="module")
def truth():
    """Random instances, the most that can be served of each, and its bound."""
    return [(instance, optimum(instance), bound_of(instance)) for instance in map(draw, SEEDS)]


def test_an_honest_claim_is_proven(truth):
    assert sum(found.value < found.relaxed - 0.1 for _, _, found in truth) >= 10, "whole tasks tell more"
    assert all(found.proven == found.value for _, _, found in truth)


@pytest.mark.parametrize("less", [0.3, 1.0, 2.0, math.inf, math.nan])
def test_the_search_finds_lies(truth, lies, less):
    lies(less)
    for seed, (instance, best, honest) in enumerate(truth):
        found = bound_of(instance)
        assert best <= found.value + CLOSE, f"seed {seed}: {best} can be served, the bound is {found}"
        assert honest.value <= found.value + CLOSE, f"seed {seed}: what fits the rows is less than a lie"
        assert found.proven <= found.relaxed + CLOSE


def test_a_solution_that_is_shown_refutes_what_is_claimed(truth, lies, no_search):
    lies(1.0, solution=True)
    for instance, _, honest in truth:
        found = bound_of(instance)
        assert honest.value <= found.value + CLOSE
        assert found.value == found.proven, "nothing is taken at its word"


def test_a_schedule_that_is_known_refutes_what_is_claimed(lies, no_search):
    instance, served = pair_of_three()
    lies(1.0)
    assert upper_bound(*instance).value == 1, "nobody knows better"
    assert upper_bound(*instance, known=[served]).value == 2
    assert upper_bound(*instance, known=[[], served, ["a"]]).value == 2


def pair_of_three():
    """Two of three fit, and fractions of all: requests, profiles and pools; ids of two that fit."""
    graph = Graph("g", loop(Stage("s", max_batch=1), times=2))
    requests = [request(id, graph, total=5) for id in "abc"]
    return (requests, {"s": table("s", 1.0)}, [Pool("gpu", ("s",))]), ["a", "b"]


def test_what_is_claimed_and_not_proven_is_told(no_search):
    instance, _ = pair_of_three()
    found = upper_bound(*instance)
    assert found.value == found.proven == 2, "rounded down: no claim is needed"
    heavy = [request(r.id, r.graph, total=5, weight=1.5) for r in instance[0]]
    found = upper_bound(heavy, *instance[1:])
    assert found.value == pytest.approx(3.0)
    assert found.proven == found.relaxed == pytest.approx(3.75)


def test_a_schedule_of_another_load_is_an_error():
    instance, _ = pair_of_three()
    with pytest.raises(NeustreamError, match=r"at most 2 can be on time, and a schedule serves 3"):
        upper_bound(*instance, known=["abc"])


def test_bounds_rise_to_what_is_served():
    found = Bound(3.0, 4.5, 4.0, "MILP 1", 0.1, {})
    assert (found.above(3.0), found.above(3.5), found.above(4.0)) == (3.0, 4.0, 4.0)
    with pytest.raises(NeustreamError, match=r"at most 4 can be on time, and a schedule serves 4\.5"):
        found.above(4.5)


def test_wrong_prices_make_no_wrong_bound(truth, monkeypatch):
    honest, chance = linear.linprog, np.random.default_rng(0)

    def linprog(*args, **options):
        found = honest(*args, **options)
        if found.status == 0:
            found.ineqlin.marginals *= chance.uniform(0, 2, len(found.ineqlin.marginals))
        return found

    monkeypatch.setattr(linear, "linprog", linprog)
    for seed, (instance, best, _) in enumerate(truth):
        found = bound_of(instance)
        assert best <= found.value + CLOSE, f"seed {seed}"
        assert best <= found.proven + CLOSE, f"seed {seed}"


# -- the search alone -------------------------------------------------------------------------------


def knapsack(weights, sizes, room):
    program = Program(np.array(weights, float))
    program.row(range(len(weights)), [float(size) for size in sizes], float(room))
    return program


def best_of(weights, sizes, room):
    """By trying all subsets."""
    subsets = (np.array([mask >> at & 1 for at in range(len(sizes))]) for mask in range(2 ** len(sizes)))
    return max(float(some @ weights) for some in subsets if some @ sizes <= room)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("step", [1.0, 0.0])
def test_the_search_agrees_with_all_subsets(seed, step):
    chance = np.random.default_rng(seed)
    sizes = chance.integers(2, 9, 7)
    weights = chance.integers(1, 5, 7) if step else chance.uniform(1, 5, 7).round(2)
    room = int(sizes.sum() // 2)
    best = best_of(weights, sizes, room)
    program = knapsack(weights, sizes, room)
    assert program.whole(60).bound == pytest.approx(best)
    assert whole.examined(program, best, step, 60) is True
    assert whole.examined(program, best - (step or 0.01), step, 60) is False
    assert whole.examined(program, best + 1, step, 60) is True


def test_the_search_gives_up(monkeypatch):
    program = knapsack([2.0] * 6, [2.0] * 6, 5)
    assert whole.examined(program, 4, 2.0, 60) is True
    assert whole.examined(program, 4, 1e-3, 0) is None, "no time"
    monkeypatch.setattr(whole, "BRANCHES", 2)
    assert whole.examined(program, 4, 1e-3, 60) is None, "too many branches"
    monkeypatch.setattr(whole, "COLUMNS", 5)
    assert whole.examined(program, 4, 2.0, 60) is None, "too large"
    assert whole.examined(program, math.inf, 2.0, 60) is None


def test_what_is_held_and_cannot_be_closed_proves_nothing(monkeypatch):
    program = knapsack([1.0] * 3, [2.0] * 3, 3.9)
    assert whole.examined(program, 1.5, 0.0, 60) is True
    monkeypatch.setattr(linear, "PENALTY", 0.0)
    assert whole.examined(program, 1.5, 0.0, 60) is None


def test_a_claim_that_is_no_number_claims_nothing(lies):
    lies(math.nan)
    assert knapsack([1.0], [2.0], 1).whole(60) == linear.Whole(math.inf, False)


def test_solutions_that_break_a_row_refute_nothing():
    program = knapsack([1, 1, 1], [2, 2, 2], 4)
    assert program.refutes(np.array([1.0, 1.0, 0.0]), 1.0)
    assert not program.refutes(np.array([1.0, 1.0, 1.0]), 1.0)
    assert not program.refutes(np.array([1.0, 0.0, 0.0]), 1.0)
    assert not program.refutes(np.array([2.0, 0.0, 0.0]), 1.0), "twice the same"


# -- generations ------------------------------------------------------------------------------------


def prompts():
    """Three prompts of which whole steps compute two in time; in fractions the LP serves more."""
    seconds = np.arange(4098) * 0.1
    costs = Costs(0.1, seconds[:-1], seconds[:-1], [], Line(0.1, 0, 0, 0))
    due = np.array([1.05])
    tasks = [Task(str(at), 1.5, 0.0, size, 1, due) for at, size in enumerate((4, 5, 7))]
    return PromptGroup(tasks, costs, known=0.0)


def test_claims_about_prompts_are_tried_too(lies):
    honest = prompts()
    honest.solve(0, False, 60)
    assert honest.value > 3.1
    honest.solve(0, True, 60)
    assert honest.value == honest.proven == pytest.approx(3.0)
    lies(1.0)
    group = prompts()
    group.solve(0, False, 60)
    before = group.value
    group.solve(0, True, 60)
    assert group.value == before


def test_a_known_schedule_of_generations_stands_above_a_claim(lies, no_search):
    lies(1.0)
    group = prompts()
    group.known = 3.0
    for is_whole in (False, True):
        group.solve(0, is_whole, 60)
    assert group.value >= 3.0
    group.known = 4.5
    with pytest.raises(NeustreamError, match=r"a schedule serves 4\.5"):
        group.solve(0, False, 60)


def test_bounds_in_time_that_lean_on_claims_are_not_proven(tmp_path, lies, no_search, monkeypatch):
    monkeypatch.setattr(headroom, "KNOWN", ())
    burst = chat(tmp_path, ["workload.rate=1000", "workload.requests=8", "slo={first_scale: 2, step_scale: 1.4}"])
    honest = headroom.bound_of(burst, 60)
    lies(1.0)
    found = headroom.bound_of(burst, 60)
    assert found.value < honest.value == found.proven < found.relaxed


def test_weights_are_whole_or_not():
    tasks = [Task("a", weight, 0.0, 1, 1, np.array([1.0])) for weight in (1.0, 2.0)]
    assert bound.rounded(2.7, tasks) == 2 and bound.rounded(2.9999999, tasks) == 3
    halves = [*tasks, Task("b", 0.5, 0.0, 1, 1, np.array([1.0]))]
    assert bound.rounded(2.7, halves) == 2.7 and bound.rounded(math.inf, tasks) == math.inf
