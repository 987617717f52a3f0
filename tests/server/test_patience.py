"""How long requests wait that are promised nothing."""

from __future__ import annotations

import copy
import math
import threading
import time
from functools import partial

import httpx
import pytest

pytest.importorskip("starlette", reason="needs the extra 'serve'")
pytest.importorskip("torch", reason="needs the extra 'llm'")

from serving import serving, stock, text_service

from neustream.core.types import SLO
from neustream.engine.events import Finished, Started, StepInfo
from neustream.server import patience as patience_module
from neustream.server.observe.lives import Life, Lives
from neustream.server.patience import LOOKS, Patience, Progress

LONG = 60.0
EARLY = LONG + LONG / LOOKS
"""By then it has to be seen."""


class Clock:
    """The event loop of a test: timers by a clock that is set."""

    def __init__(self):
        self.now = 0.0
        self._timers = []

    def time(self):
        return self.now

    def call_later(self, seconds, call):
        timer = Timer(self.now + seconds, call)
        self._timers.append(timer)
        return timer

    def go(self, until):
        """Make all calls that are due by then."""
        while due := [timer for timer in self._timers if timer.call and timer.at <= until]:
            first = min(due, key=lambda timer: timer.at)
            self._timers.remove(first)
            self.now = first.at
            first.call()
        self.now = until


class Timer:
    def __init__(self, at, call):
        self.at, self.call = at, call

    def cancel(self):
        self.call = None


class Waiting:
    """A request that waits, and what its client heard when."""

    def __init__(self, monkeypatch, seconds=LONG):
        self.clock = Clock()
        monkeypatch.setattr(patience_module.asyncio, "get_running_loop", lambda: self.clock)
        self.began, self.progress, self.heard = False, Progress(), []
        self.patience = Patience(
            seconds,
            lambda: self.began,
            lambda: self.progress,
            lambda: 7.0,
            lambda why: self.heard.append((self.clock.now, why.status, why.code)),
        )

    def given_up(self, after, status, code):
        """Whether it is given up so long after an instant, and not much later."""
        self.clock.go(after + EARLY + 1e-6)
        ((at, *why),) = self.heard
        assert why == [status, code] and after + LONG <= at + 1e-6


@pytest.fixture(scope="module")
def model():
    return stock()


@pytest.fixture
def waiting(monkeypatch):
    return Waiting(monkeypatch)


def test_who_does_not_begin_comes_again_later(waiting):
    waiting.given_up(0.0, 429, "crowded")


def test_who_has_begun_and_gets_no_further_is_given_up_too(waiting):
    waiting.clock.go(50.0)
    waiting.began, waiting.progress = True, Progress(1)  # a part of its prompt
    waiting.given_up(50.0, 504, "late")


def test_the_time_counts_from_the_latest_output(waiting):
    waiting.began = True
    for at in (30.0, 61.0, 100.0):
        waiting.clock.go(at)
        waiting.patience.outputs += 1
    waiting.given_up(100.0, 504, "late")


def test_a_step_that_takes_long_is_no_reason(waiting):
    waiting.progress = Progress(0, under_way=True)
    waiting.clock.go(1000.0)
    assert waiting.heard == []
    waiting.began, waiting.progress = True, Progress(1)
    waiting.given_up(1000.0, 504, "late")


def test_who_is_over_hears_nothing_more(waiting):
    waiting.patience.end()
    waiting.clock.go(1000.0)
    assert waiting.heard == []


def test_without_a_limit_it_may_wait_for_ever(monkeypatch):
    waiting = Waiting(monkeypatch, None)
    waiting.clock.go(10_000.0)
    assert waiting.heard == []


def step(*ids):
    return StepInfo(1, "gpu", 0, "tiny/decode", ids, (1.0,) * len(ids), 0.0, 1.0, 1.0)


def test_steps_of_a_request_and_of_its_branches_are_its_progress():
    lives = Lives(["tiny"])
    life = lives.open["a"] = Life("a", "tiny", "text", SLO(), 0.0, 1, None, None)
    lives(Started(step("a", "b"), 1.0))
    assert (life.stepped, life.under_way) == (0, 1)
    lives(Finished(step("a", "b"), 2.0, ""))
    assert (life.stepped, life.under_way) == (1, 0)
    lives(Started(step("a/left~2"), 3.0))
    lives(Started(step("a/right~3"), 3.5))
    lives(Finished(step("a/left~2"), 4.0, ""))
    assert (life.stepped, life.under_way) == (2, 1)  # the other branch has not ended
    lives(Finished(step("a/right~3"), 5.0, ""))
    assert (life.stepped, life.under_way) == (3, 0)


def test_a_long_step_is_waited_for_over_http(model):
    slow = copy.deepcopy(model)
    began = threading.Event()  # the trials before are quick
    slow.register_forward_pre_hook(lambda *_: time.sleep(2.5 if began.is_set() else 0))
    load = partial(text_service, slow)
    with serving(load, limits={"patience_s": 1.5}) as (url, said, _):
        said.get(timeout=60)
        began.set()
        answer = httpx.post(f"{url}/v1/completions", json={"prompt": "x", "max_tokens": 1}, timeout=60)
        assert answer.status_code == 200 and math.isfinite(answer.json()["usage"]["completion_tokens"])
