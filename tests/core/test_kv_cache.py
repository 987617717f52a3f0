"""Blocks of a KV cache: who fits, who gives way, against a slow and plain re-implementation."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from neustream import Graph, Job, KVCache, Request, RequestError, Stage, seq
from neustream.core.kv_cache import Allocation, BlockPool

PREFILL = Stage("prefill", 8, size=lambda job: job.params["tokens"], model="llm", phase="prefill")
DECODE = Stage("decode", 8, size=lambda job: job.params["tokens"], model="llm", phase="decode")
TOOL = Stage("tool", 8)
GRAPH = Graph("g", seq(PREFILL, DECODE, TOOL))
NUM_BLOCKS, BLOCK = 8, 4


def blocks(tokens):
    """Whole blocks for so many tokens, counted one by one."""
    count = 0
    while count * BLOCK < tokens:
        count += 1
    return count


def plain(free, jobs, sizes, others):
    """`BlockPool.allocate` as its docstring says it, one job and one victim at a time."""

    def lacks(job, size):
        if job.stage is TOOL:
            return 0
        return blocks(size if job.stage is DECODE else job.computed + size) - job.num_blocks

    def large(job):
        known = job.computed if job.stage is PREFILL else 0.0
        return job.stage is not TOOL and known + job.size > NUM_BLOCKS * BLOCK

    wanted = [(job, size) for job, size in zip(jobs, sizes, strict=True) if not large(job)]
    too_large = tuple(job for job in jobs if large(job))
    free += sum(job.num_blocks for job in too_large)
    if sum(lacks(job, size) for job, size in wanted) <= free:
        return Allocation(tuple(job for job, _ in wanted), tuple(size for _, size in wanted), (), too_large)
    ran, given, lost = [], [], []
    for job, size in wanted:
        while lacks(job, size) > free and job.num_blocks and job not in lost:
            outside = [other for other in others if other not in jobs and other.status == "waiting"]
            outside = [other for other in outside if other.num_blocks and other not in lost]
            own = [other for other, _ in wanted if other.num_blocks and other not in lost]
            victim = own[-1]
            for other in outside:  # the latest, of those that came together the last
                if victim in own or other.joined_at >= victim.joined_at:
                    victim = other
            lost.append(victim)
            free += victim.num_blocks
        if job not in lost and lacks(job, size) <= free:
            free -= lacks(job, size)
            ran.append(job)
            given.append(size)
    return Allocation(tuple(ran), tuple(given), tuple(lost), too_large)


def job_of(id, stage, tokens, computed, came, status="waiting"):
    job = Job(Request(id, GRAPH, params={"tokens": tokens}))
    job.stage, job.joined_at, job.status = stage, came, status
    job.computed = min(computed, tokens - 1) if stage is PREFILL else 0.0
    return job


facts = st.tuples(
    st.sampled_from([PREFILL, DECODE, DECODE, TOOL]),
    st.integers(1, 40),  # tokens; 32 fit
    st.integers(0, 12),  # computed of a prefill
    st.sampled_from([0.0, 1.0, 2.0]),
    st.booleans(),  # whether it holds blocks
)


@settings(max_examples=400, derandomize=True, deadline=None)
@given(
    chosen=st.lists(facts, min_size=1, max_size=5),
    others=st.lists(st.tuples(facts, st.sampled_from(["waiting", "waiting", "running", "held"])), max_size=4),
    shares=st.lists(st.floats(0.1, 1.0), min_size=5, max_size=5),
    reserved=st.integers(0, 3),
)
def test_allocating_is_what_the_plain_rule_does(chosen, others, shares, reserved):
    pool = BlockPool("gpu", "llm", KVCache(NUM_BLOCKS, BLOCK))
    jobs = [job_of(f"c{at}", *one[:4]) for at, one in enumerate(chosen)]
    rest = [job_of(f"o{at}", *one[:4], status) for at, (one, status) in enumerate(others)]
    holds = [one[4] for one in chosen] + [one[4] for one, _ in others]
    for job, holding in zip(jobs + rest, holds, strict=True):
        tokens = job.computed if job.stage is PREFILL else job.size - 1
        if holding and job.stage is not TOOL and blocks(tokens) <= pool.free:
            pool.set_tokens(job, tokens)
    if reserved <= pool.free:
        pool.reserve(reserved * BLOCK)
    sizes = [
        max(1.0, int(job.size * share)) if job.stage is PREFILL else job.size
        for job, share in zip(jobs, shares, strict=False)
    ]
    free, used = pool.free, pool.used
    made = pool.allocate(jobs, sizes, jobs + rest)
    assert made == plain(free, jobs, sizes, rest)
    assert (pool.free, pool.used) == (free, used), "it answers, and changes nothing"
    back = sum(job.num_blocks for job in (*made.preempted, *made.too_large))
    assert not set(made.preempted) & set(made.too_large)
    assert sum(pool.need(job, size) for job, size in zip(made.jobs, made.sizes, strict=True)) <= free + back
    assert not set(made.jobs) & {*made.preempted, *made.too_large}


def test_blocks_in_use_reserved_and_free_add_up():
    pool = BlockPool("gpu", "llm", KVCache(NUM_BLOCKS, BLOCK))
    job = job_of("a", DECODE, 9, 0, 0.0)
    pool.set_tokens(job, 9)
    ticket = pool.reserve(5)
    assert (job.num_blocks, pool.used, pool.reserved, pool.free) == (3, 3, 2, 3)
    pool.set_tokens(job, 4)
    assert (job.num_blocks, pool.used, pool.free) == (1, 1, 5)
    pool.release(ticket)
    pool.set_tokens(job, 0)
    assert (pool.used, pool.reserved, pool.free) == (0, 0, NUM_BLOCKS)
    with pytest.raises(RequestError, match="is not reserved, or was released before"):
        pool.release(ticket)


def test_a_job_that_outgrew_the_cache_is_no_victim_and_leaves_its_blocks():
    pool = BlockPool("gpu", "llm", KVCache(NUM_BLOCKS, BLOCK))
    first, outgrown = job_of("a", DECODE, BLOCK + 1, 0, 0.0), job_of("b", DECODE, NUM_BLOCKS * BLOCK + 1, 0, 1.0)
    pool.set_tokens(first, BLOCK)
    pool.set_tokens(outgrown, (NUM_BLOCKS - 1) * BLOCK)
    made = pool.allocate([first, outgrown], [first.size, outgrown.size], [first, outgrown])
    assert (made.jobs, made.preempted, made.too_large) == ((first,), (), (outgrown,))
