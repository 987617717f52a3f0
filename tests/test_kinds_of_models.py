"""What pipelines of stages and language models differ in, behind one class."""

from __future__ import annotations

import dataclasses

import pytest
from toys import adds_up, toy

from neustream import BackendError, KVCache
from neustream.backends.serving import Session
from neustream.config import LlmExperiment, StagesExperiment, load_experiment
from neustream.experiment import LlmPipeline, StagesPipeline, pipeline_of, prepare, simulate


@pytest.fixture
def chat(root):
    return load_experiment(root / "configs/paper/opt_13b_a6000.yaml")


@pytest.fixture
def images(root):
    return load_experiment(root / "configs/paper/sd15_512_h100.yaml")


def test_the_key_tells_the_kind(chat, images):
    assert type(chat) is LlmExperiment and type(pipeline_of(chat)) is LlmPipeline
    assert type(images) is StagesExperiment and type(pipeline_of(images)) is StagesPipeline
    for pipeline in (pipeline_of(chat), pipeline_of(images)):
        assert hasattr(pipeline.experiment, pipeline.kind)


def test_a_pipeline_of_stages(images):
    one = pipeline_of(images)
    assert one.stages == one.labels == one.measured_names == ("clip", "unet", "vae")
    assert one.main_stage == "unet" and one.sample(3) == {"steps": 3}
    names = {stage: [file.name for file in files] for stage, files in one.files_by_stage().items()}
    assert names == {"clip": ["clip.json"], "unet": ["unet.json"], "vae": ["vae.json", "safety.json"]}
    (pool,) = one.pools
    assert pool.kv_caches == {} and pool.stages == one.stages


def test_a_language_model(chat):
    one = pipeline_of(chat)
    assert one.stages == ("llm.prefill", "llm.decode") and one.labels == (*one.stages, "llm")
    assert one.main_stage == "llm.decode" and one.sample(3) == {}
    assert [file.name for file in one.profile_files()] == ["steps.json"]
    (pool,) = one.pools
    assert pool.kv_caches == {"llm": KVCache(1300, 16)}


@pytest.mark.parametrize("name", ["opt_13b_a6000", "sd15_512_h100"])
def test_a_prefix_tells_models_apart(root, name):
    experiment = load_experiment(root / f"configs/paper/{name}.yaml", ["workload.requests=20"])
    plain, named = prepare(experiment), prepare(experiment, prefix="a.")
    for before, after in (
        (plain.pipeline.labels, named.pipeline.labels),
        (plain.profiles, named.profiles),
        (plain.graph.stages, named.graph.stages),
        (plain.pools[0].stages, named.pools[0].stages),
        ([request.id for request in plain.requests], [request.id for request in named.requests]),
    ):
        assert [f"a.{one}" for one in before] == list(after)
    assert simulate(named, "priced").counts == simulate(plain, "priced").counts


def test_a_pipeline_on_two_devices_serves_twice_as_many(tmp_path):
    busy = {"workload": {"rate": 2000, "requests": 60, "steps": 8}, "slo": {"scale": 3}}
    reports = [simulate(prepare(load_experiment(toy(tmp_path, **busy, devices=count))), "fcfs") for count in (1, 2)]
    assert all(adds_up({"submitted": report.submitted, **report.counts}) for report in reports)
    assert reports[1].counts["on_time"] > 1.5 * reports[0].counts["on_time"] > 0
    assert set(reports[1].to_dict()["members"]) == {"0", "1"}


def test_a_backend_without_replicas_has_one_instance_a_device(tmp_path):
    session = Session(load_experiment(toy(tmp_path), ["devices=2"]), "cpu")
    with pytest.raises(BackendError, match="Toy has stream modules for 'cpu' once, so it can have one instance"):
        session.serve("fcfs", [], lambda: None, lambda replay: None)


def test_two_instances_of_a_backend_of_ones_own_are_served(tmp_path):
    session = Session(load_experiment(toy(tmp_path), ["devices=[cpu, other]"]), "cpu")
    report = session.serve("fcfs", [], lambda: None, lambda replay: None)
    assert report.counts["on_time"] == 10 and report.submitted == 10


def test_a_prepared_experiment_is_of_one_pipeline(tmp_path):
    prepared = prepare(load_experiment(toy(tmp_path)))
    both = dataclasses.replace(prepared, pipelines=[prepared.pipeline] * 2)
    with pytest.raises(ValueError, match="too many values"):
        _ = both.experiment
