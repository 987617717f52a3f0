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
        import llumnix_reached
        import llumnix_system
    finally:
        sys.path.remove(str(root / "benchmarks"))
    return llumnix, llumnix_claims, llumnix_system, llumnix_reached


def test_the_formulas_make_the_papers_claims_of_its_points(bench):
    _, claims, *_ = bench
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
    _, _, system, _ = bench
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


def scaled(figure, **times):
    """A figure whose metrics are so many times the paper's, for all systems."""
    return {
        panel: {
            name: {what: [times.get(what, 1.0) * value for value in some] for what, some in of.items()}
            for name, of in systems.items()
        }
        for panel, systems in figure.items()
    }


def verdicts(lines, word):
    return [line.partition(": ")[0] for line in lines if word in line]


def test_what_is_to_be_reached_of_figure_11_is_held_by_the_paper_and_can_fail(bench):
    reached, paper = bench[3], bench[0].PAPER["fig11"]
    lines = reached.reached_11(paper, paper)
    assert set(verdicts(lines, "")) == {"held"}
    assert len(verdicts(lines, "request_mean")) == 14, "points with a mean prefill below 1 s"
    assert len(verdicts(lines, "preemption loss")) == 9, "points where 80 % and more are taken away"
    assert len(verdicts(lines, "knee")) == 2, "INFaaS++ at M-M and L-L"
    slow = reached.reached_11(scaled(paper, request_mean=1.11, decode_mean=0.91), paper)
    assert set(verdicts(slow, "request_mean")) == {"failed"} and set(verdicts(slow, "decode_mean")) == {"held"}
    late = reached.reached_11(scaled(paper, x=1.06), paper)
    assert verdicts(late, "M-M infaas++: knee") == ["failed"]
    lost = scaled(paper)
    lost["M-M"]["llumnix"]["preemption_loss"][0] = 0.3 * lost["M-M"]["infaas++"]["preemption_loss"][0]
    assert verdicts(reached.reached_11(lost, paper), "M-M at 7.4: migration") == ["failed"]


def test_what_is_to_be_reached_of_figure_14_is_the_number_of_instances(bench):
    reached, paper = bench[3], bench[0].PAPER["fig14"]
    lines = reached.reached_14(scaled(paper, instances=1.04), paper)
    assert verdicts(lines, "instances") == ["held"] * 12
    lines = reached.reached_14(scaled(paper, instances=0.94), paper)
    assert verdicts(lines, "instances") == ["failed"] * 12


def test_ratios_of_two_systems_have_the_range_over_seeds(bench):
    by_seed = {"infaas++": [{"m": 2.0}, {"m": 3.0}], "llumnix": [{"m": 1.0}, {"m": 2.0}]}
    assert list(bench[3].ratios(by_seed, ["m"])) == ["m 1.75 (1.50 to 2.00)"]
