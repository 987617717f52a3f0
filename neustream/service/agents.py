"""Agents: graphs that call the other models of a service, and tools."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from neustream.core.events import Emitted, Update
from neustream.core.graph import Graph, Seq
from neustream.core.job import Job
from neustream.core.kv_cache import KVCache
from neustream.core.nodes import call
from neustream.core.types import SLO
from neustream.engine.answers import Result
from neustream.engine.events import Observer
from neustream.errors import BackendError, GraphError, NeustreamError, nearest, shown, told
from neustream.service.graphs import run_of
from neustream.service.mount import Call, Device, Host, Instance, Mount

Arguments = Callable[[Job], Mapping[str, Any]]
"""The arguments of a call of a model, as its `submit` takes them, from the job that gets there."""

CALL = "~call"
"""The parameter that holds what a model made of the arguments of a call."""


class Model:
    """Another model of the service, as an agent may call it."""

    def __init__(self, name: str, mount: Mount) -> None:
        self.name = name
        self._mount = mount
        self.graph: Graph | None = None
        """Of its requests, once there was one."""

    def call(self, name: str, arguments: Arguments, *, like: Mapping[str, Any], slo: SLO | None = None) -> Seq:
        """A call of the model, as a node; the state gets its result (a `Completion`) under `name`.

        Args:
            arguments: asked when the job gets there.
            like: arguments that are expected while they cannot be asked; the model checks them now.
            slo: what the call is promised in place of what the request is.

        Raises:
            BackendError: the model cannot be called by agents.
            RequestError: it cannot serve `like`.
        """
        expected = self._params(lambda job: like, None)
        assert self.graph is not None
        params = partial(self._params, arguments)
        return call(self.graph, name, slo=slo, params=params, expect=expected, result=_result)

    def _params(self, arguments: Arguments, job: Job | None) -> Mapping[str, Any]:
        """What a call reads as `job.params`."""
        asked = self._mount.request(**arguments(job))  # type: ignore[arg-type]  # `like` needs no job
        if not isinstance(asked, Call):
            raise BackendError(f"model {self.name!r} cannot be called by an agent: its requests are probed first")
        if self.graph is None:
            self.graph = asked.graph
        if asked.graph is not self.graph:
            raise BackendError(f"model {self.name!r} cannot be called by an agent: its requests have several graphs")
        asked.over()
        return {**asked.params, CALL: asked}


def _result(job: Job, outputs: Sequence[Update]) -> Any:
    """What a model makes of the outputs of a call."""
    asked: Call = job.params[CALL]
    emitted = [Emitted(job.id, index, asked.reads(update), 0.0, 0.0) for index, update in enumerate(outputs)]
    last = outputs[-1] if outputs else dict(job.state)
    return asked.value(Result(job.id, "done", "", last, 0.0, True), emitted)


class Models(Mapping[str, Model]):
    """The other models of a service, by name."""

    def __init__(self, mounts: Mapping[str, Mount]) -> None:
        self._models = {name: Model(name, mount) for name, mount in mounts.items()}

    def __getitem__(self, name: str) -> Model:
        if name not in self._models:
            raise BackendError(f"no model {shown(name)}; {nearest(str(name), self._models)}")
        return self._models[name]

    def __iter__(self) -> Any:
        return iter(self._models)

    def __len__(self) -> int:
        return len(self._models)


class AgentMount:
    """A graph that calls the other models of its service, and tools.

    Args:
        build: makes the graph from the other models, once those are open.
    """

    observers: Sequence[Observer] = ()
    kv_caches: Mapping[str, KVCache] = {}
    step_tokens: int | None = None
    graph: Graph

    def __init__(self, build: Callable[[Models], Graph]) -> None:
        self._build = build
        self._others: Mapping[str, Mount] = {}

    def join(self, others: Mapping[str, Mount]) -> None:
        """The other models of the service; asked before anything is opened."""
        self._others = {name: mount for name, mount in others.items() if not isinstance(mount, AgentMount)}

    @property
    def device(self) -> str:
        return next((mount.device for mount in self._others.values()), "cpu")

    def check(self, name: str) -> None:
        if not callable(self._build):
            raise BackendError(f"{name!r}: an agent is a function that makes its graph, got {shown(self._build)}")

    def open(self, name: str, devices: Sequence[Device], host: Host) -> Sequence[Instance]:
        models = Models(self._others)
        try:
            graph = self._build(models)
        except NeustreamError:
            raise
        except Exception as error:
            raise BackendError(f"making the graph of agent {name!r} raised {told(error)}") from error
        if not isinstance(graph, Graph):
            raise BackendError(f"an agent's graph is a neustream.Graph, got {shown(graph)}")
        called = {stage for model in models.values() if model.graph for stage in model.graph.stages}
        tools = {stage.name: stage for stage in graph.stages.values() if stage.tool is not None}
        for stage in graph.stages:
            if stage not in called and stage not in tools:
                raise GraphError(
                    f"graph {graph.name!r}: stage {stage!r} is no tool, and of no model that the agent calls"
                )
        self.graph = graph
        return [Instance({}, {}, tools=tools) for _ in devices]

    def request(self, params: Mapping[str, Any] | None = None, /, **more: Any) -> Call:
        """A run of the graph with `params`, given as a mapping or by name; its answer is the state."""
        return run_of(self.graph, params, more, _told)

    def rehearsal(self) -> Sequence[Call]:
        return ()

    def close(self) -> None:
        self._others = {}


def _told(output: Emitted) -> Mapping[str, Any]:
    """An output as iterating over an answer gives it."""
    return {"call": output.leg, "branch": output.branch, **output.update}
