"""The sizes of models by their architecture are those of the models that are built."""

from __future__ import annotations

import warnings

import pytest

torch = pytest.importorskip("torch", reason="needs the extra 'diffusion'")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # diffusers' own imports
    pytest.importorskip("diffusers", reason="needs the extra 'diffusion'")
    from neustream.backends.diffusers import from_config as of_images
    from neustream.backends.diffusers.parts import models_of
    from neustream.backends.transformers import from_config as of_texts

from neustream.backends.options import options_of  # noqa: E402
from neustream.backends.sizes import sizes_of  # noqa: E402
from neustream.config import load_experiment  # noqa: E402
from neustream.config.schema import Backend  # noqa: E402
from neustream.errors import BackendError  # noqa: E402

pytestmark = [
    # numpy 2's complaints about how diffusers 0.42 calls it, and torch's about transformers
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

TINY = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 64}


def weights(model):
    return sum(weight.numel() for weight in model.parameters())


@pytest.mark.parametrize("name", ["dit_tiny", "sd_tiny"])
def test_a_pipeline_has_the_size_of_the_one_that_is_built(root, name, tmp_path):
    backend = load_experiment(root / f"configs/demo/{name}.yaml").backend
    pipe = of_images.build(options_of(of_images.Options, backend.options))
    sizes = sizes_of(backend)
    assert {part.name: part.parameters for part in sizes.parts} == {
        name: weights(model) for name, model in models_of(pipe)
    }
    assert sizes.bytes == 4 * sizes.parameters and sizes.kv_bytes is None
    pipe.save_pretrained(tmp_path)
    saved = sizes_of(Backend(kind="diffusers", checkpoint=str(tmp_path), dtype="float16"))
    assert saved.parameters == sizes.parameters and saved.bytes == 2 * sizes.parameters


@pytest.mark.parametrize(
    ("kind", "more", "kv_heads"),
    [
        ("opt", {"ffn_dim": 64, "word_embed_proj_dim": 32}, 4),
        ("llama", {"num_key_value_heads": 2, "intermediate_size": 64}, 2),
    ],
)
def test_a_language_model_has_the_size_of_the_one_that_is_built(kind, more, kv_heads, tmp_path):
    given = {"model_type": kind, "config": {**TINY, **more}}
    model = of_texts.build(of_texts.Options(**given), torch.device("cpu"))
    sizes = sizes_of(Backend(kind="transformers", **given))
    assert sizes.parameters == weights(model)
    assert sizes.kv_bytes == 2 * 2 * kv_heads * 8 * 4
    model.save_pretrained(tmp_path)
    assert sizes_of(Backend(kind="transformers", checkpoint=str(tmp_path))).parameters == sizes.parameters


@pytest.mark.parametrize(
    ("kind", "more", "attending"),
    [
        ("mamba", {}, 0),
        ("jamba", {"num_hidden_layers": 8, "num_key_value_heads": 2, "intermediate_size": 32, "num_experts": 2}, 1),
    ],
)
def test_only_layers_that_attend_have_keys_and_values(kind, more, attending):
    given = {name: value for name, value in TINY.items() if kind != "mamba" or name != "num_attention_heads"}
    sizes = sizes_of(Backend(kind="transformers", model_type=kind, config={**given, **more}))
    assert sizes.kv_bytes == (2 * 2 * 8 * 4 * attending or None)


def test_what_a_library_has_against_a_config_is_told():
    wrong = Backend(kind="transformers", model_type="gpt_neo", config={"num_layers": 4})
    with pytest.raises(BackendError, match=r"^backend: .*Configuration for convolutional module is incorrect"):
        sizes_of(wrong)


def test_the_published_sizes(root):
    """OPT-13B has 12.9 billion parameters; the UNet of Stable Diffusion 1.5 has 859.5 million."""
    chat = sizes_of(load_experiment(root / "configs/paper/opt_13b_a6000.yaml").backend)
    assert round(chat.parameters / 1e9, 1) == 12.9 and chat.bytes == 2 * chat.parameters
    images = sizes_of(load_experiment(root / "configs/paper/sd15_512_h100.yaml").backend)
    assert {part.name: round(part.parameters / 1e6, 1) for part in images.parts}["unet"] == 859.5


@pytest.mark.parametrize(
    ("backend", "message"),
    [
        ({"kind": "transformers", "model_type": "optt"}, "optt"),
        ({"kind": "transformers"}, "give either a checkpoint, or model_type and config"),
        ({"kind": "transformers", "checkpoint": "/nowhere"}, "nowhere"),
        ({"kind": "diffusers", "checkpoint": "/nowhere"}, "no folder with a model_index.json"),
        ({"kind": "diffusers", "components": {"unet": {"class": "UNett"}}}, "has a class 'UNett'"),
        ({"kind": "diffusers", "components": {"unet": {"class": "UNet2DModel", "x": 1}}}, "'x'"),
        ({"kind": "diffusers", "dtype": "float12"}, "unknown dtype 'float12'"),
    ],
)
def test_what_is_no_architecture_is_told(backend, message):
    with pytest.raises(BackendError, match=message):
        sizes_of(Backend(**backend))


def test_what_a_backend_of_ones_own_builds_is_not_known():
    assert sizes_of(None) == "the config has no backend section"
    assert sizes_of(Backend(kind="my:make")) == "what backend 'my:make' builds is its own"
