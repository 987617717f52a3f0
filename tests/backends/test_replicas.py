"""Replicas of a language model: each request on one of them, with the tokens that it gets alone."""

from __future__ import annotations

import copy
import json
import threading

import pytest
from places import DEVICE
from test_texts import MAX, engine
from test_transformers_config import write
from texts import alone, model_of, prompts
from toys import adds_up, command

from neustream import BackendError, EventLog
from neustream.backends.copies import copies, twin
from neustream.backends.serving import Session
from neustream.config import load_experiment
from neustream.core.events import Emitted
from neustream.core.kv_cache import KVCache
from neustream.engine.events import Finished


class Places:
    """An observer: the members on which each request's steps ran."""

    def __init__(self):
        self.of = {}

    def __call__(self, record):
        if isinstance(record, Finished):
            for id in record.step.ids:
                self.of.setdefault(id, set()).add(record.member)


@pytest.mark.parametrize("policy", ["priced", "fcfs"])
def test_two_replicas_serve_the_tokens_of_generate(policy):
    model, places = model_of("llama"), Places()
    wanted = [tuple(alone(model, prompt, MAX)) for prompt in prompts(20)]
    with engine(model, policy=policy, devices=[str(DEVICE)] * 2, observers=[places]) as running:
        answers = [running.submit(prompt, max_tokens=MAX) for prompt in prompts(20)]
        assert [answer.result(60).token_ids for answer in answers] == wanted
        assert running.models[""].used == 0
    assert set().union(*places.of.values()) == {"cpu#0", "cpu#1"}
    assert len(places.of) == 20 and all(len(members) == 1 for members in places.of.values())
    assert running.report.submitted == running.report.counts["on_time"] == 20


def test_replicas_run_at_the_same_time():
    model, both = model_of("opt", num_hidden_layers=1), threading.Barrier(2)

    def meet(module, inputs):
        both.wait(30)

    with engine(copy.deepcopy(model), devices=[str(DEVICE)] * 2) as running:
        for _, texts in running.models[""]._devices:
            texts.model.model.register_forward_pre_hook(meet)
        answers = [running.submit(prompt, max_tokens=1) for prompt in prompts(2)]
        done = [answer.result(60).token_ids for answer in answers]
    assert done == [tuple(alone(model, prompt, 1)) for prompt in prompts(2)]


def test_each_replica_has_blocks_of_its_own():
    model = model_of("opt")
    wanted = [tuple(alone(model, prompt, 40)) for prompt in prompts(10, high=20)]
    options = {"policy": "fcfs", "slots": 10, "kv_cache": KVCache(9, 8), "devices": [str(DEVICE)] * 2}
    with engine(model, **options) as running:
        answers = [running.submit(prompt, max_tokens=40) for prompt in prompts(10, high=20)]
        assert [answer.result(60).token_ids for answer in answers] == wanted
    assert running.report.preemptions > 0 and running.models[""].used == 0


def test_a_request_is_cancelled_where_it_is():
    with engine(model_of("opt"), devices=[str(DEVICE)] * 2) as running:
        answers = [running.submit(prompt, max_tokens=80, ignore_eos=True) for prompt in prompts(4, high=10)]
        for answer in answers:
            next(iter(answer))
            assert answer.cancel()
        assert running(prompts(1)[0], max_tokens=2).token_ids and running.models[""].used == 0
    counts = running.report.counts
    assert counts["on_time"] == 1 and counts["cancelled"] == 4


def test_replicas_on_one_device_share_weights_and_nothing_else():
    model = copy.deepcopy(model_of("llama"))
    first, second = copies(model, [str(DEVICE)] * 2)
    assert first is model and second is not model
    for one, other in zip(first.parameters(), second.parameters(), strict=True):
        assert one is other
    mine = {id(buffer) for buffer in first.buffers()}
    assert mine and mine.isdisjoint(id(buffer) for buffer in second.buffers())
    assert {id(module) for module in first.modules()}.isdisjoint(id(module) for module in second.modules())


def test_tied_weights_stay_tied():
    model = model_of("opt")
    other = twin(model)
    assert other.get_input_embeddings().weight is other.get_output_embeddings().weight
    assert other.get_input_embeddings().weight is model.get_input_embeddings().weight


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"devices": []}, r"devices must be a list of device names, as \['cpu', 'cpu'\], got \[\]"),
        ({"devices": "cpu"}, "devices must be a list of device names, .* got 'cpu'"),
        ({"devices": 2}, "devices must be a list of device names, .* got 2"),
        ({"devices": ["cpu", "gpu"]}, "unknown device 'gpu'"),
        ({"devices": ["cpu", "cuda:77"]}, "device 'cuda:77' is not here"),
        ({"devices": ["cpu", 3]}, "a device is a name, as 'cpu', got 3"),
    ],
)
def test_devices_that_are_none(options, message):
    with pytest.raises(BackendError, match=message):
        engine(model_of("opt"), **options)


def test_a_model_that_cannot_be_copied_is_told():
    model = copy.deepcopy(model_of("opt"))
    model.kept = threading.Lock()
    with pytest.raises(BackendError, match="OPTForCausalLM cannot be on several devices: copying it raised TypeError"):
        engine(model, devices=[str(DEVICE)] * 2)
    with engine(model, devices=[str(DEVICE)]) as running:
        assert running(prompts(1)[0], max_tokens=2).token_ids


# -- from a config ------------------------------------------------------------------------------------


def two(folder, **llm):
    section = {"max_batch": 6, "memory": {"tokens": 96, "block": 8}, "step_tokens": 32, **llm}
    path = write(folder, llm=section, devices=2)
    assert command("profile", path, "--out", folder / "profiles", "--seconds", "0.2").status == 0
    return path


def test_a_config_with_two_instances_is_simulated_and_served(tmp_path):
    path, out = two(tmp_path), tmp_path / "out"
    told = command("run", path, "--out", out)
    assert told.status == 0, told.err
    for record in json.loads((out / "report.json").read_text()):
        counts = record["counts"]
        assert adds_up(counts) and counts["on_time"] == 16 == record["simulated"]["counts"]["on_time"]
        assert record["tokens"]["outputs"] == record["simulated"]["tokens"]["outputs"]


def test_both_instances_serve_each_policy_in_turn(tmp_path):
    path = two(tmp_path)
    tokens = {}
    for instances in (1, 2):
        experiment = load_experiment(path, [f"devices={instances}", "workload.load=50"])
        session = Session(experiment, "cpu")
        for policy in ("fcfs", "priced"):
            seen, places = tokens.setdefault((instances, policy), {}), Places()

            def note(record, seen=seen):
                if isinstance(record, Emitted):
                    seen.setdefault(record.id, []).append(record.update["token"])

            report = session.serve(policy, [note, places, EventLog()], lambda: None, lambda replay: None)
            assert adds_up({"submitted": report.submitted, **report.counts})
            assert set().union(*places.of.values()) == ({"cpu#0", "cpu#1"} if instances == 2 else {""})
    assert len(tokens[1, "fcfs"]) == 16
    assert all(same == tokens[1, "fcfs"] for same in tokens.values())


def test_each_named_device_has_an_instance(tmp_path):
    places = Places()
    session = Session(load_experiment(two(tmp_path), ["devices=[cpu, cpu, cpu]", "workload.load=50"]), "cuda:7")
    session.serve("fcfs", [places], lambda: None, lambda replay: None)
    assert set().union(*places.of.values()) == {"cpu#0", "cpu#1", "cpu#2"}
