"""Reasons name times as one says them: none is negative, none is 0.000."""

from __future__ import annotations

import doctest
import math
import re

import pytest
from toys import adds_up, draw_and_decode, engine, request, table

from neustream import EDF, Clockwork, EventLog, NeuStream, Priced
from neustream.core import reasons
from neustream.core.reasons import due, span


def test_the_examples():
    assert doctest.testmod(reasons).failed == 0


@pytest.mark.parametrize("seconds", [1e300, 3600.0, 1.0, 0.9994e-3, 1e-3, 1e-4, 99.94e-6, 1e-7, 1e-9, 0.0])
def test_no_span_is_negative_or_nothing_but_zeros(seconds):
    for text in (span(seconds), due(seconds), due(-seconds)):
        assert "-" not in text
        assert not re.search(r"\b0\.0+ ", text)


def test_what_is_never_due():
    assert due(math.inf) == "never due"


@pytest.mark.parametrize("policy", [EDF(), Clockwork(), NeuStream(3.0), Priced()], ids=lambda p: type(p).__name__)
def test_requests_that_were_due_long_ago_are_told_so(policy):
    """The first one blocks the only worker for as long as all others have."""
    log = EventLog()
    graph = draw_and_decode(max_batch=1)
    profiles = {"draw": table("draw", 5.0), "decode": table("decode", 1e-7)}
    work = [request("long", graph, 0.0), *(request(f"late{at}", graph, 0.1, total=0.2) for at in range(3))]
    report = engine(graph, profiles, policy, observers=[log]).run(work)
    assert adds_up(report.to_dict()["counts"])
    told = [entry["reason"] for entry in log.requests.values() if entry["status"] == "dropped"]
    assert len(told) == 3
    for reason in told:
        assert "was due 4.7" in reason and "due in" not in reason
