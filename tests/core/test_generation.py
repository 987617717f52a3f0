"""Language models in the core: memory, recomputation, lengths."""

from __future__ import annotations

import numpy as np
import pytest
from generations import CHAT, STEPS, ask, scheduler_of, step
from hand import Hand, free_blocks, ids, seen

from neustream import (
    POLICIES,
    SLO,
    Graph,
    GraphError,
    Pool,
    Request,
    RequestError,
    Scheduler,
    call,
    seq,
)
from neustream.core.events import Emitted
from neustream.core.kv_cache import KVCache
from neustream.core.lengths import BIN, SEEN, Lengths
from neustream.core.work import alone_s
from neustream.graphs import llm, llm_profiles

# -- the graph --------------------------------------------------------------------------------------


def test_a_generation_walks_from_prefill_to_its_end():
    scheduler = scheduler_of()
    job = scheduler.submit(ask("a", 20, 3), 0.0)
    assert (job.stage.name, job.size, job.calls_left) == ("llm.prefill", 20, {"llm.prefill": 1, "llm.decode": 2})
    sizes = []
    for now in (1.0, 2.0, 3.0):
        batch = step(scheduler, now, {"a"})
        sizes.append((batch.stage, batch.sizes))
    assert sizes == [("llm.prefill", (20,)), ("llm.decode", (21,)), ("llm.decode", (22,))]
    assert job.status == "done" and job.outputs == 3


def test_the_first_token_may_be_the_last():
    scheduler = scheduler_of()
    jobs = [scheduler.submit(ask("eos", 5, 10), 0.0), scheduler.submit(ask("one", 5, 1), 0.0)]
    step(scheduler, 1.0, {"eos", "one"}, ended={"eos"})
    assert [job.status for job in jobs] == ["done", "done"]


def test_work_of_a_decode_follows_its_growing_context():
    scheduler = scheduler_of()
    job = scheduler.submit(ask("a", 100, 50), 0.0)
    assert job.remaining_s == pytest.approx(alone_s(CHAT, job.params, scheduler.times.profiles))
    for now in range(1, 11):
        step(scheduler, float(now), {"a"})
    unit = scheduler.times.profiles["llm.decode"].latency(1, 110)
    assert (
        job.unit_s == unit and job.remaining_s == pytest.approx(40 * unit) and job.next_output_s == pytest.approx(unit)
    )


def test_token_deadlines_are_cumulative():
    scheduler = scheduler_of()
    slo = SLO(first=1.0, step=0.5)
    scheduler.submit(ask("a", 5, 4, slo), 0.0)
    for now in (0.2, 1.4, 1.9, 2.6):  # due: 1.0, 1.5, 2.0, 2.5
        step(scheduler, now, {"a"})
    emitted = [event for event in scheduler.pop_events() if isinstance(event, Emitted)]
    assert [event.late for event in emitted] == [False, False, False, True]


# -- KV cache --------------------------------------------------------------------------------------


def test_blocks_are_held_as_long_as_tokens_are_kept():
    scheduler = scheduler_of(blocks=8)
    job = scheduler.submit(ask("a", 30, 4), 0.0)
    assert job.num_blocks == 0
    step(scheduler, 1.0, {"a"}, {job: 10})
    assert (job.computed, job.num_blocks) == (10, 1)
    step(scheduler, 2.0, {"a"})
    assert (job.call_outputs, job.num_blocks) == (1, 2)
    for now in (3.0, 4.0, 5.0):  # contexts 31, 32, 33
        step(scheduler, now, {"a"})
    assert job.status == "done" and free_blocks(scheduler) == 8


def test_the_least_important_holder_is_preempted_and_goes_back_to_its_prefill():
    scheduler = scheduler_of(blocks=4)
    first, second = (scheduler.submit(ask(name, 31, 40), 0.0) for name in "ab")
    step(scheduler, 1.0, {"a", "b"})
    step(scheduler, 2.0, {"a", "b"})  # context 32: two blocks each, none free
    batch = step(scheduler, 3.0, {"a", "b"})
    assert ids(batch.jobs) == ["a"] and ids(batch.preempted) == ["b"]
    assert (first.num_blocks, second.num_blocks, second.stage.name) == (3, 0, "llm.prefill")
    assert (second.size, second.call_outputs, second.outputs) == (33, 2, 2)  # its prompt and what it wrote
    batch = step(scheduler, 4.0, {"a", "b"})
    assert ids(batch.jobs) == ["a"] and not batch.preempted  # who holds nothing takes nothing


def test_a_request_larger_than_the_cache_is_refused_or_fails_with_the_numbers():
    scheduler = scheduler_of(POLICIES["fcfs"](drop_hopeless=False), blocks=2)
    with pytest.raises(
        RequestError, match=r"'a': stage 'llm.prefill' needs KV cache for 40 tokens .* 32 \(2 blocks of"
    ):
        scheduler.submit(ask("a", 40), 0.0)
    assert not scheduler.jobs
    job = scheduler.submit(ask("b", 30, 10), 0.0)
    now = 0.0
    while scheduler.jobs:
        batch = scheduler.next_batch("gpu", now)
        now += 1
        if batch is not None:
            scheduler.finish(batch, [{} for _ in batch.jobs], now)
    assert job.status == "failed" and "needs KV cache for 33 tokens" in job.reason and job.outputs == 3


@pytest.mark.parametrize(("blocks", "block"), [(0, 16), (4, 0), (True, 16), (2.5, 16)])
def test_a_kv_cache_of_no_size_is_an_error(blocks, block):
    with pytest.raises(GraphError, match="whole number of 1 or more"):
        KVCache(blocks, block)


# -- lengths ----------------------------------------------------------------------------------------


def test_the_least_outputs_are_no_more_than_any_end_was_seen_behind():
    lengths = Lengths()
    for end in (3, 5, 12, 20):
        for outputs in range(1, end + 1):
            lengths.reached(outputs)
        lengths.ended(end, 1000)
    assert lengths.least(0, 0.02) == 0.0, "few were seen"
    for _ in range(SEEN):
        for outputs in range(1, 31):
            lengths.reached(outputs)
        lengths.ended(30, 1000)
    assert lengths.far == 24
    assert lengths.least(0, 0.02) == 0.0, "some ended with their third output"
    assert lengths.least(0, 0.5) == 24.0 and lengths.within(0, [0.02, 0.5]) == [8.0, 32.0], "they end in that bin"
    assert lengths.each_least(np.array([0, 8, 20]), 0.5).tolist() == [24.0, 16.0, 4.0]


def test_lengths_learn_the_share_that_goes_on_and_do_not_forget_who_was_given_up():
    lengths = Lengths()
    assert (lengths.survival() == 1).all()  # nothing seen: all go on
    draw = np.random.default_rng(0)
    for at in range(2000):
        end = int(draw.integers(1, 161))
        cut = 40 if at % 2 else 1000  # half of them are given up at 40
        for outputs in range(1, min(end, cut) + 1):
            lengths.reached(outputs)
        if end <= cut:
            lengths.ended(end, 1000)
    for outputs in (40, 80, 120):
        assert lengths.survival()[outputs // BIN] == pytest.approx(1 - outputs / 160, abs=0.05)
    ahead = lengths.ahead(np.array([0.0, 80.0]), np.array([0.0, 40.0]))
    assert ahead[:, 0] == pytest.approx([1.0, 1.0])
    assert ahead[0, 1] == pytest.approx(0.75, abs=0.05) and ahead[1, 1] == pytest.approx(0.5, abs=0.08)


@pytest.mark.parametrize(
    ("most", "outputs", "ended", "counts"),
    [
        (4, 1, True, (1, 0)),
        (4, 2, True, (1, 0)),
        (4, 4, False, (0, 1)),
        (1, 1, False, (0, 1)),
    ],
)
def test_a_generation_ended_of_itself_or_filled_its_maximum_whichever_step_it_ends_in(most, outputs, ended, counts):
    scheduler = scheduler_of()
    scheduler.submit(ask("a", 20, most), 0.0)
    for made in range(1, outputs + 1):
        step(scheduler, float(made), ["a"], ended=["a"] if ended and made == outputs else [])
    assert not scheduler.jobs
    lengths = scheduler.recent.lengths_of("llm")
    assert (lengths.ends, lengths.filled) == counts


def test_each_call_of_one_model_is_counted_by_its_own_maximum():
    model = llm("llm", max_batch=8)
    graph = Graph("agent", seq(call(model, "one"), call(model, "two")))
    scheduler = scheduler_of()
    scheduler.submit(Request("a", graph, 0.0, SLO(), {"prompt_tokens": 20, "max_tokens": 2}), 0.0)
    for now in (1.0, 2.0):  # the first call fills its maximum
        step(scheduler, now, ["a"])
    lengths = scheduler.recent.lengths_of("llm")
    assert (lengths.ends, lengths.filled) == (0, 1)
    step(scheduler, 3.0, ["a"], ended=["a"])
    assert (lengths.ends, lengths.filled) == (1, 1) and not scheduler.jobs


def taught(scheduler, model, outputs, times=SEEN):
    """So many generations came as far; their lengths."""
    lengths = scheduler.recent.lengths_of(model)
    for _ in range(times):
        for output in range(1, outputs + 1):
            lengths.reached(output)
    return lengths


def test_a_total_is_given_up_for_outputs_that_all_were_seen_to_make_but_for_no_others():
    """As far as `SEEN` came without an end, others come too; a maximum alone is no reason."""

    def given_up(came_to, most, times=SEEN, end=None):
        scheduler = scheduler_of()
        scheduler.submit(ask("a", 20, most, SLO(total=0.6)), 0.0)
        lengths = taught(scheduler, "llm", came_to, times)
        if end is not None:
            lengths.ended(end, most)
        return ids(seen(scheduler).hopeless())

    assert given_up(100, 100) == ["a"]  # 100 take 1 s
    assert not given_up(100, 100, times=SEEN - 1)
    assert not given_up(100, 100, end=16)  # one of eight
    assert not given_up(40, 1000)  # nobody came further
    assert not given_up(100, 40)


def test_outputs_of_a_later_call_count_too():
    graph = Graph("agent", seq(call(llm("a", max_batch=8), "one"), call(llm("b", max_batch=8), "two")))
    pools = [Pool(name, (f"{name}.prefill", f"{name}.decode")) for name in "ab"]
    scheduler = Scheduler(pools, Hand(), {**llm_profiles("a", STEPS, 8), **llm_profiles("b", STEPS, 8)})
    params = {"prompt_tokens": 20, "max_tokens": 100}
    scheduler.submit(Request("r", graph, 0.0, SLO(total=1.6), params), 0.0)
    taught(scheduler, "a", 100)
    assert not seen(scheduler, pool="a").hopeless()
    taught(scheduler, "b", 100)
    assert ids(seen(scheduler, pool="a").hopeless()) == ["r"]
