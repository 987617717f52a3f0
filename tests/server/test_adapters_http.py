"""Adapters of a model over HTTP: listed as models, and asked for by their names."""

from __future__ import annotations

import re
import shutil

import pytest

pytest.importorskip("starlette", reason="needs the extra 'serve'")
torch = pytest.importorskip("torch", reason="needs the extra 'llm'")
peft = pytest.importorskip("peft", reason="needs peft")
httpx = pytest.importorskip("httpx", reason="needs the extra 'dev'")

import transformers  # noqa: E402
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
        assert "adapter='dora': PEFT mixes no adapters with DoRA" in loaded.failed["dora"]
        answer = loaded.service(
            byte_tokenizer()("Once upon")["input_ids"], adapter=loaded.models[1].adapter, max_tokens=8, ignore_eos=True
        )
        assert answer.text == wanted["sql"]
    finally:
        loaded.service.close()


@pytest.fixture(scope="module")
def broken(folders):
    """Why adapters cannot be loaded, by the names of their folders."""
    root, _ = folders
    (root / "empty").mkdir()
    for name in ("torn", "narrow"):
        shutil.copytree(root / "sql", root / name)
    weights = root / "torn" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    config = root / "narrow" / "adapter_config.json"
    config.write_text(config.read_text().replace('"v_proj"', '"v_proj", "k_proj"'))
    deeper = stock().config
    deeper.num_hidden_layers = 3
    with_three = transformers.AutoModelForCausalLM.from_config(deeper)
    peft.get_peft_model(with_three, peft.LoraConfig(target_modules=["q_proj"])).save_pretrained(root / "deep")
    tokens = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    peft.get_peft_model(stock(), tokens).save_pretrained(root / "tokens")
    return {
        "absent": "there is no such folder",
        "empty": "no weights are there: expected adapter_model.safetensors or adapter_model.bin",
        "torn": "SafetensorError",
        "narrow": r"it is of another model: it lacks .*k_proj",
        "deep": r"it is of another model: it has .*layers",
        "tokens": "it is of PromptTuningConfig, which puts tokens",
    }


def test_a_broken_adapter_leaves_the_model_and_the_other_adapters_as_they_are(folders, broken):
    root, wanted = folders
    for names in ([*broken, "sql"], list(broken)):
        loaded = load(settings(root, *names), lambda record: None)
        try:
            assert [model.name for model in loaded.models] == ["tiny", *(["sql"] if "sql" in names else [])]
            assert loaded.failed.keys() == broken.keys()
            for name, why in broken.items():
                assert re.match(f"adapter '{name}' cannot be loaded from .*{why}", loaded.failed[name])
            for model in loaded.models:
                chosen = {"adapter": model.adapter} if model.adapter else {}
                answer = loaded.service(
                    byte_tokenizer()("Once upon")["input_ids"], max_tokens=8, ignore_eos=True, **chosen
                )
                assert answer.text == wanted[model.name]
        finally:
            loaded.service.close()


def test_adapters_have_whatever_names_models_may_have(folders):
    root, wanted = folders
    names = ["sql-v1.2", "v1.2", "keys", "type", "training", "lora", "weight", "layers", "default"]
    config = settings(root)
    tiny = config.models[0].model_copy(update={"adapters": dict.fromkeys(names, root / "sql")})
    loaded = load(config.model_copy(update={"models": [tiny]}), lambda record: None)
    try:
        assert not loaded.failed
        assert [model.name for model in loaded.models] == ["tiny", *names]
        for model in loaded.models[1:]:
            answer = loaded.service(
                byte_tokenizer()("Once upon")["input_ids"], adapter=model.adapter, max_tokens=8, ignore_eos=True
            )
            assert answer.text == wanted["sql"]
    finally:
        loaded.service.close()


def test_adapters_of_a_model_that_is_not_there_are_told_of(folders):
    root, _ = folders
    config = settings(root)
    gone = config.models[0].model_copy(
        update={"name": "gone", "path": root / "gone", "adapters": {"poems": root / "poems"}}
    )
    loaded = load(config.model_copy(update={"models": [gone, *config.models]}), lambda record: None)
    try:
        assert loaded.failed["poems"].startswith("model 'gone': ")
    finally:
        loaded.service.close()


def test_names_that_are_taken_and_kinds_without_adapters_are_refused(folders):
    root, _ = folders
    with pytest.raises(ValueError, match="models need different names"):
        settings(root, "tiny")
    for kind in ("image", "vllm"):
        with pytest.raises(ValueError, match=f"adapters are of kind text, got kind {kind}"):
            ModelConfig(name="x", kind=kind, path=root, adapters={"y": root})
    with pytest.raises(ValueError, match="adapters are for models in this process"):
        ServerConfig(models=settings(root, "sql").models, cluster={"instances": 2})
