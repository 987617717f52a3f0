"""What policies see of vLLM's requests; requests and loop are small fakes, so no vLLM is needed."""

from __future__ import annotations

import random
import time

import pytest
from fake_vllm import FakeRequest, FakeVllm, builder

from neustream.core.policies import POLICIES
from neustream.core.types import SLO

PROMISE = SLO(first=1.0, step=0.1)


@pytest.fixture
def views():
    return builder()


def seen(views, *requests, now=100.0, slos=None, free=50):
    """The view of these requests."""
    return views.build({r.request_id: r for r in requests}, slos or {}, free, now)


def only(view):
    (job,) = view.jobs
    return job


def running(id, prompt=20, outputs=0, **more):
    """A request whose prompt is computed, and whose latest output is not yet."""
    given = {"status": "running", "num_computed_tokens": prompt + max(outputs - 1, 0), "num_output_tokens": outputs}
    return FakeRequest(id, prompt, **(given | more))


# -- how far a request is ---------------------------------------------------------------------------


def test_a_request_that_just_came_is_a_prefill(views):
    job = only(seen(views, FakeRequest("a", 20, 10)))
    assert (job.stage.name, job.size, job.computed, job.num_blocks, job.call_outputs) == ("llm.prefill", 20, 0, 0, 0)
    assert job.calls_left == {"llm.prefill": 1, "llm.decode": 9}


def test_a_prompt_in_parts_is_as_far_as_vllm_says(views):
    request = FakeRequest("a", 40)
    seen(views, request)
    request.status, request.num_computed_tokens = "running", 17
    job = only(seen(views, request))
    assert (job.stage.name, job.size, job.computed, job.num_blocks) == ("llm.prefill", 23, 17, 2)


def test_a_generation_reads_its_context_and_holds_the_blocks_of_what_is_computed(views):
    job = only(seen(views, running("a", prompt=16, outputs=3)))
    assert (job.stage.name, job.size, job.computed, job.num_blocks, job.call_outputs) == ("llm.decode", 19, 0, 2, 3)
    assert job.calls_left == {"llm.decode": 7}
    assert job.kept == 18


def test_outputs_in_flight_count_as_there(views):
    request = running("a", outputs=2, num_output_placeholders=1, num_computed_tokens=22)
    job = only(seen(views, request, slos={"a": PROMISE}))
    assert (job.stage.name, job.call_outputs, job.size) == ("llm.decode", 3, 23)
    assert job.due_next == pytest.approx(job.arrival + 1.0 + 3 * 0.1)


def test_a_preempted_request_computes_again_all_that_it_has(views):
    request = running("a", outputs=3)
    assert only(seen(views, request)).stage.name == "llm.decode"
    request.status, request.num_computed_tokens = "preempted", 0
    job = only(seen(views, request))
    assert (job.stage.name, job.size, job.num_blocks, job.call_outputs) == ("llm.prefill", 23, 0, 3)
    assert job.calls_left == {"llm.prefill": 1, "llm.decode": 6}


@pytest.mark.parametrize("prompt, most", [(20, 4), (4092, 900)], ids=["its own", "the model's"])
def test_a_request_that_ends_with_what_is_in_flight_is_not_seen(views, prompt, most):
    """4096 tokens are all that the model takes."""
    request = running("a", prompt, outputs=3, max_tokens=most)
    assert only(seen(views, request)).calls_left == {"llm.decode": 1}
    request.num_output_placeholders, request.num_computed_tokens = 1, prompt + 3
    assert seen(views, request).queues == {}


def test_who_is_not_runnable_is_not_seen(views):
    drains = FakeRequest("drains", status="preempted", num_stale_output_tokens=1)
    dropped = FakeRequest("dropped", status="preempted", num_stale_output_tokens=1, drop_stale_output=True)
    view = seen(views, drains, dropped, FakeRequest("grammar", status="waiting for its grammar"))
    assert [job.id for job in view.jobs] == ["dropped"]


def test_what_vllm_changes_is_seen_the_next_time_whatever_it_was(views):
    """Nothing of it is kept: a request may jump to and fro."""
    request = FakeRequest("a", 40)
    dice = random.Random(1)
    for _ in range(200):
        request.num_prompt_tokens, request.num_output_tokens = dice.randint(1, 60), dice.randint(0, 8)
        request.num_output_placeholders = dice.randint(0, 1)
        request.num_computed_tokens = dice.randint(0, request.total - 1)
        job = only(seen(views, request))
        assert job.params["prompt_tokens"] + job.call_outputs == job.whole == request.total
        decodes = request.total > request.num_prompt_tokens and request.num_computed_tokens == request.total - 1
        assert (job.stage.name == "llm.decode") == decodes
        assert decodes or job.computed == request.num_computed_tokens


# -- what is kept by request ------------------------------------------------------------------------


def test_arrivals_are_told_by_age(views):
    request = FakeRequest("a", arrival_time=time.time() - 3.0)
    future = FakeRequest("b", arrival_time=time.time() + 1e6)
    view = seen(views, request, future, slos={"a": PROMISE})
    a, b = view.jobs
    assert a.arrival == pytest.approx(97.0, abs=0.5) and b.arrival == 100.0
    assert a.promised and a.due_next == pytest.approx(a.arrival + 1.0) and not b.promised


def test_late_outputs_are_told_by_when_vllm_reports_them(views):
    a, b = running("a", outputs=0, num_computed_tokens=0), running("b", outputs=0, num_computed_tokens=0)
    requests = {"a": a, "b": b}
    view = views.build(requests, dict.fromkeys(requests, PROMISE), 50, 100.0)
    jobs = {job.id: job for job in view.jobs}
    views.scheduled({"a": 20, "b": 20}, 100.0)
    a.num_output_tokens = b.num_output_tokens = 1
    views.landed(["a"], requests, 100.5)
    views.landed(["b"], requests, 101.5)
    assert not jobs["a"].late and jobs["a"].first_at == 100.5 and jobs["b"].late


def test_requests_that_came_in_the_middle_are_not_late_for_what_was_before(views):
    request = running("a", outputs=5, arrival_time=time.time() - 50.0)
    job = only(seen(views, request, slos={"a": SLO(first=1.0, step=10.0)}))
    views.landed(["a"], {"a": request}, 100.0)
    assert not job.late and job.due_next == pytest.approx(job.arrival + 51.0)


def test_skipped_counts_the_steps_of_a_stage_that_ran_without_it(views):
    a, b, c = running("a", outputs=1), running("b", outputs=1), FakeRequest("c")
    jobs = {job.id: job for job in seen(views, a, b, c).jobs}
    for ids in ("a", "ab", "a", "c"):
        views.scheduled(dict.fromkeys(ids, 1), 100.0)
    assert [jobs[id].skipped for id in "abc"] == [0, 2, 0]
    assert [jobs[id].ran_last for id in "abc"] == [True, False, True]
    assert jobs["a"].started_at == 100.0


def test_queues_are_in_the_order_of_coming_to_a_stage(views):
    requests = [FakeRequest(id) for id in "abc"]
    assert [job.id for job in seen(views, *requests).queues["llm.prefill"]] == ["a", "b", "c"]
    views.scheduled({"c": 20, "a": 20}, 100.0)  # in this order
    for request in (requests[0], requests[2]):
        request.status, request.num_computed_tokens, request.num_output_tokens = "running", 20, 1
    view = seen(views, *requests, now=101.0)
    assert [job.id for job in view.queues["llm.decode"]] == ["c", "a"]
    assert [job.joined_at for job in view.jobs] == [100.0, 101.0, 101.0]


def test_a_session_that_goes_on_counts_from_its_new_arrival(views):
    request = running("a", outputs=4, arrival_time=time.time() - 50.0)
    before = only(seen(views, request, slos={"a": PROMISE}))
    request.arrival_time, request.num_prompt_tokens, request.num_output_tokens = time.time(), 40, 0
    job = only(seen(views, request, slos={"a": PROMISE}, now=101.0))
    assert job.arrival > before.arrival + 40 and (job.size, job.call_outputs) == (17, 0)


def test_an_id_may_come_again(views):
    first = seen(views, running("a", outputs=4))
    again = seen(views, FakeRequest("a"))
    assert only(first) is not only(again) and only(again).size == 20


def test_ended_requests_are_forgotten_and_teach_how_long_generations_get(views):
    short, long = running("short", outputs=7, max_tokens=99), running("long", outputs=9)
    requests = {"short": short, "long": long}
    view = views.build(requests, {}, 50, 100.0)
    short.num_output_tokens, long.num_output_tokens = 8, 10
    views.landed(requests, {}, 101.0)
    assert not views.jobs
    assert view.lengths["llm"].ends == 1  # the other one came to its maximum


def test_what_those_without_a_promise_get_is_counted_while_they_are_there(views):
    a, b = running("a", outputs=1), running("b", outputs=1)
    requests, slos = {"a": a, "b": b}, {"a": PROMISE}
    views.build(requests, slos, 50, 100.0)
    views.ran(0.02, 0.04, views.scheduled({"a": 1, "b": 1}, 100.0))
    assert views.build(requests, slos, 50, 101.0).unpromised == pytest.approx((0.04, 0.02))
    views.forget("b")
    assert views.build({"a": a}, slos, 50, 102.0).unpromised == (0.0, 0.0)


# -- in a loop --------------------------------------------------------------------------------------


def agree(loop):
    """A view has each request as the loop has it."""
    for job in loop.views.build(loop.requests, loop.slos, loop.free, loop.now).jobs:
        request = loop.requests[job.id]
        lacks = request.total - request.num_computed_tokens
        assert job.whole == request.total and lacks == (1 if job.stage.phase == "decode" else job.size)


@pytest.mark.parametrize("blocks", [400, 60, 22])
@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("policy", ["priced", "neustream_llm", "fcfs", "edf", "sarathi"])
def test_every_request_gets_all_its_tokens_and_ends_once(policy, depth, blocks):
    """Under any policy, with steps in flight, and with too few blocks for all."""
    loop, dice = FakeVllm(POLICIES[policy](), blocks=blocks, depth=depth), random.Random(3)
    asked = [FakeRequest(f"r{at}", dice.randint(1, 200), dice.randint(1, 60), dice.randint(1, 80)) for at in range(40)]
    coming, turns = list(asked), 0
    while coming or loop.requests or loop.in_flight:
        if coming and turns % 3 == 0:
            slo = SLO(total=dice.choice([5.0, 1e6])) if dice.random() < 0.7 else None
            loop.add(coming.pop(0), slo)
        loop.turn()
        agree(loop)
        turns += 1
        assert turns < 20_000
        if not (coming or loop.requests):
            while loop.in_flight:
                loop.land(*loop.in_flight.popleft())
    assert set(loop.ended) | set(loop.dropped) == {request.request_id for request in asked}
    assert not set(loop.ended) & set(loop.dropped) and loop.ended
    assert all(request.num_output_tokens == request.last for request in loop.ended.values())
    assert loop.free == blocks and not loop.running and not loop.waiting and not loop.views.jobs
