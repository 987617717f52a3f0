"""What policies choose for language models."""

from __future__ import annotations

import pytest
from generations import STAGES, STEPS, ask, scheduler_of, step
from hand import Hand, free_blocks, ids, seen, set_policy

from neustream import (
    POLICIES,
    SLO,
    Decision,
    Graph,
    GraphError,
    Pool,
    Request,
    Scheduler,
    loop,
)
from neustream.core.events import Emitted
from neustream.core.kv_cache import KVCache
from neustream.core.learnt_steps import LearntSteps
from neustream.core.policies.token_deadlines import TokenDeadlines
from neustream.core.steps import Step
from neustream.graphs import llm, llm_profiles

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
        scheduler.recent.lengths_of("llm").ended(300, 500)
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
