"""Tokenizers that a server's config names and that are none: of models of vLLM too, before these have an engine."""

from __future__ import annotations

import pytest

pytest.importorskip("starlette", reason="needs the extra 'serve'")
pytest.importorskip("torch", reason="needs the extra 'llm'")

from serving import stock
from toys import Flat

from neustream import BackendError
from neustream.backends.loading import load
from neustream.server.config import ServerConfig


@pytest.fixture(scope="module")
def model():
    return stock()


def config(path, kind, **more):
    known = {"name": "a", "kind": kind, "path": str(path), "options": {"profile": Flat()} if kind == "text" else {}}
    return ServerConfig.model_validate({"models": [{**known, **more}]})


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (None, "(the tokenizer in '.*' cannot be made|'.*' has no tokenizer): "),
        ("{", r"the tokenizer in '.*' cannot be made: \w+Error: "),
        ('{"version": "1.0"}', r"the tokenizer in '.*' cannot be made: \w+Error: "),
    ],
    ids=["none", "cut short", "without words"],
)
@pytest.mark.parametrize("kind", ["text", "vllm"])
@pytest.mark.parametrize("named", [False, True])
def test_a_tokenizer_that_is_none_is_named(tmp_path, model, kind, text, why, named):
    folder, words = tmp_path / "model", tmp_path / "words"
    model.save_pretrained(folder)
    words.mkdir()
    where = words if named else folder
    if text is not None:
        (where / "tokenizer.json").write_text(text)
        (where / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    more = {"tokenizer": str(words)} if named else {}
    with pytest.raises(BackendError, match=f"^model 'a': {why}"):
        load(config(folder, kind, **more), lambda record: None)


def test_vllm_takes_no_tokenizer_of_bytes(tmp_path):
    with pytest.raises(ValueError, match="vllm takes the tokenizer of a folder: bytes is for kind text"):
        config(tmp_path, "vllm", tokenizer="bytes")
