"""A language model in the core: its steps, requests, and steps of hand-made batches."""

from __future__ import annotations

from hand import Hand

from neustream import (
    SLO,
    Decision,
    Graph,
    LinearProfile,
    Pool,
    Request,
    Scheduler,
)
from neustream.core.kv_cache import KVCache
from neustream.core.steps import PrefillTable, StepProfile
from neustream.graphs import llm, llm_profiles

STEPS = StepProfile(
    "llm",
    PrefillTable("prefill", [1, 100, 1000], [0.01, 0.02, 0.11], (0.01, 1e-4, 0.0)),
    LinearProfile("decode", base=0.01, per_size=1e-6, max_batch=999),
)
CHAT = Graph("chat", llm("llm", max_batch=8))
STAGES = ("llm.prefill", "llm.decode")


def scheduler_of(policy=None, blocks=None, steps=STEPS, step_tokens=2048):
    caches = {} if blocks is None else {"llm": KVCache(blocks, 16)}
    pool = Pool("gpu", STAGES, kv_caches=caches, step_tokens=step_tokens)
    return Scheduler([pool], policy or Hand(), llm_profiles("llm", steps, 8))


NOTHING = SLO()


def ask(id, prompt=20, most=10, slo=NOTHING, arrival=0.0):
    return Request(id, CHAT, arrival, slo, {"prompt_tokens": prompt, "max_tokens": most})


def step(scheduler, now, jobs, sizes=None, ended=()):
    """Let `jobs` run one step that ends at `now`; its batch."""
    wanted = Hand(lambda view: Decision([job for job in view.jobs if job.id in jobs], sizes=sizes or {}))
    batch = scheduler.next_batch("gpu", now, instead=wanted)
    assert batch is not None
    scheduler.finish(batch, [{"ended": job.id in ended} for job in batch.jobs], now)
    return batch
