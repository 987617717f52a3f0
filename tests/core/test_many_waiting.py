"""Thousands that wait: a decision is about the first few of them, and the same as if all were looked at."""

from __future__ import annotations

from random import Random

import pytest
from hand import Hand, ids

from neustream import SLO, Graph, Pool, Priced, Request, Scheduler, Stage, TableProfile, loop, seq
from neustream.core.policies import line_up
from neustream.core.policies.line_up import LONG, WEIGHED

LIVE = 3 * LONG
PROFILES = {
    "encode": TableProfile("encode", [1, 4], [0.01, 0.02]),
    "draw": TableProfile("draw", [1, 8], [0.02, 0.05]),
    "decode": TableProfile("decode", [1, 4], [0.01, 0.03]),
}


def waiting(seed, encoded, weights=(1.0,), alike=False):
    """A scheduler with many images that came at once, and as many again a second later."""
    draw = Random(seed)
    nodes = [loop(Stage("draw", 8), times=lambda job: job.params["steps"]), Stage("decode", 4, emits=True)]
    graph = Graph("image", seq(*([Stage("encode", 4)] if encoded else []), *nodes))
    profiles = {name: PROFILES[name] for name in graph.stages}
    scheduler = Scheduler([Pool("gpu", tuple(profiles))], Priced(), profiles)
    for at in range(2 * LIVE):
        steps = 10 if alike else draw.randint(5, 60)
        total = 3.0 if alike else draw.choice([draw.uniform(0.5, 4.0), draw.uniform(4.0, 90.0), float("inf")])
        slo = SLO(total=total, weight=draw.choice(weights))
        scheduler.submit(Request(f"{at:04}", graph, 1.0 * (at >= LIVE), slo, {"steps": steps}), 1.0 * (at >= LIVE))
    return scheduler


def steps(scheduler, count):
    """Who ran in so many steps, and who was given up."""
    now, told = 1.0, []
    for _ in range(count):
        batch = scheduler.next_batch("gpu", now)
        told.append((batch.stage, ids(batch.jobs)))
        now += batch.expected
        scheduler.finish(batch, ({},) * len(batch), now)
    return told, sorted(event.id for event in scheduler.pop_events() if type(event).__name__ == "Ended")


@pytest.mark.parametrize("encoded", [False, True], ids=["loop first", "encoder first"])
@pytest.mark.parametrize("case", [{}, {"weights": (0.001, 1.0, 1000.0)}, {"alike": True}], ids=str)
def test_decisions_are_those_of_a_look_at_all(case, encoded, monkeypatch):
    few = steps(waiting(3, encoded, **case), 40)
    monkeypatch.setattr(line_up, "LONG", 10 * LIVE)
    assert few == steps(waiting(3, encoded, **case), 40)


def test_only_those_who_may_be_weighed_are_lined_up():
    scheduler = waiting(3, encoded=False)
    begun = {id for stage, who in steps(scheduler, 10)[0] for id in who}
    hand = Hand()
    scheduler.next_batch("gpu", 3.0, instead=hand)
    all_of_them = line_up.line_up(hand.view, ())
    few = line_up.line_up(hand.view, (), lambda: 0.5)
    assert len(all_of_them.jobs) > LIVE > len(few.jobs)
    assert len(few.jobs) <= len(begun) + 2 * (WEIGHED + 1) + 1
    assert begun & set(ids(all_of_them.jobs)) <= set(ids(few.jobs)), "who has begun is never left out"
