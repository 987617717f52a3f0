"""benchmarks/routers.py: its settings, a small run, and that the page is of the kept results."""

from __future__ import annotations

import json

import pytest


@pytest.fixture(scope="module")
def routers(root):
    with pytest.MonkeyPatch.context() as patched:
        patched.syspath_prepend(root / "benchmarks")
        import routers

    return routers


def test_the_page_is_of_the_kept_results(routers, root):
    told = json.loads((root / "benchmarks/results/routers.json").read_text())
    page = (root / "benchmarks/results/routers.md").read_text()
    assert page == routers.table(told["attainment"], told["command"]) + "\n"
    assert list(told["attainment"]) == list(routers.SETTINGS)
    assert routers.kept(root / "benchmarks/results/routers.json", "python another.py") == {}


def test_each_setting_is_a_config_and_one_is_simulated(routers):
    for name in routers.SETTINGS:
        assert routers.experiment(name, "slack", 0, 10).cluster.router == {"slack": {}}
    assert routers.bounds("unlike_15", [0], 5) == 1.0
    found = routers.attainments("slow", [0], 5)
    assert set(found) == set(routers.ROUTERS) and all(0 <= share <= 1 for share in found.values())
