"""SLOScheduler inside a real vLLM engine: stock where nothing is promised, ours where something is."""

from __future__ import annotations

import random

import pytest

from neustream.backends.vllm import slo

OURS = "neustream.backends.vllm.SLOScheduler"


@pytest.fixture
def ours(engines):
    rig = engines(OURS)
    yield rig
    rig.assert_empty()


def mixed_load(rig, extra=None):
    for at in range(20):
        rig.ask(f"r{at}", 10 + 37 * at % 300, 5 + 11 * at % 40, extra)
    rig.run()
    return {id: list(end.token_ids) for id, end in rig.ended.items()}


def test_without_slos_it_is_the_stock_scheduler(engines, ours):
    stock = engines()
    assert mixed_load(ours) == mixed_load(stock)
    assert ours.order == stock.order
    assert ours.steps == stock.steps
    assert ours.scheduler.stats.steered == 0


def test_a_weight_alone_leaves_it_the_stock_scheduler(ours):
    steered = ours.scheduler.stats.steered
    ours.ask("r", 20, 5, slo(weight=3))
    ours.run()
    assert ours.scheduler.stats.steered == steered and not ours.scheduler._slos


def test_with_slos_the_tokens_are_the_same(engines, ours):
    stock = engines()
    assert mixed_load(ours, slo(ttft_ms=60_000, tpot_ms=60_000)) == mixed_load(stock)
    assert ours.scheduler.stats.steered > 0
    assert {end.finish_reason for end in ours.ended.values()} == {"length"}


def test_deadlines_decide_the_order(engines):
    rig = engines(OURS, max_num_seqs=2, additional_config={"neustream": {"policy": "edf"}})
    for at in range(8):
        rig.ask(f"r{at}", 64, 8, slo(ttft_ms=100_000 - 10_000 * at))
    rig.run()
    assert rig.order == [f"r{at}" for at in reversed(range(8))]
    rig.assert_empty()


def test_hopeless_requests_end_once_with_a_reason(ours):
    dropped = ours.scheduler.stats.dropped
    for at in range(8):
        ours.ask(f"r{at}", 64, 8, slo(ttft_ms=0.001 if at in (3, 5) else 60_000))
    ours.run()
    assert len(ours.ended) == 8
    for id, end in ours.ended.items():
        if id in ("r3", "r5"):
            assert end.finish_reason == "abort" and end.token_ids == []
            assert end.stop_reason.startswith("slo: hopeless")
        else:
            assert end.finish_reason == "length" and len(end.token_ids) == 8
    assert ours.scheduler.stats.dropped == dropped + 2


def test_who_wants_it_late_goes_on_without_its_promise(ours):
    dropped = ours.scheduler.stats.dropped
    ours.ask("late", 64, 8, slo(ttft_ms=1e-3, finish=True))
    ours.ask("r", 64, 8, slo(ttft_ms=60_000))
    ours.run()
    assert {id: (str(end.finish_reason), len(end.token_ids)) for id, end in ours.ended.items()} == {
        "late": ("length", 8),
        "r": ("length", 8),
    }
    assert ours.scheduler.stats.dropped == dropped and not ours.scheduler._promised


def test_a_lone_hopeless_request_does_not_wait_for_ever(ours):
    ours.ask("alone", 64, 8, slo(ttft_ms=0.001))
    ours.run(most=3)
    assert ours.ended["alone"].finish_reason == "abort"


def test_a_running_request_that_became_hopeless_keeps_its_tokens(engines):
    rig = engines(OURS, additional_config={"neustream": {"policy": "edf"}})
    rig.ask("r", 20, 400, slo(total_ms=60_000))
    for _ in range(5):
        rig.step()
    had = next(iter(rig.scheduler.requests.values())).num_output_tokens
    job = next(iter(rig.scheduler.views.jobs.values()))
    job.due = job.due_next = 0.0  # as if the time had passed
    rig.run()
    assert rig.ended["r"].finish_reason == "abort"
    assert len(rig.ended["r"].token_ids) == had >= 3
    rig.assert_empty()


def test_the_first_slo_finds_requests_midway(ours):
    ours.ask("plain", 100, 40)
    ours.ask("long", 400, 10)
    for _ in range(3):
        ours.step()
    assert not ours.scheduler.views.jobs
    ours.ask("promised", 30, 10, slo(ttft_ms=60_000, tpot_ms=1_000))
    ours.step()
    assert len(ours.scheduler.views.jobs) == 3
    ours.run()
    assert {id: len(end.token_ids) for id, end in ours.ended.items()} == {"plain": 40, "long": 10, "promised": 10}


@pytest.mark.parametrize("promise", [{}, {"slo_ttft_ms": 60_000}], ids=["stock", "steered"])
def test_abort_in_each_state(engines, promise):
    # the default policy admits no more than there is memory for
    rig = engines(OURS, num_gpu_blocks_override=24, additional_config={"neustream": {"policy": "fcfs"}})
    for at in range(8):
        rig.ask(f"r{at}", 128, 100, promise)
    from vllm.v1.request import RequestStatus

    aborted = {}
    for _ in range(400):
        rig.step()
        for request in list(rig.scheduler.requests.values()):
            if request.status == RequestStatus.PREEMPTED:
                state = "preempted"
            elif request.status == RequestStatus.WAITING:
                state = "waiting"
            else:
                state = "prefilling" if request.is_prefill_chunk else "running"
            if state not in aborted:
                aborted[state] = request.request_id
                rig.engine.abort_request([request.request_id], internal=True)
                break
        if len(aborted) == 4:
            break
    assert set(aborted) == {"preempted", "waiting", "prefilling", "running"}
    rig.run()
    rig.assert_empty()


@pytest.mark.parametrize("policy", ["default", "fcfs", "edf"])
def test_pressure_on_the_cache_loses_nothing(engines, policy):
    """24 blocks of 32 tokens for 8 requests that need 8 each: vLLM preempts and recomputes."""
    stock = engines(num_gpu_blocks_override=24)
    rig = engines(OURS, num_gpu_blocks_override=24, additional_config={"neustream": {"policy": policy}})
    for at in range(8):
        for some, extra in ((stock, None), (rig, slo(total_ms=600_000 - at))):
            some.ask(f"r{at}", 128, 100, extra)
    stock.run()
    rig.run()
    assert {id: e.token_ids for id, e in rig.ended.items()} == {id: e.token_ids for id, e in stock.ended.items()}
    rig.assert_empty()


def test_500_random_requests_with_random_cancels(engines):
    rig = engines(OURS, num_gpu_blocks_override=40)
    rnd = random.Random(5)
    cancelled, added = set(), 0
    while added < 500 or rig.engine.has_unfinished_requests():
        for _ in range(rnd.choice([0, 0, 1, 3]) if added < 500 else 0):
            extra = rnd.choice(
                [None, None, slo(total_ms=rnd.choice([1, 200, 5_000])), slo(ttft_ms=rnd.choice([1, 200]), tpot_ms=20)]
            )
            rig.ask(f"r{added}", rnd.randint(1, 300), rnd.randint(1, 40), extra)
            added += 1
        if rnd.random() < 0.1 and added:
            id = f"r{rnd.randrange(max(0, added - 20), added)}"
            if id not in rig.ended:
                cancelled.add(id)
                rig.abort(id)
        rig.step()
        assert rig.steps < 20_000
    assert added <= 503
    assert set(rig.ended) | cancelled == {f"r{at}" for at in range(added)}
    for id, end in rig.ended.items():
        assert end.finish_reason in ("length", "abort"), id
        assert end.finish_reason != "abort" or end.stop_reason.startswith("slo: ")
    rig.assert_empty()


def assert_agreement(rig):
    """A policy would read of each request what vLLM says of it."""
    scheduler = rig.scheduler
    view = scheduler.views.build(scheduler.requests, {}, 0, 0.0)
    assert {job.id for job in view.jobs} == set(scheduler.requests)
    for job in view.jobs:
        request = scheduler.requests[job.id]
        assert job.params["prompt_tokens"] + job.call_outputs == request.num_tokens
        assert job.stage.phase == "decode" or job.computed == request.num_computed_tokens
        assert job.stage.phase != "decode" or job.size == request.num_computed_tokens + 1


def test_what_a_prefix_cache_saves_is_seen_by_policies(engines):
    stock = engines(enable_prefix_caching=True)
    rig = engines(OURS, enable_prefix_caching=True)
    for _ in range(2):
        for some, extra in ((stock, None), (rig, slo(total_ms=600_000))):
            for at in range(8):
                some.ask(f"r{at}", 300, 10 + at, extra)  # the second time all prompts are in the cache
            while some.engine.has_unfinished_requests():
                some.step()
                if some is rig:
                    assert_agreement(rig)
        assert {id: e.token_ids for id, e in rig.ended.items()} == {id: e.token_ids for id, e in stock.ended.items()}
        steps = rig.steps
        stock.ended.clear()
        rig.ended.clear()
        rig.steps = 0
    assert rig.steps < steps, "nothing was cached"
    rig.assert_empty()


def test_a_reset_of_the_cache_in_between_is_survived(ours):
    for at in range(4):
        ours.ask(f"r{at}", 100, 40, slo(total_ms=600_000))
    for _ in range(10):
        ours.step()
    assert ours.scheduler.running
    ours.scheduler.reset_prefix_cache(reset_running_requests=True)
    assert not ours.scheduler.running
    while ours.engine.has_unfinished_requests():
        ours.step()
        assert_agreement(ours)
    assert {len(end.token_ids) for end in ours.ended.values()} == {40}


def test_requests_that_wait_for_a_grammar_get_their_turn(ours):
    from vllm.sampling_params import StructuredOutputsParams

    for at in range(3):
        ours.ask(
            f"r{at}",
            20,
            6,
            slo(total_ms=600_000),
            structured_outputs=StructuredOutputsParams(choice=["w7", "w9"]),
            detokenize=True,
            ignore_eos=False,
        )
        ours.ask(f"plain{at}", 20, 6, slo(total_ms=600_000))
    ours.run(most=20_000)
    assert {ours.ended[f"r{at}"].text.strip() for at in range(3)} <= {"w7", "w9"}
    assert all(len(ours.ended[f"plain{at}"].token_ids) == 6 for at in range(3))


def test_a_paused_engine_goes_on_later(ours):
    from vllm.v1.core.sched.interface import PauseState

    for at in range(12):
        ours.ask(f"r{at}", 40, 30, slo(total_ms=600_000))
    for _ in range(8):
        ours.step()
    waiting = len(ours.scheduler.waiting)
    assert waiting
    ours.scheduler.set_pause_state(PauseState.PAUSED_NEW)
    for _ in range(60):
        ours.step()
    assert len(ours.scheduler.waiting) == waiting and len(ours.ended) == 12 - waiting
    ours.scheduler.set_pause_state(PauseState.UNPAUSED)
    ours.run()
    assert {len(end.token_ids) for end in ours.ended.values()} == {30}


@pytest.mark.parametrize("policy", ["Wrong", "Broken"])
def test_a_policy_that_errs_does_not_stop_the_engine(engines, policy):
    rig = engines(OURS, additional_config={"neustream": {"policy": f"odd_policies:{policy}"}})
    for at in range(4):
        rig.ask(f"r{at}", 40, 10, slo(total_ms=600_000))
    rig.run()
    assert {len(end.token_ids) for end in rig.ended.values()} == {10}
    assert rig.scheduler.stats.errors > 5
    rig.assert_empty()


def test_after_a_policys_error_policies_see_what_there_is(engines):
    rig = engines(OURS, additional_config={"neustream": {"policy": "odd_policies:Moody"}})
    for at in range(4):
        rig.ask(f"r{at}", 200, 20, slo(total_ms=600_000))
    while rig.engine.has_unfinished_requests():
        rig.step()
        assert_agreement(rig)
    assert {len(end.token_ids) for end in rig.ended.values()} == {20}
    assert 3 < rig.scheduler.stats.errors < rig.steps - 3
    rig.assert_empty()


def test_an_exception_in_vllms_own_scheduling_leaves_everything_in_place(ours, monkeypatch):
    from vllm.v1.core.sched.scheduler import Scheduler

    for at in range(12):
        ours.ask(f"r{at}", 40, 10, slo(total_ms=600_000))
    ours.step()
    order = [r.request_id for r in ours.scheduler.waiting]

    def broken(self, *args, **kwargs):
        raise RuntimeError("not today")

    with monkeypatch.context() as patch:
        patch.setattr(Scheduler, "schedule", broken)
        with pytest.raises(RuntimeError, match="not today"):
            ours.step()
    assert [r.request_id for r in ours.scheduler.waiting] == order != []
    ours.run()
    assert {len(end.token_ids) for end in ours.ended.values()} == {10}


def test_a_policy_that_waits_is_asked_again(engines):
    rig = engines(OURS, additional_config={"neustream": {"policy": "odd_policies:Patient"}})
    for at in range(4):
        rig.ask(f"r{at}", 40, 3, slo(total_ms=600_000))
    rig.run(most=2_000_000)
    assert {len(end.token_ids) for end in rig.ended.values()} == {3}
    assert rig.scheduler.stats.errors == 0 and rig.steps > 8
    rig.assert_empty()


@pytest.mark.parametrize("blocks", [200, 18], ids=["room for all", "short of KV blocks"])
def test_decodes_that_are_not_chosen_wait(engines, blocks):
    """A policy that runs one request at a time: the others keep their place, and their blocks while
    there are enough."""
    more = {"num_gpu_blocks_override": blocks}
    rig = engines(OURS, additional_config={"neustream": {"policy": "odd_policies:One"}}, **more)
    stock = engines(**more)
    for some, extra in ((stock, None), (rig, slo(total_ms=600_000))):
        for at in range(6):
            some.ask(f"r{at}", 100, 40, extra)
        some.run()
    tokens = {id: end.token_ids for id, end in stock.ended.items()}
    assert {id: end.token_ids for id, end in rig.ended.items()} == tokens
    if blocks == 200:
        assert rig.steps >= 6 * 40 and not rig.scheduler.stats.preempted
    else:
        assert rig.scheduler.stats.preempted
    rig.assert_empty()
