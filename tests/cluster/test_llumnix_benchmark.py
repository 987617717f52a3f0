"""benchmarks/llumnix.py: claims made of the paper's points, the artifact's requests, a small run."""

from __future__ import annotations

import json
import sys
from dataclasses import replace

import numpy as np
import pytest


@pytest.fixture(scope="module")
def bench(root):
    sys.path.insert(0, str(root / "benchmarks"))
    try:
        import llumnix
        import llumnix_claims
        import llumnix_system
    finally:
        sys.path.remove(str(root / "benchmarks"))
    return llumnix, llumnix_claims, llumnix_system


def test_the_formulas_make_the_papers_claims_of_its_points(bench):
    _, claims, _ = bench
    paper = bench[0].PAPER
    assert "up to 7.74x (mean) and 14.82x (P99)" in claims.claim_11(paper["fig11"])
    assert "high, prefill: up to 8.61x (mean)" in claims.claim_13(paper["fig13"])
    assert "P99 of prefill: up to 12.19x" in claims.claim_14(paper["fig14"])


def test_at_equal_p99_the_papers_points_save_a_fifth_and_not_a_third(bench):
    paper = bench[0].PAPER["fig15"]
    assert bench[1].saving(paper) == pytest.approx(0.206, abs=0.001)
    assert pytest.approx(0.3649, abs=0.001) == 14.25 / 10.44 - 1, "two points with unlike P99"
    with pytest.raises(ValueError, match="no two points around a P99 of 99 s"):
        bench[1].at_equal(paper["llumnix"], 99.0)


@pytest.mark.parametrize("kind", ["S", "M", "L"])
def test_lengths_have_the_mean_of_their_kind_and_a_long_tail(bench, kind):
    mean, _ = bench[2].LENGTHS[kind]
    drawn = bench[2].lengths(kind, 10_000, np.random.RandomState(0xCADE))
    assert 0.8 * mean < drawn.mean() < 1.05 * mean
    assert drawn.min() >= 1 and np.percentile(drawn, 99) > 5 * np.median(drawn)


def test_a_small_run_answers_all_and_moves_only_in_llumnix(bench):
    _, _, system = bench
    setting = system.Setting("S-S", 40.0, "infaas++", count=10)
    before = system.run(setting)
    after = system.run(replace(setting, system="llumnix"))
    assert before["instances"] == after["instances"] == pytest.approx(16.0)
    assert before["moves"] == 0
    assert after["preemption_loss"] <= before["preemption_loss"]
    assert system.run(setting) == before


def test_figure_10_is_measured_on_moves(bench, tmp_path, capsys):
    bench[0].figure_10(tmp_path)
    ours = json.loads((tmp_path / "figure10.json").read_text())
    assert ours["recompute"] == bench[0].PAPER["fig10"]["recompute"]["7b"]
    assert all(
        0 < live < copy / 10 for live, copy in zip(ours["migration_downtime"], ours["blocking_copy"], strict=True)
    )
    assert "downtime at most" in (tmp_path / "figure10.claim").read_text()
