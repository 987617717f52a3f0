"""Policies by name: one way to make them, the same errors wherever the name comes from."""

from __future__ import annotations

import pytest
from toys import Newest, Plain, toy

from neustream import EDF, ConfigError, Priced
from neustream.backends.vllm.settings import Settings
from neustream.backends.vllm.settings import build_policy as of_settings
from neustream.by_name import load_object, make_policy, parameters_of, policy_class
from neustream.config import load_experiment
from neustream.experiment import build_policy


def test_a_policy_is_a_name_or_an_object():
    assert make_policy() == make_policy("default") == make_policy("priced") == Priced()
    assert make_policy("edf", {"drop_hopeless": False}) == EDF(drop_hopeless=False)
    assert make_policy("toys:Newest", {"max_batch": "3"}) == Newest(3)
    assert isinstance(make_policy("toys:Plain"), Plain)
    rule = EDF()
    assert make_policy(rule) is rule


def test_a_policy_gets_those_ready_parameters_that_it_has():
    assert make_policy("neustream", ready={"slo_scale": 3.0, "other": 1}).slo_scale == 3.0
    assert make_policy("edf", ready={"slo_scale": 3.0}) == EDF()
    assert isinstance(make_policy("toys:Plain", ready={"slo_scale": 3.0}), Plain)


def test_parameters_are_known_of_dataclasses():
    assert parameters_of(policy_class("clockwork")) == ["max_batch", "lead_s", "plan"]
    assert parameters_of(policy_class("toys:Plain")) is None


WRONG = [
    ("fcsf", {}, "unknown policy 'fcsf'; did you mean 'fcfs'? allowed: clockwork, default, edf, fcfs, "),
    ("", {}, "unknown policy ''; allowed: clockwork, default"),
    ("edf", {"drop_hopless": 1}, "unknown parameter 'drop_hopless'; did you mean 'drop_hopeless'? allowed: drop_hope"),
    ("edf", {"drop_hopeless": "perhaps"}, ".drop_hopeless: Input should be a valid boolean"),
    ("no_module:Thing", {}, "policy 'no_module:Thing': No module named 'no_module'"),
    ("toys:Thing", {}, "policy 'toys:Thing': module 'toys' has no attribute 'Thing'"),
    ("toys:Plain", {"x": 1}, "Plain() takes no arguments"),
    ("builtins:dict", {}, "policy 'builtins:dict' makes a dict, which has no decide(view)"),
    (":", {}, "policy ':': Empty module name"),
]


@pytest.mark.parametrize(("name", "parameters", "message"), WRONG)
def test_what_is_wrong_is_the_same_wherever_it_stands(tmp_path, name, parameters, message):
    places = {
        "given": lambda: make_policy(name, parameters, where="given"),
        f"policies.{name}": lambda: build_policy(load_experiment(toy(tmp_path, policies={name: parameters})), name),
        "options": lambda: of_settings(Settings(policy=name, options=parameters)),
    }
    told = {}
    for where, make in places.items():
        with pytest.raises(ConfigError) as error:
            make()
        told[where] = str(error.value).removeprefix(where)
        assert message in told[where], where
    assert len(set(told.values())) == 1


@pytest.mark.parametrize("policy", [EDF, 3, b"edf", ["edf"], {"edf": {}}, object()])
def test_what_is_no_policy_is_told(policy):
    with pytest.raises(ConfigError, match=r"policy must be an object with decide\(view\), a name or module:Class, got"):
        make_policy(policy)


def test_an_object_takes_no_parameters():
    with pytest.raises(ConfigError, match="policy EDF is made already and takes no parameters"):
        make_policy(EDF(), {"drop_hopeless": False})


def test_a_parameter_that_no_text_can_be_is_told():
    with pytest.raises(ConfigError, match=r"^here\.plan: "):
        make_policy("clockwork", {"plan": {"unet": 3}}, where="here")


def test_types_of_a_policy_of_ones_own_that_nobody_knows(tmp_path, monkeypatch):
    (tmp_path / "odd_types.py").write_text(
        "from __future__ import annotations\n"
        "from dataclasses import dataclass\n"
        "@dataclass\nclass Odd:\n    x: Nowhere = 1\n    def decide(self, view): ...\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert make_policy("odd_types:Odd").x == 1
    with pytest.raises(ConfigError, match=r"^here: the types of its parameters: name 'Nowhere' is not defined"):
        make_policy("odd_types:Odd", {"x": 2}, where="here")


def test_an_object_of_a_module():
    assert load_object("toys:Newest", "policy") is Newest
