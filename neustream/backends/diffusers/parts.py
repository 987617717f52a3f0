"""What of a pipeline its requests can share, and in which stage: found by looking at its components."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Integral
from typing import Any

import torch
from diffusers import DiffusionPipeline, ModelMixin
from diffusers.guiders.guider_utils import BaseGuidance
from torch._dynamo.eval_frame import OptimizedModule
from transformers import PreTrainedModel

from neustream.backends.diffusers.calls import Part, Role
from neustream.backends.diffusers.foreign import states_of
from neustream.backends.diffusers.lacking import is_lacking, refusing, shaped
from neustream.backends.diffusers.replayed import wrapped
from neustream.backends.diffusers.writing import Writing
from neustream.errors import BackendError, shown

BUCKETS = (1, 2, 4, 8, 16, 32)
"""Row counts that batches are padded to where each size has to be compiled."""
CHANGING = ("attn_processor", "prepare_unet", "register_forward_hook", "enable_freeu", "enable_fuser", "requires_grad_")
"""How the source of a stock call shows that it changes its denoisers while it uses them."""


class Parts(dict[int, Mapping[str, Part]]):
    """Shared parts by `id` of the model and by method ("": the model itself), and the `device` they run on.

    `lacking`: names of the models that are not here, by what they do; those of no role are called where
    is decoded. `trial`: the parts where a call is only looked at or timed: zeros stand for what these say.
    """

    device: torch.device
    lacking: Mapping[str, Sequence[str]]
    trial: Parts
    inference: bool
    """Whether the stock call runs in `torch.inference_mode` (most run in `torch.no_grad`)."""
    own: bool
    """Whether the stock call changes its denoisers: then each request has its own, on the same weights."""
    writing: Writing
    """What calls so far showed of who writes to weights."""


def models_of(pipe: DiffusionPipeline, prefix: str = "") -> Iterator[tuple[str, torch.nn.Module]]:
    """The models of a pipeline and of the pipelines inside it, by name."""
    for name, value in pipe.__dict__.items():
        if isinstance(value, torch.nn.Module):
            yield prefix + name, value
        elif isinstance(value, DiffusionPipeline):
            yield from models_of(value, f"{prefix}{name}.")


def execution_device(pipe: DiffusionPipeline) -> torch.device:
    """Where a pipeline runs: where those of its models are that are here; the CPU if it has none."""
    models = [model for _, model in models_of(pipe)]
    if models and not any(map(is_lacking, models)):
        return pipe._execution_device
    devices = [model.device for model in models if isinstance(model, ModelMixin | PreTrainedModel)]
    return next((device for device in devices if device.type != "meta"), torch.device("cpu"))


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


@dataclass(frozen=True)
class _How:
    """How parts are called: rows that batches are padded to, the most rows, arguments of `torch.compile`, graphs."""

    buckets: tuple[int, ...]
    max_rows: int | None
    compile: Mapping[str, Any] | None
    graphs: bool | None


def parts_of(
    pipe: DiffusionPipeline,
    *,
    buckets: Sequence[int] = (),
    max_rows: int | None = None,
    compile: bool | Mapping[str, Any] = False,
    graphs: bool | None = False,
) -> Parts:
    """The shared parts of `pipe`.

    Args:
        buckets: row counts that every batch is padded to, by repeating its first row.
        max_rows: the most rows in one call.
        compile: compile denoisers with `torch.compile` (these are its arguments), once per bucket.
        graphs: replay calls of denoisers as CUDA graphs; None: where that is possible.

    Raises:
        BackendError: nothing in it denoises, a model keeps state between the calls of one request, the
            stock call changes what requests share, or it cannot be as `compile` and `graphs` say.
    """
    how = _how(buckets, max_rows, compile, graphs)
    device = execution_device(pipe)
    parts, trials = _by_model(pipe, how, device)
    if "denoise" not in roles_of(parts):
        raise BackendError(_nothing_denoises(pipe))
    classes = [cls for cls in type(pipe).__mro__ if "__call__" in cls.__dict__]
    source = "".join([_source(cls.__dict__["__call__"]) for cls in classes])
    changes = any(word in source for word in CHANGING)
    parts.own = changes or any(map(_prepares, pipe.__dict__.values()))
    if parts.own and compile:
        raise BackendError(
            f"{type(pipe).__name__} cannot be compiled: its call changes its denoisers, so each request has its own"
        )
    parts.device = device
    parts.lacking = _lacking(pipe)
    parts.inference = "inference_mode" in source
    shared = [(name, model) for name, model in models_of(pipe) if id(model) in parts]
    parts.writing = Writing(shared)
    parts.trial = copy.copy(parts)
    parts.trial.update(trials)
    return parts


def _by_model(pipe: DiffusionPipeline, how: _How, device: torch.device) -> tuple[Parts, dict[int, Mapping[str, Part]]]:
    """The parts of all models with a role, and those at trials of models that are not here."""
    parts = Parts()
    trials: dict[int, Mapping[str, Part]] = {}
    plain = replace(how, compile=None, graphs=False)
    for name, model in models_of(pipe):
        role = role_of(name, model)
        if role is None:
            continue
        _check_stateless(pipe, name, model)
        if not is_lacking(model):
            parts[id(model)] = _methods_of(name, model, role, how, device)
            continue
        methods = _methods_of(name, model, role, plain, device)
        parts[id(model)] = {method: refusing(part, device) for method, part in methods.items()}
        trials[id(model)] = {method: shaped(part, device) for method, part in methods.items()}
    return parts, trials


def _lacking(pipe: DiffusionPipeline) -> Mapping[str, Sequence[str]]:
    """Names of the models that are not here, by what they do."""
    lacking: dict[str, list[str]] = {}
    for name, model in models_of(pipe):
        if is_lacking(model):
            lacking.setdefault(role_of(name, model) or "decode", []).append(name)
    return lacking


def _how(buckets: Sequence[int], max_rows: int | None, compile: bool | Mapping[str, Any], graphs: bool | None) -> _How:
    """BackendError for buckets that are none."""
    if graphs and compile:
        raise BackendError("graphs=True beside compile: give compile={'mode': 'reduce-overhead'} for graphs of its own")
    for size in buckets:
        if isinstance(size, bool) or not isinstance(size, Integral) or size < 1:
            what = f"whole numbers of at least 1, got {shown(list(buckets))}"
            raise BackendError(f"buckets must be {what}")
    given = compile if isinstance(compile, Mapping) else {}
    options = {"dynamic": False, **given} if compile else None
    sizes = tuple(buckets) or (BUCKETS if compile else ())
    return _How(sizes, max(sizes, default=None) if max_rows is None else max_rows, options, graphs)


def _check_stateless(pipe: DiffusionPipeline, name: str, model: torch.nn.Module) -> None:
    """BackendError if results of a model may depend on calls before them."""
    why = next(states_of(name, model), "")
    if why:
        raise BackendError(
            f"{type(pipe).__name__} cannot be shared: {why}; results may depend on calls before "
            "them, and those of other requests are among them"
        )


def _methods_of(name: str, model: torch.nn.Module, role: Role, how: _How, device: torch.device) -> dict[str, Part]:
    """What requests share of a model, by method; "" is the model itself."""
    if role == "decode":
        shared = [method for method in ("encode", "decode") if hasattr(model, method)]
        return {one: _part(f"{name}.{one}", model, role, getattr(model, one), how) for one in shared}
    if role == "encode":
        return {"": _part(name, model, role, model, how)}
    if how.compile is None:
        return {"": _part(name, model, role, wrapped(name, model, device, how.graphs), how)}
    compiled = torch.compile(model, **how.compile)
    return {"": _part(name, model, role, compiled, how, reused=True)}


def _part(
    name: str,
    model: torch.nn.Module,
    role: Role,
    function: Callable[..., Any],
    how: _How,
    *,
    reused: bool = False,
) -> Part:
    return Part(
        name,
        role,
        function,
        type(inner(model)).__name__,
        model=inner(model),
        signature=function if role == "decode" else inner(model).forward,
        buckets=how.buckets,
        max_rows=how.max_rows,
        reused=reused or isinstance(model, OptimizedModule),
    )


def _nothing_denoises(pipe: DiffusionPipeline) -> str:
    models = [f"{name} ({type(model).__name__})" for name, model in models_of(pipe)]
    return (
        f"{type(pipe).__name__} has no denoiser that is a diffusers model, so there are no steps "
        f"to schedule; its models: {', '.join(models) or 'none'}"
    )


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
