"""What of a pipeline its requests can share, and in which stage: found by looking at its components."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from diffusers import DiffusionPipeline, ModelMixin
from diffusers.guiders.guider_utils import BaseGuidance
from torch._dynamo.eval_frame import OptimizedModule
from transformers import PreTrainedModel

from neustream.backends.diffusers.calls import Part, Role
from neustream.backends.diffusers.foreign import states_of
from neustream.errors import BackendError

BUCKETS = (1, 2, 4, 8, 16, 32)
"""Row counts that batches are padded to where each size has to be compiled."""
CHANGING = ("attn_processor", "prepare_unet", "register_forward_hook", "enable_freeu", "enable_fuser", "requires_grad_")
"""How the source of a stock call shows that it changes its denoisers while it uses them."""


class Parts(dict[int, Mapping[str, Part]]):
    """Shared parts by `id` of the model and by method ("": the model itself), and the `device` they run on."""

    device: torch.device
    inference: bool
    """Whether the stock call runs in `torch.inference_mode` (most run in `torch.no_grad`)."""
    own: bool
    """Whether the stock call changes its denoisers: then each request has its own, on the same weights."""


def models_of(pipe: DiffusionPipeline, prefix: str = "") -> Iterator[tuple[str, torch.nn.Module]]:
    """The models of a pipeline and of the pipelines inside it, by name."""
    for name, value in pipe.__dict__.items():
        if isinstance(value, torch.nn.Module):
            yield prefix + name, value
        elif isinstance(value, DiffusionPipeline):
            yield from models_of(value, f"{prefix}{name}.")


def inner(model: torch.nn.Module) -> torch.nn.Module:
    """What `torch.compile` made a module of; else the module itself."""
    return model._orig_mod if isinstance(model, OptimizedModule) else model


def role_of(name: str, model: torch.nn.Module) -> Role | None:
    """Which stage a model's calls belong to; None for those that run inside their request (a safety checker)."""
    model = inner(model)
    kind, last = type(model).__name__, name.rpartition(".")[2]
    if last == "safety_checker":
        return None
    if kind.startswith(("Autoencoder", "AsymmetricAutoencoder", "VQ", "ConsistencyDecoder", "PaellaVQ")):
        return "decode"
    if isinstance(model, PreTrainedModel):
        return "encode"
    return "denoise" if isinstance(model, ModelMixin) else None


def parts_of(
    pipe: DiffusionPipeline,
    *,
    buckets: Sequence[int] = (),
    max_rows: int | None = None,
    compile: bool | Mapping[str, Any] = False,
) -> Parts:
    """The shared parts of `pipe`.

    Args:
        buckets: row counts that every batch is padded to, by repeating its first row.
        max_rows: the most rows in one call.
        compile: compile denoisers with `torch.compile` (these are its arguments), once per bucket.

    Raises:
        BackendError: nothing in it denoises, a model keeps state between the calls of one request, or the
            stock call changes what requests share.
    """
    if any(size < 1 for size in buckets):
        raise BackendError(f"buckets must be whole numbers of at least 1, got {list(buckets)}")
    options = {"dynamic": False, **(compile if isinstance(compile, Mapping) else {})}
    buckets = tuple(buckets) or (BUCKETS if compile else ())
    limit = max(buckets, default=None) if max_rows is None else max_rows
    parts = Parts()
    for name, model in models_of(pipe):
        role, owner = role_of(name, model), type(inner(model)).__name__
        if role is None:
            continue
        if why := next(states_of(name, model), ""):
            raise BackendError(
                f"{type(pipe).__name__} cannot be shared: {why}; results may depend on calls before them, "
                "and those of other requests are among them"
            )
        if role == "decode":
            methods = {method: getattr(model, method) for method in ("encode", "decode") if hasattr(model, method)}
        else:
            compiled = bool(compile) and role == "denoise"
            methods = {"": torch.compile(model, **options) if compiled else model}
        parts[id(model)] = {
            method: Part(
                f"{name}.{method}" if method else name,
                role,
                function,
                owner,
                model=inner(model),
                signature=inner(model).forward if not method else function,
                buckets=buckets,
                max_rows=limit,
                reused=(bool(compile) and role == "denoise") or isinstance(model, OptimizedModule),
            )
            for method, function in methods.items()
        }
    if not any(part.role == "denoise" for methods in parts.values() for part in methods.values()):
        names = ", ".join(f"{name} ({type(model).__name__})" for name, model in models_of(pipe)) or "none"
        raise BackendError(
            f"{type(pipe).__name__} has no denoiser that is a diffusers model, so there are no steps to schedule; "
            f"its models: {names}"
        )
    source = "".join(_source(cls.__dict__["__call__"]) for cls in type(pipe).__mro__ if "__call__" in cls.__dict__)
    parts.own = any(word in source for word in CHANGING) or any(map(_prepares, pipe.__dict__.values()))
    if parts.own and compile:
        raise BackendError(
            f"{type(pipe).__name__} cannot be compiled: its call changes its denoisers, so each request has its own"
        )
    parts.device = pipe._execution_device
    parts.inference = "inference_mode" in source
    return parts


def roles_of(parts: Parts) -> list[str]:
    """What the stages do that requests go through, in their order.

    Without an encoder they begin with their first denoising step, without a decoder they end with
    their last.
    """
    roles = {part.role for methods in parts.values() for part in methods.values()}
    return [role for role in ("encode", "denoise", "decode") if role in roles]


def _prepares(component: Any) -> bool:
    """Whether a component is a guider that changes the denoiser for its calls."""
    return isinstance(component, BaseGuidance) and type(component).prepare_models is not BaseGuidance.prepare_models


def _source(call: Any) -> str:
    try:
        return inspect.getsource(inspect.unwrap(call))
    except OSError:  # made at run time
        return ""
