"""Prompts whose beginning is in the cache when they come: no work, but blocks like any others."""

from __future__ import annotations

import pytest
from hand import begin, free_blocks

from neustream import FCFS, GraphError, KVCache, LinearProfile, Pool, Request, RequestError, Scheduler
from neustream.core.graph import Graph
from neustream.core.steps import StepProfile
from neustream.graphs import llm, llm_profiles

STEPS = StepProfile(
    "llm",
    LinearProfile("prefill", base=0.5, per_size=0.0625, max_batch=999),
    LinearProfile("decode", base=0.5, per_size=0.0, max_batch=999),
)
GRAPH = Graph("llm", llm("llm", max_batch=4))


def scheduler():
    pool = Pool("gpu", ("llm.prefill", "llm.decode"), kv_caches={"llm": KVCache(8, 4)})
    return Scheduler([pool], FCFS(), llm_profiles("llm", STEPS, 4))


def text(id, cached):
    return Request(id, GRAPH, params={"prompt_tokens": 16, "max_tokens": 3, "cached_tokens": cached})


def test_what_is_known_is_no_work_and_takes_blocks():
    some = scheduler()
    some.submit(text("whole", 0), 0.0)
    some.submit(text("shared", 12), 0.0)
    whole, shared = some.jobs["whole"], some.jobs["shared"]
    assert (whole.size, shared.size) == (16, 4)
    assert whole.remaining_s - shared.remaining_s == 12 * 0.0625
    batch = begin(some, "shared")
    assert batch.sizes == (4,) and free_blocks(some) == 4
    some.finish(batch, [{}], 1.0)
    assert (shared.stage.name, shared.computed, shared.size) == ("llm.decode", 0, 17)


def test_after_a_preemption_all_of_it_is_work():
    some = scheduler()
    some.submit(text("first", 0), 0.0)
    some.submit(text("shared", 12), 0.0)
    some.finish(begin(some, "first", "shared"), [{}, {}], 1.0)
    batch = begin(some, "first", now=1.0)  # its 17th token needs a block of the other's
    assert [job.id for job in batch.preempted] == ["shared"]
    shared = some.jobs["shared"]
    assert (shared.stage.name, shared.computed, shared.size) == ("llm.prefill", 0, 17)


@pytest.mark.parametrize("cached", [16, 17, -1, float("nan")])
def test_something_has_to_be_left_to_do(cached):
    some = scheduler()
    with pytest.raises(GraphError, match=r"known of stage 'llm.prefill' must be 0 or more and below its size 16"):
        some.submit(text("none", cached), 0.0)
    assert not some.jobs


def test_a_prompt_that_has_no_room_beside_its_known_beginning_is_refused():
    some = scheduler()
    request = Request("long", GRAPH, params={"prompt_tokens": 40, "max_tokens": 1, "cached_tokens": 12})
    with pytest.raises(RequestError, match=r"'long': stage 'llm.prefill' needs KV cache for 40 tokens .* has 32"):
        some.submit(request, 0.0)
    assert not some.jobs
