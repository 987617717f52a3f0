"""What is lost, refused or never reserved leaves the scheduler's counts and jobs as they should be."""

from __future__ import annotations

from dataclasses import replace

import pytest

from neustream import (
    FCFS,
    Graph,
    KVCache,
    LinearProfile,
    Pool,
    Request,
    RequestError,
    Scheduler,
    Stage,
    loop,
    seq,
)
from neustream.core.steps import StepProfile
from neustream.graphs import llm, llm_profiles

STEPS = StepProfile("llm", LinearProfile("p", base=0.25, max_batch=8), LinearProfile("d", base=0.25, max_batch=8))
CHAT = Graph("chat", llm("llm", max_batch=4))
DRAW = Stage("draw", max_batch=4)
IMAGE = Graph("image", loop(DRAW, times=3))


def test_a_job_whose_state_was_lost_is_bound_to_no_worker():
    pool = Pool("gpu", ("draw",), workers=2, sticky=True)
    scheduler = Scheduler([pool], FCFS(), {"draw": LinearProfile("draw", base=0.5, max_batch=4)})
    scheduler.submit(Request("a", IMAGE), 0.0)
    scheduler.requeue(scheduler.next_batch("gpu", 0.0, worker=1), 1.0, "state")
    assert scheduler.next_batch("gpu", 1.0, worker=0).worker == 0


def chat_scheduler():
    pool = Pool("gpu", ("llm.prefill", "llm.decode"), kv_caches={"llm": KVCache(8, 4)})
    return Scheduler([pool], FCFS(), llm_profiles("llm", STEPS, 4))


def test_a_generation_that_starts_again_has_not_come_to_its_end():
    scheduler = chat_scheduler()
    scheduler.submit(Request("a", CHAT, params={"prompt_tokens": 4, "max_tokens": 6}), 0.0)
    for at in range(2):
        scheduler.finish(scheduler.next_batch("gpu", float(at)), [{}], at + 1.0)
    scheduler.requeue(scheduler.next_batch("gpu", 3.0), 4.0, "state")
    assert scheduler.recent.lengths["llm"].ends == 0


def test_a_decode_without_an_output_so_far_goes_back_to_its_prefill_where_its_cache_stayed_behind():
    def size(job):
        return 4 + job.call_outputs

    prefill = Stage("llm.prefill", 4, size=size, model="llm", phase="prefill")  # emits nothing
    decode = Stage("llm.decode", 4, size=size, model="llm", phase="decode", emits=True)
    graph = Graph("quiet", seq(prefill, loop(decode, times=3)))
    here, there, other = chat_scheduler(), chat_scheduler(), chat_scheduler()
    here.submit(Request("a", graph), 0.0)
    here.finish(here.next_batch("gpu", 0.0), [{}], 1.0)
    assert here.jobs["a"].stage is decode
    carry = here.give("a", 1.0)
    assert there.take(carry, graph, 1.0).stage is prefill
    assert other.take(carry, graph, 1.0, cached=True).stage is decode


@pytest.mark.parametrize("tokens", [-1000, float("nan"), float("inf")])
def test_what_is_no_number_of_tokens_cannot_be_reserved(tokens):
    scheduler = chat_scheduler()
    with pytest.raises(RequestError, match="tokens to reserve must be a number >= 0"):
        scheduler.reserve("gpu", "llm", tokens)
    with pytest.raises(RequestError, match="reserve: no pool 'nope'; pools: \\['gpu'\\]"):
        scheduler.reserve("nope", "llm", 4)
    scheduler.reserve("gpu", "llm", 32)  # all of it, as before


def test_a_ticket_of_another_scheduler_frees_nothing():
    scheduler = chat_scheduler()
    ticket = scheduler.reserve("gpu", "llm", 8)
    with pytest.raises(RequestError, match="is not reserved, or was released before"):
        scheduler.release(replace(ticket, blocks=1))
    scheduler.release(ticket)
    with pytest.raises(RequestError, match="is not reserved, or was released before"):
        scheduler.release(ticket)
