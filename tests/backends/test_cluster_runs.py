"""`neustream run` of configs with a cluster: on instances in this process; what cannot be served."""

from __future__ import annotations

import importlib.util
import json
from concurrent.futures import Future

import pytest
from local_machines import LocalMachines, through
from toys import command, results, squash, toy

from neustream.backends.ray import cluster, experiments
from neustream.commands import profile
from neustream.errors import BackendError

PATIENT = {"suspect_s": 60, "dead_s": 90, "send_s": 60}
"""On a busy machine an instance may be silent for a while."""
TWO = {"engine": "ray", "instances": 2, "failure": PATIENT}


class Made(list):
    """What clusters were made of; `machines`: the latest."""


@pytest.fixture
def local(monkeypatch):
    """Clusters have instances in this process; what they were made of is in the list.

    `delay_s` of it: what orders take to an instance.
    """
    made = Made()
    made.delay_s = 0.0

    def machines(kinds, address, *, observed, start_s):
        made.append(({name: kind.at_most for name, kind in kinds.items()}, address))
        made.resources = {name: kind.resources for name, kind in kinds.items()}

        def make(number, kind):
            return through(kinds[kind].make)("cpu")

        made.machines = LocalMachines(make, observed=observed, delay_s=made.delay_s)
        return made.machines

    monkeypatch.setattr(cluster, "machines_of", machines)
    monkeypatch.setattr(experiments, "joined", lambda address: lambda: None)
    monkeypatch.setattr(profile, "check_ray", lambda: None)
    return made


def test_a_config_that_is_simulated_is_served_by_the_same_head(local, tmp_path):
    kinds = {"core": {"count": 2, "load_s": 3}}
    section = {**TWO, "instances": kinds, "router": {"round_robin": {}, "slack": {}}, "mover": "rescue"}
    path, out = toy(tmp_path, cluster=section), tmp_path / "out.json"
    done = command("run", path, "--json", out, "--trace", tmp_path / "t.json")
    assert done.status == 0, done.err
    first, second = results(out)
    assert [first["policy"], second["policy"]] == ["fcfs @ round_robin", "fcfs @ slack"]
    for entry in (first, second):
        assert entry["counts"]["on_time"] == entry["simulated"]["counts"]["on_time"] == 10
        assert entry["cluster"]["routed"].keys() == entry["simulated"]["cluster"]["routed"].keys()
        assert entry["cluster"]["instances"] == pytest.approx(2.0, rel=0.05)
    assert {name: part["ended"] for name, part in first["members"].items()} == {"core-1": 5, "core-2": 5}
    assert set(first["batch_size"]) == {"draw", "decode"} and set(first["simulated"]["members"]) == {"core-0", "core-1"}
    assert local == [({"core": 2}, None)] * 2 and local.resources == {"core": {"num_cpus": 1.0}}
    assert (tmp_path / "t-fcfs-slack.json").exists()


def test_kinds_on_unlike_devices_are_told_apart(local, tmp_path):
    """By its profile one cannot be in time with anything: no request goes there."""
    toy(tmp_path)
    slow, out = tmp_path / "slow", tmp_path / "out.json"
    slow.mkdir()
    for name in ("draw", "decode"):
        profile = json.loads((tmp_path / "profiles" / f"{name}.json").read_text())
        profile["latency_s"] = [10_000 * seconds for seconds in profile["latency_s"]]
        (slow / f"{name}.json").write_text(json.dumps(profile))
    kinds = {"slow": {"profiles": "slow", "resources": {"old": 0.5}}, "quick": {"count": 2}}
    path = toy(tmp_path, cluster={**TWO, "instances": kinds}, slo={"total_s": 8.0})
    done = command("run", path, "--json", out)
    assert done.status == 0, done.err
    (entry,) = results(out)
    for report in (entry, entry["simulated"]):
        assert report["counts"]["on_time"] == 10
        assert not [name for name in report.get("members", {}) if name.startswith("slow")]
    assert local == [({"slow": 1, "quick": 2}, None)]
    assert local.resources == {"slow": {"num_cpus": 1.0, "old": 0.5}, "quick": {"num_cpus": 1.0}}


def test_a_scaler_chooses_once_the_first_instances_serve(local, tmp_path):
    path, out = toy(tmp_path, cluster={**TWO, "scaler": {"fixed": {"count": 3}}}), tmp_path / "out.json"
    assert command("run", path, "--json", out).status == 0
    assert results(out)[0]["counts"]["on_time"] == 10
    assert local == [({"whole": 3}, None)] and local.machines.made == 3


def test_what_ways_took_is_simulated_as_observed_and_told(local, tmp_path):
    """On the head's thread an order takes 0.2 s: no request can be quicker, served or simulated."""
    local.delay_s, out = 0.2, tmp_path / "out.json"
    done = command("run", toy(tmp_path, cluster=TWO, slo={"total_s": 60.0}), "--json", out)
    assert done.status == 0, done.err
    (entry,) = results(out)
    ways = entry["cluster"]["ways_s"]
    assert ways["there"]["p50"] >= 0.2 and ways["back"]["p50"] >= 0.0
    assert entry["latency_s"]["p50"] >= 0.2 > entry["simulated"]["latency_s"]["p50"]
    assert entry["simulated_as_observed"]["latency_s"]["p50"] >= 0.2
    assert squash("fcfs: a request's ways took") in squash(done.out) and squash("ms there (p99") in squash(done.out)


def test_profile_measures_what_the_front_of_a_cluster_adds_and_simulations_count_it(local, tmp_path):
    local.delay_s, new, out = 0.2, tmp_path / "new", tmp_path / "out.json"
    path = toy(tmp_path, cluster=TWO, slo={"total_s": 60.0})
    done = command("profile", path, "--cluster", "--out", new, "--repeats", 3, "--warmup", 1)
    assert done.status == 0, done.err
    assert squash("ms from a call to an instance") in squash(done.out)
    for name in ("draw", "decode"):
        costs = json.loads((new / f"{name}.json").read_text())["engine"]
        assert min(costs["there_s"]) >= 0.2 and min(costs["back_s"]) >= 0.0 and costs["latency_scale"] >= 1.0
        assert costs["decision_s"] > 0.0, "what was measured before stays"
    p50 = {}
    for what, changes in {"measured": [], "said": ["cluster.network.delay_s=0.0007"]}.items():
        changes = [f"profiles={new}", *changes]
        done = command("simulate", path, *(word for change in changes for word in ("--set", change)), "--json", out)
        assert done.status == 0, done.err
        p50[what] = results(out)[0]["latency_s"]["p50"]
    assert p50["measured"] >= costs["there_s"][0] + costs["back_s"][0] > p50["said"]


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (["--size", "64x64"], "--cluster and --size: give one of them"),
        (["--device", "cuda:0"], "--device 'cuda:0': Ray says which one an instance gets"),
        (
            ["--set", "stages.draw.profile=[a, b]"],
            "stages.draw.profile is [a, b], but measuring the stage writes draw.json",
        ),
    ],
)
def test_profile_refuses_what_no_cluster_serves_before_it_measures(local, tmp_path, options, why):
    path = toy(tmp_path, cluster=TWO)
    done = command("profile", path, "--cluster", *options, "--out", tmp_path / "new")
    assert done.status == 2 and squash(why) in squash(done.err) and not list(tmp_path.glob("new/*"))


def test_profile_of_a_cluster_in_a_folder_that_yaml_reads_otherwise(local, tmp_path):
    new = tmp_path / "a #b"
    done = command("profile", toy(tmp_path, cluster=TWO), "--cluster", "--out", new, "--repeats", 3, "--warmup", 1)
    assert done.status == 0, done.err
    assert json.loads((new / "draw.json").read_text())["engine"]["there_s"]


@pytest.mark.parametrize(
    ("section", "why"),
    [
        (None, "--cluster: the config has no section cluster"),
        ({"instances": 2}, "cluster.engine"),
    ],
)
def test_profile_has_a_cluster_only_where_one_is_served(local, tmp_path, section, why):
    path = toy(tmp_path, **({} if section is None else {"cluster": section}))
    done = command("profile", path, "--cluster", "--out", tmp_path / "new")
    assert done.status == 2 and why in done.err and not list(tmp_path.glob("new/*"))


class Broken:
    """A policy that raises when it is asked."""

    def decide(self, view):
        raise ZeroDivisionError("no way")


def test_a_policy_that_raises_ends_the_run_with_its_name(local, tmp_path):
    done = command("run", toy(tmp_path, cluster=TWO), "-p", "test_cluster_runs:Broken")
    assert done.status == 2 and "ZeroDivisionError: no way" in done.err and len(done.err.splitlines()) == 1


def test_a_profile_of_another_device_is_refused_by_the_instance(local, tmp_path):
    path = toy(tmp_path, cluster=TWO, backend={"kind": "toy_backend:make", "device_name": "another"})
    done = command("run", path)
    assert done.status == 2 and "profile 'draw' is of 'toy device', but cpu is 'another'" in done.err


def test_kinds_serve_the_stages_that_they_are_said_to(local, tmp_path):
    kinds = {"draws": {"count": 2, "stages": ["draw"]}, "decodes": {"stages": ["decode"]}}
    path, out = toy(tmp_path, cluster={**TWO, "instances": kinds}), tmp_path / "out.json"
    done = command("run", path, "--json", out)
    assert done.status == 0, done.err
    (entry,) = results(out)
    assert entry["counts"]["on_time"] == entry["simulated"]["counts"]["on_time"] == 10
    assert entry["cluster"]["moves"] == entry["simulated"]["cluster"]["moves"] == {"stage decode": 10}
    assert set(entry["batch_size"]) == {"draw", "decode"}
    ended = {name: part["ended"] for name, part in entry["members"].items()}
    assert ended["decodes-3"] == 10 and sum(ended.values()) == 10


def test_a_stage_that_nobody_serves_is_refused(local, tmp_path):
    for stages, said in (
        (["draw"], "cluster.instances: nobody serves stage 'decode'"),
        (["drew"], "cluster.instances.a.stages: no stage 'drew'; did you mean 'draw'"),
    ):
        done = command("run", toy(tmp_path, cluster={**TWO, "instances": {"a": {"stages": stages}}}))
        assert done.status == 2 and said in done.err, done.err


@pytest.mark.parametrize(
    ("section", "said"),
    [
        ({"engine": None}, "cluster.engine: none is given, so the cluster can only be simulated; allowed: ray"),
        ({"engine": "k8s"}, "cluster.engine: Input should be 'ray', got 'k8s'"),
        ({"engine": None, "address": "auto"}, "address 'auto' is of an engine: give engine: ray, too"),
        ({"address": "here"}, "address must be auto or host:port, got 'here'"),
        (
            {"faults": [{"at_s": 3, "instance": 1, "kind": "hang"}]},
            "cluster.faults: hang at 3 s: faults are simulated; to serve, leave them out (--set cluster.faults=[])",
        ),
        ({"network": {"loss": 0.1}}, "cluster.network.loss 0.1: losses are simulated; to serve, it is 0"),
        (
            {"instances": {"a": {}, "b": {"resources": {"fast": 0}}}},
            "cluster.instances.b.resources.fast: Input should be greater than 0, got 0",
        ),
        (
            {"instances": {"a": {}, "b": {}}, "scaler": {"charge": {"role": "c"}}},
            "cluster.scaler: no role 'c'; allowed: a, b",
        ),
        (
            {"scaler": "plan"},
            "cluster.scaler.plan: it is for simulated clusters; served ones have charge, fixed, freeness",
        ),
        ({"scaler": {"charge": {"role": "x"}}}, "cluster.scaler: no role 'x'; allowed: whole"),
        ({"router": "slak"}, "unknown router 'slak'; did you mean 'slack'?"),
    ],
)
def test_what_a_served_cluster_cannot_have(tmp_path, section, said):
    done = command("run", toy(tmp_path, cluster={**TWO, **section}))
    assert done.status == 2 and squash(said) in squash(done.err), done.err
    assert len(done.err.splitlines()) == 1


def test_devices_have_no_numbers_and_ray_has_to_be_there(tmp_path, monkeypatch):
    path = toy(tmp_path, cluster=TWO)
    done = command("run", path, "--device", "cuda:1")
    assert done.status == 2 and "--device 'cuda:1': Ray says which one an instance gets; allowed: cpu, cuda" in done.err
    if importlib.util.find_spec("ray") is None:
        done = command("run", path)
        assert done.status == 2 and "BackendError: a cluster needs Ray: pip install 'neustream[ray]'" in done.err
        with pytest.raises(BackendError, match="a cluster needs Ray"):
            cluster.joined(None)


def test_instances_that_do_not_start_in_time_are_told_of(local, monkeypatch):
    monkeypatch.setattr(cluster, "START_S", 0.01)
    monkeypatch.setattr(LocalMachines, "start", lambda machines, name, kind: Future())
    with pytest.raises(BackendError, match=r"^the 2 instance\(s\) did not all start in 0.01 s$"):
        cluster.Cluster(lambda device: None, instances=2)
