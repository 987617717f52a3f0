"""Small real pipelines through the engine equal the stock pipeline, request by request."""

from __future__ import annotations

import warnings

import pytest

torch = pytest.importorskip("torch", reason="needs the extra 'diffusion'")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # diffusers' own imports
    pytest.importorskip("diffusers", reason="needs the extra 'diffusion'")
    from neustream.backends.diffusers import DiT, StableDiffusion, from_config

import neustream as ns  # noqa: E402
from neustream.errors import BackendError  # noqa: E402

pytestmark = [
    # numpy 2's complaints about how diffusers 0.42 calls it, and torch's about transformers
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

VAE = {
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 4,
    "block_out_channels": (16, 32),
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "sample_size": 16,
    "scaling_factor": 0.18215,
}
TRANSFORMER = {
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "num_layers": 2,
    "in_channels": 4,
    "out_channels": 8,
    "sample_size": 8,
    "patch_size": 2,
    "num_embeds_ada_norm": 1000,
    "norm_type": "ada_norm_zero",
    "norm_elementwise_affine": False,
}
UNET = {
    "sample_size": 8,
    "block_out_channels": (16, 32),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "layers_per_block": 1,
    "cross_attention_dim": 32,
    "attention_head_dim": 8,
    "norm_num_groups": 8,
}
TEXT = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "projection_dim": 32,
}
PLAIN = {"clip_sample": False}
SCHEDULERS = {
    "DDIMScheduler": PLAIN,
    "DDPMScheduler": PLAIN,
    "EulerDiscreteScheduler": {},
    "EulerAncestralDiscreteScheduler": {},
    "PNDMScheduler": {"skip_prk_steps": True},  # one call more than steps, and a memory of past outputs
    "HeunDiscreteScheduler": {},  # two calls a step
}
SD_BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
STEPS = (4, 7, 5, 9, 3, 6)
GUIDANCE = (4.0, 1.0, 3.0, 7.5, 0.0, 2.0)
PROMPTS = ("a cat", "two dogs", "", "the sea at night", "x" * 400, "tree")


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def make_dit(scheduler: str, dtype: str = "float32") -> DiT:
    options = {"transformer": TRANSFORMER, "vae": VAE, "dtype": dtype}
    options["scheduler"] = {"name": scheduler, **SCHEDULERS[scheduler]}
    return from_config.dit(options, "cpu").adapter


def make_sd(scheduler: str, dtype: str = "float32") -> StableDiffusion:
    offset = {} if scheduler == "DDPMScheduler" else {"steps_offset": 1}
    own = {"name": scheduler, **SCHEDULERS[scheduler], **SD_BETAS, **offset}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the stock pipeline has opinions on scheduler configs
        options = {"unet": UNET, "vae": VAE, "text_encoder": TEXT, "scheduler": own, "dtype": dtype}
        return from_config.stable_diffusion(options, "cpu").adapter


def dit_requests():
    for at in range(6):
        yield {"class_label": 31 * at, "steps": STEPS[at], "guidance_scale": GUIDANCE[at], "seed": 10 + at}


def sd_requests():
    for at in range(6):
        yield {
            "prompt": PROMPTS[at],
            "negative_prompt": "blurry" if at % 2 else "",
            "steps": STEPS[at],
            "guidance_scale": GUIDANCE[at],
            "seed": 10 + at,
        }


def stock(adapter, params):
    """The stock pipeline's pixels for one request alone."""
    torch.manual_seed(params["seed"])  # where stock DiT takes the noise of stochastic schedulers from
    generator = torch.Generator().manual_seed(params["seed"])
    common = {
        "num_inference_steps": params["steps"],
        "guidance_scale": params["guidance_scale"],
        "generator": generator,
        "output_type": "pt",
    }
    if isinstance(adapter, DiT):
        return adapter.pipe([params["class_label"]], **common).images[0].float()
    sizes = {key: params[key] for key in ("height", "width") if key in params}
    text = {"prompt": params["prompt"], "negative_prompt": params.get("negative_prompt")}
    return adapter.pipe(**text, **sizes, **common).images[0].float()


def serve(adapter, requests, max_batch, observers=(), device="cpu"):
    """All requests at once, in batches of up to `max_batch`; the outputs in order."""
    graph = adapter.graph(max_batch=max_batch, decode_batch=max_batch)
    profiles = {name: ns.TableProfile(name, [1, 64], [0.01, 0.02]) for name in graph.stages}
    policy = ns.FCFS(drop_hopeless=False)
    with ns.serve(graph, adapter.modules, profiles, policy=policy, device=device, observers=observers) as engine:
        futures = [engine.submit(graph, params) for params in requests]
        return [future.result(timeout=120).unwrap() for future in futures]


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("kind", ["dit", "sd"])
def test_alone_in_each_step_is_bitwise_stock(kind, scheduler):
    adapter, requests = (make_dit(scheduler), dit_requests()) if kind == "dit" else (make_sd(scheduler), sd_requests())
    requests = list(requests)
    for output, params in zip(serve(adapter, requests, max_batch=1), requests, strict=True):
        assert torch.equal(output["pixels"], stock(adapter, params)), params


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("kind", ["dit", "sd"])
def test_batched_with_others_is_stock_up_to_rounding(kind, scheduler):
    """In float64 rounding is far below what a mixed-up timestep, seed or guidance would change."""
    make, requests = (make_dit, dit_requests()) if kind == "dit" else (make_sd, sd_requests())
    adapter, requests = make(scheduler, "float64"), list(requests)
    log = ns.EventLog()
    outputs = serve(adapter, requests, max_batch=6, observers=[log])
    assert max(len(step["jobs"]) for step in log.steps) >= 5  # they really shared calls
    for output, params in zip(outputs, requests, strict=True):
        expected = stock(adapter, params)
        difference = (output["pixels"] - expected).abs().max() / expected.abs().max()
        assert difference < 1e-6, params  # the pixels handed out are float32


def test_timesteps_matter():
    """The control of the tests above: another seed, step count or guidance changes the image a lot."""
    adapter = make_dit("DDIMScheduler")
    base = {"class_label": 5, "steps": 6, "guidance_scale": 4.0, "seed": 1}
    expected = stock(adapter, base)
    for change in ({"seed": 2}, {"steps": 7}, {"guidance_scale": 5.0}, {"class_label": 6}):
        assert (stock(adapter, {**base, **change}) - expected).abs().max() > 1e-4, change


def test_two_resolutions_share_the_queue():
    adapter = make_sd("DDIMScheduler")
    base = {"prompt": "a cat", "steps": 4, "guidance_scale": 3.0}
    requests = [{**base, "seed": 1}, {**base, "seed": 2, "height": 32, "width": 16}, {**base, "seed": 3}]
    outputs = serve(adapter, requests, max_batch=3)
    assert [tuple(output["pixels"].shape) for output in outputs] == [(3, 16, 16), (3, 32, 16), (3, 16, 16)]
    for output, params in zip(outputs, requests, strict=True):
        assert torch.allclose(output["pixels"], stock(adapter, params), atol=1e-5)


def test_images_are_pil_and_equal_stock_pixels():
    adapter = make_dit("DDIMScheduler")
    params = {"class_label": 1, "steps": 3, "seed": 4}
    (output,) = serve(adapter, [params], max_batch=1)
    generator = torch.Generator().manual_seed(4)
    expected = adapter.pipe([1], num_inference_steps=3, guidance_scale=4.0, generator=generator).images[0]
    assert output["image"].size == (16, 16)
    assert list(output["image"].getdata()) == list(expected.getdata())


def test_profiles_of_an_adapter_serve_it():
    adapter = make_dit("DDIMScheduler")
    graph = adapter.graph(max_batch=2, decode_batch=1)
    profiles = adapter.profile(graph, repeats=3)
    assert {name: profile.max_batch for name, profile in profiles.items()} == {"dit": 2, "vae": 1}
    assert all(profile.device for profile in profiles.values())
    with ns.serve(graph, adapter.modules, profiles) as engine:
        future = engine.submit(graph, {"class_label": 1, "steps": 2, "seed": 0}, slo=ns.SLO(total=60.0))
        assert future.result(timeout=60).on_time


def test_a_generator_of_ones_own():
    adapter = make_sd("EulerAncestralDiscreteScheduler")
    mine = {"prompt": "sea", "steps": 4, "generator": torch.Generator().manual_seed(7), "guidance_scale": 2.0}
    seeded = {"prompt": "sea", "steps": 4, "seed": 7, "guidance_scale": 2.0}
    first, second = serve(adapter, [mine, seeded], max_batch=1)
    assert torch.equal(first["pixels"], second["pixels"])


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"steps": 0}, "steps"),
        ({"steps": 2.5}, "steps"),
        ({"class_label": 1000}, "class_label"),
        ({"class_label": None}, "class_label"),
        ({"guidance_scale": "high"}, "guidance_scale"),
        ({"seed": "x"}, "seed"),
        ({"seed": 2**70}, "seed"),
        ({"guidance_scale": float("nan")}, "guidance_scale"),
        ({"steps": 2000}, "DDIMScheduler cannot take 2000 steps"),
        ({"generator": 3, "seed": None}, "generator"),
        ({"generator": torch.Generator()}, "not both"),
        ({"stepz": 3}, "stepz"),
    ],
)
def test_bad_parameters_are_refused_before_anything_is_queued(change, named):
    adapter = make_dit("DDIMScheduler")
    graph = adapter.graph()
    profiles = {name: ns.TableProfile(name, [1, 64], [0.01, 0.02]) for name in graph.stages}
    with ns.serve(graph, adapter.modules, profiles) as engine:
        future = engine.submit(graph, {"class_label": 1, "steps": 3, "seed": 4, **change})
        with pytest.raises(ns.GraphError, match=named):
            future.result(timeout=60)


@pytest.mark.parametrize("change", [{"prompt": 3}, {"prompt": ["a", "b"]}, {"height": 20}, {"width": -8}])
def test_bad_stable_diffusion_parameters(change):
    with pytest.raises(BackendError, match=next(iter(change))):
        make_sd("DDIMScheduler").check({"prompt": "a", "steps": 3, **change})


def test_a_checkpoint_saved_to_disk(tmp_path):
    made = make_dit("DDIMScheduler")
    made.pipe.save_pretrained(tmp_path / "dit")
    loaded = from_config.dit({"checkpoint": str(tmp_path / "dit")}, "cpu").adapter
    params = {"class_label": 3, "steps": 3, "guidance_scale": 2.0, "seed": 0}
    assert torch.equal(stock(loaded, params), stock(made, params))
    assert torch.equal(serve(loaded, [params], max_batch=1)[0]["pixels"], stock(made, params))


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({}, "checkpoint"),
        ({"transformer": TRANSFORMER, "vae": VAE}, "scheduler"),
        ({"checkpoint": "no/such/folder"}, "no/such/folder"),
        ({"transformer": TRANSFORMER, "vae": VAE, "scheduler": {"name": "Nope"}}, "Nope"),
        ({"transformer": {"hedas": 3}, "vae": VAE, "scheduler": {"name": "DDIMScheduler"}}, "hedas"),
        ({"transformer": TRANSFORMER, "vae": VAE, "scheduler": {"name": "DDIMScheduler"}, "dtype": "fp7"}, "fp7"),
        ({"weights": 1}, "weights"),
    ],
)
def test_bad_backend_options(options, named):
    with pytest.raises(BackendError, match=named):
        from_config.dit(options, "cpu")


def test_unknown_devices():
    with pytest.raises(BackendError, match="tpu"):
        from_config.dit({"transformer": TRANSFORMER, "vae": VAE, "scheduler": {"name": "DDIMScheduler"}}, "tpu:0")
    if not torch.cuda.is_available():
        with pytest.raises(BackendError, match="0 CUDA"):
            from_config.dit({"transformer": TRANSFORMER, "vae": VAE, "scheduler": {"name": "DDIMScheduler"}}, "cuda:0")


def test_a_scheduler_that_calls_more_often_than_steps_is_refused_for_configs():
    options = {"transformer": TRANSFORMER, "vae": VAE, "scheduler": {"name": "HeunDiscreteScheduler"}}
    backend = from_config.dit(options, "cpu")
    with pytest.raises(BackendError, match="calls the denoiser 9 times for 5 steps"):
        backend.check({**backend.params(0), "steps": 5})


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
def test_on_a_gpu_alone_is_bitwise_stock():
    adapter = make_dit("DDIMScheduler")
    params = {"class_label": 3, "steps": 4, "guidance_scale": 4.0, "seed": 0}
    (output,) = serve(adapter, [params], max_batch=1, device="cuda:0")
    assert torch.equal(output["pixels"], stock(adapter, params).cpu())
