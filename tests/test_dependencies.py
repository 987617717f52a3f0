"""Private and unsettled details of other libraries that this one builds on: each is there, and is as we take it.

A test that fails here says whose detail went away and which of our files needs it.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Literal, Union

import pydantic
import pytest

torch = pytest.importorskip("torch", reason="needs the extra 'diffusion'")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # diffusers' own imports
    diffusers = pytest.importorskip("diffusers", reason="needs the extra 'diffusion'")
    transformers = pytest.importorskip("transformers", reason="needs the extra 'llm'")
    from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
    from transformers import cache_utils
    from transformers.generation import logits_process

    from neustream.backends.diffusers import calls, parts, stepping
    from neustream.backends.loading.images import CUT_OFF
    from neustream.backends.transformers import recorded
    from neustream.backends.transformers.facts import CACHE_NAMES
    from neustream.backends.transformers.layers import SlotLayer

pytestmark = pytest.mark.filterwarnings("ignore:__array__:DeprecationWarning")  # numpy 2's, of how diffusers calls it
TINY = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 8, "vocab_size": 16}


@dataclass(frozen=True)
class Detail:
    """`what` of a library, the file under `neustream/` that needs it, and whether it is there."""

    what: str
    user: str
    holds: Callable[[], bool]


@cache
def llama(**more):
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**TINY, **more)).eval()


@cache
def pipeline():
    unet = diffusers.UNet2DModel(
        4,
        block_out_channels=(4,),
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        norm_num_groups=2,
        attention_head_dim=4,
    )
    return diffusers.DDPMPipeline(unet=unet, scheduler=diffusers.DDPMScheduler())


def takes(function, *names):
    return set(names) <= set(inspect.signature(function).parameters)


def cut(warper, kept):
    """A filter of logits takes no ids, and leaves `kept` of three tokens."""
    left = warper(None, torch.tensor([[0.0, 1.0, 4.0]]))
    return int((left > -torch.inf).sum()) == kept


def layers_of(**more):
    return {type(layer) for layer in cache_utils.DynamicCache(config=transformers.LlamaConfig(**TINY, **more)).layers}


def window_of_mistral():
    config = transformers.MistralConfig(**TINY, num_key_value_heads=2, sliding_window=4)
    (layer, _) = cache_utils.DynamicCache(config=config).layers
    return type(layer) is cache_utils.DynamicSlidingWindowLayer and layer.sliding_window == 4


def index_after_first_timestep():
    scheduler = diffusers.EulerDiscreteScheduler()
    scheduler.set_timesteps(4)
    before = scheduler.__dict__["_step_index"], scheduler.step_index
    scheduler._init_step_index(scheduler.timesteps[1])
    return before == (None, None) and scheduler.step_index == scheduler._step_index == 1


def versions_of_a_tensor():
    tensor = torch.zeros(2)
    before = tensor._version
    tensor += 1
    return tensor._version > before


def no_room():
    with pytest.raises(RuntimeError) as refused:
        torch.empty(2**60)
    return "allocate" in str(refused.value)


def source_of(cls):
    return inspect.getsource(inspect.unwrap(cls.__call__))


def counts_its_steps():
    return "self._num_timesteps = len(timesteps)" in source_of(diffusers.StableDiffusionPipeline)


def problems(model, **given):
    with pytest.raises(pydantic.ValidationError) as refused:
        model(**given)
    return [(problem["type"], problem["loc"], problem["msg"], problem["input"]) for problem in refused.value.errors()]


class Section(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid")
    size: int = 1
    kind: Annotated[
        Union[Annotated[int, pydantic.Tag("whole")], Annotated[str, pydantic.Tag("word")]],  # noqa: UP007
        pydantic.Discriminator(lambda value: "word" if isinstance(value, str) else "whole"),
    ] = 1
    name: Literal["a"] = "a"

    @pydantic.field_validator("size")
    @classmethod
    def even(cls, value):
        if value % 2 == 0:
            raise ValueError("must be odd")
        return value


MODELS = {name: getattr(diffusers, name, None) or getattr(transformers, name, None) for name in sorted(calls.PROVEN)}
TRANSFORMERS = [
    Detail("the forward of a causal model takes `cache` or `past_key_values`", "model.py",
           lambda: any(takes(llama().forward, name) for name in CACHE_NAMES)),
    Detail("the forward of a causal model takes `position_ids` and `attention_mask`", "model.py",
           lambda: takes(llama().forward, "position_ids", "attention_mask")),
    Detail("the forward of a causal model takes `logits_to_keep`", "model.py",
           lambda: takes(llama().forward, "logits_to_keep")),
    Detail("`config._attn_implementation` says how attention is computed", "model.py",
           lambda: llama(attn_implementation="eager").config._attn_implementation == "eager"),
    Detail("`config.get_text_config(decoder=True)` of a text model is its config", "model.py",
           lambda: llama().config.get_text_config(decoder=True) is llama().config),
    Detail("`DynamicCache(config=...).layers` are of DynamicLayer for plain attention", "slots.py",
           lambda: layers_of() == {cache_utils.DynamicLayer}),
    Detail("they are of DynamicSlidingWindowLayer, with `sliding_window`, for windows", "slots.py", window_of_mistral),
    Detail("`Cache(layers=[...])` keeps the layers it is given", "slots.py",
           lambda: cache_utils.Cache(layers=[SlotLayer(1, 2)]).layers[0].length == 2),
    Detail("our layers have all that CacheLayerMixin leaves to its classes", "slots.py",
           lambda: not SlotLayer.__abstractmethods__),
    Detail("`get_seq_length` and `get_mask_sizes` of a layer are what masks are made by", "slots.py",
           lambda: takes(cache_utils.CacheLayerMixin.get_seq_length) and hasattr(cache_utils.Cache, "get_mask_sizes")),
    Detail("TemperatureLogitsWarper filters logits without ids", "sampling.py",
           lambda: cut(logits_process.TemperatureLogitsWarper(2.0), 3)),
    Detail("TopKLogitsWarper filters logits without ids", "sampling.py",
           lambda: cut(logits_process.TopKLogitsWarper(2), 2)),
    Detail("TopPLogitsWarper filters logits without ids", "sampling.py",
           lambda: cut(logits_process.TopPLogitsWarper(0.5), 1)),
    Detail("`config.rope_parameters` has the `rope_type`", "slots.py",
           lambda: llama().config.rope_parameters["rope_type"] == "default"),
]  # fmt: skip
DIFFUSERS = [
    Detail("`DiffusionPipeline._execution_device`", "parts.py", lambda: pipeline()._execution_device.type == "cpu"),
    Detail("pipelines set `_num_timesteps`", "run.py", counts_its_steps),
    Detail("`DiffusionPipeline.progress_bar(iterable, total)`", "run.py",
           lambda: takes(diffusers.DiffusionPipeline.progress_bar, "iterable", "total")),
    Detail("`DiffusionPipeline.maybe_free_model_hooks`", "run.py",
           lambda: callable(diffusers.DiffusionPipeline.maybe_free_model_hooks)),
    Detail("schedulers keep `_step_index`, set by `_init_step_index`", "stepping.py", index_after_first_timestep),
    Detail("DDIMScheduler has no `_step_index`", "stepping.py",
           lambda: "_step_index" not in diffusers.DDIMScheduler().__dict__),
    Detail("`is_cache_enabled` and `disable_cache` of models", "parts.py",
           lambda: diffusers.FluxTransformer2DModel.is_cache_enabled.fget and
           callable(diffusers.FluxTransformer2DModel.disable_cache)),
    Detail("`_hf_peft_config_loaded` of models with adapters", "parts.py",
           lambda: diffusers.UNet2DConditionModel._hf_peft_config_loaded is False
           and transformers.PreTrainedModel._hf_peft_config_loaded is False),
    Detail("`config.force_upcast` of AutoencoderKL", "calls.py",
           lambda: takes(diffusers.AutoencoderKL.__init__, "force_upcast")),
    Detail("`DiagonalGaussianDistribution(parameters, deterministic)` keeps both", "calls.py",
           lambda: DiagonalGaussianDistribution(torch.ones(1, 2, 1, 1), deterministic=True).parameters.shape[1] == 2),
    Detail("stock calls that change their models say `attn_processor`", "parts.py",
           lambda: "attn_processor" in source_of(diffusers.StableDiffusionSAGPipeline)),
    Detail("stock calls that change their models say `enable_fuser`", "parts.py",
           lambda: "enable_fuser" in source_of(diffusers.StableDiffusionGLIGENPipeline)),
    Detail("pipelines and models have `enable_freeu`", "parts.py",
           lambda: callable(diffusers.StableDiffusionPipeline.enable_freeu)),
    Detail("autoencoders are named so", "parts.py",
           lambda: parts.role_of("", diffusers.AutoencoderKL.__new__(diffusers.AutoencoderKL)) == "decode"),
    *[Detail(f"a model class {name}", "calls.py", lambda cls=cls: inspect.isclass(cls))
      for name, cls in MODELS.items()],
    *[Detail(f"a scheduler class {name}", "stepping.py", lambda name=name: inspect.isclass(getattr(diffusers, name, 0)))
      for name in stepping.MAKERS],
    *[Detail(f"`AutoencoderKL.decode` takes `{name}`", "calls.py",
             lambda name=name: name in inspect.signature(diffusers.AutoencoderKL.decode).parameters or
             "args" in inspect.signature(diffusers.AutoencoderKL.decode).parameters)
      for owner, name in sorted(calls.UNUSED)],
    Detail("CLIPTokenizer is made of a vocabulary", "from_config.py",
           lambda: takes(transformers.CLIPTokenizer.__init__, "vocab", "merges")),
    Detail("T5Tokenizer is made of a vocabulary", "from_config.py",
           lambda: takes(transformers.T5Tokenizer.__init__, "vocab", "extra_ids")),
    Detail("how the log of a prompt that is cut off begins", "../loading/images.py",
           lambda: CUT_OFF in inspect.getsource(diffusers.StableDiffusionPipeline)),
]  # fmt: skip
TORCH = [
    Detail("`Tensor._version` grows when a tensor is written to", "diffusers/calls.py", versions_of_a_tensor),
    Detail("memory that is not there: a RuntimeError that says `allocate`", "transformers/model.py", no_room),
    Detail("`torch.OutOfMemoryError`", "torch.py", lambda: issubclass(torch.OutOfMemoryError, RuntimeError)),
    Detail("autocast of a thread, by kind of device", "diffusers/calls.py",
           lambda: torch.is_autocast_enabled("cpu") is False and torch.get_autocast_dtype("cpu") is torch.bfloat16),
    Detail("passes over graphs that its tracer took down", "transformers/recorded.py",
           lambda: all(callable(getattr(torch._C, name)) for name in recorded.PASSES)),
    Detail("`Generator.clone_state`", "diffusers/request.py",
           lambda: torch.Generator().manual_seed(3).clone_state().initial_seed() == 3),
]  # fmt: skip
PYDANTIC = [
    Detail("an unknown key is an `extra_forbidden` problem at the key", "config/messages.py",
           lambda: problems(Section, sise=3)[0][:2] == ("extra_forbidden", ("sise",))),
    Detail("our ValueErrors are told behind `Value error, `", "config/messages.py",
           lambda: problems(Section, size=2)[0][2:] == ("Value error, must be odd", 2)),
    Detail("locations hold the tag of a union's branch", "config/messages.py",
           lambda: problems(Section, kind=[])[0][1] == ("kind", "whole")),
    Detail("the tags of a field are in its annotation", "config/messages.py",
           lambda: "Tag(tag='word')" in repr(Section.model_fields["kind"].annotation)),
    Detail("a key that is not there is a `missing` problem", "config/messages.py",
           lambda: problems(pydantic.create_model("Needs", size=(int, ...)))[0][:2] == ("missing", ("size",))),
]  # fmt: skip
ALL = [
    *[("transformers", "backends/transformers", detail) for detail in TRANSFORMERS],
    *[("diffusers or transformers", "backends/diffusers", detail) for detail in DIFFUSERS],
    *[("torch", "backends", detail) for detail in TORCH],
    *[("pydantic", ".", detail) for detail in PYDANTIC],
]


@pytest.mark.parametrize(
    "library, folder, detail", ALL, ids=[f"{library}: {detail.what}" for library, _, detail in ALL]
)
def test_a_detail_that_we_build_on_is_there(root, library, folder, detail):
    user = root / "neustream" / folder / detail.user
    assert user.exists(), f"the file that needs it moved: {user.relative_to(root)}"
    told = f"{library} changed: {detail.what}; {user.relative_to(root)} needs it"
    try:
        there = detail.holds()
    except Exception as error:
        raise AssertionError(told) from error
    assert there, told
