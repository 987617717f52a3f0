"""Requests that are like others are routed without a look at their arguments."""

from __future__ import annotations

import pytest
from test_cluster_driver import Words, adds_up, ask, chat, running, said

from neustream import SLO, RequestError, RequestFailed
from neustream.backends.ray.alike import REMEMBERED, Alike, likeness_of
from neustream.backends.ray.wire import Described
from neustream.core.outlook import Asked


def like(*args, model=None, slo=None, **kwargs):
    return likeness_of(model, args, kwargs, slo)


def test_requests_are_alike_that_differ_in_words_and_seeds_alone():
    one = like("a red fox in the snow", steps=20, seed=1)
    assert one is not None and one == like("a lion on the savanna", steps=20, seed=2)
    assert hash(one) == hash(like("a lion on the savanna", steps=20, seed=2))


@pytest.mark.parametrize(
    ("other", "kwargs"),
    [
        (("a red fox in the snow",), {"steps": 21}),
        (("a red fox " * 40,), {"steps": 20}),
        (("a red fox in the snow",), {"steps": 20, "mode": "draft"}),
        (("a red fox in the snow",), {"steps": 20.0}),
        (("a red fox in the snow",), {"steps": True}),
        (("a red fox in the snow",), {"steps": 20, "model": "other"}),
        (("a red fox in the snow",), {"steps": 20, "slo": SLO(total=3)}),
        ((["a red fox in the snow"],), {"steps": 20}),
    ],
)
def test_what_may_cost_something_else_is_not_alike(other, kwargs):
    assert like(*other, **kwargs) != like("a red fox in the snow", steps=20)


@pytest.mark.parametrize("value", [object(), b"bytes", {1, 2}, [[[[1]]]], list(range(65))])
def test_of_what_is_no_plain_data_nothing_is_told(value):
    assert like(image=value) is None


def test_no_more_than_so_many_are_remembered():
    alike = Alike()
    for n in range(REMEMBERED + 1):
        alike.add(like(n), Described(None, Asked("first", {}), SLO(), {}, False))
    assert alike.get(like(0), "r") is None and alike.get(None, "r") is None
    found = alike.get(like(1), "r")
    assert found is not None and found.asked.id == "r"


class Watched:
    """Counts how often instances look at requests."""

    def __init__(self, machines):
        self.looks = []
        self._describe = machines.describe
        machines.describe = self.describe

    def describe(self, name, id, payload, slo):
        self.looks.append(id)
        return self._describe(name, id, payload, slo)


def test_the_first_of_its_kind_is_looked_at_and_the_others_are_not():
    with running(lambda number: chat(Words, number)) as driver:
        watched = Watched(driver.machines)
        for _ in range(5):
            assert said(ask(driver, words=2, voice="a")) == ["a1", "a2"]
        assert said(ask(driver, words=3, voice="a")) == ["a1", "a2", "a3"]
        assert said(ask(driver, words=2, voice="a", slo=SLO(total=60.0))) == ["a1", "a2"]
        assert len(watched.looks) == 3 and adds_up(driver) and driver.counts.on_time == 7


def test_who_is_routed_by_a_guess_is_refused_where_it_comes_to(monkeypatch):
    with running(lambda number: chat(Words, number)) as driver:
        assert said(ask(driver, words=2, voice="a")) == ["a1", "a2"]
        for agent in driver.machines.agents.values():

            def refuse(*args, id, **kwargs):
                raise RequestError(f"request {id}: the voice is hoarse")

            monkeypatch.setattr(agent.service, "ask", refuse)
        watched = Watched(driver.machines)
        with pytest.raises(RequestError, match="request hoarse: the voice is hoarse"):
            ask(driver, id="hoarse", words=2, voice="a").result(30)
        assert watched.looks == [] and driver.counts.refused == 1 and adds_up(driver)


def test_an_id_that_is_taken_and_a_step_that_fails_are_told_as_ever():
    with running(lambda number: chat(Words, number)) as driver:
        assert said(ask(driver, words=1, voice="b", broken=False)) == ["b1"]
        with pytest.raises(RequestFailed, match="LookupError: no such word"):
            ask(driver, words=1, voice="b", broken=True).result(30)
        with pytest.raises(RequestFailed, match="LookupError: no such word"):
            ask(driver, words=1, voice="b", broken=True).result(30)
        assert driver.counts.failed == 2 and adds_up(driver)
