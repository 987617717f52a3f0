"""A vLLM on a GPU as it runs there: a step is scheduled while the one before it runs, and decodes are CUDA graphs."""

from __future__ import annotations

import random

import pytest

from neustream.backends.vllm import slo

pytestmark = pytest.mark.gpu

OURS = "neustream.backends.vllm.SLOScheduler"
GRAPHS = {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY", "cudagraph_capture_sizes": [1, 2, 4, 8]}
AHEAD = {"async_scheduling": True}
WAYS = [AHEAD, {**AHEAD, "enforce_eager": False, "compilation_config": GRAPHS}]


def load(rig, extra=None):
    for at in range(20):
        rig.ask(f"r{at}", 10 + 37 * at % 300, 5 + 11 * at % 40, extra)
    return {id: list(end.token_ids) for id, end in rig.run().items()}


def test_our_class_is_the_one_that_schedules_ahead(engines):
    rig = engines(OURS, **AHEAD)
    assert rig.core.batch_queue is not None
    assert type(rig.scheduler).__name__ == "AsyncSLOScheduler" and rig.scheduler._depth == 2


@pytest.mark.parametrize("way", WAYS, ids=["eager", "graphs"])
@pytest.mark.parametrize("extra", [None, slo(ttft_ms=60_000, tpot_ms=60_000)], ids=["stock", "steered"])
def test_tokens_are_those_of_stock_vllm(engines, way, extra):
    rig, stock = engines(OURS, **way), engines(**way)
    steered = rig.scheduler.stats.steered
    assert load(rig, extra) == load(stock)
    assert (rig.scheduler.stats.steered > steered) == (extra is not None)
    rig.assert_empty()


def test_hopeless_requests_end_once_with_a_reason(engines):
    rig = engines(OURS, **AHEAD)
    for at in range(8):
        rig.ask(f"r{at}", 64, 8, slo(ttft_ms=0.001 if at in (3, 5) else 60_000))
    rig.run()
    said = {id: (end.finish_reason, len(end.token_ids)) for id, end in rig.ended.items()}
    assert said == {f"r{at}": ("abort", 0) if at in (3, 5) else ("length", 8) for at in range(8)}
    assert all(rig.ended[id].stop_reason.startswith("slo: hopeless") for id in ("r3", "r5"))
    rig.assert_empty()


@pytest.mark.parametrize("way", WAYS, ids=["eager", "graphs"])
@pytest.mark.parametrize("policy", ["default", "fcfs", "edf", "neustream_llm"])
def test_random_requests_with_random_cancels(engines, way, policy):
    more = {"num_gpu_blocks_override": 40, "additional_config": {"neustream": {"policy": policy}}}
    rig = engines(OURS, **way, **more)
    rnd, cancelled, added = random.Random(5), set(), 0
    while added < 200 or rig.engine.has_unfinished_requests():
        for _ in range(rnd.choice([0, 0, 1, 3]) if added < 200 else 0):
            promises = [None, slo(total_ms=rnd.choice([1, 200, 5_000])), slo(ttft_ms=rnd.choice([1, 200]), tpot_ms=20)]
            rig.ask(f"r{added}", rnd.randint(1, 300), rnd.randint(1, 40), rnd.choice(promises))
            added += 1
        id = f"r{rnd.randrange(max(0, added - 20), added)}" if added and rnd.random() < 0.1 else None
        if id is not None and id not in rig.ended:
            cancelled.add(id)
            rig.abort(id)
        rig.step()
        assert rig.steps < 20_000
    assert set(rig.ended) | cancelled == {f"r{at}" for at in range(added)}
    for id, end in rig.ended.items():
        assert end.finish_reason in ("length", "abort"), id
        assert end.finish_reason != "abort" or end.stop_reason.startswith("slo: ")
    assert rig.scheduler.stats.errors == 0 and rig.scheduler.stats.steered > 0
    rig.assert_empty()


def test_pressure_on_the_cache_loses_nothing(engines):
    stock = engines(num_gpu_blocks_override=24, **AHEAD)
    rig = engines(OURS, num_gpu_blocks_override=24, **AHEAD, additional_config={"neustream": {"policy": "fcfs"}})
    for at in range(8):
        for some, extra in ((stock, None), (rig, slo(total_ms=600_000 - at))):
            some.ask(f"r{at}", 128, 100, extra)
    wanted = {id: end.token_ids for id, end in stock.run().items()}
    assert {id: end.token_ids for id, end in rig.run().items()} == wanted
    assert rig.scheduler.stats.preempted > 0
    rig.assert_empty()


def test_half_precision_and_what_was_learnt(engines):
    rig = engines(OURS, dtype="float16", **WAYS[1])
    for at in range(64):
        rig.ask(f"r{at}", 1 + 31 * at % 200, 16, slo(ttft_ms=60_000, tpot_ms=60_000))
    rig.run()
    assert {(end.finish_reason, len(end.token_ids)) for end in rig.ended.values()} == {("length", 16)}
    steps = rig.scheduler.step_times
    assert steps.observed > 20 and 0 < rig.scheduler.stats.step_error < 5
    rig.assert_empty()
