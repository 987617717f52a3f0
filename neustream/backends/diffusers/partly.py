"""Pipelines of which only what some stages need is here; instances of a cluster's other roles have the rest."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers import DiffusionPipeline, ModelMixin
from transformers import PreTrainedModel

from neustream.backends.diffusers.lacking import is_lacking
from neustream.backends.diffusers.parts import models_of, parts_of, role_of
from neustream.core.stage_names import named
from neustream.errors import BackendError, nearest, shown

STAGES = ("encode", "denoise", "decode")
PICTURES = frozenset(("image", "mask_image", "control_image", "video"))
"""Arguments that the VAE encodes before the first step."""
META = torch.device("meta")


def load_part(path: Path | str, stages: Collection[str], *, pipeline: Any = DiffusionPipeline, **options: Any) -> Any:
    """A pipeline of a checkpoint, with the weights of what some stages need and no others.

    Args:
        path: the folder of a checkpoint.
        stages: of "encode", "denoise", "decode"; serve it with the same `stages`.
        pipeline: its class, where `DiffusionPipeline` would choose another one.
        options: further arguments of `from_pretrained`.

    Raises:
        BackendError: no such stage; or what the checkpoint itself is wrong in.
    """
    check_stages(stages)
    folder = Path(path)
    kind = diffusers_class(folder, pipeline)
    dtype = options.get("torch_dtype")
    empty = {name: model for name, model in _empty(folder, dtype).items() if name not in options}
    needed = needs(kind, stages)
    lacking = {name: model for name, model in empty.items() if (role_of(name, model) or "decode") not in needed}
    pipe = pipeline.from_pretrained(str(folder), **{**lacking, **options})
    return keep_only(pipe, stages)  # what is of another library was loaded


def keep_only(pipe: DiffusionPipeline, stages: Collection[str]) -> DiffusionPipeline:
    """Let go of the weights of all models of a pipeline that some stages do not need; returns the pipeline.

    There is no way back: what is gone has to be loaded again.
    """
    check_stages(stages)
    needed = needs(type(pipe), stages)
    for name, model in models_of(pipe):
        if (role_of(name, model) or "decode") not in needed and not is_lacking(model):
            model.to(META)
    return pipe


def needs(pipeline: Any, stages: Collection[str]) -> frozenset[str]:
    """What models have to do, of those that have to be there for some stages of a class of pipelines.

    Those of no stage (a safety checker) are called where is decoded.
    """
    found = set(stages)
    if "encode" in found and PICTURES & inspect.signature(pipeline.__call__).parameters.keys():
        found.add("decode")
    return frozenset(found)


def check_stages(stages: Collection[str]) -> None:
    """BackendError for what are no stages of pipelines."""
    if isinstance(stages, str) or not stages:
        raise BackendError(f"stages must be a list of names, as ['encode', 'decode'], got {shown(stages)}")
    for name in stages:
        if name not in STAGES:
            raise BackendError(f"stages: a pipeline has no stage {shown(name)}; {nearest(str(name), STAGES)}")


def check_loaded(pipe: DiffusionPipeline, name: str, stages: Sequence[str] | None) -> None:
    """BackendError if a stage is to be served whose models are not here.

    Args:
        name: of the pipeline; stages: names of those that are served (see `Service`); None: all.
    """
    prefix = f"{name}/" if name else ""
    for role, models in parts_of(pipe).lacking.items():
        stage = prefix + role
        if named(stage, stages) or any(named(one, [stage]) for one in stages or ()):
            raise BackendError(
                f"stage {stage!r}: the weights of {', '.join(models)} are not loaded: load them, or say which "
                f"stages are served, stages={'all' if stages is None else list(stages)} here"
            )


def moved(pipe: Any, device: torch.device) -> Any:
    """A pipeline on a device, with what is here of it."""
    models = [model for _, model in models_of(pipe)]
    if not any(map(is_lacking, models)):
        return pipe.to(device)
    for model in models:
        if not is_lacking(model):
            model.to(device)
    return pipe


def diffusers_class(folder: Path, pipeline: Any) -> Any:
    """The class of the pipeline in a folder; BackendError if there is none."""
    try:
        config = DiffusionPipeline.load_config(str(folder), local_files_only=True)
    except (OSError, ValueError) as error:
        raise BackendError(f"checkpoint {str(folder)!r}: {error}") from error
    if pipeline is not DiffusionPipeline:
        return pipeline
    name = config["_class_name"]
    found = getattr(diffusers, name, None)
    if found is None:
        raise BackendError(
            f"checkpoint {str(folder)!r}: diffusers has no pipeline {name!r}; give its class as pipeline="
        )
    return found


def _empty(folder: Path, dtype: torch.dtype | None) -> dict[str, torch.nn.Module]:
    """The models of a checkpoint without weights, as far as their classes are of diffusers or transformers."""
    config: Mapping[str, Any] = DiffusionPipeline.load_config(str(folder), local_files_only=True)
    found = {}
    for name, value in config.items():
        if not isinstance(value, list | tuple) or len(value) != 2 or not (folder / name / "config.json").exists():
            continue
        _, kind = value
        model = _model(folder, name, getattr(diffusers, str(kind), None) or getattr(transformers, str(kind), None))
        if model is not None:
            found[name] = (model if dtype is None else model.to(dtype)).eval()
    return found


def _model(folder: Path, name: str, kind: Any) -> torch.nn.Module | None:
    """A model without weights; None for what is no model."""
    if not isinstance(kind, type) or not issubclass(kind, ModelMixin | PreTrainedModel):
        return None
    cls: Any = kind
    where = {"subfolder": name, "local_files_only": True}
    of_texts = issubclass(kind, PreTrainedModel)
    settings = (cls.config_class.from_pretrained if of_texts else cls.load_config)(str(folder), **where)
    with META:
        made: torch.nn.Module = cls(settings) if of_texts else cls.from_config(settings)
    return made
