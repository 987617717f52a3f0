"""When requests of one device end that go from one model there to another: the forecast, by hand."""

from __future__ import annotations

import numpy as np
import pytest

from neustream import SLO, Graph, Request, Stage
from neustream.core.job import Job
from neustream.core.policies.way_forecast import Forecast, Part, Way

TURNS = {"a": (1.0, 0.0), "b": (2.0, 0.5)}
GRAPH = Graph("g", Stage("s"))


def way(*parts, time=100.0, weight=1.0, more=(0.0, 0.0, 0.0, 0.0)):
    job = Job(Request("r", GRAPH, slo=SLO(total=time, weight=weight)))
    alone = sum(part.away + part.here + part.steps * sum(TURNS.get(part.model, (0.0,))) for part in parts)
    return Way(job, time, parts, alone, np.array(more))


def test_alone_a_request_takes_what_its_parts_take():
    parts = Part(0.0, 0.5, "a", 4.0), Part(3.0, 1.0, "b", 2.0), Part(0.25, 0.0, "", 0.0)
    one = way(*parts)
    assert Forecast(TURNS, [one]).ends() == pytest.approx([0.5 + 4 + 3 + 1 + 2 * 2.5 + 0.25])
    assert one.alone == pytest.approx(13.75)
    assert Forecast(TURNS, []).ends() == [] and Forecast(TURNS, [way()]).ends() == [0.0]


def test_models_take_turns_and_those_at_one_model_share_its_steps():
    at_a, at_b = Part(0.0, 0.0, "a", 4.0), Part(0.0, 0.0, "b", 2.0)
    assert Forecast(TURNS, [way(at_a)] * 3).ends() == [4.0] * 3, "a step costs the same for all"
    assert Forecast(TURNS, [way(at_b)] * 2).ends() == [6.0] * 2, "1 s more for two of them"
    # two turns of both, 3.5 s each; then a has the device alone
    assert Forecast(TURNS, [way(at_a), way(at_b)]).ends() == pytest.approx([7 + 2, 7])


def test_who_comes_delays_everybody_by_what_its_prompt_costs():
    long, late = way(Part(0.0, 0.0, "a", 10.0)), way(Part(4.0, 3.0, "", 0.0))
    assert Forecast(TURNS, [long, late]).ends() == pytest.approx([13, 7])
    early = way(Part(4.0, 0.0, "a", 2.0))
    assert Forecast(TURNS, [long, early]).ends() == pytest.approx([10, 6]), "it joins the steps there are"


def test_what_texts_may_get_longer_is_stretched_as_the_whole_is():
    given = way(Part(0.0, 0.0, "a", 4.0), time=10.0, more=(-2.0, -1.0, 1.0, 2.0))
    assert given.in_time(4.0) and given.in_time(8.0), "twice as long as alone: 4, 6, 10 and 12 s"
    assert given.in_time(10.0) and not given.in_time(13.5), "5, 7.5, 12.5 and 15 s; 6.75, 10.1, 16.9, 20.3 s"


def test_who_keeps_more_from_being_in_time_than_it_is_worth_is_found():
    heavy = way(Part(0.0, 6.0, "a", 1.0), time=7.0)
    two = [way(Part(1.0, 0.0, "a", 4.0), time=6.0) for _ in range(2)]
    beside = Forecast(TURNS, [heavy, *two])
    assert beside.value == 1 and beside.only(two).value == 2
    assert beside.less({heavy.job}) is heavy.job
    assert beside.less({two[0].job}) is None and beside.less(set()) is None
    dear = way(Part(0.0, 6.0, "a", 1.0), time=7.0, weight=3.0)
    assert Forecast(TURNS, [dear, *two]).less({dear.job}) is None
