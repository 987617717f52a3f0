"""Agents as configs whose models share devices: who is where, what is simulated, and how each rule does there."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import pytest
import yaml

from neustream import EventLog
from neustream.analysis.took import Took
from neustream.config import load_config
from neustream.errors import ConfigError, ProfileError
from neustream.experiment import prepare, simulate

PROFILES = Path(__file__).parents[1] / "profiles/a6000/opt_13b"
SHARED = """
name: pair
devices: [one]
llms:
  coder: {memory: {tokens: 8000}}
  seer: {memory: {tokens: 16000, block: 32}}
tools: {draw: {latency_s: 0.5, concurrency: 32}}
placement: {coder: [one], seer: [one]}
agent:
  - {llm: coder, name: plan, prompt: 40, output: 12, max_tokens: 12}
  - {tool: draw}
  - {llm: seer, name: look, prompt: 60, images: 1, output: 8, max_tokens: 8}
  - {llm: coder, name: write, prompt: 60, output: 16, max_tokens: 16}
workload: {rate: 0.5, requests: 20, seed: 1}
slo: {total_s: 9}
policies: {edf: {}, priced: {}}
"""
SEE = {
    "format": "neustream.profile/1",
    "stage": "see",
    "kind": "table",
    "origin": {"how": "made up"},
    "batch": [1, 8],
    "latency_s": [0.05, 0.3],
}


@pytest.fixture
def config(tmp_path):
    profiles = tmp_path / "profiles"
    profiles.mkdir()
    steps = (PROFILES / "steps.json").read_text()
    (profiles / "steps.json").write_text(steps)
    (profiles / "other.json").write_text(steps.replace(json.loads(steps)["device"], "another"))
    (profiles / "see.json").write_text(json.dumps({**SEE, "device": json.loads(steps)["device"]}))

    def made(*sets, **changes):
        path = tmp_path / "agent.yaml"
        path.write_text(yaml.safe_dump({**yaml.safe_load(SHARED), "profiles": str(profiles), **changes}))
        return load_config(path, sets)

    return made


def spans(prepared, policy="priced"):
    """(pool, start, end) of the steps of each stage, and the report."""
    log = EventLog()
    report = simulate(prepared, policy, [log])
    found = {}
    for step in log.steps:
        found.setdefault(step["stage"].partition(".")[0], []).append((step["pool"], step["start"], step["end"]))
    return found, report


def test_models_of_one_device_take_turns_there_each_with_its_memory(config):
    prepared = prepare(config())
    device, tool = prepared.pools
    assert (device.name, tool.name) == ("one", "tool draw")
    assert {name: cache.capacity for name, cache in device.kv_caches.items()} == {"coder": 8000, "seer": 16000}
    steps, report = spans(prepared)
    assert report.counts["on_time"] == 20
    both = sorted((start, end) for name in ("coder", "seer") for _, start, end in steps[name])
    assert all(end <= start + 1e-9 for (_, end), (start, _) in pairwise(both))
    apart, _ = spans(prepare(config(devices=1, placement={})))
    assert {pool for some in apart.values() for pool, _, _ in some} == {"coder", "seer", "tool draw"}


def test_a_model_is_on_the_devices_that_it_is_placed_on_or_on_all(config):
    prepared = prepare(config(devices=["one", "two"], placement={"coder": ["two"]}))
    stages = {pool.name: {stage.rpartition(".")[0] for stage in pool.stages} for pool in prepared.pools}
    assert stages == {"one": {"seer.0"}, "two": {"coder", "seer.1"}, "tool draw": {""}}
    assert prepared.instances == 1
    log = EventLog()
    simulate(prepared, "edf", [log])
    for number in range(2):
        ids = {id for step in log.steps if step["stage"].startswith(f"seer.{number}") for id in step["jobs"]}
        assert ids == {f"pair-{at}" for at in range(number, 20, 2)}, "requests take the devices in turns"


def test_images_are_looked_at_before_the_prompt(config):
    log = EventLog()
    report = simulate(prepare(config()), "edf", [log])
    looks = [step for step in log.steps if step["stage"] == "seer.see"]
    assert sorted(id for step in looks for id in step["jobs"]) == sorted(f"pair-{at}" for at in range(20))
    assert all(step["end"] - step["start"] >= 0.05 - 1e-9 for step in looks)
    assert report.counts["on_time"] == 20
    agent = [{"llm": "seer", "prompt": 60, "output": 8}, {"llm": "coder", "prompt": 60, "output": 8}]
    blind = prepare(config(agent=agent))
    assert "seer.see" not in blind.pipeline.stages


@pytest.mark.parametrize(("rate", "total_s", "least"), [(6, 9, 1.0), (2, 5, 1.0), (4, 5, 0.95), (4, 3, 1.0)])
def test_who_goes_on_to_another_model_of_the_device_is_not_kept_from_it(config, rate, total_s, least):
    """What requests were promised at one model was once kept from the same requests at the next."""
    prepared = prepare(config(workload={"rate": rate, "requests": 60, "seed": 1}, slo={"total_s": total_s}))
    edf, priced = (simulate(prepared, policy).counts["on_time"] for policy in ("edf", "priced"))
    assert priced >= least * edf, (edf, priced)


@pytest.mark.parametrize(("rate", "total_s", "least"), [(9, 5, 1.3), (3, 3, 2.0)])
def test_past_capacity_a_device_begins_what_it_can_end(config, rate, total_s, least):
    """Whoever begins delays all others on the device: where all begin, few are in time (three seeds together)."""
    counts = {"edf": 0, "priced": 0}
    for seed in (41, 42, 43):
        prepared = prepare(config(workload={"rate": rate, "requests": 60, "seed": seed}, slo={"total_s": total_s}))
        for policy in counts:
            counts[policy] += simulate(prepared, policy).counts["on_time"]
    assert counts["priced"] >= least * counts["edf"], counts


def test_a_model_has_no_step_that_costs_another_ones_requests_their_time(config):
    """At the edge of capacity, with the most urgent job's step always first, 146 were in time; `edf` has 152."""
    counts = {"edf": 0, "priced": 0}
    for seed in (72, 73, 77):
        prepared = prepare(config(workload={"rate": 4, "requests": 60, "seed": seed}, slo={"total_s": 5}))
        for policy in counts:
            counts[policy] += simulate(prepared, policy).counts["on_time"]
    assert counts["priced"] >= counts["edf"] > 140, counts


def test_as_observed_calls_of_tools_take_what_they_took(config):
    took, log = Took(), EventLog()
    drawn = {"draw": {"latency_s": {"min": 0.2, "max": 2.0}, "concurrency": 32}}
    simulate(prepare(config(tools=drawn)), "edf", [took, log])
    served = {round(step["end"] - step["start"], 6) for step in log.steps if step["stage"] == "draw"}
    again = EventLog()
    expected = {"draw": {"latency_s": 1.1, "concurrency": 32}}  # the mean of what was drawn
    simulate(prepare(config(tools=expected)), "edf", [again], took=took.stretch(0.0))
    seconds = {round(step["end"] - step["start"], 6) for step in again.steps if step["stage"] == "draw"}
    assert seconds <= served and len(seconds) > 15


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"placement": {"codre": ["one"]}}, "placement: no model 'codre'; did you mean 'coder'"),
        ({"placement": {"coder": ["two"]}}, "placement.coder: no device 'two'; allowed: one"),
        ({"placement": {"coder": []}}, "placement.coder: on no device; allowed: one"),
        ({"devices": ["one", "one"]}, "devices: 'one' is named twice"),
        ({"devices": ["one", "two"]}, "devices: no model is on 'two'"),
        ({"llms": {"coder": {"replicas": 2}, "seer": {}}}, "llms.coder.replicas: where there is a placement"),
        ({"llms": {"coder": {"step_tokens": 512}, "seer": {}}}, "models of one device .'one'. need one step_tokens"),
        ({"devices": 1, "cluster": {"instances": 2}}, "give "),
        ({"agent": [{"llm": "seer", "images": -1}]}, "images"),
    ],
)
def test_mistakes_are_told(config, changes, message):
    with pytest.raises(ConfigError, match=message):
        config(**changes)


def test_profiles_of_one_device_are_of_one_device(config):
    llms = {"coder": {}, "seer": {"profile": "other"}}
    with pytest.raises(ProfileError, match="pool 'one' mixes profiles of different devices"):
        prepare(config(llms=llms))
    assert prepare(config("simulation.mixed_devices=true", llms=llms)).requests
