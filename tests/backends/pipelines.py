"""Tiny stock pipelines with random weights, and mixed requests for each: what the tests of this folder serve."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from known_pipelines import (
    cogvideox,
    controlnet,
    dit,
    flux,
    pixart,
    stable_diffusion,
    stable_diffusion_3,
    stable_diffusion_img2img,
    stable_diffusion_inpaint,
    stable_diffusion_xl,
    wan,
)
from other_pipelines import (
    animatediff,
    ddpm,
    kandinsky,
    kandinsky_combined,
    kandinsky_prior,
    ltx,
    marigold,
    qwenimage,
    sana,
    stable_audio,
)
from PIL import Image
from pipeline_parts import ready
from places import DEVICE

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # diffusers' own imports

    from neustream.backends.diffusers.parts import parts_of
    from neustream.backends.diffusers.run import Progress, Run, decode, denoise, encode

# -- requests ---------------------------------------------------------------------------------------------

PROMPTS = ("a cat", "two dogs", "", "the sea at night", "x" * 400, "tree")
STEPS = (3, 6, 4, 8, 5)
GUIDANCE = (5.0, 1.0, 2.5, 7.5, 0.0)
TWICE = 2
"""Which request asks for two images."""


def noise(at: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1000 + at))


def picture(at: int, size: int = 16) -> Image.Image:
    pixels = np.random.RandomState(at).randint(0, 256, (size, size, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def mask(at: int, size: int = 16) -> Image.Image:
    return Image.fromarray(np.where(np.arange(size)[:, None] < 3 + at, 255, 0).repeat(size, 1).astype(np.uint8))


def _prompt(at: int) -> dict[str, Any]:
    return {"prompt": PROMPTS[at], **({"negative_prompt": "blurry"} if at % 3 == 0 else {})}


def _img2img(at: int) -> dict[str, Any]:
    return {**_prompt(at), "image": picture(at), "strength": (0.8, 0.5, 1.0, 0.7, 0.9)[at]}


def _inpaint(at: int) -> dict[str, Any]:
    return {**_prompt(at), "image": picture(at), "mask_image": mask(at), "height": 16, "width": 16}


def _controlnet(at: int) -> dict[str, Any]:
    return {**_prompt(at), "image": picture(at), "controlnet_conditioning_scale": (1.0, 0.5)[at == 3]}


def _sized(at: int) -> dict[str, Any]:
    return {**_prompt(at), "height": 16, "width": 16, "max_sequence_length": 16}


def _flux(at: int) -> dict[str, Any]:
    return {"prompt": PROMPTS[at], "height": 16, "width": 16, "max_sequence_length": 16}


def _pixart(at: int) -> dict[str, Any]:
    own = {"use_resolution_binning": False, "clean_caption": False, "max_sequence_length": 16}
    return {**_prompt(at), "height": 16, "width": 16, **own}


def _dit(at: int) -> dict[str, Any]:
    return {"class_labels": [31 * at, 999] if at == TWICE else [31 * at]}


def _wan(at: int) -> dict[str, Any]:
    return {**_prompt(at), "height": 16, "width": 16, "num_frames": 5, "max_sequence_length": 16}


def _ddpm(at: int) -> dict[str, Any]:
    return {"batch_size": 2 if at == TWICE else 1}


def _kandinsky(at: int) -> dict[str, Any]:
    return {"image_embeds": noise(at, 1, 32), "negative_image_embeds": noise(-at - 1, 1, 32), "height": 32, "width": 32}


def _combined(at: int) -> dict[str, Any]:
    return {**_prompt(at), "prior_num_inference_steps": STEPS[-at], "height": 32, "width": 32}


def _qwenimage(at: int) -> dict[str, Any]:
    words = (8, 8, 5, 8, 6)[at]  # as many tokens, no more: prompts of one length share calls
    own = {"prompt_embeds": noise(at, 1, words, 32), "prompt_embeds_mask": torch.ones(1, words, dtype=torch.long)}
    other = {"negative_prompt_embeds": noise(-at - 1, 1, 8, 32)}
    other["negative_prompt_embeds_mask"] = torch.ones(1, 8, dtype=torch.long)
    return {**own, **other, "height": 32, "width": 32, "true_cfg_scale": GUIDANCE[at]}


def _stable_audio(at: int) -> dict[str, Any]:
    return {**_prompt(at), "audio_end_in_s": (2.0, 2.0, 1.0, 2.0, 1.5)[at]}


def _marigold(at: int) -> dict[str, Any]:
    return {"image": [picture(at), picture(-at % 7)] if at == TWICE else picture(at)}  # two: one after the other


def _animatediff(at: int) -> dict[str, Any]:
    return {**_prompt(at), "num_frames": 3}


def _sana(at: int) -> dict[str, Any]:
    seen = torch.tensor([[1] * (3 + at) + [0] * (5 - at)])
    given = {"prompt_embeds": noise(at, 1, 8, 32), "prompt_attention_mask": seen}
    nothing = {
        "negative_prompt": None,
        "negative_prompt_embeds": noise(-at - 1, 1, 8, 32),
        "negative_prompt_attention_mask": seen,
    }
    return {**given, **nothing, "height": 32, "width": 32, "use_resolution_binning": False}


def _ltx(at: int) -> dict[str, Any]:
    return {**_prompt(at), "height": 32, "width": 32, "num_frames": 5, "max_sequence_length": 16}


@dataclass(frozen=True)
class Family:
    """A kind of pipeline.

    `content` are the arguments of request number `at` beside steps, guidance and seed; `guided` whether
    it takes a guidance scale, `several` its argument for more than one result. `rounded`: its output is
    float32 whatever its models compute in. `shared`: its requests share calls of the denoiser.
    `tolerance` is that of float32.
    """

    make: Callable[..., Any]
    content: Callable[[int], Mapping[str, Any]]
    guided: bool = True
    several: str | None = "num_images_per_prompt"
    output: str = "pt"
    rounded: bool = False
    shared: bool = True
    tolerance: float = 1e-5


FAMILIES: dict[str, Family] = {
    "stable_diffusion": Family(stable_diffusion, _prompt),
    "stable_diffusion_img2img": Family(stable_diffusion_img2img, _img2img),
    "stable_diffusion_inpaint": Family(stable_diffusion_inpaint, _inpaint),
    "controlnet": Family(controlnet, _controlnet),
    "stable_diffusion_xl": Family(stable_diffusion_xl, _prompt),
    "stable_diffusion_3": Family(stable_diffusion_3, _sized),
    "flux": Family(flux, _flux),
    "pixart": Family(pixart, _pixart),
    "dit": Family(dit, _dit, several=None),
    "wan": Family(wan, _wan, several="num_videos_per_prompt"),
    # the random weights of these two decoders make differences thirty times larger
    "cogvideox": Family(cogvideox, _wan, several="num_videos_per_prompt", tolerance=1e-4),
    "ddpm": Family(ddpm, _ddpm, guided=False, several=None),
    "kandinsky": Family(kandinsky, _kandinsky, tolerance=1e-4),
    "kandinsky_prior": Family(kandinsky_prior, _prompt),
    "kandinsky_combined": Family(kandinsky_combined, _combined, tolerance=1e-3),
    "marigold": Family(marigold, _marigold, guided=False, several=None),
    "animatediff": Family(animatediff, _animatediff, several="num_videos_per_prompt", rounded=True, shared=False),
    "sana": Family(sana, _sana),
    "ltx": Family(ltx, _ltx, several="num_videos_per_prompt"),
    "qwenimage": Family(qwenimage, _qwenimage, guided=False),
    "stable_audio": Family(stable_audio, _stable_audio, several="num_waveforms_per_prompt"),
}


@dataclass(frozen=True)
class Request:
    """One call of a pipeline; `arguments()` are those of the stock call, with a fresh generator."""

    content: Mapping[str, Any]
    seed: int
    dtype: torch.dtype = torch.float32
    steps: int = field(kw_only=True)

    def arguments(self, **change: Any) -> dict[str, Any]:
        whole = {**self.content, "num_inference_steps": self.steps, **change}
        for name, value in whole.items():
            if isinstance(value, torch.Tensor):
                whole[name] = value.to(DEVICE, self.dtype if value.is_floating_point() else value.dtype)
        return {"generator": torch.Generator().manual_seed(self.seed), **whole}


def build(name: str, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    """The pipeline of a family; the same weights each time."""
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # stock pipelines have opinions on scheduler configs
        return ready(FAMILIES[name].make(**options), dtype)


def requests(name: str, dtype: torch.dtype = torch.float32) -> list[Request]:
    """Five mixed requests: other steps, guidance (two without), seeds, prompts; one wants two results."""
    family = FAMILIES[name]
    made = []
    for at, (steps, guidance) in enumerate(zip(STEPS, GUIDANCE, strict=True)):
        content = {**family.content(at), "output_type": family.output}
        if family.guided:
            content["guidance_scale"] = guidance
        if family.several is not None and at == TWICE:
            content[family.several] = 2
        made.append(Request(content, 10 + at, dtype, steps=steps))
    return made


# -- running them -----------------------------------------------------------------------------------------


def tensor_of(output: Any) -> torch.Tensor:
    """The first thing that a pipeline's output holds."""
    first = output[0] if not isinstance(output, torch.Tensor) else output
    if isinstance(first, list):
        first = torch.stack([x if isinstance(x, torch.Tensor) else torch.from_numpy(np.asarray(x)) for x in first])
    return torch.from_numpy(first) if isinstance(first, np.ndarray) else first


def stock(pipe: Any, request: Request) -> torch.Tensor:
    """What the pipeline itself makes of a request, alone."""
    return tensor_of(pipe(**request.arguments()))


def difference(one: torch.Tensor, other: torch.Tensor) -> float:
    """The greatest difference, as a share of the greatest value of `other`."""
    assert one.shape == other.shape and one.dtype == other.dtype
    return float((one - other).abs().max() / other.abs().max())


def counted(parts: Mapping[int, Mapping[str, Any]]) -> dict[str, list[int]]:
    """Rows of each call that parts make from now on, by the part's name."""
    seen: dict[str, list[int]] = {}

    def watch(part: Any) -> Callable[..., Any]:
        function = part.function

        def call(*args: Any, **kwargs: Any) -> Any:
            tensors = [x for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor) and x.ndim]
            seen.setdefault(part.name, []).append(len(tensors[0]))
            return function(*args, **kwargs)

        return call

    for methods in parts.values():
        for part in methods.values():
            part.function = watch(part)
    return seen


def finish(
    runs: Sequence[Run], *, apart: int = 2, close: Sequence[int] = (), pause: int = 4, order: Sequence[int] = ()
) -> None:
    """Bring runs to their ends, in batches that change from step to step.

    Args:
        apart: run number `at` starts at step `at // 2 * apart`.
        close: numbers of runs that are given up in their third step.
        pause: every run misses each so many steps, each another one.
        order: numbers of the runs in the order that they arrive in.
    """
    order = list(order or range(len(runs)))
    for tick in range(1000):
        here = [
            runs[at]
            for place, at in enumerate(order)
            if tick >= place // 2 * apart and not runs[at].over and (tick + place) % pause != pause - 1
        ]
        encode([run for run in here if not run.started])
        ahead = [run for run in here if run.denoising]
        denoise(ahead)
        if tick % 3 == 2:  # those that are done wait for each other
            decode([run for run in here if not run.over and not run.denoising])
        for at in close:
            if runs[at].steps >= 2 and not runs[at].over:
                runs[at].close()
        if all(run.over for run in runs):
            return
    raise AssertionError("some runs do not come to their end")


def alone(pipe: Any, request: Request, parts: Any = None, on_step: Callable[[Progress], None] | None = None) -> Any:
    """A request's output, served with nobody else."""
    run = Run(pipe, parts_of(pipe) if parts is None else parts, request.arguments(), on_step=on_step)
    finish([run], pause=1000)
    if run.error is not None:
        raise run.error
    return tensor_of(run.output)


def together(pipe: Any, some: Sequence[Request], parts: Any = None, **how: Any) -> list[Any]:
    """The outputs of requests that share steps (see `finish`); None for those that were closed."""
    parts = parts_of(pipe) if parts is None else parts
    runs = [Run(pipe, parts, request.arguments()) for request in some]
    finish(runs, **how)
    for run in runs:
        if run.error is not None:
            raise run.error
    return [None if run.output is None else tensor_of(run.output) for run in runs]
