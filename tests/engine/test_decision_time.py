"""What decisions take, by what is decided, as told of some that were made."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from neustream.core.asked import Asked
from neustream.engine.decision_time import AT_ONCE, DecisionTime, decision_time
from neustream.engine.events import Decided

PART = st.floats(0, 1e-2)
ABOUT = st.tuples(st.integers(0, 40), st.integers(0, 40)).filter(lambda about: about[1] <= about[0])


def told(time, abouts):
    """Records of decisions that took exactly `time`."""
    return [Decided("gpu", 0.0, time.of(Asked(1, *about)), requests=about[0], new=about[1]) for about in abouts]


@given(PART, PART, PART, st.lists(ABOUT, max_size=20))
def test_what_decisions_took_by_their_parts_is_found_again(any_s, request_s, new_s, abouts):
    apart = [(0, 0), (1, 0), (1, 1)]  # which tell the parts apart
    time = DecisionTime(any_s, request_s, new_s)
    assert tuple(decision_time(told(time, apart + abouts))) == pytest.approx(time, abs=1e-9)


@given(st.lists(st.tuples(ABOUT, st.floats(0, 1)), min_size=1, max_size=20))
def test_no_part_is_below_0_and_nothing_without_new_ones_is_closer(seen):
    records = [Decided("gpu", 0.0, seconds, requests=about[0], new=about[1]) for about, seconds in seen]
    found = decision_time(records)
    assert min(found) >= 0

    def error(time):
        took = [time.of(Asked(1, record.requests, record.new)) - record.seconds for record in records]
        return float(np.square(took).sum())

    mean = float(np.mean([record.seconds for record in records]))
    assert error(found) <= error(DecisionTime(mean)) + 1e-9


def test_of_no_decision_nothing_is_known():
    assert decision_time([]) == AT_ONCE
