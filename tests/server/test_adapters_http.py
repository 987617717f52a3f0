"""Adapters of a model over HTTP: listed as models, and asked for by their names."""

from __future__ import annotations

import pytest

pytest.importorskip("starlette", reason="needs the extra 'serve'")
torch = pytest.importorskip("torch", reason="needs the extra 'llm'")
peft = pytest.importorskip("peft", reason="needs peft")
httpx = pytest.importorskip("httpx", reason="needs the extra 'dev'")

from serving import serving, stock  # noqa: E402

from neustream.backends.copies import twin  # noqa: E402
from neustream.backends.loading import load  # noqa: E402
from neustream.backends.transformers.from_config import byte_tokenizer  # noqa: E402
from neustream.server.config import ModelConfig, ServerConfig  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")

ASK = {"prompt": "Once upon", "max_tokens": 8, "temperature": 0, "ignore_eos": True}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A model on disk, two adapters of it that can be mixed, and one that cannot; and what each says."""
    root = tmp_path_factory.mktemp("adapters")
    model = stock()
    model.save_pretrained(root / "model")
    said = {"tiny": _says(model)}
    for name, more in (("sql", {}), ("poems", {"lora_alpha": 32}), ("dora", {"use_dora": True})):
        torch.manual_seed(len(name))
        config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False, **more)
        wrapped = peft.get_peft_model(twin(model), config).eval()
        wrapped.save_pretrained(root / name)
        said[name] = _says(wrapped)
    return root, said


def _says(model):
    ids = torch.tensor([byte_tokenizer()("Once upon")["input_ids"]])
    out = model.generate(input_ids=ids, max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=256)
    return byte_tokenizer().decode(out[0, ids.shape[1] :])


def settings(root, *names):
    adapters = {name: root / name for name in names}
    options = {"slots": 4, "measure_s": 0.1, "cache": root / "cache"}
    given = {"path": root / "model", "tokenizer": "bytes", "adapters": adapters, "options": options}
    return ServerConfig(models=[ModelConfig(name="tiny", kind="text", **given)])


def test_adapters_are_models_that_requests_name(folders):
    root, wanted = folders
    assert len(set(wanted.values())) == 4
    with serving(lambda metrics: load(settings(root, "sql", "poems"), metrics)) as (url, said, _):
        said.get(timeout=60)
        with httpx.Client(base_url=url, timeout=60) as client:
            listed = {each["id"]: each for each in client.get("/v1/models").json()["data"]}
            assert list(listed) == ["tiny", "sql", "poems"]
            assert "parent" not in listed["tiny"]
            assert listed["sql"]["parent"] == listed["sql"]["root"] == "tiny"
            assert client.get("/v1/models/poems").json()["parent"] == "tiny"
            for name in listed:
                answer = client.post("/v1/completions", json={**ASK, "model": name, "n": 2}).json()
                assert answer["model"] == name
                assert [choice["text"] for choice in answer["choices"]] == [wanted[name]] * 2
            chat = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 4, "temperature": 0}
            assert client.post("/v1/chat/completions", json={**chat, "model": "sql"}).json()["model"] == "sql"
            missing = client.post("/v1/completions", json={**ASK, "model": "sqk"})
            assert missing.status_code == 404 and "sql" in missing.json()["error"]["message"]
            nameless = client.post("/v1/completions", json=ASK).json()
            assert (nameless["model"], nameless["choices"][0]["text"]) == ("tiny", wanted["tiny"])
            assert 'model="poems"' in client.get("/metrics").text


def test_an_adapter_that_cannot_be_chosen_is_told_of_and_the_others_are_served(folders):
    root, wanted = folders
    loaded = load(settings(root, "sql", "dora"), lambda record: None)
    try:
        assert [model.name for model in loaded.models] == ["tiny", "sql"]
        assert "PEFT mixes no adapters with DoRA" in loaded.failed["dora"]
        answer = loaded.service(
            byte_tokenizer()("Once upon")["input_ids"], adapter="sql", max_tokens=8, ignore_eos=True
        )
        assert answer.text == wanted["sql"]
    finally:
        loaded.service.close()


def test_a_folder_that_is_no_adapter_and_names_that_are_taken_are_refused(folders):
    root, _ = folders
    with pytest.raises(Exception, match=r"adapter 'model' cannot be loaded from"):
        load(settings(root, "model"), lambda record: None)
    with pytest.raises(ValueError, match="models need different names"):
        settings(root, "tiny")
    for kind in ("image", "vllm"):
        with pytest.raises(ValueError, match=f"adapters are of kind text, got kind {kind}"):
            ModelConfig(name="x", kind=kind, path=root, adapters={"y": root})
    with pytest.raises(ValueError, match="adapters are for models in this process"):
        ServerConfig(models=settings(root, "sql").models, cluster={"instances": 2})
