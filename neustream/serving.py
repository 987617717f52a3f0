"""The short way in: `serve` a model for real, or `simulate` a graph."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, TypedDict, Unpack, overload

from neustream.core.graph import Graph
from neustream.core.kv_cache import KVCache
from neustream.core.policies import Priced
from neustream.core.policy import Policy, Pool
from neustream.core.profile import LatencyProfile
from neustream.core.scheduler import Scheduler
from neustream.core.steps import StepLatency
from neustream.core.types import SLO, Request
from neustream.engine.clock import VirtualClock
from neustream.engine.engine import Engine
from neustream.engine.events import Observer
from neustream.engine.executor import ProfiledExecutor, StreamModule
from neustream.engine.member import Member
from neustream.engine.report import Report
from neustream.engine.routing import Router
from neustream.errors import BackendError, shown
from neustream.service.agents import AgentMount, Models
from neustream.service.graphs import GraphMount
from neustream.service.mount import Mount
from neustream.service.service import Service

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from transformers import PreTrainedModel

Modules: TypeAlias = Mapping[str, StreamModule] | Callable[[str], Mapping[str, StreamModule]]
"""The modules of a graph by stage, or what makes them for a device."""


class ServiceOptions(TypedDict, total=False):
    """What every service takes; see `neustream.service.service.Service`."""

    devices: Sequence[str] | None
    placement: Mapping[str, Sequence[str]] | None
    slo: SLO | float | None
    policy: Policy | str | None
    stages: Sequence[str] | None
    router: Router | None
    max_open: int | None
    step_timeout_s: float | None
    observers: Sequence[Observer]


class PipelineOptions(ServiceOptions, total=False):
    """And with a pipeline; see `neustream.backends.diffusers.PipelineMount`."""

    profiles: Mapping[str, LatencyProfile] | Path | str | None
    samples: Sequence[Mapping[str, Any]] | None
    max_batch: int
    encode_batch: int
    decode_batch: int
    max_shapes: int
    max_pixels: int
    buckets: Sequence[int]
    compile: bool | Mapping[str, Any]
    graphs: bool | None
    check_finite: bool
    measure_s: float
    cache: Path | str | None
    progress: bool | None


class TextOptions(ServiceOptions, total=False):
    """And with a language model; see `neustream.backends.transformers.TextMount`."""

    profile: StepLatency | Path | str | None
    see_profile: LatencyProfile | None
    slots: int
    max_batch: int | None
    max_len: int | None
    buckets: Sequence[int]
    kv_cache: KVCache | None
    step_tokens: int | None
    prepack: bool | None
    graphs: bool | None
    measure_s: float
    cache: Path | str | None
    progress: bool | None


@overload
def serve(
    model: Graph,
    modules: Modules,
    profiles: Mapping[str, LatencyProfile],
    **options: Unpack[ServiceOptions],
) -> Service: ...


@overload
def serve(
    model: Mapping[str, DiffusionPipeline | PreTrainedModel | tuple[Any, ...] | Mount | Callable[[Models], Graph]],
    /,
    **options: Unpack[ServiceOptions],
) -> Service: ...


@overload
def serve(model: DiffusionPipeline, /, **options: Unpack[PipelineOptions]) -> Service: ...


@overload
def serve(model: PreTrainedModel, tokenizer: Any = None, /, **options: Unpack[TextOptions]) -> Service: ...


def serve(model: Any, *args: Any, **options: Any) -> Service:
    """Serve a model, or several by name, on the devices of this process; running at once.

    * `serve(pipe, slo=5.0)`: a stock diffusers pipeline; `submit` takes its own call's arguments.
    * `serve(model, tokenizer, slo=SLO(first=0.5, step=0.05))`: a causal language model of
      transformers; `submit` takes prompts, and answers stream tokens. With the processor of a
      vision-language model in place of the tokenizer, prompts have images too.
    * `serve(graph, modules, profiles)`: a graph of your own; `submit` takes its parameters.
    * `serve({"sd": pipe, "chat": (model, tokenizer), "mine": (graph, modules, profiles)})`: several
      on one device, decided by one scheduler. Options of one model go into its mount:
      `{"sd": PipelineMount(pipe, max_batch=8)}`.
    * `serve({"chat": (model, tokenizer), "agent": build})`: `build(models)` makes the graph of an
      agent, which calls the other models (`models["chat"].call(...)`) and tools.

    `devices=["cuda:0", "cuda:1"]` makes an instance on each; `placement={"sd": ["cuda:0"]}` says
    which models go where. The other options of all services are those of `Service`, those of one
    model those of its mount.

    Raises:
        BackendError: the model cannot be served, and why.
    """
    own = {name: options.pop(name) for name in ServiceOptions.__annotations__ if name in options}
    if not isinstance(model, Mapping):
        return Service({"": mount_of(model, *args, **options)}, **own)
    if args or options:
        what = ", ".join(map(repr, options)) or f"{len(args)} more argument(s)"
        raise BackendError(
            f"serve: {what} beside several models; give them to the mount of one, as "
            "{'sd': PipelineMount(pipe, max_batch=8)}"
        )
    return Service({name: _mount_in(name, value) for name, value in model.items()}, **own)


def mount_of(model: Any, *args: Any, **options: Any) -> Mount:
    """A model, ready to be scheduled, as `serve` takes it; BackendError for what is none."""
    if isinstance(model, Graph):
        return GraphMount(model, *args, **options)
    if inspect.isfunction(model) and not args and not options:
        return AgentMount(model)
    bases = {f"{cls.__module__}.{cls.__name__}" for cls in type(model).__mro__}
    if not bases.isdisjoint(("transformers.modeling_utils.PreTrainedModel", "peft.peft_model.PeftModel")):
        # without importing them
        from neustream.backends.transformers import TextMount

        return TextMount(model, *args, **options)
    if "diffusers.pipelines.pipeline_utils.DiffusionPipeline" in bases:
        from neustream.backends.diffusers import PipelineMount

        return PipelineMount(model, *args, **options)
    if not args and not options and hasattr(model, "request") and hasattr(model, "open"):
        mount: Mount = model
        return mount
    raise BackendError(
        "serve takes a diffusers pipeline, a causal language model of transformers, a graph, a "
        f"mount, or several of these by name; got {shown(model)}"
    )


def _mount_in(name: Any, value: Any) -> Mount:
    """The mount of one of several models."""
    if not isinstance(name, str) or not name or "/" in name:
        raise BackendError(f"serve: a model's name is a word without '/', got {shown(name)}")
    parts = value if isinstance(value, tuple) else (value,)
    if not parts:
        raise BackendError(f"serve: model {name!r} is empty")
    try:
        return mount_of(*parts)
    except BackendError as error:
        raise BackendError(f"model {name!r}: {error}") from error


def simulate(
    graph: Graph,
    profiles: Mapping[str, LatencyProfile],
    requests: Iterable[Request],
    *,
    policy: Policy | None = None,
    observers: Sequence[Observer] = (),
) -> Report:
    """What would come of `requests` on one worker, by the profiles, in virtual time."""
    pool = Pool("pool", tuple(graph.stages))
    scheduler = Scheduler([pool], policy or Priced(), profiles)
    member = Member(scheduler, {"pool": ProfiledExecutor()})
    return Engine(member, VirtualClock(), observers).run(requests)
