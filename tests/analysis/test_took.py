"""The device as it was: which served step tells how long a simulated one takes."""

from __future__ import annotations

from types import SimpleNamespace

from neustream import SLO
from neustream.analysis.took import Took
from neustream.core.batch import StepInfo
from neustream.core.events import Submitted
from neustream.engine.events import Finished


def step(start, seconds, stage="s", error=""):
    info = StepInfo(0, "gpu", 0, stage, ("a",), (1.0,), start, 9.0, 1.0)
    return Finished(info, start + seconds, error)


def came(arrival, at):
    return Submitted("a", "g", arrival, 9.0, SLO(), 1, at)


def factors(records, instants, stage="s", start=0.0):
    took = Took()
    for record in records:
        took(record)
    stretch = took.stretch(start)
    return [stretch(SimpleNamespace(stage=stage, started_at=at)) for at in instants]


def test_a_step_takes_what_the_one_nearest_in_time_took():
    served = [step(10.0, 2.0), step(12.0, 1.0), step(13.0, 4.0)]
    assert factors(served, [0.0, 10.9, 11.1, 12.5, 12.6, 99.0]) == [2.0, 2.0, 1.0, 1.0, 4.0, 4.0]
    assert factors(served, [0.0, 2.0, 3.0], start=10.0) == [2.0, 1.0, 4.0]


def test_kinds_are_told_apart_and_what_was_not_served_takes_its_profile():
    served = [step(0.0, 2.0), step(2.0, 3.0, "t")]
    assert factors(served, [2.0]) == [2.0]
    assert factors(served, [0.0], "t") == [3.0]
    assert factors(served, [0.0], "u") == [1.0]


def test_steps_that_failed_tell_nothing():
    assert factors([step(0.0, 2.0), step(2.0, 9.0, error="no")], [2.0]) == [2.0]


def test_steps_beside_which_a_request_came_in_tell_nothing_while_there_are_others():
    served = [came(0.0, 0.5), step(0.5, 2.0), came(2.6, 2.9), step(2.5, 9.0), step(11.5, 1.0)]
    assert factors(served, [0.5, 2.5, 11.5]) == [2.0, 2.0, 1.0]
    assert factors([came(0.4, 0.6), step(0.5, 2.0)], [0.5]) == [2.0]
