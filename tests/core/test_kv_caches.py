"""Several language models in one pool: each has a KV cache of its own, which no other one touches."""

from __future__ import annotations

from collections import Counter
from concurrent.futures import Future
from dataclasses import dataclass, replace

import pytest
from hand import Hand, begin, ids, seen
from hypothesis import given, settings
from hypothesis import strategies as st

from neustream import (
    FCFS,
    SLO,
    Decision,
    Engine,
    Graph,
    GraphError,
    KVCache,
    LinearProfile,
    Member,
    Pool,
    ProfiledExecutor,
    Request,
    RequestError,
    Scheduler,
    Stage,
    VirtualClock,
    loop,
    seq,
)
from neustream.core.policies import POLICIES
from neustream.core.steps import StepProfile
from neustream.engine.decision_time import DecisionTime
from neustream.engine.events import Cancel
from neustream.graphs import llm, llm_profiles

BLOCK = 4
STEPS = StepProfile(
    "llm",
    LinearProfile("prefill", base=0.5, per_size=0.0625, max_batch=999),
    LinearProfile("decode", base=0.5, per_job=0.03125, per_size=0.0078125, max_batch=999),
)


def graphs():
    """A model each, one that asks both in turn, and one of images; stages are shared by name."""
    small, large = llm("small", max_batch=4), llm("large", max_batch=4)
    image = loop(Stage("unet", max_batch=4), times=lambda job: job.params["steps"])
    return [Graph("small", small), Graph("large", large), Graph("both", seq(small, large)), Graph("image", image)]


def profiles():
    unet = LinearProfile("unet", base=0.25, per_job=0.125, max_batch=4)
    return {**llm_profiles("small", STEPS, 4), **llm_profiles("large", STEPS, 4), "unet": unet}


def pool(small=8, large=8, host=0, **more):
    caches = {"small": KVCache(small, BLOCK, host), "large": KVCache(large, BLOCK, host)}
    return Pool("gpu", tuple(profiles()), kv_caches=caches, **more)


def text(id, graph, tokens=8, most=8, slo=SLO(), at=0.0):  # noqa: B008 - frozen
    return Request(id, graph, at, slo, {"prompt_tokens": tokens, "max_tokens": most, "steps": most})


def two(policy=None, small=8, large=8, host=0):
    """A scheduler with a text of 8 tokens at either model."""
    some = Scheduler([pool(small, large, host)], policy or FCFS(), profiles())
    graph_of = {graph.name: graph for graph in graphs()}
    for name in ("small", "large"):
        some.submit(text(name, graph_of[name]), 0.0)
    return some, graph_of


# -- one at a time ---------------------------------------------------------------------------------


def test_each_model_has_its_own_blocks():
    some, _ = two()
    assert seen(some).free == {"small": 8, "large": 8}
    batch = begin(some, "small")
    some.finish(batch, [{}], 0.5)
    assert seen(some, 0.5).free == {"small": 6, "large": 8}
    batch = begin(some, "large", now=0.5)
    some.finish(batch, [{}], 1.0)
    assert seen(some, 1.0).free == {"small": 6, "large": 6}
    some.cancel("small", 1.0)
    assert seen(some, 1.0).free == {"small": 8, "large": 6}


def test_a_full_cache_preempts_nobody_of_another_model():
    some, graph_of = two(large=4)
    some.submit(text("other", graph_of["large"]), 0.0)
    for name in ("small", "large", "other"):
        some.finish(begin(some, name), [{}], 0.0)
    assert seen(some).free == {"small": 6, "large": 0}
    batch = begin(some, "large")  # its ninth token needs a third block
    assert ids(batch.preempted) == ["other"] and some.jobs["small"].num_blocks == 2


def preempted(host):
    """A scheduler in which request "other", with 9 tokens, has lost its blocks to "large"."""
    some, graph_of = two(large=6, host=host)
    some.submit(text("other", graph_of["large"], 7), 0.0)
    for name in ("large", "other", "other", "other", "large", "large", "large", "large"):
        some.finish(begin(some, name), [{}], 0.0)
    return some, begin(some, "large")  # its 13th token needs a fourth block


def test_what_a_preempted_request_computed_is_kept_aside_where_there_is_room():
    some, batch = preempted(3)
    other = some.jobs["other"]
    assert ids(batch.preempted) == ids(batch.aside) == ["other"] == list(batch.info().aside)
    assert (other.stage.name, other.computed, other.size) == ("large.prefill", 9, 1)
    assert (other.num_blocks, other.host_blocks) == (0, 3)
    some.finish(batch, [{}], 1.0)
    some.cancel("large", 1.0)
    back = begin(some, "other", now=1.0)
    assert back.sizes == (1,)
    assert (other.num_blocks, other.host_blocks) == (3, 0)
    some.finish(back, [{}], 2.0)
    assert (other.stage.name, other.size, other.call_outputs) == ("large.decode", 11, 4)


def test_without_room_aside_it_is_computed_again():
    some, batch = preempted(2)
    other = some.jobs["other"]
    assert ids(batch.preempted) == ["other"] and not batch.aside
    assert (other.computed, other.size, other.host_blocks) == (0, 10, 0)


def test_who_is_cancelled_or_leaves_has_nothing_aside():
    some, _ = preempted(3)
    some.hold("other", 0.0)
    assert some.give("other", 0.0).computed == 0
    assert some._pools["gpu"].blocks["large"].host_used == 0
    some, _ = preempted(3)
    assert some._pools["gpu"].blocks["large"].host_used == 3
    some.cancel("other", 0.0)
    assert some._pools["gpu"].blocks["large"].host_used == 0


def test_a_model_without_blocks_stands_in_nobodys_way():
    some, _ = two(large=2)
    some.reserve("gpu", "large", 8)
    first = Hand(lambda view: Decision(view.queues.get("large.prefill") or view.queues["small.prefill"]))
    assert ids(some.next_batch("gpu", 0.0, instead=first).jobs) == ["small"]


def test_reservations_are_a_models():
    some, _ = two()
    ticket = some.reserve("gpu", "large", 32)
    assert (ticket.model, ticket.blocks, seen(some).free) == ("large", 8, {"small": 8, "large": 0})
    with pytest.raises(RequestError, match=r"pool 'gpu', model 'large': cannot reserve 1 blocks \(1 tokens\), 0 of 8"):
        some.reserve("gpu", "large", 1)
    with pytest.raises(RequestError, match=r"no KV cache of model 'tiny'; KV caches: \['large', 'small'\]"):
        some.reserve("gpu", "tiny", 1)
    some.release(ticket)
    with pytest.raises(RequestError, match=r"pool 'gpu', model 'large': .* was released before"):
        some.release(ticket)
    assert seen(some).free == {"small": 8, "large": 8}


def test_what_a_request_kept_goes_to_its_models_cache():
    here, graph_of = two()
    here.finish(begin(here, "large"), [{}], 0.0)
    carry = here.give("large", 0.0)
    there = Scheduler([pool(small=1)], FCFS(), profiles())
    there.take(carry, graph_of["large"], 0.0, cached=True)
    assert seen(there).free == {"small": 1, "large": 6}
    full = Scheduler([pool(large=1)], FCFS(), profiles())
    with pytest.raises(RequestError, match="pool 'gpu', model 'large': request 'large' comes with 2 blocks, 1 of 1"):
        full.take(carry, graph_of["large"], 0.0, cached=True)


def test_blocks_of_the_first_model_are_free_when_the_second_is_asked():
    some, graph_of = two()
    for name in ("small", "large"):
        some.cancel(name, 0.0)
    some.submit(text("a", graph_of["both"], most=1), 0.0)
    batch = begin(some, "a")
    assert batch.stage == "small.prefill" and some._pools["gpu"].free_blocks == {"small": 6, "large": 8}
    some.finish(batch, [{}], 0.0)
    assert seen(some).free == {"small": 8, "large": 8} and some.jobs["a"].stage.model == "large"
    some.finish(begin(some, "a"), [{}], 0.0)
    assert some._pools["gpu"].free_blocks == {"small": 8, "large": 8} and not some.jobs


def test_a_plan_counts_on_the_blocks_that_its_own_model_gets_back():
    some, graph_of = two(large=2)
    some.cancel("large", 0.0)
    some.submit(text("last", graph_of["large"], most=1), 0.0)
    batch = begin(some, "last")
    some.cancel("last", 0.0)
    hand = Hand()
    some.plan(batch, 0.0, instead=hand)
    assert hand.view.free == {"small": 8, "large": 2}


def test_a_prompt_too_long_names_model_and_pool():
    some, graph_of = two(small=2)
    with pytest.raises(RequestError, match="that of model 'small' in pool 'gpu' has 8 "):
        some.submit(text("long", graph_of["small"], tokens=9), 0.0)
    some.submit(text("fits", graph_of["large"], tokens=9), 0.0)


@pytest.mark.parametrize(("caches", "told"), [
    (KVCache(4), "pool 'gpu': kv_caches must map names of models to KVCache, got KVCache"),
    ({"": KVCache(4)}, "pool 'gpu': kv_caches need names of models, got ''"),
    ({"small": 4}, "pool 'gpu': the KV cache of model 'small' must be a KVCache, got 4"),
])  # fmt: skip
def test_what_is_no_cache_of_a_model_is_refused(caches, told):
    with pytest.raises(GraphError, match=told):
        Scheduler([replace(pool(), kv_caches=caches)], FCFS(), profiles())


def test_a_model_without_a_cache_beside_one_that_has_one_is_refused():
    some = Scheduler([replace(pool(), kv_caches={"smal": KVCache(4)})], FCFS(), profiles())
    told = r"graph 'small': model 'small' of stage 'small.prefill' has no KV cache in pool 'gpu'; KV caches: \['smal'\]"
    with pytest.raises(GraphError, match=told):
        some.submit(text("a", graphs()[0]), 0.0)


# -- all policies, all courses ---------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """Requests (gap, graph, prompt, most, end, slo), blocks of either cache, (request, delay) of cancels."""

    requests: tuple[tuple[float, int, int, int, int, SLO], ...]
    small: int
    large: int
    step_tokens: int
    cancels: tuple[tuple[int, float], ...]
    decision_s: float
    host: int


slos = st.sampled_from([SLO(), SLO(first=2.0, step=0.5), SLO(first=8.0, step=1.0), SLO(total=6.0), SLO(total=20.0)])
request = st.tuples(
    st.sampled_from([0.0, 0.125, 0.5, 2.0]),
    st.integers(0, 3),
    st.integers(1, 12),
    st.integers(1, 8),
    st.integers(1, 8),
    slos,
)
cases = st.builds(
    Case,
    st.lists(request, min_size=1, max_size=12).map(tuple),
    st.integers(2, 8),
    st.integers(2, 8),
    st.sampled_from([4, 16, 64]),
    st.lists(st.tuples(st.integers(0, 11), st.sampled_from([0.0, 0.5, 2.0])), max_size=3).map(tuple),
    st.sampled_from([0.0, 0.01]),
    st.sampled_from([0, 0, 2, 5, 100]),
)


class Watch(Scheduler):
    """A scheduler whose blocks are counted anew, model by model, when a step begins."""

    def next_batch(self, pool, now, worker=0):
        batch = super().next_batch(pool, now, worker)
        held: Counter[str] = Counter()
        for job in self.jobs.values():
            if job.num_blocks:
                held[job.stage.model] += job.num_blocks
        state = self._pools["gpu"]
        for model, blocks in state.blocks.items():
            assert held[model] <= blocks.cache.num_blocks
            assert held[model] == blocks.cache.num_blocks - blocks.free
            aside = [job for job in self.jobs.values() if job.host_blocks and job.stage.model == model]
            assert sum(job.host_blocks for job in aside) == blocks.host_used <= blocks.cache.host_blocks
            for job in aside:
                assert not job.num_blocks and job.stage.phase == "prefill"
                assert 0 < job.computed < job.stage.size_of(job)
        if batch is not None:
            models = {job.stage.model for job in batch.jobs}
            assert len(models) == 1
            assert {job.stage.model for job in batch.preempted} <= models, "blocks of another model were taken"
        return batch


def run(policy, case):
    models = graphs()
    served = pool(case.small, case.large, case.host, step_tokens=case.step_tokens)
    scheduler = Watch([served], policy, profiles())
    requests, now = [], 0.0
    for at, (gap, kind, prompt, most, _, slo) in enumerate(case.requests):
        now += gap
        requests.append(text(f"r{at}", models[kind], prompt, most, slo, now))

    def outcome(batch):
        ends = [case.requests[int(job.id[1:])][4] for job in batch.jobs]
        return [{"ended": job.call_outputs + 1 >= end} for job, end in zip(batch.jobs, ends, strict=True)]

    clock = VirtualClock(DecisionTime(case.decision_s))
    for at, delay in case.cancels:
        if at < len(requests):
            clock.post(Cancel(f"r{at}", Future()), requests[at].arrival + delay)
    member = Member(scheduler, {"gpu": ProfiledExecutor(outcome=outcome)})
    return Engine(member, clock).run(requests), scheduler


@pytest.mark.parametrize("name", sorted(POLICIES))
@settings(max_examples=30, deadline=None, derandomize=True)
@given(case=cases)
def test_nothing_is_lost_and_no_block_changes_its_model(name, case):
    report, scheduler = run(POLICIES[name](), case)
    assert report.submitted == len(case.requests) == sum(report.counts.values())
    assert not scheduler.jobs
    assert scheduler._pools["gpu"].free_blocks == {"small": case.small, "large": case.large}
    assert not any(blocks.host_used for blocks in scheduler._pools["gpu"].blocks.values())
