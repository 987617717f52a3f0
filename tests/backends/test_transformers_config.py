"""Language models from configs: built, measured and served by the command."""

from __future__ import annotations

import json

import pytest
import yaml
from texts import model_of
from toys import adds_up, command, squash

from neustream import BackendError, ConfigError, Graph, Request
from neustream.backends.serving import Session, make_backend
from neustream.backends.transformers.from_config import make
from neustream.config import load_experiment
from neustream.core.batch import input_of
from neustream.core.events import Emitted
from neustream.core.work import Walk
from neustream.graphs import llm
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
    with Session(load_experiment(path), "cpu") as session:
        wanted = dict(session.prepared.lengths)
        session.warm_up()
        outputs = {}

        def count(record):
            if isinstance(record, Emitted):
                outputs[record.id] = record.index + 1

        session.serve("fcfs", [count], lambda: None, lambda engine: None)
    assert outputs == wanted and len(set(wanted.values())) > 3


def test_a_checkpoint_of_a_config(tmp_path):
    model_of("gpt2").save_pretrained(tmp_path)
    served = make({"checkpoint": str(tmp_path), "slots": 2, "max_len": 32, "request": {"temperature": 0.5}}, "cpu")
    assert served.model_name.startswith("GPT2LMHeadModel, 0.1 M") and served.dtype == "float32"
    assert served.modules.keys() == {"llm.prefill", "llm.decode", "llm"}
    served.lengths = {"r": 3}
    graph = Graph("chat", llm())
    walk = Walk(Request("r", graph, params={"prompt_tokens": 5, "max_tokens": 9, **served.params(4)}))
    first, tokens = input_of(walk.job), []
    while walk.stage is not None:
        (update,) = served.modules[walk.stage.name].step([input_of(walk.job)])
        tokens.append(update["token"])
        walk.advance(update)
    assert len(tokens) == 3 and served.ask(first).prompt == served.ask(first).prompt
    served.texts.release("r")
    served.sync()
    assert served.image({}) is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": None}, "give either a checkpoint, or model_type and config"),
        ({"checkpoint": "/x"}, "give either a checkpoint, or model_type"),
        ({"model_type": None, "config": {}, "checkpoint": "/nowhere"}, "checkpoint '/nowhere' is no folder"),
        ({"model_type": "opr"}, "backend.model_type 'opr': ValueError: Unrecognized"),
        ({"config": {"hidden_size": 32, "num_attention_heads": 5}}, "backend.model_type 'opt': ValueError: embed_dim"),
        ({"dtype": "int3"}, "unknown dtype 'int3'"),
        ({"slots": 0}, "backend.slots: Input should be greater than or equal to 1"),
        ({"lots": 3}, "backend.lots: Extra inputs are not permitted; options: checkpoint, model_type"),
        ({"max_len": 65}, "max_len=65, but OPTForCausalLM has 64 positions"),
        ({"attention": "flash_attention_2"}, "backend.attention: Input should be 'sdpa' or 'eager'"),
        ({"request": {"temprature": 1}}, "unknown 'temprature'; did you mean 'temperature'"),
        ({"request": {"top_p": 3}}, "backend.request: top_p must be"),
    ],
)
def test_wrong_options_are_named(change, message):
    with pytest.raises(BackendError, match=message):
        make({key: value for key, value in {**TINY, **change}.items() if value is not None}, "cpu")


def test_a_folder_that_is_no_checkpoint(tmp_path):
    with pytest.raises(BackendError, match=r"backend\.checkpoint"):
        make({"checkpoint": str(tmp_path)}, "cpu")
    with pytest.raises(BackendError, match="a checkpoint brings its own"):
        make({"checkpoint": str(tmp_path), "config": {"hidden_size": 3}}, "cpu")


def test_requests_that_do_not_fit_are_told_before_serving(tmp_path):
    path = write(tmp_path)
    assert command("profile", path, "--out", tmp_path / "profiles", "--seconds", "0.2").status == 0
    long = load_experiment(path, ["workload.max_tokens=60"])
    with pytest.raises(BackendError, match=r"request 'tiny-\d+': \d+ tokens of prompt and max_tokens=60 make"):
        Session(long, "cpu")


def test_a_backend_without_an_llm(tmp_path):
    path = write(tmp_path, backend={"kind": "toy_backend:make"})
    with pytest.raises(ConfigError, match=r"has no module for stage\(s\) \['llm', 'llm.decode', 'llm.prefill'\]"):
        make_backend(load_experiment(path), "cpu")
