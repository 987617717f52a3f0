"""Overrides: what they change, what they drop, and what they cannot do; all paper configs can be switched."""

from __future__ import annotations

from pathlib import Path

import pytest
from toys import adds_up, command, toy

from neustream import ConfigError
from neustream.config import load_experiment
from neustream.config.overrides import override
from neustream.experiment import prepare, simulate

ROOT = Path(__file__).parent.parent
PAPER = sorted((ROOT / "configs/paper").glob("*.yaml"))
VALUES = {"a": {"b": 1, "c.d": {"e": 2}}, "list": [{"x": 1}, 5], "free": {"k": {"n": 1}}, "text": "t"}


def changed(text):
    before = repr(VALUES)
    values, _ = override(VALUES, text, {"a": ["n.m"]}, [("free",)])
    assert repr(VALUES) == before
    return values


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a.b=2", {"a": {"b": 2, "c.d": {"e": 2}}}),
        ("a.c.d.e=[1]", {"a": {"b": 1, "c.d": {"e": [1]}}}),
        ('a."c.d".e=1e3', {"a": {"b": 1, "c.d": {"e": 1000.0}}}),
        ('a."c.x"=1', {"a": {"b": 1, "c.d": {"e": 2}, "c.x": 1}}),
        ("a.n.m=1", {"a": {"b": 1, "c.d": {"e": 2}, "n.m": 1}}),
        ("a.b=null", {"a": {"c.d": {"e": 2}}}),
        ("a.b=", {"a": {"c.d": {"e": 2}}}),
        ("a.zz.y=null", {}),
        ("a={}", {"a": {}}),
        ("new.deep.key=x = y", {"new": {"deep": {"key": "x = y"}}}),
        ("list.0.x=3", {"list": [{"x": 3}, 5]}),
        ("list.0=null", {"list": [5]}),
        ("list.1=7", {"list": [{"x": 1}, 7]}),
        ("free.k.n=null", {"free": {"k": {"n": None}}}),
        ("free.k=null", {"free": {}}),
    ],
)
def test_what_an_override_changes(text, expected):
    assert changed(text) == {**VALUES, **expected}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a.b", "--set 'a.b': expected dotted.key=value"),
        ("=1", "--set '=1': expected dotted.key=value"),
        (".a=1", "expected dotted.key=value"),
        ("a..b=1", "expected dotted.key=value"),
        ("a.=1", "expected dotted.key=value"),
        ('a"b=1', "expected dotted.key=value"),
        ("text.x=1", "--set text.x=1: 'text' is not a section"),
        ("list.2=1", "--set list.2=1: '2' is no entry of that list; allowed: 0 to 1"),
        ("list.x=1", "'x' is no entry of that list"),
        ("list.1.x=1", "'1' is not a section"),
        ("a.b=[1", "--set a.b=[1: line 1: while parsing a flow sequence"),
        ("a.b={x: 1, x: 2}", "key 'x' is given twice"),
        ("a.b=" + "9" * 5000, "a number of 5000 characters"),
        ("a.b=" + "[" * 2000, "deeper than"),
        ("a.b=&a [*a]", "an anchor that contains itself"),
    ],
)
def test_what_an_override_cannot_do(text, message):
    with pytest.raises(ConfigError) as error:
        changed(text)
    assert message in str(error.value)
    assert len(str(error.value)) < 250


def test_overrides_are_a_list(tmp_path):
    with pytest.raises(ConfigError, match="overrides are a list of texts"):
        load_experiment(toy(tmp_path), "workload.rate=1")


# -- on configs -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("workload.ratee=null", "--set workload.ratee=null: unknown key 'workload.ratee'; did you mean 'rate'?"),
        ("stages.drw=null", "unknown key 'stages.drw'; did you mean 'draw'? allowed: decode, draw"),
        ("policies.edf=null", "unknown key 'policies.edf'; allowed: fcfs"),
        ("nonsense=null", "unknown key 'nonsense'; "),
    ],
)
def test_dropping_what_there_cannot_be(tmp_path, text, message):
    with pytest.raises(ConfigError) as error:
        load_experiment(toy(tmp_path), [text])
    assert message in str(error.value)


def test_dropping_what_could_be_there_is_fine(tmp_path):
    path = toy(tmp_path)
    assert load_experiment(path, ["workload.load=null", "slo.scale=null"]) == load_experiment(path)


def test_anchors_of_a_config_have_a_place_of_their_own(tmp_path):
    path = toy(tmp_path)
    text = path.read_text().replace("slo:\n  total_s: 30\n", "")
    path.write_text(
        f"x-slo: &tight {{scale: 2, weight: 3}}\n{text}"
        "slo:\n  classes:\n  - {<<: *tight, name: gold}\n  - {<<: *tight, scale: 9, name: plain}\n"
    )
    gold, plain = load_experiment(path, ["slo.classes.1.weight=5"]).slo.classes
    assert (gold.name, gold.scale, gold.weight) == ("gold", 2, 3)
    assert (plain.name, plain.scale, plain.weight) == ("plain", 9, 5)


def test_an_error_names_the_line_unless_the_value_is_an_overrides(tmp_path):
    path = toy(tmp_path, workload={"rate": -1, "steps": {"min": 1}})
    line = path.read_text().splitlines().index("  rate: -1") + 1
    with pytest.raises(ConfigError) as error:
        load_experiment(path)
    assert str(error.value).startswith(f"{path}: line {line}: workload.rate: Input should be")
    with pytest.raises(ConfigError) as error:
        load_experiment(path, ["workload.rate=-2", "workload.steps=1"])
    assert str(error.value).startswith(f"{path}: workload.rate: Input should be") and "got -2" in str(error.value)


SWITCHES = {
    "load": (
        ["workload.load=1.5"],
        ["workload.rate=null"],
        "drop one: --set workload.load=null or --set workload.rate",
    ),
    "trace": (
        ["workload.trace=t.csv"],
        ["workload.arrivals=null", "workload.rate=null", "workload.cv=null", "workload.requests=null"],
        "drop it: --set workload.arrivals=null --set workload.rate=null --set workload.cv=null",
    ),
    "total": (["slo.total_s=30"], ["slo.scale=null"], "drop one: --set slo.scale=null or --set slo.total_s=null"),
    "classes": (["slo.classes=[{scale: 2}, {share: 3}]"], ["slo.scale=null"], "--set slo.scale=null"),
}


@pytest.mark.parametrize("what", SWITCHES)
@pytest.mark.parametrize("path", [p for p in PAPER if "opt_" not in p.stem], ids=lambda path: path.stem)
def test_every_paper_config_can_be_switched_and_says_what_to_drop(tmp_path, monkeypatch, path, what):
    monkeypatch.chdir(tmp_path)
    Path("t.csv").write_text("arrival_s\n" + "".join(f"{at}\n" for at in range(7)))
    new, drop, hint = SWITCHES[what]
    with pytest.raises(ConfigError) as error:
        prepare(load_experiment(path, new))
    assert hint in str(error.value)
    experiment = load_experiment(path, [*new, *drop, *(["workload.requests=7"] if what != "trace" else [])])
    assert len(prepare(experiment).requests) == 7


@pytest.mark.parametrize("path", [p for p in PAPER if "opt_" in p.stem], ids=lambda path: path.stem)
def test_every_paper_config_of_a_language_model_can_be_switched(path):
    few = ["workload.requests=5"]
    with pytest.raises(
        ConfigError, match=r"step_scale needs first_scale or first_s.*drop it: --set slo\.step_scale=null"
    ):
        load_experiment(path, ["slo.first_scale=null"])
    for settings in (
        ["slo.first_scale=null", "slo.step_scale=null", "slo.total_s=5"],
        ["slo.first_scale=null", "slo.first_s=0.5"],
        ["slo={classes: [{first_s: 1, step_s: 0.1}, {name: batch}]}"],
        ["slo=null"],
        ["workload.load=1", "workload.rate=null"],
    ):
        assert len(prepare(load_experiment(path, [*few, *settings])).requests) == 5


# -- requests without a promise -------------------------------------------------------------------------


@pytest.mark.parametrize("slo", [{}, None, {"classes": [{"name": "batch"}]}])
def test_requests_without_a_promise_are_on_time_whenever_they_end(tmp_path, slo):
    experiment = load_experiment(toy(tmp_path, slo=slo))
    prepared = prepare(experiment)
    assert {request.slo.total for request in prepared.requests} == {float("inf")}
    for policy in ("serial", "static", "fcfs", "edf", "clockwork", "neustream", "least_laxity", "slack_ranked",
                   "symphony", "priced"):  # fmt: skip
        counts = simulate(prepared, policy).to_dict()["counts"]
        assert adds_up(counts) and counts["on_time"] == 10, policy


def test_some_requests_without_a_promise_beside_others(tmp_path):
    slo = {"classes": [{"name": "chat", "total_s": 0.02}, {"name": "batch", "share": 1}]}
    requests = prepare(load_experiment(toy(tmp_path, slo=slo))).requests
    assert {(request.slo.name, request.slo.total) for request in requests} == {("chat", 0.02), ("batch", float("inf"))}


def test_the_title_says_that_nothing_is_promised(tmp_path):
    done = command("simulate", toy(tmp_path), "--set", "slo=null")
    assert done.status == 0, done.err
    assert "toy: gamma 200 req/s, cv 1, no SLO, seed 0" in done.out
