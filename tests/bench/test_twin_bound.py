"""How near what was on time is to the most that could be: `--bound`."""

from __future__ import annotations

import json

import pytest
from toys import command, toy

from neustream.bench import read_runs
from neustream.bench.reports.building import reports
from neustream.bench.summary import bound_ratio

pytest.importorskip("scipy", reason="needs the extra 'analysis'")
pytestmark = pytest.mark.usefixtures("unhurried")
IMAGES = ["--dataset-name", "images", "--image-steps", "2,4", "--num-prompts", "12", "--seed", "3"]
SERVE = ["bench", "serve", "--config", "toy.yaml", "--bound"]


@pytest.fixture
def here(tmp_path, monkeypatch):
    toy(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("policy", ["fcfs", "priced"])
def test_what_is_simulated_is_held_against_the_bound(here, policy):
    how = ["--backend", "neustream", "--request-rate", "2000", "--goodput", "e2el:12", "-p", policy]
    done = command(*SERVE, *IMAGES, *how, "--out", "out", "--json", "told.json")
    assert done.status == 0 and "of the bound" in done.out, done.err
    ((run,), _) = read_runs(here / "out")
    told = json.loads((here / "told.json").read_text())
    met, bound = told["slo_attainment"]["number"], run.meta["bound"]
    assert 0 < met <= bound["value"] < 12  # more came than could be served
    assert told["bound_ratio"] == met / bound["value"]
    block = reports([run])[0].content()["results"]["observability"]["neustream_slo"]
    assert block["bound_ratio"] == told["bound_ratio"]


def test_what_a_server_kept_is_held_against_the_profiles(here):
    pytest.importorskip("httptools", reason="needs the extra 'bench'")
    from stub import Stub

    with Stub() as stub:
        how = ["--base-url", stub.url, "--model", "image", "--request-rate", "200", "--goodput", "e2el:20000"]
        done = command(*SERVE, *IMAGES, *how, "--json", "told.json")
    assert done.status == 0, done.err
    assert json.loads((here / "told.json").read_text())["bound_ratio"] == 1.0


def test_a_bound_that_a_solver_only_claims_gives_way_to_what_is_proven():
    bound = {"value": 4.0, "proven": 5.0}
    assert [bound_ratio(met, bound) for met in (2, 4, 5)] == [0.5, 1.0, 1.0]
    assert bound_ratio(0, {"value": 0.0, "proven": 0.0}) is None


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--goodput", "e2el:9"], "--bound: needs arrivals"),
        (["--request-rate", "9"], "--bound: needs --goodput or --slo-class"),
        (["--request-rate", "9", "--goodput", "e2el:9", "--set", "simulation.latency_noise=0.1"], "toy.yaml"),
        (
            ["--request-rate", "9", "--goodput", "e2el:9", "--dataset-name", "sessions"],
            "--bound: turns of conversations",
        ),
    ],
)
def test_what_has_no_bound_is_named(here, more, says):
    done = command(*SERVE, *IMAGES, "--backend", "neustream", *more)
    assert done.status == 2 and says in done.err, done.err


def test_a_bound_needs_profiles():
    done = command("bench", "serve", "--model", "m", "--request-rate", "9", "--goodput", "e2el:9", "--bound")
    assert done.status == 2 and "--bound: needs --config" in done.err
