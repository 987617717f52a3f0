"""What ways to instances and back took where a cluster was served, and what calls take of an instance."""

from __future__ import annotations

import pytest
from clusters import GRAPH, PROFILES, request

from neustream import FCFS, SLO, Pool, Scheduler
from neustream.cluster.happenings import Entered
from neustream.cluster.head import Head
from neustream.cluster.messages import HEAD
from neustream.cluster.network import Network
from neustream.cluster.rules.slack import Slack
from neustream.cluster.simulation import Cluster, Kind
from neustream.cluster.ways import Drawn, Ways
from neustream.core.batch import StepInfo
from neustream.core.events import Ended, Submitted
from neustream.engine.events import Finished
from neustream.engine.executor import ProfiledExecutor


def served(*requests):
    """Ways of a run from 100 s on; each request: asked, entered, its last step's end, answered."""
    ways = Ways()
    for number, (asked, entered, last, answered) in enumerate(requests):
        id = str(number)
        ways(Submitted(id, "g", 100 + asked, 200.0, SLO(), 1, 100 + asked))
        ways.happened(Entered(id, "whole-1", 100 + entered))
        for end in (last - 1, last):
            step = StepInfo(0, "gpu", 0, "step", (id,), (1.0,), 99 + end, 1.0, 1.0)
            ways(Finished(step, 100 + end, ""))
        ways(Ended(id, "done", "", {}, True, 100 + asked, 100 + answered, SLO(), 1))
        ways.happened(Entered(id, "whole-2", 150.0))
    return ways.told(100.0)


def test_a_message_takes_what_the_one_that_was_served_nearest_in_time_took():
    took = served((0.0, 0.5, 3.0, 3.25), (10.0, 10.125, 14.0, 15.0))
    assert [took.there.took(at) for at in (0.0, 4.9, 5.1, 99.0)] == [0.5, 0.5, 0.125, 0.125]
    assert [took.back.took(at) for at in (0.0, 8.4, 8.6, 99.0)] == [0.25, 0.25, 1.0, 1.0]
    assert took.to_dict()["there"]["p50"] == pytest.approx(0.3125)
    network = Network(delay_s=7.0, bandwidth=10.0, ways=took)
    assert network.arrives(HEAD, "a", 10.0, 0.0, []) == 10.125
    assert network.arrives("a", HEAD, 10.0, 0.0, []) == 11.0
    assert network.arrives("a", "b", 10.0, 20.0, []) == 19.0


def test_ways_are_drawn_from_quantiles_of_those_that_were_measured():
    took = served((0.0, 0.5, 3.0, 3.25), (10.0, 10.125, 14.0, 15.0))
    assert took.there.spread(2) == (0.125 + 0.375 / 4, 0.5 - 0.375 / 4) and served().there.spread(2) == ()
    way = Drawn((1.0, 2.0, 3.0), 0.5, [0])
    found = [way.took(0.5 * at) for at in range(3000)]
    assert all(900 < found.count(seconds) < 1100 for seconds in (1.0, 2.0, 3.0))
    assert len(set(found[:20])) == 3 and way.took(10.0) == way.took(10.2) == Drawn((1.0, 2.0, 3.0), 0.5, [0]).took(10.0)


def test_nobody_who_went_a_way_is_no_time_and_no_figure():
    took = served()
    assert took.there.took(3.0) == took.back.took(3.0) == 0.0 and took.to_dict() == {}


def latencies(requests, call_s):
    """What callers wait on one instance that a request's call takes so long of."""

    def make(place):
        scheduler = Scheduler([Pool("gpu", tuple(PROFILES))], FCFS(drop_hopeless=False), PROFILES)
        return scheduler, {"gpu": ProfiledExecutor(stretch=place.stretch)}

    cluster = Cluster(
        Head([GRAPH], {"": PROFILES}, Slack()), [Kind("whole", "", 1, make)], [GRAPH], Network(0.0), call_s=call_s
    )
    found = {}

    def see(record):
        if isinstance(record, Ended):
            found[record.id] = record.latency_s

    cluster.run(requests, [see])
    return found


def test_a_call_takes_a_request_in_later_and_holds_up_the_step_under_way():
    """Alone: three steps of 0.1 s and a decode of 0.1 s. The second comes in the first one's first step."""
    alone = latencies([request("a")], 0.02)
    assert alone == {"a": pytest.approx(0.42)}
    both = [request("a", steps=1), request("b", arrival=0.05)]
    assert latencies(both, 0.02)["a"] == pytest.approx(0.2 + 0.02 + 0.02)
    three = [request("a", steps=1), *(request(id, arrival=0.115) for id in "bc")]
    assert latencies(three, 0.02)["a"] == pytest.approx(0.2 + 0.02 + 2 * 0.02)


def test_a_step_waits_for_what_is_left_of_a_call_that_began_before_it():
    both = latencies([request("a", steps=1), request("b", steps=1, arrival=0.01)], 0.02)
    assert both["a"] == pytest.approx(0.2 + 0.02 + 0.02)
