"""benchmarks/routers.py and drawn_routers.py: settings that are drawn, moves that take no time."""

from __future__ import annotations

import importlib
import sys

import pytest


@pytest.fixture
def scripts(root, monkeypatch):
    monkeypatch.syspath_prepend(root / "benchmarks")
    names = ("routers", "drawn_routers")
    yield [importlib.import_module(name) for name in names]
    for name in names:
        sys.modules.pop(name, None)


def test_a_seed_draws_the_same_setting_and_each_kind_comes(scripts):
    routers, drawn = scripts
    whats = [drawn.drawn(seed)[0] for seed in range(10)]
    assert whats == [drawn.drawn(seed)[0] for seed in range(10)] and len(set(whats)) == 10
    assert {what.partition(":")[0] for what in whats} == set(drawn.KINDS)
    for seed in range(10):
        made = routers.made_of("drawn", drawn.drawn(seed)[1], "slack", seed, 5)
        assert made.cluster is not None and made.workload.requests == 5


def test_a_line_says_how_far_the_default_is_before_the_best_of_the_others(scripts, monkeypatch, capsys):
    _, drawn = scripts
    counts = iter((7, 6, 9))

    class Told:
        @property
        def counts(self):
            return {"on_time": next(counts)}

    monkeypatch.setattr(drawn, "simulate", lambda prepared, policy: Told())
    given = ["drawn_routers.py", "--first", "4", "--count", "1", "--requests", "10"]
    monkeypatch.setattr(sys, "argv", [*given, "--routers", "slack", "least_work", "tiered"])
    drawn.main()
    assert capsys.readouterr().out.startswith("4 -20.0 {'slack': 7, 'least_work': 6, 'tiered': 9} crash: ")


def test_the_default_has_to_be_among_the_routers(scripts, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["drawn_routers.py", "--routers", "tiered", "least_work"])
    with pytest.raises(SystemExit):
        scripts[1].main()
    assert "slack and at least one other" in capsys.readouterr().err


def test_moves_that_take_no_time_are_simulated(scripts, monkeypatch):
    routers, _ = scripts
    seen = []
    real = routers.simulate
    monkeypatch.setattr(routers, "simulate", lambda prepared, policy: seen.append(real(prepared, policy)) or seen[-1])
    assert 0 < routers.moving("unlike_19", [3], 120) <= 1
    assert sum(seen[0].moves.values()) > 0
