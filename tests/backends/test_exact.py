"""What stock pipelines make of requests, and what the same requests get when they share steps with others."""

from __future__ import annotations

import copy
import inspect
import warnings
from functools import cache

import pytest

torch = pytest.importorskip("torch", reason="needs the extra 'diffusion'")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # diffusers' own imports
    d = pytest.importorskip("diffusers", reason="needs the extra 'diffusion'")
    import transformers
    from pipeline_parts import BETAS, DDIM
    from pipelines import (
        FAMILIES,
        Request,
        alone,
        build,
        counted,
        difference,
        finish,
        noise,
        picture,
        ready,
        requests,
        stock,
        tensor_of,
        together,
    )

    from neustream.backends.diffusers.calls import PROVEN
    from neustream.backends.diffusers.from_config import byte_tokenizer
    from neustream.backends.diffusers.parts import parts_of
    from neustream.backends.diffusers.run import Run, decode, denoise, encode
    from neustream.backends.diffusers.standins import asked_of_to
    from neustream.backends.diffusers.stepping import Hooks, Step, own_scheduler, step_together, table_of
    from neustream.errors import BackendError

pytestmark = [
    # numpy 2's complaints about how diffusers 0.42 calls it, and torch's about transformers
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

TOLERANCE = 1e-12
"""Of float64, relative to the greatest value."""
EVERY = pytest.mark.parametrize("name", FAMILIES)
SPACED = {**BETAS, "steps_offset": 1}
SCHEDULERS = {
    "DDIM": lambda: d.DDIMScheduler(**DDIM),
    "DDPM": lambda: d.DDPMScheduler(**BETAS, clip_sample=False),
    "PNDM": lambda: d.PNDMScheduler(**SPACED, skip_prk_steps=True),
    "Euler": lambda: d.EulerDiscreteScheduler(**SPACED),
    "Euler ancestral": lambda: d.EulerAncestralDiscreteScheduler(**SPACED),
    "DPM++ 2M": lambda: d.DPMSolverMultistepScheduler(**SPACED),
    "DPM++ 2M Karras": lambda: d.DPMSolverMultistepScheduler(**SPACED, use_karras_sigmas=True),
    "DPM++ 2M SDE": lambda: d.DPMSolverMultistepScheduler(**SPACED, algorithm_type="sde-dpmsolver++"),
    "UniPC": lambda: d.UniPCMultistepScheduler(**SPACED),
    "Heun": lambda: d.HeunDiscreteScheduler(**SPACED),
    "LCM": lambda: d.LCMScheduler(**SPACED),
}
STEPPED = {
    "DDIM": lambda: d.DDIMScheduler(**DDIM),
    "DDIM to alpha one": lambda: d.DDIMScheduler(clip_sample=False, timestep_spacing="linspace"),
    "DDIM v": lambda: d.DDIMScheduler(**DDIM, prediction_type="v_prediction"),
    "DDIM v from zero SNR": lambda: d.DDIMScheduler(
        **DDIM, prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing"
    ),
    "Euler": lambda: d.EulerDiscreteScheduler(**SPACED),
    "Euler Karras": lambda: d.EulerDiscreteScheduler(**SPACED, use_karras_sigmas=True, timestep_spacing="trailing"),
    "FlowMatchEuler": lambda: d.FlowMatchEulerDiscreteScheduler(shift=3.0),
    "FlowMatchEuler Karras": lambda: d.FlowMatchEulerDiscreteScheduler(use_karras_sigmas=True),
}
ON_GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")]
PLACES = [
    ("cpu", "float32"),
    ("cpu", "float64"),
    ("cpu", "bfloat16"),
    ("cpu", "float16"),
    *(pytest.param("cuda", dtype, marks=ON_GPU) for dtype in ("float32", "bfloat16", "float16")),
]


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def nothing_to_warn_of(caplog):
    """Models that do not give the same results in a batch are logged, and served one request at a time."""
    yield
    assert not [record.getMessage() for record in caplog.records if record.name == "neustream"]


@cache
def pipeline(name, dtype="float32"):
    return build(name, getattr(torch, dtype))


@cache
def expected(name, dtype="float32"):
    """What the stock pipeline makes of each request of a family."""
    return [stock(pipeline(name, dtype), request) for request in requests(name, getattr(torch, dtype))]


def furthest(outputs, references):
    return max(difference(x, y) for x, y in zip(outputs, references, strict=True))


def last_latents(pipe, some, *, apart):
    """The latents of each request after its last step: served one by one (`apart`), or all together."""
    seen = {}
    parts = parts_of(pipe)
    runs = []
    for at, request in enumerate(some):
        runs.append(Run(pipe, parts, request.arguments(), on_step=lambda made, at=at: seen.update({at: made.latents})))
        if apart:
            finish(runs[-1:])
    finish(runs)
    return [seen[at] for at in range(len(some))]


def scheduler_states(pipe):
    """What schedulers of a pipeline hold, and of pipelines in it."""
    inner = [value for value in vars(pipe).values() if isinstance(value, d.DiffusionPipeline)]
    own = [repr(vars(value)) for value in vars(pipe).values() if isinstance(value, d.SchedulerMixin)]
    return own + [state for one in inner for state in scheduler_states(one)]


def with_scheduler(pipe, name):
    """The same pipeline with another scheduler; the pipeline itself stays as it is."""
    other = copy.copy(pipe)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        other.scheduler = SCHEDULERS[name]()
    return other


def super_resolution_unet():
    return d.UNet2DModel(
        in_channels=6,
        out_channels=3,
        block_out_channels=(16, 32),
        layers_per_block=1,
        norm_num_groups=8,
        attention_head_dim=8,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )


def scheduled(scheduler, steps, device="cpu"):
    scheduler.set_timesteps(steps, device=device)
    return scheduler


def tensors(seed, rows, dtype, device="cpu"):
    """A model's output and a sample."""
    return [noise(number, rows, 4, 8, 8).to(device, getattr(torch, dtype)) for number in (seed, -seed - 1)]


def watched(pipe, serve):
    """What `serve` returns, and how many rows each call of a denoiser had."""
    parts = parts_of(pipe)
    seen = counted(parts)
    outputs = serve(parts)
    names = {part.name for methods in parts.values() for part in methods.values() if part.role == "denoise"}
    return outputs, [count for name in names for count in seen.get(name, ())]


@cache
def one_by_one(name):
    pipe = pipeline(name)
    return watched(pipe, lambda parts: [alone(pipe, request, parts) for request in requests(name)])


# -- every family -----------------------------------------------------------------------------------------


@EVERY
def test_alone_is_bitwise_stock(name):
    outputs, _ = one_by_one(name)
    assert len(outputs) == 5
    assert all(torch.equal(output, reference) for output, reference in zip(outputs, expected(name), strict=True))


@EVERY
def test_alone_is_bitwise_stock_in_half_precision(name):
    pipe = build(name, torch.bfloat16)
    for request in requests(name, torch.bfloat16)[1:3]:
        assert torch.equal(alone(pipe, request), stock(pipe, request)), request


@EVERY
def test_together_is_stock_up_to_rounding(name):
    """And they share calls of the denoiser: some start later, nobody is in every step."""
    pipe, family = pipeline(name), FAMILIES[name]
    outputs, rows = watched(pipe, lambda parts: together(pipe, requests(name), parts))
    assert furthest(outputs, expected(name)) < family.tolerance
    _, apart = one_by_one(name)
    if not family.shared:
        assert sorted(rows) == sorted(apart)
        return
    assert len(rows) < 0.8 * len(apart)
    assert max(rows) > max(apart)
    assert sum(apart) <= sum(rows) <= sum(apart) + 2 * max(apart)  # a model that is new is tried alone first


@EVERY
def test_in_double_precision_rounding_is_all_there_is(name):
    """A mixed-up timestep, seed or guidance would change far more than this."""
    pipe, some = pipeline(name, "float64"), requests(name, torch.float64)
    if not FAMILIES[name].rounded:
        assert furthest(together(pipe, some), expected(name, "float64")) < TOLERANCE
        return
    # its pixels are float32 whatever its models compute in, its latents are not
    assert furthest(together(pipe, some), expected(name, "float64")) < 1e-6
    assert furthest(last_latents(pipe, some, apart=False), last_latents(pipe, some, apart=True)) < TOLERANCE


@EVERY
def test_in_a_fixed_bucket_nobody_changes_anybodys_bits(name):
    """Whoever comes along, in whatever order, and whoever leaves halfway."""
    pipe, some = pipeline(name), requests(name)
    parts = parts_of(pipe, buckets=(16,))
    seen = counted(parts)
    references = {at: alone(pipe, some[at], parts) for at in (0, 2, 4)}
    stays = together(pipe, some, parts, close=(3,))
    moves = together(pipe, some, parts, order=(4, 2, 0, 3, 1), pause=5, close=(1,))
    assert stays[3] is None and moves[1] is None
    if FAMILIES[name].shared:
        proven = {part.name for methods in parts.values() for part in methods.values() if part.owner in PROVEN}
        for part, rows in seen.items():  # the others are tried out, as they are and padded
            assert set(rows) == {16} or (part not in proven and 16 in rows)
    for at, reference in references.items():
        assert difference(reference, expected(name)[at]) < 10 * FAMILIES[name].tolerance
        assert torch.equal(stays[at], reference) and torch.equal(moves[at], reference)


@EVERY
def test_other_arguments_change_the_result_a_lot(name):
    """The control of the tests above."""
    family, request = FAMILIES[name], requests(name)[0]
    pipe, reference = pipeline(name), expected(name)[0]
    others = [Request(request.content, 99, steps=request.steps), Request(request.content, request.seed, steps=4)]
    if family.guided:
        others.append(Request({**request.content, "guidance_scale": 4.0}, request.seed, steps=request.steps))
    for other in others:
        assert difference(alone(pipe, other), reference) > 10 * family.tolerance, other


@EVERY
def test_serving_leaves_the_pipeline_as_it_was(name):
    pipe = pipeline(name)
    before, states = dict(vars(pipe)), scheduler_states(pipe)
    together(pipe, requests(name)[:2], close=(1,))
    assert vars(pipe).keys() == before.keys()
    assert all(value is before[key] for key, value in vars(pipe).items())
    assert scheduler_states(pipe) == states
    assert not torch.is_autocast_enabled("cpu") and not torch.is_inference_mode_enabled()


# -- schedulers -------------------------------------------------------------------------------------------


@cache
def expected_of_scheduler(scheduler, dtype):
    pipe = with_scheduler(pipeline("stable_diffusion", dtype), scheduler)
    return [stock(pipe, request) for request in requests("stable_diffusion", getattr(torch, dtype))[:3]]


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_schedulers_alone_are_bitwise_stock(scheduler):
    pipe = with_scheduler(pipeline("stable_diffusion"), scheduler)
    for request, reference in zip(
        requests("stable_diffusion"), expected_of_scheduler(scheduler, "float32"), strict=False
    ):
        assert torch.equal(alone(pipe, request), reference), request


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("float64", TOLERANCE)])
@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_schedulers_together_are_stock_up_to_rounding(scheduler, dtype, tolerance):
    pipe = with_scheduler(pipeline("stable_diffusion", dtype), scheduler)
    outputs = together(pipe, requests("stable_diffusion", getattr(torch, dtype))[:3])
    assert furthest(outputs, expected_of_scheduler(scheduler, dtype)) < tolerance


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("float64", TOLERANCE)])
def test_one_batch_of_all_schedulers(dtype, tolerance):
    """Their timesteps are int64 or float32, their steps single or shared, two calls a step for Heun."""
    pipe = pipeline("stable_diffusion", dtype)
    parts = parts_of(pipe)
    seen, runs, references = counted(parts), [], []
    for at, scheduler in enumerate(SCHEDULERS):
        request = requests("stable_diffusion", getattr(torch, dtype))[at % 5]
        own = with_scheduler(pipe, scheduler)
        references.append(stock(own, request))
        runs.append(Run(own, parts, request.arguments()))
        encode(runs[-1:])
    finish(runs, apart=0)
    assert furthest([tensor_of(run.output) for run in runs], references) < tolerance
    assert max(seen["unet"]) >= 14


@pytest.mark.parametrize(("device", "dtype"), PLACES)
@pytest.mark.parametrize("name", STEPPED)
def test_steps_taken_together_are_bitwise_stock(name, device, dtype):
    """Requests of other step counts, at other steps, with one image or two."""
    schedules = [scheduled(STEPPED[name](), steps, device) for steps in (3, 8, 5, 1, 20)]
    for tick in range(25):
        here = [(at, steps, tick - at) for at, steps in enumerate(schedules) if 0 <= tick - at < len(steps.timesteps)]
        if not here:
            continue
        pairs = [tensors(100 * tick + at, 1 + at % 2, dtype, device) for at, _, _ in here]
        waiting = [Step(table_of(steps), index, *pair) for (_, steps, index), pair in zip(here, pairs, strict=True)]
        for got, (_, steps, index), pair in zip(step_together(waiting), here, pairs, strict=True):
            want = steps.step(pair[0], steps.timesteps[index], pair[1], return_dict=False)
            assert len(got) == len(want)
            assert all(x.dtype == y.dtype and torch.equal(x, y) for x, y in zip(got, want, strict=True))


@pytest.mark.parametrize("name", STEPPED)
def test_latents_of_more_bits_than_the_model(name):
    """As in Wan: bfloat16 from the model, float32 latents."""
    steps = scheduled(STEPPED[name](), 6)
    output, sample = tensors(1, 2, "float32")
    output = output.to(torch.bfloat16)
    (got,) = step_together([Step(table_of(steps), 2, output, sample)])
    for t in steps.timesteps[:3]:  # Euler counts for itself
        want = steps.step(output, t, sample, return_dict=False)
    assert torch.equal(got[0], want[0])


def test_schedulers_of_one_class_with_other_configs_share_operations():
    makers = (STEPPED["DDIM"], STEPPED["DDIM to alpha one"], lambda: d.DDIMScheduler(beta_end=0.03, clip_sample=False))
    schedules = [scheduled(make(), 5) for make in makers]
    pairs = [tensors(at, 1, "float32") for at in range(3)]
    waiting = [Step(table_of(steps), 2, *pair) for steps, pair in zip(schedules, pairs, strict=True)]
    assert len({step.key for step in waiting}) == 1
    for got, steps, pair in zip(step_together(waiting), schedules, pairs, strict=True):
        assert torch.equal(got[0], steps.step(pair[0], steps.timesteps[2], pair[1])[0])


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("name", STEPPED)
def test_a_requests_own_scheduler_is_the_stock_one(name, shared):
    """Step for step, return value for return value, whether steps are shared or left to the stock code."""
    template, told = STEPPED[name](), []
    before = repr(vars(template))
    own = own_scheduler(template, Hooks(lambda step: step_together([step])[0] if shared else None, told.append))
    stock_one = scheduled(STEPPED[name](), 7)
    own.set_timesteps(7)
    assert torch.equal(own.timesteps, stock_one.timesteps)
    mine = theirs = tensors(0, 1, "float32")[1]
    for at, t in enumerate(own.timesteps):
        output = tensors(at + 1, 1, "float32")[0]
        got, want = own.step(output, t, mine), stock_one.step(output, t, theirs)
        assert type(got) is type(want) and got.keys() == want.keys()
        assert all(torch.equal(got[key], want[key]) for key in want)
        assert getattr(own, "step_index", None) == getattr(stock_one, "step_index", None)
        mine, theirs = got.prev_sample, want.prev_sample
    assert len(told) == 7 and torch.equal(told[-1], mine)
    assert repr(vars(template)) == before  # the one that others copy


@pytest.mark.parametrize("scheduler", ["Euler", "DDIM", "DDPM"])
def test_dit_with_any_scheduler(scheduler):
    """Stock DiT scales its input and goes on from what it scaled, which Euler does not expect: so do we."""
    pipe = build("dit", scheduler=SCHEDULERS[scheduler]())
    for request in requests("dit"):
        torch.manual_seed(3)  # DiT gives its scheduler no generator
        reference = stock(pipe, request)
        torch.manual_seed(3)
        assert torch.equal(alone(pipe, request), reference), request
    if scheduler != "DDPM":
        assert furthest(together(pipe, requests("dit")), [stock(pipe, request) for request in requests("dit")]) < 1e-5


# -- what requests can ask for ----------------------------------------------------------------------------


def change(name, *changes):
    """The requests of a family, the first ones with other arguments."""
    some = requests(name)
    return [
        Request({**request.content, **other}, request.seed, steps=request.steps)
        for request, other in zip(some, changes, strict=False)
    ]


def test_sizes_share_the_text_encoder_and_nothing_else():
    tall = {"height": 32, "width": 16}
    some = change("stable_diffusion", tall, {}, {"height": 16, "width": 24}, tall, {})
    pipe = pipeline("stable_diffusion")
    outputs = together(pipe, some)
    assert [tuple(output.shape[2:]) for output in outputs] == [(32, 16), (16, 16), (16, 24), (32, 16), (16, 16)]
    assert furthest(outputs, [stock(pipe, request) for request in some]) < 1e-5


def test_several_prompts_generators_and_latents_of_ones_own():
    pipe = pipeline("stable_diffusion")
    several = [torch.Generator().manual_seed(5), torch.Generator().manual_seed(6)]
    some = change(
        "stable_diffusion",
        {"prompt": ["a cat", "two dogs"], "negative_prompt": ["", "blurry"]},
        {"prompt": ["a cat", "two dogs"]},
        {"latents": noise(1, 2, 4, 8, 8)},
        {"eta": 0.5},  # noise: its steps are not shared
        {"output_type": "latent", "guidance_rescale": 0.7},
    )
    parts = parts_of(pipe)
    runs = [Run(pipe, parts, request.arguments()) for request in some]
    runs.append(Run(pipe, parts, some[1].arguments(generator=several)))
    finish(runs)
    references = [stock(pipe, request) for request in some]
    several = [torch.Generator().manual_seed(5), torch.Generator().manual_seed(6)]
    references.append(tensor_of(pipe(**some[1].arguments(generator=several))))
    assert furthest([tensor_of(run.output) for run in runs], references) < 1e-5
    assert tuple(references[4].shape) == (1, 4, 8, 8)


def test_schedules_of_ones_own():
    pipe = pipeline("stable_diffusion_xl")
    own = [{"timesteps": [900, 500, 100]}, {"sigmas": [10.0, 3.0, 0.5]}, {"denoising_end": 0.6}, {}, {}]
    some = change("stable_diffusion_xl", *own)
    for request in some[:2]:
        assert torch.equal(alone(pipe, request), stock(pipe, request))
    assert furthest(together(pipe, some), [stock(pipe, request) for request in some]) < 1e-5


def test_callbacks_change_a_request_as_they_would_in_the_stock_call():
    def damp(pipe, step, timestep, given):
        pipe._interrupt = step == 4
        return {"latents": given["latents"] * 0.9}

    pipe = pipeline("stable_diffusion")
    some = change("stable_diffusion", {}, {"callback_on_step_end": damp}, {"callback_on_step_end": damp}, {}, {})
    references = [stock(pipe, request) for request in some]
    assert difference(references[1], expected("stable_diffusion")[1]) > 1e-3
    pipe._interrupt = False
    assert furthest(together(pipe, some), references) < 1e-5
    assert not pipe._interrupt  # it was the request's own


def test_progress_of_steps():
    pipe, told = pipeline("flux"), []
    alone(pipe, requests("flux")[0], on_step=told.append)
    assert [(made.step, made.total) for made in told] == [(1, 3), (2, 3), (3, 3)]
    assert all(tuple(made.latents.shape) == (1, 16, 16) for made in told)


def test_one_step_at_a_time():
    """What `denoise` promises: one step each, wherever they are; runs that are over stay as they are."""
    pipe = pipeline("stable_diffusion")
    parts = parts_of(pipe)
    runs = [Run(pipe, parts, request.arguments()) for request in requests("stable_diffusion")]
    denoise(runs[:2])
    assert [run.steps for run in runs] == [1, 1, 0, 0, 0]
    encode(runs)
    assert all(run.denoising for run in runs) and [run.steps for run in runs] == [1, 1, 0, 0, 0]
    denoise(runs)
    denoise(runs)
    assert [run.steps for run in runs] == [3, 3, 2, 2, 2]
    assert [run.denoising for run in runs] == [False, True, True, True, True]
    decode(runs[:1])
    assert runs[0].over and difference(tensor_of(runs[0].output), expected("stable_diffusion")[0]) < 1e-5
    decode(runs[:1])
    for run in runs[1:]:
        run.close()
    denoise(runs)
    assert [run.over for run in runs] == [True] * 5 and [run.steps for run in runs] == [3, 3, 2, 2, 2]


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
        assert not torch.is_autocast_enabled("cpu")
    finally:
        torch.set_autocast_enabled("cpu", False)


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
        image = torch.randn(1, 3, 8, 8, generator=generator)
        sound = torch.randn(1, 3, 8, 8, generator=generator)
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
