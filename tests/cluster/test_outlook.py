"""What a scheduler tells of itself, and forecasts against what really happens."""

from __future__ import annotations

import pytest
from clusters import PROFILES, request
from hypothesis import given, settings
from hypothesis import strategies as st

from neustream import FCFS, SLO, Graph, KVCache, Pool, Priced, Request, Scheduler, TableProfile
from neustream.cluster.book import asked_of
from neustream.core.forecasts import forecast
from neustream.core.outlook import Outlook, outlook_of
from neustream.core.rates import Rates
from neustream.core.steps import StepProfile
from neustream.engine.clock import VirtualClock
from neustream.engine.engine import Engine
from neustream.engine.executor import ProfiledExecutor
from neustream.engine.member import Member
from neustream.graphs import llm, llm_profiles

RATES = Rates(PROFILES)


def told(scheduler: Scheduler, now: float = 0.0, rates: Rates = RATES) -> Outlook:
    return outlook_of(scheduler, "a", rates, now, heard=0, sent_at=now)


def scheduler_of(*requests: Request, policy=None) -> Scheduler:
    scheduler = Scheduler([Pool("gpu", tuple(PROFILES))], policy or FCFS(), PROFILES)
    for one in requests:
        scheduler.submit(one, one.arrival)
    return scheduler


def test_an_outlook_has_the_work_and_the_lines_of_all_that_is_there():
    outlook = told(scheduler_of(request("a", slo=SLO(total=4.0), steps=5), request("b", steps=2)))
    assert (outlook.live, outlook.waiting) == (2, 2)
    assert outlook.backlog == pytest.approx(7 * 0.05 + 2 * 0.1)
    (line,) = outlook.lines
    assert (line.stage, line.left, line.behind) == ("step", (5.0,), (pytest.approx(0.1),))
    assert line.due_in == (pytest.approx(3.9),), "b was promised nothing"


def test_a_step_under_way_is_waited_for():
    scheduler = scheduler_of(request("a"))
    scheduler.next_batch("gpu", 1.0)
    assert told(scheduler, 1.04).until == pytest.approx(0.06)


def test_requests_that_are_late_already_are_no_reason_to_turn_others_away():
    scheduler = scheduler_of(request("late", slo=SLO(total=0.1), steps=9))
    assert told(scheduler).lines == ()


def test_an_empty_instance_takes_what_fits_alone():
    for total, fits in ((0.61, True), (0.59, False)):
        one = asked_of(request("r", slo=SLO(total=total), steps=5))
        said = forecast(told(scheduler_of()), one, RATES, 0.0)
        assert said.fits == fits and said.finish == pytest.approx(0.6)
        assert said.charge == pytest.approx(5 * 0.05 + 0.1)


def test_an_old_outlook_is_aged():
    scheduler = scheduler_of(*(request(str(n), slo=SLO(total=6.0), steps=8) for n in range(4)))
    one = asked_of(request("r", slo=SLO(total=1.5), steps=5))
    now = forecast(told(scheduler), one, RATES, 0.0)
    later = forecast(told(scheduler), one, RATES, 3.0)
    assert later.finish < now.finish


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 8), max_size=4), st.integers(1, 8))
def test_what_is_said_to_fit_is_on_time_if_nobody_else_comes(others, steps):
    """Under `priced`, which plans by the same lines: all promises of a forecast that fits are kept."""
    there = [request(str(n), slo=SLO(total=6.0), steps=count) for n, count in enumerate(others)]
    new = request("new", slo=SLO(total=2.0), steps=steps)
    said = forecast(told(scheduler_of(*there)), asked_of(new), RATES, 0.0)
    pools = [Pool("gpu", tuple(PROFILES))]
    engine = Engine(Member(Scheduler(pools, Priced(), PROFILES), {"gpu": ProfiledExecutor()}), VirtualClock())
    report = engine.run([*there, new])
    if said.fits:
        assert report.counts["on_time"] == len(others) + 1


def texts(blocks: int = 100):
    graph = Graph("text", llm("llm", max_batch=8))
    steps = StepProfile("steps", TableProfile("p", [1, 8], [0.05, 0.2]), TableProfile("d", [1, 8], [0.02, 0.09]))
    profiles = llm_profiles("llm", steps, 8)
    pool = Pool("gpu", tuple(profiles), kv_caches={"llm": KVCache(blocks, 16)})
    return graph, Rates(profiles), Scheduler([pool], FCFS(drop_hopeless=False), profiles)


def text(graph: Graph, id: str, slo: SLO, prompt: int = 64) -> Request:
    return Request(id, graph, 0.0, slo, {"prompt_tokens": prompt, "max_tokens": 20})


def test_a_text_fits_while_its_first_token_its_pace_and_its_blocks_do():
    graph, rates, scheduler = texts(blocks=10)
    promise = SLO(first=1.0, step=0.1)
    one = asked_of(text(graph, "r", promise))
    empty = forecast(told(scheduler, rates=rates), one, rates, 0.0)
    assert empty.fits and empty.first == pytest.approx(0.05)
    assert not forecast(told(scheduler, rates=rates), asked_of(text(graph, "r", SLO(first=0.04))), rates, 0.0).fits
    assert not forecast(
        told(scheduler, rates=rates), asked_of(text(graph, "r", SLO(first=1.0, step=0.01))), rates, 0.0
    ).fits
    scheduler.submit(text(graph, "x", promise, prompt=120), 0.0)
    (seen,) = told(scheduler, rates=rates).texts
    assert (seen.prompts, seen.prompt_tokens, seen.waiting_blocks, seen.free, seen.blocks) == (1, 120, 8, 10, 10)
    assert not forecast(told(scheduler, rates=rates), one, rates, 0.0).fits, "4 blocks more than 2"


def test_evicted_texts_are_told_apart():
    graph, rates, scheduler = texts(blocks=9)
    for id in ("a", "b"):
        scheduler.submit(text(graph, id, SLO(), prompt=64), 0.0)
    now = 0.0
    for _ in range(30):
        batch = scheduler.next_batch("gpu", now)
        if batch is None:
            break
        now += 0.1
        scheduler.finish(batch, [{}] * len(batch), now)
        if told(scheduler, now, rates).texts[0].evicted:
            break
    assert told(scheduler, now, rates).texts[0].evicted == 1
