"""Pipelines as people have them: loaded from disk, in half precision, with adapters and added words."""

from __future__ import annotations

import warnings

import pytest

torch = pytest.importorskip("torch", reason="needs the extra 'diffusion'")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # diffusers' own imports
    d = pytest.importorskip("diffusers", reason="needs the extra 'diffusion'")
    transformers = pytest.importorskip("transformers", reason="needs the extra 'diffusion'")
    from pipelines import FAMILIES, Request, alone, build, difference, ready, requests, stock, together

pytestmark = [
    # numpy 2's complaints about how diffusers 0.42 calls it, and torch's about transformers
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

SAVED = ("stable_diffusion", "stable_diffusion_xl", "stable_diffusion_3", "flux", "dit", "wan", "ltx", "kandinsky")
HALF = 5e-2


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def loaded(folder, dtype=torch.float32, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return ready(d.DiffusionPipeline.from_pretrained(folder, torch_dtype=dtype, **options), dtype)


def check(pipe, some, tolerance):
    """Alone bitwise, together close; returns what the stock pipeline makes of `some`."""
    references = [stock(pipe, request) for request in some]
    assert torch.equal(alone(pipe, some[0]), references[0])
    for output, reference in zip(together(pipe, some), references, strict=True):
        assert difference(output, reference) < tolerance
    return references


def of_prompts(*prompts, **options):
    content = {"output_type": "pt", **options}
    return [Request({**content, "prompt": prompt}, at, steps=3 + at) for at, prompt in enumerate(prompts)]


@pytest.mark.parametrize("name", SAVED)
def test_a_pipeline_saved_to_disk(tmp_path, name):
    made, some = build(name), requests(name)[:3]
    made.save_pretrained(tmp_path)
    pipe = loaded(tmp_path, local_files_only=True)
    assert type(pipe) is type(made)
    references = check(pipe, some, FAMILIES[name].tolerance)
    assert torch.equal(references[0], stock(made, some[0]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["stable_diffusion", "flux"])
def test_a_variant_in_half_precision(tmp_path, name, dtype):
    build(name, torch.float16).save_pretrained(tmp_path, variant="fp16")
    assert list(tmp_path.glob("*/*.fp16.safetensors"))
    pipe = loaded(tmp_path, dtype, variant="fp16", local_files_only=True)
    assert pipe.vae.dtype == dtype
    check(pipe, [Request(r.content, r.seed, dtype, steps=r.steps) for r in requests(name)[:3]], HALF)


# A whole pipeline from a single file (`StableDiffusionPipeline.from_single_file`) takes one in the layout of the
# original repositories, which diffusers reads but does not write, so there is no tiny one. What is tested are its
# models, each from a single file with its config from a local folder, and the pipeline that they make.
@pytest.mark.parametrize(("name", "parts"), [("stable_diffusion", ("unet", "vae")), ("flux", ("transformer", "vae"))])
def test_models_from_single_files(tmp_path, name, parts):
    pipe, some = build(name), requests(name)[:3]
    for part in parts:
        model = getattr(pipe, part)
        model.save_pretrained(tmp_path / part)
        (file,) = (tmp_path / part).glob("*.safetensors")
        file = file.rename(tmp_path / f"{part}.safetensors")
        load = type(model).from_single_file
        pipe.register_modules(**{part: load(str(file), config=str(tmp_path / part), local_files_only=True)})
    references = check(ready(pipe, torch.float32), some, FAMILIES[name].tolerance)
    assert torch.equal(references[0], stock(build(name), some[0]))


def test_an_added_word_with_its_embedding():
    """Textual inversion: the tokenizer and the text encoder have words that they did not have."""
    pipe = build("stable_diffusion")
    plain = stock(pipe, of_prompts("a photo of wug")[0])
    one, two = torch.randn(3, 32, generator=torch.Generator().manual_seed(0)).split([1, 2])
    pipe.load_textual_inversion({"wug": one}, token="wug")
    pipe.load_textual_inversion({"blick": two}, token="blick")  # a word of two vectors
    some = of_prompts("a photo of wug", "a photo of blick", "a photo of a cat", guidance_scale=5.0)
    references = check(pipe, some, 1e-5)
    assert difference(stock(pipe, of_prompts("a photo of wug")[0]), plain) > 1e-3
    assert difference(references[1], stock(pipe, of_prompts("", "a photo of a cat", guidance_scale=5.0)[1])) > 1e-3


def adapted(*, text=False):
    """A pipeline with a LoRA in its denoiser and, with `text`, one in its text encoder."""
    peft = pytest.importorskip("peft", reason="needs peft")
    torch.manual_seed(1)
    pipe = build("stable_diffusion")
    config = {"r": 4, "lora_alpha": 4, "init_lora_weights": False}
    pipe.unet.add_adapter(peft.LoraConfig(**config, target_modules=["to_q", "to_k", "to_v", "to_out.0"]), "style")
    if text:
        try:
            pipe.text_encoder.add_adapter(peft.LoraConfig(**config, target_modules=["q_proj", "v_proj"]), "style")
        except ValueError as error:  # transformers 5.24 asks for peft 0.22 before there is one
            if "use a version >=" not in str(error):
                raise
            pytest.skip(f"transformers {transformers.__version__} with peft {peft.__version__}: {error}")
    return ready(pipe, torch.float32)


WHERE = pytest.mark.parametrize("text", [False, True], ids=["denoiser", "text encoder too"])


@WHERE
def test_lora(text):
    pipe, some = adapted(text=text), of_prompts("a cat", "two dogs", "tree", guidance_scale=5.0)
    references = check(pipe, some, 1e-5)
    pipe.disable_lora()
    assert difference(stock(pipe, some[0]), references[0]) > 1e-3


@WHERE
def test_lora_of_other_strength_in_each_request(text):
    """The stock call scales the layers of models that everybody uses, and scales them back."""
    pipe, some = adapted(text=text), of_prompts("a cat", "two dogs", "tree", "a cat", guidance_scale=5.0)
    strengths = ({"scale": 0.5}, {"scale": 1.0}, None, {"scale": 0.5})
    some = [
        Request({**request.content, "cross_attention_kwargs": strength}, request.seed, steps=4)
        for request, strength in zip(some, strengths, strict=True)
    ]
    references = check(pipe, some, 1e-5)
    other = Request({**some[0].content, "cross_attention_kwargs": {"scale": 1.0}}, 0, steps=4)
    assert difference(stock(pipe, other), references[0]) > 1e-3


def test_lora_loaded_from_a_file(tmp_path):
    made = adapted()
    get = pytest.importorskip("peft").get_peft_model_state_dict
    d.StableDiffusionPipeline.save_lora_weights(tmp_path, unet_lora_layers=get(made.unet, adapter_name="style"))
    pipe = build("stable_diffusion")
    pipe.load_lora_weights(tmp_path, weight_name="pytorch_lora_weights.safetensors", adapter_name="style")
    some = of_prompts("a cat", "two dogs", guidance_scale=5.0)
    references = check(ready(pipe, torch.float32), some, 1e-5)
    pipe.set_adapters("style", 0.3)
    assert difference(stock(pipe, some[0]), references[0]) > 1e-3
    check(pipe, some, 1e-5)
    pipe.fuse_lora()
    check(pipe, some, 1e-5)
