"""A rule that says until when its step stands is not asked before, unless something happens."""

from __future__ import annotations

import math

import pytest

from neustream import SLO, Decision, Graph, KVCache, LinearProfile, Pool, Request, Scheduler
from neustream.core.steps import StepProfile
from neustream.graphs import llm, llm_profiles

STEPS = StepProfile("llm", *[LinearProfile(name, base=1.0, max_batch=8) for name in "pd"])
GRAPH = Graph("chat", llm("m"))


class Lasting:
    """All that wait, in order; the same until `until`. Counts how often it was asked."""

    def __init__(self, until):
        self.until, self.within, self.asked = until, None, 0

    def decide(self, view):
        self.asked += 1
        jobs = view.jobs
        whole = all(job.stage.phase == "decode" for job in jobs)
        return Decision(jobs, view.hopeless(), until=self.until if whole else -math.inf, within=self.within)


def serving(until=math.inf, total=100.0, blocks=100, count=2, pool="gpu"):
    """Two generations of 20 outputs that decode, at 1 s."""
    rule = Lasting(until)
    caches = {"m": KVCache(blocks, 1)}
    scheduler = Scheduler([Pool(pool, tuple(GRAPH.stages), kv_caches=caches)], rule, llm_profiles("m", STEPS, 8))
    for at in range(count):
        submit(scheduler, str(at), 0.0, total)
    step(scheduler, 0.0)
    assert rule.asked == 1
    step(scheduler, 1.0)
    assert rule.asked == 2
    return scheduler, rule


def submit(scheduler, id, now, total=100.0):
    return scheduler.submit(Request(id, GRAPH, now, SLO(total), {"prompt_tokens": 4, "max_tokens": 20}), now)


def step(scheduler, now):
    batch = scheduler.next_batch("gpu", now)
    scheduler.finish(batch, [{}] * len(batch.jobs), now + 1)
    return [job.id for job in batch.jobs]


def test_the_step_runs_again_and_counts_as_decided():
    scheduler, rule = serving()
    for now in range(2, 10):
        assert step(scheduler, float(now)) == ["0", "1"]
    assert rule.asked == 2 and scheduler.asked.decisions == 10
    assert [job.call_outputs for job in scheduler.jobs.values()] == [10, 10]


def test_when_its_time_is_over_the_rule_is_asked():
    scheduler, rule = serving(until=4.0)
    for now in range(2, 7):
        step(scheduler, float(now))
    assert rule.asked == 5


def test_who_comes_or_goes_has_it_asked():
    scheduler, rule = serving()
    submit(scheduler, "2", 2.0)
    assert step(scheduler, 2.0) == ["2", "0", "1"] and rule.asked == 3
    assert step(scheduler, 3.0) == ["0", "1", "2"] and rule.asked == 4
    assert step(scheduler, 4.0) == ["0", "1", "2"] and rule.asked == 4
    scheduler.cancel("1", 5.0)
    assert step(scheduler, 5.0) == ["0", "2"] and rule.asked == 5


def test_who_is_held_or_goes_on_without_a_promise_has_it_asked():
    scheduler, rule = serving()
    scheduler.hold("0", 2.0)
    assert step(scheduler, 2.0) == ["1"] and rule.asked == 3
    scheduler.resume("0")
    assert step(scheduler, 3.0) == ["0", "1"] and rule.asked == 4
    scheduler._lives.unpromised += 1
    step(scheduler, 4.0)
    assert rule.asked == 5


def test_who_becomes_hopeless_has_it_asked():
    scheduler, rule = serving(total=21.0)
    step(scheduler, 2.0)
    assert rule.asked == 2
    step(scheduler, 9.0)  # late, as it was kept waiting: 11 s are left, and 17 outputs are to come
    assert rule.asked > 2


def test_within_stands_in_place_of_hope():
    """Until somebody is late who was not, or has its next output due before such a step is over."""
    scheduler, rule = serving(total=21.0)
    rule.within = 1.5
    step(scheduler, 2.0)
    asked = rule.asked
    step(scheduler, 9.0)
    assert rule.asked == asked + 1, "nothing was said of `within` when it was decided"
    for now in (10.0, 11.0, 19.5):
        step(scheduler, now)
    assert rule.asked == asked + 1
    step(scheduler, 19.6)
    assert rule.asked == asked + 2, "21 s come within 1.5 s"
    scheduler, rule = serving()
    rule.within, scheduler._pools["gpu"].again = 1.5, None
    step(scheduler, 2.0)
    asked, scheduler.jobs["0"].late = rule.asked, True
    step(scheduler, 3.0)
    assert rule.asked == asked + 1
    scheduler.jobs["0"].due_next = 4.0
    step(scheduler, 4.0)
    assert rule.asked == asked + 1, "who was late then holds nobody back"


def test_where_memory_lacks_the_rule_is_asked_and_the_last_one_loses_its_own():
    scheduler, rule = serving(blocks=16)
    for now in range(2, 5):
        step(scheduler, float(now))
    assert rule.asked == 2
    assert step(scheduler, 5.0) == ["0"] and rule.asked == 3


@pytest.mark.parametrize("instead", [Lasting(math.inf), Lasting(-math.inf)])
def test_another_rule_is_asked_in_its_place(instead):
    scheduler, rule = serving()
    batch = scheduler.next_batch("gpu", 2.0, instead=instead)
    assert instead.asked == 1 and len(batch.jobs) == 2 and rule.asked == 2


def test_what_another_rule_decided_stands_for_nobody():
    scheduler, rule = serving(until=-math.inf)
    batch = scheduler.next_batch("gpu", 2.0, instead=Lasting(math.inf))
    scheduler.finish(batch, [{}] * 2, 3.0)
    step(scheduler, 3.0)
    assert rule.asked == 3
