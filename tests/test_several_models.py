"""Configs with several models: on one device, on several, placed; what is drawn, simulated and told."""

from __future__ import annotations

import json

import pytest
import yaml
from toys import adds_up, command, results, squash, toy

from neustream import ConfigError, EventLog, ProfileError
from neustream.config import ModelsConfig, load_config, load_experiment
from neustream.config.messages import keys_at
from neustream.engine.events import Finished
from neustream.experiment import ByModel, prepare, record, simulate, sweep_points
from neustream.profiling.files import add_costs

STEPS = {
    "format": "neustream.profile/1", "kind": "steps", "stage": "llm", "device": "toy device", "origin": {},
    "prefill": {"tokens": [1, 100], "latency_s": [0.002, 0.01], "fit": [0.002, 8e-5, 0]},
    "decode": {"fit": [0.002, 1e-5, 0]},
}  # fmt: skip
CHAT = {
    "profiles": "profiles",
    "llm": {"max_batch": 8, "memory": {"tokens": 4096}, "step_tokens": 64},
    "workload": {"rate": 50, "requests": 20, "prompt": 20, "output": {"min": 2, "max": 9}, "max_tokens": 9},
    "slo": {"first_s": 5, "step_s": 1},
}


def write(folder, **sections):
    """A config with the toy pipeline and a small language model."""
    toy(folder)
    (folder / "profiles/steps.json").write_text(json.dumps(STEPS))
    images = {
        "profiles": "profiles",
        "stages": {"draw": {"times": "steps", "max_batch": 4}, "decode": {"max_batch": 2}},
        "workload": {"rate": 100, "requests": 30, "steps": {"min": 1, "max": 4}},
        "slo": {"classes": [{"name": "fast", "scale": 30}, {"scale": 60}]},
    }
    raw = {"name": "both", "models": {"sd": images, "chat": CHAT}, "policies": {"priced": {}}}
    path = folder / "both.yaml"
    path.write_text(yaml.safe_dump({**raw, **sections}, sort_keys=False))
    return path


@pytest.fixture
def path(tmp_path):
    return write(tmp_path)


# -- what is drawn and who is where -----------------------------------------------------------------


def test_one_pool_has_the_stages_of_all_models(path):
    config = load_config(path)
    assert type(config) is ModelsConfig and config.placed == {"0": ["sd", "chat"]}
    prepared = prepare(config)
    (pool,) = prepared.pools
    assert pool.stages == ("sd.draw", "sd.decode", "chat.llm.prefill", "chat.llm.decode")
    assert list(pool.kv_caches) == ["chat.llm"] and pool.step_tokens == 64
    assert list(prepared.places) == [""] and prepared.places[""] == [pool]
    arrivals = [request.arrival for request in prepared.requests]
    assert arrivals == sorted(arrivals) and len(arrivals) == 50
    assert {request.slo.name for request in prepared.requests} == {"sd", "sd.fast", "chat"}
    assert prepared.lengths.keys() == {f"chat.both-{at}" for at in range(20)}


def test_a_models_requests_are_those_that_it_has_alone(path):
    both = prepare(load_config(path))
    for name in ("sd", "chat"):
        alone = prepare(load_experiment(path, model=name))
        mine = [request for request in both.requests if request.id.startswith(f"{name}.")]
        for ours, theirs in zip(mine, alone.requests, strict=True):
            assert (ours.id, ours.arrival, ours.params) == (f"{name}.{theirs.id}", theirs.arrival, theirs.params)
            assert (ours.slo.total, ours.slo.first) == (theirs.slo.total, theirs.slo.first)


def test_devices_have_the_models_that_are_placed_there(path):
    config = load_config(path, ["devices=[a, b, c]", "placement={sd: [a, b], chat: [b, c]}"])
    places = {device: pools[0].stages for device, pools in prepare(config).places.items()}
    images, chat = ("sd.draw", "sd.decode"), ("chat.llm.prefill", "chat.llm.decode")
    assert places == {"a": images, "b": images + chat, "c": chat}
    assert prepare(config).places["a"][0].kv_caches == {}
    assert list(prepare(load_config(path, ["devices=2"])).places) == ["0", "1"]


def test_speed_is_of_all_arrivals(path):
    slow, fast = (prepare(load_config(path, [f"speed={speed}"])).requests for speed in (1, 2))
    assert [request.id for request in slow] == [request.id for request in fast]
    assert [r.arrival for r in fast] == pytest.approx([r.arrival / 2 for r in slow])
    load = ["speed=2", "models.chat.workload.rate=null", "models.chat.workload.load=0.5"]
    assert load_config(path, load).experiment("chat").workload.load == 1.0


# -- what comes of it -------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["fcfs", "edf", "priced", "sarathi", "neustream", "clockwork"])
@pytest.mark.parametrize("devices", ["devices=1", "devices=2"])
def test_every_request_has_one_outcome(path, policy, devices):
    config = load_config(path, [devices])
    by_model = ByModel(config)
    report = simulate(prepare(config), policy, [by_model])
    entry = record(config, policy, report, by_model)
    assert entry["counts"]["submitted"] == 50 and adds_up(entry["counts"])
    assert entry["seed"] == {"sd": 0, "chat": 0}
    parts = entry["models"]
    assert {name: part["counts"]["submitted"] for name, part in parts.items()} == {"sd": 30, "chat": 20}
    for outcome, count in entry["counts"].items():
        assert count == sum(part["counts"][outcome] for part in parts.values())


def test_an_image_is_no_first_token(path):
    """Outputs are those of the language model alone, whatever images take beside it."""
    config = load_config(path, ["devices=[a, b]", "placement={sd: [a], chat: [b]}"])
    by_model = ByModel(config)
    entry = record(config, "fcfs", simulate(prepare(config), "fcfs", [by_model]), by_model)
    alone = simulate(prepare(load_experiment(path, model="chat")), "fcfs").to_dict()
    assert entry["models"]["chat"]["tokens"] == alone["tokens"]
    assert "tokens" not in entry and "tokens" not in entry["models"]["sd"]


def test_models_apart_do_as_they_do_alone(path):
    config = load_config(path, ["devices=[a, b]", "placement={sd: [a], chat: [b]}"])
    log = EventLog()
    simulate(prepare(config), "priced", [log])
    for name in ("sd", "chat"):
        alone = EventLog()
        simulate(prepare(load_experiment(path, model=name)), "priced", [alone])
        mine = {id: entry["end"] for id, entry in log.requests.items() if id.startswith(f"{name}.")}
        assert mine == {f"{name}.{id}": pytest.approx(entry["end"]) for id, entry in alone.requests.items()}


@pytest.mark.parametrize(("images_s", "chat_s"), [(0, 9), (9, 0)])
def test_steps_have_python_to_themselves_if_those_of_all_models_of_a_device_have(path, images_s, chat_s):
    """The least that one of the models says, in whichever order they stand."""
    folder = path.parent / "profiles"
    add_costs([folder / "draw.json", folder / "decode.json"], {"alone_s": images_s, "decision_s": 1e-4})
    add_costs([folder / "steps.json"], {"alone_s": chat_s, "decision_s": 1e-4})
    log = []
    simulate(prepare(load_config(path)), "fcfs", [log.append])
    assert any(record.step.planned for record in log if isinstance(record, Finished))


def test_one_policy_decides_for_the_models_of_a_device(path):
    stages, order = set(), []

    def watch(told):
        if isinstance(told, Finished):
            stages.add(told.step.stage)
            order.append(told.step.started_at)

    simulate(prepare(load_config(path, ["speed=20"])), "priced", [watch])
    assert {stage.partition(".")[0] for stage in stages} == {"sd", "chat"}
    assert len(set(order)) == len(order), "one step at a time on one device"


def test_a_device_shared_is_slower_than_two(path):
    met = {}
    for devices in (1, 2):
        config = load_config(path, [f"devices={devices}", "speed=30", "models.chat.slo={first_s: 0.05, step_s: 0.01}"])
        met[devices] = simulate(prepare(config), "fcfs").attainment
    assert met[1] < met[2]


# -- what is wrong ----------------------------------------------------------------------------------

WRONG = [
    ("models.sd.stages=null", "models.sd: give stages (a pipeline) or llm (a language model)"),
    ("models.sd.llm={}", "models.sd: give stages or llm, not both"),
    ("models.sd.stages.draw.max_bach=1", "unknown key 'models.sd.stages.draw.max_bach'; did you mean 'max_batch'?"),
    ("models.sd.stages.draw.pool=gpu", "models.sd.stages.draw.pool: all models of a device share one pool"),
    ("models.chat.llm.max_batch=0", "models.chat.llm.max_batch"),
    ("models.chat.workload.steps=3", "models.chat.workload: steps: numbers of steps are for a pipeline of stages"),
    ("models={'a.b': {stages: {x: {}}, profiles: p}}", "models.a.b"),
    ("stages={x: {}}", "unknown key 'stages'"),
    ("workload.rate=3", "unknown key 'workload'"),
    ("placement={sdd: ['0']}", "placement: no model 'sdd'; did you mean 'sd'? allowed: chat, sd"),
    ("placement={sd: [gpu]}", "placement.sd: no device 'gpu'; allowed: 0"),
    ("placement={sd: []}", "placement.sd: on no device; allowed: 0"),
    ("devices=[a, a]", "devices: 'a' is named twice"),
    ("speed=0", "speed"),
    ("policies={clockwork: {plan: {draw: [draw]}}}", "policies.clockwork.plan: a plan is of the stages of one model"),
    ("sweeps={workload.rate: {values: [1]}}", "sweeps: cannot sweep 'workload.rate'; did you mean"),
    ("sweeps={models.x.slo.scale: {values: [1]}}", "sweeps: cannot sweep 'models.x.slo.scale'"),
]


@pytest.mark.parametrize(("override", "message"), WRONG)
def test_an_impossible_config_is_told(path, override, message):
    with pytest.raises(ConfigError) as wrong:
        load_config(path, [override])
    assert message in str(wrong.value) and "\n" not in str(wrong.value)


def test_a_device_without_a_model_is_told(path):
    with pytest.raises(ConfigError, match="devices: no model is on 'b'"):
        load_config(path, ["devices=[a, b]", "placement={sd: [a], chat: [a]}"])


def test_profiles_of_different_devices_are_refused_unless_it_is_meant(path, tmp_path):
    (tmp_path / "profiles/steps.json").write_text(json.dumps({**STEPS, "device": "another"}))
    with pytest.raises(ProfileError, match="pool 'gpu' mixes profiles of different devices"):
        prepare(load_config(path))
    assert prepare(load_config(path, ["simulation.mixed_devices=true"])).requests
    apart = ["devices=[a, b]", "placement={sd: [a], chat: [b]}"]
    assert len(prepare(load_config(path, apart)).places) == 2


def test_language_models_of_a_device_fill_steps_alike(tmp_path):
    other = {**CHAT, "llm": {"step_tokens": 128}}
    path = write(tmp_path, models={"a": CHAT, "b": other})
    with pytest.raises(ConfigError, match=r"need one llm.step_tokens; got {'a.both': 64, 'b.both': 128}"):
        prepare(load_config(path))
    apart = ["devices=[x, y]", "placement={a: [x], b: [y]}"]
    with pytest.raises(ConfigError, match=r"need one llm.step_tokens"):
        prepare(load_config(path, [*apart, "placement.b=[x, y]"]))
    places = prepare(load_config(path, apart)).places
    assert [pools[0].step_tokens for pools in places.values()] == [64, 128]
    both = prepare(load_config(write(tmp_path, models={"a": CHAT, "b": CHAT})))
    assert list(both.pools[0].kv_caches) == ["a.llm", "b.llm"]
    assert adds_up({"submitted": 40, **simulate(both, "priced").counts})


def test_an_experiment_is_one_of_the_models(path):
    assert load_experiment(path, model="chat").name == "both"
    with pytest.raises(ConfigError, match="has several models; choose one by --model: sd, chat"):
        load_experiment(path)
    with pytest.raises(ConfigError, match=r"has no model 'chatt'; did you mean 'chat'\?"):
        load_experiment(path, model="chatt")


def test_a_file_with_one_model_has_no_names(tmp_path):
    with pytest.raises(ConfigError, match="has one model, whose name is not asked for; got 'sd'"):
        load_experiment(toy(tmp_path), model="sd")


def test_paths_of_models_are_relative_to_the_file(path, tmp_path, monkeypatch):
    assert load_config(path).models["sd"].profiles == tmp_path / "profiles"
    monkeypatch.chdir(tmp_path.parent)
    assert load_config(path, ["models.sd.profiles=p"]).models["sd"].profiles == tmp_path.parent / "p"


def test_null_is_a_value_in_the_options_of_a_models_backend(path):
    given = ["models.sd.backend={kind: x, a: {b: 1}}", "models.sd.backend.a.b=null"]
    assert load_config(path, given).models["sd"].backend.options == {"a": {"b": None}}


def test_the_keys_of_models_are_known():
    assert {"stages", "llm", "workload", "slo", "profiles", "backend"} == set(keys_at(ModelsConfig, ["models", "x"]))


# -- commands ---------------------------------------------------------------------------------------


def test_simulate_shows_what_each_model_got(path, tmp_path):
    done = command("simulate", path, "-p", "fcfs", "-p", "priced", "--json", tmp_path / "out.json")
    assert done.status == 0, done.err
    for text in (
        "both: 2 models on 1 device",
        "sd: gamma 100 req/s",
        "chat: gamma 50 req/s",
        "fcfs, chat",
        "priced, sd",
    ):
        assert squash(text) in squash(done.out)
    assert max(len(line) for line in done.out.splitlines()) <= 80
    assert [entry["models"].keys() for entry in results(tmp_path / "out.json")] == [{"sd", "chat"}] * 2


def test_a_sweep_of_all_models_and_of_one(path, tmp_path):
    for over in ("speed", "models.sd.workload.rate"):
        out = tmp_path / over
        done = command("sweep", path, "--over", over, "--values", "50,400", "--out", out, "--jobs", "1")
        assert done.status == 0, done.err
        assert [entry["value"] for entry in results(out / "sweep.json")] == [50, 400]
        again = command("sweep", path, "--over", over, "--values", "50,400", "--out", out, "--jobs", "1")
        assert "2 of 2 points are reused" in again.err
    ((value, changed),) = sweep_points(load_config(path), "models.chat.workload.cv", [3])
    assert value == changed.models["chat"].workload.cv == 3
    assert changed.models["sd"] == load_config(path).models["sd"]


def test_a_sweep_of_what_a_model_does_not_use(path, tmp_path):
    arguments = ["--values", "2", "--out", tmp_path / "out"]
    done = command("sweep", path, "--over", "models.sd.slo.scale", *arguments)
    assert done.status == 2 and "config 'both.sd' does not use it" in done.err
    done = command("sweep", path, "--over", "workload.rate", *arguments)
    assert done.status == 2 and "cannot sweep 'workload.rate'; did you mean" in done.err


def test_models_lists_all(path):
    done = command("models", path, "--json", "-", "-q")
    assert [model["kind"] for model in json.loads(done.out)] == ["stages", "llm"]


def test_there_is_no_bound_for_several_devices(path):
    done = command("simulate", path, "--bound", "--set", "devices=2")
    assert done.status == 2 and "devices are 2, and the bound is for one" in done.err


def test_there_is_no_bound_where_a_language_model_shares(path):
    done = command("simulate", path, "--bound")
    assert done.status == 2 and "no bound for a language model that shares its device" in done.err


REAL = [
    "models.sd.backend={kind: 'toy_backend:make'}",
    "models.chat.backend={kind: 'toy_backend:make_chat'}",
]


def overridden(settings):
    return [part for setting in settings for part in ("--set", setting)]


def test_profile_is_of_one_model(path, tmp_path):
    done = command("profile", path, "--out", tmp_path / "out")
    assert done.status == 2 and "has several models; choose one by --model: sd, chat" in done.err
    settings = [*overridden(REAL), "--model", "sd", "--out", tmp_path / "out"]
    done = command("profile", path, *settings, "--repeats", "3", "--warmup", "0")
    assert done.status == 0 and (tmp_path / "out/draw.json").exists()
    done = command("run", path, *settings)
    assert done.status == 0, done.err
    (entry,) = results(tmp_path / "out/report.json")
    assert entry["counts"]["submitted"] == 30


@pytest.mark.parametrize("places", [[], ["devices=2"], ["devices=[a, b]", "placement={sd: [a], chat: [b]}"]])
def test_all_models_are_served_at_once(path, tmp_path, places):
    out = tmp_path / "out"
    generous = ["models.sd.slo={scale: 100000}", "models.chat.slo={first_s: 60, step_s: 60}"]
    done = command("run", path, *overridden([*REAL, *places, *generous]), "--policy", "fcfs", "--out", out)
    if places == ["devices=2"]:
        assert done.status == 2 and "Toy has stream modules for 'cpu' once" in done.err
        return
    assert done.status == 0, done.err
    assert "by model" in done.out
    (entry,) = results(out / "report.json")
    for told in (entry, entry["simulated"]):
        assert {name: part["counts"]["submitted"] for name, part in told["models"].items()} == {"sd": 30, "chat": 20}
        assert all(adds_up(part["counts"]) for part in told["models"].values())
        assert told["models"]["sd"]["counts"]["dropped"] == 0
        assert set(told["batch_size"]) <= {"sd.draw", "sd.decode", "chat.llm.prefill", "chat.llm.decode", "chat.llm"}
    assert entry["simulated"]["models"]["sd"]["counts"]["on_time"] == 30
    outputs = [told["models"]["chat"]["tokens"]["outputs"] for told in (entry, entry["simulated"])]
    assert outputs[0] == outputs[1] == sum(prepare(load_config(path)).lengths.values())


def test_models_on_real_devices_are_placed_by_name(path):
    done = command("run", path, *overridden([*REAL, "devices=2", "placement={sd: ['0']}"]))
    assert done.status == 2 and "placement: real devices have names" in done.err


def test_what_is_true_of_steps_is_for_one_model(path, root):
    with pytest.raises(ConfigError, match=r"simulation\.truth: it is of the stages of one model"):
        load_config(path, ["simulation.truth={draw: [draw]}"])
    with pytest.raises(ConfigError, match=r"simulation\.truth: it is of stages, and an llm has none"):
        load_config(root / "configs/paper/opt_13b_a6000.yaml", ["simulation.truth={llm: [steps]}"])
