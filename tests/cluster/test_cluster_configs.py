"""The section `cluster` of configs: read, checked, simulated, swept, traced."""

from __future__ import annotations

import json
import re

import pytest
from toys import command, squash, toy

from neustream import ConfigError
from neustream.config import load_config
from neustream.engine.events import Started
from neustream.experiment.clusters import check_rules
from neustream.experiment.prepared import prepare
from neustream.experiment.running import simulate

BASE = """
name: fleet
profiles: {profiles}
stages: {{clip: {{max_batch: 10}}, unet: {{times: steps, max_batch: 15}}, vae: {{profile: [vae, safety]}}}}
workload: {{rate: 4, cv: 2, requests: 40, steps: {{min: 5, max: 10}}}}
slo: {{scale: 4}}
policies: {{priced: {{}}}}
cluster:
  instances: 3
"""


@pytest.fixture
def config(tmp_path, root):
    path = tmp_path / "fleet.yaml"
    path.write_text(BASE.format(profiles=root / "profiles/h100/sd15_512"))
    return path


def run(config, *changes: str, policy: str = "priced", observers=()) -> dict:
    loaded = load_config(config, changes)
    return simulate(prepare(loaded), policy, observers).to_dict()


def test_instances_serve_a_workload_together(config):
    told = run(config)
    assert told["counts"]["submitted"] == 40 and told["attainment"] > 0.9
    assert set(told["members"]) == {"whole-0", "whole-1", "whole-2"}
    assert told["cluster"]["instances"] == pytest.approx(3.0, rel=0.1)


def test_the_same_config_gives_the_same_run(config):
    first, second = run(config, "cluster.router=two_choices"), run(config, "cluster.router=two_choices")
    for told in (first, second):
        del told["cluster"]["routing_us"]
    assert {**first, "decision_us": None} == {**second, "decision_us": None}


def test_instances_learn_what_steps_of_texts_take(root):
    changes = ["workload.requests=30", "cluster.scaler={fixed: {count: 2}}"]
    prepared = prepare(load_config(root / "configs/cluster/opt_scaled.yaml", changes))

    def late(**more):
        steps: dict[str, list[float]] = {}

        def hear(record):
            if isinstance(record, Started):
                steps.setdefault(record.member, []).append(record.step.expected_s / record.step.profiled_s)

        simulate(prepared, "fcfs", [hear], **more)
        return [each[-1] for each in steps.values()]

    assert late(took=lambda batch: 1.5) == pytest.approx([1.5, 1.5], rel=0.05)
    assert late() == [1.0, 1.0]


def test_unlike_devices_have_profiles_of_their_own(config, root):
    other = root / "profiles/rtx4090/sd15_512"
    kinds = f"cluster.instances={{fast: {{count: 1}}, slow: {{count: 1, profiles: {other}}}}}"
    told = run(config, kinds, "cluster.router=round_robin", "simulation.mixed_devices=true", "workload.rate=0.2")
    busy = {name: part["busy_s"] / part["steps"] for name, part in told["members"].items()}
    assert busy["slow-1"] > 1.05 * busy["fast-0"]


def test_faults_are_data_and_who_is_lost_is_replaced(config):
    faults = "cluster.faults=[{at_s: 2, instance: 0, kind: crash}]"
    told = run(config, faults, "cluster.scaler={fixed: {count: 3}}")
    assert [lost["instance"] for lost in told["cluster"]["lost"]] == ["whole-0"]
    assert "whole-3" in told["members"] and sum(told["counts"].values()) == 80


def test_routers_are_compared_as_policies_are_and_moves_are_arrows(config, tmp_path):
    out, trace = tmp_path / "out.json", tmp_path / "trace.json"
    changes = ["cluster.router={slack: {}, random: {}}", "cluster.mover={rescue: {rest_s: 0}}", "workload.rate=9"]
    changes += ["cluster.faults=[{at_s: 1, instance: 0, kind: slow, factor: 20}]"]
    sets = [word for change in changes for word in ("--set", change)]
    done = command("simulate", str(config), *sets, "--json", str(out), "--trace", str(trace), "-q")
    assert done.status == 0, done.out + done.err
    records = json.loads(out.read_text())
    assert [record["policy"] for record in records] == ["priced @ slack", "priced @ random"]
    assert records[1]["cluster"]["moves"]
    events = json.loads((tmp_path / "trace-priced-random.json").read_text())["traceEvents"]
    arrows = [event for event in events if event.get("cat") == "move"]
    assert arrows and {event["ph"] for event in arrows} == {"s", "f"}
    slices = [(e["pid"], e["tid"], e["ts"], e["ts"] + e["dur"]) for e in events if e["ph"] == "X"]
    for arrow in arrows:
        assert any(arrow["pid"] == pid and arrow["tid"] == tid and a <= arrow["ts"] <= b for pid, tid, a, b in slices)


def test_clusters_are_swept(config, tmp_path):
    words = ["sweep", str(config), "--over", "workload.rate", "--values", "2,4", "--out", str(tmp_path / "s")]
    done = command(*words, "--jobs", "1", "-q")
    assert done.status == 0, done.out + done.err
    records = json.loads((tmp_path / "s" / "sweep.json").read_text())
    assert [record["value"] for record in records] == [2, 4] and all("cluster" in record for record in records)


def test_texts_move_and_go_on_behind_what_they_said(tmp_path, root):
    path = tmp_path / "chat.yaml"
    path.write_text(
        f"""
name: chat
profiles: {root / "profiles/a6000/opt_13b"}
llm: {{memory: {{tokens: 6400}}}}
workload: {{rate: 4, requests: 40, prompt: 60, output: {{min: 20, max: 60}}, max_tokens: 60}}
slo: {{first_s: 5, step_s: 0.5}}
policies: {{fcfs: {{drop_hopeless: false}}}}
cluster:
  instances: 2
  mover: rescue
  scaler: {{fixed: {{count: 2}}}}
  faults: [{{at_s: 2, instance: 0, kind: crash}}]
"""
    )
    emitted: dict[str, list[int]] = {}

    def note(record):
        if type(record).__name__ == "Emitted":
            emitted.setdefault(record.id, []).append(record.index)

    told = run(path, policy="fcfs", observers=[note])
    assert told["counts"]["failed"] == 0 and told["cluster"]["restarts"]
    assert all(indices == list(range(len(indices))) for indices in emitted.values())
    prepared = prepare(load_config(path))
    assert {id: len(indices) for id, indices in emitted.items()} == dict(prepared.lengths)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("cluster.instances=0", "0 in all"),
        ("cluster.instances={a: 1}", r"cluster\.instances\.a: .*got 1$"),
        ("cluster.instances={a: {profiles: {sd: 3}}}", r"cluster\.instances\.a\.profiles\.sd: .*got 3$"),
        ("cluster.faults=[{at_s: 1, instance: 3, kind: crash}]", "no instance 3; there are 3"),
        ("cluster.faults=[{at_s: 1, instance: 0, kind: burn}]", "kind"),
        ("cluster.faults=[{at_s: 1, kind: crash}]", "of an instance: give its number"),
        ("cluster.faults=[{at_s: 1, instance: 0, kind: head, for_s: 1}]", "of no instance"),
        ("cluster.faults=[{at_s: 1, kind: head}]", "kind: head needs for_s"),
        ("cluster.faults=[{at_s: 1, instance: 0, kind: slow}]", "kind: slow needs a factor"),
        ("cluster.faults=[{at_s: 1, instance: 0, kind: hang, factor: 3}]", "kind: hang has no factor, got 3"),
        ("cluster.faults=[{at_s: 1, instance: 0, kind: crash, for_s: 3}]", "kind: crash is for good, got for_s 3"),
        ("cluster.failure={dead_s: 1}", "dead_s 1 is less than suspect_s 1.5"),
        ("cluster.network.loss=1", "loss"),
        ("cluster.mover={rescue: {}, freeness: {}}", "mover"),
        ("devices=2", "give devices"),
    ],
)
def test_wrong_values_are_named(config, change, message):
    with pytest.raises(ConfigError, match=message):
        load_config(config, [change])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("cluster.scaler={charge: {role: gpu}}", "cluster.scaler: no role 'gpu'; allowed: whole"),
        ("cluster.scaler={charge: {window_s: 0}}", "charge: window_s must be greater than 0, got 0.0"),
        ("cluster.scaler={charge: {horizon_s: .nan}}", "charge: horizon_s must be greater than 0, got nan"),
        ("cluster.scaler={freeness: {band: .nan}}", "freeness: band must be 0 or more, got nan"),
        ("cluster.scaler={plan: {most: 0}}", "plan: most must be 1 or more, got 0"),
        ("cluster.router={prefix: {k: 0}}", "prefix: k must be 1 or more, got 0"),
        ("cluster.router={freeness: {headroom: -1}}", "freeness: headroom must be 0 or more, got -1.0"),
        ("cluster.mover={freeness: {threshold: .nan}}", "freeness: threshold must be a number, got nan"),
        ("cluster.mover={rescue: {rest_s: -1}}", "rescue: rest_s must be 0 or more, got -1.0"),
        ("cluster.mover={consolidate: {below: .nan}}", "consolidate: below must be 0 or more, got nan"),
    ],
)
def test_parameters_of_rules_that_mean_nothing_are_named(config, change, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        check_rules(load_config(config, [change]).cluster)


def test_a_scaler_of_ones_own_that_wants_what_there_is_not_is_told(config):
    given = load_config(config, ["cluster.scaler=test_cluster_configs:WantsOthers"])
    with pytest.raises(ConfigError, match=r"scaler wants role 'others'; allowed: whole"):
        simulate(prepare(given), "fcfs")


class WantsOthers:
    """A scaler."""

    def target(self, fleet):
        return {"others": 1}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("cluster.router=slak", "unknown router 'slak'; did you mean 'slack'?"),
        ("cluster.router={slack: {kk: 3}}", "cluster.router.slack: unknown parameter 'kk'"),
        ("cluster.router={slack: {k: 0}}", "slack: k must be 1 or more, got 0"),
        ("cluster.mover=resque", "unknown mover 'resque'; did you mean 'rescue'?"),
        ("cluster.scaler={fixed: {}}", "cluster.scaler.fixed"),
        ("cluster.router=os:getcwd", "which has no route"),
    ],
)
def test_wrong_rules_are_told_in_a_line(config, change, message):
    done = command("simulate", str(config), "--set", change)
    assert done.status == 2 and squash(message) in squash(done.out + done.err)


def test_the_bound_of_a_cluster_is_of_all_its_instances(config, tmp_path, root):
    out = tmp_path / "out.json"
    other = root / "profiles/rtx4090/sd15_512"
    kinds = f"cluster.instances={{fast: {{count: 1}}, slow: {{count: 1, profiles: {other}}}}}"
    sets = ["--set", kinds, "--set", "simulation.mixed_devices=true", "--set", "workload.rate=300"]
    sets += ["--set", "slo.scale=1.2", "--set", "workload.requests=5", "--set", "workload.steps=2"]
    done = command("simulate", str(config), *sets, "--bound", "--json", str(out))
    assert done.status == 0, done.out + done.err
    (told,) = json.loads(out.read_text())
    assert told["counts"]["on_time"] <= told["bound"]["value"] < 5


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--hindsight", "2"], "--hindsight is for one device, not for a cluster"),
        (["--bound", "--set", "cluster.scaler=charge"], "with cluster.scaler the bound would depend on how many"),
    ],
)
def test_what_has_no_bound_says_so(config, words, message):
    done = command("simulate", str(config), *words)
    assert done.status == 2 and squash(message) in squash(done.out + done.err)


def test_a_new_instance_takes_as_long_as_its_profiles_say(tmp_path):
    section = {"instances": 1, "scaler": {"fixed": {"count": 2}}, "router": "round_robin"}
    path = toy(tmp_path, cluster=section, workload={"rate": 2, "requests": 40, "steps": 2})
    file = tmp_path / "profiles/draw.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "engine": {"load_s": 5.0}}))
    measured = load_config(path)
    report = simulate(prepare(measured), "fcfs")
    assert report.instance_s == pytest.approx(2 * report.duration - 5.0, abs=0.1)
    at_once = load_config(path, ["cluster.instances={whole: {count: 1, load_s: 0}}"])
    report = simulate(prepare(at_once), "fcfs")
    assert report.instance_s == pytest.approx(2 * report.duration, abs=0.1)


def test_a_table_cuts_neither_figures_nor_names_of_routers(config, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    routers = "cluster.router={round_robin: {}, least_requests: {}}"
    done = command("simulate", str(config), "--set", routers, "--set", "workload.requests=10")
    assert done.status == 0 and "…" not in done.out
    (headings,) = [line for line in done.out.splitlines() if "goodput/s" in line]
    assert " ".join(headings.split()) == "policy on time late dropped goodput/s SLO met p50 s p99 s batch"
    assert {"round_robin", "least_requests"} <= set(done.out.split())
    assert max(len(line) for line in done.out.splitlines()) <= 80
