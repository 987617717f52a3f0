"""What a request that is alone does without: waiting for others at its scheduler's steps, looks in between."""

from __future__ import annotations

from itertools import pairwise
from types import SimpleNamespace

import pytest

torch = pytest.importorskip("torch", reason="needs the extra 'diffusion'")
pytest.importorskip("diffusers", reason="needs the extra 'diffusion'")
from exactness import build, furthest, requests, stock  # noqa: E402

from neustream.backends.diffusers import modules, run  # noqa: E402
from neustream.backends.diffusers.parts import parts_of  # noqa: E402
from neustream.core.batch import StepInput  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


def parked(pipe, some):
    """What runs wait for until their ends, by type; and their results."""
    parts, seen = parts_of(pipe), []

    class Watched(run.Run):
        def resume(self, value=None):
            super().resume(value)
            seen.append(type(self.parked).__name__)

    runs = [Watched(pipe, parts, request.arguments()) for request in some]
    run.encode(runs)
    while ahead := [one for one in runs if one.denoising]:
        run.denoise(ahead)
    run.decode(runs)
    assert [one.error for one in runs] == [None] * len(some)
    return seen, runs


def test_steps_of_a_scheduler_wait_for_nobody_where_there_is_nobody():
    pipe, given = build("stable_diffusion"), requests("stable_diffusion")
    for request in given[:2]:
        seen, (one,) = parked(pipe, [request])
        assert "Call" in seen and "Step" not in seen
        assert torch.equal(one.output.images, stock(pipe, request))


def test_steps_of_a_scheduler_are_shared_while_there_are_two():
    """The shorter one ends first: the rest of the other's steps are its own."""
    pipe, given = build("stable_diffusion"), requests("stable_diffusion")[:2]
    seen, runs = parked(pipe, given)
    short, _ = sorted(one.steps for one in runs)
    assert len({one.steps for one in runs}) == 2 and seen.count("Step") == 2 * short
    assert furthest([one.output.images for one in runs], [stock(pipe, request) for request in given]) < 1e-5


class Clock:
    """Steps of 10 ms, and looks of 1 ms at the models."""

    def __init__(self, monkeypatch):
        self.now = 100.0
        self.looks = []
        monkeypatch.setattr(modules, "stopwatch", lambda: self.now)
        monkeypatch.setattr(modules, "denoise", self.step)
        monkeypatch.setattr(modules, "decode", self.end)

    def step(self, runs, **_):
        self.now += 0.01

    def end(self, runs, **_):
        self.now += 0.01
        for one in runs:
            one.over = True

    def look(self):
        self.now += 0.001
        self.looks.append(self.now)
        return ""

    def serve(self, runs, id, steps):
        """A request of so many steps; when it was looked at the models meanwhile."""
        before, given = len(self.looks), StepInput(id, {}, {}, "")
        for _ in range(steps - 1):
            runs.step("denoise", [given])
        runs.step("decode", [given])
        runs.release(id)
        return self.looks[before:]


def begun(_):
    return SimpleNamespace(over=False, error=None, denoising=True, left=1, output=None, close=lambda: None)


def test_models_are_looked_at_behind_the_first_and_the_last_step_and_else_for_a_share_of_the_time(monkeypatch):
    clock = Clock(monkeypatch)
    runs = modules.Runs(begun, changed=clock.look)
    for at in range(50):
        began = clock.now
        first, last = clock.serve(runs, f"short {at}", 10)
        assert (first - began, last) == (pytest.approx(0.011), clock.now)
    looks = clock.serve(runs, "long", 6000)
    gaps = [after - before for before, after in pairwise(looks)]
    pause = 0.001 / modules.LOOKING
    assert max(gaps) < 2 * pause + 0.02  # many short ones before it do not put it off for long
    assert len(looks) == pytest.approx(60 * modules.LOOKING / 0.001, rel=0.1)
