"""What may be promised and asked, and when a job's deadlines fall."""

from __future__ import annotations

import math

import pytest

from neustream import FCFS, SLO, Graph, Job, LinearProfile, Pool, Request, RequestError, Scheduler, Stage, loop, seq

TEXT, UNET = Stage("text"), Stage("unet", max_batch=4)
IMAGE = Graph("image", seq(TEXT, loop(UNET, times=3)))


def request(arrival=0.0, **slo):
    return Request("r1", IMAGE, arrival, SLO(**slo))


def test_an_slo_promises_nothing_unless_told():
    slo = SLO()
    assert (slo.total, slo.first, slo.step, slo.weight, slo.name) == (math.inf, math.inf, math.inf, 1.0, "")


@pytest.mark.parametrize("what", ["total", "first", "step", "weight"])
@pytest.mark.parametrize("value", [0, 0.0, -1.0, math.nan, -math.inf])
def test_what_an_slo_promises_is_greater_than_0(what, value):
    with pytest.raises(RequestError, match=f"SLO: {what} must be greater than 0, got {value!r}"):
        SLO(**{what: value})


def test_a_promise_per_step_needs_one_for_the_first():
    with pytest.raises(RequestError, match=r"SLO: step=0.1 needs first"):
        SLO(step=0.1)
    assert SLO(first=1.0, step=0.1).step == 0.1


def test_a_weight_is_finite():
    with pytest.raises(RequestError, match="weight must be finite"):
        SLO(weight=math.inf)


@pytest.mark.parametrize("arrival", [-0.5, math.nan, math.inf, -math.inf])
def test_an_arrival_is_an_instant_from_0_on(arrival):
    with pytest.raises(RequestError, match="request 'r1': arrival must be a finite time >= 0, got"):
        request(arrival)


def test_deadlines_count_from_the_arrival():
    job = Job(request(10.0, total=5.0))
    assert (job.due, job.due_next) == (15.0, 15.0)
    job = Job(request(10.0, total=5.0, first=2.0))
    assert (job.due, job.due_next) == (15.0, 12.0)
    job = Job(request(10.0, total=5.0, first=7.0))
    assert (job.due, job.due_next) == (15.0, 15.0)
    job = Job(request(10.0))
    assert (job.due, job.due_next) == (math.inf, math.inf)


def test_slack_is_the_tighter_of_the_end_and_the_next_output():
    job = Job(request(10.0, total=9.0, first=4.0))
    job.remaining_s, job.next_output_s = 3.0, 1.0
    assert job.slack(10.0) == 3.0  # first output: 14 - 1 - 10; end: 19 - 3 - 10 = 6
    job.remaining_s = 7.0
    assert job.slack(10.0) == 2.0  # end: 19 - 7 - 10
    assert job.slack(13.0) == -1.0
    assert Job(request()).slack(1e9) == math.inf


def test_the_next_output_is_due_a_step_after_the_one_before_was():
    emits = Stage("decode", emits=True)
    chat = Graph("chat", loop(emits, times=4))
    profiles = {"decode": LinearProfile("decode", base=0.5, max_batch=1)}
    scheduler = Scheduler([Pool("gpu", ("decode",))], FCFS(), profiles)
    job = scheduler.submit(Request("r1", chat, 1.0, SLO(total=6.0, first=2.0, step=1.5)), 1.0)
    due, now = [], 1.0
    while job.status == "waiting":
        due.append(job.due_next)
        batch = scheduler.next_batch("gpu", now)
        now += 0.5  # each token is early, which moves no deadline
        scheduler.finish(batch, [{}], now)
    assert due == [3.0, 4.5, 6.0, 7.0]  # the last one is bounded by the end
    assert job.on_time


def test_a_job_is_on_time_only_once_it_is_done():
    job = Job(request(total=5.0))
    assert (job.status, job.late, job.on_time) == ("waiting", False, False)
    assert repr(job) == "Job('r1', waiting, None)"


def test_a_job_without_a_stage_has_no_size():
    assert Job(request()).size == 0.0
