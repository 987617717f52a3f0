"""The Grafana dashboard and the Prometheus rules: they parse, and name only what there is."""

from __future__ import annotations

import json
import re

import pytest
import yaml

pytest.importorskip("starlette", reason="needs the extra 'serve'")

from test_metrics import TABLE

ENDINGS = {"counter": ("_total",), "gauge": ("",), "histogram": ("_bucket", "_sum", "_count")}
SAMPLES = {name + ending: labels for name, (kind, labels) in TABLE.items() for ending in ENDINGS[kind]}
"""Names as queries use them, with their labels."""
ALWAYS = {"instance", "job", "le"}


@pytest.fixture(scope="module")
def folder(root):
    return root / "configs/observability"


@pytest.fixture(scope="module")
def dashboard(folder):
    return json.loads((folder / "grafana.json").read_text())


@pytest.fixture(scope="module")
def rules(folder):
    groups = yaml.safe_load((folder / "recording_rules.yml").read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


def queries(dashboard):
    panels = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    return panels + [each["definition"] for each in dashboard["templating"]["list"] if each["type"] == "query"]


def names(query):
    return re.findall(r"(?<![\w:])neustream:(\w+)", query)


def check(query, known=()):
    """Names, labels and brackets of a query are right."""
    assert names(query) or any(name in query for name in known), query
    labels = set(ALWAYS)
    for name in names(query):
        assert name in SAMPLES, f"{name} in {query}"
        labels |= set(SAMPLES[name])
    for group in re.findall(r"\b(?:by|on) \(([^)]*)\)", query):
        assert {each.strip() for each in group.split(",")} <= labels, query
    for inside in re.findall(r"\{([^}]*)\}", query):
        assert set(re.findall(r"(\w+)\s*[=!]", inside)) <= labels, query
    for opening, closing in ("()", "[]", "{}"):
        assert query.count(opening) == query.count(closing), query


def test_each_query_of_the_dashboard_names_what_there_is(dashboard):
    found = queries(dashboard)
    assert len(found) > 30
    for query in found:
        check(query)


def test_panels_are_apart_and_have_titles(dashboard):
    panels = dashboard["panels"]
    assert len({panel["id"] for panel in panels}) == len({panel["title"] for panel in panels}) == len(panels)
    taken = set()
    for panel in panels:
        at = panel["gridPos"]
        cells = {(at["x"] + x, at["y"] + y) for x in range(at["w"]) for y in range(at["h"])}
        assert at["x"] + at["w"] <= 24 and not cells & taken, panel["title"]
        taken |= cells
        assert panel["datasource"]["uid"] == "${source}"


def test_each_rule_names_what_there_is(rules):
    records = [rule["record"] for rule in rules if "record" in rule]
    assert len(set(records)) == len(records) > 10
    for rule in rules:
        check(rule["expr"], records)
        for name in re.findall(r"\b[a-z_]+:neustream_\w+:\w+", rule["expr"]):
            assert name in records, name
        if "record" in rule:
            level = rule["record"].partition(":")[0].split("_")
            grouped = re.findall(r"\bby \(([^)]*)\)", rule["expr"])
            for group in grouped:
                assert set(level) | {"le"} >= set(group.replace(" ", "").split(",")), rule["record"]


def test_alerts_say_how_bad_they_are(rules):
    alerts = [rule for rule in rules if "alert" in rule]
    assert alerts and all(rule["labels"]["severity"] in ("page", "ticket") for rule in alerts)
    assert all(rule["annotations"]["summary"] for rule in alerts)
