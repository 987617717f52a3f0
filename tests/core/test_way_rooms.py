"""What is kept of requests on their way, and for how long."""

from __future__ import annotations

from types import SimpleNamespace

from neustream import Graph, Job, Request, Stage
from neustream.core.lengths import Lengths
from neustream.core.policies import way_rooms
from neustream.core.policies.way_rooms import KEPT, KnownLegs, Looked, ScarcePrice

GRAPH = Graph("graph", Stage("one"))


def test_what_is_ahead_is_asked_anew_in_each_call_of_a_stage(monkeypatch):
    """A loop comes to the same stage again, and an id may be given again after its end."""
    asked = []
    monkeypatch.setattr(way_rooms, "legs_of_job", lambda view, job: asked.append(job.outputs) or [])
    view, known = SimpleNamespace(live={"a": None}, lengths={}), KnownLegs()
    job = SimpleNamespace(id="a", stage=object(), arrival=0.0, outputs=0, call_outputs=0, begun=True)
    known.of(view, job)
    job.outputs = job.call_outputs = 3  # on with the same call
    known.of(view, job)
    assert asked == [0]
    job.call_outputs = 0  # the next one
    known.of(view, job)
    assert asked == [0, 3]
    job.outputs, job.arrival = 0, 9.0  # another request of that id
    known.of(view, job)
    assert asked == [0, 3, 0]


def test_who_waits_is_judged_by_what_is_known_of_lengths_now(monkeypatch):
    """And who has begun by what was known then."""
    monkeypatch.setattr(way_rooms, "legs_of_job", lambda view, job: asked.append(job.begun) or [])
    lengths = Lengths()
    view, known = SimpleNamespace(live={"a": None}, lengths={"text": lengths}), KnownLegs()
    for begun, times in ((False, 2), (True, 1)):
        asked = []
        job = SimpleNamespace(id="a", stage=object(), arrival=0.0, outputs=0, call_outputs=0, begun=begun)
        known.of(view, job)
        known.of(view, job)
        for _ in range(10):
            lengths.ended(20, 100)
        lengths.within(0, (0.5,))
        known.of(view, job)
        assert asked == [begun] * times


def test_worth_is_kept_of_no_more_than_so_many_where_nobody_is_submitted():
    price = ScarcePrice()
    for at in range(2 * KEPT + 10):
        assert price.density([], 1.0, SimpleNamespace(id=f"r{at}", weight=1.0)) > 1e9
        assert len(price._worth) <= KEPT


def test_another_job_where_a_gone_one_was_kept_is_not_taken_for_it():
    """A look in vain holds for who was there: an object's place in memory is soon another one's."""
    looked = Looked()
    looked.in_vain(0.0, 9.0, [], [Job(Request("gone", GRAPH))])
    assert all(looked.again(1.0, [], [Job(Request("new", GRAPH))]) for _ in range(50))
    stays = Job(Request("stays", GRAPH))
    looked.in_vain(2.0, 9.0, [], [stays])
    assert not looked.again(3.0, [], [stays]) and looked.again(9.0, [], [stays])
