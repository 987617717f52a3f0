"""From a config to a run: pipelines, policies, simulating."""

from __future__ import annotations

import itertools

import pytest
from experiments import policy_of, refused
from toys import Newest, Plain, adds_up, toy, write_profile

from neustream import (
    EDF,
    FCFS,
    Clockwork,
    ConfigError,
    EventLog,
    NeuStream,
    ProfileError,
    Serial,
    Static,
    load_profile,
)
from neustream.config import load_experiment
from neustream.experiment import merge, pipeline_of, prepare, record, simulate

# -- the pipeline ---------------------------------------------------------------------------------------


def test_the_graph_of_a_config(tmp_path):
    stages = {"text": {}, "draw": {"times": "steps", "max_batch": 4}, "decode": {"max_batch": 2}}
    graph = pipeline_of(load_experiment(toy(tmp_path, stages=stages))).graph
    assert graph.name == "toy"
    assert list(graph.stages) == ["text", "draw", "decode"]
    assert graph.looped == {"draw"}
    assert [stage.max_batch for stage in graph.stages.values()] == [1, 4, 2]
    assert [stage.emits for stage in graph.stages.values()] == [False, False, True]


def test_the_pools_of_a_config(tmp_path):
    stages = {"draw": {"times": "steps", "pool": "b"}, "text": {"pool": "a"}, "decode": {"pool": "b"}}
    pools = {"a": {}, "b": {"workers": 3, "sticky": True}}
    first, second = pipeline_of(load_experiment(toy(tmp_path, stages=stages, pools=pools))).pools
    assert (first.name, first.stages, first.workers, first.sticky) == ("a", ("text",), 1, False)
    assert (second.name, second.stages, second.workers, second.sticky) == ("b", ("draw", "decode"), 3, True)


def test_a_stage_may_be_several_modules(root):
    prepared = prepare(load_experiment(root / "configs/paper/sd15_256_rtx4090.yaml"))
    folder = root / "profiles/rtx4090/sd15_256"
    parts = [load_profile(folder / f"{name}.json") for name in ("vae", "safety")]
    assert prepared.profiles["vae"].latency(3) == pytest.approx(sum(part.latency(3) for part in parts))


# -- policies -------------------------------------------------------------------------------------------


def test_policies_by_name_take_the_configs_parameters(tmp_path):
    path = toy(
        tmp_path,
        policies={
            "serial": {"drop_hopeless": True},
            "static": {"max_batch": 3},
            "fcfs": {},
            "edf": {"drop_hopeless": False},
            "clockwork": {"max_batch": 9, "lead_s": 0},
            "neustream": {"slo_scale": 2, "step_delta": 0.5, "margin_s": 0.1, "sticky_demotion": False},
        },
    )
    assert policy_of(path, "serial") == Serial(drop_hopeless=True)
    assert policy_of(path, "static") == Static(max_batch=3)
    assert policy_of(path, "fcfs") == FCFS()
    assert policy_of(path, "edf") == EDF(drop_hopeless=False)
    assert policy_of(path, "clockwork") == Clockwork(max_batch=9, lead_s=0.0)
    assert policy_of(path, "neustream") == NeuStream(2.0, step_delta=0.5, margin_s=0.1, sticky_demotion=False)


def test_a_policy_that_the_config_does_not_name_has_its_defaults(tmp_path):
    assert policy_of(toy(tmp_path), "static") == Static()


def test_an_unknown_policy_names_the_nearest(tmp_path):
    message = refused(toy(tmp_path), "neustrem")
    assert message.startswith(
        "unknown policy 'neustrem'; did you mean 'neustream'? allowed: clockwork, default, edf, fcfs,"
    )


def test_an_unknown_parameter_names_the_nearest(tmp_path):
    message = refused(toy(tmp_path, policies={"clockwork": {"max_bach": 3}}), "clockwork")
    assert message == (
        "policies.clockwork: unknown parameter 'max_bach'; did you mean 'max_batch'? allowed: lead_s, max_batch, plan"
    )
    assert "allowed: drop_hopeless" in refused(toy(tmp_path), "fcfs", "policies.fcfs.xyzzy=1")


@pytest.mark.parametrize(
    ("override", "where"),
    [
        ("policies.clockwork.max_batch=many", "policies.clockwork.max_batch"),
        ("policies.clockwork.max_batch=1.5", "policies.clockwork.max_batch"),
        ("policies.clockwork.lead_s=[1]", "policies.clockwork.lead_s"),
        ("policies.neustream.sticky_demotion=perhaps", "policies.neustream.sticky_demotion"),
        ("policies.neustream.step_delta=high", "policies.neustream.step_delta"),
    ],
)
def test_a_parameter_of_the_wrong_type_is_told(tmp_path, override, where):
    message = refused(toy(tmp_path), where.split(".")[1], override)
    assert message.startswith(f"{where}: ")
    assert ", got " in message


def test_a_policy_of_ones_own(tmp_path):
    path = toy(tmp_path, policies={"toys:Newest": {"max_batch": 3}, "toys:Plain": {}})
    assert policy_of(path, "toys:Newest") == Newest(max_batch=3)
    assert isinstance(policy_of(path, "toys:Plain"), Plain)
    prepared = prepare(load_experiment(path))
    for name in ("toys:Newest", "toys:Plain"):
        assert simulate(prepared, name).counts["on_time"] == 10


def test_parameters_of_a_policy_of_ones_own_are_checked(tmp_path):
    path = toy(tmp_path)
    assert "did you mean 'max_batch'?" in refused(path, "toys:Newest", "policies={'toys:Newest': {max_bach: 1}}")
    assert "toys:Newest.max_batch" in refused(path, "toys:Newest", "policies={'toys:Newest': {max_batch: x}}")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere_at_all:Thing", "policy 'nowhere_at_all:Thing': No module named 'nowhere_at_all'"),
        ("toys:Thing", "policy 'toys:Thing': module 'toys' has no attribute 'Thing'"),
    ],
)
def test_a_policy_that_is_not_there(tmp_path, name, message):
    assert refused(toy(tmp_path), name) == message


def test_neustream_is_given_the_configs_slo_scale(tmp_path):
    path = toy(tmp_path, slo={"scale": 4})
    assert policy_of(path, "neustream").slo_scale == 4.0
    assert policy_of(path, "neustream", "slo.scale=2.5").slo_scale == 2.5
    assert policy_of(path, "neustream", "policies.neustream.slo_scale=9").slo_scale == 9.0
    assert policy_of(toy(tmp_path, slo={"total_s": 1}), "neustream").slo_scale is None


def test_clockwork_may_plan_with_other_profiles(root):
    path = root / "configs/paper/sd15_512_h100.yaml"
    plan = policy_of(path, "clockwork").plan
    theirs = root / "profiles/rtx4090/sd15_512"
    assert plan.keys() == {"unet", "vae"}
    assert plan["unet"].latency(2) == load_profile(theirs / "unet.json").latency(2)
    assert plan["vae"].latency(1) == pytest.approx(
        sum(load_profile(theirs / f"{name}.json").latency(1) for name in ("vae", "safety"))
    )
    prepared = prepare(load_experiment(path, ["workload.requests=60"]))
    assert prepared.profiles["unet"].device != plan["unet"].device
    bare = prepare(load_experiment(path, ["workload.requests=60", "policies.clockwork={max_batch: 5}"]))
    with_plan, without = simulate(prepared, "clockwork"), simulate(bare, "clockwork")
    assert with_plan.counts["dropped"] > without.counts["dropped"]  # it believes its device to be slower
    assert with_plan.profile_error().keys() == {"clip", "unet", "vae"}


def test_a_plan_for_unknown_stages_is_told(tmp_path):
    message = refused(toy(tmp_path), "clockwork", "policies.clockwork.plan={drawer: [draw]}")
    assert "plan: expected a mapping of stages ['decode', 'draw'] to lists of files" in message
    with pytest.raises(ProfileError, match=r"no profile at .*other\.json"):
        policy_of(toy(tmp_path), "clockwork", "policies.clockwork.plan={draw: [other]}")


# -- simulating -----------------------------------------------------------------------------------------

MEASURED = ("decision_us",)  # what depends on the machine


def outcome(prepared, policy):
    return {key: value for key, value in simulate(prepared, policy).to_dict().items() if key not in MEASURED}


@pytest.mark.parametrize("policy", ["serial", "static", "fcfs", "edf", "clockwork", "neustream"])
def test_a_simulation_is_the_same_each_time(root, policy):
    prepared = prepare(load_experiment(root / "configs/paper/sd15_256_rtx4090.yaml", ["workload.requests=150"]))
    first, second = EventLog(), EventLog()
    one, two = simulate(prepared, policy, [first]), simulate(prepared, policy, [second])
    assert first.steps == second.steps
    assert first.requests == second.requests
    assert one.counts == two.counts


def test_the_seed_changes_the_trace(tmp_path):
    path = toy(tmp_path, slo={"scale": 2})
    runs = [outcome(prepare(load_experiment(path, [f"workload.seed={seed}"])), "fcfs") for seed in (0, 0, 1)]
    assert runs[0] == runs[1]
    assert runs[0] != runs[2]


@pytest.mark.parametrize(
    ("name", "rate", "policy", "on_time", "tolerance"),
    [
        ("dit_s2_256", 4, "neustream", 463, 15),
        ("dit_s2_256", 4, "clockwork", 86, 20),
        ("dit_xl2_256", 0.5, "neustream", 401, 8),
        ("dit_xl2_256", 0.8, "neustream", 331, 8),
        ("palette_256", 0.7, "neustream", 429, 4),
        ("palette_256", 0.7, "clockwork", 323, 8),
        ("sd15_256", 2, "neustream", 490 + 8, 4),  # the log lost the last 8
        ("sd15_256", 2, "clockwork", 220, 8),
    ],
)
def test_the_artifacts_own_runs(root, name, rate, policy, on_time, tolerance):
    # of 500 requests at cv 2 and SLO 3, by the artifact's logs
    path = root / f"configs/paper/{name}_rtx4090.yaml"
    prepared = prepare(load_experiment(path, [f"workload.rate={rate}"]))
    report = simulate(prepared, policy)
    assert report.submitted == 500
    assert abs(report.counts["on_time"] - on_time) <= tolerance
    assert adds_up(report.to_dict()["counts"])


def test_overheads_and_slower_devices_are_simulated(tmp_path):
    path = toy(tmp_path, workload={"arrivals": "constant", "rate": 1, "requests": 5, "steps": 3})
    plain = simulate(prepare(load_experiment(path)), "serial")
    assert plain.latency.mean == pytest.approx(3 * 0.002 + 0.001)
    more = simulate(prepare(load_experiment(path, ["simulation.handover_s=0.01"])), "serial")
    assert more.latency.mean == pytest.approx(3 * 0.012 + 0.011)
    slow = simulate(prepare(load_experiment(path, ["simulation.latency_scale=3"])), "serial")
    assert slow.latency.mean == pytest.approx(3 * 0.007)
    assert slow.profile_error() == {"draw": pytest.approx(3.0), "decode": pytest.approx(3.0)}


def test_a_simulation_at_another_speed_plans_with_the_same_profiles(tmp_path):
    load = {"arrivals": "constant", "rate": 1, "requests": 5, "steps": 3}
    prepared = prepare(load_experiment(toy(tmp_path, workload=load, slo={"total_s": 0.012})))
    assert simulate(prepared, "serial").counts["on_time"] == 5
    slow = simulate(prepared, "serial", speed={"draw": 2.0})
    assert slow.latency.mean == pytest.approx(3 * 0.004 + 0.001)
    assert slow.counts["late"] == 5
    assert slow.profile_error() == {"draw": pytest.approx(2.0), "decode": pytest.approx(1.0)}


def test_noise_is_drawn_from_the_seed_and_keeps_the_median(tmp_path):
    path = toy(tmp_path, workload={"arrivals": "constant", "rate": 1, "requests": 400, "steps": 1})
    noisy = prepare(load_experiment(path, ["simulation.latency_noise=0.3"]))
    logs = [EventLog(), EventLog()]
    for log in logs:
        simulate(noisy, "serial", [log])
    assert logs[0].steps == logs[1].steps
    factors = sorted((step["end"] - step["start"]) / step["expected_s"] for step in logs[0].steps)
    assert factors[len(factors) // 2] == pytest.approx(1.0, abs=0.1)
    assert factors[0] < 0.7 < 1.4 < factors[-1]


def durations(prepared, policy="serial"):
    log = EventLog()
    simulate(prepared, policy, [log])
    return {step["start"]: (step["end"] - step["start"]) / step["expected_s"] for step in log.steps}


def test_steps_that_start_in_a_slowdown_take_longer(tmp_path):
    load = {"arrivals": "constant", "rate": 1, "requests": 6, "steps": 1}  # draws of 2 ms begin at 1.0, 2.0, ...
    slow = [
        {"start_s": 2.0, "duration_s": 2.001, "factor": 3},
        {"start_s": 3.5, "duration_s": 2.0, "factor": 2},
        {"start_s": 4.9999, "duration_s": 0.0002, "factor": 10},
    ]
    prepared = prepare(load_experiment(toy(tmp_path, workload=load, simulation={"slowdowns": slow})))
    factors = list(durations(prepared).values())  # a draw and a decode each
    assert factors[0::2] == pytest.approx([1, 3, 3, 6, 20, 1])
    assert factors[1::2] == pytest.approx([1, 3, 3, 2, 2, 1])  # the last decode of the first slowdown began after it


def test_slowdowns_go_with_noise_scale_and_overhead(tmp_path):
    load = {"arrivals": "constant", "rate": 1, "requests": 5, "steps": 1}
    device = {"latency_noise": 0.3, "latency_scale": 2, "handover_s": 0.5}
    whole = {**device, "slowdowns": [{"start_s": 0, "duration_s": 1e6, "factor": 4}]}
    plain, slow = (
        durations(prepare(load_experiment(toy(tmp_path, workload=load, simulation=simulation))))
        for simulation in (device, whole)
    )
    overheads = [0.5 / 0.002, 0.5 / 0.001] * 5
    for one, other, overhead in zip(plain.values(), slow.values(), overheads, strict=True):
        assert other - overhead == pytest.approx(4 * (one - overhead))


def truthful(folder, *settings):
    write_profile(folder / "profiles/fast.json", "draw", [1, 2, 4], [0.001, 0.001, 0.001])
    write_profile(folder / "profiles/short.json", "draw", [1, 2], [0.001, 0.001])
    write_profile(folder / "profiles/other.json", "draw", [1, 4], [0.001, 0.001], device="another")
    return load_experiment(toy(folder), settings)


def test_steps_take_what_is_true_and_are_planned_by_the_profile(tmp_path):
    prepared = prepare(truthful(tmp_path, "simulation.truth={draw: [fast]}"))
    assert set(prepared.truth) == {"draw"}
    plain = prepare(truthful(tmp_path))
    assert [r.slo for r in prepared.requests] == [r.slo for r in plain.requests]
    assert durations(prepared) != durations(plain)
    assert simulate(prepared, "serial").profile_error() == {"draw": pytest.approx(0.5), "decode": pytest.approx(1.0)}


def test_the_truth_of_a_stage_may_be_several_modules(tmp_path):
    prepared = prepare(truthful(tmp_path, "simulation.truth={draw: [fast, fast]}"))
    assert prepared.truth["draw"].latency(3) == pytest.approx(0.002)


def test_at_an_observed_speed_nothing_else_is_true(tmp_path):
    prepared = prepare(truthful(tmp_path, "simulation.truth={draw: [fast]}"))
    report = simulate(prepared, "serial", speed={"draw": 2.0})
    assert report.profile_error() == {"draw": pytest.approx(2.0), "decode": pytest.approx(1.0)}


@pytest.mark.parametrize(
    ("truth", "error", "said"),
    [
        ("{drawer: [fast]}", ConfigError, r"simulation\.truth: unknown stage 'drawer'; did you mean 'draw'"),
        ("{draw: []}", ConfigError, r"simulation\.truth\.draw"),
        ("{draw: fast}", ConfigError, r"simulation\.truth\.draw"),
        ("{draw: [nowhere]}", ProfileError, r"no profile at .*nowhere\.json"),
        ("{draw: [short]}", ProfileError, r"'draw' knows batches of at most 2; steps have up to 4"),
        ("{draw: [other]}", ProfileError, r"mixes profiles of different devices"),
    ],
)
def test_a_truth_that_cannot_be(tmp_path, truth, error, said):
    with pytest.raises(error, match=said):
        prepare(truthful(tmp_path, f"simulation.truth={truth}"))


def test_two_devices_may_be_mixed_on_purpose(tmp_path):
    settings = ["simulation.truth={draw: [other]}", "simulation.mixed_devices=true"]
    assert prepare(truthful(tmp_path, *settings)).truth["draw"].device == "another"


def test_merged_experiments_keep_what_is_true_of_each(tmp_path):
    one = prepare(truthful(tmp_path, "simulation.truth={draw: [fast]}"), prefix="a.")
    both = merge([one, prepare(truthful(tmp_path), prefix="b.")])
    assert set(both.truth) == {"a.draw"}
    assert set(simulate(both, "serial").profile_error()) == {"a.draw", "a.decode", "b.draw", "b.decode"}
    assert simulate(both, "serial").profile_error()["a.draw"] == pytest.approx(0.5)


def test_a_simulation_at_another_speed_has_no_slowdowns(tmp_path):
    simulation = {"slowdowns": [{"start_s": 0, "duration_s": 1e6, "factor": 4}]}
    prepared = prepare(load_experiment(toy(tmp_path, simulation=simulation)))
    report = simulate(prepared, "serial", speed={"draw": 2.0})
    assert report.profile_error() == {"draw": pytest.approx(2.0), "decode": pytest.approx(1.0)}


def test_a_record_says_what_was_run(tmp_path):
    experiment = load_experiment(toy(tmp_path), ["workload.seed=5"])
    entry = record(experiment, "fcfs", simulate(prepare(experiment), "fcfs"))
    assert list(itertools.islice(entry.items(), 3)) == [("policy", "fcfs"), ("config", "toy"), ("seed", 5)]
    assert entry["counts"]["submitted"] == 10
