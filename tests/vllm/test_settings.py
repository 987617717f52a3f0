"""SLOs in extra_args, and the scheduler's settings; none of it needs vLLM, so it runs in every install."""

from __future__ import annotations

import math

import pytest

from neustream.backends.vllm.settings import Settings, build_policy, load
from neustream.backends.vllm.slo_args import promised, read, slo
from neustream.core.policies import EDF, Priced
from neustream.core.types import SLO
from neustream.errors import ConfigError, RequestError


def test_what_slo_makes_is_what_is_read():
    args = slo(ttft_ms=200, tpot_ms=40, total_ms=9_000, weight=2)
    assert read({"other": 1, **args}, SLO()) == (SLO(total=9.0, first=0.2, step=0.04, weight=2.0), {})
    assert read(slo(), SLO()) == read(None, SLO()) == (SLO(), {})


@pytest.mark.parametrize("wrong", [0, -1, math.nan, math.inf, 1e10, "200", True, [200]])
def test_the_library_refuses_impossible_values(wrong):
    with pytest.raises(RequestError, match="ttft_ms must be"):
        slo(ttft_ms=wrong)


def test_a_tpot_alone_is_refused():
    with pytest.raises(RequestError, match="tpot_ms=40 needs ttft_ms"):
        slo(tpot_ms=40)


@pytest.mark.parametrize("wrong", [0, -1, math.nan, math.inf, 1e10, "200", True, None, [200], {"a": 1}])
def test_at_the_edge_they_are_ignored_and_counted(wrong):
    got, faults = read({"slo_ttft_ms": wrong, "slo_total_ms": 500}, SLO())
    assert got == SLO(total=0.5)
    assert len(faults) == 1 and next(iter(faults)).startswith("slo_ttft_ms must be")


def test_a_misspelt_key_is_ignored_with_a_hint_under_one_kind():
    got, faults = read({"slo_tftt_ms": 5, "slo_banana": 6, "slo_" + "x" * 5_000: 7}, SLO(total=1.0))
    assert got == SLO(total=1.0)
    assert list(faults) == ["unknown key"] and len(faults["unknown key"]) < 200


@pytest.mark.parametrize("extra", [None, {}, "text", 5, [1], {5: 6}])
def test_extra_args_of_any_type_are_survived(extra):
    assert read(extra, SLO(first=1.0)) == (SLO(first=1.0), {})


def test_defaults_fill_what_a_request_leaves_out():
    default = SLO(first=0.5, step=0.05)
    assert read({"slo_ttft_ms": 100}, default)[0] == SLO(first=0.1, step=0.05)
    assert read({"slo_tpot_ms": 10}, default)[0] == SLO(first=0.5, step=0.01)
    assert read({"slo_tpot_ms": 10}, SLO()) == (
        SLO(),
        {"slo_tpot_ms without slo_ttft_ms": "slo_tpot_ms needs slo_ttft_ms: token k is due at ttft + k * tpot"},
    )


def test_a_weight_alone_promises_nothing():
    got, faults = read({"slo_weight": 5}, SLO())
    assert got.weight == 5.0 and not promised(got) and not faults
    assert promised(SLO(total=1.0)) and promised(SLO(first=1.0))


def test_settings_come_from_vllms_additional_config(tmp_path):
    assert load({}) == load(None) == load({"other": 1}) == Settings()
    file = tmp_path / "neustream.yaml"
    file.write_text(
        "policy: edf\noptions: {drop_hopeless: false}\nprofile: steps.json\nslo: {ttft_ms: 500, tpot_ms: 50}\n"
    )
    settings = load({"neustream": {"config": str(file), "log_every_s": 5}})
    assert settings.profile == tmp_path / "steps.json" and settings.log_every_s == 5
    assert settings.slo.slo() == SLO(first=0.5, step=0.05)
    assert build_policy(settings) == EDF(drop_hopeless=False)
    assert isinstance(build_policy(Settings()), Priced)


@pytest.mark.parametrize(
    "raw, says",
    [
        ("edf", "expected a mapping"),
        ({"polcy": "edf"}, "unknown key 'polcy'; did you mean 'policy'"),
        ({"slo": {"tftt_ms": 5}}, "unknown key 'slo.tftt_ms'; did you mean 'ttft_ms'"),
        ({"slo": {"ttft_ms": -5}}, "slo.ttft_ms.*got -5"),
        ({"slo": {"ttft_ms": "5"}}, "slo.ttft_ms.*got '5'"),
        ({"slo": {"tpot_ms": 5}}, "tpot_ms needs ttft_ms"),
        ({"log_every_s": 0}, "log_every_s"),
        ({"config": 5}, "path of a YAML file, got 5"),
        ({"config": "missing.yaml"}, "missing.yaml: No such file"),
    ],
)
def test_wrong_settings_are_named(raw, says):
    with pytest.raises(ConfigError, match=says):
        load({"neustream": raw})


@pytest.mark.parametrize("text, says", [("- edf", "expected a mapping"), ("a: [", "neustream.yaml: line 1: while")])
def test_a_file_that_is_none_is_named(tmp_path, text, says):
    file = tmp_path / "neustream.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=says):
        load({"neustream": {"config": str(file)}})


@pytest.mark.parametrize(
    "given, says",
    [
        ({"policy": "edff"}, "unknown policy 'edff'; did you mean 'edf'"),
        ({"policy": "edf", "options": {"drop": True}}, "options: unknown parameter 'drop'; allowed: drop_hopeless"),
        (
            {"policy": "edf", "options": {"drop_hopeless": "maybe"}},
            "options.drop_hopeless: Input should be .*got 'maybe'",
        ),
        ({"policy": "no.such:Policy"}, "no.such:Policy"),
        ({"policy": "builtins:dict"}, "no decide"),
    ],
)
def test_wrong_policies_are_named(given, says):
    with pytest.raises(ConfigError, match=says):
        build_policy(Settings(**given))
