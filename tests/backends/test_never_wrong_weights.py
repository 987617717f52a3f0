"""Stock pipelines whose adapters, weights or buffers change, before or while they are served: exact, or refused."""

from __future__ import annotations

import copy
import io
import threading
import warnings

import pytest

torch = pytest.importorskip("torch", reason="needs the extra 'diffusion'")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # diffusers' own imports
    pytest.importorskip("diffusers", reason="needs the extra 'diffusion'")
    import diffusers as d
    from greenlet import GreenletExit
    from peft import LoraConfig, inject_adapter_in_model
    from places import DEVICE
    from plainly_served import Plain, close_to, seeded, serve, together, words

    from neustream.backends.torch import Samples
    from tests.backends import pipelines

import neustream as ns  # noqa: E402

pytestmark = [
    # numpy 2's complaints about how diffusers calls it, and torch's about transformers
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

# -- adapters ---------------------------------------------------------------------------------------------


def with_lora(pipe):
    """Adapters on the denoiser and on the text encoder."""
    torch.manual_seed(1)
    lora = LoraConfig(r=4, target_modules=["to_q", "to_v"], init_lora_weights=False)
    pipe.unet.add_adapter(lora, "a")
    texts = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    inject_adapter_in_model(texts, pipe.text_encoder, "a")
    return pipe


def scales(model):
    return [dict(module.scaling) for module in model.modules() if isinstance(getattr(module, "scaling", None), dict)]


def test_a_scaled_adapter_is_of_its_request_alone(sd):
    with_lora(sd)
    half = {"cross_attention_kwargs": {"scale": 0.3}}
    stock = [sd(**words(at, **(half if at % 2 else {}))).images for at in range(4)]
    assert not close_to(stock[0], sd(**words(0, **half)).images)
    before = scales(sd.text_encoder), scales(sd.unet)
    with serve(sd) as service:
        for _ in range(2):
            for at in range(4):
                assert torch.equal(service(**words(at, **(half if at % 2 else {}))).images, stock[at])
        with pytest.raises(ValueError, match="divisible by 8"):
            service.submit(**words(height=20, **half))
        assert (scales(sd.text_encoder), scales(sd.unet)) == before
        found = together(service, [words(at, **(half if at % 2 else {})) for at in range(4)])
        assert all(map(close_to, found, stock))
    assert (scales(sd.text_encoder), scales(sd.unet)) == before


def test_a_call_that_raises_leaves_adapters_as_they_were(sd):
    with_lora(sd)
    before = scales(sd.unet)
    with serve(sd) as service:
        bad = torch.zeros(1, 5, 7)  # as wide as no encoder makes them
        with pytest.raises(ns.RequestFailed):
            service(
                **{**words(), "prompt": None},
                prompt_embeds=bad,
                guidance_scale=1.0,
                cross_attention_kwargs={"scale": 0.3},
            )
        assert scales(sd.unet) == before


def weight_of_an_adapter(pipe):
    pipe.unet.set_adapters(["a"], [0.1])


def adapters_off(pipe):
    pipe.unet.disable_lora()


def adapters_fused(pipe):
    pipe.unet.fuse_lora()


def freeu(pipe):
    pipe.unet.enable_freeu(s1=0.9, s2=0.2, b1=1.5, b2=1.6)


def written(pipe):
    with torch.no_grad():
        pipe.unet.conv_in.weight.mul_(1.5)


@pytest.mark.parametrize("change", [weight_of_an_adapter, adapters_off, adapters_fused, freeu, written])
def test_what_is_changed_under_an_open_request(sd, change):
    with_lora(sd)
    with serve(sd) as service:
        service(**words())
        begun, go = threading.Event(), threading.Event()
        open_one = service.submit(**words(steps=9), on_step=lambda _: (begun.set(), go.wait(30)))
        assert begun.wait(30)
        change(sd)
        try:
            with pytest.raises(ns.RequestError, match="was changed while it is served"):
                service.submit(**words(1))
        finally:
            go.set()
        with pytest.raises(ns.RequestFailed, match="was changed while it is served"):
            open_one.result(30)


def test_the_scale_of_an_image_adapter(sd):
    sd.unet.set_attn_processor({name: Plain() for name in sd.unet.attn_processors})
    processor = next(iter(sd.unet.attn_processors.values()))
    processor.scale = [1.0]
    with serve(sd) as service:
        service(**words())
        processor.scale[0] = 0.5  # as `set_ip_adapter_scale` does
        with pytest.raises(ns.RequestError, match=r"scale was \[1.0\] and is \[0.5\]"):
            service.submit(**words())


# -- whose memory ------------------------------------------------------------------------------------------


def saved(tensor):
    buffer = io.BytesIO()
    torch.save(tensor, buffer)
    return buffer.getvalue()


def test_latents_hold_no_rows_of_others(sd):
    previews = []
    calls = [words(at, output_type="latent", guidance_scale=1.0) for at in range(3)]
    with serve(sd) as service:
        found = together(service, calls)
        seen = {"on_step": lambda progress: previews.append(progress.latents)}
        previews.clear()
        together(service, [{**one, **seen} for one in calls])
    for latents in (*found, *previews):
        assert latents.untyped_storage().nbytes() == latents.numel() * latents.element_size()
        assert len(saved(latents)) == len(saved(latents.clone()))


# -- callbacks --------------------------------------------------------------------------------------------


def test_whatever_a_callback_raises_fails_its_request(sd):
    def leave(progress):
        raise GreenletExit

    def stubborn(pipe, step, timestep, tensors):
        while True:
            try:
                pipe.vae.decode(tensors["latents"])  # parks in the callback
            except BaseException:  # what a careless caller does
                return {}

    with serve(sd) as service:
        with pytest.raises(ns.RequestFailed, match="GreenletExit"):
            service(**words(), on_step=leave)
        answer = service.submit(**words(), callback_on_step_end=stubborn)
        answer.cancel()
        assert service(**words()).images.shape == (1, 3, 16, 16)


def test_the_class_of_a_scheduler_is_the_stock_one(sd):
    class Asking(type(sd)):
        @torch.no_grad()
        def __call__(self, *args, **kwargs):
            assert type(self.scheduler) is d.DDIMScheduler
            assert type(copy.deepcopy(self.scheduler)) is d.DDIMScheduler
            self.scheduler = copy.deepcopy(self.scheduler)  # still one that shares its steps
            return super().__call__(*args, **kwargs)

    stock = sd(**words()).images
    sd.__class__ = Asking
    with serve(sd) as service:
        seen = []
        assert torch.equal(service(**words(), on_step=seen.append).images, stock)
    assert [progress.step for progress in seen] == [1, 2, 3]


# -- modules of somebody's own -------------------------------------------------------------------------------


class Centred(torch.nn.Module):
    """Takes the mean over rows away."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x, *args, **kwargs):
        out = self.inner(x, *args, **kwargs)
        return out - 0.1 * out.mean(0, keepdim=True)


@pytest.mark.parametrize("place", ["conv_out", "conv_in", "mid_block"])
def test_a_module_that_mixes_rows(sd, place):
    """Its model's class is known to keep rows apart, but this one does not."""
    setattr(sd.unet, place, Centred(getattr(sd.unet, place)))
    calls = [words(at, guidance_scale=5.0) for at in range(4)]
    stock = [sd(**{**one, "generator": seeded(at)}).images for at, one in enumerate(calls)]
    with serve(sd) as service:
        assert all(close_to(ours, one) for ours, one in zip(together(service, calls), stock, strict=True))


def test_a_decoder_that_mixes_rows(sd):
    sd.vae.decoder.conv_in = Centred(sd.vae.decoder.conv_in)
    calls = [words(at) for at in range(4)]
    stock = [sd(**{**one, "generator": seeded(at)}).images for at, one in enumerate(calls)]
    with serve(sd) as service:
        assert all(close_to(ours, one) for ours, one in zip(together(service, calls), stock, strict=True))


# -- weights that torch does not see written ------------------------------------------------------------------


def in_place(weight):
    weight.data.mul_(1.5)


def another(weight):
    weight.data = weight.data * 1.5


@pytest.mark.parametrize("write", [in_place, another])
@pytest.mark.parametrize("which", ["unet", "text_encoder", "vae"])
def test_weights_that_are_written_through_their_data(sd, write, which):
    weight = max(getattr(sd, which).parameters(), key=torch.numel)
    with serve(sd) as service:
        before = service(**words()).images
        write(weight)
        with pytest.raises(ns.RequestError, match=r"was changed while it is served: weights were (written|replaced)"):
            service(**words())
        weight.data.div_(1.5)
        if write is in_place:
            assert close_to(service(**words()).images, before)


# -- buffers ----------------------------------------------------------------------------------------------


def with_statistics(pipe):
    """A denoiser with a running mean, and with a table that is no buffer."""
    norm = torch.nn.BatchNorm2d(pipe.unet.conv_norm_out.num_channels).eval()
    norm.table = torch.ones(3)
    pipe.unet.conv_norm_out = norm.to(DEVICE)
    return norm


BUFFERS = {
    "in torch's sight": lambda norm: norm.running_mean.add_(0.5),
    "past torch": lambda norm: norm.running_var.data.mul_(2),
    "another one": lambda norm: setattr(norm, "running_mean", torch.ones_like(norm.running_mean)),
    "a table": lambda norm: norm.table.mul_(2),
    "a table, past torch": lambda norm: norm.table.data.mul_(2),
    "none": lambda norm: setattr(norm, "running_mean", None),
}


@pytest.mark.parametrize("write", BUFFERS)
def test_buffers_and_tables_that_are_written_to(sd, write):
    norm = with_statistics(sd)
    stock = sd(**words()).images
    with serve(sd) as service:
        assert torch.equal(service(**words()).images, stock)
        BUFFERS[write](norm)
        with pytest.raises(ns.RequestError, match=r"is served: (weights were|unet\.conv_norm_out)"):
            service(**words())


def test_a_position_table_that_is_written_to():
    pipe = pipelines.ready(pipelines.stable_diffusion_3(), torch.float32)
    with serve(pipe) as service:
        call = {"prompt": "a cat", "num_inference_steps": 2, "output_type": "pt", "generator": seeded(0)}
        service(**call)
        pipe.transformer.pos_embed.pos_embed.mul_(1.5)
        with pytest.raises(ns.RequestError, match="weights were written to"):
            service(**call)


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.bool, torch.complex64]
)
def test_what_is_written_past_torch_shows_in_samples_of_any_dtype(dtype):
    with torch.inference_mode():
        of_inference = torch.ones(5, dtype=dtype)
    weights = [torch.ones(3, 4, dtype=dtype), torch.ones((), dtype=dtype), torch.ones(0, dtype=dtype), of_inference]
    samples = Samples(weights)
    before = samples.read()
    assert samples.read() == before
    for weight in weights:
        if weight.numel():
            with torch.inference_mode():
                weight.data.zero_()
            assert samples.read() != before
            before = samples.read()
