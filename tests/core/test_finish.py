"""Requests that are to be served even if they are late."""

from __future__ import annotations

import math

import pytest
from hand import Hand, begin, set_policy
from toys import engine, table

from neustream import (
    FCFS,
    POLICIES,
    SLO,
    Decision,
    Graph,
    LinearProfile,
    Pool,
    Request,
    RequestError,
    Scheduler,
    Stage,
    loop,
    seq,
)
from neustream.core.events import Emitted, Ended
from neustream.core.policies import DEFAULT
from neustream.core.steps import StepProfile
from neustream.graphs import llm, llm_profiles

UNET = Stage("unet", max_batch=4)
IMAGE = Graph("image", seq(loop(UNET, times=5), Stage("vae", emits=True)))
PROFILES = {"unet": table("unet", 0.10, 0.16, 0.22, 0.28), "vae": table("vae", 0.02)}
CHAT = Graph("chat", llm("llm", max_batch=4))
STEPS = StepProfile("llm", LinearProfile("p", base=0.25, max_batch=8), LinearProfile("d", base=0.25, max_batch=8))


def served(graph, profiles, policy, requests):
    """What became of each request, and its outputs."""
    ended, outputs = {}, []

    def note(record):
        if isinstance(record, Ended):
            assert record.id not in ended
            ended[record.id] = record
        elif isinstance(record, Emitted):
            outputs.append(record)

    engine(graph, profiles, policy, observers=[note]).run(requests)
    return ended, outputs


def images(count, slo):
    return [Request(f"r{index}", IMAGE, 0.2 * index, slo) for index in range(count)]  # 1.75 times capacity


@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_all_are_served_under_every_policy(policy):
    promised = {"total": 1.2, "weight": 2.0, "name": "slow"}
    finished, _ = served(IMAGE, PROFILES, POLICIES[policy](), images(40, SLO(**promised, finish=True)))
    assert {end.status for end in finished.values()} == {"done"} and len(finished) == 40
    for end in finished.values():
        assert end.on_time == (end.latency_s <= 1.2 + 1e-9) and end.slo == SLO(**promised, finish=True)


def test_the_default_policy_loses_little_by_them():
    counts = [
        sum(end.on_time for end in served(IMAGE, PROFILES, POLICIES[DEFAULT](), images(40, slo))[0].values())
        for slo in (SLO(total=1.2), SLO(total=1.2, finish=True))
    ]
    assert counts[1] >= 0.8 * counts[0] > 0


def test_who_is_served_late_gives_way_to_those_that_can_be_in_time():
    late = [Request("late", IMAGE, 0.0, SLO(total=0.3, finish=True))]  # alone it needs 0.52
    others = [Request(f"r{index}", IMAGE, 0.05 + 0.6 * index, SLO(total=0.65)) for index in range(4)]
    ended, _ = served(IMAGE, PROFILES, POLICIES[DEFAULT](), [*late, *others])
    assert [ended[f"r{index}"].on_time for index in range(4)] == [True] * 4
    assert ended["late"].status == "done" and not ended["late"].on_time and ended["late"].at > 0.7


def test_outputs_are_late_by_what_was_promised():
    slo = SLO(first=1.0, step=0.3, finish=True)
    requests = [Request(f"r{index}", CHAT, 0.0, slo, {"prompt_tokens": 4, "max_tokens": 6}) for index in range(8)]
    ended, outputs = served(CHAT, llm_profiles("llm", STEPS, 4), FCFS(), requests)
    assert {end.status for end in ended.values()} == {"done"}
    for output in outputs:
        assert output.late == (output.age > 1.0 + 0.3 * output.index + 1e-9)
    for id, end in ended.items():
        assert end.on_time == (not any(output.late for output in outputs if output.id == id))
    assert not all(end.on_time for end in ended.values())


def scheduler(policy):
    pool = Pool("gpu", ("unet", "vae"))
    return Scheduler([pool], policy, PROFILES)


def test_a_policy_that_gives_everybody_up_is_asked_again():
    asked = []

    def choose(view):
        asked.append([(job.id, job.promised) for job in view.jobs])
        drop = {job: "no" for job in view.jobs if job.promised}
        return Decision([job for job in view.jobs if not job.promised], drop=drop)

    one = scheduler(Hand(choose))
    job = one.submit(Request("a", IMAGE, 0.0, SLO(total=9.0, finish=True)), 0.0)
    one.submit(Request("b", IMAGE, 0.0, SLO(total=9.0)), 0.0)
    batch = one.next_batch("gpu", 0.0)
    assert [each.id for each in batch.jobs] == ["a"]
    assert asked == [[("a", True), ("b", True)], [("a", False)]]
    assert (job.due, job.due_next, job.late, job.promised) == (math.inf, math.inf, True, False)
    assert [event.id for event in one.pop_events() if isinstance(event, Ended)] == ["b"]


def test_who_was_given_up_once_can_be_dropped():
    one = scheduler(Hand(lambda view: Decision(drop=dict.fromkeys(view.jobs, "no"))))
    one.submit(Request("a", IMAGE, 0.0, SLO(total=9.0, finish=True)), 0.0)
    assert one.next_batch("gpu", 0.0) is None
    assert [event.status for event in one.pop_events() if isinstance(event, Ended)] == ["dropped"]


def test_it_stays_without_its_promise_where_it_moves():
    here, there = scheduler(FCFS()), scheduler(FCFS())
    here.submit(Request("a", IMAGE, 0.0, SLO(total=0.3, finish=True)), 0.0)
    batch = here.next_batch("gpu", 0.0)  # FCFS gives up what is hopeless
    here.finish(batch, [{}], 0.1)
    job = there.take(here.give("a", 0.1), IMAGE, 5.0)
    assert (job.promised, job.late, job.due) == (False, True, math.inf)
    assert job.request.slo == SLO(total=0.3, finish=True)
    set_policy(there, Hand())
    begin(there, "a", now=5.0)


def test_whether_it_is_to_be_served_late_is_yes_or_no():
    with pytest.raises(RequestError, match="SLO: finish must be true or false, got 1"):
        SLO(total=1.0, finish=1)
