"""The short way in: `serve` a stock pipeline or a graph for real, or `simulate` a graph."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, overload

from neustream.core.graph import Graph
from neustream.core.policies import Priced
from neustream.core.policy import Policy, Pool
from neustream.core.profile import LatencyProfile
from neustream.core.scheduler import Scheduler
from neustream.core.types import Request
from neustream.engine.clock import VirtualClock, WallClock
from neustream.engine.engine import Engine
from neustream.engine.events import Observer
from neustream.engine.executor import ProfiledExecutor, StreamModule, ThreadExecutor
from neustream.engine.member import Member
from neustream.engine.report import Report

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from transformers import PreTrainedModel

    from neustream.backends.diffusers import PipelineEngine
    from neustream.backends.transformers import TextEngine

POOL = "pool"


def _scheduler(graph: Graph, profiles: Mapping[str, LatencyProfile], policy: Policy | None) -> Scheduler:
    return Scheduler([Pool(POOL, tuple(graph.stages))], policy or Priced(), profiles)


@overload
def serve(
    model: Graph,
    modules: Mapping[str, StreamModule],
    profiles: Mapping[str, LatencyProfile],
    *,
    policy: Policy | None = None,
    device: str = "cpu",
    observers: Sequence[Observer] = (),
) -> Engine: ...


@overload
def serve(model: DiffusionPipeline | Mapping[str, DiffusionPipeline], **options: Any) -> PipelineEngine: ...


@overload
def serve(model: PreTrainedModel, tokenizer: Any = None, **options: Any) -> TextEngine: ...


def serve(model: Any, *args: Any, **options: Any) -> Any:
    """Serve a model on one device of this process.

    A stock diffusers pipeline (or several by name): `serve(pipe, slo=5.0)` gives a running
    `PipelineEngine`, whose `submit` takes the pipeline's own arguments; its options are those of
    `neustream.backends.diffusers.PipelineEngine`.

    A causal language model of transformers: `serve(model, tokenizer, slo=SLO(first=0.5, step=0.05))` gives a
    running `TextEngine`, whose `submit` takes prompts; its options are those of
    `neustream.backends.transformers.TextEngine`.

    A graph of your own: `serve(graph, modules, profiles, policy=..., device=..., observers=...)` gives
    an `Engine`, to be used as a context manager. `policy` defaults to `Priced`.
    """
    if isinstance(model, Graph):
        return _serve_graph(model, *args, **options)
    if any(cls.__module__ == "transformers.modeling_utils" for cls in type(model).__mro__):  # without importing it
        from neustream.backends.transformers import TextEngine

        return TextEngine(model, *args, **options)
    from neustream.backends.diffusers import PipelineEngine

    return PipelineEngine(model, *args, **options)


def _serve_graph(
    graph: Graph,
    modules: Mapping[str, StreamModule],
    profiles: Mapping[str, LatencyProfile],
    *,
    policy: Policy | None = None,
    device: str = "cpu",
    observers: Sequence[Observer] = (),
) -> Engine:
    executor = ThreadExecutor(modules, (device,))
    return Engine(Member(_scheduler(graph, profiles, policy), {POOL: executor}), WallClock(), observers)


def simulate(
    graph: Graph,
    profiles: Mapping[str, LatencyProfile],
    requests: Iterable[Request],
    *,
    policy: Policy | None = None,
    observers: Sequence[Observer] = (),
) -> Report:
    """What would come of `requests` on one worker, by the profiles, in virtual time."""
    scheduler = _scheduler(graph, profiles, policy)
    return Engine(Member(scheduler, {POOL: ProfiledExecutor()}), VirtualClock(), observers).run(requests)
