"""Language models in the core: memory, recomputation, lengths, step latencies, and the policies' choices."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hand import Hand, free_blocks, ids, seen, set_policy

from neustream import (
    POLICIES,
    SLO,
    Decision,
    Graph,
    GraphError,
    LinearProfile,
    Pool,
    ProfileError,
    Request,
    RequestError,
    Scheduler,
    call,
    loop,
    seq,
)
from neustream.core.events import Emitted
from neustream.core.kv_cache import KVCache
from neustream.core.lengths import BIN, SEEN, Lengths
from neustream.core.policies.token_deadlines import TokenDeadlines
from neustream.core.steps import DecodeGrid, LearntSteps, PhaseProfile, PrefillTable, Step, StepProfile
from neustream.core.work import alone_s
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
        lengths.ended(end)
    assert lengths.least(0, 0.02) == 0.0, "few were seen"
    for _ in range(SEEN):
        for outputs in range(1, 31):
            lengths.reached(outputs)
        lengths.ended(30)
    assert lengths.far == 24
    assert lengths.least(0, 0.02) == 0.0, "some ended with their third output"
    assert lengths.least(0, 0.5) == 24.0 and lengths.within(0, 0.5) == 32.0, "they end in that bin"
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
            lengths.ended(end)
    for outputs in (40, 80, 120):
        assert lengths.survival()[outputs // BIN] == pytest.approx(1 - outputs / 160, abs=0.05)
    ahead = lengths.ahead(np.array([0.0, 80.0]), np.array([0.0, 40.0]))
    assert ahead[:, 0] == pytest.approx([1.0, 1.0])
    assert ahead[0, 1] == pytest.approx(0.75, abs=0.05) and ahead[1, 1] == pytest.approx(0.5, abs=0.08)


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
            lengths.ended(end)
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


# -- latencies --------------------------------------------------------------------------------------


def test_a_prefill_table_has_a_floor_interpolates_and_goes_on_with_its_fit():
    table = PrefillTable("p", [10, 20], [0.1, 0.3], (0.0, 0.02, 1e-3))
    assert table.latency(1, 1, 1) == 0.1
    assert table.latency(1, 15, 225) == pytest.approx(0.2)
    assert table.latency(1, 30, 900) == pytest.approx(0.3 + 0.2 + 0.5)


def test_a_decode_grid_is_bilinear_inside_and_linear_outside():
    grid = DecodeGrid("d", [1, 3], [10, 30], [[1.0, 2.0], [3.0, 6.0]], (0.0, 0.5, 0.01))
    assert grid.latency(1, 10) == 1.0
    assert grid.latency(2, 40) == pytest.approx(3.0)
    assert grid.latency(5, 150) == pytest.approx(6.0 + 0.5 * 2 + 0.01 * 60)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PrefillTable("p", [2, 1], [1.0, 2.0], (0, 0, 0)), "tokens must rise"),
        (lambda: PrefillTable("p", [1], [-1.0], (0, 0, 0)), "greater than 0"),
        (lambda: PrefillTable("p", [], [], (0, 0, 0)), "not empty"),
        (lambda: DecodeGrid("d", [1, 2], [1], [[1.0]], (0, 0, 0)), "2 rows"),
        (lambda: DecodeGrid("d", [1], [1], [[math.nan]], (0, 0, 0)), "finite"),
        (lambda: LearntSteps(None, guess_s=0), "guess_s"),
    ],
)
def test_malformed_latencies_are_errors(make, message):
    with pytest.raises(ProfileError, match=message):
        make()


def test_a_mixed_step_is_dearer_than_either_part_and_cheaper_than_both():
    parts = STEPS.seconds(Step(1, 200, 4e4)), STEPS.seconds(Step(decodes=4, context=400))
    mixed = STEPS.seconds(Step(1, 200, 4e4, 4, 400))
    assert max(parts) < mixed < sum(parts)
    apart = StepProfile("llm", STEPS.prefill, STEPS.decode, mixed=1.5, sequential=True)
    assert apart.seconds(Step(1, 200, 4e4, 4, 400)) == pytest.approx(1.5 * sum(parts))


def truth(step):
    return 0.005 + 1e-4 * step.tokens + (0.002 if step.prefills else 0) + 3e-4 * step.decodes + 1e-6 * step.context


def random_step(draw):
    prompts, decodes = draw.integers(0, 3), draw.integers(0, 9)
    tokens = float(draw.integers(1, 300) * prompts)
    return Step(int(prompts), tokens, tokens**2, int(decodes), float(decodes * draw.integers(10, 400)))


@pytest.mark.parametrize("base", [None, STEPS])
def test_steps_are_learnt_from_nothing_and_from_a_wrong_profile(base):
    draw = np.random.default_rng(0)
    learnt = LearntSteps(base, guess_s=0.5)
    assert learnt.learns and learnt.error == 0.0
    for _ in range(400):
        some = random_step(draw)
        if some.prefills or some.decodes:
            learnt.observe(some, truth(some) * float(draw.lognormal(0, 0.02)))
    errors = [abs(learnt.seconds(some) / truth(some) - 1) for some in (random_step(draw) for _ in range(100))]
    assert float(np.median(errors)) < 0.08 and learnt.error < 0.08


def test_a_stall_does_not_spoil_what_was_learnt():
    learnt = LearntSteps()
    for _ in range(64):
        learnt.observe(Step(decodes=4, context=400), 0.01)
    learnt.observe(Step(decodes=4, context=400), 10.0)
    for _ in range(16):
        learnt.observe(Step(decodes=4, context=400), 0.01)
    assert learnt.seconds(Step(decodes=4, context=400)) < 0.013


def test_the_scheduler_teaches_the_profile_that_learns():
    learnt = LearntSteps()
    scheduler = scheduler_of(Hand(lambda view: Decision(view.jobs)), steps=learnt)
    scheduler.submit(ask("a", 20, 40), 0.0)
    now = 0.0
    for _ in range(40):
        batch = scheduler.next_batch("gpu", now)
        now += 0.03
        scheduler.finish(batch, [{}], now)
    assert learnt.observed == 40
    assert PhaseProfile(learnt, "decode", max_batch=8).latency(1, 30) == pytest.approx(0.03, rel=0.1)


# -- policies ---------------------------------------------------------------------------------------


def decided(policy, requests, now=0.0, running=(), blocks=None, step_tokens=2048):
    """What `policy` decides on waiting `requests` while those of `running` decode: jobs and sizes, drops."""
    scheduler = scheduler_of(blocks=blocks, step_tokens=step_tokens)
    for request in running:
        scheduler.submit(request, request.arrival)
    if running:
        step(scheduler, now, {request.id for request in running})
    for request in requests:
        scheduler.submit(request, request.arrival)
    decision = policy.decide(seen(scheduler, now))
    sizes = {job.id: decision.sizes.get(job, job.size) for job in decision.jobs}
    return sizes, {job.id for job in decision.drop}


def test_fcfs_fills_a_step_with_decodes_and_then_parts_of_prompts():
    running, waiting = [ask("r", 50)], [ask("a", 30), ask("b", 100), ask("c", 5)]
    sizes, drop = decided(POLICIES["fcfs"](drop_hopeless=False), waiting, running=running, step_tokens=64)
    assert sizes == {"r": 51, "a": 30, "b": 33} and not drop


def test_fcfs_does_not_pass_a_prompt_that_has_no_memory():
    sizes, _ = decided(POLICIES["fcfs"](), [ask("big", 100), ask("small", 5)], blocks=7, running=[ask("r", 20)])
    assert sizes == {"r": 21}


def test_priority_prefills_by_deadline():
    waiting = [ask("late", 30, slo=SLO(first=9.0)), ask("soon", 30, slo=SLO(first=1.0))]
    sizes, _ = decided(POLICIES["priority"](), waiting, step_tokens=40)
    assert sizes == {"soon": 30, "late": 10}


def test_sarathi_keeps_the_pace_of_the_strictest_request():
    slo = SLO(first=10.0, step=0.03)
    sizes, _ = decided(POLICIES["sarathi"](), [ask("a", 900)], running=[ask("r", 50, slo=slo)])
    assert set(sizes) == {"r", "a"}
    own = STEPS.seconds(Step(1, sizes["a"], sizes["a"] ** 2, 1, 51))
    assert own <= 0.03 + 1e-9 < STEPS.seconds(Step(1, sizes["a"] + 3, 0, 1, 51))


def test_neustream_llm_prefills_only_what_leaves_the_running_their_next_token():
    tight = [ask("r", 50, slo=SLO(first=1.0, step=0.05))]
    waiting = [ask("long", 900, slo=SLO(first=9.0, step=1.0)), ask("short", 50, slo=SLO(first=9.0, step=1.0))]
    sizes, drop = decided(POLICIES["neustream_llm"](), waiting, running=tight, now=1.0)
    assert sizes == {"short": 50} and not drop
    sizes, _ = decided(POLICIES["neustream_llm"](), waiting[:1], running=tight, now=1.0)
    assert sizes == {"r": 51}
    late = [ask("late", 900, slo=SLO(first=0.05))]
    assert decided(POLICIES["neustream_llm"](), late, running=tight, now=1.0)[1] == {"late"}
    assert decided(POLICIES["neustream_llm"](), late)[1] == {"late"}  # also while nothing runs


def test_ours_lets_a_prompt_ride_if_nobody_gets_late_and_in_parts_if_not_at_once():
    policy = POLICIES["priced"]()
    loose = [ask("r", 50, slo=SLO(first=1.0, step=0.2))]
    sizes, _ = decided(policy, [ask("a", 900, slo=SLO(first=5.0, step=0.2))], running=loose, now=0.5)
    assert sizes == {"r": 51, "a": 900}
    tight = [ask("r", 50, slo=SLO(first=1.0, step=0.04))]
    sizes, _ = decided(policy, [ask("a", 900, slo=SLO(first=5.0, step=0.2))], running=tight, now=1.0)
    assert 0 < sizes["a"] < 900 and sizes["r"] == 51
    assert STEPS.seconds(Step(1, sizes["a"], sizes["a"] ** 2, 1, 51)) <= 0.04 + 1e-9


def test_ours_gives_up_who_cannot_be_in_time():
    waiting = [ask("late", 900, slo=SLO(first=0.05)), ask("fine", 50, slo=SLO(first=1.0, step=0.1))]
    sizes, drop = decided(POLICIES["priced"](), waiting)
    assert sizes == {"fine": 50} and drop == {"late"}


def test_ours_takes_those_along_who_are_late_until_others_need_the_room():
    late = ask("late", 50, slo=SLO(first=0.5, step=0.02))  # its first token came at 1.0
    fine = ask("fine", 50, slo=SLO(first=2.0, step=1.0))
    sizes, drop = decided(POLICIES["priced"](), [], running=[late, fine], now=1.0)
    assert set(sizes) == {"late", "fine"} and not drop
    need = ask("need", 85, slo=SLO(first=5.0, step=1.0), arrival=1.0)
    sizes, drop = decided(POLICIES["priced"](), [need], running=[late, fine], now=1.0, blocks=11)
    assert drop == {"late"}


def test_ours_serves_requests_that_were_promised_nothing():
    sizes, drop = decided(POLICIES["priced"](), [ask("a", 30), ask("b", 40)], running=[ask("r")])
    assert set(sizes) == {"r", "a", "b"} and not drop


def test_ours_pauses_only_where_nobody_could_wait_for_a_decode():
    running = [ask("r", 50, slo=SLO(first=1.0, step=0.5))]
    hurried = SLO(first=0.014, step=0.5)  # a prefill of 20 tokens takes 0.0119

    def decision(pause):
        scheduler = scheduler_of()
        for request in [*running, *(ask(f"g{at}", 20, 1, hurried) for at in range(4))]:
            scheduler.submit(request, 0.0)
        step(scheduler, 0.01, {"r", "g0", "g1", "g2", "g3"})
        return TokenDeadlines(pause=pause).decide(seen(scheduler, 0.01))

    assert decision(2.0).wake_at is not None and not decision(2.0).jobs
    assert ids(decision(0.0).jobs) == ["r"]


def test_ours_gives_up_whole_generations_that_usually_do_not_end_in_time():
    asked = [ask("hopeless", 20, 500, SLO(total=1.0)), ask("fine", 20, 50, SLO(total=1.0))]
    assert decided(POLICIES["priced"](), asked)[1] == set()  # nobody knows how long they get
    scheduler = scheduler_of()
    for _ in range(40):  # decodes of 10 ms
        for outputs in range(1, 301):
            scheduler.recent.lengths_of("llm").reached(outputs)
        scheduler.recent.lengths_of("llm").ended(300)
    for request in asked:
        scheduler.submit(request, 0.0)
    decision = POLICIES["priced"]().decide(seen(scheduler))
    assert ids(decision.jobs) == ["fine"] and ids(decision.drop) == ["hopeless"]


def test_a_device_that_changes_its_speed_is_followed_at_once():
    learnt = LearntSteps()
    step = Step(decodes=4, context=400)
    for _ in range(64):
        learnt.observe(step, 0.1)
    for _ in range(8):
        learnt.observe(step, 0.03)
    assert learnt.seconds(step) == pytest.approx(0.03, rel=0.3)


def test_steady_keeps_outputs_at_their_pace_from_the_first_one_on():
    """A first token at 0.5 of 2.0 s leaves 1.5 s of slack, which only the loose rule lets a long prompt take."""
    slo = SLO(first=2.0, step=0.03)
    long = ask("long", 900, slo=SLO(first=9.0, step=1.0))
    for steady, whole in ((False, True), (True, False)):
        sizes, _ = decided(
            POLICIES["priced"](tokens=TokenDeadlines(steady=steady)), [long], running=[ask("r", slo=slo)], now=0.5
        )
        assert (sizes["long"] == 900) is whole


def test_a_device_that_was_slow_for_a_while_is_tried_again():
    """Requests that look hopeless by what was learnt are not all given up: the device would stay unknown for ever."""
    learnt = LearntSteps(STEPS)
    slow = Step(decodes=1, context=50)
    for _ in range(40):
        learnt.observe(slow, 4 * STEPS.seconds(slow))
    scheduler = scheduler_of(POLICIES["priced"](), steps=learnt)
    slo, now, done = SLO(first=0.03, step=0.02), 0.0, []
    for at in range(12):
        job = scheduler.submit(ask(f"r{at}", 50, 8, slo, now), now)
        while scheduler.jobs:
            batch = scheduler.next_batch("gpu", now)
            if batch is not None:
                now += STEPS.seconds(Step(decodes=1, context=60) if batch.stage == "llm.decode" else Step(1, 50, 2500))
                scheduler.finish(batch, [{} for _ in batch.jobs], now)
            elif scheduler.jobs:
                now = scheduler.wake_at("gpu")
        done.append(job.on_time)
        now += 0.1
    assert all(done[3:])


def test_a_kv_cache_is_one_workers():
    with pytest.raises(GraphError, match="a KV cache is one worker's; 2 need a pool each"):
        Scheduler([Pool("gpu", STAGES, workers=2, kv_caches={"llm": KVCache(4)})], Hand(), llm_profiles("llm", STEPS))


def test_calls_of_an_agent_are_told_apart():
    """Two calls of one node: the second is not ended by the first one's end, and its tokens are its own."""
    node = llm("llm", max_batch=8)
    agent = Graph("agent", loop(node, times=2))
    scheduler = scheduler_of(Hand(lambda view: Decision(view.jobs)), blocks=8)
    job = scheduler.submit(Request("a", agent, 0.0, SLO(), {"prompt_tokens": 20, "max_tokens": 4}), 0.0)
    sizes = []
    for now in range(1, 9):
        batch = scheduler.next_batch("gpu", float(now))
        sizes.append(batch.sizes[0])
        scheduler.finish(batch, [{"ended": True} if now == 2 else {}], float(now))
        if job.status == "done":
            break
    assert sizes == [20, 21, 20, 21, 22, 23] and free_blocks(scheduler) == 8


@pytest.mark.parametrize("name", sorted(POLICIES))
def test_who_outgrew_the_cache_fails_and_the_others_go_on(name):
    """The last that holds blocks needs more than there are, while another waits for some."""
    scheduler = scheduler_of(POLICIES[name](), blocks=2)
    jobs = [scheduler.submit(ask("long", 31, 9), 0.0), scheduler.submit(ask("short", 1, 1), 0.0)]
    now = 0.0
    while scheduler.jobs:
        batch = scheduler.next_batch("gpu", now)
        now = now + 1.0 if batch is not None else scheduler.wake_at("gpu")
        if batch is not None:
            scheduler.finish(batch, [{} for _ in batch.jobs], now)
    assert [(job.status, job.outputs) for job in jobs] == [("failed", 2), ("done", 1)]


@pytest.mark.parametrize("name", sorted(POLICIES))
def test_waiting_for_blocks_that_others_keep_is_no_fault_of_the_policy(name):
    scheduler = scheduler_of(blocks=4)
    scheduler.submit(ask("a", 16, 3), 0.0)
    step(scheduler, 1.0, {"a"})
    ticket = scheduler.reserve("gpu", "llm", 48)  # all of the others
    assert free_blocks(scheduler) == 0
    set_policy(scheduler, POLICIES[name]())
    assert scheduler.next_batch("gpu", 2.0) is None
    scheduler.release(ticket)
    while scheduler.jobs:
        batch = scheduler.next_batch("gpu", 3.0)
        scheduler.finish(batch, [{}], 3.0)
    assert [event.index for event in scheduler.pop_events() if isinstance(event, Emitted)] == [0, 1, 2]


def test_waiting_for_the_blocks_of_a_held_request_is_no_fault_of_the_policy():
    scheduler = scheduler_of(POLICIES["fcfs"](), blocks=4)
    jobs = [scheduler.submit(ask(name, prompt, 3), 0.0) for name, prompt in (("a", 16), ("b", 40))]
    step(scheduler, 1.0, {"a", "b"})
    scheduler.hold("b", 1.0)
    assert scheduler.next_batch("gpu", 2.0) is None
    scheduler.cancel("b", 3.0)
    assert ids(scheduler.next_batch("gpu", 3.0).jobs) == ["a"] and jobs[1].num_blocks == 0
