"""benchmarks/agent_demo.py: its tool, its figure, and one run of its agent."""

from __future__ import annotations

import importlib
import sys
import warnings
from types import SimpleNamespace

import pytest
from toys import Flat

pytest.importorskip("torch", reason="needs the extra 'llm'")
pytest.importorskip("PIL", reason="needs the extra 'diffusion'")


@pytest.fixture(scope="module")
def demo(root):
    with pytest.MonkeyPatch.context() as patched, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # transformers' own imports
        patched.syspath_prepend(root / "benchmarks")
        yield importlib.import_module("agent_demo")
        del sys.modules["agent_demo"]


def planned(text):
    return SimpleNamespace(state={"plan": SimpleNamespace(text=text)})


def test_the_tool_draws_the_chart_of_a_plan(demo):
    charts = {demo.draw(planned(text))["chart"].tobytes() for text in ("a", "b", "c", "d", "e", "f")}
    assert 1 < len(charts) <= 3, "plans choose among three programs"


def test_a_program_may_not_do_everything(demo, monkeypatch):
    wrong = ["pen.nothing()", "open('large', 'wb').write(b'x' * (1 << 22))", "b = bytearray(1 << 31)"]
    monkeypatch.setattr(demo, "BODIES", [None])
    for body in wrong:
        monkeypatch.setattr(demo, "BODIES", [body])
        with pytest.raises(RuntimeError, match="the program ended with"):
            demo.draw(planned("a"))


def test_a_run_goes_through_both_models_and_the_tool(demo, tmp_path, monkeypatch):
    mount = demo.TextMount
    monkeypatch.setattr(demo, "TextMount", lambda *args, **more: mount(*args, profile=Flat(), **more))
    with demo.served("priced", tmp_path) as service:
        state = service.submit(question=demo.QUESTIONS[0], model="agent").result(120)
    assert [len(state[name].token_ids) for name in ("plan", "look", "write")] == [demo.PLAN, demo.LOOK, demo.WRITE]
    assert state["chart"].size == (64, 64)
    legs = service.report.to_dict()["legs"]
    assert list(legs) == ["plan", "draw", "look", "write"]
    demo.figure({"priced": service.report.to_dict()}, tmp_path / "path.png")
    assert (tmp_path / "path.png").stat().st_size > 1000
