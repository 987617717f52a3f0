"""Pipelines of a server's config."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from neustream.backends.loading.folders import folder_of
from neustream.core.types import SLO
from neustream.errors import BackendError, ConfigError
from neustream.server.bodies import EditBody, ImageBody
from neustream.server.config import ModelConfig
from neustream.server.models import BATCH, ImageModel
from neustream.server.pictures import fitted
from neustream.service.mount import Mount

CUT_OFF = "The following part of your input was truncated"
"""How diffusers begins to log a prompt that is longer than its text encoder reads, and what of it is not read."""


def without_prompt(record: logging.LogRecord) -> bool:
    """A filter of a log's handler: what diffusers logs of a prompt is logged without the prompt."""
    if str(record.msg).startswith(CUT_OFF):  # others are not put together here: one that cannot be would raise
        record.msg, record.args = record.getMessage().partition(":")[0], ()
    return True


def image_mount(config: ModelConfig) -> Mount:
    """A pipeline, measured at the sizes that are served. What diffusers logs of calls has no prompts from now on."""
    import diffusers

    for handler in logging.getLogger("diffusers").handlers:
        handler.addFilter(without_prompt)

    from neustream.backends.diffusers import PipelineMount, from_config
    from neustream.backends.options import options_of
    from neustream.backends.torch import dtype_of

    if config.path is not None:
        folder, dtype = folder_of(config.path), dtype_of(config.dtype)
        made = getattr(diffusers, config.pipeline or "DiffusionPipeline", None)
        if made is None:
            raise ConfigError(f"pipeline: diffusers has none called {config.pipeline!r}")
        pipe: Any = made.from_pretrained(folder, local_files_only=True, torch_dtype=dtype)
    else:
        options = {"dtype": config.dtype, **(config.backend or {})}
        pipe = from_config.build(options_of(from_config.Options, options))
    pipe.set_progress_bar_config(disable=True)
    pipe.to(config.device)
    known = from_config.call_names(pipe)
    name = type(pipe).__name__
    if "prompt" not in known:
        raise BackendError(f"{name} takes no prompt, so the routes of images cannot ask it")
    samples = [_sample(known, size) for size in _sizes(config, pipe)]
    return PipelineMount(pipe, **{"progress": False, "samples": samples, **config.options})


def _sizes(config: ModelConfig, pipe: Any) -> list[str]:
    """Those that are served; by default the pipeline's own."""
    from neustream.backends.diffusers.from_config import own_size

    return config.sizes or [own_size(pipe)]


def image_model(config: ModelConfig, mount: Any, slo: SLO) -> ImageModel:
    """What a front has to know of it."""
    from neustream.backends.diffusers.from_config import call_names
    from neustream.backends.diffusers.journal import may_move

    pipe = mount.pipe
    name, known, sizes = type(pipe).__name__, frozenset(call_names(pipe)), _sizes(config, pipe)
    return ImageModel(
        config.name,
        sizes,
        ImageArguments(name, known, sizes),
        slo,
        int(config.options.get("max_batch", BATCH)),
        config.device,
        generates="image" not in known or "Kontext" in name,
        edits="image" in known,
        masks="mask_image" in known,
        previews=may_move(pipe) and bool(mount.parts("decode")),
    )


def _sample(known: Mapping[str, Any], size: str) -> dict[str, Any]:
    """The arguments of a call that is measured before anybody is served."""
    from PIL import Image

    pixels = _pixels(size)
    blank = Image.new("RGB", (pixels["width"], pixels["height"]))
    whole = {"prompt": "a lighthouse", "image": blank, "mask_image": blank.convert("L"), **pixels}
    return {name: value for name, value in whole.items() if name in known}


@dataclass(frozen=True)
class ImageArguments:
    """Makes the arguments of a pipeline's call of a body, for its n-th image.

    Args:
        pipeline: the name of its class; known: the arguments of its call; sizes: that are served.
    """

    pipeline: str
    known: Collection[str]
    sizes: Sequence[str]

    def __call__(self, body: ImageBody, number: int, pictures: Mapping[str, Any]) -> dict[str, Any]:
        from neustream.backends.torch import seeded

        size = _size(body, pictures, self.sizes)
        asked: dict[str, Any] = {
            "prompt": body.prompt,
            "negative_prompt": body.negative_prompt,
            "num_inference_steps": body.num_inference_steps,
            "guidance_scale": body.guidance_scale,
            "strength": body.strength if isinstance(body, EditBody) else None,
        }
        if body.seed is not None:
            asked["generator"] = seeded((body.seed + number) % 2**63, "cpu")
        given = {name: value for name, value in asked.items() if value is not None}
        for name in given:
            if name not in self.known:
                raise ValueError(f"{self.pipeline} takes no {name}")
        pixels = {name: value for name, value in _pixels(size).items() if name in self.known}
        return {**given, **pixels, **_fitted(pictures, size)}


def _size(body: ImageBody, pictures: Mapping[str, Any], sizes: Sequence[str]) -> str:
    """The size of an answer: as asked, else that of the picture if it is served, else the model's first."""
    if body.pixels is not None:
        assert body.size is not None
        return body.size
    own = [f"{one.width}x{one.height}" for one in pictures.values()]
    return next((size for size in own if size in sizes), sizes[0])


def _fitted(pictures: Mapping[str, Any], size: str) -> dict[str, Any]:
    """The pictures of an edit as arguments of a call, in the size of the answer."""
    pixels = _pixels(size)
    side = pixels["width"], pixels["height"]
    names = {"image": ("image", "RGB"), "mask": ("mask_image", "L")}
    return {names[name][0]: fitted(picture, side, names[name][1]) for name, picture in pictures.items()}


def _pixels(size: str) -> dict[str, int]:
    width, _, height = size.partition("x")
    return {"width": int(width), "height": int(height)}
