"""Language models from configs: built, measured and served by the command."""

from __future__ import annotations

import json

import pytest
import yaml
from texts import model_of
from toys import Flat, adds_up, command, squash

from neustream import BackendError, ConfigError, Graph, KVCache, serve
from neustream.backends import Wanted
from neustream.backends.serving import Session
from neustream.backends.tokenizer import tokenizer_in
from neustream.backends.transformers import model as served_model
from neustream.backends.transformers.from_config import byte_tokenizer, make
from neustream.backends.transformers.processors import processor_in
from neustream.config import load_experiment
from neustream.core.events import Emitted
from neustream.experiment import pipeline_of
from neustream.graphs import llm, llm_profiles
from neustream.profiling.steps import load_steps

TINY = {
    "model_type": "opt",
    "config": {
        "vocab_size": 96,
        "hidden_size": 32,
        "word_embed_proj_dim": 32,
        "ffn_dim": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 64,
    },
    "slots": 6,
}


def write(folder, **sections):
    raw = {
        "name": "tiny",
        "profiles": "profiles",
        "llm": {"max_batch": 6, "memory": {"tokens": 96, "block": 8}, "step_tokens": 32},
        "workload": {"load": 2, "requests": 16, "prompt": {"min": 2, "max": 20}, "output": {"min": 1, "max": 12}},
        "slo": {"first_s": 20, "step_s": 2},
        "policies": {"fcfs": {}, "priced": {}},
        "backend": {"kind": "transformers", **TINY},
    }
    raw["workload"]["max_tokens"] = 16
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump({**raw, **sections}, sort_keys=False))
    return path


def test_profile_then_run(tmp_path):
    path, out = write(tmp_path), tmp_path / "out"
    told = command("profile", path, "--out", tmp_path / "profiles", "--seconds", "1")
    assert told.status == 0, told.err
    assert "decode" in told.out and "6x64" in squash(told.out)
    steps = load_steps(tmp_path / "profiles/steps.json")
    assert steps.device.endswith("thread(s)")
    told = command("run", path, "--out", out)
    assert told.status == 0, told.err
    for record in json.loads((out / "report.json").read_text()):
        counts = record["counts"]
        assert adds_up(counts) and counts["submitted"] == 16
        assert counts["on_time"] == 16 == record["simulated"]["counts"]["on_time"]  # the promises are generous
        assert record["tokens"]["outputs"] == record["simulated"]["tokens"]["outputs"]


def test_generations_end_where_the_workload_says(tmp_path):
    path = write(tmp_path)
    assert command("profile", path, "--out", tmp_path / "profiles", "--seconds", "0.2").status == 0
    session = Session(load_experiment(path), "cpu")
    outputs = {}

    def count(record):
        if isinstance(record, Emitted):
            outputs[record.id] = record.index + 1

    session.serve("fcfs", [count], lambda: None, lambda replay: None)
    wanted = dict(session.prepared.lengths)
    assert outputs == wanted and len(set(wanted.values())) > 3


def test_a_model_is_tried_in_company_once_for_all_policies(tmp_path, monkeypatch):
    trials = []
    prove = served_model.prove
    monkeypatch.setattr(served_model, "prove", lambda model: (trials.append(model), prove(model)))
    path = write(tmp_path)
    assert command("profile", path, "--out", tmp_path / "profiles", "--seconds", "0.2").status == 0
    trials.clear()
    session = Session(load_experiment(path), "cpu")
    for policy in ("fcfs", "edf"):
        assert session.serve(policy, [], lambda: None, lambda replay: None).counts["failed"] == 0
    assert len(trials) == 1


def test_a_checkpoint_of_a_config(tmp_path):
    model_of("gpt2").save_pretrained(tmp_path)
    model = make({"checkpoint": str(tmp_path), "slots": 2, "max_len": 32, "request": {"temperature": 0.5}}, "cpu")
    assert model.model_name.startswith("GPT2LMHeadModel, 0.1 M") and model.dtype == "float32"
    graph = Graph("chat", llm("llm", max_batch=3))
    wanted = Wanted(graph, "", llm_profiles("llm", Flat(), max_batch=3), {"llm": KVCache(5, 8)}, 16, False)
    params = {"prompt_tokens": 5, "max_tokens": 9, "seed": 4}
    assert model.arguments(params, 3) == model.arguments(params, 3)
    with serve({"chat": model.mount(wanted)}) as service:
        answer = service.submit(**model.arguments(params, 3)[1])
        assert len(answer.result(60).token_ids) == 3 and answer.result().finish_reason == "stop"
        (member,) = service.engine.members
        pool = member.scheduler.pools["device"]
    assert pool.step_tokens == 16 and pool.kv_caches == {"chat": KVCache(5, 8)}
    known = {stage: model.stage_of(wanted, "chat", stage) for stage in (*pool.stages, "chat", "cat.decode")}
    assert known == {
        "chat.prefill": "llm.prefill",
        "chat.decode": "llm.decode",
        "chat": "llm",
        "cat.decode": None,
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": None}, "give either a checkpoint, or model_type and config"),
        ({"checkpoint": "/x"}, "give either a checkpoint, or model_type"),
        ({"model_type": None, "config": {}, "checkpoint": "/nowhere"}, "checkpoint '/nowhere' is no folder"),
        ({"model_type": "opr"}, "backend.model_type 'opr' is no model type; did you mean 'opt'. [0-9]+ are allowed"),
        ({"config": {"hiden_size": 32}}, "backend.config: OPTConfig has no 'hiden_size'; did you mean 'hidden_size'"),
        ({"weights_seed": 1 << 70}, "backend.weights_seed: Input should be less than 9223372036854775808"),
        ({"config": {"hidden_size": 32, "num_attention_heads": 5}}, "backend.model_type 'opt': ValueError: embed_dim"),
        ({"slots": True}, "backend.slots must be a number, got True"),
        ({"max_len": True}, "backend.max_len must be a number, got True"),
        ({"weights_seed": False}, "backend.weights_seed must be a number, got False"),
        ({"config": {"hidden_size": -5}}, "backend.config.hidden_size must be a whole number from 1 on, got -5"),
        ({"config": {"vocab_size": True}}, "backend.config.vocab_size must be a whole number from 1 on, got True"),
        ({"config": {"num_attention_heads": 0}}, "num_attention_heads must be a whole number from 1 on, got 0"),
        ({"config": {"ffn_dim": -1}}, "backend.config.ffn_dim must be a whole number from 0 on, got -1"),
        ({"model_type": "gpt2", "config": {"hidden_size": -5}}, "config.hidden_size must be a whole number from 1 on"),
        ({"model_type": "gpt2", "config": {"n_layer": 0}}, "backend.config.n_layer must be a whole number from 1 on"),
        ({"dtype": "int3"}, "unknown dtype 'int3'"),
        ({"slots": 0}, "backend.slots: Input should be greater than or equal to 1, got 0"),
        ({"lots": 3}, "unknown key 'backend.lots'; did you mean 'slots'. allowed: attention, checkpoint, config"),
        ({"attention": "flash_attention_2"}, "backend.attention: Input should be 'sdpa' or 'eager'"),
        ({"request": {"temprature": 1}}, "unknown 'temprature'; did you mean 'temperature'"),
        ({"request": {"top_p": 3}}, "backend.request: top_p must be"),
    ],
)
def test_wrong_options_are_named(change, message):
    with pytest.raises(BackendError, match=message):
        make({key: value for key, value in {**TINY, **change}.items() if value is not None}, "cpu")


def test_graphs_that_are_asked_for_on_a_cpu_are_refused_before_anything_is_measured(tmp_path):
    words = ["profile", write(tmp_path), "--out", tmp_path / "profiles", "--set", "backend.graphs=true"]
    told = command(*words)
    assert told.status and "graphs=True, but the model is on cpu: CUDA graphs are for CUDA devices" in told.err
    assert not (tmp_path / "profiles/steps.json").exists()


def test_a_folder_that_is_no_checkpoint(tmp_path):
    with pytest.raises(BackendError, match=r"backend\.checkpoint"):
        make({"checkpoint": str(tmp_path)}, "cpu")
    with pytest.raises(BackendError, match="a checkpoint brings its own"):
        make({"checkpoint": str(tmp_path), "config": {"hidden_size": 3}}, "cpu")


FAST = '{"tokenizer_class": "PreTrainedTokenizerFast"}'


@pytest.mark.parametrize(
    "files",
    [
        {"tokenizer.json": "{", "tokenizer_config.json": '{"tokenizer_class": "PreTrainedTokenizerFast"}'},
        {
            "tokenizer.json": '{"version": "1.0"}',
            "tokenizer_config.json": '{"tokenizer_class": "PreTrainedTokenizerFast"}',
        },
        {"tokenizer_config.json": "[1]"},
    ],
    ids=["cut short", "without words", "a list"],
)
def test_a_damaged_tokenizer_is_named(tmp_path, files):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(BackendError, match=rf"the tokenizer in '{tmp_path}' cannot be made: \w+Error: "):
        tokenizer_in(tmp_path)


def test_a_folder_without_a_tokenizer_is_none(tmp_path):
    model = model_of("gpt2")
    model.save_pretrained(tmp_path)
    with pytest.raises(BackendError, match="has no tokenizer: give tokenizer: a folder that has one, or bytes"):
        processor_in(tmp_path, model)
    byte_tokenizer().save_pretrained(tmp_path)
    assert len(processor_in(tmp_path, model)) == 257


def test_requests_that_do_not_fit_are_told_before_serving(tmp_path):
    path = write(tmp_path)
    assert command("profile", path, "--out", tmp_path / "profiles", "--seconds", "0.2").status == 0
    with pytest.raises(BackendError, match="max_len=65, but OPTForCausalLM has 64 positions"):
        Session(load_experiment(path, ["backend.max_len=65"]), "cpu")
    long = load_experiment(path, ["workload.max_tokens=60"])
    with pytest.raises(BackendError, match=r"request 'tiny-\d+': \d+ tokens of prompt and max_tokens=60 make"):
        Session(long, "cpu")


def test_a_backend_without_an_llm(tmp_path):
    path = write(tmp_path)
    assert command("profile", path, "--out", tmp_path / "profiles", "--seconds", "0.2").status == 0
    settings = ["backend={kind: 'toy_backend:make'}", "backend.allow_other_device=true"]
    other = load_experiment(path, settings)
    with pytest.raises(ConfigError, match=r"has no module for stage\(s\) \['llm', 'llm.decode', 'llm.prefill'\]"):
        Session(other, "cpu")


TINY_LLAVA = {
    "model_type": "llava",
    "config": {
        "image_token_index": 257,
        "text_config": {
            "model_type": "llama",
            "vocab_size": 258,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "max_position_embeddings": 64,
        },
        "vision_config": {
            "model_type": "clip_vision_model",
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 16,
            "patch_size": 4,
        },
    },
    "slots": 6,
}
LOOKING = {
    "load": 1,
    "requests": 8,
    "prompt": {"min": 18, "max": 30},
    "output": {"min": 1, "max": 6},
    "max_tokens": 8,
    "images": 0.5,
}


def test_prompts_with_images_are_profiled_simulated_and_run(tmp_path):
    path = write(tmp_path, workload=LOOKING, policies={"priced": {}}, backend={"kind": "transformers", **TINY_LLAVA})
    told = command("profile", path, "--out", tmp_path / "profiles", "--seconds", "1")
    assert told.status == 0, told.err
    assert {file.name for file in (tmp_path / "profiles").iterdir()} == {"steps.json", "see.json"}
    told = command("run", path, "--out", tmp_path / "out")
    assert told.status == 0, told.err
    (trace,) = (tmp_path / "out").glob("trace*.json")
    pipeline = pipeline_of(load_experiment(path))
    looks = [request.params["images"] for request in pipeline.draw(pipeline.load_profiles()).requests]
    assert "llm.see" in trace.read_text() and 0 < sum(looks) < 8
    (record,) = json.loads((tmp_path / "out/report.json").read_text())
    assert record["counts"]["on_time"] == 8 == record["simulated"]["counts"]["on_time"]


def test_an_image_needs_a_longer_prompt_and_a_processor(tmp_path):
    model = make(TINY_LLAVA, "cpu")
    with pytest.raises(BackendError, match="a prompt of 16 tokens has no room for an image of 16, and a text"):
        model.arguments({"seed": 0, "prompt_tokens": 16, "max_tokens": 2, "images": 1})
    wrong = {**TINY_LLAVA, "config": {**TINY_LLAVA["config"], "image_token_index": 9}}
    with pytest.raises(BackendError, match=r"backend\.config\.image_token_index must be 257, got 9"):
        make(wrong, "cpu").see(2)
    with pytest.raises(BackendError, match="OPTForCausalLM has no eyes"):
        make(TINY, "cpu").see(2)


ALONE = {
    "model_type": "openai-gpt",
    "attention": "eager",
    "config": {"vocab_size": 96, "n_embd": 32, "n_head": 2, "n_layer": 1, "n_positions": 64},
    "slots": 2,
}


@pytest.mark.parametrize(
    ("backend", "told"),
    [(TINY, "texts: batched, in slots"), (ALONE, "texts: one by one, with caches of their own (")],
)
def test_models_tells_whether_texts_are_batched(tmp_path, backend, told):
    path = write(tmp_path, backend={"kind": "transformers", **backend})
    assert "texts:" not in command("models", path).out
    done = command("models", path, "--try", "cpu", "--json", tmp_path / "out.json")
    assert done.status == 0 and told in done.out
    (model,) = json.loads((tmp_path / "out.json").read_text())
    assert model["texts"]["slots"] is (backend is TINY) and model["texts"]["batched"] is (backend is TINY)


def test_models_tells_a_device_that_is_none(tmp_path):
    path = write(tmp_path, backend={"kind": "transformers", **TINY})
    done = command("models", path, "--try", "nowhere")
    assert done.status == 2 and "nowhere" in done.err
