"""Stock calls that do more than call models: served as they are."""

from __future__ import annotations

import copy
import inspect
import warnings

import pytest

torch = pytest.importorskip("torch", reason="needs the extra 'diffusion'")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # diffusers' own imports
    d = pytest.importorskip("diffusers", reason="needs the extra 'diffusion'")
    import transformers
    from exactness import (  # noqa: F401
        SCHEDULERS,
        change,
        expected,
        furthest,
        nothing_to_warn_of,
        one_thread,
        pipeline,
        super_resolution_unet,
    )
    from pipelines import (
        Request,
        alone,
        build,
        difference,
        picture,
        ready,
        requests,
        stock,
        tensor_of,
        together,
    )
    from places import DEVICE

    from neustream.backends.diffusers.from_config import byte_tokenizer
    from neustream.backends.diffusers.parts import parts_of
    from neustream.backends.diffusers.run import Run, decode, denoise
    from neustream.backends.diffusers.standins import asked_of_to
    from neustream.errors import BackendError

pytestmark = [
    # numpy 2's complaints about how diffusers 0.42 calls it, and torch's about transformers
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

# -- calls that do more than call models ------------------------------------------------------------------


def right_or_refused(pipe, some, tolerance=1e-5):
    references = [stock(pipe, request) for request in some]
    try:
        parts = parts_of(pipe)
    except BackendError:
        return
    assert furthest(together(pipe, some, parts), references) < tolerance


def plain(components, make, **options):
    """A pipeline without a safety checker of what another one has."""
    names = ("vae", "text_encoder", "tokenizer", "unet", "scheduler")
    parts = {name: getattr(components, name) for name in names}
    return make(**parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False, **options)


class Wrapped(d.StableDiffusionPAGPipeline):
    def __call__(self, *args, **kwargs):
        return super().__call__(*args, **kwargs)


@pytest.mark.parametrize("make", [d.StableDiffusionPAGPipeline, Wrapped])
def test_calls_that_replace_attention_processors(make):
    pipe = plain(build("stable_diffusion"), make, pag_applied_layers="mid")
    some = change("stable_diffusion", *[{"guidance_scale": 5.0, "pag_scale": 3.0}] * 3)
    before = {type(processor) for processor in pipe.unet.attn_processors.values()}
    right_or_refused(pipe, some)
    assert {type(processor) for processor in pipe.unet.attn_processors.values()} == before


def test_calls_that_switch_layers_of_a_model():
    pipe = build("stable_diffusion", unet={"attention_type": "gated"})
    for name, weight in pipe.unet.named_parameters():
        if name.endswith(("alpha_attn", "alpha_dense")):
            torch.nn.init.ones_(weight)
    boxes = {"gligen_phrases": ["a cat"], "gligen_boxes": [[0.1, 0.1, 0.5, 0.6]]}
    some = [{**boxes, "gligen_scheduled_sampling_beta": share} for share in (0.3, 0.5, 1.0)]
    right_or_refused(plain(pipe, d.StableDiffusionGLIGENPipeline), change("stable_diffusion", *some))


def test_stable_diffusion_xl_in_float16_decodes_in_float32():
    pipe = build("stable_diffusion_xl", torch.float16)
    assert pipe.vae.config.force_upcast  # the default
    parts = parts_of(pipe)
    some = [Request(request.content, request.seed, steps=3) for request in requests("stable_diffusion_xl")[:2]]
    runs = [Run(pipe, parts, request.arguments()) for request in some]
    for _ in range(3):
        denoise(runs)
    for run in runs:
        decode([run])
    assert [run.error for run in runs] == [None, None]
    assert furthest([tensor_of(run.output) for run in runs], [stock(pipe, request) for request in some]) < 2e-2


def depth_to_image():
    size = {"image_size": 32, "patch_size": 16, "backbone_out_indices": (0, 1, 2, 3), "is_hybrid": False}
    size |= {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4}
    config = transformers.DPTConfig(**size, neck_hidden_sizes=[16, 16, 32, 32], fusion_hidden_size=16)
    one = build("stable_diffusion", unet={"in_channels": 5})
    return d.StableDiffusionDepth2ImgPipeline(
        vae=one.vae,
        text_encoder=one.text_encoder,
        tokenizer=one.tokenizer,
        unet=one.unet,
        scheduler=one.scheduler,
        depth_estimator=transformers.DPTForDepthEstimation(config),
        feature_extractor=transformers.DPTImageProcessor(size={"height": 32, "width": 32}),
    )


def test_calls_that_set_autocast_leave_the_thread_as_it_was():
    pipe = ready(depth_to_image(), torch.bfloat16)
    pictures = [{"image": picture(at, 32)} for at in range(3)]
    some = [
        Request({**r.content}, r.seed, torch.bfloat16, steps=r.steps) for r in change("stable_diffusion", *pictures)
    ]
    try:
        right_or_refused(pipe, some, tolerance=5e-2)
        assert not torch.is_autocast_enabled(DEVICE.type)
    finally:
        torch.set_autocast_enabled(DEVICE.type, False)


class Inference(d.FluxPipeline):
    @torch.inference_mode()
    def __call__(self, **kwargs):
        return inspect.unwrap(d.FluxPipeline.__call__)(self, **kwargs)


def test_calls_in_inference_mode():
    pipe = Inference(**pipeline("flux").components)
    assert torch.equal(alone(pipe, requests("flux")[0]), expected("flux")[0])
    assert furthest(together(pipe, requests("flux")), expected("flux")) < 1e-5
    assert not torch.is_inference_mode_enabled()


def test_giving_up_a_request_leaves_the_thread_as_it_was():
    torch.set_grad_enabled(True)
    run = Run(pipeline("dit"), parts_of(pipeline("dit")), requests("dit")[0].arguments())
    denoise([run])
    assert torch.is_grad_enabled()
    run.close()
    try:
        assert torch.is_grad_enabled()
    finally:
        torch.set_grad_enabled(True)


class TwoSchedules(d.DDPMPipeline):
    """As LTX-2 does (sound beside pictures), SkyReels, Cosmos, Kandinsky 6: the scheduler is copied in the call."""

    @torch.no_grad()
    def __call__(self, generator, num_inference_steps, output_type="pt"):
        self.scheduler.set_timesteps(num_inference_steps)
        other = copy.deepcopy(self.scheduler)
        image = torch.randn(1, 3, 8, 8, generator=generator).to(DEVICE)
        sound = torch.randn(1, 3, 8, 8, generator=generator).to(DEVICE)
        progress = self.progress_bar(total=num_inference_steps)
        for t in self.scheduler.timesteps:
            image = self.scheduler.step(self.unet(image, t).sample, t, image).prev_sample
            sound = other.step(self.unet(sound, t).sample, t, sound).prev_sample
            progress.update()
        return (torch.cat([image, sound]),)


def test_schedulers_that_are_copied_in_the_call():
    pipe = TwoSchedules(unet=pipeline("ddpm").unet, scheduler=SCHEDULERS["Euler"]())
    pipe.set_progress_bar_config(disable=True)
    some = [Request({}, at, steps=3 + at) for at in range(3)]
    assert torch.equal(alone(pipe, some[0]), stock(pipe, some[0]))
    right_or_refused(pipe, some)


class Closing(d.DDPMPipeline):
    """As LTX-2's DFR pipelines do."""

    @torch.no_grad()
    def __call__(self, **kwargs):
        self.progress_bar(total=3).close()
        return super().__call__(**kwargs)


def test_methods_whose_wrapper_hides_the_names_of_their_arguments():
    pipe, rows = build("dit"), []
    stock_decode = pipe.vae.decode

    def decode(*args, **kwargs):
        rows.append(len(args[0]))
        return stock_decode(*args, **kwargs)

    pipe.vae.decode = decode
    some = [Request(request.content, request.seed, steps=3) for request in requests("dit")[:3]]
    references = [stock(pipe, request) for request in some]
    most = max(rows)
    for output, reference in zip(together(pipe, some, apart=0, pause=1000), references, strict=True):
        assert difference(output, reference) < 1e-5
    assert max(rows) > most


@pytest.mark.parametrize(
    "args, kwargs, device, dtype",
    [
        ((torch.float16,), {}, None, torch.float16),
        (("cpu",), {}, "cpu", None),
        (("cuda:1", torch.float32, True), {}, "cuda:1", torch.float32),
        ((torch.zeros(1, dtype=torch.float64),), {}, "cpu", torch.float64),
        ((), {"device": "meta", "dtype": torch.bfloat16, "memory_format": torch.channels_last}, "meta", torch.bfloat16),
        ((), {}, None, None),
    ],
)
def test_what_a_stock_call_asks_of_to(args, kwargs, device, dtype):
    assert asked_of_to(*args, **kwargs) == (None if device is None else torch.device(device), dtype)


def test_progress_bars_that_are_closed():
    pipe = Closing(**pipeline("ddpm").components)
    pipe.set_progress_bar_config(disable=True)
    assert torch.equal(alone(pipe, requests("ddpm")[0]), expected("ddpm")[0])


def test_language_models_that_encode_text(caplog):
    """As in Sana, Lumina 2, HunyuanVideo, Qwen-Image: their results hold caches that nobody reads."""
    one, tokenizer = build("sana"), byte_tokenizer()
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 8}
    config = transformers.Gemma2Config(**size, vocab_size=len(tokenizer), num_key_value_heads=2, pad_token_id=0)
    parts = {"vae": one.vae, "transformer": one.transformer, "scheduler": one.scheduler}
    pipe = d.SanaPipeline(tokenizer=tokenizer, text_encoder=transformers.Gemma2Model(config), **parts)
    ready(pipe, torch.float32)
    content = {"height": 32, "width": 32, "use_resolution_binning": False, "complex_human_instruction": None}
    content |= {"output_type": "pt", "max_sequence_length": 16, "prompt": "a cat"}
    some = [Request({**content, "guidance_scale": 1.0 + 2 * at}, at, steps=3) for at in range(3)]
    right_or_refused(pipe, some)
    assert not caplog.records  # it can be shared
    parts = parts_of(pipe, buckets=(16,))
    references = [alone(pipe, request, parts) for request in some]
    assert all(torch.equal(x, y) for x, y in zip(together(pipe, some, parts), references, strict=True))


def test_results_without_rows(caplog):
    decoder = d.VQModel(
        block_out_channels=(32,), latent_channels=3, down_block_types=("DownEncoderBlock2D",), norm_num_groups=8
    )
    one = ready(d.LDMSuperResolutionPipeline(decoder, super_resolution_unet(), SCHEDULERS["DDIM"]()), torch.float32)
    some = [Request({"image": picture(at, 32), "output_type": "np"}, at, steps=3) for at in range(2)]
    assert torch.equal(alone(one, some[0]), stock(one, some[0]))
    assert None not in together(one, some, parts_of(one, buckets=(16,)))
    caplog.clear()  # such a result cannot be shared out
