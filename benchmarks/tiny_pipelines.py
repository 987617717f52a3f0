"""Pipelines of diffusers, built tiny from configurations with random weights, and mixed requests for each.

`build(name)` looks at what a pipeline's class declares: a component's type hint names its class, whose
tiny configuration is in `tiny_parts.py` and its neighbours; what a pipeline needs in its own way is in
`tiny_recipes.py`. Requests are made of the call's own arguments.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import typing
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import diffusers
import torch
import transformers
from diffusers import ConfigMixin, DiffusionPipeline, SchedulerMixin
from diffusers.guiders import BaseGuidance
from each_class import NotBuilt
from tiny_denoisers import DENOISERS
from tiny_inputs import PROMPTS, mask, picture
from tiny_parts import AUTOENCODERS, DDIM
from tiny_recipes import CALLS, PARTS, TEXTS
from tiny_texts import tokenizer_of, transformer_of
from tiny_unets import UNETS
from tiny_video import VIDEO_DENOISERS

CONFIGS = {**AUTOENCODERS, **UNETS, **DENOISERS, **VIDEO_DENOISERS}
ABSENT = {"safety_checker", "watermarker"}
"""Components that pipelines do without, unless a recipe names them."""
STEPS = (3, 6, 4, 5)
GUIDANCE = (5.0, 1.0, 2.5, 7.5)
REQUESTS = len(STEPS)
AREA = 64 * 64


@dataclass(frozen=True)
class Tiny:
    """A pipeline, and the arguments of several calls of it; `arguments(at)` are fresh each time."""

    pipe: Any
    content: Callable[[int], Mapping[str, Any]] = field(repr=False)
    dtype: torch.dtype = torch.float32

    def double(self) -> Tiny:
        """The same in float64, where rounding is a billion times smaller."""
        return replace(self, pipe=self.pipe.to(torch.float64), dtype=torch.float64)

    def arguments(self, at: int) -> dict[str, Any]:
        given = dict(self.content(at))
        for name, value in given.items():
            if isinstance(value, torch.Tensor) and value.is_floating_point():
                given[name] = value.to(self.dtype)
        if "generator" in inspect.signature(self.pipe.__call__).parameters:
            given["generator"] = torch.Generator().manual_seed(10 + at)
        return given


def names() -> list[str]:
    """Every pipeline class that diffusers exports."""
    found = []
    for name in dir(diffusers):
        kind = getattr(diffusers, name)
        if inspect.isclass(kind) and issubclass(kind, DiffusionPipeline) and kind is not DiffusionPipeline:
            found.append(name)
    return sorted(found)


def build(name: str) -> Tiny:
    """The pipeline, with the same weights each time. NotBuilt: no recipe fits."""
    kind = getattr(diffusers, name)
    _shrink(kind)
    torch.manual_seed(0)
    parts = dict(_components(name, kind))
    pipe = kind(**parts)
    pipe.set_progress_bar_config(disable=True)
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            part.eval().requires_grad_(False)
            _stir(part)
    return Tiny(pipe, lambda at: _content(name, kind, at))


def _shrink(kind: Any) -> None:
    """Have a pipeline that scales pictures to a million pixels, whatever it is given, scale them to a thousand."""
    module = inspect.getmodule(kind)
    if (scale := getattr(module, "calculate_dimensions", None)) is not None:
        module.calculate_dimensions = lambda area, ratio: scale(min(area, AREA), ratio)  # type: ignore[union-attr]


def _stir(model: torch.nn.Module) -> None:
    """Give weights that start at zero a value: what they let through would not be compared."""
    for weight in model.parameters():
        if weight.numel() and weight.is_floating_point() and not weight.any() and weight.ndim > 1:
            torch.nn.init.normal_(weight, std=0.1)


# -- components -------------------------------------------------------------------------------------------


def _components(name: str, kind: Any) -> Iterator[tuple[str, Any]]:
    own = _rules(PARTS, name)
    try:
        signature = inspect.signature(kind.__init__, eval_str=True)
    except NameError:  # hints that are there for type checkers only
        signature = inspect.signature(kind.__init__)
    parameters = list(signature.parameters.values())[1:]
    for parameter in parameters:
        if parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL):
            continue
        if parameter.name == "requires_safety_checker":
            yield parameter.name, False
        elif parameter.name in own:
            yield parameter.name, _made(own[parameter.name], name, parameter)
        elif parameter.name in ABSENT:
            yield parameter.name, None
        elif parameter.default is parameter.empty:
            yield parameter.name, _made({}, name, parameter)


def _rules(table: Mapping[str, Mapping[str, Any]], name: str) -> dict[str, Any]:
    """What rules say of a pipeline, the most special one last."""
    found: dict[str, Any] = {}
    for rule in sorted(table, key=lambda rule: (rule == name, len(rule))):
        if rule == name or _fits(rule, name):
            found.update(table[rule])
    return found


def _fits(rule: str, name: str) -> bool:
    """Whether a name has the words of a rule (`SkyReelsV2...ImageToVideo...`) in their order."""
    words = rule.split("...")
    if len(words) == 1:
        return False
    at = 0
    for number, word in enumerate(words):
        found = name.find(word, at)
        if found < 0 or (number == 0 and found > 0):
            return False
        at = found + len(word)
    return words[-1] == "" or name.endswith(words[-1])


def _made(wanted: Any, pipeline: str, parameter: inspect.Parameter) -> Any:
    """A component: of `wanted` (its own configuration, a finished object, a function of the class) or of its hint."""
    if callable(wanted):
        return wanted()
    if not isinstance(wanted, Mapping):
        return wanted
    given = dict(wanted)
    kinds = [given.pop("class")] if "class" in given else _hinted(parameter.annotation)
    problems = []
    for kind in kinds:
        try:
            return component(parameter.name, kind, given, _texts(pipeline))
        except NotBuilt as error:
            problems.append(str(error))
    raise NotBuilt(f"{parameter.name}: {'; '.join(problems) or 'its type is not declared'}")


def _texts(pipeline: str) -> Mapping[str, Any]:
    return _rules(TEXTS, pipeline)


def _hinted(annotation: Any) -> list[Any]:
    """The classes that a type hint allows."""
    if inspect.isclass(annotation) and annotation is not type(None):
        return [annotation]
    found = []
    for inner in typing.get_args(annotation):
        if inner is not type(None):
            found += _hinted(inner)
    return found


def component(name: str, kind: Any, change: Mapping[str, Any], texts: Mapping[str, Any]) -> Any:
    """A tiny object of a class (or of the class of that name)."""
    if isinstance(kind, str):
        kind = class_named(kind)
    known = kind.__name__
    if known in CONFIGS:
        return kind(**{**CONFIGS[known], **change})
    if known == "KarrasDiffusionSchedulers":
        return diffusers.DDIMScheduler(**{**DDIM, **change})
    if known in ("SchedulerMixin", "HeliosScheduler"):
        return diffusers.FlowMatchEulerDiscreteScheduler(**change)
    if issubclass(kind, SchedulerMixin):
        return kind(**change)
    if issubclass(kind, BaseGuidance):
        return diffusers.ClassifierFreeGuidance(**change)
    if "Tokenizer" in known or known in ("PythonBackend", "TokenizersBackend") or known.endswith("VLProcessor"):
        return tokenizer_of(known, **texts)
    if kind.__module__.startswith("transformers."):
        return transformer_of(known, change, texts)
    if change and issubclass(kind, ConfigMixin):
        return kind(**change)
    raise NotBuilt(f"no tiny {known}")


@cache
def class_named(name: str) -> Any:
    """A class of diffusers or transformers by name, wherever it is."""
    for package in (diffusers, transformers):
        if hasattr(package, name):
            return getattr(package, name)
    for module in pkgutil.walk_packages(diffusers.pipelines.__path__, "diffusers.pipelines."):
        last = module.name.rpartition(".")[2]
        if last.startswith("pipeline_"):
            continue
        try:
            found = getattr(importlib.import_module(module.name), name, None)
        except (ImportError, RuntimeError):  # it wants a package that is not here
            continue
        if found is not None:
            return found
    raise NotBuilt(f"no class {name}")


# -- requests ---------------------------------------------------------------------------------------------


def _content(name: str, kind: Any, at: int) -> dict[str, Any]:
    """The arguments of request number `at`, as far as the call takes them."""
    own = _rules(CALLS, name)
    size, frames = own.pop("size", 16), own.pop("frames", 5)
    steps = STEPS[at] + own.pop("more_steps", 0)
    usual: dict[str, Any] = {
        "prompt": PROMPTS[at],
        "negative_prompt": "blurry" if at % 2 == 0 else None,
        "image": picture(at, size),
        "mask_image": mask(at, size),
        "control_image": picture(at + 20, size),
        "video": [picture(10 * at + frame, size) for frame in range(frames)],
        "control_video": [picture(10 * at + frame + 7, size) for frame in range(frames)],
        "conditioning_frames": [picture(10 * at + frame, size) for frame in range(frames)],
        "height": size,
        "width": size,
        "num_frames": frames,
        "frames": frames,
        "video_length": frames,
        "strength": (0.8, 0.5, 1.0, 0.7)[at],
        "guidance_scale": GUIDANCE[at],
        "true_cfg_scale": GUIDANCE[at],
        "num_inference_steps": steps,
        "prior_num_inference_steps": STEPS[-1 - at],
        "max_sequence_length": 16,
        "clean_caption": False,
        "use_resolution_binning": False,
        "class_labels": [31 * at],
        "batch_size": 1,
        "output_type": "np",
    }
    parameters = inspect.signature(kind.__call__).parameters
    given = {key: value for key, value in usual.items() if key in parameters and value is not None}
    if "complex_human_instruction" in parameters:
        given["complex_human_instruction"] = None  # the default is as long as a page
    for key, value in own.items():
        if value is ...:
            given.pop(key, None)
        else:
            given[key] = value(at) if callable(value) else value
    return given
