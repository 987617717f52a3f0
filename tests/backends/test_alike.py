"""Requests that are like others are routed without a look at their arguments."""

from __future__ import annotations

import threading
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from test_cluster_driver import Words, adds_up, ask, chat, running, said, until
from toys import table

from neustream import FCFS, SLO, Graph, Request, RequestError, RequestFailed, Stage, loop, serve
from neustream.backends.ray.alike import KINDS, SAMPLES, Alike, likeness_of
from neustream.backends.ray.wire import Described
from neustream.cluster.book import asked_of
from neustream.cluster.fleet import Instance, Route, reads_params
from neustream.cluster.happenings import Routed
from neustream.cluster.head import Head
from neustream.cluster.rules import ROUTERS
from neustream.cluster.rules.prefix import Prefix
from neustream.core.outlook import Outlook
from neustream.core.rates import Rates

PLAIN = SLO()


def like(*args, model=None, slo=None, **kwargs):
    return likeness_of(model, args, kwargs, slo)


def described(steps=1, slo=PLAIN, stage="say"):
    """What an instance says of a request of so many steps."""
    graph = Graph("chat", loop(Stage(stage, emits=True), times=steps))
    return Described(graph, asked_of(Request("first", graph, slo=slo)), slo, {}, True)


def test_requests_are_alike_that_differ_in_words_and_seeds_alone():
    one = like("a red fox in the snow", steps=20, seed=1, generator=object())
    assert one is not None and one == like("a lion on the savanna", steps=20, seed=2, generator=object())
    assert hash(one) == hash(like("a lion on the savanna", steps=20, seed=2, generator=None))
    assert like([5, 6, 7, 8]) == like([1, 2, 3, 4]) and like([5, 6]) != like([1, 2])


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


def test_images_and_arrays_are_alike_by_their_size():
    assert like(np.zeros((4, 8))) == like(np.ones((4, 8)))
    assert like(np.zeros((4, 8))) != like(np.zeros((8, 4))) != like(np.zeros((8, 4), dtype=np.uint8))
    assert like(Image.new("RGB", (8, 4))) == like(Image.new("RGB", (8, 4), "red")) != like(Image.new("L", (8, 4)))


@pytest.mark.parametrize("value", [object(), b"bytes", {1, 2}, [[[[1]]]], [0.5] * 65])
def test_of_what_is_no_plain_data_nothing_is_told(value):
    assert like(image=value) is None


def test_arguments_that_change_nothing_are_found_out_and_the_others_are_not():
    alike = Alike()
    alike.add(like(steps=3, label=1), described(3))
    alike.add(like(steps=4, label=2), described(4))  # which of the two it is cannot be told
    assert alike.get(like(steps=3, label=2), "r", None) is None
    alike.add(like(steps=3, label=7), described(3))
    assert alike.get(like(steps=3, label=9), "r", None).steps == 3
    assert alike.get(like(steps=4, label=9), "r", None).steps == 4
    assert alike.get(like(steps=5, label=9), "r", None) is None


def test_who_is_found_to_be_something_else_is_looked_at_from_then_on():
    alike = Alike()
    for label in (1, 2):
        alike.add(like(steps=3, label=label), described(3))
    assert alike.get(like(steps=3, label=9), "r", None) is not None
    alike.add(like(steps=3, label=9), described(7))
    assert alike.get(like(steps=3, label=8), "r", None) is None
    assert alike.get(like(steps=3, label=1), "r", None).steps == 3
    assert alike.get(like(steps=3, label=9), "r", None).steps == 7
    alike.add(like(steps=3, label=3), described(3))  # it does not forget that
    assert alike.get(like(steps=3, label=8), "r", None) is None


def test_where_equal_arguments_ask_for_something_else_nothing_is_guessed():
    alike = Alike()
    alike.add(like("a text of four words"), described(4))
    alike.add(like("a text of five or six words"), described(6))
    assert alike.get(like("a text of four words"), "r", None) is None
    alike.add(like("a text of four words"), described(4))
    assert alike.get(like("a text of four words"), "r", None) is None


def test_lengths_matter_even_if_they_did_not_between_two():
    alike = Alike()
    alike.add(like("word " * 12), read(12))  # these two are of as many tokens
    alike.add(like("longer words " * 6), read(12))
    assert alike.get(like("word " * 13), "r", None) is not None
    assert alike.get(like("word " * 4000), "r", None) is None
    alike.add(like([1, 2, 3]), read(3))
    alike.add(like([1, 2, 3, 4]), read(3))
    assert alike.get(like([1] * 5), "r", None) is None


def test_prompts_of_some_more_tokens_are_alike_and_sizes_of_other_stages_are_not():
    alike = Alike()
    for label, tokens in enumerate((70, 90, 120)):
        alike.add(like("word " * 40, label=label), read(tokens))
    assert alike.get(like("word " * 40, label=9), "r", None) is not None
    alike = Alike()
    for label, size in enumerate((70, 71)):
        alike.add(like(label=label), read(size, phase="step"))
    assert alike.get(like(label=9), "r", None) is None
    assert alike.get(like(label=1), "r", None).asked.calls["read"].size == 71


def test_of_what_was_looked_at_no_arguments_are_kept():
    graph = Graph("chat", Stage("say"))
    asked = asked_of(Request("first", graph, params={"prompt": "hers"}))
    alike = Alike()
    alike.add(like(1), Described(graph, asked, PLAIN, {"say": table("say", 0.1)}, True))
    found = alike.get(like(1), "r", None)
    assert found.asked.params == {} and found.profiles == {}


def test_requests_of_very_many_values_are_not_compared():
    assert like({str(n): dict.fromkeys(range(60), 1) for n in range(4)}) is not None
    assert like({str(n): dict.fromkeys(range(60), 1) for n in range(5)}) is None


def test_objects_that_raise_where_they_are_looked_at_are_left_to_instances():
    class Nested:
        @property
        def shape(self):
            raise RuntimeError("no shape of this kind")

    assert like(mask=Nested()) is None


def test_a_look_that_contradicts_what_was_found_out_undoes_it():
    alike = Alike()
    for label in (1, 2):
        alike.add(like(steps=3, label=label), described(3))
    alike.add(like(steps=3, label=9), described(6))
    assert alike.get(like(steps=3, label=5), "r", None) is None
    assert alike.get(like(steps=3, label=9), "r", None).steps == 6


def test_of_a_guess_the_promise_is_the_request_s_own():
    alike = Alike()
    alike.add(like(3, slo=SLO(total=9.0)), described(3, SLO(total=9.0)))
    found = alike.get(like(3, slo=SLO(total=2.0, first=1.0, step=0.5, weight=2.0)), "r", SLO(2.0, 1.0, 0.5, 2.0))
    asked = found.asked
    assert asked == replace(asked_of(Request("r", found.graph, slo=found.slo)), params=asked.params)
    assert found.slo.total == asked.due_in == 2.0 and asked.first_in == 1.0 and asked.id == "r"
    assert alike.get(like(3), "r", None) is None  # its instance knows its promise


def test_no_more_than_so_many_are_remembered():
    alike = Alike()
    for n in range(SAMPLES + 1):
        alike.add(like(n), described(n + 1))
    assert alike.get(like(0), "r", None) is None and alike.get(None, "r", None) is None
    assert alike.get(like(1), "r", None).steps == 2
    for n in range(KINDS):
        alike.add(like(**{f"name{n}": 1}), described())
    assert alike.get(like(1), "r", None) is None


def read(size, phase="prefill"):
    """What an instance says of a request whose first stage has a size."""
    graph = Graph("chat", Stage("read", phase=phase, model="reader", size=lambda job: job.params["size"]))
    return Described(graph, asked_of(Request("first", graph, params={"size": size})), PLAIN, {}, True)


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
        assert said(ask(driver, words=3, voice="b")) == ["b1", "b2", "b3"]  # whether that matters is not known
        assert said(ask(driver, words=2, voice="c")) == ["c1", "c2"]
        assert len(watched.looks) == 4


def test_a_wrong_guess_is_served_and_noticed():
    def named(job):
        return 3 if job.params["voice"] == "long" else 1

    def make(number):
        graph = Graph("chat", loop(Stage("say", max_batch=8, emits=True), times=named))
        profiles = {"say": table("say", *[0.001] * 8, device="toy")}
        return serve(graph, {"say": Words(number)}, profiles, policy=FCFS(drop_hopeless=False))

    with running(make) as driver:
        watched = Watched(driver.machines)
        for voice in ("a", "b", "c"):
            assert said(ask(driver, words=1, voice=voice)) == [f"{voice}1"]
        assert len(watched.looks) == 2
        assert said(ask(driver, "wrong", words=1, voice="long")) == ["long1", "long2", "long3"]
        until(lambda: len(watched.looks) == 3)
        assert watched.looks[-1] == "wrong"
        assert said(ask(driver, words=1, voice="long")) == ["long1", "long2", "long3"]
        assert len(watched.looks) == 3
        assert said(ask(driver, words=1, voice="d")) == ["d1"]
        assert len(watched.looks) == 4
        assert driver.counts.failed == 0 and adds_up(driver)


def test_what_an_instance_told_that_has_gone_meanwhile_another_is_asked():
    with running(lambda number: chat(Words, number)) as driver:
        machines = driver.machines
        describe, looks = machines.describe, []

        def and_go(name, id, payload, slo):
            looks.append(name)
            seen = describe(name, id, payload, slo)
            seen.exception(30)
            if len(looks) == 1:  # the head forgets it before it hears of the look
                instance = driver._looking._head.fleet.instances.pop(name)
                gone.append((name, instance))
            elif gone:
                driver._looking._head.fleet.instances.update([gone.pop()])
            return seen

        gone: list = []
        machines.describe = and_go
        assert said(ask(driver, words=2, voice="a")) == ["a1", "a2"]
        assert len(looks) == 2 and looks[0] != looks[1] and not gone


def sized(gate):
    """Words of a size that matters in one mode alone; each waits for `gate`."""

    def size(job):
        return float(job.params["length"] if job.params["mode"] == "long" else 1)

    graph = Graph("chat", loop(Stage("say", max_batch=8, emits=True, size=size), times=2))
    return serve(
        graph, {"say": Words(1, gate, 1)}, {"say": table("say", *[0.001] * 8)}, policy=FCFS(drop_hopeless=False)
    )


def size_at_the_head(driver, id):
    return driver.ask(lambda head, now: head._book.requests[id].asked.calls["say"].size).result(30)


def test_what_matters_in_combination_alone_is_noticed_and_the_head_is_told():
    gate = threading.Event()
    gate.set()
    with running(lambda number: sized(gate)) as driver:
        watched = Watched(driver.machines)
        for length in (1, 2, 3):
            assert said(ask(driver, mode="", length=length, voice="a")) == ["a1", "a2"]
        assert said(ask(driver, mode="long", length=5, voice="a")) == ["a1", "a2"]
        assert len(watched.looks) == 3
        gate.clear()
        answer = ask(driver, "other", mode="long", length=9, voice="a")
        until(lambda: watched.looks[-1] == "other" and size_at_the_head(driver, "other") == 9)
        gate.set()
        assert said(answer) == ["a1", "a2"]
        assert said(ask(driver, mode="long", length=7, voice="a")) == ["a1", "a2"]
        assert len(watched.looks) == 5 and adds_up(driver)


def test_a_router_that_reads_arguments_gets_each_request_s_own():
    class ByVoice:
        def route(self, fleet, asked):
            voice = asked.params["voice"]
            return Route(sorted(fleet.instances)[voice == "b"], voice)

    with running(lambda number: chat(Words, number), router=ByVoice()) as driver:
        watched = Watched(driver.machines)
        voices = "ababbbaa"
        for voice in voices:
            assert said(ask(driver, words=1, voice=voice)) == [f"{voice}1"]
        assert len(watched.looks) == len(voices)
        routed = [event for event in driver.events if isinstance(event, Routed)]
        assert [event.instance[-1] for event in routed] == ["1" if voice == "a" else "2" for voice in voices]


@pytest.mark.parametrize("rule", [each for each in ROUTERS.values() if each is not Prefix])
def test_routers_that_say_that_they_read_no_arguments_do_not(rule):
    class Unread(dict):
        def get(self, *args):
            raise AssertionError("read")

        __getitem__ = __iter__ = items = keys = get

    assert not reads_params(rule())
    fleet = Head([], {}, rule()).fleet
    fleet.add(Instance("one", 0, "whole", "toy", frozenset(("say",)), Outlook("one"), 0.0, 0.0))
    fleet.rates["toy"] = Rates({"say": table("say", 0.1)})
    asked = replace(described().asked, params=Unread())
    assert rule().route(fleet, asked).instance == "one"


def test_who_is_routed_by_a_guess_is_refused_where_it_comes_to(monkeypatch):
    with running(lambda number: chat(Words, number)) as driver:
        assert said(ask(driver, words=2, voice="a")) == ["a1", "a2"]
        for instance in driver.machines.instances.values():

            def refuse(*args, id, **kwargs):
                raise RequestError(f"request {id}: the voice is hoarse")

            monkeypatch.setattr(instance.service, "ask", refuse)
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
