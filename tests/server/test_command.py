"""`neustream serve`: what it is told, and what it says of what is wrong."""

from __future__ import annotations

import gc
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("starlette", reason="needs the extra 'serve'")

from toys import command

from neustream.commands.serve_config import Source, keys_of, settings_of

MODEL = "models: [{name: a, kind: text, path: x}]"
TWICE = "models: [{name: a, kind: text, path: x}, {name: a, kind: image, path: y}]"


@pytest.mark.parametrize(
    ("arguments", "text", "message"),
    [
        ([], None, "give a CONFIG, --model, or --demo"),
        (["--demo", "--model", "x"], None, "give a CONFIG, --model, or --demo"),
        (["CONFIG"], "models: []", "models"),
        (["CONFIG"], "models: [{name: a, kind: text}]", "give path, or backend"),
        (["CONFIG"], "models: [{name: a, kind: tex, path: x}]", "'text'"),
        (["CONFIG"], "models: [{name: a, kind: vllm, path: x, device: cuda}]", "leave device out"),
        (["CONFIG"], "models: [{name: 'a/b', kind: text, path: x}]", "name"),
        (["CONFIG"], MODEL + "\nhttp: {prot: 1}", "prot"),
        (["CONFIG"], MODEL + "\nhttp: {port: 99999}", "65535"),
        (["CONFIG"], TWICE, "different names"),
        (["CONFIG", "--host", "0.0.0.0"], MODEL, "give --api-key, --api-key-file, or --insecure"),
        (["CONFIG", "--api-key-file", "nowhere"], MODEL, "nowhere: "),
        (["CONFIG", "--api-key", " "], MODEL, "a key is a word"),
        (["CONFIG", "--tokenizer", "bytes"], MODEL, "--tokenizer is of --model"),
        (["CONFIG", "--cors-origin", "*"], MODEL, "http.cors_origins"),
        (["CONFIG", "--cors-origin", "https://a.b/c"], MODEL, "http.cors_origins"),
        (["CONFIG", "--head-after", "-1"], MODEL, "http.head_after_s"),
        (["CONFIG", "--access-log", "xml"], MODEL, "observe.access_log"),
        (["CONFIG", "--set", "limits.patience_s=0"], MODEL, "limits.patience_s"),
        (["CONFIG", "--set", "limits.patiense_s=5"], MODEL, "patience_s"),
        (["CONFIG", "--set", "http"], MODEL, "expected dotted.key=value"),
        (["CONFIG", "--policy", "prised"], MODEL, "did you mean 'priced'"),
        (["CONFIG", "--check"], MODEL, "x' is no folder"),
        (["CONFIG", "--check"], "models: [{name: a, kind: text, path: ., tokenizer: toks}]", "toks' is no folder"),
        (
            ["CONFIG", "--check"],
            "models: [{name: a, kind: text, path: ., adapters: {sql: there}}]",
            "model 'a': adapters.sql '",
        ),
        (
            ["CONFIG", "--check"],
            "models: [{name: a, kind: agent, graph: 'math:sine'}]",
            "model 'a': graph 'math:sine': module 'math' has no attribute 'sine'",
        ),
        (
            ["CONFIG", "--check"],
            "models: [{name: a, kind: agent, graph: 'math:pi'}]",
            "'a': an agent is a function that makes its graph, got 3.14",
        ),
        (
            ["CONFIG", "--check"],
            "models: [{name: a, kind: agent, graph: 'math:sin', params: 'math:cos'}]",
            "model 'a': params 'math:cos': no pydantic model",
        ),
        (["CONFIG"], MODEL + "\npolicy: {name: priced, shares: 1}", "shares"),
        (
            ["CONFIG", "--port", "0"],
            "models: [{name: a, kind: text, tokenizer: bytes, backend: {model_tipe: opt}}]",
            "unknown key 'backend.model_tipe'; did you mean 'model_type'? allowed: attention, checkpoint, config",
        ),
        (
            ["CONFIG", "--port", "0"],
            "models: [{name: a, kind: image, backend: {pipeline: StableDiffusionPipeline, wieghts_seed: 3}}]",
            "unknown key 'backend.wieghts_seed'; did you mean 'weights_seed'? allowed: ",
        ),
        (
            ["CONFIG", "--port", "0"],
            "models: [{name: a, kind: text, tokenizer: bytes, backend: {model_type: opt, slots: 0}}]",
            "backend.slots: Input should be greater than or equal to 1, got 0",
        ),
        (["CONFIG"], MODEL + "\npromises: {classes: {a: {on_miss: finnish}}}", "on_miss"),
    ],
)
def test_what_cannot_be_served_is_told_in_a_line(tmp_path, arguments, text, message):
    path = tmp_path / "server.yaml"
    if text is not None:
        path.write_text(text)
    told = command("serve", *[path if each == "CONFIG" else each for each in arguments])
    assert told.status == 2 and message in told.err and "Traceback" not in told.err


def test_adapters_of_a_config_are_beside_its_file(tmp_path):
    path = tmp_path / "server.yaml"
    path.write_text("models: [{name: a, kind: text, path: ., adapters: {sql: adapters/sql, b: /b}}]")
    (model,) = settings_of(Source(path), {}, {}, ()).models
    assert model.adapters == {"sql": tmp_path / "adapters" / "sql", "b": Path("/b")}


def test_a_config_is_checked_without_serving(tmp_path, monkeypatch):
    path = tmp_path / "server.yaml"
    (tmp_path / "x").mkdir()
    path.write_text(MODEL + "\npromises: {classes: {chat: {ttft_ms: 300, tpot_ms: 50}}}\n")
    told = command("serve", path, "--check")
    assert (told.status, told.out) == (0, "")
    monkeypatch.setenv("NEUSTREAM_PORT", "70000")
    assert command("serve", path, "--check").status == 2


def test_options_go_before_the_file_and_paths_are_beside_it(tmp_path, monkeypatch):
    path = tmp_path / "server.yaml"
    path.write_text(MODEL[:-2] + ", slo: {ttft_ms: 5}}]\nhttp: {port: 1, api_key_file: keys}\n")
    (tmp_path / "keys").write_text("one\ntwo\n")
    given = {"http.port": 2, "http.host": None, "limits.allow_new_sizes": True}
    found = settings_of(Source(path), given, {"ttft_ms": 7.0, "tpot_ms": 9.0}, ["limits.max_open=3", "http.port=4"])
    assert (found.http.port, found.http.host, found.limits.max_open) == (4, "127.0.0.1", 3)
    (model,) = found.models
    assert (model.slo.ttft_ms, model.slo.tpot_ms, model.path) == (5.0, 9.0, tmp_path / "x")
    assert keys_of(found.http.api_key_file, ["three"]) == ["three", "one", "two"]
    folder = settings_of(Source(None, model=tmp_path, tokenizer="bytes"), {}, {}, ()).models[0]
    assert (folder.path, folder.tokenizer, folder.kind) == (tmp_path, "bytes", "text")


def test_a_demo_measures_each_time_and_leaves_nothing(monkeypatch):
    """Or one that was begun on a busy machine would have all later ones refuse promises that could be kept."""
    seen = []

    async def served(settings, load, keys, say):
        folders = {Path(model.options["cache"]) for model in settings.models}
        seen.append((folders, all(folder.is_dir() for folder in folders)))
        for folder in folders:
            (folder / "steps.json").write_text("{}")
        return 0

    monkeypatch.setattr("neustream.server.lifecycle.run", served)
    assert command("serve", "--demo").status == command("serve", "--demo").status == 0
    (one, there), (two, _) = seen
    assert len(one) == 1 and there and one != two
    assert not any(folder.exists() for folder in one | two)


def test_full_collections_of_garbage_leave_out_what_was_loaded(monkeypatch):
    """Each would stop the event loop for as long as it looks at all of torch."""
    from neustream.commands import serve

    monkeypatch.setattr("neustream.backends.loading.load", lambda settings, metrics: [{} for _ in range(1000)])
    before = gc.get_freeze_count()
    try:
        loaded = serve._load(SimpleNamespace(cluster=None), None)
        assert gc.get_freeze_count() - before >= len(loaded)
        assert not any(each is loaded for each in gc.get_objects())
    finally:
        gc.unfreeze()
