"""The commands on a real Ray."""

from __future__ import annotations

import pytest

ray = pytest.importorskip("ray", reason="needs the extra 'ray'")
if not hasattr(ray, "init"):
    pytest.skip("needs the extra 'ray'", allow_module_level=True)

from toys import command, results, toy  # noqa: E402

pytestmark = pytest.mark.ray


def test_run_serves_what_is_simulated(nodes, tmp_path):
    out, section = tmp_path / "out.json", {"engine": "ray", "address": nodes, "instances": 2, "router": "round_robin"}
    done = command("run", toy(tmp_path, cluster=section), "--json", out)
    assert done.status == 0, done.err
    (entry,) = results(out)
    assert entry["counts"]["on_time"] == entry["simulated"]["counts"]["on_time"] == 10
    assert set(entry["members"]) == {"whole-1", "whole-2"} and set(entry["batch_size"]) == {"draw", "decode"}
    assert entry["cluster"]["instances"] == pytest.approx(2.0, rel=0.05)
