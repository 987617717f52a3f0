"""Stock calls that write to weights which requests share: exact on a copy, or refused before anything is written."""

from __future__ import annotations

import warnings

import pytest

torch = pytest.importorskip("torch", reason="needs the extra 'diffusion'")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # diffusers' own imports
    pytest.importorskip("diffusers", reason="needs the extra 'diffusion'")
    import diffusers as d
    import transformers as t
    from diffusers.pipelines.shap_e.renderer import ShapERenderer
    from pipeline_parts import clip
    from places import DEVICE
    from plainly_served import close_to, seeded, serve, together, words

import neustream as ns  # noqa: E402

pytestmark = [
    # numpy 2's complaints about how diffusers calls it, and torch's about transformers
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


class Coarse(ShapERenderer):
    """Renders in less than a second, with the same rays each time."""

    def decode_to_image(self, latents, device, size):
        torch.manual_seed(0)
        return super().decode_to_image(latents, device, size, 1024, n_coarse_samples=4, n_fine_samples=4)


def shap_e():
    text_encoder, tokenizer = clip(t.CLIPTextModelWithProjection)
    width = text_encoder.config.projection_dim
    prior = d.PriorTransformer(
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=1,
        embedding_dim=16,
        num_embeddings=32,
        embedding_proj_dim=width,
        time_embed_dim=32,
        clip_embed_dim=32,
        additional_embeddings=0,
        time_embed_act_fn="gelu",
        norm_in_type="layer",
        encoder_hid_proj_type=None,
        added_emb_type=None,
    )
    renderer = Coarse(
        param_shapes=((8, 93), (8, 8), (8, 8), (8, 8)),
        d_latent=16,
        d_hidden=8,
        n_output=12,
        background=(0.1, 0.1, 0.1),
    )
    scheduler = d.HeunDiscreteScheduler(prediction_type="sample", use_karras_sigmas=True, clip_sample=True)
    return d.ShapEPipeline(prior, text_encoder, tokenizer, scheduler, renderer).to(torch.float32)


def thing(at):
    steps = {"num_inference_steps": 2, "frame_size": 16, "output_type": "np"}
    return {"prompt": f"a cat {at}", "generator": seeded(at), **steps}


def surface(output):
    return torch.from_numpy(output.images)


def weights_of(model):
    return {name: weight.clone() for name, weight in model.state_dict().items()}


def alike(one, other):
    return all(torch.equal(one[name], other[name]) for name in other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_renderer_that_takes_its_network_from_each_request(dtype):
    torch.manual_seed(0)
    pipe = shap_e().to(dtype)
    assert pipe.shap_e_renderer.void.background.is_leaf == (dtype == torch.float32)  # a cast leaves it so
    as_built = weights_of(pipe.shap_e_renderer)
    stock = [surface(pipe(**thing(at))) for at in range(3)]
    assert not alike(weights_of(pipe.shap_e_renderer), as_built)  # it does write
    assert not torch.equal(stock[0], stock[1])
    pipe.shap_e_renderer.load_state_dict(as_built)
    with serve(pipe, max_batch=1, encode_batch=1) as service:  # its rays go by the last bits
        for at in range(3):
            assert torch.equal(surface(service(**thing(at))), stock[at])
        answers = [service.submit(**thing(at)) for at in range(3)]
        assert all(torch.equal(surface(answer.result(60)), one) for answer, one in zip(answers, stock, strict=True))
        assert alike(weights_of(pipe.shap_e_renderer), as_built)


class Tinted(d.StableDiffusionPipeline):
    """Has its denoiser do something behind each call."""

    @torch.no_grad()
    def __call__(self, *args, **kwargs):
        output = super().__call__(*args, **kwargs)
        return type(output)(self.touch(output.images), None)


class AddsUp(Tinted):
    def touch(self, images):
        self.unet.counts()
        return images + self.unet.counted


class Unet(d.UNet2DConditionModel):
    """Counts in a buffer, beside weights that nobody writes to."""

    def __init__(self, **options):
        super().__init__(**options)
        self.register_buffer("counted", torch.zeros(1))

    def count(self):
        noise = torch.rand(1, device=self.counted.device)
        self.counted += 1 + noise

    counts = count
    """The same method by another name."""
    del count

    def brighten(self, images, factor=2.0):
        """Writes to no weight."""
        return images * factor


def of(kind, pipe):
    unet = Unet(**{name: value for name, value in pipe.unet.config.items() if not name.startswith("_")})
    unet.load_state_dict(pipe.unet.state_dict(), strict=False)
    parts = {**pipe.components, "unet": unet.eval().to(DEVICE)}
    return kind(**parts, requires_safety_checker=False)


def test_each_request_writes_to_a_buffer_of_its_own(sd):
    pipe = of(AddsUp, sd)
    torch.manual_seed(3)
    stock = pipe(**words()).images
    pipe.unet.counted.zero_()
    with serve(pipe) as service:
        for _ in range(3):  # the first call is tried, and made again with the same noise
            service._devices[0].executor.call(lambda: torch.manual_seed(3)).result(30)
            assert torch.equal(service(**words()).images, stock)
        assert pipe.unet.counted == 0


class Brighter(Tinted):
    def touch(self, images):
        return self.unet.brighten(images, factor=0.5)


def test_methods_that_write_nothing_are_called_as_they_are(sd):
    pipe = of(Brighter, sd)
    stock = [pipe(**words(at)).images for at in range(3)]
    with serve(pipe) as service:
        assert torch.equal(service(**words()).images, stock[0])
        found = together(service, [words(at) for at in range(3)])
        assert all(map(close_to, found, stock))


class Halved(Tinted):
    def touch(self, images):
        """Writes by rows, in place, to what is its own."""
        return torch.vmap(lambda row: row.mul_(0.5))(images.clone())


def test_a_call_may_write_to_its_own_by_rows(sd):
    pipe = of(Halved, sd)
    stock = pipe(**words()).images
    with serve(pipe) as service:
        assert torch.equal(service(**words()).images, stock)


WRITES = {
    "in place": lambda pipe: pipe.unet.conv_in.weight.mul_(2),
    "an item": lambda pipe: pipe.vae.post_quant_conv.bias.__setitem__(0, 1.0),
    "through data": lambda pipe: pipe.unet.conv_in.weight.data.add_(1),
    "as out": lambda pipe: torch.ones(1, out=pipe.unet.counted),
    "a part": lambda pipe: pipe.unet.conv_out.weight[0].zero_(),
    "a parameter of a state": lambda pipe: next(iter(pipe.unet.state_dict().values())).copy_(torch.tensor(1.0)),
    "by an operator": lambda pipe: pipe.unet.counted.__iadd__(1),
    "by rows": lambda pipe: torch.vmap(lambda row: row.mul_(2))(pipe.unet.conv_in.weight),
    "several": lambda pipe: torch._foreach_mul_([pipe.unet.conv_in.weight], 2.0),
}


@pytest.mark.parametrize("how", WRITES)
def test_a_call_that_writes_to_what_others_use_is_refused(sd, how):
    class Writes(Tinted):
        def touch(self, images):
            WRITES[how](self)
            return images

    pipe = of(Writes, sd)
    before = weights_of(pipe.unet), weights_of(pipe.vae)
    with serve(pipe) as service:
        with pytest.raises(ns.RequestFailed, match=r"Writes writes to (unet|vae)\.\S+ in its call, and requests share"):
            service(**words())
        with pytest.raises(ns.RequestError, match="such a pipeline cannot be served") as refused:
            service.submit(**words(1))
        assert refused.value.status == "refused"
        assert alike(weights_of(pipe.unet), before[0])
        assert alike(weights_of(pipe.vae), before[1])


def test_such_a_pipeline_is_refused_at_once_where_it_is_measured(sd):
    class Early(d.StableDiffusionPipeline):
        @torch.no_grad()
        def __call__(self, *args, **kwargs):
            self.unet.conv_in.weight.mul_(2)
            return super().__call__(*args, **kwargs)

    pipe = of(Early, sd)
    call = {name: value for name, value in words().items() if name != "generator"}
    with pytest.raises(ns.NeustreamError, match=r"Early writes to unet\.conv_in\.weight in its call"):
        serve(pipe, profiles=None, samples=[call], measure_s=0.05)


def test_modes_that_a_call_leaves_on_while_it_waits_are_its_own(sd):
    class InMode(d.StableDiffusionPipeline):
        @torch.no_grad()
        def __call__(self, *args, **kwargs):
            with torch.device("cpu"):
                return super().__call__(*args, **kwargs)

    pipe = of(InMode, sd)
    stock = pipe(**words()).images
    with serve(pipe) as service:
        for _ in range(2):
            assert torch.equal(service(**words()).images, stock)
