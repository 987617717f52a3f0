"""A head with real services as its instances, without Ray: one answer each, whoever dies, hangs or goes."""

from __future__ import annotations

import itertools
import threading
import time
from concurrent.futures import CancelledError
from dataclasses import replace

import pytest
from local_machines import driving
from toys import Step, table

from neustream import FCFS, SLO, Graph, GraphError, RequestError, RequestFailed, Stage, StageFailed, loop, serve
from neustream.cluster.book import Settings
from neustream.cluster.head import Head
from neustream.cluster.rules.fixed import Fixed
from neustream.cluster.rules.round_robin import RoundRobin
from neustream.cluster.rules.slack import Slack
from neustream.engine import faults

PATIENT = Settings(suspect_s=60.0, dead_s=90.0, send_s=60.0, move_timeout_s=60.0, scale_s=0.02)
"""On a busy machine an instance may be silent for a while; only who hangs is found out by that."""
PLACES = itertools.count()


def words(job):
    return job.params["words"]


class Words(Step):
    """Says how many words a request has said. `gate`: its step number `at` waits for it, if there is one."""

    def __init__(self, place, gate=None, at=3):
        super().__init__(self.say)
        self.place, self.gate, self.at = place, gate, at

    def say(self, given):
        said = given.state.get("said", 0) + 1
        if given.params.get("broken"):
            raise LookupError("no such word")
        if self.gate is not None and said == self.at:
            assert self.gate.wait(30)
        voice = given.params["voice"]
        return {"said": said, "word": f"{voice}{said}" if voice != "place" else f"{self.place}"}


class Keeper(Words):
    """Keeps something of requests that it cannot part with."""

    def release(self, id):
        pass


class Proud(Keeper):
    """Parts with what it keeps, and takes nothing that was another's, where it is the second."""

    def export(self, given):
        return self.place

    def adopt(self, given, piece):
        if self.place == 2 != piece:
            raise StageFailed("not invented here")


def chat(kind=Words, *args, stage="say", **options):
    graph = Graph("chat", loop(Stage(stage, max_batch=8, emits=True), times=words))
    profiles = {stage: table(stage, *[0.001] * 8, device="toy")}
    return serve(graph, {stage: kind(*args, **options)}, profiles, policy=FCFS(drop_hopeless=False))


def running(make, count=2, settings=PATIENT, router=None):
    """A driver of `count` instances; `make(number)` makes the service of each."""
    head = Head([], {}, router or RoundRobin(), None, Fixed(count), settings=settings)
    return driving(head, lambda number, kind: make(number), count)


def ask(driver, id=None, slo=None, **params):
    return driver.submit((), params, None, slo, f"r{next(PLACES)}" if id is None else id)


def said(answer):
    return [update["word"] for update in answer]


def home(driver, id):
    """The instance that a request is at, once it is there."""
    return driver.ask(lambda head, now: head._book.requests[id].where).result(30)


def move(driver, id, target):
    """Have a request move; it is held at the end of its step by then."""
    driver.ask(lambda head, now: head.move(id, target, "wanted", now)).result(30)
    until(lambda: driver.ask(lambda head, now: head._book.requests[id].moving.step).result(30) == "hold")


def until(true):
    """Wait for what another thread does."""
    end = time.monotonic() + 30
    while not true():
        assert time.monotonic() < end
        time.sleep(0.001)


def adds_up(driver):
    counts = driver.counts
    ends = counts.on_time + counts.late + counts.dropped + counts.failed + counts.cancelled + counts.refused
    return counts.submitted == ends and not driver.answers


def test_answers_and_streams_are_those_of_a_service():
    with chat(Words, 0) as alone, running(lambda number: chat(Words, number)) as driver:
        wanted = alone.submit(words=4, voice="a")
        answers = [ask(driver, words=4, voice="a") for _ in range(20)]
        for answer in answers:
            assert said(answer) == said(wanted) and answer.result(30) == wanted.result(30)
            assert [output.index for output in answer.outputs] == [0, 1, 2, 3]
        assert adds_up(driver) and driver.counts.on_time == 20
        assert {answer.outputs[0].member for answer in answers} == {"whole-1", "whole-2"}


def test_what_is_wrong_with_a_request_is_raised_as_it_is_there():
    with running(lambda number: chat(Words, number)) as driver:
        with pytest.raises(RequestError, match="parameters are a mapping, got 7"):
            driver.submit((7,), {}, None, None, "a").result(30)
        with pytest.raises(RequestError, match="model='other': allowed: "):
            driver.submit((), {}, "other", None, "a").result(30)
        with pytest.raises(RequestFailed, match=r"stage 'say': LookupError: no such word"):
            ask(driver, words=3, voice="a", broken=True).result(30)
        with pytest.raises(RequestError, match="arguments of a request to a cluster go to other processes"):
            ask(driver, words=3, voice="a", lock=threading.Lock())
        assert adds_up(driver)


def test_an_id_is_open_once_and_free_again():
    gate = threading.Event()
    with running(lambda number: chat(Words, number, gate)) as driver:
        first = ask(driver, "x", words=4, voice="a")
        with pytest.raises(RequestError, match="request id 'x' is already being served"):
            ask(driver, "x", words=4, voice="a")
        gate.set()
        first.result(30)
        assert ask(driver, "x", words=1, voice="b").result(30)["word"] == "b1"


def test_cancel_in_the_middle():
    gate = threading.Event()
    with running(lambda number: chat(Words, number, gate)) as driver:
        answer = ask(driver, words=10**6, voice="a")  # it does not end before its instance hears of it
        reading = iter(answer)
        assert [next(reading)["word"], next(reading)["word"]] == ["a1", "a2"]
        assert answer.cancel()
        gate.set()
        with pytest.raises(CancelledError):
            next(reading)
        assert driver.wait_empty(30) and adds_up(driver) and driver.counts.cancelled == 1


@pytest.mark.parametrize("step", [2, 3, 6])
def test_a_request_that_moves_goes_on_without_a_gap_or_a_repeat(step):
    gate = threading.Event()
    with running(lambda number: chat(Words, number, gate, step)) as driver:
        answer = ask(driver, "m", words=8, voice="place")
        reading = iter(answer)
        for _ in range(step - 1):
            next(reading)  # the step behind the last of these has begun
        source = home(driver, "m")
        target = {"whole-1": "whole-2", "whole-2": "whole-1"}[source]
        move(driver, "m", target)
        gate.set()
        places = said(answer)
        here, there = source[-1], target[-1]
        assert places == [here] * step + [there] * (8 - step)
        assert [output.index for output in answer.outputs] == list(range(8))
        assert driver.counts.moved == 1 and adds_up(driver)


def test_what_cannot_move_says_so_and_goes_on():
    gate = threading.Event()
    with running(lambda number: chat(Keeper, number, gate)) as driver:
        answer = ask(driver, "m", words=10**6, voice="a")
        until(lambda: len(answer.outputs) == 2)  # its step 3 has begun
        target = {"whole-1": "whole-2", "whole-2": "whole-1"}[home(driver, "m")]
        move(driver, "m", target)
        gate.set()
        until(lambda: driver.counts.unmoved)
        until(lambda: len(answer.outputs) > 5)
        assert [output.update["item"]["said"] for output in answer.outputs[:5]] == [1, 2, 3, 4, 5]
        assert answer.cancel() and driver.wait_empty(30) and driver.counts.moved == 0
        [event] = [event for event in driver.events if type(event).__name__ == "Unmoved"]
        assert event.reason.startswith("not movable: ") and "Keeper keeps something of it" in event.reason


def test_one_that_its_target_refuses_goes_on_at_its_source():
    gate = threading.Event()
    with running(lambda number: chat(Proud, number, gate)) as driver:
        answers = [ask(driver, f"m{at}", words=5, voice="place") for at in range(2)]
        until(lambda: all(len(answer.outputs) == 2 for answer in answers))  # their step 3 has begun
        moving = next(answer for answer in answers if home_of(answer) == "whole-1")
        move(driver, moving.id, "whole-2")
        gate.set()
        assert said(moving) == ["1"] * 5 and driver.counts.moved == 0
        [event] = [event for event in driver.events if type(event).__name__ == "Unmoved"]
        assert "not invented here" in event.reason
        assert driver.wait_empty(30) and adds_up(driver)


def test_one_of_two_dies_under_load_and_each_request_has_one_answer():
    gate = threading.Event()
    gates = {1: gate, 2: None, 3: None}
    with running(lambda number: chat(Words, number, gates[number])) as driver:
        answers = [ask(driver, words=6, voice=f"v{at}-") for at in range(100)]
        first = some_of(answers, "whole-1")
        driver.machines.die("whole-1")
        gate.set()
        for at, answer in enumerate(answers):
            assert said(answer) == [f"v{at}-{word + 1}" for word in range(6)]
        assert first.outputs[0].member == "whole-1" != first.outputs[-1].member
        assert adds_up(driver) and driver.counts.on_time == 100
        assert driver.counts.lost == 1 and driver.counts.restarted >= 1
        until(lambda: driver.machines.made == 3)  # another one takes its place


def test_whoever_has_an_answer_finds_what_happened_before_it_counted():
    """A request may begin anew never: its answer and the loss of its instance are of one turn."""
    gate, found = threading.Event(), []
    settings = replace(PATIENT, restarts=0)
    with running(lambda number: chat(Words, number, gate), settings=settings) as driver:
        answer = some_of([ask(driver, words=6, voice="a") for _ in range(2)], "whole-1")

        def look(answer):
            counts = driver.counts
            found.append((counts.lost, counts.failed, driver.states, sorted(driver.places), driver.machines.ended[:]))

        answer.add_done_callback(look)
        driver.machines.die("whole-1")
        with pytest.raises(RequestFailed, match="lost with instance 'whole-1'"):
            answer.result(30)
        gate.set()
        assert found == [(1, 1, {"whole-2": "up"}, ["whole-2"], [])]
        until(lambda: [name for name, _, _ in driver.machines.ended] == ["whole-1"])


def some_of(answers, name):
    """One of some requests of which an instance has made an output; waits for that."""

    def there():
        return [answer for answer in answers if answer.outputs and answer.outputs[0].member == name]

    until(there)
    return there()[0]


def home_of(answer):
    next(iter(answer))
    return answer.outputs[0].member


def test_one_that_hangs_is_ended_and_its_requests_go_on_elsewhere():
    gate = threading.Event()
    gates = {1: gate, 2: None, 3: None}
    quick = Settings(suspect_s=1.0, dead_s=2.0, scale_s=0.02)
    with running(lambda number: chat(Words, number, gates[number]), settings=quick) as driver:
        answers = [ask(driver, words=6, voice="a") for _ in range(10)]
        some_of(answers, "whole-1")
        driver.machines.hang("whole-1")
        assert all(said(answer) == [f"a{at + 1}" for at in range(6)] for answer in answers)
        gate.set()
        [(name, why, kill)] = driver.machines.ended
        assert name == "whole-1" and kill and why == "silent for 2 s"
        assert adds_up(driver)


def test_a_stream_that_comes_out_different_when_it_is_made_again_fails():
    gate = threading.Event()
    gates = {1: gate, 2: None, 3: None}
    with running(lambda number: chat(Words, number, gates[number])) as driver:
        answers = [ask(driver, words=6, voice="place") for _ in range(2)]
        lost = next(answer for answer in answers if home_of(answer) == "whole-1")
        until(lambda: len(lost.outputs) == 2)
        driver.machines.die("whole-1")
        gate.set()
        with pytest.raises(RequestFailed, match="output 0 came out different when it was made again"):
            lost.result(30)
        assert driver.wait_empty(30) and adds_up(driver)


def test_an_instance_that_is_drained_gives_its_requests_away():
    gate = threading.Event()
    with running(lambda number: chat(Words, number, gate if number == 1 else None)) as driver:
        answers = [ask(driver, words=6, voice="a") for _ in range(6)]
        some_of(answers, "whole-1")
        driver.ask(lambda head, now: head.drain("whole-1", now)).result(30)
        gate.set()
        assert all(said(answer) == [f"a{at + 1}" for at in range(6)] for answer in answers)
        assert adds_up(driver) and driver.counts.restarted == 0


def test_make_that_raises_and_graphs_that_differ():
    def raises(number):
        if number == 2:
            raise OSError("no such checkpoint")
        return chat(Words, number)

    def differs(number):
        return chat(Words, number, stage="say" if number == 1 else "tell")

    with pytest.raises(OSError, match="no such checkpoint"), running(raises):
        pass
    differing = r"instance 'whole-2': its graph 'chat' has print \w+; the one here has"
    with pytest.raises(GraphError, match=differing), running(differs):
        pass


def test_promises_count_from_the_caller_s_request():
    with running(lambda number: chat(Words, number)) as driver:
        late = ask(driver, words=3, voice="a", slo=SLO(total=1e-6)).outcome(30)
        assert late.status == "done" and not late.on_time and late.latency_s > 0
        assert ask(driver, words=3, voice="a", slo=SLO(total=30.0)).outcome(30).on_time


class Broken(Words):
    """Fails all of its steps until it is mended, where it is the first."""

    mended = False

    def say(self, given):
        if self.place == 1 and not Broken.mended:
            raise RuntimeError("the device fell off the bus")
        return super().say(given)


def test_an_instance_whose_steps_fail_at_once_is_passed_over(monkeypatch):
    """It has the least work of all, and is the first, so the default router would give it every request."""
    monkeypatch.setattr(Broken, "mended", False)
    with running(lambda number: chat(Broken, number), router=Slack()) as driver:
        fates = [ask(driver, words=2, voice="place").outcome(30).status for _ in range(60)]
        assert 3 <= fates.count("failed") < 30 and driver.states == {"whole-1": "up", "whole-2": "up"}
        assert driver.wait_empty(30) and adds_up(driver)


def test_an_instance_that_was_passed_over_serves_again_once_it_is_mended(monkeypatch):
    monkeypatch.setattr(Broken, "mended", False)
    monkeypatch.setattr(faults, "DOUBLINGS", 0)
    with running(lambda number: chat(Broken, number), router=Slack()) as driver:
        while ask(driver, words=1, voice="place").outcome(30).status == "failed":
            pass
        Broken.mended = True
        until(lambda: said(ask(driver, words=1, voice="place")) == ["1"])


def test_where_all_fail_requests_fail_and_nobody_waits(monkeypatch):
    monkeypatch.setattr(Broken, "mended", False)
    with running(lambda number: chat(Broken, 1), router=Slack()) as driver:
        for _ in range(12):
            assert ask(driver, words=2, voice="place").outcome(30).status == "failed"


def test_whoever_waits_when_it_is_closed_hears_of_it():
    gate = threading.Event()
    with running(lambda number: chat(Words, number, gate)) as driver:
        answer = ask(driver, words=6, voice="a")
        next(iter(answer))
        driver.close()
        with pytest.raises(RequestError, match="the cluster was closed"):
            answer.result(30)
        gate.set()
