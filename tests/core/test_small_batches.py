"""Profiles that are valid for fewer requests than a rule looks at: nothing is asked beyond them."""

from __future__ import annotations

import random

import pytest

from neustream import SLO, Engine, Graph, LinearProfile, Member, Pool, Priced, Request, Scheduler, Stage, VirtualClock
from neustream.core.graph import loop, seq
from neustream.core.policies import Sarathi
from neustream.core.steps import StepProfile
from neustream.engine.executor import ProfiledExecutor
from neustream.graphs import llm, llm_profiles

PARAMS = {"prompt_tokens": 20, "max_tokens": 4}


def served(graph, slo, most, cached=0, policy=None):
    """Ten requests at once, where a step of the model takes at most so many."""
    parts = [LinearProfile(name, base=0.01, per_size=1e-5, max_batch=most) for name in ("prefill", "decode")]
    profiles = llm_profiles("m", StepProfile("m", *parts), most) | {
        "tool": LinearProfile("tool", base=0.1, max_batch=1)
    }
    pools = [Pool("gpu", ("m.prefill", "m.decode"))]
    pools += [Pool("tool", ("tool",), concurrency=8)] if "tool" in graph.stages else []
    scheduler = Scheduler(pools, policy or Priced(), {name: profiles[name] for name in graph.stages})
    member = Member(scheduler, {pool.name: ProfiledExecutor() for pool in pools})
    requests = [Request(str(at), graph, 0.0, slo, {**PARAMS, "cached_tokens": cached}) for at in range(10)]
    return Engine(member, VirtualClock()).run(requests).counts


@pytest.mark.parametrize("most", [1, 2, 3, 7])
def test_of_texts(most):
    slo = SLO(first=0.2, step=0.05)
    assert served(Graph("text", llm("m", max_batch=most)), slo, most)["on_time"] >= 1


@pytest.mark.parametrize("most", [1, 2, 3, 7])
def test_of_texts_whose_prompts_fill_what_decodes_leave(most):
    counts = served(Graph("text", llm("m", max_batch=most)), SLO(first=0.2, step=0.05), most, policy=Sarathi())
    assert counts["failed"] == 0 and counts["on_time"] >= 1


@pytest.mark.parametrize("most", [1, 2, 3, 7])
def test_of_agents(most):
    graph = Graph("agent", seq(llm("m", max_batch=most), Stage("tool")))
    assert served(graph, SLO(2.0), most)["on_time"] == 10


@pytest.mark.parametrize("most", [1, 2, 3, 7])
def test_of_agents_whose_prompts_begin_with_what_is_known(most):
    """Each has some of its prompt already, and no more of them run than have seats."""
    graph = Graph("agent", seq(llm("m", max_batch=most), Stage("tool")))
    assert served(graph, SLO(2.0), most, cached=5)["on_time"] == 10


@pytest.mark.parametrize("most", [1, 2])
def test_of_texts_beside_images(most):
    """What a text may take of the device is kept for images that have begun."""
    parts = [LinearProfile(name, base=0.01, per_size=1e-5, max_batch=most) for name in ("prefill", "decode")]
    profiles = llm_profiles("m", StepProfile("m", *parts), most)
    profiles["draw"] = LinearProfile("draw", base=0.02, max_batch=8)
    text, image = Graph("text", llm("m", max_batch=most)), Graph("image", loop(Stage("draw", 8), times=20))
    pool = Pool("gpu", ("m.prefill", "m.decode", "draw"))
    member = Member(Scheduler([pool], Priced(), profiles), {"gpu": ProfiledExecutor()})
    requests = [Request(str(at), (text, image)[at % 2], 0.0, SLO(3.0), PARAMS) for at in range(12)]
    assert Engine(member, VirtualClock()).run(requests).counts["on_time"] >= 6


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("total", [1e12, 1e300])
def test_of_agents_with_nearly_all_the_time_there_is(total):
    graph = Graph("agent", seq(llm("m", max_batch=2), Stage("tool")))
    assert served(graph, SLO(total), 2)["on_time"] == 10


@pytest.mark.parametrize("most", [1, 2])
def test_of_texts_of_two_models_beside_some_that_are_promised_nothing(most):
    """Promised texts of another model have a step of their own; they are in none of this one's."""
    parts = [LinearProfile(name, base=0.01, per_size=1e-5, max_batch=most) for name in ("prefill", "decode")]
    profiles, graphs = {}, []
    for name in ("a", "b"):
        profiles |= llm_profiles(name, StepProfile(name, *parts), most)
        graphs.append(Graph(name, llm(name, max_batch=most)))
    member = Member(Scheduler([Pool("gpu", tuple(profiles))], Priced(), profiles), {"gpu": ProfiledExecutor()})
    params, promises = {"prompt_tokens": 20, "max_tokens": 40}, (SLO(9.0), SLO())
    requests = [Request(str(at), graphs[at % 2], 0.01 * at, promises[at // 2 % 2], params) for at in range(16)]
    counts = Engine(member, VirtualClock()).run(requests).counts
    assert counts["failed"] == 0 and counts["on_time"] >= 12


@pytest.mark.parametrize("seed", [8, 47, 48])
def test_of_texts_that_wait_for_company(seed):
    """Of those that prompts may wait for no more count than have seats."""
    draw = random.Random(seed)
    most = draw.choice([2, 3, 4, 6])
    base, each = draw.choice([0.05, 0.1, 0.2]), draw.choice([1e-5, 1e-3])
    prefill = LinearProfile("prefill", base=base, per_size=each, max_batch=most)
    steps = StepProfile("m", prefill, LinearProfile("decode", base=0.01, max_batch=most))
    scheduler = Scheduler([Pool("gpu", ("m.prefill", "m.decode"))], Priced(), llm_profiles("m", steps, most))
    graph, requests, at = Graph("text", llm("m", max_batch=most)), [], 0.0
    for number in range(30):
        at += draw.choice([0, 0, 0.02, 0.1])
        slo = SLO(first=draw.choice([0.5, 1, 3]), step=draw.choice([0.02, 0.05, 0.1]))
        params = {"prompt_tokens": draw.choice([5, 50, 200]), "max_tokens": draw.choice([5, 30])}
        requests.append(Request(str(number), graph, at, slo, params))
    counts = Engine(Member(scheduler, {"gpu": ProfiledExecutor()}), VirtualClock()).run(requests).counts
    assert counts["failed"] == 0 and counts["on_time"] >= 3
