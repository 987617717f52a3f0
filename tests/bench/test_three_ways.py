"""The same options and seed give the same requests to a server, to a simulation and to a model in this process."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("httptools", reason="needs the extra 'bench'")
pytest.importorskip("transformers", reason="needs the extra 'llm'")
import yaml
from stub import Stub
from toys import command

from neustream.bench import read_runs

pytestmark = pytest.mark.usefixtures("unhurried")
STEPS = {
    "format": "neustream.profile/1", "kind": "steps", "stage": "llm", "device": "toy device", "origin": {},
    "prefill": {"tokens": [1, 100], "latency_s": [0.002, 0.01], "fit": [0.002, 8e-5, 0]},
    "decode": {"fit": [0.002, 1e-5, 0]},
}  # fmt: skip
SIZES = {"hidden_size": 16, "ffn_dim": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "word_embed_proj_dim": 16}
MODEL = {
    "name": "tiny",
    "profiles": "profiles",
    "backend": {
        "kind": "transformers",
        "model_type": "opt",
        "allow_other_device": True,
        "config": {**SIZES, "vocab_size": 300, "max_position_embeddings": 256},
    },
    "llm": {"max_batch": 8, "memory": {"tokens": 2048}},
    "workload": {"rate": 5, "requests": 2, "prompt": 4, "output": 2, "max_tokens": 2},
    "slo": {"first_s": 60, "step_s": 60},
}
RANDOM = ["--random-input-len", 8, "--random-output-len", 3, "--random-range-ratio", 0.5, "--random-prefix-len", 3]
CLASSES = ["--slo-class", "fast:ttft=20000,tpot=20000", "--slo-class", "slow:share=2,e2e=90000,priority=3"]
SESSIONS = ["--dataset-name", "sessions", "--sessions-groups", 2, "--sessions-turns", 3, "--sessions-think", 0.01]
LENGTHS = ["--sessions-system-len", 6, "--sessions-question-len", 4, "--output-len", 3, "--goodput", "e2el:60000"]
SAME = ("id", "kind", "asked_tokens", "limits", "slo_class", "session", "params")


@pytest.fixture(scope="module")
def stub():
    with Stub(first_s=0.001, gap_s=0.001) as running:
        yield running


@pytest.fixture
def here(tmp_path, monkeypatch):
    (tmp_path / "profiles").mkdir()
    (tmp_path / "profiles/steps.json").write_text(json.dumps(STEPS))
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(MODEL))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def records(folder):
    ((run,), _) = read_runs(folder)
    return {record.id: record for record in run.records}


@pytest.mark.parametrize("data", [[*RANDOM, *CLASSES], [*SESSIONS, *LENGTHS]], ids=["random", "sessions"])
def test_requests_are_the_same_over_http_simulated_and_in_this_process(here, stub, data):
    asked = ["--num-prompts", 9, "--request-rate", 100, "--seed", 5, "--tokenizer", "bytes", *data]
    twin = ["--backend", "neustream", "--config", "tiny.yaml"]
    before = len(stub.log)
    ways = {
        "http": ["--base-url", stub.url, "--model", "paced", "--ignore-eos"],
        "simulated": twin,
        "served": [*twin, "--real"],
    }
    for name, way in ways.items():
        done = command("bench", "serve", *asked, *way, "--out", name)
        assert done.status == 0, done.err
    http, simulated, served = (records(here / name) for name in ways)
    assert len(http) == 9 and all(record.done for way in (http, simulated, served) for record in way.values())
    for id, record in http.items():
        told = {name: getattr(record, name) for name in SAME}
        assert told == {name: getattr(simulated[id], name) for name in SAME}
        assert told == {name: getattr(served[id], name) for name in SAME}
        assert simulated[id].input_tokens == served[id].input_tokens
    first = [record for record in http.values() if int(record.id) < 3]  # of a session the turns behind come later
    for record in first:
        assert record.scheduled_s == simulated[record.id].scheduled_s == served[record.id].scheduled_s
    if data[0] == RANDOM[0]:
        lengths = sorted(len(each.body["prompt"]) for each in stub.log[before:] if "prompt" in each.body)
        assert lengths == sorted(record.input_tokens for record in simulated.values())
