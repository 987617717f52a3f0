"""Pipelines of every family, what stock makes of their requests, and how far results are off."""

from __future__ import annotations

import copy
import warnings
from functools import cache

import pytest

torch = pytest.importorskip("torch", reason="needs the extra 'diffusion'")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # diffusers' own imports
    d = pytest.importorskip("diffusers", reason="needs the extra 'diffusion'")
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
        requests,
        stock,
    )

    from neustream.backends.diffusers.parts import parts_of
    from neustream.backends.diffusers.run import Run

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


def change(name, *changes):
    """The requests of a family, the first ones with other arguments."""
    some = requests(name)
    return [
        Request({**request.content, **other}, request.seed, steps=request.steps)
        for request, other in zip(some, changes, strict=False)
    ]
