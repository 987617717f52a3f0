"""Numbers of things that the scripts under benchmarks/ take: one that is none is told by its option."""

from __future__ import annotations

import argparse
import importlib

import pytest


@pytest.fixture
def at_least_one(root, monkeypatch):
    monkeypatch.syspath_prepend(str(root / "benchmarks"))
    return importlib.import_module("arguments").at_least_one


def test_a_number_of_things_is_at_least_one(at_least_one, capsys):
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=at_least_one)
    assert parser.parse_args(["--rounds", "3"]).rounds == 3
    for wrong in ("0", "-1", "2.5", "x", ""):
        with pytest.raises(SystemExit):
            parser.parse_args([f"--rounds={wrong}"])
        assert f"argument --rounds: {wrong!r}: expected a whole number, at least 1" in capsys.readouterr().err
