"""Several members on one clock: who gets a request, and that each request ends exactly once."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toys import adds_up, draw_and_decode, request, table

from neustream import (
    FCFS,
    Engine,
    Graph,
    Member,
    Pool,
    ProfiledExecutor,
    Request,
    RequestError,
    Scheduler,
    Stage,
    VirtualClock,
)
from neustream.core.events import Ended, Submitted
from neustream.core.policies import POLICIES
from neustream.engine.events import Finished, Refused
from neustream.engine.routing import LeastWork, Load

GRAPH = draw_and_decode()
PROFILES = {"draw": table("draw", 1.0, 1.25), "decode": table("decode", 0.5)}


class Seen:
    """An observer: how requests ended, and on which members their steps ran."""

    def __init__(self):
        self.accepted, self.ended, self.refused, self.places = Counter(), Counter(), Counter(), {}

    def __call__(self, record):
        if isinstance(record, Submitted):
            self.accepted[record.id] += 1
        elif isinstance(record, Ended):
            self.ended[record.id] += 1
        elif isinstance(record, Refused):
            self.refused[record.id] += 1
        elif isinstance(record, Finished):
            for id in record.step.ids:
                self.places.setdefault(id, set()).add(record.member)


def member(name, policy=None, *, stages=("draw", "decode"), profiles=PROFILES, workers=1):
    pool = Pool("gpu", stages, workers)
    return Member(Scheduler([pool], policy or FCFS(), profiles), {"gpu": ProfiledExecutor()}, name)


def run(members, requests, **options):
    seen = Seen()
    return seen, Engine(members, VirtualClock(), [seen], **options).run(requests)


# -- the rule -----------------------------------------------------------------------------------------


def test_least_work_chooses_the_first_of_those_with_the_least_seconds():
    loads = [Load("a", 9, 3.0), Load("b", 1, 2.0), Load("c", 5, 2.0)]
    assert LeastWork().choose(loads, request("x", GRAPH)) == 1


def test_work_and_not_the_number_of_requests_counts():
    requests = [request("long", GRAPH, steps=9), *(request(f"short {n}", GRAPH, 0.1, steps=1) for n in range(3))]
    seen, _ = run([member("a"), member("b")], requests)
    assert seen.places == {"long": {"a"}, **{f"short {n}": {"b"} for n in range(3)}}


def test_a_request_goes_where_its_stages_are_served():
    other = Graph("other", Stage("paint", emits=True))
    painter = member("painter", stages=("paint",), profiles={"paint": table("paint", 1.0)})
    requests = [request("first", GRAPH), Request("second", other), Request("third", other)]
    seen, report = run([member("drawer"), painter], requests)
    assert seen.places == {"first": {"drawer"}, "second": {"painter"}, "third": {"painter"}}
    assert report.counts["on_time"] == 3


def test_a_request_that_no_member_serves_is_refused():
    other = Graph("other", Stage("paint", emits=True))
    seen, report = run([member("a"), member("b")], [Request("x", other), request("y", GRAPH)])
    assert seen.refused == {"x": 1} and report.counts["failed"] == 1 == report.counts["on_time"]
    assert "stage 'paint' is in no pool" in next(iter(report.reasons))


def test_an_id_is_one_of_all_members():
    seen, report = run([member("a"), member("b")], [request("x", GRAPH, steps=5), request("x", GRAPH, 0.5)])
    assert seen.accepted == {"x": 1} == seen.refused
    assert report.reasons == {"request id 'x' is already being served": 1}


@pytest.mark.parametrize("place", [2, -1, None, "a"])
def test_a_router_that_chooses_nobody_is_told(place):
    class Odd:
        def choose(self, loads, request):
            return place

    seen, report = run([member("a"), member("b")], [request("x", GRAPH)], router=Odd())
    assert seen.refused == {"x": 1}
    assert list(report.reasons) == [f"router 'Odd' chose {place!r} of 2 members"]


def test_a_router_that_raises_ends_a_replay():
    class Broken:
        def choose(self, loads, request):
            return loads[7]

    with pytest.raises(IndexError):
        run([member("a"), member("b")], [request("x", GRAPH)], router=Broken())


@pytest.mark.parametrize("names", [[], ["a", "a"], ["", ""]])
def test_members_have_different_names(names):
    with pytest.raises(RequestError, match="members with different names"):
        Engine([member(name) for name in names], VirtualClock())


# -- any load -----------------------------------------------------------------------------------------

LOADS = st.lists(st.tuples(st.floats(0, 6), st.integers(1, 4), st.floats(0.5, 30)), min_size=1, max_size=25)


@given(loads=LOADS, count=st.integers(1, 4), policy=st.sampled_from(sorted(POLICIES)))
@settings(max_examples=80, deadline=None)
def test_each_request_ends_exactly_once_on_one_member(loads, count, policy):
    members = [member(str(number), POLICIES[policy]()) for number in range(count)]
    requests = [
        request(str(at), GRAPH, arrival, steps, total) for at, (arrival, steps, total) in enumerate(sorted(loads))
    ]
    seen, report = run(members, requests)
    assert seen.accepted == seen.ended == Counter(one.id for one in requests)
    assert all(len(places) == 1 for places in seen.places.values())
    assert adds_up({"submitted": report.submitted, **report.counts})
    assert not any(one.scheduler.jobs for one in members)


@given(loads=LOADS)
@settings(max_examples=30, deadline=None)
def test_one_member_gives_the_same_with_and_without_a_name(loads):
    requests = [request(str(at), GRAPH, arrival, steps) for at, (arrival, steps, _) in enumerate(sorted(loads))]
    reports = [run(one, requests)[1].to_dict() for one in (member(""), [member("only")])]
    for report in reports:
        del report["decision_us"]
    assert reports[0] == reports[1]
