"""A language model whose requests tests put into a state by hand, and what is decided about them."""

from __future__ import annotations

from hand import Hand, ids, seen

from neustream import SLO, Decision, Graph, LinearProfile, Pool, Priced, Request, Scheduler
from neustream.core.kv_cache import KVCache
from neustream.core.steps import PrefillTable, StepProfile
from neustream.graphs import llm, llm_profiles

STEPS = StepProfile(
    "llm",
    PrefillTable("prefill", [1, 100, 1000], [0.01, 0.02, 0.11], (0.01, 1e-4, 0.0)),
    LinearProfile("decode", base=0.01, per_job=0.001, max_batch=999),
)
CHAT = Graph("chat", llm("llm", max_batch=64))
STAGES = ("llm.prefill", "llm.decode")


def scheduler_with(running=(), waiting=(), now=0.0, ends=(), blocks=None):
    """A scheduler whose `running` have had their first output at `now`; `ends`: lengths that it saw."""
    caches = {} if blocks is None else {"llm": KVCache(blocks, 16)}
    scheduler = Scheduler([Pool("gpu", STAGES, kv_caches=caches)], Hand(), llm_profiles("llm", STEPS, 64))
    for end in ends:
        for outputs in range(1, end + 1):
            scheduler.recent.lengths_of("llm").reached(outputs)
        scheduler.recent.lengths_of("llm").ended(end, 512)
    for request in running:
        scheduler.submit(request, request.arrival)
    if running:
        everybody = Hand(lambda view: Decision(view.jobs))
        batch = scheduler.next_batch("gpu", now, instead=everybody)
        scheduler.finish(batch, [{"ended": False} for _ in batch.jobs], now)
    for request in waiting:
        scheduler.submit(request, now)
    return scheduler


def ask(id, prompt=20, most=100, arrival=0.0, **slo):
    return Request(id, CHAT, arrival, SLO(**slo), {"prompt_tokens": prompt, "max_tokens": most})


def decided(scheduler, now=0.0, policy=None):
    decision = (policy or Priced()).decide(seen(scheduler, now))
    return set(ids(decision.jobs)), set(ids(decision.drop))
